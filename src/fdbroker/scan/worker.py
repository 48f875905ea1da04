"""What runs in the confined process: take a descriptor, have each engine scan it, answer.

Every import and every first use happens before the confinement; `load` is
called for that in the zygote, which forks the workers.

A message asks for the versions of the engines, or has one or more requests, each a
number and the size that the file is expected to have, and as many descriptors for
reading. Each file gets an answer of its own (`fdbroker.scan.answers`). Those of one message
are sent together, unless it takes so long that somebody could wait for one: who has many files
would otherwise be woken for each.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.scan.answers import LONGEST_ANSWER, encode
from fdbroker.scan.examine import examine
from fdbroker.scan.plugins import from_json, make_inside
from fdbroker.scan.versions import encode_versions

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.scan.engine import Inside

REQUEST = struct.Struct("<QQ")  # number, size

MOST_REQUESTS = 16  # in one message; a worker must be allowed as many descriptors, and its own

VERSIONS = b"versions"

_SECONDS_HELD_BACK = 0.02  # an answer, at most, but for the time that the next file takes

DESCRIPTORS = 3  # of a worker itself: its channel, and /dev/null twice


def load(engines: str) -> list[Inside]:
    """Return the engines that `fdbroker.scan.plugins.to_json` told of, warmed up; called in the zygote.

    Raises:
        EngineError: one can't be had, or is not for a worker.

    """
    made = []
    for configured in from_json(engines):
        engine = make_inside(configured)
        engine.warm()
        made.append(engine)
    _use_once(made)
    return made


def _use_once(engines: Sequence[Inside]) -> None:
    """Go the way of a file, and that of an error, so that whatever loads lazily is loaded."""
    encode_versions([engine.version() for engine in engines])
    encode(0, 0, examine(engines, -1, 0, None))
    descriptor = os.memfd_create("fdbroker-warm-up")
    try:
        os.write(descriptor, b"text")
        encode(0, 0, examine(engines, descriptor, 4, None))
    finally:
        os.close(descriptor)


def work(engines: Sequence[Inside], channel: socket.socket, scratch: bytes | None) -> None:
    """Be a worker of the sandbox: answer requests until the other end closes.

    Raises:
        ValueError: a request that is none; the process should end.

    """
    while True:
        message = sockets.receive(channel, MOST_REQUESTS * REQUEST.size + 1)
        with message.descriptors as owned:
            if not message.data:
                return
            if message.data == VERSIONS:
                sockets.send(channel, encode_versions([engine.version() for engine in engines]))
                continue
            count, rest = divmod(len(message.data), REQUEST.size)
            if rest or not 1 <= count <= MOST_REQUESTS or len(owned) != count:
                raise ValueError("not a request")
            _answer(engines, channel, scratch, message.data, owned)


def _answer(
    engines: Sequence[Inside],
    channel: socket.socket,
    scratch: bytes | None,
    requests: bytes,
    owned: Descriptors,
) -> None:
    """Answer the requests of a message. Their descriptors stay the caller's, who closes all at once."""
    answers = b""
    since = time.monotonic()
    for (number, size), descriptor in zip(REQUEST.iter_unpack(requests), owned.numbers(), strict=True):
        answer = encode(number, size, examine(engines, descriptor, size, scratch))
        if len(answers) + len(answer) > LONGEST_ANSWER:
            sockets.send(channel, answers)
            answers = b""
        answers += answer
        now = time.monotonic()
        if now - since >= _SECONDS_HELD_BACK:
            sockets.send(channel, answers)
            answers, since = b"", now
    if answers:
        sockets.send(channel, answers)
