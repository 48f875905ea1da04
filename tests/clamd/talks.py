"""What clamd and fdbroker are both told, and where their answers differ on purpose.

`/T` stands for the tree of files; the number in `fd[N]`, and numbers in STATS, for any.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from tests.clamd.speaking import HALF_CLOSE, Passed, Step, Until
from tests.scan.clamav import BAD, BAD_NAME

if TYPE_CHECKING:
    from pathlib import Path

FOUND = BAD_NAME.encode() + b" FOUND"
STREAM_LENGTH = 65536
# Of the errors: the text that says whose descriptor is missing, and how many there are.
STRAY = b"PROTOCOL ERROR: ancillary data sent without FILDES. ERROR"
SEVERAL = b"FILDES: several descriptors received, one is needed. ERROR"


class Differs(NamedTuple):
    """What each of them says, and why. `clamd`: None if it says one thing or another."""

    why: str
    clamd: bytes | None
    ours: bytes


class Talk(NamedTuple):
    """One conversation. `any_order`: the replies of one session may come in any."""

    name: str
    steps: tuple[Step, ...]
    differs: Differs | None = None
    any_order: bool = False


def make_tree(root: Path) -> None:
    """Make the files that are asked for."""
    for name in ("sub", "clean-directory", "empty-directory"):
        (root / name).mkdir(parents=True)
    for name in ("clean", "sub/a", "clean-directory/x", "with: colon OK"):
        (root / name).write_bytes(b"nothing bad")
    for name in ("bad", "sub/b", "trail ", "tab\t", "new\nline: OK", "return\r", "back\\slash"):
        (root / name).write_bytes(BAD)
    (root / os.fsdecode(b"latin \xff")).write_bytes(BAD)
    (root / "empty").write_bytes(b"")
    (root / "link").symlink_to(root / "bad")
    os.mkfifo(root / "fifo")


def passing(data: bytes, *files: str, flags: int = os.O_RDONLY) -> Passed:
    """Return a message with files of the tree."""
    return Passed(data, tuple((f"/T/{name}".encode(), flags) for name in files))


def chunks(*parts: bytes) -> bytes:
    """Return a stream to its end."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in (*parts, b""))


def _same(name: str, *steps: Step, any_order: bool = False) -> Talk:
    return Talk(name, steps, any_order=any_order)


def _differs(name: str, why: str, clamd: bytes | None, ours: bytes, *steps: Step) -> Talk:
    return Talk(name, steps, Differs(why, clamd, ours))


TALKS = [
    # Framing.
    _same("PING with newline", b"nPING\n"),
    _same("PING with NUL", b"zPING\0"),
    _same("PING plain", b"PING\n"),
    _same("PING plain, line end of DOS", b"PING\r\n"),
    _same("PING, line end of DOS", b"nPING\r\n"),
    _same("PING plain without line end", b"PING"),
    _same("PING plain without line end, and no more", b"PING", HALF_CLOSE),
    _same("RELOAD plain, with NUL and without line end", b"RELOAD\0"),  # so says freshclam
    _same("PING in parts", b"n", b"PI", b"NG", b"\n"),
    _same("PING and no more", b"nPING\n", HALF_CLOSE),
    _same("newline in a command with NUL", b"zPING\n\0"),
    _same("space behind a command", b"nPING \n"),
    _same("small letters", b"nping\n"),
    _same("nothing with newline", b"n\n"),
    _same("nothing with NUL", b"z\0"),
    _same("nothing plain", b"\n"),
    _same("unknown plain", b"HELLO\n"),
    _same("a command with NUL that is begun", b"zPIN", HALF_CLOSE),
    _same("a command with newline that is begun", b"nPING", HALF_CLOSE),
    _same("no command at all", HALF_CLOSE),
    _same("a second command", b"nPING\nnPING\n"),
    _differs(
        "PING plain in parts",
        "a plain command ends with its line, not with the packet",
        b"UNKNOWN COMMAND\n",
        b"PONG\n",
        b"PI",
        b"NG\n",
    ),
    _differs(
        "NUL inside a command",
        "what stands behind a NUL is part of the command; clamd scans what stands before it",
        None,
        b"UNKNOWN COMMAND\n",
        b"nSCAN /T/clean\0/other\n",
    ),
    _differs(
        "a command that is too long",
        "the client is told",
        b"",
        b"Command too long. ERROR\n",
        b"n" + b"A" * 4104 + b"\n",
    ),
    _differs(
        "a command without end",
        "the client is told",
        b"",
        b"Command too long. ERROR\0",
        b"z" + b"A" * 5000,
    ),
    # What it says of itself.
    _same("VERSION", b"nVERSION\n"),
    _same("VERSION plain", b"VERSION\n"),
    _same("VERSIONCOMMANDS plain", b"VERSIONCOMMANDS\n"),
    _same("STATS", b"nSTATS\n"),
    _same("STATS with NUL", b"zSTATS\0"),
    _same("STATS plain", b"STATS\n"),
    _same("RELOAD", b"nRELOAD\n"),
    _same("RELOAD with something behind it", b"nRELOAD x\n"),
    _same("STREAM, which was removed", b"nSTREAM\n"),
    _differs(
        "VERSIONCOMMANDS",
        "what was removed is not named",
        b"ClamAV 1.4.6| COMMANDS: SCAN QUIT RELOAD PING CONTSCAN VERSIONCOMMANDS VERSION END SHUTDOWN"
        b" MULTISCAN FILDES STATS IDSESSION INSTREAM DETSTATSCLEAR DETSTATS ALLMATCHSCAN\n",
        b"ClamAV 1.4.6| COMMANDS: SCAN QUIT RELOAD PING CONTSCAN VERSIONCOMMANDS VERSION END SHUTDOWN"
        b" MULTISCAN FILDES STATS IDSESSION INSTREAM ALLMATCHSCAN\n",
        b"nVERSIONCOMMANDS\n",
    ),
    _differs("DETSTATS, which was removed", "the client is told", b"", b"UNKNOWN COMMAND\n", b"nDETSTATS\n"),
    # Paths.
    _same("SCAN clean", b"nSCAN /T/clean\n"),
    _same("SCAN bad", b"zSCAN /T/bad\0"),
    _same("SCAN plain", b"SCAN /T/bad\n"),
    _same("SCAN plain without line end", b"SCAN /T/bad"),
    _same("SCAN in parts", b"zSCA", b"N /T", b"/bad", b"\0"),
    _same("SCAN nothing", b"zSCAN\0"),
    _same("SCAN what is not there", b"zSCAN /T/none\0"),
    _same("SCAN empty", b"zSCAN /T/empty\0"),
    _same("SCAN a directory", b"zSCAN /T/sub\0"),
    _same("SCAN a clean directory", b"zSCAN /T/clean-directory\0"),
    _same("SCAN an empty directory", b"zSCAN /T/empty-directory\0"),
    _same("SCAN a name that ends with a space", b"nSCAN /T/trail \n"),
    _same("SCAN a name with a tab, NUL", b"zSCAN /T/tab\t\0"),
    _same("SCAN a name with a newline, NUL", b"zSCAN /T/new\nline: OK\0"),
    _same("SCAN a name with a carriage return, NUL", b"zSCAN /T/return\r\0"),
    _same("SCAN a name with a backslash, NUL", b"zSCAN /T/back\\slash\0"),
    _same("SCAN a name with a colon", b"nSCAN /T/with: colon OK\n"),
    _same("SCAN a name that is not UTF-8", b"nSCAN /T/latin \xff\n"),
    _same("CONTSCAN a directory", b"zCONTSCAN /T/sub\0"),
    _same("CONTSCAN plain", b"CONTSCAN /T/clean-directory\n"),
    _same("MULTISCAN a directory", b"zMULTISCAN /T/sub\0"),
    _same("MULTISCAN a file", b"nMULTISCAN /T/bad\n"),
    _same("ALLMATCHSCAN clean", b"zALLMATCHSCAN /T/clean\0"),
    _same("ALLMATCHSCAN plain", b"ALLMATCHSCAN /T/bad\n"),
    _differs(
        "ALLMATCHSCAN bad",
        "each name of a file is said once",
        b"/T/bad: " + FOUND + b"\0/T/bad: " + FOUND + b"\0",
        b"/T/bad: " + FOUND + b"\0",
        b"zALLMATCHSCAN /T/bad\0",
    ),
    _differs(
        "SCAN the empty path",
        "it is no path",
        b": File path check failure: No such file or directory. ERROR\0",
        b"UNKNOWN COMMAND\0",
        b"zSCAN \0",
    ),
    _differs(
        "SCAN without a space",
        "any byte will do there for clamd",
        b"/T/clean: OK\0",
        b"UNKNOWN COMMAND\0",
        b"zSCANX/T/clean\0",
    ),
    _differs(
        "SCAN a symbolic link",
        "what was not looked at is not OK",
        b"/T/link: OK\0",
        b"/T/link: it is a symbolic link. ERROR\0",
        b"zSCAN /T/link\0",
    ),
    _differs(
        "SCAN a FIFO",
        "what was not looked at is not OK",
        b"/T/fifo: Not supported file type ERROR\0/T/fifo: OK\0",
        b"/T/fifo: Not a regular file ERROR\0",
        b"zSCAN /T/fifo\0",
    ),
    _differs(
        "SCAN a name with a tab",
        "in a line of text, control bytes of a name are escaped",
        b"/T/tab\t: " + FOUND + b"\n",
        b"/T/tab\\x09: " + FOUND + b"\n",
        b"nSCAN /T/tab\t\n",
    ),
    _differs(
        "SCAN a name with a backslash",
        "in a line of text, a backslash is escaped, so that the name can be told",
        b"/T/back\\slash: " + FOUND + b"\n",
        b"/T/back\\\\slash: " + FOUND + b"\n",
        b"nSCAN /T/back\\slash\n",
    ),
    _differs(
        "SCAN a name that ends with a carriage return",
        "clamd takes it for a part of the line end, as fdbroker does, and then for a command of its own",
        None,
        b"/T/return: File path check failure: No such file or directory. ERROR\n",
        b"nSCAN /T/return\r\n",
    ),
    # INSTREAM.
    _same("INSTREAM clean", b"zINSTREAM\0" + chunks(b"nothing bad")),
    _same("INSTREAM bad", b"nINSTREAM\n" + chunks(BAD)),
    _same("INSTREAM in chunks", b"zINSTREAM\0" + chunks(BAD[:5], BAD[5:])),
    _same("INSTREAM in parts", b"zINSTREAM\0", b"\0\0", b"\0\5not", b"hi", b"\0\0\0\0"),
    _same("INSTREAM nothing", b"zINSTREAM\0" + chunks()),
    _same("INSTREAM as much as there may be", b"zINSTREAM\0" + chunks(bytes(STREAM_LENGTH))),
    _same("INSTREAM one byte more", b"zINSTREAM\0" + (STREAM_LENGTH + 1).to_bytes(4, "big")),
    _same("INSTREAM more in two chunks", b"zINSTREAM\0" + chunks(bytes(STREAM_LENGTH), b"a")[:-5]),
    _same("INSTREAM the longest chunk", b"nINSTREAM\n\xff\xff\xff\xff"),
    _same("INSTREAM that is cut off", b"zINSTREAM\0\0\0\0\5not", HALF_CLOSE),
    _same("INSTREAM without end", b"zINSTREAM\0\0\0\0\3not", HALF_CLOSE),
    _same("INSTREAM plain", b"INSTREAM\n"),
    # IDSESSION.
    _same("a session", b"zIDSESSION\0", b"zPING\0", b"nVERSION\n", b"zEND\0"),
    _same("a session at once", b"zIDSESSION\0zPING\0nPING\nzEND\0"),
    _same("a session with STATS", b"zIDSESSION\0zSTATS\0", Until(b"END\0"), b"zEND\0"),
    _same("a session that ends without END", b"zIDSESSION\0zPING\0", Until(b"PONG\0"), HALF_CLOSE),
    _same("a session without commands", b"zIDSESSION\0zEND\0"),
    _same("a session with something behind it", b"zIDSESSION\0zEND\0zPING\0"),
    _same("a session in a session", b"zIDSESSION\0zPING\0zIDSESSION\0"),
    _same("a session plain", b"IDSESSION\n"),
    _same("END without a session", b"nEND\n"),
    _same("RELOAD in a session", b"zIDSESSION\0zRELOAD\0"),
    _same("SHUTDOWN in a session", b"zIDSESSION\0nSHUTDOWN\n"),
    _same("CONTSCAN in a session", b"zIDSESSION\0zCONTSCAN /T/clean-directory\0"),
    _same("MULTISCAN in a session", b"zIDSESSION\0zMULTISCAN /T/clean-directory\0"),
    _same("ALLMATCHSCAN in a session", b"zIDSESSION\0zALLMATCHSCAN /T/bad\0"),
    _same("unknown in a session", b"zIDSESSION\0nHELLO\n"),
    _same("nothing in a session", b"zIDSESSION\0z\0"),
    _same("scans in a session", b"zIDSESSION\0zSCAN /T/bad\0zSCAN /T/clean\0zEND\0", any_order=True),
    _same("a directory in a session", b"zIDSESSION\0zSCAN /T/sub\0zEND\0"),
    _same("what is not there in a session", b"zIDSESSION\0zSCAN /T/none\0zPING\0zEND\0", any_order=True),
    _same(
        "INSTREAM in a session",
        b"zIDSESSION\0zINSTREAM\0" + chunks(BAD) + b"nINSTREAM\n" + chunks(b"good") + b"zEND\0",
        any_order=True,
    ),
    _same("INSTREAM too long in a session", b"zIDSESSION\0zPING\0zINSTREAM\0\xff\xff\xff\xff"),
    _differs(
        "plain in a session",
        "one command has one answer",
        b"1: Only nCMDS\\n and zCMDS\\0 are accepted inside IDSESSION. ERROR\0"
        b"1: Error processing command. ERROR\0",
        b"1: Only nCMDS\\n and zCMDS\\0 are accepted inside IDSESSION. ERROR\0",
        b"zIDSESSION\0",
        b"PING\n",
    ),
    # FILDES.
    _same("FILDES in two messages", b"zFILDES\0", passing(b"\0", "bad")),
    _same("FILDES in one message", passing(b"zFILDES\0\0", "bad")),
    _same("FILDES with newline", b"nFILDES\n", passing(b"x", "clean")),
    _same("FILDES plain", b"FILDES\n", passing(b"x", "clean")),
    _same("FILDES plain in one message", passing(b"FILDES\nx", "clean")),
    _same("FILDES with any byte", b"zFILDES\0", passing(b"z", "bad")),
    _same("FILDES without a descriptor", b"zFILDES\0", b"\0"),
    _same("FILDES without a descriptor, in one message", b"zFILDES\0\0"),
    _same("FILDES and no more", b"zFILDES\0", HALF_CLOSE),
    _same("FILDES with a directory", b"zFILDES\0", passing(b"\0", "sub")),
    _same("FILDES for reading and writing", b"zFILDES\0", passing(b"\0", "bad", flags=os.O_RDWR)),
    _same(
        "FILDES in a session",
        b"zIDSESSION\0",
        b"zFILDES\0",
        passing(b"\0", "bad"),
        Until(b"1: "),
        passing(b"zFILDES\0\0", "clean"),
        Until(b"2: "),
        b"zEND\0",
    ),
    _same("FILDES without a descriptor in a session", b"zIDSESSION\0zFILDES\0\0"),
    _differs(
        "FILDES with two descriptors",
        "the client is told; clamd leaks one of them",
        b"No file descriptor received. ERROR\0",
        SEVERAL + b"\0",
        b"zFILDES\0",
        passing(b"\0", "bad", "clean"),
    ),
    _differs(
        "FILDES for writing alone",
        "what can't be read is not OK",
        b"fd[N]: OK\0",
        b"fd[N]: the descriptor is not open for reading. ERROR\0",
        b"zFILDES\0",
        passing(b"\0", "bad", flags=os.O_WRONLY),
    ),
    _differs(
        "FILDES with O_PATH",
        "what can't be read is not OK",
        b"fd[N]: OK\0",
        b"fd[N]: the descriptor is not open for reading. ERROR\0",
        b"zFILDES\0",
        passing(b"\0", "bad", flags=os.O_PATH),
    ),
    _differs(
        "FILDES in parts, the descriptor with the first",
        "a command may come in any parts",
        STRAY + b"\0",
        b"fd[N]: " + FOUND + b"\0",
        passing(b"z", "bad"),
        b"FILDES\0\0",
    ),
    _differs(
        "FILDES in two messages, the descriptor with the first",
        "a command may come in any parts",
        STRAY + b"\0Error processing command. ERROR\0",
        b"fd[N]: " + FOUND + b"\0",
        passing(b"zFILDES\0", "bad"),
        b"\0",
    ),
    _differs(
        "a descriptor with PING",
        "nothing but FILDES comes with a descriptor",
        b"PONG\0",
        STRAY + b"\0",
        passing(b"zPING\0", "bad"),
    ),
    _differs(
        "a descriptor with PING in a session",
        "nothing but FILDES comes with a descriptor, and one command has one answer",
        b"1: PONG\x002: PROTOCOL ERROR: ancillary data sent without FILDES. ERROR\0",
        b"1: " + STRAY + b"\0",
        b"zIDSESSION\0",
        passing(b"zPING\0", "bad"),
    ),
    _differs(
        "FILDES and a command in one message",
        "the kernel says what a descriptor came with by the last byte alone",
        None,
        b"1: No file descriptor received. ERROR\0",
        b"zIDSESSION\0",
        passing(b"zFILDES\0\0zPING\0", "bad"),
        HALF_CLOSE,
    ),
    _differs(
        "something behind FILDES",
        "what comes behind the last command is not read",
        None,
        b"fd[N]: " + FOUND + b"\0",
        b"zFILDES\0",
        passing(b"\0", "bad"),
        b"more",
    ),
    _differs(
        "a session that ends before its scan",
        "a client that says no more still listens",
        None,
        b"1: /T/bad: " + FOUND + b"\0",
        b"zIDSESSION\0zSCAN /T/bad\0",
        HALF_CLOSE,
    ),
]
# With time-outs of a second.
SLOW_TALKS = [
    _same("nothing is said", Until(b"COMMAND READ TIMED OUT\n")),
    _same("a command is never ended", b"zPIN", Until(b"COMMAND READ TIMED OUT\n")),
    _same("a session does nothing", b"zIDSESSION\0zPING\0", Until(b"COMMAND READ TIMED OUT\n")),
    _same("a stream goes on no more", b"zINSTREAM\0\0\0\0\5a", Until(b"COMMAND READ TIMED OUT\n")),
    _same("a descriptor does not come", b"zFILDES\0", Until(b"COMMAND READ TIMED OUT\n")),
]
