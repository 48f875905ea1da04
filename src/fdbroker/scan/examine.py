"""One file, several inside engines: each answers, none can stop the others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.scan.contract import checked
from fdbroker.scan.verdict import Answer, Error, Reason, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.scan.engine import Inside


def examine(engines: Sequence[Inside], descriptor: int, size: int, scratch: bytes | None) -> list[Answer]:
    """Return what each engine says of the file behind a descriptor, in their order.

    `size`: bytes that the file is expected to have. The descriptor stays the caller's. Raises nothing: what
    an engine raises is an error of this file. Whether the file stayed the same meanwhile is for
    whoever handed it in to say (`fdbroker.scan.contract.confirm`), who looked at it before and looks after.
    """
    try:
        had = os.fstat(descriptor).st_size
    except OSError as error:
        return _all(engines, Error(Reason.READ_FAILED, f"fstat: {error.strerror}"))
    if had != size:
        return _all(engines, Error(Reason.CHANGED, f"the file has {had} bytes, not {size}"))
    return [Answer(engine.name, checked(_ask(engine, descriptor, size, scratch))) for engine in engines]


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
