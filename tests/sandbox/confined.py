"""Workers for tests: started as whoever runs them, asked what a puppet finds out."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, TypedDict, Unpack

from fdbroker.kernel import sockets
from fdbroker.sandbox import Confinement, Layer, Limits, Profile, Zygote
from fdbroker.sandbox.waiting import is_readable
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.sandbox import Worker

WORKER_UID = FIRST_UID + 61
IDS = (WORKER_UID, WORKER_UID)
PUPPETS = "tests.sandbox.puppets"


class Options(TypedDict, total=False):
    """Those of a confinement."""

    profile: Profile
    jit: bool
    limits: Limits
    scratch_size: int
    uids: tuple[int, ...]
    strict: frozenset[Layer]
    program: bytes
    landlock_abi: int
    unsafe_without: frozenset[Layer]
    gently: bool


def started_ids() -> tuple[int, int] | None:
    """Return the ids that a worker gets from whoever runs the tests."""
    return IDS if os.geteuid() == 0 else None


def confinement(**options: Unpack[Options]) -> Confinement:
    """Return a confinement with the uid of the tests, where root runs them, and these options."""
    if os.geteuid() == 0:
        options.setdefault("uids", (WORKER_UID,))
    return Confinement(**options)


def puppets(work: str = "answer", **options: Unpack[Options]) -> Zygote:
    """Return a zygote whose workers run a function of puppets.py."""
    return Zygote(f"{PUPPETS}:load", f"{PUPPETS}:{work}", confinement=confinement(**options))


@contextlib.contextmanager
def puppet(work: str = "answer", **options: Unpack[Options]) -> Iterator[Worker]:
    """Yield a worker of a zygote of its own."""
    with puppets(work, **options) as zygote, zygote.spawn() as worker:
        yield worker


def ask(worker: Worker, function: str, *descriptors: int, **arguments: object) -> object:
    """Have a puppet call a function with descriptors; return its answer, None if it ended instead."""
    order = json.dumps({"function": function, "arguments": arguments}).encode()
    sockets.send(worker.channel, order, descriptors)
    assert is_readable(worker.channel.fileno(), 20.0), "no answer"
    try:
        with (message := sockets.receive(worker.channel, 65536)).descriptors:
            answer: object = json.loads(message.data) if message.data else None
    except ConnectionResetError:
        return None
    return answer
