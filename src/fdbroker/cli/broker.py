"""The way to the broker, and what to say where there is none."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import socket
import stat
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from fdbroker import client
from fdbroker.cli.failure import EXIT_ERROR, Failure
from fdbroker.cli.output import shell_word
from fdbroker.client.control import DEFAULT_CONTROL
from fdbroker.client.link import Deadline, connect_socket
from fdbroker.config.names import group_name, printable, user_name

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET_VARIABLE = "FDBROKER_SOCKET"
CONTROL_VARIABLE = "FDBROKER_CONTROL"
SERVICE = "fdbroker.service"
_SOCKET_UNITS = {
    client.DEFAULT_SOCKET: "fdbroker-seqpacket.socket",
    DEFAULT_CONTROL: "fdbroker-control.socket",
}
_BY_HAND = "fdbrokerd --stop && fdbrokerd --daemon"
_UNIT_DIRECTORIES = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
_NO_TIMEOUT = b"\0" * 16  # struct timeval
_MOST_DESCRIPTORS = 1 << 20  # above every limit of open files that there is by default
_STANDARD_ERROR = 2

_Command = TypeVar("_Command", bound="Callable[..., object]")


def socket_option(command: _Command) -> _Command:
    """Give a command the option --socket; without it that of the group, the environment's or the default."""
    return click.option(
        "--socket",
        "socket_path",
        type=click.UNPROCESSED,
        metavar="PATH",
        is_eager=True,
        callback=_from_group,
        help=f"The broker's socket.  [environment: {SOCKET_VARIABLE}; default: {client.DEFAULT_SOCKET}]",
    )(command)


def descriptors_option(command: _Command) -> _Command:
    """Give the group the option --fd: the descriptors of a connection that is there already."""
    return click.option(
        "--fd",
        "descriptors",
        metavar="N[,M]",
        callback=_descriptors,
        help="Use the connection that is open as descriptor N, instead of a socket; N,M where one is to read"
        " from and one to write to, as a UCSPI client has them: --fd 6,7.",
    )(command)


def _descriptors(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers = value.split(",")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):  # noqa: PLR2004 - as said
        raise click.BadParameter(f"{value!r} is not one number of a descriptor, or two: 6,7")
    if any(len(number) > len(str(_MOST_DESCRIPTORS)) for number in numbers):
        raise click.BadParameter(f"{value}: there are no descriptors of such numbers")
    return tuple(map(int, numbers))


def given_descriptors() -> tuple[int, ...] | None:
    """Return what --fd of the group has, None without it."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.find_root().params.get("descriptors")


def control_option(command: _Command) -> _Command:
    """Give a command the option --control: None where another socket is named, but no control socket."""
    return click.option(
        "--control",
        "control_path",
        type=click.UNPROCESSED,
        metavar="PATH",
        callback=_control_from_group,
        help="The broker's control socket.  [environment: "
        f"{CONTROL_VARIABLE}; default: {DEFAULT_CONTROL}, if --socket names no other broker]",
    )(command)


def _from_group(context: click.Context, _parameter: click.Parameter, value: str | None) -> str:
    """Return the socket's path; where --fd has the connection, what to call it."""
    group = context.find_root()
    descriptors = group.params.get("descriptors")
    if descriptors is None:
        return value or group.params.get("socket_path") or client.DEFAULT_SOCKET
    if value or group.get_parameter_source("socket_path") is ParameterSource.COMMANDLINE:
        raise click.UsageError(
            "--fd has a connection, and --socket names where to make one: leave one of them away."
        )
    return f"descriptor {descriptors[0]}"


def _control_from_group(context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Return the control socket, None where only another broker's is known."""
    group = context.find_root()
    if value or group.get_parameter_source("control_path") is ParameterSource.COMMANDLINE:
        return value or group.params["control_path"]
    # --socket of this command was read before: it is eager.
    socket_path = context.params.get("socket_path") or _from_group(context, _parameter, None)
    told: str | None = group.params.get("control_path")
    if group.params.get("descriptors") is not None or any(
        each.get_parameter_source("socket_path") is ParameterSource.COMMANDLINE for each in (context, group)
    ):
        told = None  # the environment speaks of the broker that is meant without an option
    return told or (DEFAULT_CONTROL if socket_path == client.DEFAULT_SOCKET else None)


def connect(socket_path: str, exit_code: int = EXIT_ERROR) -> client.Client:
    """Return a client, which the caller closes.

    Raises:
        Failure: there is no way to the broker; the text says what to do.

    """
    try:
        return open_client(socket_path, exit_code)
    except client.BrokerError as error:
        raise Failure(str(obstacle(socket_path, error)), exit_code) from error


def open_client(socket_path: str, exit_code: int = EXIT_ERROR) -> client.Client:
    """Return a client, which the caller closes: of the socket, or on the connection that --fd has.

    Raises:
        BrokerError: as `fdbroker.connect` or `Client.from_socket`.
        Failure: --fd has no connection to a broker.

    """
    descriptors = given_descriptors()
    if descriptors is None:
        return client.connect(os.fsencode(socket_path))
    try:
        return client.Client.from_socket(_given_socket(descriptors, exit_code))
    except ValueError as error:
        raise Failure(f"--fd {descriptors[0]}: {printable(str(error))}", exit_code) from error


def _given_socket(descriptors: tuple[int, ...], exit_code: int) -> socket.socket:
    """Return the socket that was inherited under these numbers, which are free or /dev/null afterwards.

    Raises:
        Failure: one is not open, is no socket, or is another socket than the other.

    """
    sockets = set()
    for number in descriptors:
        try:
            status = os.fstat(number)
        except OSError as error:
            raise Failure(
                f"--fd: descriptor {number} is not open ({error.strerror}). It is for a connection that was"
                " made before, as in: unixclient SOCKET fdbroker --fd 6,7 cat PATH",
                exit_code,
            ) from error
        if not stat.S_ISSOCK(status.st_mode):
            raise Failure(f"--fd: descriptor {number} is no socket, so it leads to no broker.", exit_code)
        sockets.add((status.st_dev, status.st_ino))
    if len(sockets) > 1:
        first, second = descriptors
        raise Failure(
            f"--fd: descriptors {first} and {second} are two sockets. Files come over one connection, so both"
            " must be of the same socket.",
            exit_code,
        )
    # With close-on-exec, and above those that what follows may take for something else.
    taken = fcntl.fcntl(descriptors[0], fcntl.F_DUPFD_CLOEXEC, _STANDARD_ERROR + 1)
    # Nothing else may keep the connection open, nor a program that takes this one's place.
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in set(descriptors):
        if number > _STANDARD_ERROR:
            os.close(number)
        else:
            os.dup2(nowhere, number)
    os.close(nowhere)
    return socket.socket(fileno=taken)


def connect_only(socket_path: str, exit_code: int) -> socket.socket:
    """Return a connection on which nothing was said yet; the caller owns it.

    Raises:
        Failure: as `connect`.

    """
    descriptors = given_descriptors()
    if descriptors is not None:
        return _given_socket(descriptors, exit_code)
    try:
        sock = connect_socket(os.fsencode(socket_path), Deadline.after(client.DEFAULT_TIMEOUT))
    except client.BrokerError as error:
        raise Failure(str(obstacle(socket_path, error)), exit_code) from error
    # The time-out was for connecting; whoever uses it next knows nothing of it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NO_TIMEOUT)
    return sock


class Obstacle(NamedTuple):
    """What is in the way to the broker, with its place, and what helps; both printable."""

    found: str
    cure: str

    def __str__(self) -> str:
        """Return both as sentences."""
        return f"{self.found}{'' if self.found.endswith('?') else '.'} {self.cure}"


def obstacle(socket_path: str, error: client.BrokerError, option: str = "--socket") -> Obstacle:
    """Return why the broker can't be asked by this socket."""
    shown = printable(socket_path)
    variable = SOCKET_VARIABLE if option == "--socket" else CONTROL_VARIABLE
    elsewhere = f"If its socket is elsewhere, say where: {option} PATH, or {variable} in the environment."
    if isinstance(error, client.UnavailableError):
        if error.errno == errno.ENOENT:
            cure = f"{_how_to_start(socket_path)} {elsewhere}"
            return Obstacle(f"{shown}: no broker has its socket there", cure)
        if error.errno == errno.ECONNREFUSED:
            found = f"{shown}: the socket is there, but no broker listens on it any more"
            return Obstacle(found, _how_to_start(socket_path))
        if error.errno == errno.EACCES:
            who, cure = _who_may_connect(socket_path)
            return Obstacle(f"{shown}: you may not connect to this broker: {who}", cure)
        if error.errno == errno.ENOTSOCK:
            return Obstacle(f"{shown}: this is no socket", elsewhere)
    return Obstacle(f"{shown}: {printable(error.strerror or str(error))}", "The broker's log may say more.")


def systemd_runs() -> bool:
    """Return whether systemd is this machine's init; sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def is_a_service() -> bool:
    """Return whether systemd is to start the broker here: it runs, and has a unit of this name."""
    return systemd_runs() and any(os.path.exists(f"{directory}/{SERVICE}") for directory in _UNIT_DIRECTORIES)


def service_runs() -> bool:
    """Return whether systemd has the broker's service running, as far as it says so."""
    from fdbroker.cli.checks.check import output_of  # noqa: PLC0415 - only where there is no broker

    return (output_of("systemctl", "is-active", SERVICE) or "").strip() == "active"


def how_to_restart() -> str:
    """Return the command for root that starts the broker anew."""
    if is_a_service():
        return f"systemctl restart {SERVICE}"
    return _BY_HAND


def _how_to_start(socket_path: str) -> str:
    if is_a_service():
        socket_unit = _SOCKET_UNITS.get(socket_path)
        if socket_unit is not None and service_runs():
            # systemd passes sockets when a service starts, and starts none of one that runs.
            return (
                f"Its service runs without it. As root: systemctl stop {SERVICE}; systemctl restart"
                f" {socket_unit}; systemctl start {SERVICE}."
            )
        return f"Start it, as root: systemctl start {SERVICE}. Why it ended says journalctl -u {SERVICE}."
    if (
        shutil.which("fdbrokerd", path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")
        is None
    ):
        return (
            "fdbrokerd, which starts it, is not found on this machine: install it (pip install"
            " 'fdbroker[daemon]'), then run as root: fdbrokerd --daemon."
        )
    return "Start it, as root: fdbrokerd --daemon."


def _who_may_connect(socket_path: str) -> tuple[str, str]:
    """Return who may connect, and how to become one of them."""
    try:
        status = os.stat(socket_path)
    except OSError:
        directory = printable(os.path.dirname(socket_path))
        return f"you have no access to {directory}, where its socket is", "Ask whoever administers it."
    group, user = group_name(status.st_gid), user_name(os.geteuid())
    if status.st_mode & stat.S_IWGRP and status.st_gid:
        if status.st_gid in _groups_when_logging_in(user):
            return f"its group {group} may, which you joined after this session began", "Log in again."
        return (
            f"members of the group {group} may",
            f"As root: usermod -aG {group} {user}; then log in again (newgrp is enough for one shell).",
        )
    mode, owner = f"0{stat.S_IMODE(status.st_mode):03o}", user_name(status.st_uid)
    found = f"its socket has mode {mode} and belongs to {owner} and the group {group}"
    return found, "'listeners' in the policy file says who may connect."


def _groups_when_logging_in(user: str) -> list[int]:
    try:
        return os.getgrouplist(user, pwd.getpwnam(user).pw_gid)
    except KeyError:
        return []


# The client is told the same of what no rule allows and of what is not as a rule with conditions asks.
DENIED = "denied by the broker's policy (or it is not there as asked for, where a rule asks about the file)"


def refusal(path: bytes, error: client.BrokerError, socket_path: str, action: str = "open") -> str:
    """Return why the broker does not give a path and what helps, printable."""
    if isinstance(error, client.DeniedError) and error.reason is client.Reason.DENIED:
        return f"{printable(path)}: {DENIED}. {see_why(path, socket_path, action)}"
    return f"{printable(path)}: {printable(error.strerror or str(error))}"


def see_why(path: bytes, socket_path: str, action: str = "open", service: str | None = None) -> str:
    """Return the command that shows why this user was denied a path, in a sentence.

    `service`: the user of the service that asked on behalf of this one, if one did.

    It is for root: who is denied a file can mostly look at neither the policy nor the file.
    """
    beginning, options = "See why", []
    user = shell_word(os.fsencode(user_name(os.geteuid())))
    if os.geteuid() != 0:
        beginning += ", as root"
    if service is not None:
        options.append(f"--as {service} --on-behalf-of {user} ")
    elif os.geteuid() != 0:
        options.append(f"--as {user} ")
    if action != "open":
        options.append(f"--action {action} ")
    if socket_path != client.DEFAULT_SOCKET:
        beginning += f" (FILE: the policy of the broker on {printable(socket_path)})"
        options.append("--policy FILE ")
    return f"{beginning}: fdbroker policy explain {''.join(options)}{shell_word(path)}"
