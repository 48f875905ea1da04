"""What systemd hands to its services: listening sockets, by name, a place for notifications, a watchdog."""

from __future__ import annotations

import os
import re
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.config.defaults import FOR_REQUESTS, NAMES_OF_SYSTEMD
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.inherited import check_connection, check_listener

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAMES_CURE = (
    "name them by FileDescriptorName= of the .socket unit: seqpacket, stream or dgram for requests, control,"
    " or the name of a service in listeners of the policy"
)
_NAME_OF_A_SERVICE = re.compile(r"[a-z0-9][a-z0-9_-]*")  # as the policy takes them


class Activation(NamedTuple):
    """What came. The descriptors are the caller's; sockets have their names.

    `services`: what has the name of a service, as far as can be said without
    the policy; `check_services` says the rest.
    """

    listeners: list[tuple[int, str]]
    services: list[tuple[int, str]]
    connections: list[tuple[int, str]]
    control: int | None
    notify: int | None
    watchdog_usec: int | None

    @property
    def has_sockets(self) -> bool:
        """Return whether there is any socket to serve."""
        return bool(self.listeners or self.services or self.connections or self.control is not None)


def take_from_systemd() -> Activation:
    """Take what the environment speaks of, and take it out of the environment.

    Raises:
        LaunchError: a socket is not what its name says, or has a name that is not known.

    """
    listeners: list[tuple[int, str]] = []
    services: list[tuple[int, str]] = []
    connections: list[tuple[int, str]] = []
    controls: list[int] = []
    for number, name in passed_descriptors().items():
        what = _what(name)
        if name == "connection":  # that of Accept=yes, whatever FileDescriptorName= says
            check_connection(number, what)
            connections.append((number, name))
            continue
        if name in FOR_REQUESTS:
            check_listener(number, what, name)
            listeners.append((number, name))
        elif name == "control":
            check_listener(number, what, "seqpacket")
            controls.append(number)
        elif _NAME_OF_A_SERVICE.fullmatch(name) and name not in NAMES_OF_SYSTEMD:
            services.append((number, name))
        else:
            raise LaunchError(f"{what}: no socket of fdbroker has this name; {_NAMES_CURE}")
    if len(controls) > 1:
        raise LaunchError(f"systemd passed {len(controls)} sockets with the name 'control'; keep one")
    notify = connect_notify_socket()
    watchdog = None if notify is None else watchdog_usec()
    control = controls[0] if controls else None
    return Activation(listeners, services, connections, control, notify, watchdog)


def check_services(activation: Activation, kinds: Mapping[str, str]) -> None:
    """Check the listeners of services, whose names the policy has: of each it says the kind of socket.

    Raises:
        LaunchError: one has another name, or is not what a service's listener is.

    """
    for number, name in activation.services:
        if name not in kinds:
            raise LaunchError(
                f"{_what(name)}: no socket of fdbroker has this name, and no service in listeners of the"
                f" policy; {_NAMES_CURE}. Or stop and disable that unit"
            )
        check_listener(number, _what(name), kinds[name])


def _what(name: str) -> str:
    return f"socket {name!r} of systemd"


def passed_descriptors() -> dict[int, str]:
    """Return number and name of each, close-on-exec. They come in any order, and in another one next time.

    They are taken out of the environment, and are the caller's.

    Raises:
        LaunchError: there are some, and the package that takes them is not installed.

    """
    if "LISTEN_FDS" not in os.environ:
        return {}
    try:
        import systemd.daemon  # noqa: PLC0415 - by hand it is not needed
    except ImportError as error:
        raise LaunchError(
            "systemd passes sockets, and the Python package systemd-python, which takes them, is not"
            " installed; install fdbroker[daemon]"
        ) from error
    passed: dict[int, str] = systemd.daemon.listen_fds_with_names(unset_environment=True)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # libsystemd took it out behind Python's back
    return passed


def connect_notify_socket() -> int | None:
    """Return a socket that is connected to where the service manager listens, None if it does not."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            # An abstract name begins with a NUL, which can't be in an environment.
            sock.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        except OSError as error:
            sys.stderr.write(
                f"fdbroker: NOTIFY_SOCKET {address!r} can't be reached ({error.strerror});"
                " nobody will be told when it serves\n"
            )
            return None
        return sock.detach()


def watchdog_usec() -> int | None:
    """Return within how many microseconds a ping is expected; sd_watchdog_enabled(3)."""
    text = os.environ.pop("WATCHDOG_USEC", "")
    if not text or os.environ.pop("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # no watchdog, or that of another process
    if not (text.isascii() and text.isdigit() and int(text)):
        raise LaunchError(f"WATCHDOG_USEC is {text!r}, not a number of microseconds; let systemd set it")
    return int(text)
