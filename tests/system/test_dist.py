"""What `make dist` makes: the wheel, installed without network where nothing else is, suffices."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.launcher.installed import directory_of_root
from tests.launcher.starting import started
from tests.system.booted import REPOSITORY
from tests.wheels import make_wheels

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

# Every module is there and finds what it imports, but for what two other extras bring.
IMPORT_ALL = """\
import importlib, pkgutil, fdbroker
for module in pkgutil.walk_packages(fdbroker.__path__, "fdbroker."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "yara_x"):
            raise
print(fdbroker.__file__)
"""
ASK = (
    "import sys, fdbroker\nwith fdbroker.connect(sys.argv[1]) as c, c.open(sys.argv[2]) as f: print(f.read())"
)


@pytest.fixture(scope="module")
def programs(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the directory of programs of a new environment that has the wheel and what it requires."""
    wheels = tmp_path_factory.mktemp("wheels")
    make_wheels(wheels)
    [wheel] = dist.glob("*.whl")
    with directory_of_root() as directory:
        new = directory / "venv"
        interpreter = os.path.realpath(sys.executable)
        subprocess.run([interpreter, "-I", "-m", "venv", "--without-pip", new], check=True)
        pip = [sys.executable, "-I", "-m", "pip", "--python", str(new / "bin" / "python"), "install", "-q"]
        offline = ["--no-index", "--find-links", str(wheels), f"{wheel}[daemon,cli]"]
        subprocess.run([*pip, *offline], check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull})
        yield new / "bin"


def _output(*command: object, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, encoding="utf-8", env=environment, cwd=cwd
    ).stdout


def test_all_programs_are_there(programs: Path, dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    version = wheel.name.split("-")[1]
    assert _output(programs / "fdbroker", "--version", cwd=programs) == f"fdbroker {version}\n"
    assert version in _output(programs / "fdbroker-scand", "--version", cwd=programs)
    assert "usage: fdbrokerd" in _output(programs / "fdbrokerd", "--help", cwd=programs)


def test_every_module_imports_by_what_the_wheel_brings(programs: Path) -> None:
    place = Path(_output(programs / "python", "-I", "-c", IMPORT_ALL, cwd=programs).strip())
    assert programs.parent in place.parents


def test_a_broker_that_the_wheel_starts_serves_a_client_of_the_wheel(programs: Path) -> None:
    directory = programs.parents[1]
    with started(directory / "policy.yaml", "--audit=none", installation=programs):
        ask = [programs / "python", "-I", "-c", ASK, directory / "run/requests", directory / "tree/file"]
        assert _output(*ask, cwd=programs) == "b'content'\n"


def test_the_sdist_has_what_a_package_is_built_of_and_gives_the_same_wheel(
    dist: Path, tmp_path: Path
) -> None:
    [sdist] = dist.glob("*.tar.gz")
    [wheel] = dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        assert {(member.uid, member.gid, member.mode & 0o022) for member in archive} == {(0, 0, 0)}
    subprocess.run(["tar", "-xf", sdist, "-C", tmp_path], check=True)
    [tree] = tmp_path.iterdir()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, encoding="utf-8"
    ).stdout.splitlines()
    assert not [name for name in tracked if (REPOSITORY / name).exists() and not (tree / name).exists()]
    [stamp] = {int(member.stat().st_mtime) for member in tree.glob("LICENSE")}
    build = [sys.executable, "-I", "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(stamp), "TZ": "Pacific/Kiritimati"}
    subprocess.run(build, cwd=tree, check=True, capture_output=True, env=environment, umask=0o077)
    assert (tmp_path / "again" / wheel.name).read_bytes() == wheel.read_bytes()


def test_an_unpacked_sdist_makes_archives_without_git_and_anew_each_time(dist: Path, tmp_path: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", sdist, "-C", tmp_path], check=True)
    [tree] = tmp_path.iterdir()
    (tree / "build").mkdir()
    venv = REPOSITORY / "build" / "venv"
    make = ["make", "-s", f"--assume-old={venv}/.ready", f"VENV={venv}", "dist"]
    environment = os.environ | {"GIT_DIR": str(tmp_path / "nowhere")}
    for line in ("", "changed = True\n"):
        with (tree / "src/fdbroker/__init__.py").open("a") as file:
            file.write(line)
        subprocess.run(make, cwd=tree, env=environment, check=True, capture_output=True)
        [made] = (tree / "dist").glob("*.whl")
        with zipfile.ZipFile(made) as wheel:
            assert wheel.read("fdbroker/__init__.py").endswith(line.encode())
