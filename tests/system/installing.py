"""fdbroker as a package installs it: a tree of files, in the places of a Debian system, to be put below /."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from typing import TYPE_CHECKING

import pytest

from tests.system.booted import REPOSITORY
from tests.wheels import files_of, requirements

if TYPE_CHECKING:
    from pathlib import Path

PYTHON = "/usr/bin/python3"
_SITE = "usr/lib/python3/dist-packages"
_TAG = "import sys; print(sys.implementation.cache_tag)"
# From here, and where it goes.
_FILES = {
    "systemd/*.service": "usr/lib/systemd/system",
    "systemd/*.socket": "usr/lib/systemd/system",
    "systemd/system-preset/*.preset": "usr/lib/systemd/system-preset",
    "systemd/sysusers.d/*.conf": "usr/lib/sysusers.d",
    "systemd/tmpfiles.d/*.conf": "usr/lib/tmpfiles.d",
    "config/*.yaml": "etc/fdbroker",
    "config/logrotate/*": "etc/logrotate.d",
}
_SCRIPT = "#!{python} -I\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"


def install(wheel: Path, tree: Path) -> None:
    """Put the wheel, what it needs, and all files beside it into `tree`, which is new."""
    tags = {subprocess.check_output([python, "-I", "-c", _TAG]) for python in (sys.executable, PYTHON)}
    if len(tags) != 1:
        pytest.skip(f"what this interpreter has installed is of no use to {PYTHON}")
    site = tree / _SITE
    site.mkdir(parents=True)
    for distribution in requirements():
        for source, place in files_of(distribution):
            (site / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, site / place)
    _install_wheel(wheel, tree)
    for pattern, place in _FILES.items():
        (tree / place).mkdir(parents=True, exist_ok=True)
        for source in REPOSITORY.glob(pattern):
            shutil.copyfile(source, tree / place / source.name)
    for command in (
        [PYTHON, "-I", "-m", "compileall", "-q", str(site)],
        ["chmod", "-R", "u=rwX,go=rX", str(tree)],
        ["chown", "-R", "0:0", str(tree)],
    ):
        subprocess.run(command, check=True)
    units = sorted(path.name for path in (tree / "usr/lib/systemd/system").iterdir())
    subprocess.run(["systemctl", f"--root={tree}", "preset", *units], check=True, capture_output=True)


def _install_wheel(wheel: Path, tree: Path) -> None:
    """Unpack it, and make its commands."""
    site, programs = tree / _SITE, tree / "usr/bin"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    [data] = site.glob("*.data")
    shutil.copytree(data / "data", tree / "usr", dirs_exist_ok=True)
    shutil.rmtree(data)
    [table] = site.glob("fdbroker-*.dist-info/entry_points.txt")
    entries = ConfigParser()
    entries.read(table)
    for name, place in entries["console_scripts"].items():
        module, _, function = place.partition(":")
        (programs / name).write_text(_SCRIPT.format(python=PYTHON, module=module, function=function))
    for program in programs.iterdir():
        os.chmod(program, 0o755)
