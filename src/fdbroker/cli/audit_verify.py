"""What is wrong with an audit: records that are missing, damaged, out of order or twice, mixed boots.

Each broker that starts has a `run` of its own and numbers its records from 0. Why one is
missing may be told by the broker itself: an `audit_failed` record names the numbers of
writes that failed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.audit_records import Line, NotARecordError, read_record
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_RUN = re.compile("[0-9a-f]{16}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_NUMBERED = re.compile(rb'\{"run":"([0-9a-f]{16})","seq":(\d{1,18}),')
_NOT_PLAIN = re.compile(rb"[^ -~]")
_SHOWN = 60  # bytes of a line that is none
# What every record begins with.
_MEMBERS = ["run", "seq", "time", "event"]


class Finding(NamedTuple):
    """What is wrong, and where: `run` and the numbers `first` to `last`, where they are known.

    `kind`: `missing`, `damaged`, `order`, `twice`, `boots`. `told`: the broker itself says so, since a write
    failed; otherwise nobody accounts for it.
    """

    kind: str
    place: str
    text: str
    run: str | None = None
    first: int | None = None
    last: int | None = None
    told: bool = False


class _Run:
    """What is known of the records of one start of a broker."""

    def __init__(self, number: int) -> None:
        self.begun_at = number
        self.next = number
        self.boot: str | None = None
        self.stopped = False
        self.broken_off_at = ""  # the place of another run's beginning, where this one had no end before
        # Numbers that are missing, and where that showed.
        self.missing: list[tuple[int, int, str]] = []
        # What the broker says that it could not write.
        self.told: list[tuple[int, int]] = []
        self.time = ""


class Verifier:
    """Takes lines in the order in which they were written and tells in the end what is wrong with them."""

    def __init__(self) -> None:
        self.records = 0
        self._notes: list[str] = []
        self._last_begun: _Run | None = None
        self._findings: list[Finding] = []
        self._runs: dict[str, _Run] = {}
        self._boots: list[str] = []  # in the order in which they began
        self._torn: list[tuple[str, bytes, str]] = []  # place, text, why

    @property
    def runs(self) -> int:
        """How many starts of brokers there are records of."""
        return len(self._runs)

    @property
    def notes(self) -> list[str]:
        """What is to be known of what was added and need not be wrong."""
        broken_off = [
            f"{run.broken_off_at}: run {name} has no end before this: its broker was killed, or its last"
            " records were removed"
            for name, run in self._runs.items()
            if run.broken_off_at
        ]
        return self._notes + broken_off

    def add(self, line: Line) -> None:
        """Look at the next line."""
        if not line.text.strip(b" \r"):
            return  # what the broker begins anew with, after a write that was cut short
        place = f"{line.source}:{line.number}" if line.source else str(line.number)
        try:
            record = read_record(line)
            self._check_form(line.text, record)
        except NotARecordError as error:
            self._torn.append((place, line.text, str(error)))
            return
        self.records += 1
        self._count(place, record)

    def _check_form(self, text: bytes, record: Mapping[str, object]) -> None:
        if _NOT_PLAIN.search(text):
            raise NotARecordError("bytes outside printable ASCII, which the broker does not write")
        pairs: list[list[str]] = []
        json.loads(text, object_pairs_hook=lambda found: pairs.append([name for name, _ in found]))
        if any(len(set(names)) != len(names) for names in pairs):
            raise NotARecordError("a member twice, which the broker does not write")
        if pairs[-1][: len(_MEMBERS)] != _MEMBERS:
            raise NotARecordError("it does not begin with run, seq, time and event")
        run, number, time = record["run"], record["seq"], record["time"]
        if not (isinstance(run, str) and _RUN.fullmatch(run) and type(number) is int and number >= 0):
            raise NotARecordError("no run or no number")
        if not (isinstance(time, str) and _TIME.fullmatch(time)):
            raise NotARecordError("no time")

    def _count(self, place: str, record: Mapping[str, object]) -> None:
        name, number, event = str(record["run"]), record["seq"], record["event"]
        assert isinstance(number, int)  # noqa: S101 - for the type checker: looked at before
        run = self._runs.get(name)
        if run is None:
            run = self._begin(place, name, number)
        elif number == run.next:
            run.next += 1
        elif number > run.next:
            run.missing.append((run.next, number - 1, place))
            run.next = number + 1
        else:
            self._find_earlier(place, name, run, number)
        run.broken_off_at = ""
        if run.stopped:
            self._find("order", place, name, number, text=f"behind the end of run {name}")
        time = str(record["time"])
        if time < run.time:
            self._notes.append(f"{place}: the clock went back, from {run.time} to {time}")
        run.time = time
        if event in {"started", "reopened"} and isinstance(record.get("boot"), str):
            self._boot(str(record["boot"]), run)
        elif run.boot is not None and run.boot != self._boots[-1]:
            self._find("boots", place, name, number, text="of an earlier boot, behind a later one's")
        run.stopped = event == "stopped"
        first, last = record.get("from"), record.get("to")
        # It is about writes before it.
        if event == "audit_failed" and isinstance(first, int) and isinstance(last, int) and last < number:
            run.told.append((first, last))

    def _begin(self, place: str, name: str, number: int) -> _Run:
        if self._last_begun is not None and not self._last_begun.stopped:
            self._last_begun.broken_off_at = place
        self._last_begun = run = self._runs[name] = _Run(number)
        run.next = number + 1
        if number and len(self._runs) > 1:
            run.missing.append((0, number - 1, place))
        elif number:
            self._notes.append(
                f"{place}: run {name} begins with number {number}: what was before is elsewhere"
            )
        return run

    def _find_earlier(self, place: str, name: str, run: _Run, number: int) -> None:
        for at, (first, last, where) in enumerate(run.missing):
            if first <= number <= last:
                left = [(first, number - 1, where), (number + 1, last, where)]
                run.missing[at : at + 1] = [(low, high, where) for low, high, where in left if low <= high]
                self._find(
                    "order", place, name, number, text=f"number {number} of run {name} is out of order"
                )
                return
        if number < run.begun_at:
            self._find("order", place, name, number, text=f"number {number} of run {name} is out of order")
        else:
            self._find("twice", place, name, number, text=f"number {number} of run {name} is there twice")

    def _boot(self, boot: str, run: _Run) -> None:
        run.boot = boot
        if boot not in self._boots:
            self._boots.append(boot)

    def _find(self, kind: str, place: str, run: str, number: int, *, text: str) -> None:
        self._findings.append(Finding(kind, place, text, run, number, number))

    def findings(self) -> list[Finding]:
        """Return what is wrong with all that was added, in no order."""
        found = list(self._findings)
        for name, run in self._runs.items():
            for first, last, place in run.missing:
                for low, high, told in _split(first, last, run.told):
                    what = f"record {low}" if low == high else f"records {low} to {high}"
                    are = "is" if low == high else "are"
                    why = ": they could not be written, as audit_failed says" if told else ""
                    text = f"{what} of run {name} {are} missing{why}"
                    found.append(Finding("missing", place, text, name, low, high, told))
        for place, line, why in self._torn:
            whose, number, told = self._of_whom(line)
            shown = f"{why} ({printable(line[:_SHOWN])}{'...' if len(line) > _SHOWN else ''})"
            if told:
                shown = f"{why}: it was cut short, as audit_failed says"
            found.append(Finding("damaged", place, shown, whose, number, number, told))
        return found

    def _of_whom(self, text: bytes) -> tuple[str | None, int | None, bool]:
        """Return run and number of a line that is no record, and whether the broker tells that it was cut."""
        numbered = _NUMBERED.match(text)
        if numbered is not None:
            name, number = numbered[1].decode(), int(numbered[2])
            run = self._runs.get(name)
            told = run is not None and any(first <= number <= last for first, last in run.told)
            return name, number, told
        # Cut so short that it has no number.
        whole = [b'{"run":"%s","seq":' % name.encode() for name, run in self._runs.items() if run.told]
        told = any(text.rstrip(b"0123456789") == begin or begin.startswith(text) for begin in whole)
        return None, None, told


def _split(first: int, last: int, told: Iterable[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """Return the numbers `first` to `last` in pieces, with whether some range of `told` has them."""
    pieces = []
    for low, high in sorted(told):
        if high < first or low > last:
            continue
        if first < low:
            pieces.append((first, low - 1, False))
        pieces.append((max(first, low), min(high, last), True))
        first = min(high, last) + 1
    if first <= last:
        pieces.append((first, last, False))
    return pieces
