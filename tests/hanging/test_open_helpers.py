"""Opens that never end, by helpers of a real broker: who asked is told, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker.helper_pool import HELPERS
from fdbroker.wire.client import WalkReply, encode_open, encode_stat
from fdbroker.wire.format import Status
from tests.broker.speaking import Speaker, read_opened
from tests.hanging.fanotify import held_opens
from tests.hanging.fuse import Operation, abort
from tests.hanging.places import Place, mounted_beside_local, two_roots
from tests.processes import children_of, wait_until
from tests.running_broker import CLIENT_UID, RunningBroker, rule, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.conftest import Children

pytestmark = pytest.mark.root

FILES = {"good": b"good", "other": b"other", "stuck": b"stuck", "slow": b"slow"}


class BrokerPlace(Place):
    """In which a broker runs."""

    def path(self, name: str) -> bytes:
        return bytes(self.far / name)

    @contextlib.contextmanager
    def broker(self, *rules: dict[str, Any]) -> Iterator[RunningBroker]:
        """Run a broker; end the FUSE connection before it is stopped, so that nothing waits."""
        compiled = two_roots(self.local, self.far, *rules)
        with running_broker(self.directory, compiled) as broker:
            try:
                yield broker
            finally:
                abort(self.far)


@pytest.fixture
def place() -> Iterator[BrokerPlace]:
    with mounted_beside_local(FILES) as parts:
        yield BrokerPlace(*parts)


def events(broker: RunningBroker) -> list[str]:
    return [record["event"] for record in broker.records() if "decision" not in record]


def test_a_file_of_a_fuse_server_is_given_described_and_closed(place: BrokerPlace) -> None:
    with place.broker() as broker, Speaker.connect(broker.socket) as speaker:
        answers = speaker.open(place.path("good"), place.path("missing"), place.path("other"))
        assert [(answer.reason, answer.content) for answer in answers] == [
            ("ok", b"good"),
            ("not_found", None),
            ("ok", b"other"),
        ]
        [(result, facts)] = speaker.stat(place.path("slow")).results
        assert (result.status, facts.size if facts else 0) == (Status.GIVEN, 4)
        assert speaker.open_one(bytes(place.far)).reason == "not_regular"
        # Closed by everybody: the helper and us.
        place.server.wait_until_asked(Operation.RELEASE, "good")
    assert [record["reason"] for record in broker.decisions()] == [
        "ok",
        "not_found",
        "ok",
        "ok",
        "is_directory",
    ]


def test_one_request_mixes_what_the_loop_and_what_helpers_open(place: BrokerPlace) -> None:
    local = bytes(place.local / "file")
    with place.broker() as broker, Speaker.connect(broker.socket) as speaker:
        for _ in range(3):
            answers = speaker.open(place.path("other"), local, b"/nowhere", place.path("good"), local)
            assert [answer.content for answer in answers] == [b"other", b"local", None, b"good", b"local"]
        stat = speaker.stat(local, place.path("good"))
        assert [facts.size for _, facts in stat.results if facts] == [5, 4]


@pytest.mark.parametrize("operation", [Operation.OPEN, Operation.LOOKUP, Operation.STATFS])
def test_an_open_that_never_ends_times_out_and_others_are_served_meanwhile(
    place: BrokerPlace, operation: Operation
) -> None:
    with (
        place.broker() as broker,
        Speaker.connect(broker.socket) as hung,
        Speaker.connect(broker.socket) as other,
    ):
        place.server.never.add((operation, "stuck"))
        began = time.monotonic()
        hung.send(encode_open(7, [place.path("good"), place.path("stuck"), place.path("other")]))
        place.server.wait_until_asked(operation, "stuck")
        for _ in range(20):
            assert other.open_one(bytes(place.local / "file")).content == b"local"
        place.server.never.clear()
        assert other.open_one(place.path("good")).content == b"good"
        assert time.monotonic() - began < 2
        answer = hung.receive()
        assert answer is not None
        assert [opened.reason for opened in read_opened(answer)] == ["ok", "timed_out", "ok"]
        assert 2.5 < time.monotonic() - began < 5
        [ended] = [record for record in broker.records() if record["event"] == "helper_ended"]
        assert (ended["reason"], ended["path"], ended["uid"]) == ("timed_out", str(place.far / "stuck"), 0)
        # Each of them is replaced, and takes jobs.
        for _ in range(8):
            assert hung.open_one(place.path("good")).content == b"good"


def test_a_close_that_never_ends_holds_up_nobody(place: BrokerPlace) -> None:
    """close(2) of a FUSE file asks the server and waits: the broker has none of them open."""
    place.server.never.add((Operation.FLUSH, "stuck"))
    with place.broker() as broker, Speaker.connect(broker.socket) as speaker:
        answer = speaker.ask(encode_open(7, [place.path("stuck")]))
        place.server.wait_until_asked(Operation.FLUSH, "stuck")
        for _ in range(20):
            assert speaker.open_one(bytes(place.local / "file")).content == b"local"
        assert speaker.open_one(place.path("good")).content == b"good"
        abort(place.far)
        answer.descriptors.close()


def opened_by(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]


def sockets_of(pid: int) -> list[str]:
    return [name for name in opened_by(pid) if name.startswith("socket:")]


def test_helpers_hold_nothing_of_the_brokers_and_are_confined(place: BrokerPlace) -> None:
    with place.broker() as broker, Speaker.connect(broker.socket):
        starter, helpers = broker.starter_and_helpers()
        # Those that were forked a moment ago may not have closed yet what is for the others.
        wait_until(lambda: all(len(sockets_of(pid)) == 1 for pid in helpers), "helpers with one socket each")
        for pid in (starter, *helpers):
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            assert (status["Seccomp"], status["NoNewPrivs"], status["Threads"]) == ("2", "1", "1")
            assert status["CapEff"] == status["CapPrm"] == f"{1 << 2:016x}"
            # Sockets: to the broker alone. Its listener, audit, epoll, status are not there.
            open_there = opened_by(pid)
            kinds = {name.split(":")[0] for name in open_there if not name.startswith("/")}
            assert kinds <= {"socket", "anon_inode", "pipe"}
            assert str(broker.audit) not in open_there
            assert len(sockets_of(pid)) == (5 if pid == starter else 1)
            assert not [name for name in open_there if "eventpoll" in name]


def test_helpers_end_with_the_broker_however_it_ends(place: BrokerPlace) -> None:
    compiled = two_roots(place.local, place.far)
    with running_broker(place.directory, compiled, stop=False) as broker:
        starter, helpers = broker.starter_and_helpers()
        watched = [os.pidfd_open(pid) for pid in (starter, *helpers)]
        broker.process.kill()
        broker.process.wait()
        for pidfd in watched:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            assert ended.poll(20_000)
            os.close(pidfd)


def test_a_helper_that_dies_is_noticed_and_another_one_starts_when_it_is_needed(place: BrokerPlace) -> None:
    place.server.never.add((Operation.OPEN, "stuck"))
    with place.broker() as broker, Speaker.connect(broker.socket) as speaker:
        starter, helpers = broker.starter_and_helpers()
        for pid in helpers:
            os.kill(pid, signal.SIGKILL)
        for _ in range(8):
            assert speaker.open_one(place.path("good")).reason in {"ok", "broken"}
        assert speaker.open_one(place.path("good")).content == b"good"
        assert not set(children_of(starter)) & set(helpers)
        assert events(broker).count("helper_ended") >= 1


def test_without_its_starter_the_broker_says_so_and_serves_the_rest(place: BrokerPlace) -> None:
    with place.broker() as broker, Speaker.connect(broker.socket) as speaker:
        starter, _ = broker.starter_and_helpers()
        os.kill(starter, signal.SIGKILL)
        while "helpers_gone" not in events(broker):
            assert speaker.open_one(bytes(place.local / "file")).content == b"local"
        assert speaker.open_one(place.path("good")).reason == "broken"
        assert speaker.open_one(bytes(place.local / "file")).content == b"local"


def test_what_one_uid_hangs_leaves_helpers_for_others(place: BrokerPlace, in_child: Children) -> None:
    place.server.never.add((Operation.OPEN, "stuck"))

    def other() -> list[str]:
        os.setresgid(CLIENT_UID, CLIENT_UID, CLIENT_UID)
        os.setresuid(CLIENT_UID, CLIENT_UID, CLIENT_UID)
        with Speaker.connect(broker.socket) as speaker:
            return [speaker.open_one(place.path("good")).reason for _ in range(20)]

    with place.broker() as broker, contextlib.ExitStack() as stack:
        hung = [stack.enter_context(Speaker.connect(broker.socket)) for _ in range(6)]
        for speaker in hung:
            speaker.send(encode_open(7, [place.path("stuck")]))
        place.server.wait_until_asked(Operation.OPEN, "stuck", HELPERS // 2)
        began = time.monotonic()
        assert in_child(other) == ["ok"] * 20
        assert time.monotonic() - began < 2
        # The others had no helper meanwhile.
        assert place.server.asked(Operation.OPEN, "stuck") == HELPERS // 2


def test_an_open_that_a_fanotify_listener_never_answers_times_out(place: BrokerPlace) -> None:
    held = place.directory / "held"
    held.mkdir()
    for name in ("watched", "free"):
        (held / name).write_bytes(name.encode())
    compiled = two_roots(place.local, held)
    with (
        running_broker(place.directory, compiled) as broker,
        Speaker.connect(broker.socket) as hung,
        Speaker.connect(broker.socket) as other,
        held_opens(held / "watched") as listener,
    ):
        starter, helpers = broker.starter_and_helpers()
        hung.send(encode_open(7, [bytes(held / "watched")]))
        assert listener.wait_until_asked() in helpers
        assert other.open_one(bytes(place.local / "file")).content == b"local"
        assert other.open_one(bytes(held / "free")).content == b"free"
        # To look at it is not to open it.
        assert other.stat(bytes(held / "watched")).results[0][0].status == Status.GIVEN
        answer = hung.receive()
        assert answer is not None
        assert [opened.reason for opened in read_opened(answer)] == ["timed_out"]
        # This one could be ended, and soon is.
        while set(children_of(starter)) & set(helpers) == set(helpers):
            assert other.open_one(bytes(place.local / "file")).content == b"local"


def test_conditions_are_asked_of_what_a_helper_found(place: BrokerPlace) -> None:
    rules = [
        rule(
            "owner",
            root="far",
            paths=["good"],
            where={"owner": {"uids": [0], "client": False, "on_behalf_of": False}},
        ),
        rule("size", root="far", paths=["other"], where={"size": {"max": 2}}),
        rule("links", root="far", paths=["slow"], where={"links": {"max": 1}}),
    ]
    with place.broker(rule("local"), *rules) as broker, Speaker.connect(broker.socket) as speaker:
        names = ("good", "other", "slow", "stuck")
        answers = speaker.open(*(place.path(name) for name in names))
        assert [answer.reason for answer in answers] == ["ok", "denied", "denied", "denied"]
        reasons = [record["reason"] for record in broker.decisions()]
    # A server says what the number of links is; a condition on it would say nothing.
    assert reasons == ["ok", "where_size", "links_unknown", "no_rule"]


def test_links_of_local_files_are_counted_by_helpers(place: BrokerPlace) -> None:
    held = place.directory / "held"
    held.mkdir()
    (held / "one").write_bytes(b"one")
    (held / "two").write_bytes(b"two")
    os.link(held / "two", held / "second")
    only_one = rule("links", root="far", where={"links": {"max": 1}})
    with running_broker(place.directory, two_roots(place.local, held, only_one)) as broker:
        with Speaker.connect(broker.socket) as speaker:
            answers = speaker.open(bytes(held / "one"), bytes(held / "two"))
            assert [answer.reason for answer in answers] == ["ok", "denied"]
        assert [record["reason"] for record in broker.decisions()] == ["ok", "where_links"]


def test_what_helpers_serve_is_neither_listed_nor_walked(place: BrokerPlace) -> None:
    with place.broker() as broker, Speaker.connect(broker.socket) as speaker:
        page = speaker.page(bytes(place.far))
        assert page.result.reason.name == "FILESYSTEM"
        speaker.begin_walk(bytes(place.far), credit=1)
        answer = speaker.receive()
        assert answer is not None
        walked = answer.reply
        assert isinstance(walked, WalkReply)
        assert walked.result.reason.name == "FILESYSTEM"
        assert place.server.asked(Operation.OPENDIR, "") == 0
        assert [record["reason"] for record in broker.decisions()] == ["not_listed"] * 2


def test_a_client_that_leaves_is_waited_for_by_nobody(place: BrokerPlace) -> None:
    place.server.never.add((Operation.OPEN, "stuck"))
    with place.broker() as broker, Speaker.connect(broker.socket) as other:
        for _ in range(3):
            with Speaker.connect(broker.socket) as speaker:
                speaker.send(encode_open(7, [place.path("stuck"), place.path("good")]))
        for _ in range(8):
            assert other.open_one(place.path("good")).reason in {"ok", "timed_out"}
        assert other.status()["totals"]["connections"] == 1


def test_a_client_that_does_not_receive_holds_up_itself_alone(place: BrokerPlace) -> None:
    with (
        place.broker() as broker,
        Speaker.connect(broker.socket) as lazy,
        Speaker.connect(broker.socket) as other,
    ):
        for number in range(60):
            lazy.sock.setblocking(False)  # noqa: FBT003 - the name says what is false
            with contextlib.suppress(BlockingIOError):
                lazy.sock.send(encode_stat(number, [place.path("good")] * 200))
        for _ in range(10):
            assert other.open_one(bytes(place.local / "file")).content == b"local"
