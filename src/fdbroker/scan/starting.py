"""A worker that is being started while its owner does something else."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from fdbroker.sandbox import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.sandbox import Worker


class Starting:
    """Starts a worker by a thread of its own. Its owner calls `result` when it `is_over`, or `give_up`.

    `spawn` gives the worker. That takes milliseconds, and half a minute where engines must be loaded first.

    Raises:
        OSError: no thread or descriptor to be had.

    """

    def __init__(self, spawn: Callable[[], Worker]) -> None:
        self._spawn = spawn
        self._lock = threading.Lock()
        self._given_up = False
        self._over = False
        self._worker: Worker | None = None
        self._error: SandboxError | OSError | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            # A daemon: it may be loading something for long when the process is to end.
            threading.Thread(target=self._run, name="fdbroker-starting", daemon=True).start()
        except RuntimeError as error:
            os.close(self._bell)
            raise OSError(errno.EAGAIN, f"no thread to start a worker: {error}") from error

    @property
    def is_over(self) -> bool:
        """Whether there is a result."""
        with self._lock:  # or the bell could be closed while it is rung
            return self._over

    def fileno(self) -> int:
        """Return what is readable when it is over. Until `result` or `give_up`."""
        return self._bell

    def result(self) -> Worker:
        """Return the worker, which is the caller's; once, when it is over.

        Raises:
            SandboxError, OSError: what `spawn` raised.

        """
        os.close(self._bell)
        if self._worker is None:
            raise self._error or SandboxError("it is not over")
        return self._worker

    def give_up(self) -> None:
        """Have the worker ended as soon as it is there. Instead of `result`."""
        with self._lock:
            self._given_up = True
            if self._over:
                self._drop()

    def _run(self) -> None:
        worker: Worker | None = None
        failure: SandboxError | OSError | None = None
        try:
            worker = self._spawn()
        except (SandboxError, OSError) as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - whatever it is, the owner is told
            failure = SandboxError(f"{type(error).__name__}: {error}")
        with self._lock:
            self._worker, self._error, self._over = worker, failure, True
            if self._given_up:
                self._drop()
            else:
                os.eventfd_write(self._bell, 1)

    def _drop(self) -> None:
        os.close(self._bell)
        if self._worker is not None:
            self._worker.let_go()
