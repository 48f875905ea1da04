"""A tree of files, a real clamd, and a service that speaks by `Conversation`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fdbroker.clamd.protocol import Limits
from tests.clamd.service import Service
from tests.clamd.talks import STREAM_LENGTH, make_tree
from tests.scan.clamav import make_database, running_clamd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    make_tree(root)
    return root


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("clamd") / "database")


@pytest.fixture(scope="module")
def clamd(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Path]:
    with running_clamd(
        tmp_path_factory.mktemp("fast"), database, f"StreamMaxLength {STREAM_LENGTH}"
    ) as socket_path:
        yield socket_path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    socket_path = tmp_path_factory.mktemp("ours") / "socket"
    with Service(socket_path, Limits(stream_length=STREAM_LENGTH)):
        yield socket_path
