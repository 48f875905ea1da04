"""The texts of clamd's protocol: what is said of a file, and of the service."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from fdbroker.scan.verdict import Clean, Infected, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fdbroker.scan.verdict import Verdict

OK = b"OK"
STREAM = b"stream"  # the name of what INSTREAM brought
# What is said of a file that was not looked at as a whole: an error; or what clamd says, OK as it is
# installed, or a finding with AlertExceedsMax and AlertEncrypted.
Unscanned = Literal["error", "ok", "found"]
# For these reasons, with the name of the finding: by how it begins, clients know clamd's. The last is none.
UNSCANNED = {
    Reason.TOO_LARGE: b"Heuristics.Limits.Exceeded",
    Reason.LIMIT_EXCEEDED: b"Heuristics.Limits.Exceeded",
    Reason.UNSCANNABLE_ENCRYPTED: b"Heuristics.Encrypted",
    Reason.UNSCANNABLE_CONTAINER: b"Heuristics.Unscannable",
}
# clamd's words for what its clients meet daily; of everything else the error's own text is said.
_TEXTS = {
    Reason.DENIED: b"Access denied.",
    Reason.NOT_FOUND: b"File path check failure: No such file or directory.",
    Reason.NOT_REGULAR: b"Not a regular file",
    Reason.NOT_READABLE: b"the descriptor is not open for reading.",
    Reason.SYMLINK: b"it is a symbolic link.",
}
# As the engines libclamav and clamd say it.
_CLAMAV = re.compile(r"ClamAV ([^/,\s]+)(?:/([0-9]{1,9})/([^,/]*))?")
_CONTROLS = frozenset([*range(0x20), 0x7F])
_ESCAPES = {byte: b"\\x%02x" % byte for byte in _CONTROLS} | {ord("\\"): b"\\\\"}


def escaped(name: bytes) -> bytes:
    r"""Return a name as it stands in a line of text, which it can't end or forge.

    A control byte is `\xNN` and a backslash `\\`: `printf %b` gives the name back. Other bytes stay.
    """
    if name.isascii() and name.isalnum():
        return name
    return b"".join(_ESCAPES.get(byte) or bytes((byte,)) for byte in name)


def said(verdict: Verdict, unscanned: Unscanned = "error") -> list[bytes]:
    """Return what is said of a file: `OK`, `NAME FOUND` for each name, or `TEXT ERROR`.

    `unscanned`: what is said for the reasons in `UNSCANNED`.
    """
    if isinstance(verdict, Clean):
        return [OK]
    if isinstance(verdict, Infected):
        return [name.encode() + b" FOUND" for name in (verdict.name, *verdict.more)]
    if unscanned != "error" and verdict.reason in UNSCANNED:
        return [OK] if unscanned == "ok" else [UNSCANNED[verdict.reason] + b" FOUND"]
    text = _TEXTS.get(verdict.reason) or (verdict.text.rstrip(".") or verdict.reason).encode() + b"."
    return [text + b" ERROR"]


def version(clamav: str, database: int, built: str) -> bytes:
    """Return the answer to VERSION: `ClamAV 1.4.6/27800/Wed Oct 22 ...`; `database` may be 0, for none."""
    return f"ClamAV {clamav}/{database}/{built}".encode() if database else f"ClamAV {clamav}".encode()


def version_of(engines: Iterable[str]) -> bytes:
    """Return the answer to VERSION of who has these engines, each a line that says its version.

    `ClamAV`, its release and its databases, where libclamav is one of them; of other engines ClamAV's clients
    know nothing, and are told `ClamAV 0`.
    """
    for text in engines:
        match = _CLAMAV.match(text)
        if match:
            return version(match[1], int(match[2] or 0), match[3] or "")
    return version("0", 0, "")


def commands(version_text: bytes, names: list[bytes]) -> bytes:
    """Return the answer to VERSIONCOMMANDS."""
    return version_text + b"| COMMANDS: " + b" ".join(names)


def statistics(*, live: int, idle: int, most: int, queued: int) -> bytes:
    """Return the answer to STATS: of workers, and of files that wait for one."""
    return (
        b"POOLS: 1\n\nSTATE: VALID PRIMARY\n"
        b"THREADS: live %d  idle %d max %d idle-timeout 30\n"
        b"QUEUE: %d items\n\n"
        b"MEMSTATS: heap N/A mmap N/A used N/A free N/A releasable N/A"
        b" pools 1 pools_used N/A pools_total N/A\n"
        b"END" % (live, idle, most, queued)
    )
