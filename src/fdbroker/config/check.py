"""Everything that is to be said of a policy file: its errors, and the findings of one without errors."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple

from fdbroker.config.compile import compile_files
from fdbroker.config.defaults import EXIT_OK, EXIT_REFUSED, EXIT_WARNED
from fdbroker.config.errors import ConfigError, Problem
from fdbroker.config.findings import WARNING, Finding, find
from fdbroker.config.identities import OfflineLookups, SystemLookups
from fdbroker.config.names import counted, printable
from fdbroker.config.places import Places
from fdbroker.config.sources import read_policy_files
from fdbroker.config.surroundings import ThisMachine
from fdbroker.policy.rules import read_policy
from fdbroker.wire.client import for_broker


class Checked(NamedTuple):
    """What came of it. `errors` is empty or all there is; the counts are 0 then."""

    file: str
    errors: tuple[Problem, ...]
    findings: tuple[Finding, ...]
    roots: int = 0
    rules: int = 0

    def status(self, *, strict: bool) -> int:
        """Return the exit status: 2 with errors; `strict`: 1 with warnings; else 0."""
        if self.errors:
            return EXIT_REFUSED
        warned = any(finding.severity == WARNING for finding in self.findings)
        return EXIT_WARNED if strict and warned else EXIT_OK

    def told(self) -> str:
        """Return what is wrong or worth knowing, a line for each."""
        return "".join(f"{entry}\n" for entry in (*self.errors, *self.findings))

    def summary(self) -> str:
        """Return what the policy is, in a line; nothing of one with errors."""
        if self.errors:
            return ""
        warnings = sum(finding.severity == WARNING for finding in self.findings)
        notes = len(self.findings) - warnings
        counts = [counted(self.roots, "root"), counted(self.rules, "rule")]
        counts += [counted(warnings, "warning")] if warnings else []
        counts += [counted(notes, "note")] if notes else []
        return f"{printable(self.file)}: {', '.join(counts if self.findings else [*counts, 'no problems'])}\n"

    def document(self) -> str:
        """Return all of it as one JSON object."""
        found = [
            _members("error", error.file, error.line, error.column)
            | {"kind": None, "rule": None, "root": None, "message": error.message, "cure": error.cure}
            for error in self.errors
        ]
        for finding in self.findings:
            mark = finding.place.mark
            line, column = (None, None) if mark is None else (mark.line, mark.column)
            found.append(
                _members(finding.severity, finding.place.file, line, column)
                | {
                    "kind": finding.kind,
                    "rule": finding.rule,
                    "root": finding.root,
                    "message": finding.message,
                    "cure": finding.cure,
                }
            )
        whole = {"policy": printable(self.file), "roots": self.roots, "rules": self.rules, "findings": found}
        return json.dumps(whole) + "\n"


def check(file: str, *, dev: bool = False, offline: bool = False, ignored: Collection[str] = ()) -> Checked:
    """Check a policy file. `offline`: for another machine. `ignored`: kinds of findings to leave out."""
    try:
        files = read_policy_files(file, dev=dev)
        compiled = compile_files(files, OfflineLookups() if offline else SystemLookups())
    except ConfigError as error:
        return Checked(file, error.problems, ())
    places = Places(file)
    for number, part in enumerate(files):
        places.add(part.text, part.name, number)
    findings = find(read_policy(for_broker(compiled)), places, None if offline else ThisMachine())
    kept = tuple(finding for finding in findings if finding.kind not in ignored)
    return Checked(file, (), kept, len(compiled["roots"]), len(compiled["rules"]))


def _members(severity: str, file: str, line: int | None, column: int | None) -> dict[str, object]:
    return {"severity": severity, "file": printable(file), "line": line, "column": column}
