"""The same requests over every transport: the same answers, byte for byte, and the same audit."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fdbroker.wire.client import (
    OpenReply,
    encode_cancel,
    encode_hello,
    encode_list,
    encode_more,
    encode_open,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import MAX_FRAME, Kind, Reason, Type
from fdbroker.wire.messages import ErrorReply
from tests.broker.speaking import (
    DatagramSpeaker,
    Speaker,
    StreamSpeaker,
    check_audit,
    descriptors_of,
    frame,
    read_opened,
)
from tests.broker.stepping import SteppedBroker
from tests.broker.test_loop import BAD_HELLOS, MALFORMED, kernel_refuses_rights
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from pathlib import Path


FILES = 253


class Way(NamedTuple):
    """How a client comes: by a listener (its name in the audit) or, None, by a pair that is there already."""

    kind: type[Speaker]
    listener: str | None

    def come(self, broker: SteppedBroker, directory: Path, *, hello: bool = True) -> Speaker:
        """Return a new client that came this way."""
        if self.listener is None:
            return broker.join(self.kind, hello=hello)
        path = directory / self.listener
        if not path.exists():
            broker.listen(directory, kind=self.kind, name=self.listener)
        speaker = broker.call(path, self.kind, hello=hello)
        if not isinstance(speaker, DatagramSpeaker):
            speaker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
        return speaker


WAYS = {
    "seqpacket": Way(Speaker, "seqpacket"),
    "stream": Way(StreamSpeaker, "stream"),
    "seqpacket-pair": Way(Speaker, None),
    "stream-pair": Way(StreamSpeaker, None),
    "datagram": Way(DatagramSpeaker, "datagram"),
}
CONNECTIONS = [name for name, way in WAYS.items() if way.kind is not DatagramSpeaker]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture
def connection(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture
def speaker(stepped: SteppedBroker, way: Way, tmp_path: Path) -> Speaker:
    return way.come(stepped, tmp_path)


def test_a_file_is_given(stepped: SteppedBroker, speaker: Speaker) -> None:
    assert speaker.open(bytes(stepped.tree / "file"))[0][:] == ("ok", 0, b"content")
    assert stepped.reasons() == ["ok"]


def test_a_file_is_refused_on_its_own(stepped: SteppedBroker, speaker: Speaker) -> None:
    tree = stepped.tree
    asked = [b"/etc/passwd", bytes(tree / "file"), b"", bytes(tree / "missing"), bytes(tree / "link")]
    asked += [bytes(tree / "directory" / "inner"), bytes(tree / "fifo"), b"relative", bytes(tree / "..")]
    opened = speaker.open(*asked)
    assert [entry.reason for entry in opened] == [
        "denied", "ok", "path_invalid", "not_found", "symlink",
        "ok", "not_regular", "path_invalid", "path_invalid",
    ]  # fmt: skip
    assert [entry.content for entry in opened if entry.content] == [b"content", b"inner"]


def test_a_full_reply_has_253_descriptors(stepped: SteppedBroker, speaker: Speaker) -> None:
    for number in range(FILES):
        (stepped.tree / f"n{number}").write_bytes(b"%d" % number)
    opened = speaker.open(*[bytes(stepped.tree / f"n{number}") for number in range(FILES)])
    assert [entry.content for entry in opened] == [b"%d" % number for number in range(FILES)]
    stepped.serve()
    assert stepped.reasons() == ["ok"] * FILES


def test_given_descriptors_are_open_file_descriptions_of_their_own(
    stepped: SteppedBroker, speaker: Speaker
) -> None:
    answer = speaker.ask(encode_open(7, [bytes(stepped.tree / "file")] * 2))
    with answer.descriptors as descriptors:
        first, second = descriptors.numbers()
        assert os.read(first, 3) == b"con"
        assert os.read(second, 100) == b"content"
        assert os.get_blocking(first)


def test_copies_come_inline(tree: Path, tmp_path: Path, way: Way) -> None:
    compiled = policy(tree, rule("all", deliver=["copy"]))
    (tree / "large").write_bytes(bytes(20_000))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        speaker = way.come(broker, tmp_path)
        asked = [bytes(tree / name) for name in ("file", "large", "empty")]
        answer = speaker.ask(encode_open(7, asked, copy=True))
        assert not answer.descriptors
        assert answer.raw.endswith(b"content")
        assert isinstance(answer.reply, OpenReply)
        assert [result.status.name for result in answer.reply.results] == ["COPIED", "REFUSED", "COPIED"]


def test_files_are_described(stepped: SteppedBroker, speaker: Speaker) -> None:
    paths = [bytes(stepped.tree / "file"), bytes(stepped.tree / "link"), b"/etc"]
    (file, facts), (link, link_facts), (outside, nothing) = speaker.stat(*paths).results
    status = os.lstat(paths[0])
    assert facts is not None
    assert (facts.device, facts.inode, facts.size) == (status.st_dev, status.st_ino, 7)
    assert link_facts is not None
    assert file.status == link.status == 0
    assert (outside.reason, nothing) == (Reason.DENIED, None)
    assert len(speaker.stat(*paths[:1] * FILES).results) == FILES


def test_a_directory_is_listed_page_by_page(stepped: SteppedBroker, speaker: Speaker) -> None:
    for number in range(1000):
        (stepped.tree / "directory" / f"n{number}").touch()
    for most in (0, 70, 1024):
        names = speaker.list_all(bytes(stepped.tree / "directory"), most)
        assert sorted(names) == sorted(os.listdir(bytes(stepped.tree / "directory")))
    assert speaker.page(b"/etc").result.reason == Reason.DENIED


def requests(tree: Path) -> list[bytes]:
    """Return what all transports can be asked."""
    paths = [bytes(tree / name) for name in ("file", "missing", "directory", "link", "\udcff\n")]
    return [
        encode_open(0, paths),
        encode_open(0xFFFFFFFF, [bytes(tree / "file")] * FILES),
        encode_open(3, [b"/etc/shadow"]),
        encode_open(4, paths, copy=True),
        encode_stat(5, paths),
        encode_stat(5, [bytes(tree / "file")] * FILES),
        encode_list(6, bytes(tree)),
        encode_list(7, bytes(tree), most=2),
        encode_list(8, bytes(tree), cookie=12345),
        encode_list(9, bytes(tree / "file")),
        encode_open(10, [b"/" * 65_000]),
    ]


def told(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records without what differs each time, or between transports."""
    differs = {"seq", "time", "run", "connection", "socket"}
    return [{key: value for key, value in record.items() if key not in differs} for record in records]


def test_answers_and_audit_are_the_same_on_all_of_them(stepped: SteppedBroker, tmp_path: Path) -> None:
    seen = {}
    for name, way in WAYS.items():
        already = len(stepped.records())
        speaker = way.come(stepped, tmp_path)
        answers = [speaker.ask(request) for request in requests(stepped.tree)]
        counts = [len(answer.descriptors) for answer in answers]
        for answer in answers:
            answer.descriptors.close()
        seen[name] = [answer.raw for answer in answers], counts, told(stepped.records()[already:])
    expected = seen.pop("seqpacket")
    assert sum(expected[1]) == FILES + 2
    for name, found in seen.items():
        assert found == expected, name
    check_audit(stepped.records())


@pytest.mark.parametrize("connection", CONNECTIONS, indirect=True)
def test_hello_comes_first_and_once_where_there_are_connections(
    stepped: SteppedBroker, connection: Way, tmp_path: Path
) -> None:
    speaker = connection.come(stepped, tmp_path, hello=False)
    assert speaker.error(encode_status(1)).text == "the first frame is not a hello"
    assert speaker.is_closed()
    speaker = connection.come(stepped, tmp_path)
    assert speaker.error(encode_hello(1)).text == "a second hello"
    assert speaker.is_closed()


@pytest.mark.parametrize("connection", CONNECTIONS, indirect=True)
def test_status_is_of_the_connection(stepped: SteppedBroker, connection: Way, tmp_path: Path) -> None:
    status = connection.come(stepped, tmp_path).status()
    assert (status["peer"]["pid"], status["in_flight"]) == (os.getpid(), 0)


@pytest.mark.parametrize("connection", CONNECTIONS, indirect=True)
def test_many_requests_at_once_are_answered_in_order(
    stepped: SteppedBroker, connection: Way, tmp_path: Path
) -> None:
    speaker = connection.come(stepped, tmp_path)
    for number in range(30):
        speaker.send(
            encode_open(number, [bytes(stepped.tree / "file")] * (number % 4))
            if number % 4
            else encode_status(number)
        )
    for _ in range(30):
        stepped.serve()
    for number in range(30):
        answer = speaker.receive()
        assert answer is not None
        with answer.descriptors as descriptors:
            assert (answer.reply.id, len(descriptors)) == (number, number % 4)


# what breaks the protocol

CASES = {**MALFORMED, **{f"hello: {name}": case for name, case in BAD_HELLOS.items() if name != "open"}}


@pytest.mark.parametrize("case", CASES)
def test_malformed_frame_is_told_and_recorded_in_the_same_words(
    stepped: SteppedBroker, way: Way, tmp_path: Path, case: str
) -> None:
    sent, said = CASES[case]
    if issubclass(way.kind, StreamSpeaker) and not 12 <= len(sent) <= MAX_FRAME:
        said = f"a frame of {len(sent)} bytes: it has 12 to {MAX_FRAME}"
    speaker = way.come(stepped, tmp_path, hello=not case.startswith("hello: "))
    error = speaker.error(sent)
    assert (error.kind, error.reason, error.errno) == (Kind.MALFORMED, Reason.MALFORMED, errno.EPROTO)
    assert said in error.text
    record = stepped.records()[-1]
    assert (record["event"], record["reason"]) == ("malformed", error.text)
    assert record["request"] == error.id in {77, 0}
    assert stepped.malformed == 1
    if way.kind is DatagramSpeaker:
        assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"
    else:
        assert speaker.is_closed()
        assert stepped.connections == 0


@pytest.mark.parametrize(
    "sent",
    [
        encode_hello(77),
        encode_status(77),
        encode_more(77, 1),
        encode_cancel(77),
        frame(Type.WALK, body=struct.pack("<IHHQQq", 1, 1, 0, 0, 0, 0) + b"/a\0"),
        frame(Type.SERVE, body=b"clamd"),
        frame(Type.RELEASE, count=1, body=bytes(4)),
        frame(Type.EXPLAIN, count=1, body=b"/a"),
        frame(Type.RELOAD, body=bytes(8)),
        frame(Type.OPEN, flags=1, count=1, body=bytes(4) + b"/a"),
        frame(Type.STAT, flags=1, count=1, body=bytes(4) + b"/a"),
        frame(Type.LIST, flags=1, body=bytes(4) + bytes(8) + b"/a"),
    ],
    ids=lambda sent: f"{sent[0]:#04x}-{sent[1]}",
)
def test_a_datagram_asks_for_nothing_that_needs_a_connection(
    stepped: SteppedBroker, tmp_path: Path, sent: bytes
) -> None:
    speaker = WAYS["datagram"].come(stepped, tmp_path)
    error = speaker.error(sent)
    assert (error.kind, error.id) == (Kind.MALFORMED, 77)
    assert error.text.endswith("is not for this socket")
    assert stepped.events() == ["malformed"]
    assert stepped.reasons() == []


@pytest.fixture
def rights_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a kernel without SO_PASSRIGHTS."""
    monkeypatch.setattr("fdbroker.kernel.sockets.SO_PASSRIGHTS", 9999)


def send_rights(speaker: Speaker, sent: bytes, count: int) -> None:
    with open("/dev/null", "rb") as null:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * count))]
        where = [speaker._path] if isinstance(speaker, DatagramSpeaker) else []
        data = struct.pack("<I", len(sent)) + sent if isinstance(speaker, StreamSpeaker) else sent
        speaker.sock.sendmsg([data], rights, 0, *where)


@pytest.mark.parametrize("count", [1, 2, 5, 253])
def test_descriptors_that_reach_it_are_closed_and_break_the_protocol(
    stepped: SteppedBroker, way: Way, tmp_path: Path, rights_reach_it: None, count: int
) -> None:
    speaker = way.come(stepped, tmp_path)
    speaker.open_one(b"/")
    before = descriptors_of()
    send_rights(speaker, encode_open(77, [bytes(stepped.tree / "file")]), count)
    stepped.serve()
    if isinstance(speaker, DatagramSpeaker):
        # They may have taken the room of what says who it was.
        assert speaker.is_silent()
        assert descriptors_of() == before
        record = stepped.records()[-1]
        assert (record["event"], record["reason"]) == ("datagram_refused", "descriptors_sent")
        assert (record["pid"], record["uid"]) == (os.getpid(), os.getuid())
        return
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert answer.reply.text == "descriptors were sent to the broker, which takes none"
    assert stepped.reasons() == ["outside_roots"]
    assert speaker.is_closed()
    assert len(descriptors_of()) == len(before) - 2  # the connection and its peer's pidfd


@pytest.mark.skipif(not kernel_refuses_rights(), reason="SO_PASSRIGHTS needs Linux 6.16")
def test_descriptors_are_refused_to_their_sender_by_the_kernel(
    stepped: SteppedBroker, speaker: Speaker
) -> None:
    with pytest.raises(PermissionError):
        send_rights(speaker, encode_open(7, [b"/a"]), 1)
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


def test_clients_that_leave_leave_nothing_behind(stepped: SteppedBroker, way: Way, tmp_path: Path) -> None:
    way.come(stepped, tmp_path).close()
    before = descriptors_of()
    for _ in range(5):
        with way.come(stepped, tmp_path) as speaker:
            assert len(read_opened(speaker.ask(encode_open(7, [bytes(stepped.tree / "file")] * 9)))) == 9
        with way.come(stepped, tmp_path) as speaker:
            # With what it was given, not received.
            speaker.send(encode_open(7, [bytes(stepped.tree / "file")] * 9))
        stepped.serve()
    assert descriptors_of() == before
    # Who was answered by datagram is asked for when the next one comes.
    with way.come(stepped, tmp_path) as speaker:
        speaker.open_one(b"/")
    assert stepped.in_flight == 0
    check_audit(stepped.records())
