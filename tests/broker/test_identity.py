"""Who is asking: a connection is worth what the process that made it is worth, now."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import struct
import time
import traceback
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker import identity
from fdbroker.broker.identity import ControlGroups, IdentityError, PeerAtConnect, gives_labels, probe_level
from fdbroker.kernel import children, dumpable, peers
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.namespaces import unshare
from fdbroker.policy.rules import ClientFacts
from fdbroker.wire.client import StatReply, encode_hello, encode_list, encode_open, encode_stat, encode_status
from fdbroker.wire.format import Kind, Reason, Status
from fdbroker.wire.messages import ErrorReply
from tests.broker.conftest import fill, no_descriptor_left
from tests.broker.speaking import Speaker, descriptors_of, read_opened
from tests.broker.stepping import SteppedBroker
from tests.processes import background, become, in_child, wait_until
from tests.running_broker import CLIENT_UID, OTHER_UID, policy, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEVEL = probe_level().level
LEVEL_OF_PRESENT_IDS = 2
# Each level that this kernel has.
LEVELS = list(range(LEVEL + 1))
CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000
needs_level_2 = pytest.mark.skipif(LEVEL < 2, reason="identity level 2 needs Linux 6.13")


@pytest.fixture
def reached(reachable: Path) -> Iterator[SteppedBroker]:
    """Return a broker, and its listener at `reachable`/listener, that every uid can reach."""
    tree = reachable / "tree"
    tree.mkdir(mode=0o755)
    fill(tree)
    with no_descriptor_left(), SteppedBroker(tree, audit=reachable / "audit") as broker:
        broker.listen(reachable)
        yield broker


def served(broker: SteppedBroker, client: Callable[[], None]) -> int:
    """Serve for as long as a client in a child process runs; return how it ended."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.alarm(30)
            client()
            status = 0
        except BaseException:  # noqa: BLE001 - shown, then ended
            traceback.print_exc()
        finally:
            os._exit(status)
    ended = os.pidfd_open(pid)
    try:
        broker.broker._epoll.register(ended, 1)
        while not peers.has_exited(ended):
            broker.broker.step(30)
        broker.broker._epoll.unregister(ended)
    finally:
        os.close(ended)
    broker.serve()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def listener_of(broker: SteppedBroker) -> Path:
    assert broker.audit_file is not None
    return broker.audit_file.parent / "listener"


def fate_of_hello(speaker: Speaker) -> str:
    """Say hello and return the reason of the refusal, or `closed`."""
    try:
        speaker.send(encode_hello(1))
    except BrokenPipeError:
        return "closed"
    answer = speaker.receive()
    if answer is None:
        return "closed"
    assert isinstance(answer.reply, ErrorReply)
    return answer.reply.reason.name


# Sent by somebody else


@pytest.mark.parametrize("level", LEVELS)
def test_message_of_another_process_than_the_one_that_connected_is_refused(
    tree: Path, tmp_path: Path, level: int
) -> None:
    with SteppedBroker(tree, audit=tmp_path / "audit", level=level) as broker:
        speaker = broker.join()
        in_child(lambda: speaker.sock.send(encode_open(7, [bytes(tree / "file")] * 2)))
        broker.serve()
        answer = speaker.receive()
        assert answer is not None
        assert [entry[:2] for entry in read_opened(answer)] == [("identity", errno.EPERM)] * 2
        assert broker.reasons() == ["sent_by_another_process"] * 2
        # The connection goes on for who made it.
        assert speaker.open_one(bytes(tree / "file")).content == b"content"


@pytest.mark.parametrize(
    "request_", [encode_stat(7, [b"/x"]), encode_list(7, b"/x"), encode_status(7), encode_hello(7)]
)
def test_every_kind_of_message_of_another_process_is_refused(stepped: SteppedBroker, request_: bytes) -> None:
    speaker = stepped.join(hello=request_[0] != 1)
    in_child(lambda: speaker.sock.send(request_))
    stepped.serve()
    answer = speaker.receive()
    assert answer is not None
    reply = answer.reply
    if isinstance(reply, ErrorReply):
        assert (reply.kind, reply.reason, reply.errno) == (Kind.REFUSED, Reason.IDENTITY, errno.EPERM)
        assert "sent_by_another_process" in reply.text
        assert stepped.events()[-1] in {"status_refused", "hello_refused"}
    else:
        result = reply.results[0][0] if isinstance(reply, StatReply) else reply.result  # type: ignore[union-attr]
        assert (result.status, result.reason) == (Status.REFUSED, Reason.IDENTITY)
    assert stepped.records()[-1]["reason"] == "sent_by_another_process"


def test_message_that_was_queued_before_credentials_were_asked_for_is_refused(stepped: SteppedBroker) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    speaker = Speaker(theirs, stepped.serve)
    theirs.send(encode_hello(1))
    with speaker:
        stepped.broker.adopt(ours, "pair")
        stepped.serve()
        answer = speaker.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert answer.reply.reason == Reason.IDENTITY
        speaker.greet()


def test_message_without_credentials_is_objected_to() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        peer = PeerAtConnect(ours, LEVEL)
        assert peer.objection(None) == "message_without_credentials"
        own = peers.peer_credentials(ours)
        assert peer.objection(own) is None
        pid, uid, gid = peers.read_ucred(own)
        assert peer.objection(struct.pack("=iII", pid, uid + 1, gid)) == "sent_with_other_ids"
        assert peer.objection(struct.pack("=iII", pid, uid, gid + 1)) == "sent_with_other_ids"
        assert peer.objection(struct.pack("=iII", pid + 1, uid, gid)) == "sent_by_another_process"
        assert peer.objection(struct.pack("=iII", 0, 65534, 65534)) == "sent_by_another_process"
        peer.close()


# Changed since


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_peer_that_changed_its_uid_after_connecting_is_refused(reachable: Path, level: int) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    with SteppedBroker(tree, audit=reachable / "audit", level=level) as broker:
        path = broker.listen(reachable)

        def client() -> None:
            with Speaker.connect(path) as speaker:
                assert speaker.open_one(bytes(tree / "file")).content == b"content"
                become(CLIENT_UID)
                assert speaker.open_one(bytes(tree / "file"))[:2] == ("identity", errno.EPERM)

        assert served(broker, client) == 0
        assert broker.reasons() == ["ok", "sent_with_other_ids"]


@pytest.mark.root
@needs_level_2
def test_peer_that_changed_its_effective_uid_alone_is_refused(reached: SteppedBroker) -> None:
    def client() -> None:
        with Speaker.connect(listener_of(reached)) as speaker:
            os.setresuid(0, CLIENT_UID, 0)
            assert speaker.open_one(bytes(reached.tree / "file"))[:2] == ("identity", errno.EPERM)
            os.setresuid(0, 0, 0)
            assert speaker.open_one(bytes(reached.tree / "file")).content == b"content"

    assert served(reached, client) == 0
    assert reached.reasons() == ["identity_changed_since_connect", "ok"]


@pytest.mark.root
@needs_level_2
def test_peer_that_changed_its_group_is_refused(reached: SteppedBroker) -> None:
    def client() -> None:
        with Speaker.connect(listener_of(reached)) as speaker:
            os.setresgid(0, CLIENT_UID, 0)
            assert speaker.open_one(bytes(reached.tree / "file"))[:2] == ("identity", errno.EPERM)

    assert served(reached, client) == 0


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_set_user_id_program_that_connects_is_refused(reachable: Path, level: int) -> None:
    """Its effective uid is privileged and its real one is who runs it: no message of it says both."""
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    with SteppedBroker(tree, audit=reachable / "audit", level=level) as broker:
        path = broker.listen(reachable)

        def client() -> None:
            os.setresuid(CLIENT_UID, 0, 0)
            with Speaker.connect(path, hello=False) as speaker:
                assert speaker.error(encode_hello(1)).reason == Reason.IDENTITY

        assert served(broker, client) == 0
        assert broker.events() == ["hello_refused"]
        assert broker.records()[0]["reason"] == "sent_with_other_ids"


@pytest.mark.root
def test_set_user_id_program_that_becomes_what_it_shows_after_connecting_is_refused(
    reached: SteppedBroker,
) -> None:
    def client() -> None:
        os.setresuid(CLIENT_UID, OTHER_UID, 0)
        with Speaker.connect(listener_of(reached), hello=False) as speaker:
            os.setresuid(CLIENT_UID, CLIENT_UID, CLIENT_UID)
            # Refused when it is accepted, where that comes later than the change; else when it speaks.
            assert fate_of_hello(speaker) in {"closed", "IDENTITY"}

    assert served(reached, client) == 0
    assert len(reached.events()) == 1


@pytest.mark.root
def test_connection_made_as_root_is_of_no_use_to_who_inherits_it(reached: SteppedBroker) -> None:
    def client() -> None:
        with Speaker.connect(listener_of(reached)) as speaker:

            def inherit() -> str:
                return speaker.open_one(bytes(reached.tree / "file")).reason

            assert in_child(inherit, uid=CLIENT_UID) == "identity"

    assert served(reached, client) == 0


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_set_user_id_program_that_writes_to_an_inherited_connection_lends_nothing(
    reachable: Path, level: int
) -> None:
    """The process that connected runs a real one in its own place, so that the pid stays.

    Of a privileged writer's rights nothing comes in below level 2 either: what counts is who connected.
    """
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    path = bytes(tree / "file")
    program = reachable / "writer"
    shutil.copy("/bin/cat", program)
    os.chown(program, OTHER_UID, OTHER_UID)
    program.chmod(0o4755)
    frame = reachable / "frame"
    frame.write_bytes(encode_open(7, [path]))
    compiled = policy(tree, rule("others", clients=[{"uids": [OTHER_UID]}]))
    stdin, keep = os.pipe()
    with SteppedBroker(tree, compiled, audit=reachable / "audit", level=level) as broker:
        listener = broker.listen(reachable)

        def connect_and_become_it() -> None:
            os.close(keep)
            with Speaker.connect(listener) as speaker:
                os.dup2(speaker.sock.fileno(), 1)
                os.dup2(stdin, 0)
                # It writes the frame, and goes on for as long as we keep the pipe.
                os.execv(program, [str(program), str(frame), "-"])  # noqa: S606 - no shell is wanted

        with background(connect_and_become_it, uid=CLIENT_UID) as pid:
            until(broker, lambda: bool(broker.reasons()))
            effective = int(Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[1])
            assert effective == OTHER_UID, "set-user-ID has no effect here"
        os.close(stdin)
        os.close(keep)
        expected = "identity_changed_since_connect" if level == LEVEL_OF_PRESENT_IDS else "no_rule"
        assert broker.reasons() == [expected]


def until(broker: SteppedBroker, condition: Callable[[], bool]) -> None:
    """Serve until `condition` holds."""
    end = time.monotonic() + 30
    while not condition():
        broker.broker.step(1)
        assert time.monotonic() < end


# Gone


def child_with_pid(pid: int, function: Callable[[], object]) -> None:
    """Run `function` in a child that has the free pid `pid`: clone3(2) with set_tid, Linux 5.5; as root."""
    wanted = (ctypes.c_int32 * 1)(pid)
    arguments = (ctypes.c_uint64 * 10)()  # struct clone_args up to set_tid_size
    arguments[4] = signal.SIGCHLD
    arguments[8], arguments[9] = ctypes.addressof(wanted), 1
    sys_clone3 = 435
    libc = ctypes.CDLL(None, use_errno=True)
    child = libc.syscall(ctypes.c_long(sys_clone3), arguments, ctypes.c_size_t(ctypes.sizeof(arguments)))
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    assert child == pid, os.strerror(ctypes.get_errno())
    assert os.waitpid(child, 0) == (child, 0)


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_process_that_got_the_pid_of_the_one_that_connected_is_refused_from_level_1(
    tree: Path, tmp_path: Path, level: int
) -> None:
    """At level 0 it is not noticed; docs/policy.md says so."""
    ours, theirs = socket.socketpair()
    with ours, theirs, SteppedBroker(tree, audit=tmp_path / "audit", level=level) as broker:
        path = broker.listen(tmp_path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def connect_then_wait() -> None:
            sock.connect(str(path))
            sock.send(encode_hello(1))
            theirs.send(b"connected")
            theirs.recv(1)

        with sock:
            with background(connect_then_wait) as pid:
                ours.recv(9)
                until(broker, lambda: broker.connections == 1)
                broker.serve()
            # It is reaped, and this one has its pid, its ids and its socket.
            child_with_pid(pid, lambda: sock.send(encode_open(7, [bytes(tree / "file")])))
            broker.serve()
        assert broker.reasons() == ["peer_has_exited" if level else "ok"]


@pytest.mark.parametrize("level", [level for level in LEVELS if level])
def test_message_of_a_process_that_has_ended_is_refused(tree: Path, tmp_path: Path, level: int) -> None:
    with SteppedBroker(tree, audit=tmp_path / "audit", level=level) as broker:
        path = broker.listen(tmp_path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def connect_and_end() -> None:
            sock.connect(str(path))
            sock.send(encode_hello(1))

        in_child(connect_and_end)
        broker.serve()
        with Speaker(sock) as speaker:
            assert speaker.is_closed()
        assert broker.events() == ["connection_refused"]
        assert broker.records()[0]["reason"] == "peer_has_exited"
        broker.serve()


@pytest.mark.parametrize("level", [level for level in LEVELS if level])
def test_request_that_was_queued_by_a_process_that_has_ended_since_is_refused(
    tree: Path, tmp_path: Path, level: int
) -> None:
    with SteppedBroker(tree, audit=tmp_path / "audit", level=level) as broker:
        path = broker.listen(tmp_path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair()
        with ours, theirs:

            def connect_then_wait() -> None:
                sock.connect(str(path))
                sock.send(encode_hello(1))
                theirs.send(b"connected")
                theirs.recv(1)  # until it is killed

            with background(connect_then_wait):
                ours.recv(9)
                broker.broker.step(0)
                broker.broker.step(0)
                in_child(lambda: None)
                sock.send(b"")  # nothing of ours is taken for the child's
            broker.serve()
        sock.close()
        broker.serve()
        assert broker.connections == 0
        assert "ok" not in broker.reasons()


@needs_level_2
def test_reaped_process_shows_as_uid_0_to_the_kernel_and_as_gone_to_us() -> None:
    """PIDFD_GET_INFO succeeds for it, with zeros: uid 0."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(read_end, 1)
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    before = peers.pidfd_info_raw(pidfd)
    os.write(write_end, b"x")
    os.waitpid(pid, 0)
    try:
        with pytest.raises(OSError) as caught:
            peers.read_pidfd_info(peers.pidfd_info_raw(pidfd))
        assert caught.value.errno == errno.ESRCH
        peer = object.__new__(PeerAtConnect)
        peer.credentials, peer._info, peer._pidfd, peer.pid = b"x" * 12, before, pidfd, pid
        assert peer.objection(b"x" * 12) == "peer_has_exited"
        peer._info = b""
        assert peer.objection(b"x" * 12) == "peer_has_exited"
    finally:
        for descriptor in (read_end, write_end, pidfd):
            os.close(descriptor)


# Answers of the kernel that are no identity


@pytest.fixture
def pair() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours


@pytest.mark.parametrize(
    ("ucred", "reason"),
    [
        ((0, 1000, 1000), "identity_without_mapping"),
        ((-1, 1000, 1000), "identity_without_mapping"),
        ((1, 65534, 1000), "identity_without_mapping"),
        ((1, 1000, 65534), "identity_without_mapping"),
    ],
)
def test_peer_without_an_id_of_ours_is_nobody(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch, ucred: tuple[int, int, int], reason: str
) -> None:
    monkeypatch.setattr(
        peers,
        "peer_credentials",
        lambda _sock: struct.pack("=iII", *(n % 2**32 if i else n for i, n in enumerate(ucred))),
    )
    with no_descriptor_left(), pytest.raises(IdentityError, match=reason):
        PeerAtConnect(pair, 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "call",
    ["peer_credentials", "peer_groups", "peer_pidfd", "has_exited", "pidfd_info_raw", "read_pidfd_info"],
)
def test_every_failing_question_is_a_refusal_and_leaves_nothing_open(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch, call: str, level: int
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ESRCH, "gone")

    monkeypatch.setattr(peers, call, fail)
    before = descriptors_of()
    asked = {"peer_pidfd": 1, "has_exited": 1, "pidfd_info_raw": 2, "read_pidfd_info": 2}.get(call, 0)
    if level < asked:
        PeerAtConnect(pair, level).close()
    else:
        with pytest.raises(IdentityError):
            PeerAtConnect(pair, level)
    assert descriptors_of() == before


@pytest.mark.skipif(LEVEL < 1, reason="SO_PEERPIDFD needs Linux 6.5")
def test_level_that_the_kernel_does_not_keep_is_a_refusal(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "peer_pidfd", lambda _sock: None)
    with pytest.raises(IdentityError, match="peer_without_pidfd"):
        PeerAtConnect(pair, 1)


@needs_level_2
def test_peer_whose_ids_of_now_are_others_is_refused(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = peers.read_pidfd_info
    monkeypatch.setattr(peers, "read_pidfd_info", lambda raw: read(raw)._replace(effective_uid=4242))
    with no_descriptor_left(), pytest.raises(IdentityError, match="identity_changed_since_connect"):
        PeerAtConnect(pair, 2)


@needs_level_2
def test_peer_whose_process_can_not_be_asked_any_more_is_objected_to(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = PeerAtConnect(pair, 2)
    monkeypatch.setattr(
        peers, "pidfd_info_raw", lambda _pidfd: (_ for _ in ()).throw(OSError(errno.EBADF, ""))
    )
    assert peer.objection(peers.peer_credentials(pair)) == "identity_unavailable_EBADF"
    peer.close()
    peer.close()


@pytest.mark.parametrize(
    ("call", "answer", "level", "said"),
    [
        ("peer_pidfd", OSError(errno.ENODATA, "none"), 0, "SO_PEERPIDFD"),
        ("peer_pidfd", None, 0, "6.5"),
        ("pidfd_info_raw", OSError(errno.ENOTTY, "no such ioctl"), 1, "6.13"),
    ],
)
def test_probe_says_how_much_this_kernel_can_tell_and_why_not_more(
    monkeypatch: pytest.MonkeyPatch, call: str, answer: object, level: int, said: str
) -> None:
    if level > LEVEL:
        pytest.skip(probe_level().reason)

    def answering(*_arguments: object) -> object:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(peers, call, answering)
    with no_descriptor_left():
        probe = probe_level()
    assert probe.level == level
    assert said in probe.reason


def test_facts_for_rules_are_ids_and_groups_without_the_overflow_group(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "peer_groups", lambda _sock: (7, 65534, 8))
    peer = PeerAtConnect(pair, 0)
    facts = peer.facts(ControlGroups(None, []))
    assert facts == ClientFacts(os.getuid(), frozenset({7, 8, os.getgid()}), frozenset())


def test_many_groups_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "peer_groups", lambda _sock: tuple(range(100_000, 165_536)))
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tracemalloc.start()
    try:
        with one, other:
            peer = PeerAtConnect(one, 0)
        taken, _ = tracemalloc.get_traced_memory()
        assert taken < 300_000
        assert {100_000, 165_535, peer.gid} <= peer.groups
    finally:
        tracemalloc.stop()


@pytest.mark.root
def test_supplementary_groups_are_those_of_connect(reached: SteppedBroker) -> None:
    def client() -> None:
        become(CLIENT_UID, groups=tuple(range(40000, 40300)))
        with Speaker.connect(listener_of(reached)) as speaker:
            groups = speaker.status()["peer"]["groups"]
            assert groups == [CLIENT_UID, *range(40000, 40300)]

    assert served(reached, client) == 0


# Labels. The kernel of these tests may have no security module; then they are told by a stand-in for the one
# call, and what is shown is what is made of its answer.


def test_label_is_what_the_security_module_says_without_its_nul(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bytes | OSError] = []

    def answer(*_arguments: object) -> bytes:
        value = said.pop()
        if isinstance(value, OSError):
            raise value
        return value

    monkeypatch.setattr(peers, "_whole_option", answer)
    for value, label in (
        (b"system_u:system_r:x_t:s0\0", b"system_u:system_r:x_t:s0"),
        (b"backup (enforce)", b"backup (enforce)"),
        (b"\0", None),
        (b"", None),
        (SyscallError(errno.ENOPROTOOPT, "getsockopt"), None),
    ):
        said.append(value)
        assert peers.peer_label(pair) == label
    said.append(SyscallError(errno.EINVAL, "getsockopt"))
    with pytest.raises(SyscallError):
        peers.peer_label(pair)


def test_whether_labels_are_told_is_what_a_connection_of_our_own_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with no_descriptor_left():
        # The kernel's own answer, whichever it is; sysfs knows the modules, where it is mounted.
        modules = Path("/sys/kernel/security/lsm")
        if gives_labels() and modules.exists():
            assert set(modules.read_text().split(",")) & {"selinux", "smack", "apparmor"}
        monkeypatch.setattr(peers, "peer_label", lambda _sock: b"x_t")
        assert gives_labels()
        monkeypatch.setattr(peers, "peer_label", lambda _sock: None)
        assert not gives_labels()


@pytest.mark.parametrize(
    ("label", "effect", "reason"),
    [
        (b"x_t", "allow", "ok"),
        (b"x_t2", "allow", "no_rule"),
        (b"x_", "allow", "no_rule"),
        (b"x_t", "deny", "deny_rule"),
        (b"y_t", "deny", "ok"),
        # Of one connection the module may say nothing: then nothing is allowed by it, and all is denied.
        (None, "allow", "no_rule"),
        (None, "deny", "deny_rule"),
    ],
)
def test_label_of_the_moment_of_connect_decides(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label: bytes | None,
    effect: str,
    reason: str,
) -> None:
    rules = [rule("labelled", effect=effect, clients=[{"labels": ["x_t"]}])]
    if effect == "deny":
        rules.append(rule("all"))
    monkeypatch.setattr(peers, "peer_label", lambda _sock: label)
    with SteppedBroker(tree, policy(tree, *rules), audit=tmp_path / "audit", labels=True) as broker:
        speaker = broker.join()
        monkeypatch.setattr(peers, "peer_label", lambda _sock: b"another")
        speaker.open_one(bytes(tree / "file"))
        assert broker.reasons() == [reason]


def test_peer_whose_label_can_not_be_told_is_refused(
    pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_sock: socket.socket) -> bytes:
        raise SyscallError(errno.EINVAL, "getsockopt")

    monkeypatch.setattr(peers, "peer_label", fail)
    with no_descriptor_left():
        PeerAtConnect(pair, 0).close()
        with pytest.raises(IdentityError):
            PeerAtConnect(pair, 0, labels=True)


# User and pid namespaces


@pytest.mark.root
@pytest.mark.parametrize("what", ["uid", "gid"])
def test_overflow_id_is_nobody_even_where_a_rule_means_any(reached: SteppedBroker, what: str) -> None:
    def client() -> None:
        become(65534 if what == "uid" else CLIENT_UID, 65534 if what == "gid" else CLIENT_UID)
        with Speaker.connect(listener_of(reached), hello=False) as speaker:
            assert speaker.is_closed()

    assert served(reached, client) == 0
    assert [(record["event"], record["reason"]) for record in reached.records()] == [
        ("connection_refused", "identity_without_mapping")
    ]


@pytest.mark.root
def test_root_of_its_own_user_namespace_is_who_it_is_outside(reached: SteppedBroker) -> None:
    def client() -> None:
        become(CLIENT_UID)
        dumpable.set_dumpable(True)  # or its own files in /proc are root's
        unshare(CLONE_NEWUSER)
        Path("/proc/self/uid_map").write_text(f"0 {CLIENT_UID} 1")
        assert os.getuid() == 0
        with Speaker.connect(listener_of(reached)) as speaker:
            assert speaker.status()["peer"]["uid"] == CLIENT_UID

    assert served(reached, client) == 0


@pytest.mark.root
def test_process_without_a_mapping_in_its_user_namespace_is_who_it_is_outside(reached: SteppedBroker) -> None:
    def client() -> None:
        become(CLIENT_UID)
        unshare(CLONE_NEWUSER)
        assert os.getuid() == 65534
        with Speaker.connect(listener_of(reached)) as speaker:
            assert speaker.status()["peer"]["uid"] == CLIENT_UID

    assert served(reached, client) == 0


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_client_that_the_brokers_user_namespace_does_not_map_is_nobody(reachable: Path, level: int) -> None:
    """The broker runs in a user namespace that knows root alone; a client of another uid asks."""
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        unshare(CLONE_NEWUSER)
        theirs.send(b"unshared")
        theirs.recv(1)
        with SteppedBroker(tree, audit=reachable / "audit", level=level) as broker:
            broker.listen(reachable)
            theirs.send(b"listening")
            while True:
                broker.broker.step(-1)

    def client() -> str:
        with Speaker.connect(reachable / "listener", hello=False) as speaker:
            return fate_of_hello(speaker)

    with ours, theirs, background(serve) as pid:
        assert ours.recv(100) == b"unshared"
        Path(f"/proc/{pid}/uid_map").write_text("0 0 1")
        Path(f"/proc/{pid}/gid_map").write_text("0 0 1")
        ours.send(b"x")
        assert ours.recv(100) == b"listening"
        assert in_child(client, uid=CLIENT_UID) == "closed"
        audit = reachable / "audit"
        wait_until(lambda: "identity_without_mapping" in audit.read_text(), "a record of the refusal")


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_client_outside_the_brokers_pid_namespace_is_nobody(reachable: Path, level: int) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    ours, theirs = socket.socketpair()

    def serve_as_init() -> None:
        unshare(CLONE_NEWPID)
        if os.fork():
            os.wait()
            return
        children.set_parent_death_signal(signal.SIGKILL)
        with SteppedBroker(tree, audit=reachable / "audit", level=level) as broker:
            broker.listen(reachable)
            theirs.send(b"listening")
            while True:
                broker.broker.step(-1)

    with ours, theirs, background(serve_as_init):
        assert ours.recv(100) == b"listening"
        with Speaker.connect(reachable / "listener", hello=False) as speaker:
            assert speaker.is_closed()
        wait_until(
            lambda: "connection_refused" in (reachable / "audit").read_text(), "a record of the refusal"
        )


@pytest.mark.root
def test_client_in_a_pid_namespace_of_its_own_is_served_by_the_pid_that_we_know(
    reached: SteppedBroker,
) -> None:
    def client() -> None:
        unshare(CLONE_NEWPID)
        pid = os.fork()
        if pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            return
        status = 1
        try:
            with Speaker.connect(listener_of(reached)) as speaker:
                assert speaker.status()["peer"]["pid"] != os.getpid() == 1
                assert speaker.open_one(bytes(reached.tree / "file")).content == b"content"
            status = 0
        finally:
            os._exit(status)

    assert served(reached, client) == 0


@pytest.mark.root
def test_root_that_forges_credentials_of_another_is_refused(reached: SteppedBroker) -> None:
    def client() -> None:
        with Speaker.connect(listener_of(reached)) as speaker:
            forged = struct.pack("=iII", os.getppid(), CLIENT_UID, CLIENT_UID)
            speaker.sock.sendmsg(
                [encode_open(7, [bytes(reached.tree / "file")])],
                [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, forged)],
            )
            answer = speaker.receive()
            assert answer is not None
            assert read_opened(answer)[0].reason == "identity"

    assert served(reached, client) == 0


@pytest.mark.root
def test_rule_for_one_user_serves_that_user_alone(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir(mode=0o700)
    fill(tree)
    compiled = policy(tree)
    compiled["rules"][0]["clients"] = [{"uids": [CLIENT_UID]}, {"gids": [40001]}]
    with SteppedBroker(tree, compiled, audit=reachable / "audit") as broker:
        path = broker.listen(reachable)
        for uid, groups, reason in (
            (CLIENT_UID, (), "ok"),
            (OTHER_UID, (), "denied"),
            (0, (), "denied"),
            (OTHER_UID, (40001,), "ok"),
            (OTHER_UID, (40002,), "denied"),
        ):

            def client(uid: int = uid, groups: tuple[int, ...] = groups, reason: str = reason) -> None:
                become(uid, groups=groups)
                with Speaker.connect(path) as speaker:
                    assert speaker.open_one(bytes(tree / "file")).reason == reason

            assert served(broker, client) == 0


# Control groups


def test_control_groups_hold_their_own_id_and_those_below(tmp_path: Path) -> None:
    """Any directories will do: what is compared are inode numbers."""
    for name in ("system/a/b", "system/ab", "user/a"):
        (tmp_path / name).mkdir(parents=True)
    groups = ControlGroups(str(tmp_path), ["/system", "/system/a", "/user", "/user/missing"])

    def of(name: str) -> frozenset[str]:
        return groups.containing((tmp_path / name).stat().st_ino)

    assert of("system") == {"/system"}
    assert of("system/a") == {"/system", "/system/a"}
    assert of("system/a/b") == {"/system", "/system/a"}
    assert of("system/ab") == {"/system"}
    assert of("user/a") == {"/user"}
    assert of("") == set()
    assert groups.containing(1) == set()
    assert ControlGroups(None, ["/system"]).containing((tmp_path / "system").stat().st_ino) == set()


def test_group_that_is_called_like_a_unit_in_a_subtree_of_somebody_else_is_not_the_unit(
    tmp_path: Path,
) -> None:
    named = "/system.slice/system-a.slice"
    own = f"{named}/a@1.service"
    delegated = "/user.slice/user-1000.slice/user@1000.service"
    for path in (
        own,
        f"{delegated}{own}",
        f"{delegated}/a@1.service",
        "/system.slice/system-a.slice2/a@1.service",
    ):
        (tmp_path / path[1:]).mkdir(parents=True)
    groups = ControlGroups(str(tmp_path), [named, own])

    def containing(path: str) -> frozenset[str]:
        return groups.containing((tmp_path / path[1:]).stat().st_ino)

    assert containing(own) == {named, own}
    for path in (f"{delegated}{own}", f"{delegated}{named}", f"{delegated}/a@1.service", "/system.slice"):
        assert containing(path) == frozenset()
    assert containing("/system.slice/system-a.slice2/a@1.service") == frozenset()


def test_control_groups_follow_no_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "link").symlink_to(tmp_path / "outside")
    groups = ControlGroups(str(tmp_path), ["/named", "/named/link"])
    assert groups.containing((tmp_path / "outside").stat().st_ino) == set()


def test_this_module_knows_the_constants_of_the_headers() -> None:
    """The tests above mean what they say."""
    assert int(Path("/proc/sys/kernel/overflowuid").read_text()) == identity.OVERFLOW_ID
    assert ctypes.sizeof(ctypes.c_int) == 4
