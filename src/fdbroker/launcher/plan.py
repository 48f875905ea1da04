"""What is to be started: the command line over the policy, and what systemd passed over both."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.config.defaults import (
    ADD_USER,
    DEFAULT_GROUP_OF_CLIENTS,
    DEFAULT_USER,
    FOR_REQUESTS,
    MAX_SOCKET_PATH,
    MODES,
    SERVICE_KIND,
)
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.inherited import KINDS
from fdbroker.launcher.listening import WantedSocket
from fdbroker.launcher.options import NONE, STANDARD_OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fdbroker.launcher.options import Options


class Plan(NamedTuple):
    """Whom the broker runs as, which sockets are made, and where the audit goes."""

    uid: int
    gid: int
    listeners: list[WantedSocket]
    control: WantedSocket | None
    audit: str


def make_plan(
    daemon: Mapping[str, Any],
    options: Options,
    *,
    requests_passed: bool,
    control_passed: bool,
    services_passed: bool = False,
) -> Plan:
    """Return what is to be done. `daemon` is the launcher's part of a compiled policy, which may be empty.

    `requests_passed`: a listening socket or a connection for requests was
    passed; `control_passed`: a control socket was; `services_passed`: that of
    a service was. Whoever passes a socket or names one on the command line
    wants that one, and not the policy's besides.

    Raises:
        LaunchError: something is named nowhere, or does not exist on this system.

    """
    try:
        uid, gid = options.user or _user_of(daemon)
        use_policy = not (requests_passed or control_passed or services_passed or options.sockets)
        listeners = [
            WantedSocket(
                path,
                _or(options.socket_gid, 0),
                _or(options.socket_mode, MODES[kind]),
                os.path.basename(path),
                kind,
            )
            for path, kind in options.sockets
        ]
        if use_policy and daemon:
            listeners += _listeners_of(daemon, options)
        control = _control_of(daemon, options, use_policy=use_policy)
        audit = options.audit or daemon.get("audit") or STANDARD_OUTPUT
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(error) from error
    if control_passed and options.control is not None:
        raise LaunchError(
            "systemd passed a control socket, and --control says otherwise; leave --control out, or stop and"
            " disable that .socket unit"
        )
    if not listeners and not requests_passed:
        raise LaunchError(
            "there is nothing to serve: systemd passed no socket for requests; start the .socket unit with"
            " FileDescriptorName=seqpacket as well, or give --socket"
            if control_passed or services_passed
            else "there is nothing to serve: the compiled policy names no listeners; compile it anew, or give"
            " --socket"
        )
    for wanted in listeners if control is None else [*listeners, control]:
        if len(os.fsencode(wanted.path)) > MAX_SOCKET_PATH:
            raise LaunchError(
                f"socket {wanted.path!r} can't be made: nobody can connect to a path of more than"
                f" {MAX_SOCKET_PATH} bytes; choose a shorter one"
            )
    return Plan(uid, gid, listeners, control, audit)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def kinds_of_services(daemon: Mapping[str, Any], services: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return of which kind the listener of each service is; `services` as in the broker's policy.

    Raises:
        LaunchError: `daemon` is no launcher's part of a compiled policy.

    """
    try:
        listeners = daemon["listeners"] if daemon else {}
        unnamed = {"kind": SERVICE_KIND}
        return {one["name"]: str(listeners.get(one["name"], unnamed)["kind"]) for one in services}
    except (AttributeError, KeyError, TypeError) as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> LaunchError:
    return LaunchError(f"the policy's part for the launcher can't be used ({error!r}); compile it anew")


def _user_of(daemon: Mapping[str, Any]) -> tuple[int, int]:
    if daemon.get("uid") is not None:
        return int(daemon["uid"]), int(daemon["gid"])
    try:
        entry = pwd.getpwnam(DEFAULT_USER)
    except KeyError:
        raise LaunchError(
            f"there is no user {DEFAULT_USER!r} on this system, whom the broker runs as; create it"
            f" ({ADD_USER} {DEFAULT_USER}), or name another by `user` in the policy or --user"
        ) from None
    return entry.pw_uid, entry.pw_gid


def _listeners_of(daemon: Mapping[str, Any], options: Options) -> list[WantedSocket]:
    """Return the policy's sockets for requests, and for clients of services."""
    wanted = []
    for name, listener in daemon["listeners"].items():
        if name == "control":
            continue
        gid, mode = listener["gid"], int(listener["mode"])
        service = name
        if name in FOR_REQUESTS:
            gid, mode = _or(options.socket_gid, gid), _or(options.socket_mode, mode)
            service = None
        if gid is None:
            raise LaunchError(
                f"there is no group {DEFAULT_GROUP_OF_CLIENTS!r} on this system, whose members may connect;"
                f" create it (groupadd --system {DEFAULT_GROUP_OF_CLIENTS}), or name another by `listeners:"
                f" {{{name}: {{group: NAME}}}}` in the policy or --socket-group"
            )
        kind = str(listener["kind"])
        if kind not in KINDS:
            raise ValueError(kind)
        wanted.append(WantedSocket(str(listener["path"]), int(gid), mode, name, kind, service))
    return wanted


def _control_of(daemon: Mapping[str, Any], options: Options, *, use_policy: bool) -> WantedSocket | None:
    if options.control == NONE:
        return None
    listener = daemon["listeners"]["control"] if daemon else {"gid": 0, "mode": MODES["control"]}
    path = options.control
    if path is None:
        if not (use_policy and daemon):
            return None
        path = str(listener["path"])
    return WantedSocket(path, int(listener["gid"]), int(listener["mode"]), "control")
