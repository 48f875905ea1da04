"""The fixtures of the broker's tests that these use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def reachable() -> Iterator[Path]:
    """Return a directory that every uid can reach."""
    with reachable_directory() as path:
        yield path
