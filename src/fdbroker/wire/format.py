"""The numbers of docs/protocol.md: types, flags, reasons, layouts, limits."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag

VERSION = 1
MAGIC = b"fdbroker"
MAX_PATHS = 253  # SCM_MAX_FD: a message carries no more descriptors
MAX_FRAME = 65536
MAX_LIST_ENTRIES = 1024
# A reply has to fit into the broker's small send buffer (SO_SNDBUF 32 KiB, which the kernel doubles).
MAX_REPLY = 32768
MAX_POLICY = 8 << 20  # bytes of a compiled policy that a reload hands over
MAX_COPY = 16384  # bytes of a file that come inline
MAX_WALK_GLOBS = 16
MAX_GLOB = 1024  # bytes
MAX_LISTENER_NAME = 64  # bytes

HEADER = struct.Struct("<BBHII")  # type, flags, count, id, generation
HELLO = struct.Struct("<8sHHI")  # magic, lowest version, highest version, features
WELCOME = struct.Struct("<HHIHHIII")
RESULT = struct.Struct("<BBHI")  # status, reason, errno, length
# In the order of the kernel's struct statx, whose bytes 16 to 47 and 96 to 143 it is: links, uid, gid, mode,
# inode, size; ctime and mtime in seconds and nanoseconds; the major and minor number of the device.
STAT = struct.Struct("<IIIH2xQQqI4xqI12xII")
COOKIE = struct.Struct("<Q")
ENTRY = struct.Struct("<BBBB")  # length of the name, d_type, flags, reserved
ERROR = struct.Struct("<BBH")  # reason, reserved, errno
LIMIT = struct.Struct("<BBHII")  # which, reserved, reserved, its value, milliseconds until it is worth trying
PIECE = struct.Struct("<I")  # of a policy: where it begins in a request, what is there in a reply
ROW = struct.Struct("<I")  # of a part of the status: from which row on
CLIENT = struct.Struct("<I")  # the number of a client that a service acts for
WALK = struct.Struct("<IHHQQq")  # credit, kinds, options, least and most size, newer than
WALK_ENTRY = struct.Struct("<HBB")  # length of the path, d_type, flags
WALK_END = struct.Struct("<QQQI")  # entries, descriptors, directories, what is missing
ACCEPTED = struct.Struct("<IIIIHH")  # number, pid, uid, gid, identity level, releases held back
LENGTH = struct.Struct("<I")  # of a frame, before it on a stream

LIST_LAST_PAGE = 1
ENTRY_HAS_STAT = 1
MORE_FOLLOWS = 1
FILE_COMES = 1  # with this frame; without it: one is announced
FOR_CLIENT = 1  # a service asks on behalf of one of its clients
WANTS_COPY = 2  # the contents will do as well as a descriptor
WALK_LAST = 1
WALK_ENTRY_HAS_DESCRIPTOR = 1
WALK_DESCRIPTORS = 1  # option of a walk: regular files are to be opened
NO_SIZE_LIMIT = (1 << 64) - 1
ANY_TIME = -(1 << 63)
STATUS_PARTS = {1: "decisions", 2: "clients", 3: "connections"}  # lists, to be asked for row by row
ACTIONS = {1: "open", 2: "stat", 3: "list", 4: "walk"}  # what can be explained


class Type(IntEnum):
    """Frame types: requests. A reply has bit 7 set. From 0x41 on: those of a control socket."""

    HELLO = 0x01
    OPEN = 0x02
    STAT = 0x03
    LIST = 0x04
    STATUS = 0x05
    WALK = 0x06
    MORE = 0x07
    CANCEL = 0x08
    SERVE = 0x09
    RELEASE = 0x0A
    ACCEPTED = 0x10
    EXPLAIN = 0x41
    RELOAD = 0x42
    REOPEN = 0x43
    ERROR = 0xFF


REPLY = 0x80


class Status(IntEnum):
    """What became of one path."""

    GIVEN = 0
    REFUSED = 1
    BROKEN = 2
    COPIED = 3


class WalkKind(IntFlag):
    """What a walk is to name."""

    REGULAR = 1
    DIRECTORY = 2
    SYMLINK = 4
    OTHER = 8


class Incomplete(IntFlag):
    """Why a walk did not name everything below its start that its filters ask for."""

    REFUSED = 1  # the policy left something out
    FAILED = 2  # a system call did
    CHANGED = 4  # something moved or went away meanwhile
    CROSSES_MOUNT = 8
    TOO_LONG = 16  # a path over the limit
    CANCELLED = 32
    LIMIT = 64


class Limit(IntEnum):
    """Which limit was reached. Its name in lower case is that of the policy, and of the audit."""

    CONNECTIONS = 1
    CONNECTIONS_PER_UID = 2
    MESSAGE_WITHIN = 3  # seconds
    REQUESTS_PER_SECOND = 4
    OPENS_PER_SECOND = 5
    IN_FLIGHT_PER_UID = 6
    RULE_OPENS_PER_SECOND = 7
    RULE_IN_FLIGHT = 8
    RULE_REQUESTS_PER_SECOND = 9


class Kind(IntEnum):
    """The three kinds of error frame, never mixed."""

    REFUSED = 1
    MALFORMED = 2
    BROKEN = 3


class Reason(IntEnum):
    """Why something was not given; what a client may be told."""

    NONE = 0
    DENIED = 1
    PATH_INVALID = 2
    NOT_FOUND = 3
    NOT_DIRECTORY = 4
    NOT_REGULAR = 5
    SYMLINK = 6
    CROSSES_MOUNT = 7
    MOUNT_NOT_READ_ONLY = 8
    FILESYSTEM = 9
    BUSY = 10
    IDENTITY = 11
    LIMIT = 12
    AUDIT = 13
    BROKEN = 14
    MALFORMED = 15
    VERSION = 16
    POLICY = 17
    TOO_LARGE = 18
    TIMED_OUT = 19


ERRNO_OF = {
    Reason.NONE: 0,
    Reason.DENIED: errno.EACCES,
    Reason.PATH_INVALID: errno.EINVAL,
    Reason.NOT_FOUND: errno.ENOENT,
    Reason.NOT_DIRECTORY: errno.ENOTDIR,
    Reason.NOT_REGULAR: errno.EINVAL,
    Reason.SYMLINK: errno.ELOOP,
    Reason.CROSSES_MOUNT: errno.EXDEV,
    Reason.MOUNT_NOT_READ_ONLY: errno.EROFS,
    Reason.FILESYSTEM: errno.EOPNOTSUPP,
    Reason.BUSY: errno.EAGAIN,
    Reason.IDENTITY: errno.EPERM,
    Reason.LIMIT: errno.EAGAIN,
    Reason.AUDIT: errno.EIO,
    Reason.BROKEN: errno.EIO,
    Reason.MALFORMED: errno.EPROTO,
    Reason.VERSION: errno.EPROTONOSUPPORT,
    Reason.POLICY: errno.EINVAL,
    Reason.TOO_LARGE: errno.EFBIG,
    Reason.TIMED_OUT: errno.ETIMEDOUT,
}
