"""The clients of docs/examples: built as they say, and run by a user without rights against a broker."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fdbroker.testing import FakeBroker
from fdbroker.wire.format import Limit, Reason
from fdbroker.wire.messages import GIVEN, Hello, LimitReached, OpenRequest, Welcome, refused
from fdbroker.wire.replies import encode_open_reply, encode_welcome
from fdbroker.wire.requests import decode_request
from fdbroker.wire.stream import FrameBuffer, framed
from tests.running_broker import CLIENT_UID, policy, reachable_directory, rule, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.wire.messages import Request
    from tests.for_other_users import ForOtherUsers
    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
ODD = b"new\nline and \xff"
FILES = {b"a": b"first\n", b"b": bytes(range(256)) * 1000, b"empty": b"", ODD: b"odd"}


class Place(NamedTuple):
    """A running broker, its stream socket, the tree it serves, and the commands of the two clients."""

    broker: RunningBroker
    stream: Path
    tree: bytes
    clients: dict[str, list[str]]


@pytest.fixture(scope="module")
def place(others: ForOtherUsers) -> Iterator[Place]:
    with reachable_directory() as directory:
        tree = os.fsencode(directory / "tree")
        os.mkdir(tree)
        for name, content in {**FILES, b"secret": b"no"}.items():
            with open(os.open(tree + b"/" + name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(content)
        program = directory / "client"
        subprocess.run(
            ["cc", "-Wall", "-Wextra", "-Werror", "-O2", "-o", program, EXAMPLES / "client.c"], check=True
        )
        script = shutil.copy(EXAMPLES / "client.py", directory)
        # Whatever umask the checkout was made with.
        os.chmod(script, 0o644)
        os.chmod(program, 0o755)
        allowed = rule("all", **{"except": ["secret"]})
        stream = directory / "broker.stream"
        with running_broker(directory, policy(directory / "tree", allowed), f"--stream={stream}") as broker:
            yield Place(
                broker, stream, tree, {"C": [str(program)], "Python": [others.python, "-I", str(script)]}
            )


def run(
    place: Place, client: str, *names: bytes, socket_path: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a client, `C` or `Python`, with ` -s` behind its name over a stream."""
    paths = [place.tree + b"/" + name for name in names]
    name, _, option = client.partition(" ")
    usual = place.stream if option else place.broker.socket
    return subprocess.run(
        [*place.clients[name], *option.split(), str(socket_path or usual), *paths],
        user=CLIENT_UID,
        group=CLIENT_UID,
        extra_groups=[],
        env={"LANG": "C.UTF-8"},
        capture_output=True,
        timeout=60,
        check=False,
    )


both = pytest.mark.parametrize("client", ["C", "Python"])
both_over_both = pytest.mark.parametrize("client", ["C", "C -s", "Python", "Python -s"])


@both_over_both
def test_it_writes_the_very_bytes_of_files_that_its_user_may_not_open(place: Place, client: str) -> None:
    result = run(place, client, *FILES)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"".join(FILES.values())


@both_over_both
def test_it_tells_what_is_not_given_and_goes_on(place: Place, client: str) -> None:
    result = run(place, client, b"secret", b"a", b"none", ODD + b"/x", b"../secret", b"", b"b")
    assert result.returncode == 1
    assert result.stdout == FILES[b"a"] + FILES[b"b"]
    told = re.findall(rb"reason (\d+): (.*)", result.stderr)
    assert told == [
        (b"1", b"Permission denied"),
        (b"3", b"No such file or directory"),
        (b"4", b"Not a directory"),
        (b"2", b"Invalid argument"),
        (b"2", b"Invalid argument"),
    ]
    assert place.tree + b"/" + ODD + b"/x: reason" in result.stderr


@both_over_both
def test_it_asks_for_as_many_as_one_request_may_have_and_no_more(place: Place, client: str) -> None:
    result = run(place, client, *[b"a"] * 253)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == FILES[b"a"] * 253
    result = run(place, client, *[b"a"] * 254)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"more" in result.stderr


@both_over_both
def test_paths_that_are_too_long_together_are_not_sent_in_part(place: Place, client: str) -> None:
    result = run(place, client, b"x" * 40000, b"y" * 30000)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr


@both_over_both
def test_it_has_nothing_to_say_where_no_broker_is(place: Place, client: str) -> None:
    result = run(place, client, b"a", socket_path=place.broker.socket.with_name("none"))
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"No such file or directory" in result.stderr
    assert run(place, client).returncode == 2


@both
def test_a_broker_that_hangs_up_is_no_empty_file(place: Place, client: str, tmp_path: Path) -> None:
    with reachable_directory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "socket"))
        os.chmod(directory / "socket", 0o666)
        listener.listen()
        process = subprocess.Popen(
            [*place.clients[client], str(directory / "socket"), "/a"], stderr=subprocess.PIPE
        )
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.close()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"no answer" in errors


@both_over_both
def test_it_tells_what_is_above_a_limit_and_writes_the_rest(place: Place, client: str) -> None:
    limit = LimitReached(Limit.OPENS_PER_SECOND, 10, 100)
    files: dict[bytes, bytes | Reason | LimitReached | OSError] = {
        place.tree + b"/a": b"content",
        place.tree + b"/b": limit,
    }
    kind = socket.SOCK_STREAM if " -s" in client else socket.SOCK_SEQPACKET
    with (
        reachable_directory() as directory,
        FakeBroker(files, socket_path=directory / "socket", kind=kind) as fake,
    ):
        os.chmod(directory / "socket", 0o666)
        result = run(place, client, b"b", b"a", b"b", socket_path=directory / "socket")
        assert (result.returncode, result.stdout) == (1, b"content")
        assert result.stderr.count(b"reason 12: Resource temporarily unavailable") == 2
        fake.limit_requests(limit)
        result = run(place, client, b"a", socket_path=directory / "socket")
        assert (result.returncode, result.stdout) == (2, b"")
        assert result.stderr.endswith(b": too much at once\n")


@both
def test_it_puts_a_stream_together_that_comes_in_the_smallest_parts(place: Place, client: str) -> None:
    """Descriptors come with the first byte of their frame, whatever parts it is received in."""
    with reachable_directory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / "socket"))
        os.chmod(directory / "socket", 0o666)
        listener.listen()
        process = subprocess.Popen(
            [*place.clients[client], "-s", str(directory / "socket"), "/a", "/b", "/c"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        connection, _ = listener.accept()
        buffer = FrameBuffer()
        with connection, open(place.tree + b"/a", "rb") as first, open(place.tree + b"/b", "rb") as second:
            assert isinstance(_next_request(connection, buffer), Hello)
            _dribble(connection, encode_welcome(Welcome(0, 1, 1, 0, 0, 253, 65536, 256, 0)), [])
            asked = _next_request(connection, buffer)
            assert isinstance(asked, OpenRequest)
            assert asked.paths == [b"/a", b"/b", b"/c"]
            reply = encode_open_reply(asked.id, 1, [GIVEN, refused(Reason.DENIED), GIVEN])
            _dribble(connection, reply, [first.fileno(), second.fileno()])
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output == FILES[b"a"] + FILES[b"b"]
    assert b"/b: reason 1" in errors


def _next_request(connection: socket.socket, buffer: FrameBuffer) -> Request:
    while (frame := buffer.next_frame()) is None:
        data = connection.recv(65536)
        assert data, "the client hung up"
        buffer.add(data)
    return decode_request(frame)


def _dribble(connection: socket.socket, frame: bytes, descriptors: list[int]) -> None:
    sent = framed(frame)
    if descriptors:
        socket.send_fds(connection, [sent[:1]], descriptors)
    else:
        connection.send(sent[:1])
    for at in range(1, len(sent)):
        connection.send(sent[at : at + 1])


def test_the_protocols_pages_lead_to_all() -> None:
    pages = ("protocol.md", "scan-protocol.md")
    text = "".join((EXAMPLES.parent / page).read_text() for page in pages)
    assert {path.name for path in EXAMPLES.iterdir()} == set(re.findall(r"\(examples/([a-z.]+)\)", text))
