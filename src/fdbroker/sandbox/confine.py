"""Give up everything but one socket, layer by layer, and say what came of it.

The order matters: the empty root needs a capability, Landlock and seccomp need
no_new_privs, a change of ids clears the signal for the parent's death, and
seccomp refuses what all others do, so it comes last. What will be needed
afterwards must be imported and used once before: nothing can be opened then.

Hazard: Landlock and capabilities belong to a thread. Call this in a process that
has one, such as a forked child.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import capabilities, children, dumpable, landlock, namespaces, process, seccomp
from fdbroker.kernel.capabilities import Capabilities
from fdbroker.sandbox.report import STRICT, Layer, LayerReport, LayerState

if TYPE_CHECKING:
    from collections.abc import Callable

# The number of the one descriptor that is left.
CHANNEL = 0

_CLONE_NEWUSER = 0x10000000  # linux/sched.h
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Resource limits, each soft and hard at once.

    `descriptors`: how many may be open, the channel included. `extra_memory`:
    bytes of address space beyond what is mapped already. `cpu_seconds`: after
    which the kernel kills it; None: no limit.
    """

    descriptors: int = 8
    extra_memory: int = 256 * _MEBIBYTE
    cpu_seconds: int | None = None


@dataclass(frozen=True)
class Confinement:
    """What a process shall be confined to.

    `program` is its seccomp program. `ids` are the uid and gid to become:
    required when started as root, impossible otherwise.
    """

    program: bytes
    ids: tuple[int, int] | None = None
    limits: Limits = field(default_factory=Limits)


class ConfinementError(Exception):
    """A layer that must be there is not; the text says which and why. The process must end."""


class _Context(NamedTuple):
    wanted: Confinement
    parent: int
    mapped: int | None  # bytes of address space in use; None: not known


def confine(wanted: Confinement, *, parent: int) -> LayerReport:
    """Confine this process for ever; all that stays open is `CHANNEL`.

    `parent` is the pid of who forked it.

    Raises:
        ConfinementError: the process is something in between then: end it.

    """
    threads = _count_threads()
    if threads not in {None, 1}:
        raise ConfinementError(f"{threads} threads are running, and some layers belong to a thread")
    context = _Context(wanted, parent, _mapped_bytes())
    # Until the ids change, which clears it.
    _die_with_parent(context)
    states = {}
    for layer, apply in _STEPS:
        try:
            enforced, note = apply(context)
        except (OSError, RuntimeError, ValueError) as error:
            if layer in STRICT:
                raise ConfinementError(f"{layer.value}: {error}") from error
            enforced, note = False, str(error)
        states[layer] = LayerState(layer, enforced, note)
    return LayerReport(tuple(states[layer] for layer in Layer))


def _close_descriptors(_context: _Context) -> tuple[bool, str]:
    process.close_range(CHANNEL + 1)
    return True, "its channel alone"


def _clear_environment(_context: _Context) -> tuple[bool, str]:
    os.environ.clear()
    return True, "no variables"


def _empty_root(_context: _Context) -> tuple[bool, str]:
    """Make a directory the root that has no entries, no name, and can't get any."""
    how = ""
    directory = tempfile.mkdtemp(prefix="fdbroker-empty-")
    try:
        os.chdir(directory)
    finally:
        os.rmdir(directory)
    if os.geteuid() != 0:
        _enter_user_namespace()
        how = ", in a user namespace"
    os.chroot(".")
    os.chdir("/")
    return True, f"a removed directory{how}"


def _enter_user_namespace() -> None:
    """Get the capabilities of a user namespace of its own, in which this user stays who it is."""
    uid, gid = os.getuid(), os.getgid()
    namespaces.unshare(_CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _set_no_new_privs(_context: _Context) -> tuple[bool, str]:
    process.set_no_new_privs()
    return True, ""


def _change_ids(context: _Context) -> tuple[bool, str]:
    ids = context.wanted.ids
    if 0 not in os.getresuid():
        if ids is not None:
            raise ValueError("only root can change them")
        return False, f"unchanged: uid {os.getuid()}, as who started it"
    if ids is None or 0 in ids:
        raise ValueError("a process that root starts needs a uid and a gid that are not root's")
    process.change_ids(*ids)
    return True, f"uid {ids[0]}, gid {ids[1]}, no other groups"


def _die_with_parent(context: _Context) -> tuple[bool, str]:
    children.set_parent_death_signal(signal.SIGKILL)
    # Whoever died before that call sends nothing. Seen from a user namespace the pid stays the same.
    if os.getppid() != context.parent:
        os._exit(1)
    return True, ""


def _empty_capabilities(_context: _Context) -> tuple[bool, str]:
    # Ambient capabilities go with the permitted ones; the bounding set means nothing without execve.
    capabilities.capset(Capabilities(0, 0, 0))
    left = capabilities.capget()
    if left != Capabilities(0, 0, 0):
        raise RuntimeError(f"after giving up all: {left}")
    return True, "none"


def _limit_resources(context: _Context) -> tuple[bool, str]:
    wanted = context.wanted.limits
    limits = {
        resource.RLIMIT_NOFILE: wanted.descriptors,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    notes = [f"{wanted.descriptors} descriptors"]
    if context.mapped is not None:
        limits[resource.RLIMIT_AS] = context.mapped + wanted.extra_memory
        notes.append(f"{limits[resource.RLIMIT_AS] // _MEBIBYTE} MiB of addresses")
    if wanted.cpu_seconds is not None:
        limits[resource.RLIMIT_CPU] = wanted.cpu_seconds
        notes.append(f"{wanted.cpu_seconds} s of CPU")
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    return True, ", ".join([*notes, "no processes, files or core dumps"])


def _enter_landlock(_context: _Context) -> tuple[bool, str]:
    report = landlock.restrict_to(())
    if not report.enforced:
        return False, "this kernel has no Landlock, or it is not enabled at boot"
    missing = f"; not of this kernel: {', '.join(report.missing)}" if report.missing else ""
    return True, f"ABI {report.abi}, no rules{missing}"


def _deny_write_execute(_context: _Context) -> tuple[bool, str]:
    if process.deny_write_execute():
        return True, ""
    return False, "Linux 6.3 has it first"


def _set_not_dumpable(_context: _Context) -> tuple[bool, str]:
    dumpable.set_dumpable(False)
    return True, ""


def _install_filter(context: _Context) -> tuple[bool, str]:
    seccomp.install(context.wanted.program)
    return True, f"{len(context.wanted.program) // 8} instructions"


_STEPS: tuple[tuple[Layer, Callable[[_Context], tuple[bool, str]]], ...] = (
    (Layer.DESCRIPTORS, _close_descriptors),
    (Layer.ENVIRONMENT, _clear_environment),
    (Layer.EMPTY_ROOT, _empty_root),
    (Layer.NO_NEW_PRIVS, _set_no_new_privs),
    (Layer.IDS, _change_ids),
    (Layer.PARENT_DEATH, _die_with_parent),
    (Layer.CAPABILITIES, _empty_capabilities),
    (Layer.LIMITS, _limit_resources),
    (Layer.LANDLOCK, _enter_landlock),
    (Layer.WRITE_EXECUTE, _deny_write_execute),
    (Layer.NOT_DUMPABLE, _set_not_dumpable),
    (Layer.SECCOMP, _install_filter),
)


def _count_threads() -> int | None:
    """Return how many threads this process has, None where /proc does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return None


def _mapped_bytes() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None
