"""A client that takes a descriptor out of the reply and keeps it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from fdbroker.wire.client import OpenReply, encode_open
from tests.broker.speaking import Speaker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def received(socket: Path, path: Path, count: int = 1) -> Iterator[list[int]]:
    """Ask for `path` as many times, give the descriptors, close them at the end."""
    with Speaker.connect(socket) as speaker:
        answer = speaker.ask(encode_open(1, [bytes(path)] * count))
        with answer.descriptors as descriptors:
            assert isinstance(answer.reply, OpenReply)
            assert len(descriptors) == count, answer.reply
            yield descriptors.numbers()
