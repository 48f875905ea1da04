"""What a zygote puts around all its workers, once: namespaces, and a root in which there is nothing.

Each is tried by itself: what a machine refuses is told as a gap of that layer, and who starts
workers decides whether it can be done without.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

from fdbroker.kernel import namespaces
from fdbroker.sandbox.confinement import SCRATCH, Confinement, Profile
from fdbroker.sandbox.report import Layer, LayerState

_OTHERS = (
    ("network", namespaces.CLONE_NEWNET),
    ("ipc", namespaces.CLONE_NEWIPC),
    ("uts", namespaces.CLONE_NEWUTS),
    ("cgroup", namespaces.CLONE_NEWCGROUP),
)
# Inodes of the namespaces that the system begins with, in all kernels; PROC_*_INIT_INO of linux/proc_ns.h.
_OF_THE_SYSTEM = {"ipc": 0xEFFFFFFF, "uts": 0xEFFFFFFE}
# Where a loader looks for libraries, and the index of them.
_LOADER_PLACES = (
    b"/lib",
    b"/lib32",
    b"/lib64",
    b"/usr/lib",
    b"/usr/lib32",
    b"/usr/lib64",
    b"/etc/ld.so.cache",
)
# Only to stand on for a moment, in a mount namespace of our own; it is there wherever this works at all.
_FOOTHOLD = b"/proc"
_ROOM = b"size=64k,nr_inodes=256,mode=0555"
_READ_ONLY = namespaces.MOUNT_ATTR_RDONLY | namespaces.MOUNT_ATTR_NOSUID | namespaces.MOUNT_ATTR_NODEV
_LEFT_OUT = "left out"

_ELF64 = b"\x7fELF\x02"
_PT_INTERP = 3


class Gaps(NamedTuple):
    """Why there is no namespace of users, or of processes; None where there is one, or none is needed."""

    users: str | None
    processes: str | None


def enter_user_and_pid_namespace(confinement: Confinement) -> Gaps:
    """Have the next child be the first process of a pid namespace.

    Who is not root needs a namespace of users first, in which this user stays who it is.
    """
    left_out = confinement.unsafe_without
    users = None
    if os.geteuid() != 0 and not left_out >= {Layer.NAMESPACES, Layer.PID_NAMESPACE, Layer.EMPTY_ROOT}:
        users = _enter_user_namespace()
    if Layer.PID_NAMESPACE in left_out:
        return Gaps(users, _LEFT_OUT)
    return Gaps(users, users or _why_not(namespaces.CLONE_NEWPID))


def surround(confinement: Confinement, gaps: Gaps) -> tuple[LayerState, ...]:
    """Enter the other namespaces and the root; return what is in force of it.

    `gaps`: what the process that forked this one got. The caller has one thread, and has opened
    all that it needs by a name.
    """
    left_out = confinement.unsafe_without
    mounts = gaps.users
    if mounts is None and not left_out >= {Layer.NAMESPACES, Layer.EMPTY_ROOT}:
        mounts = _why_not(namespaces.CLONE_NEWNS)
    states = [LayerState(Layer.NAMESPACES, enforced=False, note=_LEFT_OUT)]
    if Layer.NAMESPACES not in left_out:
        states = [_enter_others(mounts, gaps.users)]
    note = gaps.processes or "each worker in one of its own"
    states.append(LayerState(Layer.PID_NAMESPACE, enforced=gaps.processes is None, note=note))
    root = mounts or (_LEFT_OUT if Layer.EMPTY_ROOT in left_out else None)
    if root is None:
        try:
            _enter_root(confinement)
        except OSError as error:
            root = str(error)
    note = (
        root
        or {
            Profile.SEALED: "a read-only tmpfs without entries",
            Profile.SCRATCH: "a read-only tmpfs with its own directory alone",
            Profile.PROGRAM: "a read-only tmpfs with libraries and what it may read",
        }[confinement.profile]
    )
    states.append(LayerState(Layer.EMPTY_ROOT, enforced=root is None, note=note))
    return tuple(states)


def readable_places(confinement: Confinement) -> tuple[bytes, ...]:
    """Return what a program may read: its loader's places, and what its user named."""
    places = [*_LOADER_PLACES, *(os.path.realpath(path) for path in confinement.readable)]
    return tuple(place for place in places if os.path.exists(place))


def loader_of(program: bytes) -> bytes | None:
    """Return the path of the loader that is executed with a program (PT_INTERP of elf(5)), None if static.

    Raises:
        OSError: it can't be read.
        ValueError: it is no program for the kernel to load.

    """
    with open(program, "rb") as file:
        head = file.read(64)
        if len(head) < 64 or not head.startswith(_ELF64):  # noqa: PLR2004 - sizeof(Elf64_Ehdr)
            raise ValueError(
                f"{os.fsdecode(program)} is no 64-bit ELF file; of a script, start the interpreter"
            )
        (start,) = struct.unpack_from("=Q", head, 32)
        size, count = struct.unpack_from("=HH", head, 54)
        for index in range(count):
            file.seek(start + index * size)
            header = file.read(56)
            if struct.unpack_from("=I", header)[0] == _PT_INTERP:
                offset, length = struct.unpack_from("=Q16xQ", header, 8)
                file.seek(offset)
                return file.read(length).rstrip(b"\0")
    return None


def _enter_user_namespace() -> str | None:
    uid, gid = os.getuid(), os.getgid()
    maps = (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"))
    try:
        namespaces.unshare(namespaces.CLONE_NEWUSER)
        for name, text in maps:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as error:
        return f"no user namespace: {error}"
    return None


def _why_not(kind: int) -> str | None:
    try:
        namespaces.unshare(kind)
    except OSError as error:
        # Without the flags, so that one reason for several is told once.
        return f"unshare: {errno.errorcode.get(error.errno or 0)}, {error.strerror}"
    return None


def _enter_others(mounts: str | None, users: str | None) -> LayerState:
    gaps = {"mount": mounts} | {name: users or _why_not(kind) for name, kind in _OTHERS}
    shared = [name for name, why in gaps.items() if why is not None and _is_not_the_systems(name)]
    wrong = {name: why for name, why in gaps.items() if why is not None and name not in shared}
    if not wrong:
        shown = (f"{name} (its service's)" if name in shared else name for name in gaps)
        return LayerState(Layer.NAMESPACES, enforced=True, note=", ".join(shown))
    reasons = "; ".join(sorted(set(wrong.values())))
    return LayerState(Layer.NAMESPACES, enforced=False, note=f"not {', '.join(wrong)}: {reasons}")


def _is_not_the_systems(name: str) -> bool:
    """Return whether this process is in no such namespace of the system's anyway.

    So it is in a service of systemd with PrivateNetwork=, PrivateIPC= and
    ProtectHostname=, which then need not be allowed to make more of them.
    """
    if name == "network":
        with open("/proc/self/net/dev", "rb") as file:
            return [line.split()[0] for line in file.readlines()[2:]] in ([], [b"lo:"])
    return name in _OF_THE_SYSTEM and os.stat(f"/proc/self/ns/{name}").st_ino != _OF_THE_SYSTEM[name]


def _enter_root(confinement: Confinement) -> None:
    """Make a tmpfs the root, with what the profile has in it, and let go of the old one."""
    places = readable_places(confinement) if confinement.profile is Profile.PROGRAM else ()
    namespaces.mount_setattr(b"/", attributes=0, propagation=namespaces.MS_PRIVATE, recursive=True)
    namespaces.mount_tmpfs(_FOOTHOLD, _ROOM)
    # Whoever the workers are, they go through these.
    umask = os.umask(0)
    if confinement.profile is Profile.SCRATCH:
        os.mkdir(_FOOTHOLD + SCRATCH, 0o555)
    for place in places:
        _show(place)
    os.umask(umask)
    namespaces.mount_setattr(
        _FOOTHOLD, attributes=_READ_ONLY | namespaces.MOUNT_ATTR_NOEXEC * (not places), recursive=True
    )
    os.chdir(_FOOTHOLD)
    namespaces.pivot_to_working_directory()
    os.chdir("/")


def _show(place: bytes) -> None:
    """Have in the new root, read-only later, what is at a place in the old one."""
    target = _FOOTHOLD + place
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), 0o555, exist_ok=True)
    if os.path.islink(place):
        os.symlink(os.readlink(place), target)
        return
    if os.path.isdir(place):
        os.mkdir(target, 0o555)
    else:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    namespaces.bind(place, target)
