"""What a process may set of itself: prctl(2), its ids, its open descriptors.

Each is one system call, except `change_ids`, which does what belongs together
and then looks whether it came true.
"""

from __future__ import annotations

import errno
import os

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import SYS_CLOSE_RANGE, SYS_PRCTL, syscall

# linux/prctl.h
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_GET_SECUREBITS = 27
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_PR_SET_MDWE = 65
_PR_MDWE_REFUSE_EXEC_GAIN = 1

# linux/securebits.h
SECBIT_NOROOT = 1 << 0
SECBIT_NOROOT_LOCKED = 1 << 1
SECBIT_NO_SETUID_FIXUP = 1 << 2
SECBIT_NO_SETUID_FIXUP_LOCKED = 1 << 3
SECBIT_KEEP_CAPS = 1 << 4
SECBIT_KEEP_CAPS_LOCKED = 1 << 5

_CLOSE_RANGE_CLOEXEC = 4
_LAST_DESCRIPTOR = 0xFFFFFFFF
_NO_ID = 0xFFFFFFFF  # (uid_t) -1: to setresuid(2) it says "leave as it is"


def _prctl(option: str, number: int, argument: int = 0, second: int = 0, **described: object) -> int:
    # Unused arguments must be zero for many options.
    return syscall("prctl", SYS_PRCTL, number, argument, second, 0, 0, option=option, **described)


def set_no_new_privs() -> None:
    """Never again gain a privilege by execve(2): not by set-user-id, not by file capabilities.

    PR_SET_NO_NEW_PRIVS, Linux 3.5. It can't be taken back. Landlock and seccomp ask for it.
    """
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def set_keepcaps(keep: bool) -> None:  # noqa: FBT001 - the value is the whole call
    """Say whether permitted capabilities outlive the change from uid 0; PR_SET_KEEPCAPS.

    EPERM where SECBIT_KEEP_CAPS_LOCKED is set. execve(2) clears it.
    """
    _prctl("PR_SET_KEEPCAPS", _PR_SET_KEEPCAPS, int(keep), keep=keep)


def get_securebits() -> int:
    """Return the securebits flags of the calling thread; PR_GET_SECUREBITS, capabilities(7)."""
    return _prctl("PR_GET_SECUREBITS", _PR_GET_SECUREBITS)


def set_securebits(bits: int) -> None:
    """Set the securebits flags; PR_SET_SECUREBITS. EPERM without CAP_SETPCAP or where locked."""
    _prctl("PR_SET_SECUREBITS", _PR_SET_SECUREBITS, bits, bits=hex(bits), needs="CAP_SETPCAP")


def deny_write_execute() -> bool:
    """Refuse memory that becomes executable after it was writable, or is both; for ever.

    PR_SET_MDWE with PR_MDWE_REFUSE_EXEC_GAIN, Linux 6.3. Returns False where
    the kernel does not have it. Children inherit it.
    """
    try:
        _prctl("PR_SET_MDWE", _PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN)
    except SyscallError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def raise_ambient_capability(capability: int) -> None:
    """Let a capability outlive execve(2) of an ordinary program; PR_CAP_AMBIENT_RAISE, Linux 4.3.

    EPERM unless it is permitted and inheritable.
    """
    _prctl("PR_CAP_AMBIENT", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, raised=capability)


def clear_ambient_capabilities() -> None:
    """Empty the ambient set; PR_CAP_AMBIENT_CLEAR_ALL, Linux 4.3."""
    _prctl("PR_CAP_AMBIENT", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def in_bounding_set(capability: int) -> bool:
    """Return whether a capability could still be gained by execve(2); PR_CAPBSET_READ."""
    return bool(_prctl("PR_CAPBSET_READ", _PR_CAPBSET_READ, capability, capability=capability))


def drop_from_bounding_set(capability: int) -> None:
    """Make a capability impossible to gain, for ever; PR_CAPBSET_DROP. EPERM without CAP_SETPCAP."""
    _prctl("PR_CAPBSET_DROP", _PR_CAPBSET_DROP, capability, dropped=capability, needs="CAP_SETPCAP")


def close_range(first: int, last: int = _LAST_DESCRIPTOR, *, cloexec: bool = False) -> None:
    """Close the descriptors `first` to `last`, open or not; or set close-on-exec on them.

    close_range(2), Linux 5.9; `cloexec` is CLOSE_RANGE_CLOEXEC, Linux 5.11
    (EINVAL before).
    """
    syscall(
        "close_range",
        SYS_CLOSE_RANGE,
        first,
        last,
        _CLOSE_RANGE_CLOEXEC if cloexec else 0,
        first=first,
        last=last,
        cloexec=cloexec,
    )


def change_ids(uid: int, gid: int, groups: tuple[int, ...] = ()) -> None:
    """Become another user for good: real, effective and saved ids, and the groups exactly.

    setgroups(2), setresgid(2), setresuid(2), in the order in which each is
    still permitted, on all threads (glibc's functions, not the bare system
    calls, which change one thread). Then looks at what the kernel says.

    Raises:
        SyscallError: a call was refused, or an id is (uid_t) -1, which would mean
            "unchanged".
        RuntimeError: all calls succeeded, but the ids are others. End the process.

    """
    for value in (uid, gid, *groups):
        if not 0 <= value < _NO_ID:
            raise SyscallError(errno.EINVAL, "change_ids", uid=uid, gid=gid, groups=groups)
    call = "setgroups"
    try:
        os.setgroups(groups)
        call = "setresgid"
        os.setresgid(gid, gid, gid)
        call = "setresuid"
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise SyscallError(error.errno or 0, call, uid=uid, gid=gid, groups=groups) from None
    actual = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    if actual != ((uid,) * 3, (gid,) * 3, sorted(groups)):
        raise RuntimeError(f"ids are {actual} after changing to uid {uid}, gid {gid}, groups {groups}")
