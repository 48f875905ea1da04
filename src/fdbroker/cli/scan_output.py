"""How verdicts are written: for people, and as JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as json_string
from typing import TYPE_CHECKING, Protocol

from fdbroker.cli.broker import DENIED
from fdbroker.cli.output import complain, path_members, write_line
from fdbroker.config.names import counted, printable
from fdbroker.sandbox.report import Layer
from fdbroker.scan.verdict import Clean, Error, Infected, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.pool import Version
    from fdbroker.scan.run import Scanned, Skipped
    from fdbroker.scan.verdict import Verdict


_WHY_IDS = "only root can change them, and the other layers hold without that"


@dataclass
class Totals:
    """What a scan came to. `complete`: all that there is was seen. `denied`: the first that was."""

    files: int = 0
    bytes: int = 0
    infected: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    complete: bool = True
    denied: Scanned | None = None

    def add(self, scanned: Scanned) -> None:
        """Count a verdict. Bytes are those that were read to the end."""
        verdict = scanned.verdict
        self.files += not scanned.directory
        if not isinstance(verdict, Error):
            self.bytes += scanned.size or 0
            self.infected += isinstance(verdict, Infected)
            return
        self.errors += 1
        if verdict.reason == Reason.DENIED:
            self.denied = self.denied or scanned

    def exit_status(self) -> int:
        """Return 2 after any error, else 1 if something is infected, else 0."""
        if self.errors or not self.complete:
            return 2
        return 1 if self.infected else 0


class Output(Protocol):
    """One form of output."""

    def layers(self, report: LayerReport) -> None:
        """Tell what confines the workers."""

    def engines(self, versions: Sequence[Version], via: str) -> None:
        """Tell who scans: engines of the service (`scand`), or of this command (`self`)."""

    def scanned(self, scanned: Scanned) -> None:
        """Tell a verdict."""

    def skipped(self, skipped: Skipped) -> None:
        """Tell what was not scanned."""

    def totals(self, totals: Totals) -> None:
        """Tell what it came to; the last call."""


class Outputs:
    """Several at once."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs

    def layers(self, report: LayerReport) -> None:
        """Tell what confines the workers."""
        for output in self._outputs:
            output.layers(report)

    def engines(self, versions: Sequence[Version], via: str) -> None:
        """Tell who scans: engines of the service (`scand`), or of this command (`self`)."""
        for output in self._outputs:
            output.engines(versions, via)

    def scanned(self, scanned: Scanned) -> None:
        """Tell a verdict."""
        for output in self._outputs:
            output.scanned(scanned)

    def skipped(self, skipped: Skipped) -> None:
        """Tell what was not scanned."""
        for output in self._outputs:
            output.skipped(skipped)

    def totals(self, totals: Totals) -> None:
        """Tell what it came to."""
        for output in self._outputs:
            output.totals(totals)


class HumanOutput:
    """Findings and errors on standard output; with `verbose` all else too, with `infected` nothing else."""

    def __init__(self, *, verbose: bool, infected: bool) -> None:
        self._verbose = verbose
        self._infected = infected
        self._versions: Sequence[Version] = ()
        self._via = "self"

    def layers(self, report: LayerReport) -> None:
        """Tell on standard error what this kernel lacks, or all.

        That ids stay is no news: only root can change them.
        """
        for state in report.states:
            if state.layer is Layer.IDS and not state.enforced:
                if self._verbose:
                    complain(f"worker: {state.layer.value} stay those of who started it: {_WHY_IDS}")
            elif self._verbose or not state.enforced:
                how = "in force" if state.enforced else "not in force"
                note = f": {state.note}" if state.note else ""
                complain(f"worker: {state.layer.value} {how}{note}")

    def engines(self, versions: Sequence[Version], via: str) -> None:
        """Keep it for the end, where it is beside what was found."""
        self._versions = versions
        self._via = via

    def scanned(self, scanned: Scanned) -> None:
        """Print one line."""
        if self._verbose or not isinstance(scanned.verdict, Clean):
            write_line(f"{printable(scanned.path)}: {_words(scanned.verdict)}{_who(scanned)}")

    def skipped(self, skipped: Skipped) -> None:
        """Print one line."""
        if self._verbose:
            write_line(f"{printable(skipped.path)}: skipped: {skipped.kind}")

    def totals(self, totals: Totals) -> None:
        """Print a line, and one about who has scanned."""
        if self._infected:
            return
        end = "" if totals.complete else " The scan is INCOMPLETE."
        write_line(
            f"{counted(totals.files, 'file')}, {counted(totals.bytes, 'byte')}, {totals.infected} infected,"
            f" {counted(totals.errors, 'error')}, {totals.skipped} skipped,"
            f" {totals.seconds:.2f} seconds.{end}"
        )
        if self._versions:
            write_line(f"{_by(self._versions, self._via)}.")


class JsonOutput:
    """One JSON object per line. A document without its `summary` line was cut off.

    Args:
        write: takes a line without its end.
        infected: leave out what is clean, and what was skipped.

    """

    def __init__(self, write: Callable[[str], None] = write_line, *, infected: bool = False) -> None:
        self._write_line = write
        self._infected = infected

    def _write(self, document: dict[str, object]) -> None:
        self._write_line(json.dumps(document))

    def layers(self, report: LayerReport) -> None:
        """Write the `worker` line."""
        layers = [
            {"name": state.layer.value, "enforced": state.enforced, "note": state.note}
            for state in report.states
        ]
        self._write({"type": "worker", "layers": layers})

    def engines(self, versions: Sequence[Version], via: str) -> None:
        """Write the `engines` line."""
        engines = [
            {"engine": one.engine, "version": one.version, "where": "worker" if one.inside else "outside"}
            for one in versions
        ]
        self._write({"type": "engines", "via": via, "engines": engines})

    def scanned(self, scanned: Scanned) -> None:
        """Write a `file` or `directory` line."""
        if isinstance(scanned.verdict, Clean):
            if self._infected:
                return
            if len(scanned.answers) == 1 and scanned.size is not None:
                # Nearly all lines are such.
                try:
                    path = json_string(scanned.path.decode())
                except UnicodeDecodeError:
                    names = path_members(scanned.path)
                    path = f'{json_string(names["path"])}, "path_hex": "{names["path_hex"]}"'
                self._write_line(
                    f'{{"type": "file", "path": {path}, "verdict": "clean", "size": {scanned.size}}}'
                )
                return
        line: dict[str, object] = {
            "type": "directory" if scanned.directory else "file",
            **path_members(scanned.path),
            **_verdict_members(scanned.verdict),
        }
        if scanned.size is not None:
            line["size"] = scanned.size
        if len(scanned.answers) > 1:
            line["engines"] = [
                {"engine": answer.engine, **_verdict_members(answer.verdict)} for answer in scanned.answers
            ]
        self._write(line)

    def skipped(self, skipped: Skipped) -> None:
        """Write a `skipped` line."""
        if not self._infected:
            self._write({"type": "skipped", **path_members(skipped.path), "kind": skipped.kind})

    def totals(self, totals: Totals) -> None:
        """Write the `summary` line."""
        self._write(
            {
                "type": "summary",
                "files": totals.files,
                "bytes": totals.bytes,
                "infected": totals.infected,
                "errors": totals.errors,
                "skipped": totals.skipped,
                "seconds": round(totals.seconds, 3),
                "complete": totals.complete,
                "exit_status": totals.exit_status(),
            }
        )


def _verdict_members(verdict: Verdict) -> dict[str, object]:
    if isinstance(verdict, Infected):
        more = {"more": list(verdict.more)} if verdict.more else {}
        return {"verdict": verdict.verdict, "name": verdict.name, **more}
    if isinstance(verdict, Error):
        return {"verdict": verdict.verdict, "reason": verdict.reason, "message": verdict.text}
    return {"verdict": verdict.verdict}


def _who(scanned: Scanned) -> str:
    """Return which of several engines has said it, and what the others have."""
    if len(scanned.answers) <= 1 or isinstance(scanned.verdict, Clean):
        return ""
    return f" ({', '.join(f'{answer.engine}: {_short(answer.verdict)}' for answer in scanned.answers)})"


def _short(verdict: Verdict) -> str:
    if isinstance(verdict, Infected):
        return ", ".join(map(printable, (verdict.name, *verdict.more)))
    return f"error, {verdict.reason}" if isinstance(verdict, Error) else "clean"


def _by(versions: Sequence[Version], via: str) -> str:
    """Return a sentence: who has scanned, and where."""
    whose = "fdbroker-scand" if via == "scand" else "this command"
    places = {f"in workers of {whose}": True, f"handed over by {whose}": False}
    parts = []
    for place, inside in places.items():
        names = [f"{one.engine} ({printable(one.version)})" for one in versions if one.inside is inside]
        if names:
            parts.append(f"by {' and '.join(names)}, {place}")
    return f"Scanned {'; '.join(parts)}"


def _words(verdict: Verdict) -> str:
    if isinstance(verdict, Infected):
        return f"infected: {printable(verdict.name)}"
    if isinstance(verdict, Error) and verdict.reason == "denied":
        return f"error: {DENIED}"
    if isinstance(verdict, Error):
        return f"error: {verdict.reason}: {printable(verdict.text)}"
    return "clean"
