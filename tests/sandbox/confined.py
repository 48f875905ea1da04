"""Running a function in a confined process, with one descriptor, and getting its answer."""

from __future__ import annotations

import json
import os
import select
from typing import TYPE_CHECKING, TypeVar, cast

from fdbroker.kernel import bpf, sockets
from fdbroker.kernel.libc import MACHINE
from fdbroker.sandbox.confine import Confinement
from fdbroker.sandbox.process import start_confined
from fdbroker.sandbox.worker_seccomp import worker_filter
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from fdbroker.sandbox.process import ConfinedProcess

_T = TypeVar("_T")

WORKER_UID = FIRST_UID + 61
IDS = (WORKER_UID, WORKER_UID)

EPERM = 1
REFUSING = worker_filter(default_action=bpf.errno_action(EPERM))
KILLING = worker_filter()
# A filter that refuses nothing, to see what the other layers do.
PERMISSIVE = bpf.assemble({}, machine=MACHINE, otherwise=bpf.ALLOW)


def started_ids() -> tuple[int, int] | None:
    """Return the ids that a worker gets from whoever runs the tests."""
    return IDS if os.geteuid() == 0 else None


def answers_one(function: Callable[[int], object]) -> Callable[[socket.socket], None]:
    """Return a main function: take a descriptor, send what `function` says of it as JSON."""
    json.dumps({"loaded": 1})

    def main(channel: socket.socket) -> None:
        with sockets.receive(channel, 64).descriptors as owned:
            answer = json.dumps(function(owned.numbers()[0]))
        sockets.send(channel, answer.encode())

    return main


def ask(process: ConfinedProcess, descriptor: int) -> object:
    """Hand over a descriptor and return the answer; None if the process ended instead."""
    sockets.send(process.channel, b"go", [descriptor])
    readable = select.poll()
    readable.register(process.channel, select.POLLIN)
    assert readable.poll(20_000), "no answer"
    with (message := sockets.receive(process.channel, 65536)).descriptors:
        answer: object = json.loads(message.data) if message.data else None
    return answer


def run_confined(
    function: Callable[[int], _T],
    descriptor: int,
    *,
    program: bytes = REFUSING,
    ids: tuple[int, int] | None = IDS,
) -> _T:
    """Run `function` with a descriptor in a confined process and return what it returned."""
    process, _ = start_confined(Confinement(program, ids), answers_one(function))
    try:
        return cast("_T", ask(process, descriptor))
    finally:
        process.stop(grace=5.0)
