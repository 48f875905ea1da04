"""`fdbrokerd --precompile`: the broker's sources, compiled by root for the starts to come."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from importlib.machinery import SourcelessFileLoader
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker import entry
from fdbroker.launcher import precompiling
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.launch import launch
from fdbroker.launcher.precompiling import precompile
from tests.launcher.installed import directory_of_root

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give where it goes to, with sources that are as good as root's; two folders of them will do."""
    monkeypatch.setattr(entry, "TRUSTED_FOLDERS", frozenset({"kernel", "policy"}))
    monkeypatch.setattr(entry, "check_only_root_writes", lambda _path: None)
    with directory_of_root() as directory:
        yield directory / "cache" / "code"


def test_each_source_is_there_as_this_interpreter_compiles_it_and_older_ones_are_not(place: Path) -> None:
    precompile(str(place))
    sources = list(precompiling._sources())
    assert {os.path.basename(os.path.dirname(source)) for source in sources} == entry.TRUSTED_FOLDERS
    for source in sources:
        with open(source, "rb") as file:
            text = file.read()
        path = place / entry.name_of_code(source, text)
        code = SourcelessFileLoader("", str(path)).get_code("")
        assert code == compile(text, source, "exec", dont_inherit=True)
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    (place / "older").write_bytes(b"")
    precompile(str(place))
    assert len(os.listdir(place)) == len(sources)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place)} == {0o755}


def test_source_that_is_replaced_meanwhile_is_not_under_the_name_of_the_one_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an upgrade: whoever goes back to the older version would have code of the newer one."""
    source = place.parent.parent / "source.py"
    source.write_bytes(b"BEFORE = 1\n")
    monkeypatch.setattr(precompiling, "_sources", lambda: iter([str(source)]))
    name_of_code = entry.name_of_code

    def upgrade(path: str, text: bytes) -> str:
        source.write_bytes(b"AFTER = 1\n")
        return name_of_code(path, text)

    monkeypatch.setattr(entry, "name_of_code", upgrade)
    precompile(str(place))
    code = SourcelessFileLoader("", str(place / name_of_code(str(source), b"BEFORE = 1\n"))).get_code("")
    assert code is not None
    assert code.co_names == ("BEFORE",)


def test_assertions_are_kept_whatever_the_options_of_the_interpreter_and_others_may_read_it(
    place: Path,
) -> None:
    source = place.parent.parent / "source.py"
    source.write_bytes(b"assert False\n")
    place.mkdir(parents=True)
    (place / ".of-another-one.0123").touch()
    program = (
        "import sys; from fdbroker.broker import entry; from fdbroker.launcher import precompiling;"
        "entry.check_only_root_writes = lambda path: None; precompiling._sources = lambda: sys.argv[1:2];"
        "precompiling.precompile(sys.argv[2])"
    )
    before = os.umask(0o077)
    try:
        subprocess.run([sys.executable, "-OO", "-c", program, str(source), str(place)], check=True)
    finally:
        os.umask(before)
    path = place / entry.name_of_code(str(source), source.read_bytes())
    with pytest.raises(AssertionError):
        exec(SourcelessFileLoader("", str(path)).get_code("") or "")  # noqa: S102 - of this very test
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert (place / ".of-another-one.0123").exists()


def test_it_is_refused_where_others_than_root_can_write(place: Path) -> None:
    place.parent.mkdir()
    place.parent.chmod(0o775)
    with pytest.raises(LaunchError, match="others than root"):
        precompile(str(place))
    assert not place.exists()


def test_sources_that_are_not_roots_are_not_compiled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise entry.UntrustedSourceError(path)

    monkeypatch.setattr(entry, "check_only_root_writes", refuse)
    with pytest.raises(LaunchError):
        precompile(str(place))
    assert os.listdir(place) == []


def test_it_starts_nothing_and_says_what_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/")  # where the launcher goes, and other tests would be left
    done: list[str] = []
    monkeypatch.setattr(precompiling, "precompile", lambda: done.append("done"))
    assert launch(["--precompile"]) == 0
    assert done == ["done"]

    def no_room() -> None:
        raise LaunchError("no room")

    monkeypatch.setattr(precompiling, "precompile", no_room)
    assert launch(["--precompile"]) == 2
    assert capsys.readouterr().err == "fdbroker: no room\n"
