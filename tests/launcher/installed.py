"""fdbroker as root installs it: what is checked of sources, policies and directories holds, without --dev."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.launcher.starting import lay_out

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHECKOUT = Path(__file__).resolve().parents[2]
# The package, and what the extra `daemon` brings.
_PACKAGES = ("fdbroker", "daemon", "lockfile", "systemd", "yaml")


@contextlib.contextmanager
def directory_of_root() -> Iterator[Path]:
    """Give a new directory which nobody else can write, nor any above it; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fdbroker-test-", dir="/var/lib") as name:
        path = Path(name)
        path.chmod(0o755)
        lay_out(path)
        yield path


@contextlib.contextmanager
def installed() -> Iterator[Path]:
    """Give the directory of the programs, `fdbrokerd` and `python`, of a new environment of root's."""
    with tempfile.TemporaryDirectory(prefix="fdbroker-test-", dir="/var/lib") as name:
        os.chmod(name, 0o755)
        # That of the venv of these tests is as far out of reach as the checkout may be.
        python = os.path.realpath(sys.executable)
        subprocess.run([python, "-I", "-m", "venv", "--without-pip", name], check=True)
        [site] = Path(name).glob("lib/python3*/site-packages")
        for package in _PACKAGES:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            assert spec.origin is not None
            shutil.copytree(
                Path(spec.origin).parent,
                site / package,
                ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            )
        shutil.copy(_CHECKOUT / "packaging/fdbrokerd", f"{name}/bin")
        subprocess.run(["chown", "-R", "0:0", name], check=True)
        subprocess.run(["chmod", "-R", "a+rX,go-w", name], check=True)
        # As pip does; the broker does not read it.
        subprocess.run([f"{name}/bin/python", "-I", "-m", "compileall", "-q", str(site)], check=True)
        yield Path(name, "bin")
