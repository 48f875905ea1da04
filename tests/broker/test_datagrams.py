"""Datagrams: who sent them, who is answered, and what one sender can do to others."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import traceback
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker.identity import probe_level
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.kernel.peers import read_ucred
from fdbroker.wire.client import OpenReply, encode_open, encode_stat, encode_status
from fdbroker.wire.messages import ErrorReply
from tests.broker.conftest import fill, no_descriptor_left
from tests.broker.speaking import DatagramSpeaker, check_audit, descriptors_of, read_opened
from tests.broker.stepping import SteppedBroker
from tests.processes import become, in_child
from tests.running_broker import CLIENT_UID, OTHER_UID, policy, rule
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FILES = 253
GROUP = FIRST_UID + 59
CLONE_NEWNET = 0x40000000


class Served:
    """A stepped broker with a socket for datagrams that every uid can reach."""

    def __init__(self, broker: SteppedBroker, path: Path) -> None:
        self.broker = broker
        self.path = path
        self.file = bytes(broker.tree / "file")
        self._uid = os.getuid()

    def speaker(self, *, serve: bool = True) -> DatagramSpeaker:
        """Return a client that lets the broker work, or not."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        speaker = DatagramSpeaker(sock, self.broker.serve if serve else None, broker_uid=self._uid)
        speaker.reach(self.path)
        return speaker

    def ask(self, request: bytes, *, sent_by: Callable[[DatagramSpeaker], None] | None = None) -> list[str]:
        """Ask as whoever `sent_by` makes of a child; return the reasons, or nothing without an answer."""
        with self.speaker(serve=False) as speaker:
            if sent_by is None:
                speaker.send(request)
            else:
                in_child(lambda: sent_by(speaker))
            self.broker.serve()
            if speaker.is_silent():
                return []
            return received(speaker)

    def last(self) -> tuple[str, str]:
        """Return the event and reason of the last record."""
        record = self.broker.records()[-1]
        return record["event"], record["reason"]


@contextlib.contextmanager
def served(directory: Path, *rules: dict[str, object]) -> Iterator[Served]:
    tree = directory / "tree"
    tree.mkdir()
    fill(tree)
    compiled = policy(tree, *rules, limits={"connections_per_uid": 8, "in_flight_per_connection": 512})
    with no_descriptor_left(), SteppedBroker(tree, compiled, audit=directory / "audit") as broker:
        yield Served(broker, broker.listen(directory, kind=DatagramSpeaker))
        check_audit(broker.records())


@pytest.fixture
def dgram(reachable: Path) -> Iterator[Served]:
    with served(reachable) as made:
        yield made


def request(dgram: Served, count: int = 1) -> bytes:
    return encode_open(7, [dgram.file] * count)


def received(speaker: DatagramSpeaker) -> list[str]:
    """Receive the answer to a request to open, and return its reasons."""
    answer = speaker.receive()
    assert answer is not None
    return [entry.reason for entry in read_opened(answer)]


def as_uid(dgram: Served, uid: int, *, gid: int | None = None, groups: tuple[int, ...] = ()) -> list[str]:
    """Ask as another uid, from a process that waits until it was answered."""

    def client() -> None:
        become(uid, gid, groups)
        with dgram.speaker(serve=False) as speaker:
            speaker.send(request(dgram))
            there.send(b"sent")
            answer = speaker.receive()
            assert answer is not None
            here_reasons = ",".join(entry.reason for entry in read_opened(answer))
            there.send(here_reasons.encode())

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, in_background(client):
        assert here.recv(100) == b"sent"
        dgram.broker.serve()
        here.settimeout(30)
        return here.recv(10_000).decode().split(",")


@contextlib.contextmanager
def in_background(function: Callable[[], None]) -> Iterator[int]:
    """Run a function in a child; its failure is that of the test."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - shown, then ended
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, status = os.waitpid(pid, 0)
    assert status == 0


# Who sent it


@pytest.mark.root
def test_a_datagram_is_of_the_user_who_sent_it(reachable: Path) -> None:
    mine = rule("mine", clients=[{"uids": [CLIENT_UID]}])
    with served(reachable, mine) as dgram:
        assert as_uid(dgram, CLIENT_UID) == ["ok"]
        assert as_uid(dgram, OTHER_UID) == ["denied"]
        records = dgram.broker.records()
        assert [(record["uid"], record["gid"]) for record in records] == [
            (CLIENT_UID, CLIENT_UID),
            (OTHER_UID, OTHER_UID),
        ]
        assert all("connection" not in record for record in records)


@pytest.mark.root
def test_of_groups_the_primary_one_counts_and_no_other(reachable: Path) -> None:
    group = rule("group", clients=[{"gids": [GROUP]}])
    with served(reachable, group) as dgram:
        assert as_uid(dgram, CLIENT_UID, gid=GROUP) == ["ok"]
        assert as_uid(dgram, CLIENT_UID, groups=(GROUP,)) == ["denied"]


@pytest.mark.root
def test_a_rule_that_denies_a_group_holds_since_the_sender_may_be_in_it(reachable: Path) -> None:
    """Or its members would ask by datagram for what they are denied on a connection."""
    of_others = rule("others", effect="deny", clients=[{"uids": [OTHER_UID], "gids": [GROUP]}])
    with served(reachable, rule("all"), of_others) as dgram:
        assert as_uid(dgram, OTHER_UID, groups=(GROUP,)) == ["denied"]
        assert as_uid(dgram, OTHER_UID) == ["denied"]
        assert as_uid(dgram, CLIENT_UID) == ["ok"]
        assert [record["reason"] for record in dgram.broker.records()] == ["deny_rule", "deny_rule", "ok"]


@pytest.mark.root
def test_what_was_decided_for_one_process_of_a_user_is_not_for_another(reachable: Path) -> None:
    """While one has not received its answer its user is remembered, and nothing of what it may."""

    def first() -> None:
        become(CLIENT_UID, GROUP)
        with dgram.speaker(serve=False) as speaker:
            speaker.send(request(dgram))
            there.send(b"sent")
            there.recv(1)
            assert received(speaker) == ["ok"]

    with served(reachable, rule("group", clients=[{"gids": [GROUP]}])) as dgram:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here, there, in_background(first):
            assert here.recv(10) == b"sent"
            dgram.broker.serve()
            assert as_uid(dgram, CLIENT_UID) == ["denied"]
            assert as_uid(dgram, CLIENT_UID, gid=GROUP) == ["ok"]
            here.send(b"x")


def test_a_datagram_is_of_the_process_that_wrote_it_whoever_holds_the_socket(dgram: Served) -> None:
    """What the protocol warns of; on a connection the sender must be who connected."""
    asked = dgram.path.with_name("asked")
    asked.write_bytes(request(dgram))
    with dgram.speaker(serve=False) as holder:
        holder.sock.connect(str(dgram.path))
        # It writes what it reads to its standard output, and goes on reading.
        command = ["cat", str(asked), "-"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=holder.sock.fileno()) as writer:
            dgram.broker.broker.step(30)
            # Connected, its holder would not be reached.
            record = dgram.broker.records()[0]
            assert (record["pid"], record["decision"]) == (writer.pid, "allow")


@pytest.mark.root
@pytest.mark.skipif(probe_level().level < 2, reason=probe_level().reason)
@pytest.mark.parametrize(
    "ids",
    [(CLIENT_UID, 0, 0), (0, CLIENT_UID, 0), (CLIENT_UID, OTHER_UID, 0)],
    ids=["real", "effective", "both"],
)
def test_a_sender_whose_real_and_effective_ids_differ_gets_no_answer(
    dgram: Served, ids: tuple[int, int, int]
) -> None:
    """As in a program with set-user-ID, which may be made to write by whoever started it."""

    def client() -> None:
        with dgram.speaker(serve=False) as speaker:
            os.setresuid(*ids)
            speaker.send(request(dgram))
            there.send(b"sent")
            there.recv(1)
            assert speaker.is_silent()

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, in_background(client):
        here.recv(100)
        dgram.broker.serve()
        here.send(b"x")
    assert dgram.last() == ("datagram_refused", "sent_with_other_ids")


@pytest.mark.root
def test_a_sender_who_names_ids_that_are_not_its_own_gets_no_answer(dgram: Served) -> None:
    """Root may put any ids into SCM_CREDENTIALS; they are not those of its process."""
    if probe_level().level < 2:
        pytest.skip(probe_level().reason)
    with dgram.speaker() as speaker:
        forged = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("=iII", os.getpid(), 1, 1))
        speaker.sock.sendmsg([request(dgram)], [forged], 0, str(dgram.path))
        dgram.broker.serve()
        assert speaker.is_silent()
    assert dgram.last() == ("datagram_refused", "sent_with_other_ids")


@pytest.mark.skipif(probe_level().level < 1, reason=probe_level().reason)
def test_a_sender_who_has_exited_gets_no_answer(dgram: Served) -> None:
    assert dgram.ask(request(dgram), sent_by=lambda speaker: speaker.send(request(dgram))) == []
    assert dgram.last() == ("datagram_refused", "peer_has_exited")


def test_a_datagram_from_before_credentials_were_asked_for_gets_no_answer(
    stepped: SteppedBroker, tmp_path: Path
) -> None:
    path = tmp_path / "early"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(path))
    # Without SO_PASSCRED on either side nothing is said of who sent it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        sock.sendto(encode_open(7, [bytes(stepped.tree / "file")]), str(path))
        stepped.broker.add_listener(listener, "early")
        stepped.serve()
    record = stepped.records()[-1]
    assert (record["event"], record["reason"]) == ("datagram_refused", "identity_without_mapping")


@pytest.mark.root
def test_nobody_is_no_sender(dgram: Served) -> None:
    def client() -> None:
        become(65534)
        with dgram.speaker(serve=False) as speaker:
            speaker.send(request(dgram))
            there.send(b"sent")
            there.recv(1)

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, in_background(client):
        here.recv(100)
        dgram.broker.serve()
        here.send(b"x")
    assert dgram.last() == ("datagram_refused", "identity_without_mapping")


def test_the_answer_is_of_the_broker_and_from_another_address(dgram: Served) -> None:
    with dgram.speaker() as speaker:
        speaker.send(request(dgram))
        data, ancillary, _, address = speaker.sock.recvmsg(65536, 4096)
        assert data[0] == 0x82
        credentials = [content for _, kind, content in ancillary if kind == socket.SCM_CREDENTIALS]
        assert read_ucred(credentials[0]) == (os.getpid(), os.getuid(), os.getgid())
        assert isinstance(address, bytes)
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                Descriptors(sockets._numbers(content)).close()


# Addresses


def without_address(_directory: Path, sock: socket.socket) -> None:
    assert not sock.getsockname()


def by_path(directory: Path, sock: socket.socket) -> None:
    sock.bind(str(directory / "client"))


def abstract(name: bytes) -> Callable[[Path, socket.socket], None]:
    return lambda _directory, sock: sock.bind(name)


@pytest.mark.parametrize(
    "bind",
    [
        without_address,
        by_path,
        *map(
            abstract,
            [b"\0fdbroker", b"\0", b"\x000000", b"\x00000000", b"\x0000G00", b"\x000000A", b"\x0000000\n"],
        ),
        *map(abstract, [b"\x0000000\0", b"\0\x0000000", b"\x00/a/b/", b"\x00" + b"0" * 107]),
    ],
)
def test_a_sender_whose_address_the_kernel_did_not_choose_gets_no_answer(
    dgram: Served, reachable: Path, bind: Callable[[Path, socket.socket], None]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        bind(reachable, sock)
        sock.sendto(request(dgram), str(dgram.path))
        dgram.broker.serve()
        with pytest.raises(BlockingIOError):
            sock.recv(1, socket.MSG_DONTWAIT)
    assert dgram.last() == ("datagram_refused", "sender_without_autobound_address")
    assert dgram.broker.reasons() == []


@pytest.mark.parametrize("trick", ["rename", "symbolic link", "hard link", "from the beginning"])
def test_an_answer_can_not_be_steered_into_the_socket_of_another(
    dgram: Served, reachable: Path, trick: str
) -> None:
    """Who takes descriptors from strangers, as journald does, must not be given any by our hand."""
    victim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    attacker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs, own = reachable / "victim", reachable / "attacker"
    with victim, attacker:
        victim.bind(str(theirs))
        sockets.ask_for_credentials(victim)
        if trick == "from the beginning":
            own = theirs
        else:
            attacker.bind(str(own))
        attacker.sendto(request(dgram, 5), str(dgram.path))
        if trick == "rename":
            theirs.rename(own)
        elif trick == "symbolic link":
            own.unlink()
            own.symlink_to(theirs)
        elif trick == "hard link":
            own.unlink()
            os.link(theirs, own)
        before = descriptors_of()
        dgram.broker.serve()
        # Its socket is where an answer would have gone.
        if trick != "from the beginning":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as proof:
                proof.sendto(b"proof", str(own))
            assert victim.recv(100) == b"proof"
        with pytest.raises(BlockingIOError):
            victim.recv(1, socket.MSG_DONTWAIT)
        assert descriptors_of() == before
        assert dgram.broker.in_flight == 0
    assert dgram.broker.reasons() == []


def test_an_answer_to_an_address_that_is_free_again_goes_nowhere(dgram: Served) -> None:
    before = descriptors_of()
    with dgram.speaker(serve=False) as speaker:
        speaker.send(request(dgram, 5))
    dgram.broker.serve()
    assert dgram.broker.reasons() == ["ok"] * 5
    record = dgram.broker.records()[-1]
    assert (record["event"], record["errno"], record["request"]) == ("undelivered", errno.ECONNREFUSED, 7)
    assert dgram.broker.in_flight == 0
    assert len(descriptors_of()) == len(before)


def test_a_sender_that_has_connected_its_socket_is_not_reached(dgram: Served) -> None:
    """What such a socket receives is from the socket it named alone."""
    with dgram.speaker(serve=False) as speaker:
        speaker.sock.connect(str(dgram.path))
        speaker.sock.send(request(dgram))
        dgram.broker.serve()
        assert speaker.is_silent()
    record = dgram.broker.records()[-1]
    assert (record["event"], record["errno"]) == ("undelivered", errno.EPERM)


@pytest.mark.root
def test_what_is_steered_from_another_network_namespace_has_the_id_that_its_sender_chose(
    dgram: Served,
) -> None:
    """The same address may exist in each, and nobody can tell: so the protocol asks for ids hard to guess."""

    def elsewhere() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(victim.sock.getsockname())
            sock.sendto(encode_open(99, [dgram.file]), str(dgram.path))
            there.send(b"sent")
            there.recv(1)

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with dgram.speaker(serve=False) as victim, here, there, in_background(elsewhere) as pid:
        assert here.recv(100) == b"sent"
        dgram.broker.serve()
        here.send(b"x")
        answer = victim.receive()
        assert answer is not None
        answer.descriptors.close()
        assert answer.reply.id == 99
        # It is on record as who it was.
        assert dgram.broker.records()[-1]["pid"] == pid


# Who does not receive


def flood(dgram: Served, speaker: DatagramSpeaker, frame: bytes, count: int) -> None:
    for _ in range(count):
        speaker.send(frame)
        dgram.broker.serve()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["open", "stat"])
def test_a_uid_that_never_receives_loses_its_own_answers_and_others_get_theirs(
    dgram: Served, kind: str
) -> None:
    frame = request(dgram, FILES) if kind == "open" else encode_stat(7, [dgram.file] * FILES)

    def never_receives() -> None:
        become(CLIENT_UID)
        speakers = [dgram.speaker(serve=False) for _ in range(30)]
        for speaker in speakers:
            speaker.send(frame)
            there.send(b"sent")
            there.recv(1)
        assert not speakers[0].is_silent()
        there.send(b"done")
        there.recv(1)

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, in_background(never_receives):
        for _ in range(30):
            here.recv(100)
            dgram.broker.serve()
            here.send(b"x")
        assert here.recv(100) == b"done"
        assert dgram.broker.in_flight <= 512
        for uid in (OTHER_UID, CLIENT_UID + 10, CLIENT_UID + 11):
            assert as_uid(dgram, uid) == ["ok"]
        here.send(b"x")
    events = [record.get("reason") for record in dgram.broker.records() if "decision" not in record]
    if kind == "open":
        assert events.count("replies_not_received") == 28
    # Once they are gone, that uid is served again.
    assert as_uid(dgram, CLIENT_UID) == ["ok"]
    assert dgram.broker.in_flight <= 1


@pytest.mark.root
def test_what_one_process_receives_says_nothing_of_what_waits_for_another_of_its_uid(dgram: Served) -> None:
    with dgram.speaker() as deaf, dgram.speaker() as other:
        deaf.send(request(dgram, FILES))
        # Sent after what waits, and received before it; as long, with one descriptor.
        other.send(encode_open(7, [dgram.file] + [b"/nowhere"] * (FILES - 1)))
        assert received(other)[0] == "ok"
        flight = dgram.broker.broker._flight
        for client in tuple(flight._clients):  # as where it is tight
            flight.settle(client)
        assert flight.total >= FILES


@pytest.mark.root
def test_more_uids_than_there_are_sockets_for_answers_are_served_one_after_the_other(dgram: Served) -> None:
    for number in range(40):
        assert as_uid(dgram, CLIENT_UID + number) == ["ok"]
        datagrams = dgram.broker.broker._datagrams
        assert datagrams is not None
        own = [*datagrams._free, *(client.sock for client in datagrams._clients.values())]
        assert len({sock.fileno() for sock in own}) == len(own) == 16


@pytest.mark.root
def test_sixteen_uids_that_never_receive_keep_out_no_others_than_new_ones_and_not_for_ever(
    dgram: Served,
) -> None:
    silent = []
    with contextlib.ExitStack() as stack:
        for number in range(17):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(ours)
            stack.enter_context(theirs)
            uid = CLIENT_UID + number

            def client(uid: int = uid, theirs: socket.socket = theirs) -> None:
                become(uid)
                with dgram.speaker(serve=False) as speaker:
                    speaker.send(request(dgram))
                    theirs.send(b"sent")
                    theirs.recv(1)

            stack.enter_context(in_background(client))
            stack.callback(ours.send, b"x")
            assert ours.recv(10) == b"sent"
            dgram.broker.serve()
            silent.append(dgram.last())
        assert [reason for _, reason in silent] == ["ok"] * 16 + ["replies_not_received"]
    # They are gone, and with them what they did not receive.
    assert as_uid(dgram, OTHER_UID) == ["ok"]


def test_a_flood_is_answered_as_far_as_it_is_received(dgram: Served) -> None:
    before = descriptors_of()
    with dgram.speaker() as speaker:
        flood(dgram, speaker, request(dgram), 100)
        answered = 0
        while not speaker.is_silent():
            answer = speaker.receive()
            assert answer is not None
            answer.descriptors.close()
            answered += 1
        # As many as its queue has room for (net.unix.max_dgram_qlen); the others are recorded.
        assert answered + dgram.broker.events().count("undelivered") == 100
        assert answered >= 10
        assert speaker.open_one(dgram.file).content == b"content"
    assert descriptors_of() == before


def test_one_datagram_is_served_in_a_round(dgram: Served) -> None:
    connected = dgram.broker.join()
    with dgram.speaker(serve=False) as speaker:
        for _ in range(5):
            speaker.send(request(dgram))
        connected.sock.send(encode_status(1))
        dgram.broker.broker.step(0)
        assert dgram.broker.reasons() == ["ok"]
        connected.sock.settimeout(0)
        assert connected.receive() is not None
        dgram.broker.serve()
        assert dgram.broker.reasons() == ["ok"] * 5
        for _ in range(5):
            answer = speaker.receive()
            assert answer is not None
            assert isinstance(answer.reply, OpenReply)
            answer.descriptors.close()


def test_what_breaks_while_a_datagram_is_answered_is_told_and_the_next_one_is_served(
    dgram: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dgram.speaker() as speaker:
        with monkeypatch.context() as patch:
            patch.setattr(dgram.broker.opener, "open", lambda *_arguments: 1 / 0)
            error = speaker.error(request(dgram))
        assert isinstance(error, ErrorReply)
        assert (error.kind.name, error.id) == ("BROKEN", 7)
        assert "ZeroDivisionError" in dgram.last()[1]
        assert speaker.open_one(dgram.file).content == b"content"
