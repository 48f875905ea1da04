"""From a handover to a serving broker: verify, open the roots, give up the rest, serve.

The launcher prepared everything and is gone by execve. What it promised is
verified here, from /proc/self/status and not from its word, and a difference
stops the start: there is no silent weak mode. All imports end before Landlock
and seccomp.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.broker.audit import Audit, member_text
from fdbroker.broker.dispatch import Parts
from fdbroker.broker.generation import Held, key_of, make_generation, problem_with_identity
from fdbroker.broker.identity import HIGHEST_LEVEL, IdentityError, gives_labels, probe_level
from fdbroker.broker.notify import Notifier
from fdbroker.broker.roots import RootError, hold_roots
from fdbroker.broker.server import Broker, settle_memory
from fdbroker.broker.watchdog import Watchdog
from fdbroker.kernel import dumpable, landlock, seccomp
from fdbroker.kernel.files import open_path_beneath, open_proc_self_fd
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH, parse_process_state, read_process_state
from fdbroker.policy.rules import PolicyError, RuleSet, read_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fdbroker.broker.roots import HeldRoot

EXIT_STOPPED = 0
EXIT_NOT_STARTED = 2

_ONLY_CAPABILITY = 1 << CAP_DAC_READ_SEARCH
# Half of them may be in flight, and a single reply has up to 253.
_LEAST_DESCRIPTORS = 1024
_FILTERED = 2  # "Seccomp:" of /proc/PID/status


class StartError(Exception):
    """The broker does not start; the text says what differs and what to do."""


class Handover(NamedTuple):
    """What the launcher hands over, as JSON on a descriptor. Descriptors are owned from then on.

    `control` listens for those who administer the broker, `notify` is connected to the service
    manager, and `held` stay open and are never used, as a locked pidfile is. `roots`, by name, are those
    that could not be opened here, where nothing may wait for a file system. A listener comes with its
    name, and with that of the service whose clients come there, None where they come to the broker.
    """

    uid: int
    gid: int
    policy: RuleSet
    listeners: Sequence[tuple[int, str, str | None]]
    connections: Sequence[tuple[int, str]]
    control: int | None
    audit: int | None
    ready: int | None
    notify: int | None
    watchdog_usec: int | None
    held: Sequence[int]
    roots: Mapping[str, int]
    cgroup_root: str | None
    boot_id: str
    version: str
    launcher_fingerprint: str | None
    seccomp: bytes
    helper_seccomp: tuple[bytes, bytes]


def read_handover(descriptor: int) -> Handover:
    """Read the handover to its end and close the descriptor.

    Raises:
        StartError: it is not what a launcher of this version writes.

    """
    try:
        with open(descriptor, "rb") as file:
            document: dict[str, Any] = json.load(file)
        return Handover(
            uid=int(document["uid"]),
            gid=int(document["gid"]),
            policy=read_policy(document["policy"]),
            listeners=[
                (int(number), str(name), None if service is None else str(service))
                for number, name, service in document["listeners"]
            ],
            connections=[(int(number), str(name)) for number, name in document["connections"]],
            control=_optional(document["control"]),
            audit=_optional(document["audit"]),
            ready=_optional(document["ready"]),
            notify=_optional(document["notify"]),
            watchdog_usec=_optional(document["watchdog_usec"]),
            held=[int(number) for number in document["held"]],
            roots={str(name): int(number) for name, number in document["roots"]},
            cgroup_root=document["cgroup_root"],
            boot_id=str(document["boot_id"]),
            version=str(document["version"]),
            launcher_fingerprint=document["launcher_fingerprint"],
            seccomp=bytes.fromhex(document["seccomp"]),
            helper_seccomp=_pair(document["helper_seccomp"]),
        )
    except PolicyError as error:
        raise StartError(f"the compiled policy can't be used: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(
            f"the handover can't be read: {error!r}; start the broker by its launcher"
        ) from error


def _pair(programs: object) -> tuple[bytes, bytes]:
    if not isinstance(programs, list):
        raise TypeError(f"{programs!r} is no pair")
    starter, helper = programs
    return bytes.fromhex(starter), bytes.fromhex(helper)


def _optional(value: object) -> int | None:
    if value is None or isinstance(value, int):
        return value
    raise TypeError(f"{value!r} is no number")


def check_descriptors(handover: Handover) -> None:
    """Check that this process has the descriptors it was told of and no others.

    Raises:
        StartError: a stranger's descriptor came along, or one is missing.

    """
    promised = {*handover.held, *(number for number, _, _ in handover.listeners)}
    promised |= {number for number, _ in handover.connections}
    optional = (handover.control, handover.audit, handover.ready, handover.notify)
    promised |= {number for number in optional if number is not None}
    roots = {*handover.roots.values()}
    present = {*roots}
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number in roots:
            continue  # even fstat(2) asks whoever answers for it; `check_roots` looks at it
        try:
            os.fstat(number)
        except OSError:
            continue  # the listing's own, closed by now
        present.add(number)
    promised |= roots
    present -= {0, 1, 2}
    if present != promised - {0, 1, 2}:
        raise StartError(
            f"the broker was handed descriptors {sorted(promised)} but has {sorted(present)};"
            " whoever starts it must close all others"
        )


def check_roots(handover: Handover) -> None:
    """Check that the roots which were handed over are those of the policy, without asking a file system.

    Raises:
        StartError: one is missing, or is another directory.

    """
    for root in handover.policy.roots:
        number = handover.roots.get(root.name)
        if number is None and not root.helpers:
            continue  # opened here
        place = b"nothing" if number is None else os.readlink(b"/proc/self/fd/%d" % number)
        if place != root.path:
            raise StartError(
                f"root {root.name!r} ({os.fsdecode(root.path)}) was handed over as {place!r}: was it moved or"
                " removed meanwhile? start the broker again, by its launcher"
            )


def check_state(handover: Handover) -> None:
    """Check that this process is the broker's user with its one capability and nothing else.

    Raises:
        StartError: something differs; the text lists it all.

    """
    state = read_process_state()
    wanted = {
        "uids": (state.uids, (handover.uid,) * 4),
        "gids": (state.gids, (handover.gid,) * 4),
        "supplementary groups": (set(state.groups) - {handover.gid}, set()),
        "permitted capabilities": (hex(state.permitted), hex(_ONLY_CAPABILITY)),
        "effective capabilities": (hex(state.effective), hex(_ONLY_CAPABILITY)),
        "no_new_privs": (state.no_new_privs, True),
        "threads": (state.threads, 1),
    }
    odd = [f"{what} {is_!r} instead of {should!r}" for what, (is_, should) in wanted.items() if is_ != should]
    if state.bounding & ~_ONLY_CAPABILITY:
        odd.append(f"bounding set {state.bounding:#x} has more than CAP_DAC_READ_SEARCH")
    if 0 in state.uids:
        odd.append("uid 0, which never opens a file")
    if odd:
        raise StartError(
            f"the process is not in the broker's state: {'; '.join(odd)}; start it by its launcher"
        )


def _probe_openat2() -> None:
    """Find out now, with a cure, rather than by refusing every request."""
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(open_path_beneath(here, b"."))
    except OSError as error:
        raise StartError(
            f"{error}: it needs Linux 5.6, and a filter must not take it away"
            " (RestrictSUIDSGID= of systemd does: leave it off for this service)"
        ) from error
    finally:
        os.close(here)


def _list_only(cgroup_root: str | None, policy: RuleSet) -> list[int]:
    """Open the control group tree, if rules need it, to be listed and not read."""
    if cgroup_root is None or not policy.cgroups:
        return []
    return [os.open(cgroup_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]


def _helper_start() -> Callable[[Broker, Sequence[HeldRoot], tuple[bytes, bytes], Audit], None]:
    """Return what starts the helpers: a fifth of the code, loaded where a root needs it.

    Call it before Landlock, which lets nothing be imported.
    """
    from fdbroker.broker.helped import Helped  # noqa: PLC0415
    from fdbroker.broker.helper_process import Filters  # noqa: PLC0415
    from fdbroker.broker.open_helpers import OpenHelpers  # noqa: PLC0415

    def start(broker: Broker, roots: Sequence[HeldRoot], programs: tuple[bytes, bytes], audit: Audit) -> None:
        broker.use_helpers(OpenHelpers.start(roots, Filters(*programs), audit.event), Helped)

    return start


def build(handover: Handover) -> tuple[Broker, Audit]:
    """Open what has to be open, restrict this process for good, and return the broker.

    Raises:
        StartError, RootError, OSError: it does not start.

    """
    policy = handover.policy
    settings = policy.settings
    level, why = probe_level()
    labels = gives_labels()
    problem = problem_with_identity(policy, level, why, labels=labels)
    if problem is not None:
        raise StartError(problem)
    if policy.cgroups and level < HIGHEST_LEVEL:
        raise StartError(
            f"the policy has rules for units or control groups, but {why}; write rules for users"
        )
    if policy.cgroups and handover.cgroup_root is None:
        raise StartError(
            "the policy has rules for units or control groups, but no cgroup2 is mounted; mount it (mount -t"
            " cgroup2 none /sys/fs/cgroup), or write rules for users"
        )
    _probe_openat2()
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < _LEAST_DESCRIPTORS:
        raise StartError(
            f"the broker may have {most} descriptors open (RLIMIT_NOFILE) and needs {_LEAST_DESCRIPTORS};"
            " raise it (ulimit -n, or LimitNOFILE= of systemd)"
        )
    start_helpers = _helper_start() if any(root.helpers for root in policy.roots) else None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    dumpable.set_dumpable(False)
    roots = hold_roots(policy.roots, handover.roots, read_only_required=settings.read_only_view_required)
    Watchdog.prepare()
    watchdog = Watchdog()
    held = Held(
        {key_of(root): kept for root, kept in zip(policy.roots, roots, strict=True)},
        open_proc_self_fd(),
        handover.cgroup_root if policy.cgroups else None,
        settings.read_only_view_required,
        handover.launcher_fingerprint,
        frozenset(policy.services),
        watchdog.ping,
        level,
        labels,
    )
    audit = Audit(handover.audit, deny_on_failure=settings.deny_when_audit_fails, boot=handover.boot_id)
    notifier = Notifier(handover.notify, handover.watchdog_usec)
    layers: dict[str, object] = {}
    generation = make_generation(1, policy, held)
    broker = Broker(Parts(generation, held, audit, notifier, layers, handover.version, watchdog))
    for number, name, service in handover.listeners:
        broker.add_listener(socket.socket(fileno=number), name, service=service)
    if handover.control is not None:
        broker.add_listener(socket.socket(fileno=handover.control), "control", control=True)
    for number, name in handover.connections:
        broker.adopt(socket.socket(fileno=number), name)
    status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)  # Landlock will not let us
    list_only = _list_only(handover.cgroup_root, policy)
    report = landlock.restrict_to(
        [root.descriptor for root in roots],
        list_only,
        # Replies to datagrams go to such addresses.
        reach_abstract_sockets=broker.takes_datagrams,
    )
    for descriptor in list_only:
        os.close(descriptor)
    if report.missing:
        sys.stderr.write(f"fdbroker: Landlock of this kernel (ABI {report.abi}) lacks: {report.missing}\n")
    if start_helpers is not None:
        # The last moment at which there can be a fork: in the domain, and before the filter.
        start_helpers(broker, [root for root in roots if root.helpers], handover.helper_seccomp, audit)
    seccomp.install(handover.seccomp)
    after = parse_process_state(os.pread(status, 16384, 0))
    os.close(status)
    if after.seccomp != _FILTERED:
        raise StartError("the kernel took the seccomp filter but does not show it")
    layers.update(landlock=report.abi, landlock_lacks=list(report.missing), seccomp=True)
    started = audit.event(
        "started",
        member_text(boot=audit.boot, pid=os.getpid(), uid=handover.uid, identity=level, landlock=report.abi),
    )
    if not started and settings.deny_when_audit_fails:
        raise StartError("the audit can't be written; free its disk or choose another place")
    return broker, audit


def run(handover_descriptor: int) -> int:
    """Start, serve until a signal to end or the end of the last client there can be; return the status."""
    try:
        handover = read_handover(handover_descriptor)
        check_descriptors(handover)
        check_roots(handover)
        check_state(handover)
        broker, audit = build(handover)
    except (StartError, RootError, IdentityError, OSError, ValueError) as error:
        sys.stderr.write(f"fdbroker: {error}\n")
        return EXIT_NOT_STARTED
    signal.set_wakeup_fd(broker.wake_descriptor)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, lambda _number, _frame: broker.stop())
    settle_memory()
    if handover.ready is not None:
        with contextlib.suppress(BrokenPipeError):  # whoever waited has gone
            os.write(handover.ready, b"ready\n")
        os.close(handover.ready)
    broker.say_status(READY="1")
    try:
        broker.serve()
    except Exception as error:
        # A bug: the service manager starts anew, the audit says that this one ended.
        audit.event("failed", member_text(reason=repr(error)))
        raise
    broker.say_stopping()
    broker.close()
    audit.event("stopped")
    return EXIT_STOPPED
