"""`libclamav`: ClamAV's library, loaded once and shared by all workers.

The library is loaded by ctypes (Debian's package libclamav12 of ClamAV 1.4).
It answers CL_CLEAN in more cases than fdbroker calls clean, each of which is an
error here:

- A limit was exceeded: the library says nothing, unless the alert for it is on.
- What is encrypted can't be looked into: likewise.
- A member of a zip archive, or of a cabinet, that is larger than the limit is cut off there, and the
  rest is not looked at: no alert. So a part that is as large as the limit counts as too large.
- An archive out of which nothing came, since it is damaged or packed in an uncommon way (7z with bzip2,
  deflate, delta; zip with LZMA, PPMd): no alert. The first is counted, the second has signatures.
  Not seen: a 7z archive with several methods, of which some can be unpacked.
- RAR without its library, and packers that ClamAV does not know: the library
  looks at the bytes outside and goes on. A few signatures of our own find them.
- Parts could not be unpacked, since the scratch directory is full, or what they
  came in is damaged: for mail and installers the return code is CL_CLEAN, and only a
  message on the log says so. So a message of severity "error" in a scan is an error of that scan.

Hazards of the scratch directory, all three seen with ClamAV 1.4.6:

- Workers that share one share its temporary names as well, and get wrong verdicts. Each needs its own.
- Cabinets, CHM, TNEF and mail that could not be unpacked for want of room are CL_CLEAN without any
  message. So its size is no option but follows from the limits, as the most that one scan can fill,
  and each scan begins with an empty one.
- So are packed executables when no file can be made: it must not limit the number of files.
"""

from __future__ import annotations

import binascii
import ctypes
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdbroker.scan.engine import MEBIBYTE, EngineError, Inside, Needs, shown
from fdbroker.scan.engines.containers import MAGIC
from fdbroker.scan.engines.scratch import Scratch
from fdbroker.scan.options import Bytes, Seconds
from fdbroker.scan.verdict import Clean, Error, Reason, Verdict, found

if TYPE_CHECKING:
    from collections.abc import Sequence

# From clamav.h of ClamAV 1.4 (libclamav.so.12). Return codes:
_CL_CLEAN = 0
_CL_VIRUS = 1
_REASONS = {
    7: Reason.UNSCANNABLE_CONTAINER,  # CL_EUNPACK
    8: Reason.SCRATCH_FULL,  # CL_EOPEN
    9: Reason.SCRATCH_FULL,  # CL_ECREAT
    10: Reason.SCRATCH_FULL,  # CL_EUNLINK
    11: Reason.READ_FAILED,  # CL_ESTAT
    12: Reason.READ_FAILED,  # CL_EREAD
    13: Reason.READ_FAILED,  # CL_ESEEK
    14: Reason.SCRATCH_FULL,  # CL_EWRITE
    17: Reason.SCRATCH_FULL,  # CL_ETMPFILE
    18: Reason.SCRATCH_FULL,  # CL_ETMPDIR
    19: Reason.READ_FAILED,  # CL_EMAP
    20: Reason.MEMORY,  # CL_EMEM
    21: Reason.TIMED_OUT,  # CL_ETIMEOUT
    23: Reason.LIMIT_EXCEEDED,  # CL_EMAXREC
    24: Reason.LIMIT_EXCEEDED,  # CL_EMAXSIZE
    25: Reason.LIMIT_EXCEEDED,  # CL_EMAXFILES
    26: Reason.UNSCANNABLE_CONTAINER,  # CL_EFORMAT
    27: Reason.UNSCANNABLE_CONTAINER,  # CL_EPARSE
}
# Engine fields.
_MAX_SCANSIZE, _MAX_FILESIZE, _MAX_RECURSION, _MAX_FILES = 0, 1, 2, 3
_DB_VERSION, _DB_TIME, _TMPDIR, _DISABLE_CACHE, _MAX_SCANTIME = 8, 9, 13, 25, 31
# Loading: phishing, phishing URLs, signed bytecode.
_DB_OPTIONS = 0x2 | 0x8 | 0x2000
_DB_PUA = 0x10
# Scanning: all that matches, heuristics; every parser; alerts for limits, and for what is encrypted.
_GENERAL = 0x1 | 0x4
_PARSE_ALL = 0xFFFFFFFF
_ALERT_EXCEEDS_MAX = 0x4
_ALERT_ENCRYPTED = 0x40 | 0x80
_MESSAGE_ERROR = 128

_LIMITS = "Heuristics.Limits.Exceeded"
_ENCRYPTED = "Heuristics.Encrypted"
_OURS = "Fdbroker.Unscannable."

# What ClamAV can't look into: kind -> lines of an .ndb with the target type, the offset and the bytes.
_KINDS = {
    "encrypted": ["2:*:" + "EncryptedPackage".encode("utf-16-le").hex()],
    **{kind: [f"0:{offset}:{magic.hex()}"] for kind, (offset, magic) in MAGIC.items()},
}
# Members of a zip archive whose method ClamAV passes over: shrunk, reduced, LZMA, Zstandard, XZ, PPMd, ...
_KINDS["zip-method"] = ["0:*:504b0304????????(01|02|03|04|05|07|0a|0e|10|12|13|14|5d|5e|5f|60|61|62)00"]
# Of RAR also what unpacks itself: an executable with an archive behind it.
_KINDS["rar"] += [
    f"{target}:*:{archive}"
    for target in (1, 6)
    for archive in ("526172211a0700????73", "526172211a070100??????????01")
]
# Out of these something comes, or they are damaged, empty, or packed as ClamAV can't unpack (7z with bzip2).
_MUST_HAVE_PARTS = frozenset(
    b"CL_TYPE_" + kind for kind in (b"7Z", b"ARJ", b"BZ", b"GZ", b"MSCAB", b"MSCHM", b"XZ", b"ZIP")
)
_NOTHING_FOUND = Clean()
_DAMAGED = "damaged"
# What the option `accept` may name.
KINDS = (*_KINDS, _DAMAGED)

# Charsets that libclamav converts from by iconv(3), whose modules glibc opens at first use. HTML and mail
# may name others: those conversions fail in the worker, and the text is matched as it is.
_CHARSETS = (
    *("UTF-16", "UTF-16BE", "UTF-16LE", "UTF-32", "UTF-7", "UNICODE", "UCS-2", "UCS-4", "KOI8-R", "KOI8-U"),
    *(f"ISO-8859-{part}" for part in (*range(1, 12), *range(13, 17))),
    *(f"CP{page}" for page in (437, 850, 852, 866, 874, 932, 936, 949, 950, *range(1250, 1259))),
    *("SHIFT_JIS", "EUC-JP", "ISO-2022-JP", "GB2312", "GBK", "GB18030", "BIG5", "EUC-KR", "ISO-2022-KR"),
)


@dataclass(frozen=True)
class LibClamAVOptions:
    """Where the database is, and how far a scan goes.

    `database`: a directory, or one file, in the formats of ClamAV. `library`: as dlopen(3) finds it.
    `max_file_size`: of the file, and of each part that is unpacked from it. `max_scan_size`: of all that is
    looked at for one file. `max_recursion`: containers in containers. `max_files`: parts of a file.
    `max_scan_time`: for one file. Over one of these the verdict is an error. `accept`: kinds that may be
    clean though nobody could look into them: `encrypted`, `damaged`, `rar` (without its library), `zstd`, ...
    `possibly_unwanted`: load those signatures too.
    """

    database: bytes = b"/var/lib/clamav"
    library: str = "libclamav.so.12"
    max_file_size: Bytes = 100 * MEBIBYTE
    max_scan_size: Bytes = 400 * MEBIBYTE
    max_recursion: int = 17
    max_files: int = 10_000
    max_scan_time: Seconds = 60.0
    accept: tuple[str, ...] = ()
    possibly_unwanted: bool = False

    def __post_init__(self) -> None:
        """Refuse limits that are none to the library (0), or more than it can count."""
        for name in ("max_file_size", "max_scan_size", "max_recursion", "max_files", "max_scan_time"):
            if not getattr(self, name):
                raise ValueError(f"{name}: 0 would be no limit; leave it out for the default")
        if self.max_file_size >= 2 * 1024 * MEBIBYTE:
            raise ValueError("max_file_size: libclamav looks at no file of 2 GiB or more")
        if self.max_recursion > 100:  # noqa: PLR2004 - what libclamav takes
            raise ValueError("max_recursion: libclamav takes 100 at most")
        if self.max_scan_time > 86400:  # noqa: PLR2004 - a day; the library counts milliseconds in 32 bits
            raise ValueError("max_scan_time: at most 24h")
        for kind in self.accept:
            if kind not in KINDS:
                raise ValueError(f"accept: {kind!a} is none of: {', '.join(KINDS)}")


class _ScanOptions(ctypes.Structure):
    """struct cl_scan_options."""

    _fields_ = (
        ("general", ctypes.c_uint32),
        ("parse", ctypes.c_uint32),
        ("heuristic", ctypes.c_uint32),
        ("mail", ctypes.c_uint32),
        ("dev", ctypes.c_uint32),
    )


_OnMessage = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_OnFound = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# clcb_file_inspection. Names stay pointers: those of 7z members are not always valid.
_OnPart = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p),
)


class LibClamAV(Inside):
    """Scans with ClamAV's library, in the worker."""

    name = "libclamav"
    options_type = LibClamAVOptions
    options: LibClamAVOptions

    def __init__(self, options: LibClamAVOptions) -> None:
        super().__init__(options)
        self._library: Any = None
        self._engine: ctypes.c_void_p | None = None
        self._signatures = 0
        self._scratch: Scratch | None = None
        self._messages: list[bytes] = []
        self._names: list[bytes] = []
        # Of the file, and of the parts that are within each other now: the kind, and how many parts came out.
        self._kinds: list[bytes | None] = []
        self._parts: list[int] = []
        self._without_parts: bytes | None = None
        self._cut_off = False
        heuristic = _ALERT_EXCEEDS_MAX | (0 if "encrypted" in options.accept else _ALERT_ENCRYPTED)
        self._scan_options = _ScanOptions(_GENERAL, _PARSE_ALL, heuristic, 0, 0)
        self._options_pointer = ctypes.byref(self._scan_options)
        self._name = ctypes.c_char_p()
        self._name_pointer = ctypes.byref(self._name)
        self._scan_descriptor: Any = None
        # The library keeps pointers to these.
        self._on_message = _OnMessage(self._take_message)
        self._on_found = _OnFound(self._take_name)
        self._on_part = _OnPart(self._take_part)
        self._converters: list[int] = []

    def needs(self) -> Needs:
        """Return the memory for what is unpacked, and a scratch directory that one file can't fill.

        What was unpacked and not yet looked at is one part, or the parts of one document or mail; what is
        being looked at counts for max_scan_size.
        """
        options = self.options
        return Needs(
            "scratch",
            memory=2 * options.max_file_size + 256 * MEBIBYTE,
            scratch_size=2 * options.max_scan_size + 4 * options.max_file_size,
            descriptors=16 + 8 * options.max_recursion,
        )

    def databases(self) -> Sequence[bytes]:
        """Return the directory, or file, of the database."""
        return (self.options.database,)

    def warm(self) -> None:
        """Load library and database, and scan one container of each kind.

        Raises:
            EngineError: either can't be loaded, or there is no signature in the database.

        """
        import tempfile  # noqa: PLC0415 - for the warm-up only; who configures the engine has no use for it

        self._library = _load_library(self.options.library)
        self._scan_descriptor = _scan_function(self.options.library)
        self._library.cl_set_clcb_msg(self._on_message)
        self._check("cl_init", self._library.cl_init(0))
        engine = self._library.cl_engine_new()
        if not engine:
            raise EngineError("libclamav: cl_engine_new: no memory")
        self._engine = ctypes.c_void_p(engine)
        self._set_limits()
        self._signatures = self._load(self.options.database)
        if not self._signatures:
            where = shown(self.options.database)
            raise EngineError(f"libclamav: no signature in {where}; has freshclam run? (option database)")
        with tempfile.TemporaryDirectory(prefix="fdbroker-libclamav-") as directory:
            own = os.path.join(os.fsencode(directory), b"fdbroker.ndb")
            with open(own, "wb") as file:
                file.write(self._own_signatures())
            self._load(own)
            self._library.cl_engine_set_clcb_virus_found(self._engine, self._on_found)
            self._library.cl_engine_set_clcb_file_inspection(self._engine, self._on_part)
            self._check("cl_engine_compile", self._library.cl_engine_compile(self._engine))
            self._open_converters()
            scratch = os.path.join(os.fsencode(directory), b"scratch")
            os.mkdir(scratch)
            self._scan_samples(os.fsencode(directory), scratch)
        self._scratch = None

    def version(self) -> str:
        """Return as clamd does, `ClamAV 1.4.6/27800/Wed Oct 22 08:00:00 2025`, and the number of signatures.

        The version of the database is that of daily.cvd; without one it is 0.
        """
        if self._engine is None:
            raise EngineError("libclamav: not loaded")
        release = self._library.cl_retver().decode("ascii", "replace")
        database = self._library.cl_engine_get_num(self._engine, _DB_VERSION, None)
        made = self._library.cl_engine_get_num(self._engine, _DB_TIME, None)
        return f"ClamAV {release}/{database}/{_date(made)}, {self._signatures} signatures"

    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:
        """Scan, and take as clean what the library says of it and no message contradicts."""
        if self._engine is None:
            return Error(Reason.NOT_LOADED, "libclamav: not loaded")
        if size > self.options.max_file_size:
            return Error(Reason.TOO_LARGE, f"{size} bytes are more than max_file_size")
        if scratch is None:
            return Error(Reason.NOT_LOADED, "libclamav: it needs a scratch directory, profile `scratch`")
        if self._scratch is None or scratch != self._scratch.path:
            self._check("TMPDIR", self._library.cl_engine_set_str(self._engine, _TMPDIR, scratch))
            self._scratch = Scratch(scratch)
        self._messages.clear()
        self._names.clear()
        self._kinds.clear()
        self._parts.clear()
        self._without_parts, self._cut_off = None, False
        self._name.value = None
        status = self._scan_descriptor(
            descriptor, None, self._name_pointer, None, self._engine, self._options_pointer, None
        )
        self._close_layers(0)
        self._take_name(descriptor, self._last_name(), None)
        verdict: Verdict = _NOTHING_FOUND
        # The short way for nearly all files: the library says clean, and there is nothing else to look at.
        if status or self._names or self._messages or self._cut_off or self._without_parts:
            verdict = self._verdict(status, _texts(self._names), _texts(self._messages))
        self._scratch.clear()
        return verdict

    def _verdict(self, status: int, names: list[str], messages: list[str]) -> Verdict:
        real = [name for name in names if not name.startswith((_LIMITS, _ENCRYPTED, _OURS))]
        if real:
            return found(real)
        for name in names:
            if name.startswith(_LIMITS):
                return Error(Reason.LIMIT_EXCEEDED, f"libclamav: {name.rpartition('.')[2]}")
            if name.startswith(_ENCRYPTED):
                return Error(Reason.UNSCANNABLE_ENCRYPTED, f"libclamav: {name.rpartition('.')[2]}, encrypted")
            kind = name.removeprefix(_OURS).partition(".")[0]
            if kind == "encrypted":
                return Error(Reason.UNSCANNABLE_ENCRYPTED, "libclamav: a document, encrypted")
            return Error(Reason.UNSCANNABLE_CONTAINER, f"libclamav: it can't look into {kind}")
        if self._cut_off:
            return Error(Reason.LIMIT_EXCEEDED, "libclamav: MaxFileSize, of a part")
        if status not in {_CL_CLEAN, _CL_VIRUS}:
            text = self._library.cl_strerror(status).decode("ascii", "replace")
            return Error(_REASONS.get(status, Reason.ENGINE_FAILED), f"libclamav: {text}")
        if status == _CL_VIRUS:
            return Error(Reason.UNKNOWN_ANSWER, "libclamav found something and gave no name")
        for message in messages:
            for pattern, reason in _MESSAGES:
                if pattern.search(message):
                    return Error(reason, f"libclamav: {message}")
            if _DAMAGED not in self.options.accept:
                return Error(Reason.UNSCANNABLE_CONTAINER, f"libclamav: damaged: {message}")
        if self._without_parts is not None and _DAMAGED not in self.options.accept:
            kind = self._without_parts.removeprefix(b"CL_TYPE_").decode("ascii", "replace")
            text = f"libclamav: damaged, or packed as it can't unpack: nothing came out of {kind}"
            return Error(Reason.UNSCANNABLE_CONTAINER, text)
        return _NOTHING_FOUND

    def _last_name(self) -> bytes | None:
        return self._name.value

    def _take_message(self, severity: int, _full: bytes, message: bytes | None, _context: object) -> None:
        if severity >= _MESSAGE_ERROR and len(self._messages) < _MOST_MESSAGES:
            self._messages.append(message or b"an error without a text")

    def _take_name(self, _descriptor: int, name: bytes | None, _context: object) -> None:
        # One pattern may be in a file a million times.
        if name and name not in self._names and len(self._names) < _MOST_NAMES:
            self._names.append(name)

    def _take_part(
        self,
        _descriptor: int,
        kind: bytes | None,
        _ancestors: int | None,
        _size_of_parent: int,
        _name: int | None,
        size: int,
        _contents: int | None,
        depth: int,
        _attributes: int,
        _context: int | None,
    ) -> int:
        """Be told of the file (depth 0), and of each part of it, before it is scanned."""
        parts = self._parts
        if parts:
            self._close_layers(depth)
        if parts:
            parts[-1] += 1
            self._cut_off = self._cut_off or size >= self.options.max_file_size
        self._kinds.append(kind)
        parts.append(0)
        return _CL_CLEAN

    def _close_layers(self, depth: int) -> None:
        kinds, parts = self._kinds, self._parts
        while len(parts) > depth:
            kind = kinds.pop()
            if not parts.pop() and kind in _MUST_HAVE_PARTS:
                self._without_parts = kind

    def _set_limits(self) -> None:
        options = self.options
        for field, value in (
            (_MAX_SCANSIZE, options.max_scan_size),
            (_MAX_FILESIZE, options.max_file_size),
            (_MAX_RECURSION, options.max_recursion),
            (_MAX_FILES, options.max_files),
            (_MAX_SCANTIME, max(1, int(options.max_scan_time * 1000))),
            # Its cache of clean files is for one process, and a verdict is to be of this file.
            (_DISABLE_CACHE, 1),
        ):
            self._check("a limit", self._library.cl_engine_set_num(self._engine, field, value))

    def _load(self, path: bytes) -> int:
        try:
            os.stat(path)
        except OSError as error:
            cure = "freshclam gets one; the option database says where it is"
            raise EngineError(f"libclamav: the database {shown(path)}: {error.strerror}; {cure}") from error
        count = ctypes.c_uint(0)
        self._messages.clear()
        options = _DB_OPTIONS | (_DB_PUA if self.options.possibly_unwanted else 0)
        status = self._library.cl_load(path, self._engine, ctypes.byref(count), options)
        self._check(f"the database {shown(path)}", status, "; has freshclam run? (option database)")
        return count.value

    def _own_signatures(self) -> bytes:
        accepted = set(self.options.accept)
        if _has_unrar():
            accepted.add("rar")
        lines = [
            f"{_OURS}{kind}:{signature}\n"
            for kind, signatures in _KINDS.items()
            if kind not in accepted
            for signature in signatures
        ]
        return "".join(lines).encode("ascii")

    def _check(self, what: str, status: int, cure: str = "") -> None:
        if status:
            text = self._library.cl_strerror(status).decode("ascii", "replace")
            said = "".join(f"; {one.decode('utf-8', 'replace').strip()}" for one in self._messages[:3])
            raise EngineError(f"libclamav: {what}: {text}{said}{cure}")

    def _open_converters(self) -> None:
        """Have glibc open its modules, which stay open as long as one converter of each is."""
        libc = ctypes.CDLL(None)
        libc.iconv_open.restype = ctypes.c_void_p
        libc.iconv_open.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
        for charset in _CHARSETS:
            for target in (b"UTF-8", b"UTF-8//TRANSLIT", b"UTF-16BE"):
                converter = libc.iconv_open(target, charset.encode("ascii"))
                if converter not in {None, ctypes.c_void_p(-1).value}:
                    self._converters.append(converter)

    def _scan_samples(self, directory: bytes, scratch: bytes) -> None:
        """Scan what makes the library use, for the first time, whatever it loads lazily."""
        for number, sample in enumerate(_samples()):
            path = os.path.join(directory, b"sample%d" % number)
            with open(path, "w+b") as file:
                file.write(sample)
                file.flush()
                self.scan(file.fileno(), len(sample), scratch)


_MOST_MESSAGES = 8
_MOST_NAMES = 64
_NO_ROOM = "No space left|[Cc]an't (write|create)|write error|only wrote|[Tt]emporary|[Tt]empfile|mkdir"
_MESSAGES = (
    (re.compile(_NO_ROOM), Reason.SCRATCH_FULL),
    (re.compile("[Mm]emory|alloc"), Reason.MEMORY),
    (re.compile("[Cc]an't (read|seek|stat|mmap)|read error"), Reason.READ_FAILED),
)


def _load_library(name: str) -> Any:  # noqa: ANN401 - a library has no type
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise EngineError(f"libclamav: {error}; on Debian: apt-get install libclamav12") from error
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    library.cl_init.argtypes = (ctypes.c_uint,)
    library.cl_engine_new.restype = pointer
    library.cl_retver.restype = library.cl_strerror.restype = text
    library.cl_strerror.argtypes = (number,)
    library.cl_set_clcb_msg.argtypes = (_OnMessage,)
    library.cl_set_clcb_msg.restype = None
    library.cl_engine_set_clcb_virus_found.argtypes = (pointer, _OnFound)
    library.cl_engine_set_clcb_virus_found.restype = None
    library.cl_engine_set_clcb_file_inspection.argtypes = (pointer, _OnPart)
    library.cl_engine_set_clcb_file_inspection.restype = None
    library.cl_engine_compile.argtypes = (pointer,)
    library.cl_engine_set_num.argtypes = (pointer, number, ctypes.c_longlong)
    library.cl_engine_get_num.argtypes = (pointer, number, pointer)
    library.cl_engine_get_num.restype = ctypes.c_longlong
    library.cl_engine_set_str.argtypes = (pointer, number, text)
    library.cl_load.argtypes = (text, pointer, pointer, ctypes.c_uint)
    return library


def _scan_function(name: str) -> Any:  # noqa: ANN401 - as of the library
    """Return cl_scandesc_callback of a library that is loaded, as it costs least to call it for each file.

    The lock of the interpreter stays held, as there is no other thread: otherwise each callback would take
    it. Arguments go as what they are (a descriptor, None, things of ctypes), without a look at their types.
    """
    return ctypes.PyDLL(name).cl_scandesc_callback


def _has_unrar() -> bool:
    """Return whether the library has found its plug-in for RAR, which Debian has in non-free."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return b"libclamunrar" in file.read()
    except OSError:
        return False


def _texts(said: Sequence[bytes]) -> list[str]:
    return [one.decode("utf-8", "replace") for one in said]


def _date(seconds: int) -> str:
    import datetime as dt  # noqa: PLC0415 - for the version only

    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%a %b %e %H:%M:%S %Y") if seconds else "local"


_TEXT = b"<html><head><meta charset='windows-1251'></head><body>text</body></html>"
# That text in containers: to make them here would take longer than to scan them.
_CONTAINERS = {
    "zip": (
        "UEsDBBQAAAAIAAAAIQAS7sS/PwAAAEgAAAALAAAAc2FtcGxlLmh0bWyzySjJzbGzyUhNTLGzyU0tSVRIzkgsKk4tsVUvz8xL"
        "yS8v1jU0MjVUt7PRh6hJyk+ptCtJrSix0QczgeIgEwBQSwECFAMUAAAACAAAACEAEu7Evz8AAABIAAAACwAAAAAAAAAAAAAA"
        "gAEAAAAAc2FtcGxlLmh0bWxQSwUGAAAAAAEAAQA5AAAAaAAAAAAA"
    ),
    "tar.gz": (
        "H4sIAAAAAAACA+3NQQ6CMBCF4R6FHSuFGpBN7V2qNMGEiqFjwNtbYWHiXjb+3+ZNXiYz0YV77/cyi/qZMjlW1ZLJd5Zaf+a1"
        "b5q6UVmpNvCI4sb0Uv0n00norem8a60JXlx26dwYvZzy6Xprhynu9KHWuTXFunMe2qcVP4spljH17wsKAAAAAAAAAAAAAAAA"
        "ALCpF6ptxXUAKAAA"
    ),
    "gz": (
        "H4sIAAAAAAACA7PJKMnNsbPJSE1MsbPJTS1JVEjOSCwqTi2xVS/PzEvJLy/WNTQyNVS3s9GHqEnKT6m0K0mtKLHRBzOB4iAT"
        "ABLuxL9IAAAA"
    ),
    "bz2": (
        "QlpoOTFBWSZTWenQOp0AAAgZgECCsgc+Z5zgIABURAAA0NADU1D1NH6oG0mZQFdXMjopjcSTb6lgmGVR23DMHgZisFyQnqjF"
        "RzgWm3vhAqgQqeHxdyRThQkOnQOp0A=="
    ),
    "xz": (
        "/Td6WFoAAATm1rRGAgAhARYAAAB0L+Wj4ABHAEBdAB4aCobvStlaiOTcnkCyk/8EcQTVd44J6r4oE+ScC/gWKtaBH0cx3Ynk"
        "A0q1Zy5j0L1nS4PqJyq8n5t5LgeEYAAAYhYCSfPALY8AAVxI0W6PTh+2830BAAAAAARZWg=="
    ),
}


def _samples() -> list[bytes]:
    mail = (
        b"From: a@example.org\r\nTo: b@example.org\r\nSubject: =?koi8-r?B?8NLJ18XU?=\r\nMIME-Version: 1.0\r\n"
        b"Date: Thu, 01 Jan 2026 00:00:00 +0000\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
        b"Content-Type: application/octet-stream; name=a.bin\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        b"dGV4dA==\r\n--b--\r\n"
    )
    pdf = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%%EOF\n"
    )
    png = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301"
        "0100c9fe92ef0000000049454e44ae426082"
    )
    return [
        b"text",
        _TEXT,
        _TEXT.decode("ascii").encode("utf-16"),
        *map(binascii.a2b_base64, _CONTAINERS.values()),
        mail,
        pdf,
        png,
        b"\x7fELF\x02\x01\x01" + bytes(57),
        b"MZ" + bytes(62),
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504),
        b"{\\rtf1 text}",
    ]
