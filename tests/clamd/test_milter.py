"""A mail, by way of ClamAV's milter, with clamd and with the scan service in its place."""

from __future__ import annotations

import contextlib
import email.message
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Self

import pytest

from tests.processes import listens, wait_until
from tests.scan.clamav import BAD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

_CONFIGURATION = """
MilterSocket unix:{directory}/milter
ClamdSocket unix:{clamd}
TemporaryDirectory {directory}
OnInfected Reject
OnFail Defer
AddHeader Replace
Foreground yes
"""
# What a milter may leave out (SMFIP_NO*), and do, in version 2 of its protocol.
_NO_CONNECT, _NO_HELO, _NO_MAIL, _NO_RCPT, _NO_BODY, _NO_HEADERS, _NO_EOH = (1 << bit for bit in range(7))


@contextlib.contextmanager
def milter(directory: Path, clamd: Path) -> Iterator[Path]:
    """Run clamav-milter; give its socket."""
    directory.mkdir()
    configuration = directory / "milter.conf"
    configuration.write_text(_CONFIGURATION.format(directory=directory, clamd=clamd))
    with open(directory / "said", "wb") as said:
        process = subprocess.Popen(
            ["/usr/sbin/clamav-milter", f"--config-file={configuration}"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        wait_until(lambda: listens(directory / "milter"), "the milter listens")
        yield directory / "milter"
        assert process.poll() is None, (directory / "said").read_text()
    finally:
        process.kill()
        process.wait()


class Session:
    """What a mail server says to a milter of one mail."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(30)
        self._sock.connect(bytes(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def say(self, command: bytes, data: bytes = b"") -> None:
        self._sock.sendall(struct.pack("!I", len(data) + 1) + command + data)

    def hear(self) -> tuple[bytes, bytes]:
        [length] = struct.unpack("!I", self._received(4))
        answer = self._received(length)
        return answer[:1], answer[1:]

    def _received(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            assert more
            data += more
        return data


def outcome(path: Path, mail: email.message.EmailMessage) -> tuple[bytes, list[str]]:
    """Hand over a mail; return the last answer, and the headers that were added."""
    with Session(path) as session:
        session.say(b"O", struct.pack("!III", 2, 0x3F, 0x7F))
        kind, negotiated = session.hear()
        assert kind == b"O"
        _, _, left_out = struct.unpack("!III", negotiated)

        def step(command: bytes, data: bytes, skipped: int) -> None:
            if not left_out & skipped:
                session.say(command, data)
                assert session.hear()[0] == b"c"

        step(b"C", b"localhost\x004" + struct.pack("!H", 25) + b"192.0.2.1\0", _NO_CONNECT)
        step(b"H", b"localhost\0", _NO_HELO)
        step(b"M", b"<ann@example.org>\0", _NO_MAIL)
        step(b"R", b"<bob@example.org>\0", _NO_RCPT)
        for name, value in mail.items():
            step(b"L", f"{name}\0{value}\0".encode(), _NO_HEADERS)
        step(b"N", b"", _NO_EOH)
        step(b"B", mail.as_bytes().partition(b"\n\n")[2].replace(b"\n", b"\r\n"), _NO_BODY)
        session.say(b"E")
        headers: list[str] = []
        while True:
            kind, data = session.hear()
            if kind not in b"himbe+-p":
                return kind + data, headers
            headers.append(data.strip(b"\0").split(b"\0")[0].decode("ascii", "replace"))


def mail_with(content: bytes) -> email.message.EmailMessage:
    mail = email.message.EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "ann@example.org", "bob@example.org", "a file"
    mail.set_content("Here it is.")
    mail.add_attachment(content, maintype="application", subtype="octet-stream", filename="file")
    return mail


def test_a_mail_is_refused_or_goes_on_as_with_clamd(clamd: Path, ours: Path, directory: Path) -> None:
    mails = [mail_with(b"nothing bad"), mail_with(BAD)]
    with (
        milter(directory / "milter-of-clamd", clamd) as theirs,
        milter(directory / "milter-of-scand", ours) as path,
    ):
        expected = [outcome(theirs, mail) for mail in mails]
        assert [outcome(path, mail) for mail in mails] == expected
    (clean, headers), (refused, _) = expected
    assert clean[:1] in {b"a", b"c"}
    assert "X-Virus-Scanned" in " ".join(headers)
    assert refused[:1] in {b"r", b"y"}
