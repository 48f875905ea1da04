"""The asyncio client behind the blocking client's interface, so that both can be held to one contract."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fdbroker import aio

if TYPE_CHECKING:
    import os
    import socket
    from collections.abc import AsyncIterator, Coroutine
    from typing import Self

    Path = str | bytes | os.PathLike[str]


Whatever = Any  # what a client is given and gives


class Runner:
    """An event loop that runs as long as somebody waits for something."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def run(self, what: Coroutine[Whatever, Whatever, Whatever]) -> Whatever:
        return self.loop.run_until_complete(what)

    def close(self) -> None:
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()


async def _next(steps: AsyncIterator[Whatever]) -> Whatever:
    return await anext(steps)


class Iterating:
    """An async iterator as an iterator; what it has besides is passed on."""

    def __init__(self, runner: Runner, steps: Whatever) -> None:
        self._runner = runner
        self._steps = steps

    def __getattr__(self, name: str) -> Whatever:
        return getattr(self._steps, name)

    def __repr__(self) -> str:
        return repr(self._steps)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Whatever:
        try:
            return self._runner.run(_next(self._steps))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._steps.aclose())


class Files:
    def __init__(self, runner: Runner, real: Whatever) -> None:
        self._runner = runner
        self._real = real

    def __getattr__(self, name: str) -> Whatever:
        return getattr(self._real, name)

    def __repr__(self) -> str:
        return repr(self._real)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._real.close()

    def open(self, *args: Whatever, **kwargs: Whatever) -> Whatever:
        return self._runner.run(self._real.open(*args, **kwargs))

    def open_descriptor(self, path: Path) -> Whatever:
        return self._runner.run(self._real.open_descriptor(path))

    def read_bytes(self, path: Path) -> Whatever:
        return self._runner.run(self._real.read_bytes(path))

    def stat(self, path: Path) -> Whatever:
        return self._runner.run(self._real.stat(path))

    def open_many(self, *args: Whatever, **kwargs: Whatever) -> Iterating:
        return Iterating(self._runner, self._real.open_many(*args, **kwargs))

    def read_many(self, *args: Whatever, **kwargs: Whatever) -> Iterating:
        return Iterating(self._runner, self._real.read_many(*args, **kwargs))

    def stat_many(self, *args: Whatever, **kwargs: Whatever) -> Iterating:
        return Iterating(self._runner, self._real.stat_many(*args, **kwargs))

    def walk(self, *args: Whatever, **kwargs: Whatever) -> Iterating:
        return Iterating(self._runner, self._real.walk(*args, **kwargs))

    def list(self, *args: Whatever, **kwargs: Whatever) -> Iterating:
        return Iterating(self._runner, self._real.list(*args, **kwargs))


class Served(Iterating):
    def __next__(self) -> Whatever:
        return Files(self._runner, super().__next__())

    def close(self) -> None:
        self._steps.close()

    def accept(self, timeout: float | None = None) -> Whatever:
        async def accept() -> aio.ServedClient:
            async with asyncio.timeout(timeout):
                return await self._steps.accept()

        return Files(self._runner, self._runner.run(accept()))


class Client(Files):
    """Made by `connect` or `from_socket`."""

    def status(self) -> Whatever:
        return self._runner.run(self._real.status())

    def serve(self, listener: str) -> Served:
        return Served(self._runner, self._runner.run(self._real.serve(listener)))

    def close(self) -> None:
        self._real.close()
        if not self._runner.loop.is_closed():
            self._runner.close()


def connect(path: Path, **options: Whatever) -> Client:
    return _made(aio.connect(path, **options))


def from_socket(sock: socket.socket, **options: Whatever) -> Client:
    return _made(aio.Client.from_socket(sock, **options))


def _made(making: Coroutine[Whatever, Whatever, Whatever]) -> Client:
    runner = Runner()
    try:
        return Client(runner, runner.run(making))
    except BaseException:
        runner.close()
        raise
