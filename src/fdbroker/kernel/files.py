"""Opening below a held directory, looking at what was opened, and nothing else.

The order that is safe against every change of names: `open_path_beneath`
(O_PATH: a FIFO's writer is not woken, a device is not touched, a lease is not
broken), then look at the object with `os.fstat`, then `reopen_for_reading` the
same object through its descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import struct
import sys
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.errors import SyscallError, renamed
from fdbroker.kernel.libc import LIBC, SYS_GETDENTS64, SYS_OPENAT2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# From linux/openat2.h, Linux 5.6.
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_RETRIES = 8  # openat2 answers EAGAIN when the tree moved under it; bounded, or an attacker could hold us


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


# O_NOFOLLOW with O_PATH: a symbolic link as last component is opened itself,
# so that it can be described; one in the middle is ELOOP.
_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_how_within = _OpenHow(_FLAGS, 0, _BENEATH | RESOLVE_NO_XDEV)
_how_across = _OpenHow(_FLAGS, 0, _BENEATH)
# The hot path: arguments that never change are made once, and a prototype
# would convert the others more slowly than ctypes does by itself.
_WITHIN = ctypes.byref(_how_within)
_ACROSS = ctypes.byref(_how_across)
_NUMBER = ctypes.c_long(SYS_OPENAT2)
_HOW_SIZE = ctypes.c_size_t(ctypes.sizeof(_OpenHow))
_syscall = LIBC.syscall  # which returns a long


def open_path_beneath(directory: int, path: bytes, cross_mounts: bool = False) -> int:  # noqa: FBT001, FBT002 - hot
    """Open `path` below the held `directory` with O_PATH and return the descriptor.

    Forced: nothing above the directory, no magic links, no symbolic links on
    the way (one at the end is opened itself), no other mounts unless
    `cross_mounts`. openat2(2), Linux 5.6. The caller owns the descriptor.

    Raises:
        SyscallError: ENOENT, ENOTDIR, ELOOP, EXDEV, ENAMETOOLONG, EAGAIN (the
            tree kept moving), EINVAL (a NUL in the path), ENOSYS (an older
            kernel, or a filter such as RestrictSUIDSGID= of systemd).

    """
    # ctypes would cut the path at a NUL and open another file. (To look for b"\0" instead costs an exception,
    # by which Python finds out that this is no number.)
    if 0 in path:
        raise SyscallError(errno.EINVAL, "openat2", directory=directory, path=path)
    how = _ACROSS if cross_mounts else _WITHIN
    descriptor: int = _syscall(_NUMBER, directory, path, how, _HOW_SIZE)
    if descriptor >= 0:
        return descriptor
    number = ctypes.get_errno()
    for _ in range(_RETRIES):
        if number not in {errno.EAGAIN, errno.EINTR}:
            break
        descriptor = _syscall(_NUMBER, directory, path, how, _HOW_SIZE)
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
    raise SyscallError(
        number,
        "openat2",
        directory=directory,
        path=path,
        flags="O_PATH|O_NOFOLLOW|O_CLOEXEC",
        resolve=hex(_how_across.resolve if cross_mounts else _how_within.resolve),
    )


def open_proc_self_fd() -> int:
    """Open /proc/self/fd of this process to be held; the caller owns the descriptor.

    It speaks of the process that opened it, so open it after the last fork.
    """
    try:
        return os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise renamed(error, "open", path="/proc/self/fd", flags="O_PATH|O_DIRECTORY") from None


# For the plain case below: the same calls without their errno, and without letting go of the interpreter
# meanwhile, which costs as much as the look-up itself; nobody else waits for it in a process of one
# thread. Whoever gets -1 asks again, by a way that says why.
_AT_ONCE = ctypes.PyDLL(None)
_openat2_at_once = _AT_ONCE.syscall
_openat2_at_once.restype = ctypes.c_long
_statx_at_once = _AT_ONCE.statx
_OPENAT2 = ctypes.c_long.from_param(SYS_OPENAT2)
_SIZE = ctypes.c_size_t.from_param(ctypes.sizeof(_OpenHow))


class _Statx(ctypes.Structure):
    """struct statx, of which only the kind of file is asked; statx(2), Linux 4.11."""

    _fields_ = (("before", ctypes.c_uint8 * 28), ("mode", ctypes.c_uint16), ("behind", ctypes.c_uint8 * 226))


# os.fstat makes an object of 19 numbers, of which one is wanted.
_statx_room = _Statx()
_STATX_ROOM = ctypes.byref(_statx_room)
_NO_PATH = ctypes.c_char_p.from_param(b"")
_AT_EMPTY_PATH = ctypes.c_int.from_param(0x1000)
_STATX_TYPE = ctypes.c_uint.from_param(1)
_KIND, _REGULAR = 0o170000, 0o100000  # S_IFMT, S_IFREG
_READ_AT_ONCE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_READ_WORDS = "O_RDONLY|O_NONBLOCK|O_NOCTTY|O_CLOEXEC"


def open_regular_beneath(directory: int, path: bytes, proc_self_fd: int) -> int | None:
    """Open the regular file `path` below the held `directory` for reading, None if it is something else.

    The safe order in one call, for whom nothing more of the object interests
    than what it is: `open_path_beneath` within one mount, look, then what
    `reopen_for_reading` does. What is no regular file was opened by O_PATH
    alone, and is closed again. The caller owns what is returned.

    Raises:
        SyscallError: as those two.

    """
    # Written out: this is what a broker does all day, and calls of functions would be a tenth of it.
    held: int = -1 if 0 in path else _openat2_at_once(_OPENAT2, directory, path, _WITHIN, _SIZE)
    if held < 0:
        held = open_path_beneath(directory, path)  # for its retries and its error
    try:
        if _statx_at_once(held, _NO_PATH, _AT_EMPTY_PATH, _STATX_TYPE, _STATX_ROOM) != 0:
            os.fstat(held)  # for its error
            return None
        if _statx_room.mode & _KIND != _REGULAR:
            return None
        opened = os.open(str(held), _READ_AT_ONCE, dir_fd=proc_self_fd)
    except OSError as error:
        raise renamed(error, "openat", directory=proc_self_fd, path=held, flags=_READ_WORDS) from None
    finally:
        os.close(held)
    try:
        os.set_blocking(opened, True)
    except BaseException:
        os.close(opened)
        raise
    return opened


_openat_at_once = _AT_ONCE.openat


class _Names(dict[int, bytes]):
    """Names of descriptors in /proc/self/fd, which are made but for those that are there."""

    def __missing__(self, descriptor: int) -> bytes:
        """Make it."""
        return b"%d" % descriptor


# Those that are used all day.
_NAMES = _Names((number, b"%d" % number) for number in range(1024))
_READ_FLAGS = ctypes.c_int.from_param(_READ_AT_ONCE)
_STATX_BASIC_STATS = ctypes.c_uint.from_param(0x7FF)
_SECOND = 1_000_000_000
_ANY_SIZE, _ANY_TIME = (1 << 63) - 1, -(1 << 63)
MOST_ENTRIES = 256  # that are opened in a row
# A struct statx for each of them, and what is read of all: the bytes of `stat_record`; the upper byte of
# each mode; and, for filters, mode, size, and mtime in seconds and nanoseconds.
_STATX_SIZE = ctypes.sizeof(_Statx)
_row_room = ctypes.create_string_buffer(MOST_ENTRIES * _STATX_SIZE)
_ROW = [ctypes.byref(_row_room, place * _STATX_SIZE) for place in range(MOST_ENTRIES)]
_row_bytes = memoryview(_row_room).cast("B")
_RECORDS = struct.Struct("=16x32s48x48s112x")
_UPPER_MODE = slice(29 if sys.byteorder == "little" else 28, None, _STATX_SIZE)
_UPPER_OF_REGULAR = bytes(range(_REGULAR >> 8, (_REGULAR >> 8) + 16))
_FILTERED = struct.Struct("=28xH10xQ64xqI132x")

# The room of one, to cut bytes out of.
_statx_bytes = (ctypes.c_char * _STATX_SIZE).from_buffer(_statx_room)


def open_regular_entries(
    directory: int,
    names: Sequence[bytes],
    proc_self_fd: int,
    least_size: int,
    most_size: int,
    newer_than: int,
    *,
    given_away: bool = True,
) -> tuple[list[int], list[bytes | OSError]]:
    """Open names in the held `directory` for reading; return descriptors and what they are, by name.

    As `open_regular_beneath`, for who has many of them to open, up to `MOST_ENTRIES`: all are held by O_PATH,
    then all are looked at, then reopened, so that those that were held stand in a row and are closed by one
    call. What they are is as `stat_record` says it, or an error of `open_path_beneath` or
    `reopen_for_reading`. -1 in place of a descriptor: an error, no regular file, not from `least_size` to
    `most_size` bytes, or not modified later than `newer_than`, in nanoseconds since 1970 (-2^63: any time).
    `given_away`: O_NONBLOCK, which a receiver would see, is taken from them. The caller owns the descriptors.

    Raises:
        ValueError: more names than that.

    """
    # One call for all names before the next one, by map(): a loop of Python costs as much as what it calls.
    count = len(names)
    if count > MOST_ENTRIES:
        raise ValueError(f"{count} names: at most {MOST_ENTRIES} are opened in a row")
    held: list[int] = []
    opened: list[int] = []
    errors: dict[int, OSError] = {}  # by place
    set_blocking = os.set_blocking
    try:
        # ctypes would cut a name at a NUL; by an empty one nothing is found.
        asked = [b"" if 0 in name else name for name in names] if 0 in b"".join(names) else names
        # What list.extend() was given before an error it keeps, so that it is closed.
        held.extend(
            map(_openat2_at_once, repeat(_OPENAT2), repeat(directory), asked, repeat(_WITHIN), repeat(_SIZE))
        )
        for place in _failed(held):
            try:
                held[place] = open_path_beneath(directory, names[place])  # for its retries and its error
            except OSError as error:
                errors[place] = error
        asks = repeat(_NO_PATH), repeat(_AT_EMPTY_PATH), repeat(_STATX_BASIC_STATS)
        looked = list(map(_statx_at_once, held, *asks, _ROW))
        for place in _failed(looked):
            errors.setdefault(place, _error_of_statx(held[place]))
        facts = _row_bytes[: count * _STATX_SIZE]
        found: list[bytes | OSError] = [before + behind for before, behind in _RECORDS.iter_unpack(facts)]
        left_out = {*errors, *_unwanted(facts, least_size, most_size, newer_than)}
        paths: Iterable[bytes] = map(_NAMES.__getitem__, held)
        if left_out:
            paths = [b"" if place in left_out else path for place, path in enumerate(paths)]
        opened.extend(map(_openat_at_once, repeat(proc_self_fd), paths, repeat(_READ_FLAGS)))
        for place in _failed(opened):
            if place not in left_out:
                try:
                    opened[place] = reopen_for_reading(proc_self_fd, held[place])  # for its error
                except OSError as error:
                    errors[place] = error
        if given_away:
            for descriptor in opened:
                if descriptor >= 0:
                    set_blocking(descriptor, True)
        for place, why in errors.items():
            found[place] = why
    except BaseException:
        close_all([descriptor for descriptor in opened if descriptor >= 0])
        raise
    finally:
        close_all([descriptor for descriptor in held if descriptor >= 0] if -1 in held else held)
    return opened, found


def _failed(returned: list[int]) -> Sequence[int]:
    """Return the places of calls that returned -1."""
    return [place for place, number in enumerate(returned) if number < 0] if -1 in returned else ()


def _unwanted(facts: memoryview, least_size: int, most_size: int, newer_than: int) -> Sequence[int]:
    """Return the places in a row of struct statx that are no regular file, or not in these bounds."""
    if (
        least_size <= 0
        and most_size >= _ANY_SIZE
        and newer_than <= _ANY_TIME
        and not facts[_UPPER_MODE].tobytes().translate(None, _UPPER_OF_REGULAR)
    ):
        return ()
    oldest = divmod(newer_than, _SECOND) if newer_than > _ANY_TIME else (-math.inf, 0)
    return [
        place
        for place, (mode, size, seconds, rest) in enumerate(_FILTERED.iter_unpack(facts))
        if mode & _KIND != _REGULAR or not least_size <= size <= most_size or (seconds, rest) <= oldest
    ]


def _error_of_statx(descriptor: int) -> OSError:
    """Return why statx(2) failed, which was asked without its errno."""
    try:
        os.fstat(descriptor)
    except OSError as error:
        return error
    return SyscallError(errno.EIO, "statx", descriptor=descriptor)


def stat_record(descriptor: int) -> bytes:
    """Return what is behind a descriptor, O_PATH or not, as the messages have it: 80 bytes.

    They are the kernel's, in its order: of struct statx bytes 16 to 47 (links, uid, gid, mode, inode, size)
    and 96 to 143 (ctime, mtime, two numbers of devices). statx(2), Linux 4.11. Two records of a file
    that was not touched in between are equal in `UNTOUCHED`.

    Raises:
        OSError: as `os.fstat`.

    """
    if _statx_at_once(descriptor, _NO_PATH, _AT_EMPTY_PATH, _STATX_BASIC_STATS, _STATX_ROOM) != 0:
        raise _error_of_statx(descriptor)
    return _statx_bytes[16:48] + _statx_bytes[96:144]  # type: ignore[return-value] # as above


UNTOUCHED = slice(24, 64)  # size, ctime and mtime in a record


def reopen_for_reading(proc_self_fd: int, descriptor: int) -> int:
    """Open the object behind an O_PATH descriptor for reading; a new open file description.

    O_NONBLOCK while opening, so that a lease held by somebody is EAGAIN at once
    and not 45 seconds; cleared afterwards, since the receiver would see it.
    Call it on regular files and directories only: what kind it is was seen on
    the same descriptor and can't change. The caller owns what is returned.

    Raises:
        SyscallError: EAGAIN (a lease), EACCES (Landlock), ENFILE, EMFILE, ...

    """
    try:
        opened = os.open(str(descriptor), _READ_AT_ONCE, dir_fd=proc_self_fd)
    except OSError as error:
        raise renamed(error, "openat", directory=proc_self_fd, path=descriptor, flags=_READ_WORDS) from None
    try:
        os.set_blocking(opened, True)
    except BaseException:
        os.close(opened)
        raise
    return opened


def has_lost_its_name(proc_self_fd: int, descriptor: int, path: bytes) -> bool:
    """Return whether the object is no longer at the absolute `path` by which it was found.

    A link count of 1 means one name, but not which: the name that we used may
    have been removed while another one stays. Check the count first, then
    `wait_for_changes_of_names` in its directory, then this. The whole path is
    compared: a name that was moved to another directory may be removed there,
    under that directory's lock.
    """
    try:
        return os.readlink(b"%d" % descriptor, dir_fd=proc_self_fd) != path
    except OSError as error:
        raise renamed(error, "readlinkat", directory=proc_self_fd, path=descriptor) from None


class FilesystemFacts(NamedTuple):
    """Of fstatfs(2): the magic number of the type and the mount's ST_* flags."""

    type: int
    flags: int

    @property
    def read_only(self) -> bool:
        """Whether the mount by which it was opened is read-only."""
        return bool(self.flags & os.ST_RDONLY)


class _Statfs(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_long),
        ("sizes", ctypes.c_long * 7),
        ("name_length", ctypes.c_long),
        ("fragment", ctypes.c_long),
        ("flags", ctypes.c_long),
        ("spare", ctypes.c_long * 4),
    )


def filesystem_of(descriptor: int) -> FilesystemFacts:
    """Return type and mount flags of the file system behind a descriptor, O_PATH or not.

    `os.fstatvfs` has the flags alone; this is both in one call.
    """
    room = _Statfs()
    if LIBC.fstatfs(descriptor, ctypes.byref(room)) != 0:
        raise SyscallError(ctypes.get_errno(), "fstatfs", descriptor=descriptor)
    return FilesystemFacts(room.type & 0xFFFFFFFF, room.flags)


def wait_for_changes_of_names(descriptor: int) -> None:
    """Wait until a change of names that is under way in this open directory is complete.

    Removing a name lowers the link count first and takes the name away later,
    after inotify was served, all under the directory's lock. getdents64(2)
    takes the lock too, so what it does with the entries is of no interest.

    Raises:
        SyscallError: ENOTDIR, ENOENT (the directory was removed).

    """
    if _syscall(_GETDENTS64, descriptor, _chunk_room, _LONGEST_DIRENT) < 0:
        raise SyscallError(ctypes.get_errno(), "getdents64", descriptor=descriptor)


class DirectoryEntry(NamedTuple):
    """One of getdents64(2). `next` is the position behind it, to go on from."""

    name: bytes
    kind: int
    next: int


_DIRECTORY_CHUNK = 32768
_LONGEST_DIRENT = ctypes.c_size_t(280)  # 19 bytes and a name of 255 with its NUL, rounded up
_DIRENT = struct.Struct("=8xqHB")
_DIRENT_NAME = 19
_chunk_room = ctypes.create_string_buffer(_DIRECTORY_CHUNK)
_CHUNK_SIZE = ctypes.c_size_t(_DIRECTORY_CHUNK)
_GETDENTS64 = ctypes.c_long(SYS_GETDENTS64)


def read_directory(descriptor: int) -> list[DirectoryEntry]:
    """Return the next entries of a directory, without `.` and `..`; [] at its end.

    Constant memory, unlike `os.listdir`: at most what fits into 32 KiB. The
    position is the descriptor's; set it with `os.lseek` to a `next` seen before.
    A chunk that held nothing but the dots is skipped over.

    Raises:
        SyscallError: ENOTDIR, ENOENT (the directory was removed), EINVAL.

    """
    while chunk := read_directory_chunk(descriptor):
        entries, _ = parse_directory_chunk(chunk, 0, len(chunk))
        if entries:
            return [DirectoryEntry(*entry) for entry in entries]
    return []


def read_directory_chunk(descriptor: int) -> bytes:
    """Return the next entries as the kernel has them, for `parse_directory_chunk`; b"" at the end.

    Raises:
        SyscallError: as `read_directory`.

    """
    size = _syscall(_GETDENTS64, descriptor, _chunk_room, _CHUNK_SIZE)
    if size < 0:
        raise SyscallError(ctypes.get_errno(), "getdents64", descriptor=descriptor)
    return ctypes.string_at(_chunk_room, size)


def parse_directory_chunk(chunk: bytes, at: int, size: int) -> tuple[list[tuple[bytes, int, int]], int]:
    """Return the entries that begin in `size` bytes of a chunk from `at` on, and where the next one begins.

    The members are those of `DirectoryEntry`, which would cost more to make; `.` and `..` are left out.
    """
    entries: list[tuple[bytes, int, int]] = []
    end, unpack, find, append = min(len(chunk), at + size), _DIRENT.unpack_from, chunk.index, entries.append
    while at < end:
        position, length, kind = unpack(chunk, at)
        start = at + _DIRENT_NAME
        name = chunk[start : find(0, start)]
        if (kind != _DT_DIR and kind) or name not in _DOTS:
            append((name, kind, position))
        at += length
    return entries, at


_DOTS = frozenset({b".", b".."})
_DT_DIR = 4  # readdir(3); a file system that knows no types says 0
