"""The service as it runs: its listeners, by way of the broker, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from functools import partial
from typing import TYPE_CHECKING

from fdbroker import aio
from fdbroker.client import DeniedError
from fdbroker.scan.service.clamd_short import serve_client
from fdbroker.scan.service.closing import close_aside
from fdbroker.scan.service.configuration import Tcp
from fdbroker.scan.service.core import Core, say
from fdbroker.scan.service.native import NativeClient
from fdbroker.scan.service.tcp import TcpListener

if TYPE_CHECKING:
    from fdbroker.broker.notify import Notifier
    from fdbroker.scan.pool import Pool, Version
    from fdbroker.scan.service.configuration import Configuration, Listener
    from fdbroker.scan.service.core import Speaks

# By the words of the configuration.
PROTOCOLS: dict[str, Speaks] = {"clamd": serve_client, "scan": NativeClient}
# What they are spoken on, and how the policy has it.
_SOCKETS = {"clamd": (socket.SOCK_STREAM, "stream"), "scan": (socket.SOCK_SEQPACKET, "seqpacket")}

# Seconds between attempts to serve, the last of which goes on: where the broker can't be reached, and where
# it refuses, of which each time is on record.
_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)
_PAUSES_IF_REFUSED = (*_PAUSES, 5.0, 10.0)
_WELL = "serving"
# Reasons and texts for clients whose connections end.
_STOPPING = ("stopping", "the service is being stopped")
_BROKER_GONE = ("broker_gone", "the broker was lost by which this connection came; connect again")


async def serve(
    configuration: Configuration,
    pool: Pool,
    versions: list[Version],
    notifier: Notifier,
    tcp: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. The pool has been started, and is the caller's.

    `notifier` is told what a service manager wants to know. `tcp` listens, and is the caller's.
    """
    loop = asyncio.get_running_loop()
    core = Core(configuration, pool, versions)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, core.stop.set)
    tasks = [
        asyncio.create_task(_serve_listener(core, name, listener, notifier))
        for name, listener in configuration.listeners.items()
    ]
    tasks += [asyncio.create_task(core.watch_databases()), asyncio.create_task(_tell(notifier))]
    by_tcp = None
    if tcp is not None:
        by_tcp = TcpListener(core, tcp, configuration.tcp or Tcp())
        _note(core, notifier, f"tcp {by_tcp.name}", _WELL)
    renewals: set[asyncio.Task[None]] = set()

    def renew() -> None:
        task = asyncio.create_task(_renew(core, notifier))
        renewals.add(task)
        task.add_done_callback(renewals.discard)

    loop.add_signal_handler(signal.SIGHUP, renew)
    try:
        notifier.say(READY="1", STATUS="The engines are loaded.")
        waiting = asyncio.create_task(core.stop.wait())
        done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if waiting not in done:
            waiting.cancel()
            for task in done:
                task.result()
    finally:
        notifier.say(STOPPING="1")
        if by_tcp is not None:
            by_tcp.close()
        # The broker first: who connects again at once is not handed over, but waits for the next service.
        for task in (*tasks, *renewals):
            task.cancel()
        await asyncio.gather(*tasks, *renewals, return_exceptions=True)
        for connection in tuple(core.connections):
            connection.end(*_STOPPING)
        core.close()


async def _renew(core: Core, notifier: Notifier) -> None:
    notifier.say(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
    await core.renew()
    notifier.say(READY="1")


async def _tell(notifier: Notifier) -> None:
    """Ping the watchdog of a service manager, for ever: by the loop, so that one that hangs is silent."""
    while True:
        left = notifier.before_waiting()
        await asyncio.sleep(60.0 if left < 0 else left)


async def _serve_listener(core: Core, name: str, listener: Listener, notifier: Notifier) -> None:
    """Serve the clients of a listener, for ever; connect to the broker again whenever it is lost."""
    attempts = 0
    while True:
        pauses: tuple[float, ...] = _PAUSES
        try:
            async with (
                await aio.connect(core.configuration.broker) as client,
                await client.serve(name) as service,
            ):
                attempts = 0
                _note(core, notifier, name, _WELL)
                await _take_clients(core, name, listener, service, notifier)
        except OSError as error:  # of the broker, or no descriptors for the connection
            _note(core, notifier, name, f"not served: {core.configuration.broker}: {error.strerror}")
            if isinstance(error, DeniedError):
                pauses = _PAUSES_IF_REFUSED
        finally:
            # What the broker knew of them it does not know on another connection.
            for connection in [one for one, by in core.connections.items() if by is listener]:
                connection.end(*(_STOPPING if core.stop.is_set() else _BROKER_GONE))
        await asyncio.sleep(pauses[min(attempts, len(pauses) - 1)])
        attempts += 1


async def _take_clients(
    core: Core, name: str, listener: Listener, service: aio.Service, notifier: Notifier
) -> None:
    """Serve who comes. Raises BrokerError when nobody can come any more; who came is the caller's to end."""
    speaks = PROTOCOLS[listener.protocol]
    kind, word = _SOCKETS[listener.protocol]
    fits = False  # all of a listener have the same type

    def take(served: aio.ServedClient) -> None:
        nonlocal fits
        fits = fits or served.socket.type == kind
        if not fits:
            # Of the policy nothing can be seen before somebody comes.
            _note(
                core,
                notifier,
                name,
                f"its clients can't be served: {listener.protocol} is not spoken on this type of socket;"
                f" write type: {word} at {name} in listeners of the policy, and restart the broker",
            )
            close_aside(core, served)
            return
        try:
            core.watch.round(partial(speaks, core, served, listener))
        except Exception as error:  # noqa: BLE001 - no more descriptors can be watched, or whatever: others are served
            close_aside(core, served)
            why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            say(f"a client of uid {served.uid} could not be served: {why}")

    await service.for_each(take)


def _note(core: Core, notifier: Notifier, name: str, how: str) -> None:
    if core.listeners.get(name) != how:
        core.listeners[name] = how
        say(f"listener {name}: {how}")
        with contextlib.suppress(ValueError):
            notifier.say(STATUS=", ".join(f"{one}: {state}" for one, state in core.listeners.items()))
