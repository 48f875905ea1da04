"""The example keeps the contract. To be copied with it: it needs fdbroker and pytest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fdbroker.scan.engine import EngineError
from fdbroker.scan.plugins import configure, make
from fdbroker.testing import Samples, check_engine

if TYPE_CHECKING:
    from pathlib import Path


def test_words_keeps_the_contract(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("swordfish\nxyzzy\n")
    engine = configure("words", {"list": str(words)})
    ids = (60899, 60899) if os.geteuid() == 0 else None
    check_engine(engine, Samples(infected=[b"say xyzzy", b"swordfish"], clean=[b"say nothing"]), ids=ids)


def test_an_empty_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "words").touch()
    engine = make(configure("words", {"list": str(tmp_path / "words")}))
    with pytest.raises(EngineError, match="no word in it"):
        engine.warm()  # type: ignore[union-attr]  # an inside engine
