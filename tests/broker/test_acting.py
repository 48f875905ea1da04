"""Services that act for their clients: real processes, each with a uid of its own."""

from __future__ import annotations

import array
import errno
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fdbroker.broker import acting
from fdbroker.broker.connection import State
from fdbroker.broker.identity import probe_level
from fdbroker.kernel import sockets
from fdbroker.wire.client import (
    AcceptedReply,
    ListReply,
    OpenReply,
    ServeReply,
    StatReply,
    decode_reply,
    encode_hello,
    encode_list,
    encode_more,
    encode_open,
    encode_release,
    encode_serve,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import Reason, Status
from fdbroker.wire.messages import ErrorReply
from fdbroker.wire.stream import framed
from tests.broker.conftest import no_descriptor_left
from tests.broker.puppets import Puppet
from tests.broker.speaking import (
    Speaker,
    check_audit,
    descriptors_of,
    path_of,
    read_opened,
    read_walked,
)
from tests.broker.stepping import SteppedBroker
from tests.broker.test_loop import few_left
from tests.processes import become, wait_until
from tests.running_broker import CLIENT_UID, OTHER_UID, policy, rule
from tests.scan.descriptors import lingering_socket
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.root

LEVEL = probe_level().level
LEVELS = list(range(LEVEL + 1))
KINDS = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}
SERVICE_UID, STRANGER_UID = FIRST_UID + 62, FIRST_UID + 63
SERVICES = [
    {"name": "clamd", "clients": [{"uids": [SERVICE_UID]}]},
    {"name": "index", "clients": [{"uids": [SERVICE_UID, STRANGER_UID]}]},
]
FOR_STRANGERS = [{**service, "clients": [{"uids": [STRANGER_UID]}]} for service in SERVICES]


def acting_policy(
    tree: Path,
    *more: dict[str, Any],
    services: Sequence[dict[str, Any]] = SERVICES,
    limits: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The service may have `own` for itself, and for CLIENT_UID what that one owns, but nothing `secret`."""
    return policy(
        tree,
        rule("own", clients=[{"uids": [SERVICE_UID]}], paths=["own/**"]),
        rule(
            "for clients",
            clients=[{"uids": [SERVICE_UID]}],
            on_behalf_of=[{"uids": [CLIENT_UID]}],
            where={"owner": {"uids": [], "client": False, "on_behalf_of": True}},
        ),
        rule("secret", effect="deny", paths=["**/secret"]),
        *more,
        services=list(services),
        limits=limits,
    )


class Acting(NamedTuple):
    """A broker with two listeners for services, and the processes that a test makes."""

    broker: SteppedBroker
    directory: Path
    puppets: list[Puppet]

    @property
    def tree(self) -> Path:
        return self.broker.tree

    def puppet(self, uid: int | None) -> Puppet:
        puppet = Puppet(self.broker.serve, uid=uid)
        self.puppets.append(puppet)
        return puppet

    def service(self, uid: int | None = SERVICE_UID) -> Puppet:
        """Return a process that is connected to the broker."""
        puppet = self.puppet(uid)
        puppet.do(join, self.directory / "listener")
        return puppet

    def serving(self, listener: bytes = b"clamd", uid: int | None = SERVICE_UID) -> Puppet:
        puppet = self.service(uid)
        assert puppet.do(serve, listener) == "ok"
        return puppet

    def client(self, uid: int | None = CLIENT_UID, listener: str = "clamd") -> Puppet:
        """Return a process that is connected to a service's listener."""
        puppet = self.puppet(uid)
        puppet.do(connect, self.directory / listener)
        return puppet

    def decisions(self) -> list[dict[str, Any]]:
        return [record for record in self.broker.records() if "decision" in record]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> int:
    return KINDS[request.param]


def make_files(tree: Path) -> None:
    """Make a directory that belongs to the service, one for each client, and a secret in each."""
    for name, uid in (("own", SERVICE_UID), ("client", CLIENT_UID), ("other", OTHER_UID)):
        directory = tree / name
        directory.mkdir(parents=True)
        for file in ("file", "secret"):
            (directory / file).write_text(name)
            os.chown(directory / file, uid, uid)
        os.chown(directory, uid, uid)
        directory.chmod(0o700)


def acting_broker(
    directory: Path,
    *,
    kind: int = socket.SOCK_STREAM,
    level: int | None = None,
    limits: dict[str, Any] | None = None,
) -> Iterator[Acting]:
    tree = directory / "tree"
    make_files(tree)
    compiled = acting_policy(tree, limits=limits)
    audit = directory / "audit"
    with (
        no_descriptor_left(),
        SteppedBroker(tree, compiled, audit=audit, level=level) as broker,
    ):
        broker.listen(directory)
        for name in ("clamd", "index"):
            broker.listen_for(directory, name, kind)
        made = Acting(broker, directory, [])
        try:
            yield made
        finally:
            for puppet in made.puppets:
                with puppet:
                    pass
            wait_until(lambda: no_connection_left(broker), "an end of all connections")
            assert broker.broker._services.count == 0
            assert not broker.broker._services._clients_of
            check_audit(broker.records())


def no_connection_left(broker: SteppedBroker) -> bool:
    broker.serve()
    return not broker.connections


@pytest.fixture
def acting_of_kind(reachable: Path, kind: int) -> Iterator[Acting]:
    yield from acting_broker(reachable, kind=kind)


@pytest.fixture
def made(reachable: Path) -> Iterator[Acting]:
    yield from acting_broker(reachable)


@pytest.fixture(params=LEVELS)
def of_level(request: pytest.FixtureRequest, reachable: Path) -> Iterator[Acting]:
    yield from acting_broker(reachable, level=request.param)


# What the processes do. `memory` is a puppet's own.

Memory = dict[str, Any]


def join(memory: Memory, listener: Path) -> None:
    memory["speaker"] = Speaker.connect(listener)
    memory["sockets"] = {}


def reason_of(result: Any) -> str:  # noqa: ANN401 - a Result
    return "ok" if result.status in {Status.GIVEN, Status.COPIED} else result.reason.name.lower()


def serve(memory: Memory, listener: bytes, request_id: int = 5) -> str:
    reply = memory["speaker"].ask(encode_serve(request_id, listener)).reply
    assert isinstance(reply, ServeReply), reply
    assert reply.id == request_id
    return reason_of(reply.result)


class Accepted(NamedTuple):
    id: int
    number: int
    pid: int
    uid: int
    gid: int
    level: int


def accepted(memory: Memory) -> Accepted:
    """Receive one client; keep its socket by its number."""
    answer = memory["speaker"].receive()
    assert answer is not None
    reply = answer.reply
    assert isinstance(reply, AcceptedReply), reply
    with answer.descriptors as descriptors:
        assert len(descriptors) == 1
        memory["sockets"][reply.client.number] = socket.socket(fileno=descriptors.take())
    return Accepted(reply.id, *reply.client)


def may_hold_back(memory: Memory) -> tuple[int, int]:
    """Receive one client; return its number, and how many releases may be held back."""
    answer = memory["speaker"].receive()
    with answer.descriptors as descriptors:
        memory["sockets"][answer.reply.client.number] = socket.socket(fileno=descriptors.take())
    return answer.reply.client.number, answer.reply.may_hold_back


def frames_there(memory: Memory) -> int:
    """Count what is there to be received, and receive it."""
    return len(memory["speaker"].arrived())


def release(memory: Memory, *numbers: int) -> None:
    """Release clients; return when that is done."""
    memory["speaker"].sock.send(encode_release(6, numbers))
    reply = memory["speaker"].ask(encode_status(9)).reply
    assert reply.id == 9, reply


def open_for(memory: Memory, number: int | None, *paths: bytes) -> list[tuple[str, bytes | None]]:
    answer = memory["speaker"].ask(encode_open(7, paths, number))
    return [(opened.reason, opened.content) for opened in read_opened(answer)]


def ask_all(memory: Memory, number: int | None, directory: bytes) -> list[str]:
    """Ask each question there is for a client; return what becomes of it."""
    speaker = memory["speaker"]
    found = []
    for message in (
        encode_open(7, [directory + b"/file"], number),
        encode_stat(7, [directory + b"/file"], number),
        encode_list(7, directory, client=number),
    ):
        answer = speaker.ask(message)
        reply = answer.reply
        if isinstance(reply, ListReply):
            found.append(reason_of(reply.result))
        elif isinstance(reply, StatReply):
            found.append(reason_of(reply.results[0][0]))
        else:
            assert isinstance(reply, OpenReply)
            found.append(reason_of(reply.results[0]))
        assert bool(answer.descriptors) == (isinstance(reply, OpenReply) and found[-1] == "ok")
    speaker.begin_walk(directory, credit=1, client=number)
    answer = speaker.receive()
    frame = read_walked(answer)
    assert frame.end is not None
    found.append(frame.reason)
    return found


def walk_for(memory: Memory, number: int, start: bytes) -> list[tuple[bytes, bytes | None]]:
    memory["speaker"].begin_walk(start, credit=1, client=number)
    frame = read_walked(memory["speaker"].receive())
    assert frame.end is not None
    assert frame.reason == "ok"
    return frame.entries


def names_for(memory: Memory, number: int, directory: bytes) -> list[bytes]:
    reply = memory["speaker"].ask(encode_list(7, directory, client=number)).reply
    assert isinstance(reply, ListReply)
    return sorted(entry.name for entry in reply.entries)


def connect(memory: Memory, listener: Path) -> int:
    """Connect to a service, by the kind of socket it has; return the process."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    error = sock.connect_ex(str(listener))
    if error == errno.EPROTOTYPE:
        sock.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        error = sock.connect_ex(str(listener))
    assert not error
    sock.settimeout(20)
    memory["sock"] = sock
    memory.setdefault("all", []).append(sock)
    return os.getpid()


def say(memory: Memory, data: bytes) -> None:
    memory["sock"].sendall(data)


def hear(memory: Memory) -> bytes:
    data: bytes = memory["sock"].recv(100)
    return data


def say_to(memory: Memory, number: int, data: bytes) -> None:
    memory["sockets"][number].sendall(data)


def hear_from(memory: Memory, number: int) -> bytes:
    data: bytes = memory["sockets"][number].recv(100)
    return data


def close_client(memory: Memory, number: int) -> None:
    memory["sockets"].pop(number).close()


def hang_up(memory: Memory) -> None:
    memory["speaker"].sock.close()


def change_ids(_memory: Memory, uid: int) -> None:
    become(uid)


def change_effective_uid(_memory: Memory, uid: int) -> None:
    os.setresuid(-1, uid, -1)


def file_of(made: Acting, name: str, file: str = "file") -> bytes:
    return bytes(made.tree / name / file)


REFUSED = ["identity"] * 4


# Handed over


def test_service_gets_the_socket_and_what_the_kernel_says_of_the_client(acting_of_kind: Acting) -> None:
    made = acting_of_kind
    service = made.serving()
    client = made.client()
    got = service.do(accepted)
    assert got == (5, got.number, client.pid, CLIENT_UID, CLIENT_UID, LEVEL)
    client.do(say, b"SCAN")
    assert service.do(hear_from, got.number) == b"SCAN"
    service.do(say_to, got.number, b"OK")
    assert client.do(hear) == b"OK"
    [record] = [record for record in made.broker.records() if record["event"] == "client_accepted"]
    assert (record["uid"], record["for_uid"], record["for_pid"]) == (SERVICE_UID, CLIENT_UID, client.pid)
    assert record["for_number"] == got.number


def test_broker_keeps_no_copy_of_the_clients_socket(acting_of_kind: Acting) -> None:
    service, client = acting_of_kind.serving(), acting_of_kind.client()
    number = service.do(accepted).number
    service.do(close_client, number)
    assert client.do(hear) == b""


def test_descriptors_that_a_client_sends_reach_the_service(made: Acting) -> None:
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    client.do(send_descriptor)
    assert service.do(read_descriptor, number) == b"handed over"


def send_descriptor(memory: Memory) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"handed over")
    rights = array.array("i", [read_end])
    memory["sock"].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def read_descriptor(memory: Memory, number: int) -> bytes:
    received = sockets.receive(memory["sockets"][number], 10)
    with received.descriptors as descriptors:
        [descriptor] = descriptors.numbers()
        return os.read(descriptor, 100)


def test_client_that_waited_before_there_was_a_service_is_handed_over_then(made: Acting) -> None:
    client = made.client()
    client.do(say, b"early")
    service = made.serving()
    number = service.do(accepted).number
    assert service.do(hear_from, number) == b"early"


# Decided for both


def test_request_for_a_client_needs_a_rule_for_both(made: Acting) -> None:
    service = made.serving()
    made.client(CLIENT_UID), made.client(OTHER_UID)
    clients = [service.do(accepted) for _ in range(2)]
    number = {client.uid: client.number for client in clients}
    asked = [file_of(made, name) for name in ("client", "own", "other")]
    denied = ("denied", None)
    assert service.do(open_for, number[CLIENT_UID], *asked) == [("ok", b"client"), denied, denied]
    assert service.do(open_for, number[OTHER_UID], *asked) == [denied] * 3
    # The service itself has what is its own, and nothing of its clients.
    assert service.do(open_for, None, *asked) == [denied, ("ok", b"own"), denied]


def test_deny_rules_hold_for_clients_too(made: Acting) -> None:
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    assert service.do(open_for, number, file_of(made, "client", "secret")) == [("denied", None)]
    assert made.decisions()[-1]["reason"] == "deny_rule"


def test_both_are_on_record_with_each_request(made: Acting) -> None:
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    assert service.do(ask_all, number, bytes(made.tree / "client")) == ["ok"] * 4
    service.do(open_for, number, file_of(made, "other"))
    who = {"uid": SERVICE_UID, "for_number": number, "for_pid": client.pid}
    who |= {"pid": service.pid, "for_uid": CLIENT_UID, "for_gid": CLIENT_UID}
    decisions = made.decisions()
    assert {record["event"] for record in decisions} == {"open", "stat", "list", "walk"}
    assert [record["decision"] for record in decisions].count("deny") == 1
    for record in (*decisions, made.broker.records()[-2]):
        assert {key: record[key] for key in who} == who
    assert {record["for_number"] for record in made.broker.records() if record["event"] == "walk_ended"} == {
        number
    }
    service.do(open_for, None, file_of(made, "own"))
    assert "for_number" not in made.decisions()[-1]


def test_walk_and_list_for_a_client_show_what_it_may_have(made: Acting) -> None:
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    assert service.do(walk_for, number, bytes(made.tree / "client")) == [(b"file", b"client")]
    assert service.do(names_for, number, bytes(made.tree / "client")) == [b"file"]


def test_listener_of_clients_is_not_one_of_the_broker(made: Acting) -> None:
    """Who connects there and talks to the broker talks to the service."""
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    client.do(say, encode_status(1))
    assert service.do(hear_from, number) == encode_status(1)


# Who the client is now


def test_client_that_has_exited_is_nobody_any_more(of_level: Acting) -> None:
    made = of_level
    level = made.broker.broker._level
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    client.end()
    asked = service.do(ask_all, number, bytes(made.tree / "client"))
    if not level:
        return  # without pidfds nobody knows
    assert asked == REFUSED
    assert {record["reason"] for record in made.decisions()} == {"client_peer_has_exited"}
    assert {record["for_pid"] for record in made.decisions()} == {client.pid}


@pytest.mark.skipif(LEVEL < 2, reason="identity level 2 needs Linux 6.13")
@pytest.mark.parametrize("change", [change_ids, change_effective_uid])
def test_client_that_changed_its_ids_is_nobody_any_more(
    made: Acting, change: Callable[[Memory, int], None]
) -> None:
    """A client that is root may become anybody: it is who it was when it connected, or nobody."""
    service, client = made.serving(), made.client(None)
    number = service.do(accepted).number
    client.do(change, CLIENT_UID)
    assert service.do(ask_all, number, bytes(made.tree / "client")) == REFUSED
    assert {record["reason"] for record in made.decisions()} == {"client_identity_changed_since_connect"}


@pytest.mark.skipif(LEVEL < 2, reason="identity level 2 needs Linux 6.13")
def test_client_that_executes_a_set_user_id_program_is_nobody_any_more(made: Acting) -> None:
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    program = made.directory / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    os.chown(program, OTHER_UID, OTHER_UID)
    program.chmod(0o4755)
    client.begin(execute, str(program), "30")
    while b"program" not in Path(f"/proc/{client.pid}/cmdline").read_bytes():
        select.select([], [], [], 0.001)
    assert service.do(ask_all, number, bytes(made.tree / "client")) == REFUSED
    assert service.do(ask_all, number, bytes(made.tree / "other")) == REFUSED


@pytest.mark.skipif(LEVEL < 2, reason="identity level 2 needs Linux 6.13")
@pytest.mark.parametrize("change", ["before it connects", "before it is accepted"])
def test_set_user_id_program_is_not_taken_for_its_owner(made: Acting, change: str) -> None:
    """Who runs it may have made it connect, and what it says there may be theirs."""
    client = made.puppet(None)
    if change == "before it connects":
        client.do(change_effective_uid, CLIENT_UID)
    client.do(connect, made.directory / "clamd")
    if change == "before it is accepted":
        client.do(change_effective_uid, CLIENT_UID)
    service = made.serving()
    assert client.do(hear) == b""
    assert service.do(frames_there) == 0
    [record] = [record for record in made.broker.records() if record["event"] == "client_refused"]
    reasons = {"before it connects": "connected_with_other_ids"}
    assert record["reason"] == reasons.get(change, "identity_changed_since_connect")


def execute(_memory: Memory, *arguments: str) -> None:
    os.execv(arguments[0], arguments)  # noqa: S606 - the test's own copy


def test_client_whose_socket_another_process_holds_is_who_connected(made: Acting) -> None:
    """A forked child of the client speaks for it, but when the client is gone nobody is asked for."""
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    holder = client.do(fork_and_hold)
    assert service.do(open_for, number, file_of(made, "client")) == [("ok", b"client")]
    client.end()
    os.kill(holder, 0)
    if LEVEL:
        assert service.do(open_for, number, file_of(made, "client")) == [("identity", None)]
    os.kill(holder, signal.SIGKILL)


def fork_and_hold(_memory: Memory) -> int:
    """Start a process that has all that this one has, but the test; return its pid."""
    pid = os.fork()
    if not pid:
        os.close(3)
        select.select([], [], [], 20)
        os._exit(0)
    return pid


# Numbers


def test_released_number_is_nobody_and_the_client_stays_connected(made: Acting) -> None:
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    service.do(release, number)
    assert service.do(ask_all, number, bytes(made.tree / "client")) == REFUSED
    assert {(record["reason"], record["for_number"]) for record in made.decisions()} == {
        ("no_such_client", number)
    }
    service.do(release, number)  # which means nothing now
    service.do(say_to, number, b"bye")
    assert client.do(hear) == b"bye"


def test_number_is_nobody_on_any_other_connection(made: Acting) -> None:
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    same_service = made.service()
    other_service = made.serving(b"index", STRANGER_UID)
    for other in (same_service, other_service):
        for guess in (number, number - 1, number + 1, 0, 0xFFFFFFFF):
            assert other.do(ask_all, guess, bytes(made.tree / "client")) == REFUSED
        other.do(release, number)
    assert service.do(open_for, number, file_of(made, "client")) == [("ok", b"client")]


def test_number_of_an_earlier_connection_is_nobody_and_none_is_used_twice(made: Acting) -> None:
    numbers = []
    client = made.puppet(CLIENT_UID)
    for _ in range(5):
        service = made.serving()
        client.do(connect, made.directory / "clamd")
        got = service.do(accepted)
        numbers.append(got.number)
        service.do(open_for, got.number, file_of(made, "client"))
        service.do(hang_up)
        service.do(join, made.directory / "listener")
        assert service.do(ask_all, got.number, bytes(made.tree / "client")) == REFUSED
        service.end()
    assert len(set(numbers)) == len(numbers)


def test_client_of_a_service_that_asks_for_none_is_refused(made: Acting) -> None:
    service = made.service()
    assert service.do(ask_all, 1, bytes(made.tree / "client")) == REFUSED


def test_walk_for_a_client_ends_when_the_client_is_released(made: Acting) -> None:
    for name in ("second", "third"):
        (made.tree / "client" / name).touch()
        os.chown(made.tree / "client" / name, CLIENT_UID, CLIENT_UID)
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    assert service.do(walk_and_release, number, bytes(made.tree / "client")) == ["ok", "identity"]


def test_walks_of_one_client_of_a_service_keep_no_other_client_from_its_own(made: Acting) -> None:
    service = made.serving()
    made.client(), made.client()
    one, other = [service.do(accepted).number for _ in range(2)]
    start = bytes(made.tree / "client")
    assert service.do(begin_walks_for, one, start, 5) == ["limit"]
    assert service.do(walk_for, other, start) == [(b"file", b"client")]


def begin_walks_for(memory: Memory, number: int, start: bytes, count: int) -> list[str]:
    """Begin walks that wait for credit; return what is said of the last one."""
    speaker = memory["speaker"]
    for request_id in range(100, 100 + count):
        speaker.begin_walk(start, credit=0, client=number, request_id=request_id)
    return [read_walked(speaker.receive()).reason]


def walk_and_release(memory: Memory, number: int, start: bytes) -> list[str]:
    """Walk with frames of one entry; release the client behind the first."""
    speaker = memory["speaker"]
    speaker.begin_walk(start, credit=1, client=number, most=1)
    found = [read_walked(speaker.receive()).reason]
    release(memory, number)
    speaker.send(encode_more(20, 5))
    found.append(read_walked(speaker.receive()).reason)
    return found


def test_numbers_that_are_used_up_refuse_clients_and_are_not_used_again(
    made: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = made.serving()
    made.broker.broker._services._last_number = 0xFFFFFFFE
    made.client()
    assert service.do(accepted).number == 0xFFFFFFFF
    assert made.client().do(hear) == b""
    [record] = [record for record in made.broker.records() if record["event"] == "client_refused"]
    assert (record["reason"], record["uid"]) == ("numbers_used_up", CLIENT_UID)


# Who may serve


@pytest.mark.parametrize("listener", [b"clamd", b"index", b"nothing", b"\xff/.."])
def test_who_may_not_serve_learns_nothing_of_what_there_is(made: Acting, listener: bytes) -> None:
    stranger = made.service(OTHER_UID)
    assert stranger.do(serve, listener) == "denied"
    record = made.broker.records()[-1]
    assert (record["event"], record["reason"], record["uid"]) == ("serve", "no_service", OTHER_UID)
    client = made.client()
    made.broker.serve()
    assert stranger.do(frames_there) == 0
    client.do(say, b"waits")


def test_listener_that_does_not_exist_is_denied_like_one_that_may_not_be_served(made: Acting) -> None:
    assert made.service().do(serve, b"nothing") == "denied"


def test_second_time_is_refused_on_the_same_connection_and_allowed_on_another(made: Acting) -> None:
    service = made.serving()
    assert service.do(serve, b"clamd") == "busy"
    assert made.broker.records()[-1]["reason"] == "served_already"
    made.serving()


def test_two_services_get_the_clients_of_their_own_listeners(made: Acting) -> None:
    clamd, index = made.serving(), made.serving(b"index", STRANGER_UID)
    one, other = made.client(), made.client(listener="index")
    assert clamd.do(accepted).pid == one.pid
    assert index.do(accepted).pid == other.pid
    assert (clamd.do(frames_there), index.do(frames_there)) == (0, 0)


def test_one_connection_serves_two_listeners_and_knows_them_by_its_requests(made: Acting) -> None:
    service = made.service()
    assert service.do(serve, b"clamd", 1) == "ok"
    assert service.do(serve, b"index", 2) == "ok"
    one, other = made.client(), made.client(listener="index")
    got = {client.id: client for client in (service.do(accepted), service.do(accepted))}
    assert got[1].pid == one.pid
    assert got[2].pid == other.pid
    assert got[1].number != got[2].number


def test_two_connections_of_a_service_share_its_clients(made: Acting) -> None:
    one, other = made.serving(), made.serving()
    client = made.client()
    for _ in range(3):
        client.do(connect, made.directory / "clamd")
    made.broker.serve()
    assert (one.do(frames_there), other.do(frames_there)) == (2, 2)


def test_who_waits_while_a_service_restarts_is_handed_over_then(made: Acting) -> None:
    first = made.serving()
    client = made.client()
    first.do(accepted)
    first.end()
    made.broker.serve()
    waiting = made.client()
    made.broker.serve()
    waiting.do(say, b"hello")
    again = made.serving()
    got = again.do(accepted)
    assert got.pid == waiting.pid
    assert again.do(hear_from, got.number) == b"hello"
    assert client.do(hear) == b""  # its service is gone, and the broker keeps nothing of it
    assert "client_refused" not in made.broker.events()


def test_message_of_another_process_neither_serves_nor_releases(made: Acting) -> None:
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    service.do(send_in_child, encode_release(9, [number]))
    reply = service.do(ask_in_child, encode_serve(8, b"index"))
    assert reply.reason is Reason.IDENTITY
    assert made.broker.events()[-2:] == ["release_refused", "serve_refused"]
    assert service.do(open_for, number, file_of(made, "client")) == [("ok", b"client")]


def send_in_child(memory: Memory, message: bytes) -> None:
    pid = os.fork()
    if not pid:
        memory["speaker"].sock.send(message)
        os._exit(0)
    os.waitpid(pid, 0)


def ask_in_child(memory: Memory, message: bytes) -> ErrorReply:
    send_in_child(memory, message)
    reply = memory["speaker"].receive().reply
    assert isinstance(reply, ErrorReply)
    return reply


@pytest.mark.skipif(LEVEL < 1, reason="identity level 1 needs Linux 6.5")
def test_service_that_left_its_connection_to_another_process_gets_no_more_clients(made: Acting) -> None:
    """It started a process that inherited the connection, and ended: the next to serve has the clients."""
    old = made.serving()
    holder = old.do(fork_and_hold)
    old.end()
    client = made.client()
    made.broker.serve()
    new = made.serving()
    assert new.do(accepted).pid == client.pid
    [record] = [record for record in made.broker.records() if record["event"] == "serve_ended"]
    assert record["reason"] == "peer_has_exited"
    assert record["listener"] == "clamd"
    os.kill(holder, signal.SIGKILL)


@pytest.mark.skipif(LEVEL < 2, reason="identity level 2 needs Linux 6.13")
def test_service_that_changed_its_ids_gets_no_more_clients(made: Acting) -> None:
    services = [{**SERVICES[0], "clients": [{"uids": [0]}]}, SERVICES[1]]
    made.broker.switch(acting_policy(made.tree, services=services))
    service = made.serving(uid=None)
    service.do(change_ids, OTHER_UID)
    made.client()
    made.broker.serve()
    assert service.do(frames_there) == 0
    assert made.broker.records()[-1]["reason"] == "identity_changed_since_connect"


# A reload


def test_reload_that_takes_the_right_to_serve_ends_it_and_says_so(made: Acting) -> None:
    service = made.serving()
    before = made.client()
    number = service.do(accepted).number
    made.broker.switch(acting_policy(made.tree, services=FOR_STRANGERS))
    reply = service.do(next_reply)
    assert isinstance(reply, ServeReply)
    assert (reply.id, reply.generation, reason_of(reply.result)) == (5, 2, "denied")
    made.client()
    made.broker.serve()
    assert service.do(frames_there) == 0
    [record] = [record for record in made.broker.records() if record["event"] == "serve_ended"]
    assert (record["listener"], record["reason"], record["pid"]) == ("clamd", "no_service", service.pid)
    # The client that it has it keeps, and the rules say what that is worth.
    assert service.do(open_for, number, file_of(made, "client")) == [("ok", b"client")]
    before.do(say, b"x")
    assert service.do(serve, b"clamd") == "denied"


def test_service_of_two_listeners_that_takes_no_answer_to_either_is_dropped_once(made: Acting) -> None:
    service = made.service()
    for listener in (b"clamd", b"index"):
        assert service.do(serve, listener) == "ok"
    service.do(take_no_answers)
    made.broker.switch(policy(made.tree, services=FOR_STRANGERS))
    assert made.broker.connections == 0
    assert made.broker.events().count("undelivered") == 2


def take_no_answers(memory: Memory) -> None:
    memory["speaker"].sock.shutdown(socket.SHUT_RD)


def next_reply(memory: Memory) -> Any:  # noqa: ANN401 - whatever came
    return memory["speaker"].receive().reply


def test_reload_decides_the_next_request_for_a_client(made: Acting) -> None:
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    assert service.do(open_for, number, file_of(made, "client")) == [("ok", b"client")]
    made.broker.switch(policy(made.tree, rule("own", clients=[{"uids": [SERVICE_UID]}]), services=SERVICES))
    assert service.do(ask_all, number, bytes(made.tree / "client")) == ["denied"] * 4
    assert service.do(open_for, None, file_of(made, "client")) == [("ok", b"client")]


# Limits


def test_clients_of_one_uid_are_limited_over_all_services(reachable: Path) -> None:
    limits = {"connections_per_uid": 3, "in_flight_per_connection": 512}
    for made in acting_broker(reachable, limits=limits):
        clamd, index = made.serving(), made.serving(b"index", STRANGER_UID)
        client, other = made.client(), made.client(OTHER_UID)
        client.do(connect, made.directory / "clamd")
        client.do(connect, made.directory / "index")
        made.broker.serve()
        client.do(connect, made.directory / "index")
        assert client.do(hear) == b""  # closed
        record = made.broker.records()[-1]
        assert (record["event"], record["reason"]) == ("client_refused", "connections_per_uid")
        assert (record["uid"], record["listener"]) == (CLIENT_UID, "index")
        got = [clamd.do(accepted) for _ in range(3)]
        assert other.pid in {client.pid for client in got}
        assert index.do(frames_there) == 1
        # When one is released there is room again.
        clamd.do(release, next(a.number for a in got if a.pid == client.pid))
        client.do(connect, made.directory / "index")
        assert index.do(accepted).pid == client.pid


def test_a_client_that_is_refused_can_not_hold_up_the_broker_by_what_it_sent(reachable: Path) -> None:
    """Sockets that linger are closed with its connection."""
    limits = {"connections_per_uid": 1, "in_flight_per_connection": 512}
    for made in acting_broker(reachable, limits=limits):
        service = made.serving()
        clients: list[Memory] = [{}, {}]
        connect(clients[0], made.directory / "clamd")
        made.broker.serve()
        assert service.do(accepted).pid == os.getpid()
        connect(clients[1], made.directory / "clamd")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _ in range(3):
                with lingering_socket(listener.getsockname()) as lingering:
                    socket.send_fds(clients[1]["sock"], [b"x"], [lingering.fileno()])
                    os.close(lingering.detach())
            signals = signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)
            began = time.monotonic()
            made.broker.serve()
            assert time.monotonic() - began < 2
            assert (signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)) == signals
        record = made.broker.records()[-1]
        assert (record["event"], record["reason"]) == ("client_refused", "connections_per_uid")
        for client in clients:
            client["sock"].close()


def hold_back_after(made: Acting, client: Puppet, service: Puppet, name: str = "clamd") -> tuple[int, int]:
    """Connect once more; return the client's number and how many releases may then be held back."""
    client.do(connect, made.directory / name)
    made.broker.serve()
    told: tuple[int, int] = service.do(may_hold_back)
    return told


def test_the_nearer_a_user_is_to_its_limit_the_fewer_releases_may_be_held_back(reachable: Path) -> None:
    limits = {"connections_per_uid": 20, "in_flight_per_connection": 512}
    for made in acting_broker(reachable, limits=limits):
        service, index = made.serving(), made.serving(b"index", STRANGER_UID)
        client, other, stranger = (made.puppet(uid) for uid in (CLIENT_UID, OTHER_UID, STRANGER_UID))
        told = [hold_back_after(made, client, service) for _ in range(17)]
        assert [may for _, may in told] == [(20 - count) // 4 for count in range(1, 18)]
        # Whoever is near a limit: who serves others may have clients of that user, too.
        assert hold_back_after(made, other, service)[1] == 0
        assert hold_back_after(made, other, index, "index")[1] == 0
        service.do(release, *(number for number, _ in told))
        assert hold_back_after(made, client, service)[1] == 4
        # Who has more than another policy allows.
        made.broker.switch(
            acting_policy(made.tree, limits={"connections_per_uid": 1, "in_flight_per_connection": 512})
        )
        assert hold_back_after(made, stranger, service)[1] == 0
        assert "client_refused" not in made.broker.events()


def test_few_releases_are_held_back_however_far_away_the_limit_is(made: Acting) -> None:
    service = made.serving()
    made.broker.switch(made_policy_with_many(made))
    assert hold_back_after(made, made.puppet(CLIENT_UID), service)[1] == 16


def test_of_many_users_none_is_looked_for_who_is_near_a_limit_and_no_release_is_held_back(
    made: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acting, "_MOST_USERS_LOOKED_AT", 2)
    service = made.serving()
    made.broker.switch(made_policy_with_many(made))
    users = [made.puppet(uid) for uid in (CLIENT_UID, OTHER_UID, STRANGER_UID)]
    assert [hold_back_after(made, user, service)[1] for user in users] == [16, 16, 0]


def test_one_message_releases_several_and_what_is_none_in_it_means_nothing(made: Acting) -> None:
    service = made.serving()
    numbers = []
    for _ in range(3):
        made.client()
        numbers.append(service.do(accepted).number)
    service.do(release, numbers[0], 99, numbers[0], numbers[2])
    assert made.broker.broker._services.count == 1
    reasons = [service.do(ask_all, number, bytes(made.tree / "client"))[0] for number in numbers]
    assert [reason == "identity" for reason in reasons] == [True, False, True]


def turns_of(broker: SteppedBroker, rounds: int = 5) -> int:
    """Count how often the loop has something to do although nothing happens."""
    return sum(bool(broker.broker._epoll.poll(0)) or bool(broker.broker._busy) for _ in range(rounds))


def test_service_that_does_not_read_makes_its_listener_wait_and_nobody_else(made: Acting) -> None:
    bystander = made.broker.join()
    service = made.serving()
    client = made.client(None)
    made.broker.switch(made_policy_with_many(made))
    for _ in range(400):
        client.do(connect, made.directory / "clamd")
    for _ in range(500):
        made.broker.broker.step(0)
    held = len(next(iter(made.broker.broker._services._servers[b"clamd"])).clients)
    assert 10 < held < 400
    assert turns_of(made.broker) == 0
    assert bystander.stat(b"/nowhere").results
    # It reads, and gets the rest.
    assert service.do(accept_many, 400) == 400
    bystander.close()


def made_policy_with_many(made: Acting) -> dict[str, Any]:
    return acting_policy(made.tree, limits={"connections_per_uid": 1000, "in_flight_per_connection": 512})


def accept_many(memory: Memory, count: int) -> int:
    for _ in range(count):
        accepted(memory)
    return len(memory["sockets"])


def test_no_more_than_so_many_clients_of_one_connection(
    made: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acting, "MOST_CLIENTS", 4)
    service = made.serving()
    client = made.client()
    for _ in range(7):
        client.do(connect, made.directory / "clamd")
    got = [service.do(accepted) for _ in range(4)]
    made.broker.serve()
    assert service.do(frames_there) == 0
    assert turns_of(made.broker) == 0
    # Another connection takes those who wait, and so does this one when it has released some.
    other = made.serving()
    assert other.do(accepted).pid == client.pid
    for _ in range(3):
        other.do(accepted)
    made.client(OTHER_UID)
    made.broker.serve()
    assert turns_of(made.broker) == 0
    service.do(release, got[0].number)
    assert service.do(accepted).uid == OTHER_UID


def test_no_more_than_so_many_clients_in_all(made: Acting) -> None:
    made.broker.broker._services._most = 2
    service, other = made.serving(), made.serving(b"index", STRANGER_UID)
    client = made.client()
    client.do(connect, made.directory / "clamd")
    client.do(connect, made.directory / "index")
    made.broker.serve()
    assert (service.do(frames_there), other.do(frames_there)) == (2, 0)
    assert turns_of(made.broker) == 0
    service.end()
    made.broker.serve()
    assert other.do(accepted).pid == client.pid


def test_service_without_room_for_descriptors_waits_without_turning(
    made: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client = made.serving(), made.client()
    service.do(accepted)
    flight = made.broker.broker._flight
    monkeypatch.setattr(flight, "most_per_uid", 0)
    client.do(connect, made.directory / "clamd")
    made.broker.broker.step(0)
    assert made.broker.broker._acceptor.resting
    assert made.broker.broker._epoll.poll(0) == []
    monkeypatch.undo()
    assert service.do(accepted).pid == client.pid


def test_client_that_hung_up_before_it_was_accepted_harms_nobody(made: Acting) -> None:
    client = made.client()
    client.do(hang_up_client)
    gone = made.client()
    gone.end()
    last = made.client()
    service = made.serving()
    got = [service.do(accepted)]
    while got[-1].pid != last.pid:
        got.append(service.do(accepted))
    if LEVEL:
        assert gone.pid not in {client.pid for client in got}
        assert "peer_has_exited" in {record.get("reason") for record in made.broker.records()}


def hang_up_client(memory: Memory) -> None:
    memory["sock"].close()


def test_client_is_refused_when_it_can_not_be_recorded(made: Acting, monkeypatch: pytest.MonkeyPatch) -> None:
    service = made.serving()
    client = made.puppet(CLIENT_UID)

    def no_space(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(made.broker.audit, "_write", lambda _first, _text: False)
        client.do(connect, made.directory / "clamd")
        assert client.do(hear) == b""
    assert service.do(frames_there) == 0
    made.broker.audit.sequence = made.broker.records()[-1]["seq"] + 1


def test_client_is_closed_when_descriptors_run_out_and_the_next_one_is_served(made: Acting) -> None:
    service = made.serving()
    client = made.puppet(CLIENT_UID)
    client.begin(connect, made.directory / "clamd")
    with few_left(0):
        made.broker.broker.step(10)
        assert turns_of(made.broker) == 0
    client.result()
    assert made.broker.records()[-1]["reason"] == "descriptors"
    assert client.do(hear) == b""
    assert made.client().pid == service.do(accepted).pid


def test_service_on_a_stream_gets_its_clients_and_answers_with_their_files(made: Acting) -> None:
    sock = made.directory / "stream"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(sock))
    sock.chmod(0o666)
    listener.listen()
    made.broker.broker.add_listener(listener, "stream")
    service, client = made.puppet(SERVICE_UID), made.client()
    got = service.do(serve_on_stream, sock, file_of(made, "client"))
    assert got == (client.pid, CLIENT_UID, b"client")


def serve_on_stream(_memory: Memory, listener: Path, path: bytes) -> tuple[int, int, bytes]:
    """Greet, serve, take one client and open a file for it, all by hand."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect(str(listener))
        sock.sendall(framed(encode_hello(1)) + framed(encode_serve(5, b"clamd")))
        frame_of(sock), frame_of(sock)
        accepted_frame, [client] = frame_of(sock)
        os.close(client)
        reply = decode_reply(accepted_frame)
        assert isinstance(reply, AcceptedReply)
        sock.sendall(framed(encode_open(7, [path], reply.client.number)))
        _, [file] = frame_of(sock)
        content = os.read(file, 100)
        os.close(file)
        return reply.client.pid, reply.client.uid, content


def frame_of(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one frame of a stream, and the descriptors that came with its first byte."""
    length, descriptors, _, _ = socket.recv_fds(sock, 4, 1)
    return sock.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL), descriptors


def test_nothing_is_sent_to_a_service_on_a_stream_while_a_helper_may_send_there(made: Acting) -> None:
    """Neither a client nor the end of serving: it would be in the middle of the helper's frame."""
    sock = made.directory / "stream"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(sock))
    sock.chmod(0o666)
    listener.listen()
    made.broker.broker.add_listener(listener, "stream")
    service = made.puppet(SERVICE_UID)
    service.do(begin_on_stream, sock)
    [connection] = made.broker.broker._connections.values()
    connection.awaited = 1
    made.broker.broker._wait_for(connection, State.WAITING)
    client = made.client()
    made.broker.switch(acting_policy(made.tree, services=FOR_STRANGERS))
    made.broker.serve()
    assert not service.do(has_something)
    assert turns_of(made.broker) == 0
    connection.awaited = 0
    made.broker.broker._read_on(connection)
    reply = decode_reply(service.do(frame_on_stream))
    assert isinstance(reply, ServeReply)
    assert reason_of(reply.result) == "denied"
    # Who waited is handed over to whoever may serve now.
    assert made.serving(b"clamd", STRANGER_UID).do(accepted).pid == client.pid


def begin_on_stream(memory: Memory, listener: Path) -> None:
    memory["stream"] = sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(listener))
    sock.sendall(framed(encode_hello(1)) + framed(encode_serve(5, b"clamd")))
    frame_of(sock), frame_of(sock)


def has_something(memory: Memory) -> bool:
    return bool(select.select([memory["stream"]], [], [], 0)[0])


def frame_on_stream(memory: Memory) -> bytes:
    return frame_of(memory["stream"])[0]


def test_nothing_stays_open_of_clients_that_come_and_go(made: Acting) -> None:
    service, client = made.serving(), made.client()
    service.do(release, service.do(accepted).number)
    before = descriptors_of()
    for _ in range(30):
        client.do(connect, made.directory / "clamd")
        number = service.do(accepted).number
        service.do(open_for, number, file_of(made, "client"))
        service.do(release, number)
        service.do(close_client, number)
    assert descriptors_of() == before
    assert path_of(made.decisions()[-1]) == file_of(made, "client")


# Attacks


def test_guessed_numbers_are_nobody(made: Acting) -> None:
    service, thief = made.serving(), made.serving(b"index", STRANGER_UID)
    made.client()
    number = service.do(accepted).number
    guesses = [*range(64), *(1 << bit for bit in range(32)), 0xFFFFFFFF]
    assert number in guesses
    path = file_of(made, "client")
    assert {answer for guess in guesses for answer in thief.do(open_for, guess, path)} == {("identity", None)}
    found = [service.do(open_for, guess, path)[0][0] for guess in guesses if guess != number]
    assert set(found) == {"identity"}


def test_request_sent_behind_a_release_is_refused_and_one_before_it_is_not(made: Acting) -> None:
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    assert service.do(open_release_open, number, file_of(made, "client")) == ["ok", "identity"]


def open_release_open(memory: Memory, number: int, path: bytes) -> list[str]:
    """Send all before anything is answered."""
    sock, speaker = memory["speaker"].sock, memory["speaker"]
    for message in (
        encode_open(1, [path], number),
        encode_release(2, [number]),
        encode_open(3, [path], number),
    ):
        sock.send(message)
    found = []
    for _ in range(2):
        answer = speaker.receive()
        answer.descriptors.close()
        found.append(reason_of(answer.reply.results[0]))
    return found


def test_connection_of_a_service_is_worth_nothing_to_another_process(made: Acting) -> None:
    """Not even to one with the same ids."""
    service = made.serving()
    made.client()
    number = service.do(accepted).number
    assert service.do(open_in_child, number, file_of(made, "client")) == "identity"
    assert {record["reason"] for record in made.decisions()} == {"sent_by_another_process"}
    assert {record["for_number"] for record in made.decisions()} == {number}


def open_in_child(memory: Memory, number: int, path: bytes) -> str:
    pid = os.fork()
    if not pid:
        memory["speaker"].sock.send(encode_open(7, [path], number))
        os._exit(0)
    os.waitpid(pid, 0)
    [opened] = read_opened(memory["speaker"].receive())
    reason: str = opened.reason
    return reason


@pytest.mark.skipif(LEVEL < 1, reason="identity level 1 needs Linux 6.5")
def test_process_that_got_the_pid_of_a_client_is_not_the_client(made: Acting) -> None:
    service, client = made.serving(), made.client()
    number = service.do(accepted).number
    pid = client.pid
    client.end()
    last_pid = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(200):
        try:
            last_pid.write_text(str(pid - 1))
        except OSError:
            pytest.skip("this kernel lets nobody choose the next pid")
        impostor = made.puppet(CLIENT_UID)
        if impostor.pid == pid:
            break
        impostor.end()
    else:
        pytest.skip("other processes took the pid")
    assert service.do(ask_all, number, bytes(made.tree / "client")) == REFUSED


def test_rights_of_the_service_serve_no_request_of_a_client(made: Acting) -> None:
    """What no rule for both allows is refused, though either of them may have it for itself."""
    made.broker.switch(
        acting_policy(made.tree, rule("client itself", clients=[{"uids": [CLIENT_UID]}], paths=["other/**"]))
    )
    service = made.serving()
    client = made.client()
    number = service.do(accepted).number
    assert service.do(ask_all, None, bytes(made.tree / "own")) == ["ok"] * 4
    assert service.do(ask_all, number, bytes(made.tree / "own")) == ["denied"] * 4
    client.do(join, made.directory / "listener")
    assert client.do(ask_all, None, bytes(made.tree / "other")) == ["ok"] * 4
    assert service.do(ask_all, number, bytes(made.tree / "other")) == ["denied"] * 4
    # Nor does the client get what the service has for it.
    assert client.do(ask_all, None, bytes(made.tree / "client")) == ["denied"] * 4
