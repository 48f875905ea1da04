"""The sources and an interpreter where every uid can reach them, wherever the checkout and its venv are."""

from __future__ import annotations

import compileall
import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

# The command with what it imports, all of it pure Python.
_PACKAGES = (
    "fdbroker",
    "click",
    "rich",
    "prometheus_client",
    "yaml",
)
_BEING_WRITTEN = shutil.ignore_patterns(
    "*.pyc.*"
)  # bytecode before it gets its name, by whoever runs beside us


def copy_systemd(directory: Path) -> Path:
    """Copy the package that takes systemd's sockets; return where it is found, which others can reach.

    No other package needs it, and it is no pure Python.
    """
    spec = importlib.util.find_spec("systemd")
    assert spec is not None
    assert spec.origin is not None
    to = directory / "packages"
    shutil.copytree(Path(spec.origin).parent, to / "systemd")
    return to


def copy_package(package: Path, to: Path) -> None:
    """Copy a package with its bytecode, and the times that this is checked by."""
    shutil.copytree(package, to, ignore=_BEING_WRITTEN)


class ForOtherUsers(NamedTuple):
    """An interpreter, to be run with -P and PYTHONPATH `directory`, where the packages are."""

    python: str
    directory: Path


@contextlib.contextmanager
def for_other_users() -> Iterator[ForOtherUsers]:
    """Copy the packages to a reachable directory; skip the test where the interpreter is out of reach.

    The interpreter is the one that the venv was made from: that of the venv is
    as far out of reach as the venv, and a checkout below /root is out of reach.
    """
    python = os.path.realpath(sys.executable)
    if not _others_can_execute(python):
        pytest.skip(f"the interpreter {python} is out of reach for other users")
    with reachable_directory() as directory:
        for name in _PACKAGES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            copy_package(Path(spec.origin).parent, directory / name)
        # And with what is missing of it, as the other user can't write any.
        compileall.compile_dir(directory, quiet=1)
        for parent, _, files in os.walk(directory):
            os.chmod(parent, 0o755)
            for file in files:
                os.chmod(os.path.join(parent, file), 0o644)
        yield ForOtherUsers(python, directory)


def import_from_copy(others: ForOtherUsers) -> None:
    """Be an interpreter that was started so, in a forked child: what it still imports comes from the copy."""
    outside = [place for place in sys.path if place.startswith((sys.base_prefix, sys.base_exec_prefix))]
    sys.executable, sys.path[:] = others.python, [str(others.directory), *outside]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _PACKAGES and hasattr(module, "__path__"):
            module.__path__ = [str(others.directory / name.replace(".", "/"))]


def _others_can_execute(path: str) -> bool:
    return all(os.stat(part).st_mode & 0o001 for part in (Path(path), *Path(path).parents))
