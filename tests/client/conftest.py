"""Each test ends with the descriptors that it began with."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


def open_descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # that of the listing
            continue
    return found


@pytest.fixture(autouse=True)
def no_descriptor_is_leaked() -> Iterator[None]:
    gc.collect()
    before = open_descriptors()
    yield
    # First without the collector: what is closed only by it was not owned.
    after = open_descriptors()
    assert after == before
    gc.collect()
    assert open_descriptors() == before
