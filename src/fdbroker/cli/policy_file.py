"""Policy files as arguments. What reads YAML is another extra, loaded when it is needed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from fdbroker.cli.failure import Failure
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fdbroker.config import CompiledPolicy


def load(path: str, *, dev: bool = False) -> CompiledPolicy:
    """Read a policy file that can be trusted, and compile it for this machine.

    Raises:
        Failure: it can't be trusted or read, or it has problems, each with its place.

    """
    from fdbroker.config import load_policy_file  # noqa: PLC0415 - see above

    with problems_as_failure():
        return load_policy_file(path, dev=dev)


@contextlib.contextmanager
def problems_as_failure() -> Iterator[None]:
    """Turn what is wrong with a policy file into a Failure that has every problem, each with its place."""
    from fdbroker.config import ConfigError  # noqa: PLC0415 - see above

    try:
        yield
    except ConfigError as error:
        raise Failure(str(error)) from error  # printable as it is


@contextlib.contextmanager
def readable(path: str, cure: str) -> Iterator[None]:
    """Turn what keeps a file from being read into a Failure that names it, the reason and the cure."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{printable(path)}: can't be read: {error.strerror}; {cure}") from error


def changes_for_restart(compiled: CompiledPolicy, status: Mapping[str, object]) -> list[str]:
    """Return what in a policy is for the launcher and another thing than the broker was started with.

    Empty where a broker's whole status does not tell: an older one, or one that was started without.
    """
    from fdbroker.config.compiled import launcher_changes  # noqa: PLC0415 - see above

    started_with = status.get("launcher_fingerprint")
    return launcher_changes(compiled["daemon"], started_with) if isinstance(started_with, str) else []
