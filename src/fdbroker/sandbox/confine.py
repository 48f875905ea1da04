"""Give up everything but one socket, layer by layer, and say what came of it.

This is the worker's part: what its zygote did for all of them is in `surroundings`.
The order matters: mounts come before Landlock, which forbids them; Landlock and
seccomp need no_new_privs; a change of ids clears the signal for the parent's death; and
seccomp refuses what all others do, so it comes last. What will be needed
afterwards must be imported and used once before: nothing can be opened then.

Hazard: Landlock and capabilities belong to a thread. Call this in a process that
has one, such as a forked child.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import capabilities, children, dumpable, landlock, namespaces, process, seccomp
from fdbroker.kernel.capabilities import Capabilities
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox.confinement import MEBIBYTE, SCRATCH, Confinement, Profile
from fdbroker.sandbox.errors import ConfinementError
from fdbroker.sandbox.report import Layer, LayerReport, LayerState
from fdbroker.sandbox.waiting import is_readable

if TYPE_CHECKING:
    from collections.abc import Callable

# Whoever is confined has these descriptors: its channel, and /dev/null for what libraries print.
LAST_OF_ITS_OWN = 2


class Given(NamedTuple):
    """What a worker gets from its zygote.

    `filter`: its seccomp program. `ids`: the uid and gid to become, None to stay.
    `zygote`: a pidfd of it, for seeing its death. `mapped`: bytes of its address space.
    `surroundings`: the layers that are there already. `program`, `loader`, `readable`: what a
    program is made of; the descriptor is put where the filter expects it.
    """

    filter: bytes
    ids: tuple[int, int] | None
    zygote: int
    mapped: int
    surroundings: tuple[LayerState, ...]
    program: int | None = None
    loader: bytes | None = None
    readable: tuple[bytes, ...] = ()


class _Context(NamedTuple):
    wanted: Confinement
    given: Given
    scratch: bool = False  # it has a directory of its own


def confine(wanted: Confinement, given: Given) -> LayerReport:
    """Confine this process for ever; all that stays open is up to `LAST_OF_ITS_OWN`, and a program.

    Raises:
        ConfinementError: the process is something in between then: end it.

    """
    context = _Context(wanted, given)
    # Until the ids change, which clears it.
    _die_with_zygote(context)
    states = {state.layer: state for state in given.surroundings}
    if wanted.profile is Profile.SCRATCH and states[Layer.EMPTY_ROOT].enforced:
        states[Layer.EMPTY_ROOT] = _mount_scratch(context, states[Layer.EMPTY_ROOT])
    for state in states.values():
        _check(wanted, state)
    context = context._replace(
        scratch=wanted.profile is Profile.SCRATCH and states[Layer.EMPTY_ROOT].enforced
    )
    for layer, apply in _STEPS:
        try:
            enforced, note = (False, "left out") if layer in wanted.unsafe_without else apply(context)
        except (OSError, RuntimeError, ValueError) as error:
            if layer is Layer.IDS and layer not in wanted.unsafe_without:
                raise ConfinementError(f"{layer.value}: {error}") from error
            enforced, note = False, str(error)
        states[layer] = LayerState(layer, enforced, note)
        # No later layer may hide that it is missing, or fail for want of it.
        _check(wanted, states[layer])
    return LayerReport(tuple(states[layer] for layer in Layer))


def _check(wanted: Confinement, state: LayerState) -> None:
    """Raise ConfinementError for a layer that is not in force and must be."""
    if not state.enforced and wanted.insists_on(state.layer):
        raise ConfinementError(f"{state.layer.value}: {state.note}")


def _mount_scratch(context: _Context, root: LayerState) -> LayerState:
    """Mount its own tmpfs, where no sibling sees it; it goes with the last process in there."""
    size = context.wanted.scratch_size
    uid, gid = context.given.ids or (os.getuid(), os.getgid())
    options = b"size=%d,nr_inodes=%d,mode=0700,uid=%d,gid=%d" % (size, _most_files(size), uid, gid)
    try:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        namespaces.mount_tmpfs(SCRATCH, options)
    except OSError as error:
        return root._replace(enforced=False, note=f"no directory of its own: {error}")
    return root._replace(note=f"{root.note}, of {_mebibytes(size)} MiB")


def _most_files(size: int) -> int:
    """Return how many files and directories there may be: each costs memory of the kernel too."""
    return max(64, size // 4096)


def _mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:g}"


def _close_descriptors(context: _Context) -> tuple[bool, str]:
    if context.given.program is None:
        process.close_range(LAST_OF_ITS_OWN + 1)
        return True, "its channel, and /dev/null twice"
    # Closed by execve, so it can be used once.
    os.dup2(context.given.program, LAST_OF_ITS_OWN + 1, inheritable=False)
    process.close_range(LAST_OF_ITS_OWN + 2)
    return True, "its channel, /dev/null twice, and the program"


def _clear_environment(_context: _Context) -> tuple[bool, str]:
    os.environ.clear()
    return True, "no variables"


def _set_no_new_privs(_context: _Context) -> tuple[bool, str]:
    process.set_no_new_privs()
    return True, ""


def _change_ids(context: _Context) -> tuple[bool, str]:
    ids = context.given.ids
    if 0 not in os.getresuid():
        if ids is not None:
            raise ValueError("only root can change them")
        return False, f"unchanged: uid {os.getuid()}, as who started it"
    if ids is None or 0 in ids:
        raise ValueError("a process that root starts needs a uid and a gid that are not root's")
    process.change_ids(*ids)
    return True, f"uid {ids[0]}, gid {ids[1]}, no other groups"


def _die_with_zygote(context: _Context) -> tuple[bool, str]:
    children.set_parent_death_signal(signal.SIGKILL)
    # Whoever died before that call sends nothing.
    if is_readable(context.given.zygote, 0.0):
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
        resource.RLIMIT_FSIZE: 0 if context.wanted.profile is Profile.SEALED else wanted.file_size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    # A program has nothing mapped yet, and its libraries to map.
    mapped = 0 if context.wanted.profile is Profile.PROGRAM else context.given.mapped
    limits[resource.RLIMIT_AS] = mapped + wanted.extra_memory
    notes = [
        f"{wanted.descriptors} descriptors",
        f"{limits[resource.RLIMIT_AS] // MEBIBYTE} MiB of addresses",
        f"files of {_mebibytes(limits[resource.RLIMIT_FSIZE])} MiB",
    ]
    if wanted.cpu_seconds is not None:
        limits[resource.RLIMIT_CPU] = wanted.cpu_seconds
        notes.append(f"{wanted.cpu_seconds} s of CPU")
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    return True, ", ".join([*notes, "no processes or core dumps"])


def _enter_landlock(context: _Context) -> tuple[bool, str]:
    wanted, given, scratch = context
    with Descriptors() as owned:

        def opened(*paths: bytes) -> list[int]:
            found = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths]
            for descriptor in found:
                owned.add(descriptor)
            return found

        trees: list[int] = []
        files: list[int] = []
        for path in given.readable:
            (trees if os.path.isdir(path) else files).extend(opened(path))
        programs = [] if given.program is None else [LAST_OF_ITS_OWN + 1]
        if given.loader is not None:
            programs += opened(given.loader)
        report = landlock.restrict_to(
            trees,
            scratch_trees=opened(SCRATCH) if scratch else (),
            programs=programs,
            read_files=files,
            abi=wanted.landlock_abi,
        )
    if not report.enforced:
        return False, "this kernel has no Landlock, or it is not enabled at boot"
    rules = {
        Profile.SEALED: "no rules",
        Profile.SCRATCH: "one rule, its own directory",
        Profile.PROGRAM: f"{len(trees) + len(files) + len(programs)} rules, for reading",
    }[wanted.profile]
    missing = f"; not of this kernel: {', '.join(report.missing)}" if report.missing else ""
    return True, f"ABI {report.abi}, {rules}{missing}"


def _deny_write_execute(context: _Context) -> tuple[bool, str]:
    if context.wanted.jit:
        return False, "not wanted: it compiles while it runs"
    if process.deny_write_execute():
        return True, ""
    return False, "Linux 6.3 has it first"


def _set_not_dumpable(_context: _Context) -> tuple[bool, str]:
    dumpable.set_dumpable(False)
    return True, ""


def _install_filter(context: _Context) -> tuple[bool, str]:
    seccomp.install(context.given.filter)
    return True, f"{len(context.given.filter) // 8} instructions"


# What is missing here its zygote did. The descriptors go when the zygote has been looked at for the last
# time, and the limits come when no more are needed.
_STEPS: tuple[tuple[Layer, Callable[[_Context], tuple[bool, str]]], ...] = (
    (Layer.ENVIRONMENT, _clear_environment),
    (Layer.NO_NEW_PRIVS, _set_no_new_privs),
    (Layer.IDS, _change_ids),
    (Layer.PARENT_DEATH, _die_with_zygote),
    (Layer.DESCRIPTORS, _close_descriptors),
    (Layer.CAPABILITIES, _empty_capabilities),
    (Layer.LANDLOCK, _enter_landlock),
    (Layer.LIMITS, _limit_resources),
    (Layer.WRITE_EXECUTE, _deny_write_execute),
    (Layer.NOT_DUMPABLE, _set_not_dumpable),
    (Layer.SECCOMP, _install_filter),
)
