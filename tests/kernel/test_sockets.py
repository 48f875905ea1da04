"""Receiving where nobody may send descriptors: none is left over, whatever comes."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        yield here, there


def send_with_descriptors(sock: socket.socket, count: int) -> None:
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sock.sendmsg([b"data"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * count))])
    finally:
        os.close(null)


def open_descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_data_come_with_the_credentials_that_were_asked_for(pair: Pair) -> None:
    here, there = pair
    sockets.ask_for_credentials(here)
    there.send(b"data")
    expected = struct.pack("=iII", os.getpid(), os.getuid(), os.getgid())
    assert sockets.receive_data(here, 100) == (b"data", expected, 0)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 253])
def test_descriptors_are_told_of_and_none_is_left_open(pair: Pair, count: int, *, asks: bool) -> None:
    here, there = pair
    if asks:
        sockets.ask_for_credentials(here)
    send_with_descriptors(there, count)
    before = open_descriptors()
    data, credentials, flags = sockets.receive_data(here, 100)
    assert open_descriptors() == before
    assert data == b"data"
    assert (credentials is not None) is asks
    assert flags == sockets.CONTROL_TRUNCATED


def test_message_that_is_too_long_is_told_of(pair: Pair) -> None:
    here, there = pair
    there.send(b"too long")
    assert sockets.receive_data(here, 3) == (b"too", None, sockets.DATA_TRUNCATED)


def test_end_of_the_connection_is_no_data_and_no_flags(pair: Pair) -> None:
    here, there = pair
    there.close()
    data, _, flags = sockets.receive_data(here, 100)
    assert (data, flags) == (b"", 0)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_what_is_accepted_is_as_socket_accept_would_give_it(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as listener, socket.socket(socket.AF_UNIX, kind) as client:
        listener.bind("")
        listener.listen(1)
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            sockets.accept(listener, kind)
        client.connect(listener.getsockname())
        with sockets.accept(listener, kind) as accepted:
            assert (accepted.family, accepted.type, accepted.proto) == (socket.AF_UNIX, kind, 0)
            assert os.get_blocking(accepted.fileno())
            assert not os.get_inheritable(accepted.fileno())
            client.send(b"x")
            assert accepted.recv(1) == b"x"
