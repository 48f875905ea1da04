"""Call a function in a process that can do nothing but read what it was given."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from fdbroker.kernel import sockets
from fdbroker.sandbox.call_worker import IS_BYTES, IS_ERROR, IS_JSON, MORE, PART
from fdbroker.sandbox.confinement import Confinement, Profile
from fdbroker.sandbox.errors import SandboxError
from fdbroker.sandbox.names import name_of
from fdbroker.sandbox.waiting import is_readable
from fdbroker.sandbox.zygote import Zygote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fdbroker.sandbox.zygote import Worker

_OF_THE_WORKER = 4  # its channel, /dev/null twice, and one to spare


class CallError(SandboxError):
    """The function raised, ended its process, took too long, or returned what can't be passed on."""


def run(
    function: str | Callable[..., object],
    fds: Sequence[int] = (),
    arguments: Mapping[str, object] | None = None,
    *,
    warm: str | Callable[[], object] | None = None,
    confinement: Confinement | None = None,
    timeout: float = 60.0,
    longest: int = 16 << 20,
) -> Any:  # noqa: ANN401 - what JSON has
    """Call `function(*descriptors, **arguments)` in a confined process of its own; return what it returns.

    The function is imported there by its name, before the confinement, so it must be one that can
    be. What it uses must be loaded by then as well: `warm` is called beforehand, to import and use once what
    loads lazily. It may return bytes, or what JSON has, of at most `longest` bytes: take it for what
    hostile bytes made of it.

    `fds` stay the caller's. The copies share the file offset with them.

    Raises:
        CallError: there is no result; the text says why.
        SandboxError: there is no confined process: ConfinementError, ZygoteError.
        ValueError: a function without a name, more descriptors than the limits allow.
        OSError: no process or descriptor to be had here.

    """
    wanted = confinement or Confinement()
    if wanted.profile is Profile.PROGRAM:
        raise ValueError("profile: `program` is for `spawn`")
    if len(fds) + _OF_THE_WORKER > wanted.limits.descriptors:
        raise ValueError(
            f"{len(fds)} descriptors: see Limits.descriptors, which is {wanted.limits.descriptors}"
        )
    deadline = time.monotonic() + timeout
    call = {
        "function": name_of(function),
        "warm": None if warm is None else name_of(warm),
        "arguments": dict(arguments or {}),
    }
    with (
        Zygote(
            "fdbroker.sandbox.call_worker:load",
            "fdbroker.sandbox.call_worker:work",
            call,
            confinement=wanted,
            timeout=timeout,
        ) as zygote,
        zygote.spawn(timeout=max(0.0, deadline - time.monotonic())) as worker,
    ):
        try:
            sockets.send(worker.channel, b"\0", fds)
            return _result(worker, deadline, longest)
        except OSError as error:
            raise CallError(f"{call['function']}: {worker.stop(grace=1.0)} ({error})") from error


def _result(worker: Worker, deadline: float, longest: int) -> object:
    data = bytearray()
    while True:
        if not is_readable(worker.channel.fileno(), deadline - time.monotonic()):
            raise CallError("the function took too long")
        with (message := sockets.receive(worker.channel, PART + 2)).descriptors:
            kind, part = message.data[:1], message.data[1:]
        if not kind:
            raise CallError(f"the function returned nothing: {worker.stop(grace=1.0)}")
        data += part
        if kind == IS_ERROR:
            raise CallError(f"the function raised {part.decode('ascii', 'backslashreplace')}")
        if len(data) > longest or len(part) > PART:
            raise CallError(f"the function returned more than {longest} bytes")
        if kind == IS_BYTES:
            return bytes(data)
        if kind == IS_JSON:
            try:
                found: object = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise CallError(f"what came back is no JSON: {error}") from error
            return found
        if kind != MORE:
            raise CallError("what came back is no result")
