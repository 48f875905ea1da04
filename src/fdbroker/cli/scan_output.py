"""How verdicts are written: for people, and as JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fdbroker.cli.broker import DENIED
from fdbroker.cli.output import complain, path_members, write_json, write_line
from fdbroker.config.names import counted, printable
from fdbroker.sandbox.report import Layer
from fdbroker.scan.verdict import Clean, Error, Infected

if TYPE_CHECKING:
    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.run import Scanned, Skipped
    from fdbroker.scan.verdict import Verdict


_WHY_IDS = "only root can change them, and the other layers hold without that"


@dataclass
class Totals:
    """What a scan came to. `complete`: all that there is was seen."""

    files: int = 0
    bytes: int = 0
    infected: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    complete: bool = True

    def add(self, scanned: Scanned) -> None:
        """Count a verdict. Bytes are those that were read to the end."""
        self.files += not scanned.directory
        self.infected += isinstance(scanned.verdict, Infected)
        self.errors += isinstance(scanned.verdict, Error)
        if not isinstance(scanned.verdict, Error):
            self.bytes += scanned.size or 0

    def exit_status(self) -> int:
        """Return 2 after any error, else 1 if something is infected, else 0."""
        if self.errors or not self.complete:
            return 2
        return 1 if self.infected else 0


class Output(Protocol):
    """One form of output."""

    def layers(self, report: LayerReport) -> None:
        """Tell what confines the worker."""

    def scanned(self, scanned: Scanned) -> None:
        """Tell a verdict."""

    def skipped(self, skipped: Skipped) -> None:
        """Tell what was not scanned."""

    def totals(self, totals: Totals) -> None:
        """Tell what it came to; the last call."""


class HumanOutput:
    """Findings and errors on standard output; with `verbose` everything else as well."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose

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

    def scanned(self, scanned: Scanned) -> None:
        """Print one line."""
        if self._verbose or not isinstance(scanned.verdict, Clean):
            write_line(f"{printable(scanned.path)}: {_words(scanned.verdict)}")

    def skipped(self, skipped: Skipped) -> None:
        """Print one line."""
        if self._verbose:
            write_line(f"{printable(skipped.path)}: skipped: {skipped.kind}")

    def totals(self, totals: Totals) -> None:
        """Print one line."""
        end = "" if totals.complete else " The scan is INCOMPLETE."
        write_line(
            f"{counted(totals.files, 'file')}, {counted(totals.bytes, 'byte')}, {totals.infected} infected,"
            f" {counted(totals.errors, 'error')}, {totals.skipped} skipped,"
            f" {totals.seconds:.2f} seconds.{end}"
        )


class JsonOutput:
    """One JSON object per line. A document without its `summary` line was cut off."""

    def layers(self, report: LayerReport) -> None:
        """Write the `worker` line."""
        layers = [
            {"name": state.layer.value, "enforced": state.enforced, "note": state.note}
            for state in report.states
        ]
        write_json({"type": "worker", "layers": layers})

    def scanned(self, scanned: Scanned) -> None:
        """Write a `file` or `directory` line."""
        line: dict[str, object] = {
            "type": "directory" if scanned.directory else "file",
            **path_members(scanned.path),
            "verdict": scanned.verdict.verdict,
        }
        if isinstance(scanned.verdict, Infected):
            line["name"] = scanned.verdict.name
        elif isinstance(scanned.verdict, Error):
            line |= {"reason": scanned.verdict.reason, "message": scanned.verdict.text}
        if scanned.size is not None:
            line["size"] = scanned.size
        write_json(line)

    def skipped(self, skipped: Skipped) -> None:
        """Write a `skipped` line."""
        write_json({"type": "skipped", **path_members(skipped.path), "kind": skipped.kind})

    def totals(self, totals: Totals) -> None:
        """Write the `summary` line."""
        write_json(
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


def _words(verdict: Verdict) -> str:
    if isinstance(verdict, Infected):
        return f"infected: {printable(verdict.name)}"
    if isinstance(verdict, Error) and verdict.reason == "denied":
        return f"error: {DENIED}"
    if isinstance(verdict, Error):
        return f"error: {verdict.reason}: {printable(verdict.text)}"
    return "clean"
