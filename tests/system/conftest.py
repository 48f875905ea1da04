"""fdbroker as a package installs it, and the reason where no systemd can be booted to try it in."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.system.booted import REPOSITORY
from tests.system.installing import install

if TYPE_CHECKING:
    from pathlib import Path

# Tests that run in the booted system, by `test_booted.py`.
collect_ignore = [] if "FDBROKER_BOOTED" in os.environ else ["inside"]


def why_not() -> str | None:
    """Return why no systemd can be booted here, None if it can be."""
    if os.geteuid() != 0:
        return "needs root: run `sudo make test-system`"
    if not os.path.exists("/lib/systemd/systemd"):
        return "needs systemd: apt-get install systemd"
    if not shutil.which("unshare"):
        return "needs unshare: apt-get install util-linux"
    if subprocess.run(["findmnt", "-t", "cgroup2"], capture_output=True, check=False).returncode:
        return "needs cgroup2, and none is mounted"
    probe = ["unshare", "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "needs the right to make namespaces: in a container, run it with --privileged"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what boots a systemd where that can't be done."""
    reason = why_not()
    for item in items:
        if reason is not None and "booting" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def dist() -> Path:
    """Return the directory of the archives, made anew where sources changed."""
    subprocess.run(["make", "-s", "dist"], cwd=REPOSITORY, check=True, capture_output=True)
    return REPOSITORY / "dist"


@pytest.fixture(scope="session")
def package(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the tree of files that a package would install, with the units enabled that it enables."""
    tree = tmp_path_factory.mktemp("package")
    [wheel] = dist.glob("*.whl")
    install(wheel, tree)
    return tree


@pytest.fixture(scope="session")
def packages() -> list[Path]:
    """Return the Debian packages as `make deb` builds them."""
    made = subprocess.run(
        ["make", "-s", "deb"], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return sorted((REPOSITORY / "build" / "deb").glob("*.deb"))
