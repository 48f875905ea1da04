"""What the sources can say to a user: the texts of errors, found by their place in the syntax tree.

A text is a literal of three words or more, with `…` for whatever is put into it,
in a statement that raises, returns or calls, or that gives it a name that a text
has (`why`, `text`). The first of a statement is the message; what follows is
mostly the cure. What a statement only adds to another text is excluded below.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import fdbroker

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(fdbroker.__file__).parent
_FEWEST_WORDS = 3
_NAMES = frozenset({"message", "text", "why", "reason", "objection", "said", "_BAD_GLOB"})
_TABLES = frozenset({"_TEXTS", "_TEXTS_OF_LISTENERS", "MISSING", "cures"})
# Arguments that are help, not messages.
_HELP = frozenset({"help", "short_help", "epilog", "description", "metavar"})

# Whose texts a user is told as errors: folders and files.
TOLD = (
    "launcher",
    "broker",
    "config",
    "cli",
    "client",
    "scan",
    "sandbox",
    "clamd/import_conf.py",
    "policy/globs.py",
)

# Files of those whose texts are something else, each with the reason.
NOT_ERRORS = {
    "cli/checks": "findings of doctor, each with its cure",
    "cli/doctor.py": "likewise",
    "cli/audit_schema.py": "descriptions in a schema",
    "cli/openmetrics.py": "descriptions of metrics",
    "cli/explanation.py": "explanations of decisions",
    "cli/progress.py": "a progress bar",
    "config/explain.py": "explanations of decisions",
    "config/difference.py": "differences of two policies",
    "config/findings.py": "warnings, which docs/policy-tools.md describes by their kinds",
    "config/schema.py": "descriptions in a schema",
    "config/surroundings.py": "parts of those warnings",
    "client/engine.py": "what is said behind: the broker does not keep to the protocol",
    "client/answers.py": "likewise",
    "client/control.py": "likewise",
    "scan/messages.py": "likewise, of the scan service",
    "scan/answers.py": "likewise, of a worker",
    "sandbox/report.py": "likewise",
    "sandbox/machine.py": "likewise",
    "broker/helper_messages.py": "likewise, of an open helper",
}
# Texts in other files that are no errors either: results, notes, parts of JSON, and what can't come to be.
NOT_ERRORS_ALONE = frozenset(
    {
        '……,"time":"…","event":………}',
        '……,"…_hex":"…"…',
        '……,"time":"…","event":"…",…,……,…}',
        '{"type": "file", "path": …, "verdict": "clean", "size": …}',
        '{"loaded": [1.5, "text"]}',
        "%a %b %e %H:%M:%S %Y",
        "<WalkedFile … kind=…>",
        "<… of ……>",
        "<… …: uid …, pid ……>",
        "<fdbroker.Service of ……>",
        "Serving by policy generation … (… rules)",
        "The engines are loaded.",
        "the engines were loaded anew:",
        "the audit goes to …",
        "… is in force: generation …, …",
        "Workers of the profile … … here.",
        "…, …, … infected, …, … skipped, … seconds.…",
        "worker: … stay those of who started it: …",
        "broker …, generation …, …, over … s",
        "TAP version 14",
        "… compared: … allowed more, … allowed no more",
        "… …: … (…)",
        "~ …: … -> …",
        "…: no problems",
        "hashes 1, … digests",
        "ClamAV …/…/…, … signatures",
        "yara-x …, … rules",
        "0 is no limit there; here there always is one, and the usual one holds",
        "…: … more (--verbose lists them)",
        # Of layers that are in force.
        "…, of … MiB",
        "its channel, /dev/null twice, and the program",
        "its channel, and /dev/null twice",
        "uid …, gid …, no other groups",
        "unchanged: uid …, as who started it",
        "no processes or core dumps",
        "… s of CPU",
        "not wanted: it compiles while it runs",
        # Parts of other texts.
        "…: fdbroker policy explain ……",
        ": it is what systemd calls a socket without a name",
        "of an unknown kind",
        "…: an item",
        "socket … of systemd",
        "a given socket",
        "the other end",
        "a value of type …",
        "write the name of a user, as in …",
        "write a short name; the audit shows it",
        "write one that there is, or leave it out",
        "create a user for it alone",
        "… --on-behalf-of, --unit, --cgroup and --label",
        # Of a programmer's mistake, or of one end of a protocol that both ends of which are ours.
        "… is no number",
        "a call failed",
        "… is no pair",
        "it was waited for, without WNOHANG, and there is nothing",
        "module 'fdbroker.config' has no attribute …",
        "module 'fdbroker.scan' has no attribute …",
        "a policy was not compiled and no problem was noted",
        "a table was not read and no problem was noted",
        "a configuration was not read and no problem was noted",
        "file … is under way",
        "it is not over",
        "nothing is under way",
        "not a request",
        "more than … names",
        "not a name of something that was found: …",
        "the worker told something else than the versions of its engines",
        "the worker does not tell the versions of its engines",
        "…: … (…)",
        "… descriptors came within a frame that had begun",
        "a client whose descriptor is no socket: …",
        "…: … has no …",
    }
)


class Message(NamedTuple):
    """A text with its place in the sources."""

    place: str
    text: str


@functools.cache
def messages() -> tuple[Message, ...]:
    """Return what users are told."""
    return tuple(
        Message(f"{name}:{line}", text)
        for name, tree in _trees().items()
        if not name.startswith(tuple(NOT_ERRORS))
        for line, text in _texts(tree)
        if text not in NOT_ERRORS_ALONE
    )


@functools.cache
def literals() -> frozenset[str]:
    """Return all texts of the files that users are told of, messages or not, of any length."""
    texts = (_text(node) for tree in _trees().values() for node in ast.walk(tree))
    return frozenset(" ".join(text.split()) for text in texts if text)


@functools.cache
def _trees() -> dict[str, ast.Module]:
    """Return the files that users are told of, by their names."""
    names = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py"))
    return {name: ast.parse((SOURCES / name).read_text()) for name in names if name.startswith(TOLD)}


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            found = list(_within(node))
            if names & _TABLES:
                yield from ((node.lineno, text) for text in found)
            elif names & _NAMES and found:
                yield node.lineno, found[0]
        elif isinstance(node, ast.Raise | ast.Return | ast.Expr):
            found = list(_within(node))
            if found:
                yield node.lineno, found[0]


def _within(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.keyword) and node.arg in _HELP:
        return
    text = _text(node)
    if text is None:
        for child in ast.iter_child_nodes(node):
            yield from _within(child)
    elif len(text.replace("…", " ").split()) >= _FEWEST_WORDS:
        yield " ".join(text.split())


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None
