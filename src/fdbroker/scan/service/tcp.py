"""Clients of clamd that come by TCP: of this machine, and more is not known of them.

The kernel does not say who is at the other end. So they may ask for nothing but what needs no rights: PING,
VERSION, and the verdict of what they send themselves (INSTREAM). Together they are one user among those who
take turns and share memory. Each connection is a trust domain of its own: no worker has files of two.

So many of them have a connection, and who they are can't be told: one may have all. Where all are taken and
somebody waits, the one who has kept the service waiting longest gives way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import math
import os
import socket
from typing import TYPE_CHECKING, cast

from fdbroker.clamd.protocol import FOR_STRANGERS, TIMED_OUT, Kind
from fdbroker.launcher.errors import LaunchError
from fdbroker.scan.service.clamd import ClamdClient
from fdbroker.scan.service.core import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fdbroker.aio import ServedClient
    from fdbroker.scan.service.clamd import _Command
    from fdbroker.scan.service.configuration import Listener, Tcp
    from fdbroker.scan.service.core import Core

NAME_OF_SOCKET = "clamd-tcp"  # FileDescriptorName= of the unit that passes it
UNIT = "fdbroker-clamd-tcp.socket"
# The user that they are together; uids begin with 0.
STRANGERS = -1
_BACKLOG = 128
_ACCEPTED_AT_ONCE = 16  # before others have their turn
_SECONDS_WITHOUT_DESCRIPTORS = 1.0
# Who keeps the service waiting for so long gives way, where there is no room for others.
_SECONDS_OF_GRACE = 5.0


def listening_socket(tcp: Tcp | None, passed: Mapping[int, str]) -> socket.socket | None:
    """Return the socket to listen on, which the caller closes; None where there is to be none.

    `passed`: descriptors that the service manager has passed, with their names; they are this function's.

    Raises:
        LaunchError: a socket that was passed is none of these, or is missing; or the address can't be had.

    """
    with contextlib.ExitStack() as stack:
        ours = []
        for number, name in passed.items():
            # Whatever it is, it is closed by its number.
            stack.callback(os.close, number)
            if name != NAME_OF_SOCKET:
                raise LaunchError(
                    f"socket {name!r} of systemd: the scan service takes {NAME_OF_SOCKET!r} alone; its other"
                    " clients come by the broker, whose unit has their sockets"
                )
            ours.append(number)
        if len(ours) > 1:
            raise LaunchError(
                f"systemd passed {len(ours)} sockets {NAME_OF_SOCKET!r}; keep one ListenStream= of {UNIT}"
            )
        if tcp is not None and tcp.port is not None:
            if ours:
                raise LaunchError(
                    f"tcp: port: systemd has passed a socket ({UNIT}); remove address and port, or disable it"
                )
            return _bound(tcp.address, tcp.port)
        if ours:
            _check(ours[0])
            stack.pop_all()
            sock = socket.socket(fileno=ours[0])
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    if tcp is not None:
        raise LaunchError(f"tcp: systemd has passed no socket; enable and start {UNIT}, or write port: 3310")
    return None


def _bound(address: str, port: int) -> socket.socket:
    where = _shown((address, port))
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by what is accepted: without it, the second of two answers waits for the client's
            # word that it has the first.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((address, port))
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        cure = ""
        if error.errno in {errno.EAFNOSUPPORT, errno.EPERM, errno.EADDRNOTAVAIL}:
            cure = f"; its unit has no network: remove address and port, and enable {UNIT}"
        elif error.errno == errno.EADDRINUSE:
            cure = "; is clamd still running?"
        raise LaunchError(f"tcp: it can't listen at {where}: {error.strerror}{cure}") from error
    return sock


def _check(number: int) -> None:
    what = f"socket {NAME_OF_SOCKET!r} of systemd"
    try:
        sock = socket.socket(fileno=os.dup(number))
    except OSError as error:
        raise LaunchError(f"{what}: it is no socket ({error.strerror})") from error
    with sock:
        if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type != socket.SOCK_STREAM:
            raise LaunchError(f"{what}: it is no TCP socket; write ListenStream=127.0.0.1:3310")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise LaunchError(f"{what}: it does not listen; set Accept=no")
        if not is_loopback(sock.getsockname()[0]):
            raise LaunchError(
                f"{what}: {_shown(sock.getsockname())} is no loopback address, and nobody is asked who they"
                " are; write ListenStream=127.0.0.1:3310"
            )


def is_loopback(address: str) -> bool:
    """Return whether an address is one of this machine's own, that nobody else can reach."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _shown(address: tuple[str | int, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


class _Stranger:
    """Who has connected; in the place of a client that the broker has handed over."""

    uid = STRANGERS

    def __init__(self, sock: socket.socket, on_close: Callable[[], None]) -> None:
        self.socket = sock
        self._on_close = on_close

    def close(self) -> None:
        """Close the connection. May be called again."""
        if self.socket.fileno() >= 0:
            self.socket.close()
            self._on_close()


class TcpClient(ClamdClient):
    """A connection that came by TCP; owns it."""

    def __init__(self, core: Core, stranger: _Stranger, name: str, domain: int, listener: Listener) -> None:
        self._name = name
        self._domain = domain
        self._last_moved = asyncio.get_running_loop().time()
        # It asks the broker for nothing, so nobody calls what a client that is known has besides.
        super().__init__(core, cast("ServedClient", stranger), listener)

    @property
    def waits_for_it_since(self) -> float | None:
        """Since when (of the loop) it has neither said nor read anything; None: it waits for the service.

        Or it was told all: then it is closed in a moment anyway.
        """
        its_turn = (self._reading and not self._commands) or self._write_timer is not None
        return self._last_moved if its_turn else None

    def give_way(self) -> None:
        """Close it, and say what who is late is told."""
        self._send_and_close(TIMED_OUT + b"\n")

    def _on_event(self, events: int) -> None:
        self._last_moved = self._loop.time()
        super()._on_event(events)

    def _settle(self) -> None:
        was_waited_for = self._reading
        super()._settle()
        if self._reading and not was_waited_for:  # there was no room for what it has said, and is again
            self._last_moved = self._loop.time()

    def _end(self, command: _Command) -> None:
        self._last_moved = self._loop.time()  # its turn begins
        super()._end(command)

    def _may_ask_for(self) -> frozenset[Kind]:
        return FOR_STRANGERS

    def _owner_of_streams(self) -> int:
        return self._domain

    def _who(self) -> str:
        return self._name


class TcpListener:
    """Takes those who connect, so many at a time, until it is closed; `sock` is the caller's."""

    def __init__(self, core: Core, sock: socket.socket, tcp: Tcp) -> None:
        self.name = _shown(sock.getsockname())
        self._core = core
        self._sock = sock
        self._tcp = tcp
        self._loop = asyncio.get_running_loop()
        self._clients: dict[int, TcpClient] = {}  # by their numbers
        # No number comes again, so that no worker has what it was handed for another connection.
        self._domains = itertools.count(STRANGERS - 1, -1)
        self._pause: asyncio.TimerHandle | None = None  # there are no descriptors
        self._full: asyncio.TimerHandle | None = None  # there is no room
        self._closed = False
        self._listen()

    def close(self) -> None:
        """Take nobody any more. Those who have connected stay."""
        self._closed = True
        self._loop.remove_reader(self._sock)
        for timer in (self._pause, self._full):
            if timer is not None:
                timer.cancel()

    def _listen(self) -> None:
        if self._full is not None:
            self._full.cancel()
        self._pause = self._full = None
        if not self._closed:
            self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        """Take who waits; where there is no room for the first, the kernel keeps them, up to the backlog."""
        if not self._has_room() and not self._make_room():
            self._loop.remove_reader(self._sock)
            self._full = self._loop.call_later(_SECONDS_OF_GRACE / 5, self._listen)
            return
        for _ in range(_ACCEPTED_AT_ONCE):
            if not self._has_room():
                return
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionError:  # it is gone already
                continue
            except OSError as error:
                say(f"a client by TCP could not be accepted: {error.strerror}")
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(_SECONDS_WITHOUT_DESCRIPTORS, self._listen)
                return
            sock.settimeout(0)
            # The kernel lets others reach loopback addresses where net.ipv4.conf.*.route_localnet is set.
            if is_loopback(peer[0]):
                self._take(sock, _shown(peer))
            else:
                say(f"a client by TCP was refused: {_shown(peer)} is not on this machine")
                sock.close()

    def _take(self, sock: socket.socket, peer: str) -> None:
        number = next(self._domains)
        stranger = _Stranger(sock, lambda: self._one_less(number))
        try:
            client = TcpClient(self._core, stranger, f"tcp {peer}", number, self._tcp.speaks)
        except OSError as error:  # no more descriptors can be watched
            stranger.close()
            say(f"a client by TCP could not be served: {error.strerror}")
            return
        if sock.fileno() >= 0:  # it was not answered, and gone, by now
            self._clients[number] = client

    def _has_room(self) -> bool:
        return len(self._clients) < self._tcp.connections

    def _make_room(self) -> bool:
        """Have somebody give way; return whether there is anybody."""
        waited_for = [
            (since, client)
            for client in self._clients.values()
            if (since := client.waits_for_it_since) is not None
        ]
        since, client = min(waited_for, key=lambda one: one[0], default=(math.inf, None))
        if client is None or since > self._loop.time() - _SECONDS_OF_GRACE:
            return False
        client.give_way()
        return True

    def _one_less(self, number: int) -> None:
        self._clients.pop(number, None)
        if self._full is not None:
            self._listen()
