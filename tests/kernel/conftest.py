"""Running a function in a forked child, for what can't be undone in the process of the tests."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


class Children:
    """Runs functions in forked children."""

    def __call__(self, function: Callable[[], object]) -> Any:  # noqa: ANN401 - what JSON gives
        """Return what `function` returned, by way of JSON; fail with the child's traceback if it raised."""
        status, answer = self._run(function)
        if os.WIFSIGNALED(status):
            pytest.fail(f"the child was killed by {signal.Signals(os.WTERMSIG(status)).name}")
        outcome = json.loads(answer)
        if "raised" in outcome:
            pytest.fail(f"in the child:\n{outcome['raised']}")
        return outcome["returned"]

    def killed_by(self, function: Callable[[], object]) -> signal.Signals:
        """Return the signal that killed the child; fail if none did."""
        status, answer = self._run(function)
        if not os.WIFSIGNALED(status):
            pytest.fail(f"the child was not killed, it ended with {answer.decode()}")
        return signal.Signals(os.WTERMSIG(status))

    def _run(self, function: Callable[[], object]) -> tuple[int, bytes]:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._live(function, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        return os.waitpid(pid, 0)[1], answer

    @staticmethod
    def _live(function: Callable[[], object], writing: int) -> None:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # being killed by a filter dumps core
            outcome = json.dumps({"returned": function()})
        except BaseException as error:  # noqa: BLE001 - the parent shall see it, whatever it is
            # Without the lines of the source: under a filter, opening a file could kill.
            places = [
                f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
                for frame, line in traceback.walk_tb(error.__traceback__)
            ]
            outcome = json.dumps({"raised": "\n".join([*places, f"{type(error).__name__}: {error}"])})
        rest = outcome.encode()
        while rest:
            rest = rest[os.write(writing, rest) :]
        os._exit(0)


@pytest.fixture
def in_child() -> Children:
    """Return what runs a function in a forked child: `in_child(f)`, `in_child.killed_by(f)`."""
    return Children()
