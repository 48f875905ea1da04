"""How names and verdicts are written: for people, and as JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fdbroker.scan.verdict import Clean, Error, Infected

if TYPE_CHECKING:
    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.run import Scanned, Skipped
    from fdbroker.scan.verdict import Verdict


class OutputError(Exception):
    """Standard output took no more: a full disk, a pipe that nobody reads."""


def printable(text: bytes | str) -> str:
    r"""Return a name in a form that can't play with a terminal and can be read back.

    Whatever is not printable, and what is not UTF-8, is `\xNN` for each of its
    bytes, a backslash is `\\`: `printf %b` gives the name again.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    return "".join(
        character if character.isprintable() and character != "\\" else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def path_members(path: bytes) -> dict[str, str]:
    """Return the JSON members of a path: `path`, and `path_hex` where `path` does not have all its bytes."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {"path": path.decode(errors="replace"), "path_hex": path.hex()}


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
        """Tell on standard error what is missing, or all."""
        for state in report.states if self._verbose else report.missing():
            how = "in force" if state.enforced else "NOT in force"
            note = f": {state.note}" if state.note else ""
            complain(f"worker: {state.layer.value} {how}{note}")

    def scanned(self, scanned: Scanned) -> None:
        """Print one line."""
        if self._verbose or not isinstance(scanned.verdict, Clean):
            _write_line(f"{printable(scanned.path)}: {_words(scanned.verdict)}")

    def skipped(self, skipped: Skipped) -> None:
        """Print one line."""
        if self._verbose:
            _write_line(f"{printable(skipped.path)}: skipped: {skipped.kind}")

    def totals(self, totals: Totals) -> None:
        """Print one line."""
        end = "" if totals.complete else " The scan is INCOMPLETE."
        _write_line(
            f"{totals.files} files, {totals.bytes} bytes, {totals.infected} infected, {totals.errors} errors,"
            f" {totals.skipped} skipped, {totals.seconds:.2f} seconds.{end}"
        )


class JsonOutput:
    """One JSON object per line. A document without its `summary` line was cut off."""

    def layers(self, report: LayerReport) -> None:
        """Write the `worker` line."""
        layers = [
            {"name": state.layer.value, "enforced": state.enforced, "note": state.note}
            for state in report.states
        ]
        _write_json({"type": "worker", "layers": layers})

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
        _write_json(line)

    def skipped(self, skipped: Skipped) -> None:
        """Write a `skipped` line."""
        _write_json({"type": "skipped", **path_members(skipped.path), "kind": skipped.kind})

    def totals(self, totals: Totals) -> None:
        """Write the `summary` line."""
        _write_json(
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


def complain(text: str) -> None:
    """Write a line about the command itself to standard error."""
    sys.stderr.write(f"fdbroker: {printable(text)}\n")


def _words(verdict: Verdict) -> str:
    if isinstance(verdict, Infected):
        return f"infected: {printable(verdict.name)}"
    if isinstance(verdict, Error):
        return f"error: {verdict.reason}: {printable(verdict.text)}"
    return "clean"


def _write_json(line: dict[str, object]) -> None:
    _write_line(json.dumps(line))


def _write_line(line: str) -> None:
    try:
        sys.stdout.write(f"{line}\n")
    except OSError as error:
        raise OutputError(error.strerror) from error
