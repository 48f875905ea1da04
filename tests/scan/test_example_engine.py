"""The engine of tests/example_engine, as others would have theirs: built, installed, found by its name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fdbroker.scan.plugins import configure

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "example_engine"
TIMEOUT = 120


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without a network and install it into a directory of its own."""
    directory = tmp_path_factory.mktemp("example")
    copy = shutil.copytree(SOURCE, directory / "source")
    python = [sys.executable, "-I", "-m"]
    build: list[str | Path] = [*python, "hatchling", "build", "-t", "wheel", "-d", directory]
    subprocess.run(build, cwd=copy, check=True, capture_output=True, timeout=TIMEOUT)
    [wheel] = directory.glob("*.whl")
    target = directory / "site"
    # As pip does with a wheel of modules alone; fdbroker's own is installed by pip elsewhere.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_example_is_built_installed_and_passes_its_own_tests(installed: Path, tmp_path: Path) -> None:
    shutil.copy(SOURCE / "test_words.py", tmp_path)
    run: list[str | Path] = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run += ["--rootdir", tmp_path, tmp_path]
    result = subprocess.run(
        run,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout


def test_a_name_that_two_packages_have_is_nobodys(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(installed, tmp_path / "site")
    [metadata] = other.glob("*.dist-info")
    metadata = metadata.rename(other / "fdbroker_other-1.0.dist-info")
    text = (metadata / "METADATA").read_text()
    (metadata / "METADATA").write_text(text.replace("fdbroker-words", "fdbroker-other"))
    (metadata / "entry_points.txt").write_text("[fdbroker.engines]\nwords = other:Words\n")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.syspath_prepend(str(other))
    from fdbroker.scan.engine import EngineError  # noqa: PLC0415 - beside its use

    with pytest.raises(EngineError, match="two engines are called 'words'"):
        configure("words", {"list": "/x"})
    # fdbroker's own can't be taken.
    assert configure("hashes").target == "fdbroker.scan.engines.hashes:Hashes"
