"""The fake broker is a broker: clients in any process can't tell."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fdbroker.client import ProtocolError, connect
from fdbroker.client.answers import stat_of
from fdbroker.client.engine import AskWhy, StatPaths
from fdbroker.testing import FakeBroker
from fdbroker.wire.client import decode_reply, encode_hello, encode_open, encode_status
from fdbroker.wire.format import HEADER, Kind, Reason, Type
from fdbroker.wire.messages import ErrorReply, Hello, OpenRequest
from tests.client.brokers import say

if TYPE_CHECKING:
    from pathlib import Path


def test_it_gives_what_it_was_told_to_give() -> None:
    with FakeBroker({b"/a": b"content"}) as fake, fake.connect() as client:
        fake["/b"] = b"other"
        with client.open("/a") as a, client.open("/b") as b:
            assert (a.read(), b.read()) == (b"content", b"other")
        fake["/a"] = Reason.DENIED
        with pytest.raises(PermissionError):
            client.open("/a")
        del fake["/a"]
        with pytest.raises(FileNotFoundError):
            client.open("/a")
        with pytest.raises(KeyError):
            del fake["/a"]


@pytest.mark.parametrize("path", ["relative", "", "/a/", "/a//b", "/a/../b", "/a\0"])
def test_a_path_that_nobody_could_ask_for_is_a_value_error(path: str) -> None:
    with pytest.raises(ValueError, match="can't be asked"):
        FakeBroker({path: b""})


def test_content_of_another_type_is_a_type_error() -> None:
    with FakeBroker() as fake, pytest.raises(TypeError, match="bytes"):
        fake["/a"] = "text"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, PermissionError),
        (errno.ENOENT, FileNotFoundError),
        (errno.EAGAIN, BlockingIOError),
        (errno.EISDIR, IsADirectoryError),
        (errno.ENOTDIR, NotADirectoryError),
        (errno.ENOSPC, OSError),
    ],
)
def test_an_os_error_reaches_the_client_as_the_same_kind(number: int, expected: type[OSError]) -> None:
    with FakeBroker({"/a": OSError(number, "x")}) as fake, fake.connect() as client:
        with pytest.raises(expected) as caught:
            client.open("/a")
        assert caught.value.errno == number


def test_the_reason_for_other_paths_can_be_chosen() -> None:
    with FakeBroker(missing=Reason.DENIED) as fake, fake.connect() as client, pytest.raises(PermissionError):
        client.open("/a")


def test_descriptors_are_regular_read_only_sealed_and_each_its_own() -> None:
    with FakeBroker({"/a": b"content"}) as fake, fake.connect() as client:
        first, second = client.open_descriptor("/a"), client.open_descriptor("/a")
    try:
        assert os.read(first, 3) == b"con"
        assert os.read(second, 10) == b"content"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(first, b"x")
        seals = fcntl.fcntl(first, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_WRITE
        assert seals & fcntl.F_SEAL_SEAL
    finally:
        os.close(first)
        os.close(second)


def test_it_records_what_it_was_asked() -> None:
    with FakeBroker({"/a": b""}) as fake, fake.connect() as client:
        client.open("/a").close()
        hello, request = fake.requests
        assert isinstance(hello, Hello)
        assert request == OpenRequest(request.id, [b"/a"])


def test_a_program_in_another_process_can_use_it(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    program = (
        "import sys, fdbroker\n"
        "with fdbroker.connect(sys.argv[1]) as client, client.open('/a') as file:\n"
        "    sys.stdout.write(file.read().decode())\n"
    )
    with FakeBroker({"/a": b"across"}, socket_path=path):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, path], check=True, capture_output=True, text=True
        )
    assert done.stdout == "across"
    assert not path.exists()


def test_clients_of_several_connections_are_served_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with FakeBroker({"/a": b"x"}, socket_path=path) as fake, connect(path) as one, fake.connect() as two:
        for client in (one, two, one):
            client.open("/a").close()


def test_it_closes_with_clients_connected_and_more_than_once() -> None:
    fake = FakeBroker()
    client = fake.connect()
    fake.close()
    fake.close()
    with client, pytest.raises(ConnectionResetError):
        client.status()
    with pytest.raises(ValueError, match="closed"):
        fake.connect()


def test_a_path_that_is_taken_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    path.touch()
    with pytest.raises(OSError, match="in use"):
        FakeBroker(socket_path=path)


@pytest.mark.parametrize(
    ("frames", "descriptors"),
    [
        ([b"\0" * 12], 0),
        ([encode_hello(1), encode_hello(2)], 0),
        ([encode_status(1)], 0),
        ([HEADER.pack(Type.OPEN, 0, 0, 1, 0)], 0),
        ([encode_hello(1)], 1),
    ],
)
def test_it_says_what_is_malformed_and_closes(frames: list[bytes], descriptors: int) -> None:
    with FakeBroker() as fake, fake.connect_socket() as sock:
        for frame in frames:
            say(sock, frame, descriptors)
        replies = []
        while data := sock.recv(65536):
            replies.append(decode_reply(data))
        last = replies[-1]
        assert isinstance(last, ErrorReply)
        assert last.kind is Kind.MALFORMED
        assert len(replies) == len(frames)


def test_it_refuses_a_version_that_it_does_not_speak() -> None:
    with FakeBroker() as fake, fake.connect_socket() as sock:
        frame = bytearray(encode_hello(1))
        frame[20:24] = b"\x02\0\x03\0"
        say(sock, bytes(frame))
        reply = decode_reply(sock.recv(65536))
        assert isinstance(reply, ErrorReply)
        assert reply.reason is Reason.VERSION


def test_it_refuses_a_batch_above_its_limit() -> None:
    with FakeBroker({"/a": b""}, max_paths=1) as fake, fake.connect_socket() as sock:
        say(sock, encode_hello(1))
        decode_reply(sock.recv(65536))
        say(sock, encode_open(2, [b"/a", b"/a"]))
        reply = decode_reply(sock.recv(65536))
        assert isinstance(reply, ErrorReply)
        assert reply.reason is Reason.LIMIT


def test_a_client_that_goes_in_the_middle_leaves_nothing_behind() -> None:
    with FakeBroker({"/a": b""}) as fake:
        sock = fake.connect_socket()
        say(sock, encode_hello(1))
        say(sock, encode_open(2, [b"/a"] * 253))
        sock.shutdown(socket.SHUT_RD)
        sock.close()


def test_a_long_directory_comes_in_pages_that_fit_into_a_reply() -> None:
    files = {f"/d/{number:04}{'x' * 200}": b"" for number in range(300)}
    with FakeBroker(files, page=1024) as fake, fake.connect() as client:
        assert len(list(client.list("/d"))) == 300
        assert len(list(client.list("/d", page=7))) == 300
        assert [entry.name for entry in client.list("/")] == [b"d"]


def test_a_client_of_a_listener_that_nobody_serves_is_a_value_error() -> None:
    with FakeBroker() as fake, pytest.raises(ValueError, match="nobody serves 'clamd'"):
        fake.hand_over("clamd", timeout=0.01)


def test_it_acts_for_no_client_that_it_did_not_hand_over() -> None:
    with FakeBroker({"/a": b""}) as fake, fake.connect() as one, fake.connect() as two:
        with one.serve("clamd") as service, fake.hand_over("clamd"), service.accept(5) as served:
            served.stat("/a")
            stolen = StatPaths([b"/a"], served.number)
            with pytest.raises(PermissionError):
                stat_of(two._session.ask(stolen), b"/a")
        with pytest.raises(PermissionError):
            stat_of(one._session.ask(stolen), b"/a")


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_what_belongs_on_a_control_socket_is_malformed(kind: socket.SocketKind) -> None:
    with FakeBroker(kind=kind) as fake, fake.connect() as client, pytest.raises(ProtocolError):
        client._session.ask(AskWhy("open", b"/a"))


def test_a_deep_tree_is_walked_in_frames_that_fit_into_a_reply() -> None:
    files = {f"/d/{'x' * 200}/{number:03}{'y' * 200}": b"" for number in range(300)}
    with FakeBroker(files) as fake, fake.connect() as client:
        with client.walk("/d", batch=253, descriptors=False) as walk:
            assert len({entry.path for entry in walk}) == 300
        assert walk.end == (300, 0, 2, 0)
