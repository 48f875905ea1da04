"""Containers and documents around some bytes, made here; their names say what they are for a scanner."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import lzma
import struct
import subprocess
import tarfile
import zipfile
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def zipped(contents: bytes, name: str = "inner") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, contents)
    return file.getvalue()


def tarred(contents: bytes, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("inner")
        info.size = len(contents)
        archive.addfile(info, io.BytesIO(contents))
    return file.getvalue()


def mail(contents: bytes) -> bytes:
    body = base64.encodebytes(contents).replace(b"\n", b"\r\n")
    return (
        b"From: a@example.org\r\nTo: b@example.org\r\nSubject: test\r\n"
        b"Date: Thu, 01 Jan 2026 00:00:00 +0000\r\n"
        b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n--b\r\n'
        b"Content-Type: application/octet-stream; name=a.bin\r\nContent-Transfer-Encoding: base64\r\n"
        b"Content-Disposition: attachment; filename=a.bin\r\n\r\n" + body + b"\r\n--b--\r\n"
    )


def pdf(contents: bytes) -> bytes:
    stream = zlib.compress(contents)
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>",
        b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(stream), stream),
    ]
    made = b"%PDF-1.4\n"
    offsets = []
    for number, each in enumerate(objects, 1):
        offsets.append(len(made))
        made += b"%d 0 obj%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        made
        + b"xref\n0 5\n0000000000 65535 f \n%strailer<</Size 5/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n"
        % (
            table,
            len(made),
        )
    )


def elf(contents: bytes) -> bytes:
    """Return a program of x86-64 with one segment and these bytes in it."""
    size = 64 + 56 + len(contents)
    return (
        b"\x7fELF\x02\x01\x01" + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 64, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, 4096)
        + contents
    )  # fmt: skip


def ole2(stream: str, contents: bytes) -> bytes:
    """Return a compound file, as old documents and encrypted new ones are, with one stream of this name."""
    sectors = max(8, -(-len(contents) // 512))
    end, free = 0xFFFFFFFE, 0xFFFFFFFF
    head = struct.pack("<8s16xHHHHH6xIIIIIIIIII", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0x3E, 3, 0xFFFE, 9, 6,
                       0, 1, 1, 0, 4096, end, 0, end, 0, 0)  # fmt: skip
    chain = [0xFFFFFFFD, end, *range(3, sectors + 2), end]
    table = struct.pack(f"<{len(chain)}I", *chain).ljust(512, b"\xff")

    def entry(name: str, kind: int, start: int, size: int, child: int) -> bytes:
        text = name.encode("utf-16-le") + b"\0\0"
        places = struct.pack("<HBBIII", len(text), kind, 1, free, free, child)
        return text.ljust(64, b"\0") + places + bytes(36) + struct.pack("<IQ", start, size)

    directory = entry("Root Entry", 5, end, 0, 1) + entry(stream, 2, 2, sectors * 512, free)
    return (
        head.ljust(512, b"\xff") + table + directory.ljust(512, b"\0") + contents.ljust(sectors * 512, b"\0")
    )


def by_program(directory: Path, contents: bytes, *argv: str) -> bytes:
    """Return the archive that a program makes of a file; `{}` in `argv` is the archive."""
    directory.mkdir(exist_ok=True)
    (directory / "inner").write_bytes(contents)
    archive = directory / "archive"
    archive.unlink(missing_ok=True)
    command = [each.replace("{}", str(archive)) for each in argv]
    subprocess.run([*command, "inner"], cwd=directory, check=True, capture_output=True)
    return next(directory.glob("archive*")).read_bytes()


def nested(contents: bytes, depth: int) -> bytes:
    """Return zip in zip; compressed, so that a pattern is seen in the innermost alone."""
    for _ in range(depth):
        contents = zipped(contents)
    return contents


def bomb() -> bytes:
    """Return a few kilobytes that unpack to 1.6 GB."""
    data = zipped(bytes(10_000_000))
    for _ in range(2):
        data = zipped_many([data] * 13)
    return data


def zipped_many(files: list[bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, contents in enumerate(files):
            archive.writestr(str(number), contents)
    return file.getvalue()


def zipped_with_a_wrong_size(contents: bytes, size: int) -> bytes:
    """Return a zip whose headers say that its member unpacks to `size` bytes."""
    data = bytearray(zipped(contents))
    struct.pack_into("<I", data, 22, size)
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, size)
    return bytes(data)


def encrypted_in_name_only(contents: bytes) -> bytes:
    """Return a zip whose headers say that it is encrypted."""
    data = bytearray(zipped(contents))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda contents: contents,
    "zip": zipped,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "tar": tarred,
    "tar.gz": lambda contents: tarred(contents, "w:gz"),
    "mail": mail,
    "pdf": pdf,
    "elf": elf,
    "ole2": lambda contents: ole2("WordDocument", contents),
    "zip in tar.gz": lambda contents: tarred(zipped(contents), "w:gz"),
    "zip in mail": lambda contents: mail(zipped(contents)),
    "gz in zip in zip": lambda contents: zipped(zipped(gzip.compress(contents))),
    "nested 8 times": lambda contents: nested(contents, 8),
}
RAR4 = b"Rar!\x1a\x07\x00" + bytes.fromhex("cf907300000d00000000000000") + bytes(50)
RAR5 = b"Rar!\x1a\x07\x01\x00" + bytes.fromhex("3392b5e50a01050600050101808000") + bytes(50)
ZSTD = b"\x28\xb5\x2f\xfd\x04\x58\x31\x00\x00hello\n" + bytes(10)
LZ4 = b"\x04\x22\x4d\x18" + bytes(30)
