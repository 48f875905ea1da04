"""Starting workers as a user who has no rights: with copies of the sources that he can reach."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.kernel import dumpable
from tests.processes import in_child
from tests.sandbox.confined import WORKER_UID

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.for_other_users import ForOtherUsers

_HERE = Path(__file__).resolve().parent


@pytest.fixture
def unprivileged(others: ForOtherUsers) -> Callable[[Callable[[], Any]], Any]:
    """Return a function that runs another one as such a user; what it starts finds the copies."""
    target = others.directory / "tests" / "sandbox"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("puppets.py", "attacks.py"):
        shutil.copy(_HERE / name, target / name)
        (target / name).chmod(0o644)

    def run(function: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the function returns
        def inside() -> Any:  # noqa: ANN401
            dumpable.set_dumpable(True)  # a change of ids took it; a program that is started has it
            sys.executable = others.python
            standard = [place for place in sys.path if place.startswith(sys.base_prefix)]
            sys.path[:] = [str(others.directory), *standard]
            os.chdir("/")
            return function()

        return in_child(inside, uid=WORKER_UID)

    return run
