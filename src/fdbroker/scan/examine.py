"""One file, several inside engines: each answers, none can stop the others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.scan.contract import confirm
from fdbroker.scan.stamps import Stamp
from fdbroker.scan.verdict import Answer, Error, Reason, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.scan.engine import Inside

_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


def examine(engines: Sequence[Inside], descriptor: int, size: int, scratch: bytes | None) -> list[Answer]:
    """Return what each engine says of the file behind a descriptor, in their order.

    `size`: bytes that the file is expected to have. The descriptor stays the caller's. Raises nothing: what
    an engine raises is an error of this file.
    """
    try:
        before = Stamp.of(os.fstat(descriptor))
    except OSError as error:
        return _all(engines, Error(Reason.READ_FAILED, f"fstat: {error.strerror}"))
    if before.size != size:
        return _all(engines, Error(Reason.CHANGED, f"the file has {before.size} bytes, not {size}"))
    answers = []
    for engine in engines:
        verdict = confirm(_ask(engine, descriptor, size, scratch), descriptor, before)
        answers.append(_new(Answer, (engine.name, verdict)))
    return answers


def _ask(engine: Inside, descriptor: int, size: int, scratch: bytes | None) -> object:
    try:
        return engine.scan(descriptor, size, scratch)
    except MemoryError:
        return Error(Reason.MEMORY, "the memory of the worker is used up")
    except OSError as error:
        return Error(Reason.READ_FAILED, f"{type(error).__name__}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, this file was not scanned
        return Error(Reason.ENGINE_FAILED, f"{type(error).__name__}: {error}")


def _all(engines: Sequence[Inside], verdict: Verdict) -> list[Answer]:
    return [Answer(engine.name, verdict) for engine in engines]
