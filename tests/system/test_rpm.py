"""The spec of RPMs, built with stand-ins for Fedora's macros: the same files as of the Debian packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.system.booted import HERE, REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

SPEC = REPOSITORY / "packaging" / "rpm" / "fdbroker.spec"
# What one distribution alone has, or has its own place for.
DEBIANS = re.compile(
    r"/usr/share/(doc|lintian)/|/etc/apparmor\.d/|/usr/lib/systemd/system-preset/|.*\.dist-info/"
)
FEDORAS = re.compile(r"/usr/share/(doc|licenses)/|.*\.dist-info/")
# There the scripts put them in place once, or tmpfiles.d does; here they are rpm's to look after.
CONFIGURATION = {
    "fdbroker": {"/etc/fdbroker/policy.yaml", "/etc/logrotate.d/fdbroker"},
    "fdbroker-scand": {"/etc/fdbroker/scand.yaml"},
    "python3-fdbroker": set(),
}


@pytest.fixture(scope="module")
def rpms(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the packages by their names. Tests of the build are those of Debian's, and are left out."""
    if not shutil.which("rpmbuild"):
        pytest.skip("needs rpmbuild: apt-get install rpm")
    top = tmp_path_factory.mktemp("rpm")
    (top / "SOURCES").mkdir()
    [sdist] = dist.glob("*.tar.gz")
    shutil.copy(sdist, top / "SOURCES")
    options = ["--quiet", "--nodeps", "--nocheck", f"--load={HERE / 'rpm-macros'}", f"--define=_topdir {top}"]
    built = subprocess.run(
        ["rpmbuild", "-bb", *options, SPEC],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    found = (top / "RPMS" / "noarch").iterdir()
    return {asked(path, "--queryformat=%{NAME}")[0]: path for path in found}


def asked(package: Path, *options: str) -> list[str]:
    """Return the lines that rpm says of a package."""
    return subprocess.check_output(["rpm", "-q", *options, "-p", package], encoding="utf-8").splitlines()


def files_of_debian(package: Path) -> set[str]:
    """Return its files by the names that they have elsewhere."""
    listed = subprocess.check_output(["dpkg-deb", "--contents", package], encoding="utf-8")
    names = {line.split(maxsplit=5)[5].partition(" -> ")[0][1:] for line in listed.splitlines()}
    names = {re.sub("^/lib/", "/usr/lib/", name) for name in names if not name.endswith("/")}
    names = {name.replace("/zsh/vendor-completions/", "/zsh/site-functions/") for name in names}
    return {name.removesuffix(".gz") for name in names if not DEBIANS.match(name)}


def test_rpms_have_the_files_of_the_debian_packages(packages: list[Path], rpms: dict[str, Path]) -> None:
    debian = {path.name.partition("_")[0]: files_of_debian(path) for path in packages}
    assert debian.keys() == rpms.keys()
    for name, package in rpms.items():
        modes = dict(
            line.rsplit(" ", 1)
            for line in asked(package, "--queryformat=[%{FILENAMES} %{FILEMODES:perms}\n]")
        )
        files = {re.sub(r"(/man./.*)\.gz$", r"\1", file) for file, mode in modes.items() if mode[0] != "d"}
        files = {file for file in files if not FEDORAS.match(file)}
        assert files == debian[name] | CONFIGURATION[name], name


def test_what_the_administrator_wrote_is_not_replaced(rpms: dict[str, Path]) -> None:
    for name, package in rpms.items():
        assert set(asked(package, "--configfiles")) - {""} == CONFIGURATION[name]
    assert SPEC.read_text().count("%config(noreplace)") == sum(map(len, CONFIGURATION.values()))


def test_it_has_the_version_of_the_project(rpms: dict[str, Path], dist: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    for package in rpms.values():
        [version] = asked(package, "--queryformat=%{VERSION}")
        assert sdist.name == f"fdbroker-{version}.tar.gz"
