"""What these tests share."""

from __future__ import annotations

import pytest

from tests.kernel.conftest import Children


@pytest.fixture
def in_child() -> Children:
    """Return what runs a function in a forked child."""
    return Children()
