"""A broker that runs by itself, as the launcher starts it: other users, hostile clients, long use."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import random
import re
import signal
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker.identity import probe_level
from fdbroker.wire.client import OpenReply, encode_hello, encode_list, encode_open, encode_stat, encode_status
from fdbroker.wire.format import MAX_FRAME, Kind, Reason
from fdbroker.wire.messages import ErrorReply
from tests.broker.conftest import fill
from tests.broker.speaking import Speaker, check_audit, frame, path_of, read_audit, read_opened
from tests.processes import background, become, in_child, wait_until
from tests.running_broker import (
    CLIENT_UID,
    OTHER_UID,
    RunningBroker,
    policy,
    reachable_directory,
    rule,
    running_broker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

FILES = 253


@pytest.fixture(scope="module")
def running(shared_directory: Path) -> Iterator[RunningBroker]:
    with running_broker(shared_directory, policy(shared_directory / "tree")) as broker:
        yield broker
    check_audit(read_audit(broker.audit.read_bytes()))


@pytest.fixture
def file(shared_directory: Path) -> bytes:
    return bytes(shared_directory / "tree" / "file")


@pytest.fixture
def bystander(running: RunningBroker, file: bytes) -> Iterator[Speaker]:
    """Return a client that is served before and after; what the broker has open is the same then."""
    with Speaker.connect(running.socket) as speaker:
        assert speaker.open_one(file).content == b"content"
        # Who left a moment ago must be gone, or what is open now would not be what is needed.
        wait_until(lambda: speaker.status()["totals"]["connections"] == 1, "all others gone")
        before = running.descriptors()
        yield speaker
        assert running.is_alive(), (running.process.returncode, running.errors())
        assert speaker.open_one(file).content == b"content"
        wait_until(lambda: running.descriptors() == before, "every descriptor of the others closed")


# Who asks


def test_client_of_another_user_gets_what_it_could_not_open_itself(
    running: RunningBroker, shared_directory: Path
) -> None:
    private = shared_directory / "tree" / "private"
    private.write_bytes(b"private")
    private.chmod(0o600)

    def client() -> tuple[bytes | None, dict[str, Any]]:
        with pytest.raises(PermissionError):
            private.read_bytes()
        with Speaker.connect(running.socket) as speaker:
            return speaker.open_one(bytes(private)).content, speaker.status()

    content, status = in_child(client, uid=CLIENT_UID)
    assert content == b"private"
    assert status["peer"]["uid"] == CLIENT_UID
    assert status["identity_level"] == probe_level().level
    assert "totals" not in status
    last = running.decisions()[-1]
    assert (last["uid"], last["gid"], last["decision"]) == (CLIENT_UID, CLIENT_UID, "allow")
    private.unlink()


def test_given_descriptor_can_not_be_turned_into_more_by_the_owner_of_the_file(
    running: RunningBroker, shared_directory: Path
) -> None:
    """It comes through a read-only mount, so whatever the owner may do by name, it may not by this."""
    own = shared_directory / "tree" / "own"
    own.write_bytes(b"own")
    os.chown(own, CLIENT_UID, CLIENT_UID)
    own.chmod(0o666)

    def client() -> list[int | None]:
        with Speaker.connect(running.socket) as speaker:
            answer = speaker.ask(encode_open(1, [bytes(own)]))
        with answer.descriptors as descriptors:
            [number] = descriptors.numbers()
            name = f"/proc/self/fd/{number}"
            attempts: list[Callable[[], object]] = [
                lambda: os.close(os.open(name, os.O_WRONLY)),
                lambda: os.close(os.open(name, os.O_RDWR)),
                lambda: os.truncate(name, 0),
                lambda: os.fchmod(number, 0o777),
                lambda: os.utime(number),
                lambda: os.setxattr(number, "user.x", b"x"),
                lambda: os.fchown(number, CLIENT_UID, CLIENT_UID),
                lambda: os.write(number, b"x"),
            ]
            numbers: list[int | None] = []
            for attempt in attempts:
                try:
                    attempt()
                    numbers.append(None)
                except OSError as error:
                    numbers.append(error.errno)
            return numbers

    assert in_child(client, uid=CLIENT_UID) == [errno.EROFS] * 7 + [errno.EBADF]
    assert own.read_bytes() == b"own"
    own.unlink()


def test_message_of_a_child_of_who_connected_is_refused_and_recorded(
    running: RunningBroker, bystander: Speaker, file: bytes
) -> None:
    with Speaker.connect(running.socket) as speaker:
        pid = in_child(lambda: (speaker.sock.send(encode_open(7, [file])), os.getpid())[1])
        answer = speaker.receive()
        assert answer is not None
        assert read_opened(answer)[0][:2] == ("identity", errno.EPERM)
        record = running.decisions()[-1]
        assert (record["reason"], record["pid"]) == ("sent_by_another_process", os.getpid())
        assert record["pid"] != pid
        assert speaker.open_one(file).content == b"content"


@pytest.mark.parametrize("change", ["all ids", "effective", "supplementary groups are those of connect"])
def test_client_that_changes_its_ids_after_connecting(
    running: RunningBroker, bystander: Speaker, file: bytes, change: str
) -> None:
    if change == "effective" and probe_level().level < 2:
        pytest.skip(probe_level().reason)

    def client() -> str:
        with Speaker.connect(running.socket) as speaker:
            if change == "all ids":
                become(CLIENT_UID)
            elif change == "effective":
                os.setresuid(0, CLIENT_UID, 0)
            else:
                os.setgroups([1, 2, 3])
            return speaker.open_one(file).reason

    assert in_child(client) == ("ok" if "groups" in change else "identity")


def test_set_user_id_program_and_overflow_uid_are_refused(running: RunningBroker, bystander: Speaker) -> None:
    def set_user_id() -> str:
        os.setresuid(CLIENT_UID, 0, 0)
        with Speaker.connect(running.socket, hello=False) as speaker:
            return speaker.error(encode_hello(1)).reason.name

    def nobody() -> bool:
        become(65534)
        with Speaker.connect(running.socket, hello=False) as speaker:
            return speaker.is_closed()

    assert in_child(set_user_id) == "IDENTITY"
    assert in_child(nobody)
    wait_until(
        lambda: (
            [r.get("reason") for r in running.records()[-2:]]
            == ["sent_with_other_ids", "identity_without_mapping"]
        ),
        "both records",
    )


def test_connection_that_is_inherited_is_served_under_its_name(reachable: Path) -> None:
    """A launched worker: root connects a pair for it, and it asks by its own credentials."""
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = theirs.fileno()
    with (
        running_broker(reachable, policy(tree), f"--inherited={number}=worker", pass_fds=[number]) as broker,
        ours,
    ):
        theirs.close()
        with Speaker(ours) as speaker:
            speaker.greet()
            assert speaker.open_one(bytes(tree / "file")).content == b"content"
        assert broker.decisions()[-1]["socket"] == "worker"


# Bad input


def exchange(running: RunningBroker, message: bytes, *, hello: bool) -> bytes | None:
    """Send one message on a new connection and return what comes back."""
    with Speaker.connect(running.socket, hello=hello) as speaker:
        speaker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
        speaker.sock.send(message)
        answer = speaker.receive()
        if answer is None:
            return None
        answer.descriptors.close()
        if isinstance(answer.reply, ErrorReply) and answer.reply.kind == Kind.MALFORMED:
            assert speaker.is_closed()
        return answer.raw


def test_two_thousand_frames_of_garbage_are_answered_or_closed_with_a_reason(
    running: RunningBroker, bystander: Speaker
) -> None:
    seeded = random.Random(20_240_601)  # noqa: S311 - reproducible, not secret
    malformed = 0
    for number in range(2000):
        size = seeded.choice([1, 5, 11, 12, 13, 28, 40, 200, 5000])
        message = bytearray(seeded.randbytes(size))
        if number % 2 and size >= 12:
            # Nearly right: a type, flags and a generation that exist.
            message[:12] = struct.pack("<BBHII", seeded.randrange(1, 7), 0, seeded.randrange(4), number, 0)
        answer = exchange(running, bytes(message), hello=bool(number % 3))
        assert answer is not None
        malformed += answer[0] == 0xFF and answer[1] == Kind.MALFORMED
    assert malformed > 1000
    events = [record for record in running.records() if record["event"] == "malformed"]
    assert len(events) >= malformed
    assert all(record["reason"] for record in events)


@pytest.mark.parametrize(
    "whole",
    [
        encode_hello(1),
        encode_open(2, [b"/a", b"/b"]),
        encode_stat(3, [b"/a"]),
        encode_list(4, b"/a"),
        encode_status(5),
    ],
    ids=["hello", "open", "stat", "list", "status"],
)
def test_frame_cut_off_at_every_byte_is_answered(
    running: RunningBroker, bystander: Speaker, whole: bytes
) -> None:
    for length in range(1, len(whole)):
        assert exchange(running, whole[:length], hello=whole[0] != 1) is not None


@pytest.mark.parametrize("size", [MAX_FRAME + 1, MAX_FRAME + 4096, 180_000])
def test_oversized_frame_is_refused(running: RunningBroker, bystander: Speaker, size: int) -> None:
    answer = exchange(running, frame(2, count=1, body=b"/" * (size - 12)), hello=True)
    assert answer is not None
    assert b"longer than 65536 bytes" in answer


def test_empty_message_and_silent_departure_are_no_trouble(
    running: RunningBroker, bystander: Speaker
) -> None:
    for _ in range(50):
        assert exchange(running, b"", hello=True) is None
        Speaker.connect(running.socket, hello=False).close()
        speaker = Speaker.connect(running.socket)
        speaker.sock.send(encode_status(1))
        speaker.close()


@pytest.mark.parametrize("when", ["before hello", "with a request"])
def test_descriptors_can_not_be_sent_to_it(running: RunningBroker, bystander: Speaker, when: str) -> None:
    with (
        Speaker.connect(running.socket, hello=when != "before hello") as speaker,
        open("/dev/null", "rb") as null,
    ):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * 3))]
        try:
            speaker.sock.sendmsg([encode_hello(1)], rights)
        except PermissionError:
            return  # SO_PASSRIGHTS: the kernel refuses them
        answer = speaker.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert "3 descriptors sent" in answer.reply.text


# Long use


def mixed(seeded: random.Random, tree: Path) -> bytes:
    """Return one request, good or bad as to its paths, but well-formed."""
    names = ["file", "directory/inner", "missing", "link", "fifo", "directory", "empty", "file/x", "x" * 300]
    paths = [bytes(tree / seeded.choice(names)) for _ in range(seeded.choice([1, 1, 1, 3]))]
    paths += seeded.choice([[], [], [b""], [b"/etc/passwd"], [b"a"], [b"/proc/self/mem"], [b"/a/../b"]])
    kind = seeded.randrange(8)
    if kind < 4:
        return encode_open(7, paths)
    if kind < 6:
        return encode_stat(7, paths)
    return encode_list(7, paths[0], seeded.choice([0, 0, 5, 2**62])) if kind == 6 else encode_status(7)


@pytest.mark.unmeasured
def test_ten_thousand_requests_leave_what_was_open_before(
    running: RunningBroker, shared_directory: Path
) -> None:
    tree = shared_directory / "tree"
    seeded = random.Random(7)  # noqa: S311 - reproducible, not secret
    with Speaker.connect(running.socket) as speaker:
        wait_until(lambda: speaker.status()["totals"]["connections"] == 1, "all others gone")
        with_one = running.descriptors()
    wait_until(lambda: len(running.descriptors()) == len(with_one) - 2, "all gone")
    idle = running.descriptors()
    decided = len(running.decisions())
    asked = 0
    for number in range(100):
        with Speaker.connect(running.socket) as speaker:
            for _ in range(100):
                message = mixed(seeded, tree)
                asked += (
                    0
                    if message[0] == 5
                    else 1
                    if message[0] == 4
                    else struct.unpack_from("<H", message, 2)[0]
                )
                speaker.ask(message).descriptors.close()
            if number % 2:
                speaker.error(frame(number, flags=1))
    wait_until(lambda: running.descriptors() == idle, "the descriptors of before")
    assert len(running.decisions()) - decided == asked


@pytest.mark.unmeasured
def test_ten_thousand_names_of_any_bytes_come_back_from_the_audit_once_each(
    running: RunningBroker, shared_directory: Path
) -> None:
    seeded = random.Random(11)  # noqa: S311 - reproducible, not secret
    tree = bytes(shared_directory / "tree")
    allowed = bytes(range(256)).replace(b"\0", b"\1").replace(b"/", b"0")
    names: list[bytes] = []
    while len(names) < 10_000:
        length = seeded.choice([1, 2, 3, 8, 30, 255, seeded.randrange(1, 256)])
        name = seeded.randbytes(length).translate(allowed)
        if seeded.random() < 0.3:
            name = name.decode("latin-1").encode()[:255]  # mostly text
        if name not in {b".", b".."}:
            names.append(name)
    paths = [tree + b"/" + name for name in names]
    before = len(running.decisions())
    with Speaker.connect(running.socket) as speaker:
        at = 0
        while at < len(paths):
            batch = paths[at : at + 200]
            opened = speaker.open(*batch)
            assert {entry.reason for entry in opened} <= {"not_found", "ok"}
            at += len(batch)
    records = running.decisions()[before:]
    assert [path_of(record) for record in records] == paths
    lines = running.audit.read_bytes().splitlines()
    assert all(line.isascii() and line.decode().isprintable() for line in lines)
    check_audit(running.records())


# Limits


def in_background_connections(path: Path, uid: int, count: int) -> contextlib.AbstractContextManager[int]:
    """Hold connections of another uid open, once they are all there."""
    ours, theirs = socket.socketpair()

    def hold() -> None:
        become(uid)
        speakers = [Speaker.connect(path) for _ in range(count)]
        theirs.send(b"there")
        signal.pause()
        del speakers

    @contextlib.contextmanager
    def holding() -> Iterator[int]:
        with ours, theirs, background(hold) as pid:
            assert ours.recv(9) == b"there"
            yield pid

    return holding()


def test_connections_of_one_uid_are_limited_and_others_are_served(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    limits = {"connections_per_uid": 3, "in_flight_per_connection": 512}
    with running_broker(reachable, policy(tree, limits=limits)) as broker:

        def one_more() -> tuple[str, str]:
            with Speaker.connect(broker.socket, hello=False) as speaker:
                answer = speaker.receive()
                assert answer is not None
                assert isinstance(answer.reply, ErrorReply)
                return answer.reply.reason.name, answer.reply.text

        with in_background_connections(broker.socket, CLIENT_UID, 3):
            reason, text = in_child(one_more, uid=CLIENT_UID)
            assert reason == "LIMIT"
            assert (
                text
                == f"uid {CLIENT_UID} has 3 connections already, which is the limit (connections_per_uid)"
            )
            with Speaker.connect(broker.socket) as other:
                assert other.open_one(bytes(tree / "file")).content == b"content"
        wait_until(lambda: not in_child_refused(broker, CLIENT_UID), "room for a connection again")


def in_child_refused(broker: RunningBroker, uid: int) -> bool:
    def client() -> bool:
        with Speaker.connect(broker.socket, hello=False) as speaker:
            with contextlib.suppress(BrokenPipeError):
                speaker.send(encode_hello(1))
            answer = speaker.receive()
            return answer is None or isinstance(answer.reply, ErrorReply)

    return in_child(client, uid=uid)


@pytest.fixture(scope="module")
def small() -> Iterator[RunningBroker]:
    """Return a broker that may have 4,096 descriptors: 512 of a uid may be under way."""
    with reachable_directory() as directory:
        tree = directory / "tree"
        tree.mkdir()
        fill(tree)
        with running_broker(directory, policy(tree), most_descriptors=4096) as broker:
            yield broker
            assert b'"event":"undelivered"' not in broker.audit.read_bytes()


def totals(broker: RunningBroker) -> dict[str, int]:
    with Speaker.connect(broker.socket) as speaker:
        found: dict[str, int] = speaker.status()["totals"]
        return found


def test_client_that_stalls_is_paused_and_others_are_served(small: RunningBroker) -> None:
    file = bytes(small.socket.parent / "tree" / "file")
    with Speaker.connect(small.socket) as staller, Speaker.connect(small.socket) as other:
        for _ in range(4):
            staller.sock.send(encode_open(7, [file] * FILES))
        for _ in range(20):
            assert other.open_one(file).content == b"content"
        # Two were read; the others wait in its own queue.
        wait_until(lambda: totals(small)["in_flight"] >= 2 * FILES, "both replies under way")
        assert totals(small)["in_flight"] <= 512
        for _ in range(4):
            answer = staller.receive()
            assert answer is not None
            assert {entry.reason for entry in read_opened(answer)} <= {"ok", "limit"}


def test_client_that_never_receives_and_breaks_the_protocol_can_not_take_the_descriptors_of_others(
    small: RunningBroker,
) -> None:
    file = bytes(small.socket.parent / "tree" / "file")
    ours, theirs = socket.socketpair()

    def rogue() -> None:
        become(CLIENT_UID)
        speakers = []
        for _ in range(60):
            speaker = Speaker.connect(small.socket)
            speakers.append(speaker)
            speaker.sock.send(encode_open(7, [file] * FILES))
            speaker.sock.send(b"\xff\xff malformed")
        # What is sent next is answered after all that, by a broker with one thread.
        last = Speaker.connect(small.socket)
        theirs.send(last.open_one(file).reason.encode())
        signal.pause()

    def other() -> list[str]:
        with Speaker.connect(small.socket) as speaker:
            return [entry.reason for entry in speaker.open(*[file] * FILES)]

    with ours, theirs, background(rogue):
        ours.settimeout(30)
        assert ours.recv(100) in {b"ok", b"limit"}
        # 512 of its uid, and no more: 2 x 253 and what is left over singly.
        assert 2 * FILES <= totals(small)["in_flight"] <= 512 + 1
        for _ in range(3):
            assert in_child(other, uid=OTHER_UID) == ["ok"] * FILES
        # A flood: all its records are long in reading.
        refused = rb'"uid":%d,.*"reason":"in_flight_per_uid"' % CLIENT_UID
        assert len(re.findall(refused, small.audit.read_bytes())) >= 50 * FILES
    wait_until(lambda: totals(small)["connections"] == 1, "the rogue's connections to be gone")
    assert totals(small)["in_flight"] <= FILES


def test_connections_that_are_only_made_do_not_keep_others_out(small: RunningBroker) -> None:
    file = bytes(small.socket.parent / "tree" / "file")
    with in_background_connections(small.socket, CLIENT_UID, 64), Speaker.connect(small.socket) as speaker:
        assert speaker.open_one(file).content == b"content"


# Mounts that come later


@contextlib.contextmanager
def mounted(what: str, path: Path, *options: str, shared: bool = False) -> Iterator[None]:
    subprocess.run(["mount", "-t", what, *options, "none", path], check=True)
    try:
        if shared:
            # What is mounted below reaches the broker's view, as on systems where systemd runs.
            subprocess.run(["mount", "--make-shared", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextlib.contextmanager
def made(path: Path) -> Iterator[None]:
    """Make a directory on what was just mounted."""
    path.mkdir()
    yield


@pytest.mark.parametrize("cross", [False, True])
def test_what_is_mounted_later_is_not_served_unless_it_is_storage_and_read_only(
    reachable: Path,
    cross: bool,  # noqa: FBT001
) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    below = tree / "below"
    roots = [{"name": "tree", "path": str(tree), "cross_mounts": cross, "opens": "loop"}]
    with (
        mounted("tmpfs", tree, shared=True),
        made(below),
        running_broker(reachable, policy(tree, roots=roots)) as broker,
        Speaker.connect(broker.socket) as speaker,
    ):
        asked = bytes(below / "file")

        def answer() -> tuple[str, int]:
            return speaker.open_one(asked)[:2]

        def told(after: str) -> tuple[str, int]:
            return (after, getattr(errno, {"crosses_mount": "EXDEV", "mount_not_read_only": "EROFS"}[after]))

        with mounted("tmpfs", below):
            (below / "file").write_text("later")
            assert answer() == told("mount_not_read_only" if cross else "crosses_mount")
            page = speaker.page(bytes(below))
            assert page.result.reason == (Reason.NONE if cross else Reason.CROSSES_MOUNT)
            assert b"below" in speaker.list_all(bytes(tree))
        with mounted("tmpfs", below, "-o", "ro"):
            assert answer()[0] == ("not_found" if cross else "crosses_mount")
        with mounted("proc", below):
            for name in ("self/environ", "1/environ", "meminfo", "version"):
                reason = speaker.open_one(bytes(below / name)).reason
                # A link on the way is none of the broker's business either.
                assert reason in ({"filesystem", "symlink"} if cross else {"crosses_mount"})
            assert speaker.stat(bytes(below / "version")).results[0][0].reason in {
                Reason.FILESYSTEM, Reason.CROSSES_MOUNT,
            }  # fmt: skip
        assert answer() == ("not_found", errno.ENOENT)


def test_bind_mount_within_the_root_is_a_mount_like_any_other(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    with (
        mounted("tmpfs", tree, shared=True),
        made(tree / "directory"),
        running_broker(reachable, policy(tree)) as broker,
        Speaker.connect(broker.socket) as speaker,
    ):
        (tree / "target").touch()
        subprocess.run(["mount", "--bind", "/etc/passwd", tree / "target"], check=True)
        try:
            assert speaker.open_one(bytes(tree / "target"))[:2] == ("crosses_mount", errno.EXDEV)
        finally:
            subprocess.run(["umount", tree / "target"], check=True)


# The audit on a disk that fills up


def test_full_disk_denies_everything_and_service_resumes_with_room(reachable: Path) -> None:
    tree, disk = reachable / "tree", reachable / "disk"
    tree.mkdir()
    disk.mkdir()
    fill(tree)
    file = bytes(tree / "file")
    with mounted("tmpfs", disk, "-o", "size=64k,mode=755"):
        audit = disk / "audit"
        with running_broker(reachable, policy(tree), audit=str(audit)) as broker:
            with Speaker.connect(broker.socket) as speaker:
                assert speaker.open_one(file).content == b"content"
                with open(disk / "filling", "wb", buffering=0) as filling, contextlib.suppress(OSError):
                    while filling.write(bytes(4096)):
                        pass
                given_ = 0
                while speaker.open_one(file).reason == "ok":
                    given_ += 1
                    assert given_ < 100
                opened = speaker.open(file, b"/etc/passwd", b"")
                assert [entry[:2] for entry in opened] == [("audit", errno.EIO)] * 3
                assert speaker.stat(file).results[0][0].reason == Reason.AUDIT
                assert speaker.page(bytes(tree)).result.reason == Reason.AUDIT
                (disk / "filling").unlink()
                assert speaker.open_one(file).content == b"content"
            records = read_audit(audit.read_bytes())
            assert audit.read_bytes().endswith(b"\n")
            # started, the first, those that still fitted; a gap; the one after it, whole and on its own
            # line, and what is told of the gap.
            *before, after, told = records
            assert [record["seq"] for record in before] == list(range(2 + given_))
            # Every request in the gap but the first had a report of its own.
            assert after["seq"] == 2 + given_ + 1 + (3 + 1) + (1 + 1) + (1 + 1)
            assert after["reason"] == "ok"
            assert (told["event"], told["seq"]) == ("audit_failed", after["seq"] + 1)
            assert (told["from"], told["to"], told["given"]) == (2 + given_, after["seq"] - 1, 0)


def test_where_the_policy_says_so_service_goes_on_without_a_record(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    compiled = policy(tree, audit={"on_failure": "allow"})
    with (
        open("/dev/full", "wb") as full,
        running_broker(reachable, compiled, audit="-", stdout=full.fileno()) as broker,
        Speaker.connect(broker.socket) as speaker,
    ):
        assert speaker.open_one(bytes(tree / "file")).content == b"content"
        assert speaker.status()["totals"]["audit_failures"] >= 2


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_reader_of_the_audit_that_is_stuck_stops_nobody_and_what_it_has_no_room_for_is_denied(
    reachable: Path, kind: str
) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    file = bytes(tree / "file")
    if kind == "pipe":
        ends = os.pipe()
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    else:
        pair = socket.socketpair()
        pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ends = pair[0].detach(), pair[1].detach()
    read_end, write_end = ends
    try:
        assert os.get_blocking(write_end)
        os.set_blocking(read_end, False)
        with (
            running_broker(reachable, policy(tree), audit="-", stdout=write_end) as broker,
            Speaker.connect(broker.socket) as speaker,
        ):
            assert not os.get_blocking(write_end)
            given_ = 0
            while speaker.open_one(file).reason == "ok":
                given_ += 1
                assert given_ < 100_000  # as much as the launcher makes room for, whatever that is
            # It answers; who blocked would not.
            assert speaker.open_one(file)[:2] == ("audit", errno.EIO)
            assert speaker.status()["audit"] != "off"
            text = read_all(read_end)
            assert speaker.open_one(file).content == b"content"
            text += read_all(read_end)
        text += read_all(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    records = read_audit(text)
    assert [record["event"] for record in records] == [
        "started", *["open"] * (given_ + 1), "audit_failed", "stopped",
    ]  # fmt: skip
    told = records[-2]
    assert (told["from"], told["to"], told["given"]) == (given_ + 1, given_ + 3, 0)


def read_all(descriptor: int) -> bytes:
    """Return what can be read without waiting."""
    text = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(descriptor, 65536):
            text += data
    return text


@pytest.mark.parametrize("kind", ["file", "terminal"])
def test_standard_output_that_is_neither_pipe_nor_socket_is_taken_as_it_is(
    reachable: Path, kind: str
) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    if kind == "file":
        output = os.open(reachable / "output", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        others: list[int] = []
    else:
        controller, output = os.openpty()
        others = [controller]
    try:
        with running_broker(reachable, policy(tree), audit="-", stdout=output):
            assert os.get_blocking(output)
    finally:
        for descriptor in (output, *others):
            os.close(descriptor)


def test_with_the_fewest_descriptors_it_starts_with_a_full_reply_is_given(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    with (
        running_broker(reachable, policy(tree), most_descriptors=1024) as broker,
        Speaker.connect(broker.socket) as speaker,
    ):
        for _ in range(3):
            assert {entry.reason for entry in speaker.open(*[bytes(tree / "file")] * FILES)} == {"ok"}


def test_without_audit_it_says_so(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    with (
        running_broker(reachable, policy(tree), "--audit=none", audit="none") as broker,
        Speaker.connect(broker.socket) as speaker,
    ):
        assert speaker.status()["audit"] == "off"


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_told_to_with_status_0_and_a_record(reachable: Path, number: signal.Signals) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    with (
        running_broker(reachable, policy(tree), stop=False) as broker,
        Speaker.connect(broker.socket) as speaker,
    ):
        speaker.sock.send(encode_open(7, [bytes(tree / "file")]))
        answer = speaker.receive()
        assert answer is not None
        assert isinstance(answer.reply, OpenReply)
        answer.descriptors.close()
        broker.process.send_signal(number)
        assert broker.process.wait(timeout=20) == 0
        assert speaker.is_closed()
        records = broker.records()
        assert [record["event"] for record in records] == ["started", "open", "stopped"]
        check_audit(records)
        assert broker.errors() == ""


def test_it_sleeps_when_nobody_asks(running: RunningBroker) -> None:
    """A loop that spins would be running, or woken again and again."""

    def wake_ups() -> tuple[str, str]:
        status = running.status()
        return status["voluntary_ctxt_switches"], status["nonvoluntary_ctxt_switches"]

    with Speaker.connect(running.socket) as speaker:
        speaker.status()
        wait_until(lambda: running.status()["State"].startswith("S"), "asleep")

        def slept() -> bool:
            before = wake_ups()
            for _ in range(20):
                in_child(os.getpid)  # something that takes a while
            return wake_ups() == before

        # What an earlier client left to do may wake it; a loop that spins never sleeps as long.
        assert any(slept() for _ in range(5))


def test_rules_for_two_users_serve_each_its_own(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    for uid in (CLIENT_UID, OTHER_UID):
        (tree / str(uid)).write_text(str(uid))
        (tree / str(uid)).chmod(0o600)
        os.chown(tree / str(uid), uid, uid)
    mine = rule("mine", where={"owner": {"uids": [], "client": True, "on_behalf_of": False}})
    with running_broker(reachable, policy(tree, mine)) as broker:

        def client() -> list[str]:
            with Speaker.connect(broker.socket) as speaker:
                both = [bytes(tree / str(uid)) for uid in (CLIENT_UID, OTHER_UID)]
                return [entry.reason for entry in speaker.open(*both)]

        assert in_child(client, uid=CLIENT_UID) == ["ok", "denied"]
        assert in_child(client, uid=OTHER_UID) == ["denied", "ok"]
        assert in_child(client) == ["denied", "denied"]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_audit_by_a_pipe_or_a_socket_has_room_for_the_largest_request(reachable: Path, kind: str) -> None:
    """A pipe has 64 KiB as it is made, and the records of 253 paths are longer."""
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    if kind == "pipe":
        read_end, write_end = os.pipe()
    else:
        pair = socket.socketpair()
        read_end, write_end = pair[0].detach(), pair[1].detach()
    try:
        os.set_blocking(read_end, False)
        with (
            running_broker(reachable, policy(tree), audit="-", stdout=write_end) as broker,
            Speaker.connect(broker.socket) as speaker,
        ):
            opened = speaker.open(*[bytes(tree / "file")] * 253)
            assert [entry.reason for entry in opened] == ["ok"] * 253
        text = read_all(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert len(text) > 65536
    assert [record["event"] for record in read_audit(text)] == ["started", *["open"] * 253, "stopped"]
