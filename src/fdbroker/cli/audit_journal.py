"""The broker's audit in the journal of systemd.

A record is taken for the broker's by what journald itself adds to it: the unit, and that
it came by a unit's standard output (systemd.journal-fields(7): fields that begin with `_`
can't be altered by who logs). Whoever else logs a line that looks like a record is of
another unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.cli.audit_records import Line

# mypy takes the folder of that name for it.
from systemd import journal  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from collections.abc import Iterator

_WAIT = 0.5  # seconds; an interrupt is seen in between


def journal_lines(unit: str, *, directory: str | None = None, follow: bool = False) -> Iterator[Line | None]:
    """Yield the records that the unit wrote to its standard output; numbered from 1.

    `directory` has the journal's files; None: this machine's. With `follow` it goes on for ever, and None
    stands where nothing more is there now.

    Raises:
        OSError: it can't be read.

    """
    with journal.Reader(path=directory) if directory is not None else journal.Reader() as reader:
        reader.data_threshold = 0  # a record is given as a whole
        reader.add_match(_SYSTEMD_UNIT=unit)
        reader.add_match(_TRANSPORT="stdout")
        number = 0
        while True:
            for entry in reader:
                message = entry.get("MESSAGE", "")
                text = message if isinstance(message, bytes) else str(message).encode(errors="replace")
                if text[:1] == b"{":  # else it is what the unit writes to standard error
                    number += 1
                    yield Line(number, text, source=f"journal of {unit}")
            if not follow:
                return
            yield None
            reader.wait(_WAIT)
