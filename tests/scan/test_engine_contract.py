"""Each engine that comes with fdbroker keeps the contract; the real ones, none mocked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fdbroker.scan.plugins import Configured, configure, installed
from fdbroker.testing import Samples, check_engine
from tests.sandbox.confined import started_ids
from tests.scan.careless_engine import Careless
from tests.scan.clamav import BAD, make_database, running_clamd
from tests.scan.descriptors import EICAR

if TYPE_CHECKING:
    from pathlib import Path

CLEAN = (b"nothing bad", b"x" * 300_000)
GREP = ("/bin/sh", "-c", 'if grep -q "$1"; then echo "found $1"; exit 1; fi', "sh", BAD.decode())
RULES = 'rule marker { strings: $a = "' + BAD.decode() + '" condition: $a }'


def test_the_engines_are_installed_by_their_names() -> None:
    assert {"clamd", "command", "hashes", "libclamav", "yara-x"} <= installed().keys()


def test_hashes_keeps_the_contract() -> None:
    check_engine(configure("hashes"), Samples([EICAR], CLEAN), ids=started_ids())


def test_yara_x_keeps_the_contract(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yar"
    rules.write_text(RULES)
    engine = configure("yara-x", {"rules": [str(rules)]})
    check_engine(engine, Samples([BAD, b"x" * 1000 + BAD], CLEAN), ids=started_ids())


def test_libclamav_keeps_the_contract(tmp_path: Path) -> None:
    engine = configure("libclamav", {"database": str(make_database(tmp_path / "database"))})
    check_engine(engine, Samples([EICAR, BAD], CLEAN), ids=started_ids())


def test_clamd_keeps_the_contract(tmp_path: Path) -> None:
    database = make_database(tmp_path / "database")
    settings = ("AlertExceedsMax yes", "AlertEncrypted yes")
    with running_clamd(tmp_path, database, *settings) as socket_path:
        engine = configure("clamd", {"socket": str(socket_path)})
        check_engine(engine, Samples([EICAR, BAD], CLEAN))


def test_command_keeps_the_contract() -> None:
    engine = configure("command", {"argv": [*GREP], "reads_all": False})
    check_engine(engine, Samples([BAD], CLEAN))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("never loaded", "before it was warmed up"),
        ("offset", "the offset, which others share"),
        ("closes", "leaves the descriptor open"),
        ("leaks", "and no other"),
        ("blind", "an infected sample is found"),
        ("trigger-happy", "a clean sample is clean"),
        ("text", "answers with a verdict"),
        ("litter", "scratch directory empty"),
    ],
)
def test_the_check_finds_what_an_engine_does_wrong(
    wrong: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Careless, "wrong", wrong)
    configured = Configured("careless", "tests.scan.careless_engine:Careless", {})
    with pytest.raises(AssertionError, match=sentence):
        check_engine(configured, Samples([EICAR], CLEAN), confined=False)


def test_the_check_needs_samples_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        check_engine(configure("hashes"), Samples([EICAR], []))
