"""From the command line to the broker: what is wanted, what is there, what has to be made, and execve.

In this order, so that whatever can fail fails before anything is made, and what
was made is taken away again if the rest fails.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fdbroker.config.compiled import launcher_fingerprint
from fdbroker.kernel.capabilities import capget
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH
from fdbroker.launcher.activation import check_services, take_from_systemd
from fdbroker.launcher.auditing import open_audit
from fdbroker.launcher.background import Detached, Waiting, go_into_background, wait_until_it_serves
from fdbroker.launcher.errors import EXIT_NOT_STARTED, LaunchError
from fdbroker.launcher.inherited import (
    check_connection,
    check_ready,
    fill_standard_descriptors,
    leave_standard_descriptors,
)
from fdbroker.launcher.listening import MadeSockets
from fdbroker.launcher.locking import PidFile, stop_holder
from fdbroker.launcher.options import STANDARD_OUTPUT, read_options
from fdbroker.launcher.plan import kinds_of_services, make_plan
from fdbroker.launcher.policies import CompileError, PendingPolicy
from fdbroker.launcher.until_ready import Made, Watcher, start_watcher, tell

if TYPE_CHECKING:
    from fdbroker.launcher.activation import Activation
    from fdbroker.launcher.options import Options
    from fdbroker.launcher.plan import Plan
    from fdbroker.launcher.policies import Policies
    from fdbroker.launcher.start import Start


def launch(arguments: list[str]) -> int:
    """Run fdbrokerd; return its exit status if this process does not become the broker."""
    fill_standard_descriptors()
    options = read_options(arguments)
    os.chdir("/")
    try:
        return _run(options)
    except CompileError as error:
        return error.status  # the child has said why
    except LaunchError as error:
        sys.stderr.write(f"fdbroker: {error}\n")
        return error.status
    except OSError as error:
        # Processes, pipes, memory: what can be said of a thing with a name was said where it was used.
        sys.stderr.write(
            f"fdbroker: the system refuses what a start needs: {error}; look at its memory and its limits"
            " (ulimit -a, or Limit*= and TasksMax= of the unit)\n"
        )
        return EXIT_NOT_STARTED


class _Passed(NamedTuple):
    """What was open before us, checked. `output_gone`: standard output was a client's connection."""

    activation: Activation
    connections: list[tuple[int, str]]
    output_gone: bool

    @property
    def has_requests(self) -> bool:
        """Return whether requests can come by what was passed."""
        return bool(self.activation.listeners or self.connections)


def _run(options: Options) -> int:
    if options.stop and options.pidfile is not None:  # which it then always is
        if not stop_holder(options.pidfile):
            sys.stderr.write(f"fdbroker: no broker holds the lock of {options.pidfile!r}\n")
        return 0
    if options.precompile:
        from fdbroker.launcher.precompiling import precompile  # noqa: PLC0415 - not for a start

        precompile()
        return 0
    _check_privilege()
    # Before anything is opened: a number that is not open now would be one of ours later.
    passed = _take_what_was_passed(options)
    pidfile = PidFile(options.pidfile) if options.pidfile is not None else None
    pending = PendingPolicy(options.policy, dev=options.dev)
    try:
        # What follows needs it; the child compiles meanwhile.
        import fdbroker.launcher.start  # noqa: F401, PLC0415

        policies = pending.finish()
    except BaseException:
        pending.abandon()
        raise
    check_services(passed.activation, kinds_of_services(policies.daemon, policies.broker["services"]))
    plan = make_plan(
        policies.daemon,
        options,
        requests_passed=passed.has_requests,
        control_passed=passed.activation.control is not None,
        services_passed=bool(passed.activation.services),
    )
    if plan.audit == STANDARD_OUTPUT and (passed.output_gone or options.background):
        where = "the client's connection" if passed.output_gone else "nowhere with --daemon"
        raise LaunchError(
            f"the audit would go to standard output, which is {where};"
            " name a file by audit.to in the policy or --audit, or say --audit none"
        )
    made = Made(MadeSockets(), pidfile)
    try:
        start = _prepare(options, passed, policies, plan, made)
        side = _stand_by(options, start, made)
    except BaseException:
        made.remove()
        raise
    # From here on what was made is the broker's, until it is known to have ended.
    if isinstance(side, Waiting):
        return _wait(side, made, options)
    return _become(start, side, pidfile)


def _check_privilege() -> None:
    """Say what everybody meets who is neither root nor a service: nothing else would tell it as well."""
    if os.geteuid() and not capget().effective >> CAP_DAC_READ_SEARCH & 1:
        raise LaunchError(
            "only root can start the broker, which then gives up everything but one capability; start it as"
            " root, or by systemd with AmbientCapabilities=CAP_DAC_READ_SEARCH"
        )


def _take_what_was_passed(options: Options) -> _Passed:
    activation = take_from_systemd()
    for number, _ in options.inherited:
        check_connection(number, "--inherited")
    connections = [*activation.connections, *options.inherited]
    numbers = [number for number, _ in (*connections, *activation.listeners, *activation.services)]
    numbers += [number for number in (activation.control, activation.notify) if number is not None]
    if options.ready is not None:
        check_ready(options.ready)
        numbers.append(options.ready)
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise LaunchError(f"descriptor {twice[0]} is given twice; each is for one thing")
    if options.background and (activation.has_sockets or activation.notify is not None):
        raise LaunchError(
            "--daemon does not go with sockets or notifications of systemd; use Type=notify and --foreground"
        )
    output = os.fstat(1)
    connections = leave_standard_descriptors(connections)
    return _Passed(activation, connections, not os.path.samestat(output, os.fstat(1)))


def _prepare(options: Options, passed: _Passed, policies: Policies, plan: Plan, made: Made) -> Start:
    """Open and make what the broker is started with."""
    from fdbroker.launcher.start import Start, names_and_paths  # noqa: PLC0415 - imported while the policy was compiled
    from fdbroker.launcher.unit_options import check_unit_options  # noqa: PLC0415 - likewise

    check_unit_options(names_and_paths(policies.broker))
    audit = open_audit(plan.audit, plan.uid, plan.gid)
    activation = passed.activation
    listeners = [
        *((number, name, None) for number, name in activation.listeners),
        *((number, name, name) for number, name in activation.services),
        *((made.sockets.make(wanted), wanted.name, wanted.service) for wanted in plan.listeners),
    ]
    control = activation.control
    if control is None and plan.control is not None:
        control = made.sockets.make(plan.control)
    return Start(
        uid=plan.uid,
        gid=plan.gid,
        policy=policies.broker,
        listeners=listeners,
        connections=passed.connections,
        control=control,
        audit=audit,
        ready=options.ready,
        notify=activation.notify,
        watchdog_usec=activation.watchdog_usec,
        held=[] if made.pidfile is None else [made.pidfile.descriptor],
        dev=options.dev,
        launcher_fingerprint=launcher_fingerprint(policies.daemon) if policies.daemon else None,
    )


def _stand_by(options: Options, start: Start, made: Made) -> Waiting | Detached | Watcher | None:
    """Fork who sees to what was made until the broker serves; None if nothing was made."""
    from fdbroker.launcher.start import descriptors_of  # noqa: PLC0415 - imported while the policy was compiled

    if options.background:
        return go_into_background(descriptors_of(start._replace(ready=None)))
    return start_watcher(made, options.ready) if made.descriptors() else None


def _wait(waiting: Waiting, made: Made, options: Options) -> int:
    status = wait_until_it_serves(waiting)
    if status:
        made.remove()
    else:
        tell(options.ready)
    return status


def _become(start: Start, side: Detached | Watcher | None, pidfile: PidFile | None) -> NoReturn:
    """Become the broker, in the background or here; who is told that it is ready sees to what was made."""
    from fdbroker.launcher.start import start_broker  # noqa: PLC0415 - imported while the policy was compiled

    try:
        if pidfile is not None:
            pidfile.write()
        start_broker(start if side is None else start._replace(ready=side.word))
    except BaseException:
        if isinstance(side, Watcher):
            side.wait()
        raise
