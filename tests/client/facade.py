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


class Runner:
    """An event loop that runs as long as somebody waits for something."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def run(self, what: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
        return self.loop.run_until_complete(what)

    def close(self) -> None:
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()


async def _next(steps: AsyncIterator[Any]) -> Any:  # noqa: ANN401
    return await anext(steps)


class Iterating:
    """An async iterator as an iterator; what it has besides is passed on."""

    def __init__(self, runner: Runner, steps: Any) -> None:  # noqa: ANN401
        self._runner = runner
        self._steps = steps

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._steps, name)

    def __repr__(self) -> str:
        return repr(self._steps)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:  # noqa: ANN401
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
    def __init__(self, runner: Runner, real: Any) -> None:  # noqa: ANN401
        self._runner = runner
        self._real = real

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._real, name)

    def __repr__(self) -> str:
        return repr(self._real)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._real.close()

    def open(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._runner.run(self._real.open(*args, **kwargs))

    def open_descriptor(self, path: Path) -> Any:  # noqa: ANN401
        return self._runner.run(self._real.open_descriptor(path))

    def read_bytes(self, path: Path) -> Any:  # noqa: ANN401
        return self._runner.run(self._real.read_bytes(path))

    def stat(self, path: Path) -> Any:  # noqa: ANN401
        return self._runner.run(self._real.stat(path))

    def open_many(self, *args: Any, **kwargs: Any) -> Iterating:  # noqa: ANN401
        return Iterating(self._runner, self._real.open_many(*args, **kwargs))

    def read_many(self, *args: Any, **kwargs: Any) -> Iterating:  # noqa: ANN401
        return Iterating(self._runner, self._real.read_many(*args, **kwargs))

    def stat_many(self, *args: Any, **kwargs: Any) -> Iterating:  # noqa: ANN401
        return Iterating(self._runner, self._real.stat_many(*args, **kwargs))

    def walk(self, *args: Any, **kwargs: Any) -> Iterating:  # noqa: ANN401
        return Iterating(self._runner, self._real.walk(*args, **kwargs))

    def list(self, *args: Any, **kwargs: Any) -> Iterating:  # noqa: ANN401
        return Iterating(self._runner, self._real.list(*args, **kwargs))


class Served(Iterating):
    def __next__(self) -> Any:  # noqa: ANN401
        return Files(self._runner, super().__next__())

    def close(self) -> None:
        self._steps.close()

    def accept(self, timeout: float | None = None) -> Any:  # noqa: ANN401
        async def accept() -> aio.ServedClient:
            async with asyncio.timeout(timeout):
                return await self._steps.accept()  # type: ignore[no-any-return]

        return Files(self._runner, self._runner.run(accept()))


class Client(Files):
    """Made by `connect` or `from_socket`."""

    def status(self) -> Any:  # noqa: ANN401
        return self._runner.run(self._real.status())

    def serve(self, listener: str) -> Served:
        return Served(self._runner, self._runner.run(self._real.serve(listener)))

    def close(self) -> None:
        self._real.close()
        if not self._runner.loop.is_closed():
            self._runner.close()


def connect(path: Path, **options: Any) -> Client:  # noqa: ANN401
    return _made(aio.connect(path, **options))


def from_socket(sock: socket.socket, **options: Any) -> Client:  # noqa: ANN401
    return _made(aio.Client.from_socket(sock, **options))


def _made(making: Coroutine[Any, Any, Any]) -> Client:
    runner = Runner()
    try:
        return Client(runner, runner.run(making))
    except BaseException:
        runner.close()
        raise
