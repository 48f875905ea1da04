"""What the loop does with what helpers say: a broker in the process of the test, with real helpers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker.helped import Helped as HelpedRequests
from fdbroker.broker.open_helpers import OpenHelpers
from fdbroker.kernel import sockets
from fdbroker.wire.client import (
    OpenReply,
    decode_reply,
    encode_hello,
    encode_open,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import MAX_FRAME, Limit, Reason, Status
from fdbroker.wire.stream import FrameBuffer, framed
from tests.broker.conftest import fill, no_descriptor_left
from tests.broker.speaking import read_opened
from tests.broker.stepping import SteppedBroker
from tests.processes import children_of
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def filled(tree: Path) -> Path:
    """Make a tree with a file of each kind; return its path."""
    tree.mkdir()
    fill(tree)
    return tree


def root_at(path: Path, name: str, opens: str) -> dict[str, Any]:
    """Return a root of a policy."""
    return {"name": name, "path": str(path), "cross_mounts": False, "opens": opens}


class Helped(SteppedBroker):
    """A stepped broker whose tree is served by helpers, or some roots of another policy; not confined."""

    def __init__(self, tree: Path, audit: Path, compiled: dict[str, Any] | None = None) -> None:
        helped = policy(tree, roots=[root_at(tree, "tree", "helpers")])
        super().__init__(tree, compiled or helped, audit=audit)
        served = [root for root in self.roots if root.helpers]
        self.helpers = OpenHelpers.start(served, None, self.audit.event)
        self.broker.use_helpers(self.helpers, HelpedRequests)

    def serve(self) -> None:
        """Serve until nothing is under way."""
        super().serve()
        while self.helpers.next_deadline() is not None:
            self.broker.step(0.5)
        super().serve()

    def serve_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.broker.step(0.5)

    @contextlib.contextmanager
    def helpers_hang(self) -> Iterator[None]:
        """Keep those helpers that there are now from doing anything."""
        pidfds = [os.pidfd_open(child) for child in children_of(self.helpers._starter.pid)]
        try:
            for pidfd in pidfds:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            yield
        finally:
            for pidfd in pidfds:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                os.close(pidfd)


@pytest.fixture
def helped(tmp_path: Path) -> Iterator[Helped]:
    with no_descriptor_left(), Helped(filled(tmp_path / "tree"), tmp_path / "audit") as broker:
        yield broker


class Stream:
    """A client on a stream that is served by the steps of the test."""

    def __init__(self, broker: Helped) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = FrameBuffer()
        broker.broker.adopt(ours, "stream")
        self.sock.send(framed(encode_hello(1)))
        broker.serve()
        self.receive()

    def receive(self) -> tuple[bytes, list[bytes]]:
        """Return the next frame and what the descriptors give that came with it."""
        contents = []
        while (frame := self._buffer.next_frame()) is None:
            received = sockets.receive(self.sock, MAX_FRAME)
            assert received.data
            self._buffer.add(received.data)
            with received.descriptors as descriptors:
                contents += [os.pread(number, 100, 0) for number in descriptors.numbers()]
        return frame, contents


def test_a_reply_on_a_stream_comes_whole_with_its_descriptors(helped: Helped) -> None:
    stream = Stream(helped)
    with stream.sock:
        path, inner = bytes(helped.tree / "file"), bytes(helped.tree / "directory" / "inner")
        # All at once: they are answered one after the other, and nothing comes in between.
        for number in range(3):
            stream.sock.send(framed(encode_open(20 + number, [path, b"/nowhere", inner])))
        helped.serve()
        for number in range(3):
            frame, contents = stream.receive()
            reply = decode_reply(frame)
            assert isinstance(reply, OpenReply)
            assert reply.id == 20 + number
            assert [result.status for result in reply.results] == [
                Status.GIVEN,
                Status.REFUSED,
                Status.GIVEN,
            ]
            assert contents == [b"content", b"inner"]


def test_requests_that_helpers_answer_are_timed_to_their_reply(helped: Helped) -> None:
    speaker, path = helped.join(), bytes(helped.tree / "file")
    began = time.monotonic_ns()
    speaker.open(path, path)
    speaker.stat(path)
    took = time.monotonic_ns() - began
    found: dict[Any, Any] = {row["type"]: row for row in helped.broker._counts.requests()}
    for kind in ("open", "stat"):
        assert (found[kind]["requests"], found[kind]["timed"]) == (1, 1)
        assert 0 < found[kind]["nanoseconds"] < took
    assert helped.broker._facts()["helpers_stuck"] == 0


def test_a_request_whose_client_has_gone_before_its_answer_is_counted_untimed(helped: Helped) -> None:
    with helped.helpers_hang():
        speaker = helped.join()
        speaker.sock.send(encode_open(7, [bytes(helped.tree / "file")]))
        helped.broker.step(5)
        speaker.discard()
        helped.serve_until(lambda: not helped.connections)
    [row] = [row for row in helped.broker._counts.requests() if row["type"] == "open"]
    assert (row["requests"], row["timed"]) == (1, 0)


def test_nothing_is_answered_on_a_stream_while_a_helper_may_send_there(helped: Helped) -> None:
    stream = Stream(helped)
    with stream.sock:
        opened = framed(encode_open(20, [bytes(helped.tree / "file")]))
        stream.sock.send(opened + framed(encode_status(21)))
        helped.serve()
        assert [decode_reply(stream.receive()[0]).id for _ in range(2)] == [20, 21]


def test_a_helper_gives_up_a_stream_that_does_not_receive(
    helped: Helped, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else it is not asked to send at all; see below.
    monkeypatch.setattr(HelpedRequests, "_is_full", lambda *_: False)
    stream = Stream(helped)
    with stream.sock:
        stream.sock.settimeout(0)
        # One descriptor and a long answer: room for bytes is short before too much is under way.
        question = framed(encode_open(20, [bytes(helped.tree / "file"), *[b"/nowhere"] * 252]))
        began = time.monotonic()
        while not {"undelivered", "partly_delivered"} & set(helped.events()):
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                stream.sock.send(question)
            helped.broker.step(0.01)
            assert time.monotonic() - began < 20
    helped.serve()
    assert helped.connections == 0
    assert helped.in_flight == 0


def test_what_is_given_is_under_way_until_it_is_received(helped: Helped) -> None:
    speaker = helped.join()
    path = bytes(helped.tree / "file")
    speaker.send(encode_open(7, [path] * 5))
    assert helped.in_flight == 5
    answer = speaker.receive()
    assert answer is not None
    answer.descriptors.close()
    assert speaker.status()["in_flight"] == 0


def test_replies_are_recorded_before_they_are_sent_or_give_nothing(helped: Helped) -> None:
    speaker = helped.join()
    path = bytes(helped.tree / "file")
    assert helped.audit_descriptor is not None
    reading, writing = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.dup2(writing, helped.audit_descriptor)
    [opened] = speaker.open(path)
    assert opened.reason == "audit"
    [(result, facts)] = speaker.stat(path).results
    assert (result.reason, facts) == (Reason.AUDIT, None)
    os.close(reading)
    os.close(writing)


def test_a_client_that_leaves_before_the_answer_gets_nothing_and_leaves_nothing(helped: Helped) -> None:
    for _ in range(5):
        speaker = helped.join()
        speaker.sock.send(encode_open(7, [bytes(helped.tree / "file")] * 20))
        helped.broker.step(0)
        speaker.sock.close()
    helped.serve()
    assert helped.connections == 0
    assert helped.in_flight == 0


def test_many_requests_of_one_client_are_answered_each(helped: Helped) -> None:
    speaker = helped.join()
    for number in range(30):
        speaker.sock.send(encode_stat(number, [bytes(helped.tree / "file")]))
    seen: set[int] = set()
    poll = select.poll()
    poll.register(speaker.sock, select.POLLIN)
    while len(seen) < 30:
        helped.broker.step(0.2)
        while poll.poll(0):
            answer = speaker.receive()
            assert answer is not None
            seen.add(answer.reply.id)


def test_fifos_links_and_directories_are_looked_at_and_never_opened(helped: Helped) -> None:
    speaker = helped.join()
    names = ("fifo", "link", "directory", "missing", "empty")
    answers = speaker.open(*(bytes(helped.tree / name) for name in names))
    assert [answer.reason for answer in answers] == [
        "not_regular",
        "symlink",
        "not_regular",
        "not_found",
        "ok",
    ]


@pytest.mark.parametrize("encode", [encode_open, encode_stat])
def test_a_connection_may_end_by_the_first_of_several_answers_that_come_at_once(
    helped: Helped, encode: Callable[[int, list[bytes]], bytes]
) -> None:
    speaker = helped.join()
    with helped.helpers_hang():
        for number in (20, 21):
            speaker.sock.send(encode(number, [bytes(helped.tree / "file")]))
        # Nothing can be sent there, of which the broker hears when it sends.
        speaker.sock.shutdown(socket.SHUT_RD)
        for _ in range(4):
            helped.broker.step(0)
        helped.helpers.expire(time.monotonic() + 60)
        assert not helped.connections
    helped.serve()
    assert helped.in_flight == 0
    assert "failed" not in helped.events()
    assert helped.join().open_one(bytes(helped.tree / "file")).content == b"content"


def test_a_policy_by_which_the_loop_opens_what_a_helper_was_asked_for_gives_what_it_opened(
    tmp_path: Path,
) -> None:
    tree = filled(tmp_path / "tree")
    outer, inner = root_at(tree, "tree", "loop"), root_at(tree / "directory", "inner", "helpers")
    rules = [rule("all"), rule("inner", root="inner")]
    with (
        no_descriptor_left(),
        Helped(tree, tmp_path / "audit", policy(tree, *rules, roots=[outer, inner])) as helped,
    ):
        speaker = helped.join()
        paths = [bytes(tree / "directory" / "inner"), bytes(tree / "file")]
        with helped.helpers_hang():
            speaker.sock.send(encode_open(7, paths))
            helped.broker.step(0)
            helped.switch(policy(tree, roots=[outer]))
        helped.serve()
        answer = speaker.receive()
        assert answer is not None
        assert [opened.content for opened in read_opened(answer)] == [b"inner", b"content"]


def test_a_file_of_the_year_2264_is_described(helped: Helped) -> None:
    os.utime(helped.tree / "file", ns=(0, 9_300_000_000 * 1_000_000_000))
    [(_, facts)] = helped.join().stat(bytes(helped.tree / "file")).results
    assert facts is not None
    assert facts.mtime_ns == 9_300_000_000 * 1_000_000_000


def test_no_helper_waits_for_a_client_whose_queue_is_half_full(helped: Helped) -> None:
    """A helper that waited for room, a second and a half at most, would be missing to everybody else."""
    path = bytes(helped.tree / "file")
    with helped.join() as lazy:
        for number in range(3):
            lazy.sock.send(encode_stat(30 + number, [path] * 184))
            helped.serve()
        lazy.sock.send(encode_open(40, [path]))
        helped.serve()
        answers = [lazy.receive() for _ in range(4)]
        [refused] = [answer for answer in answers if answer is not None and answer.reply.id == 40]
        assert isinstance(refused.reply, OpenReply)
        assert [result.reason for result in refused.reply.results] == [Reason.LIMIT]
        assert helped.reasons()[-1] == "in_flight"
        assert lazy.open_one(path).content == b"content"  # it has received all


def test_descriptors_that_helpers_send_count_for_what_a_connection_may_have_under_way(tmp_path: Path) -> None:
    tree = filled(tmp_path / "tree")
    limits = {"in_flight_per_connection": 253}
    compiled = policy(tree, roots=[root_at(tree, "tree", "helpers")], limits=limits)
    with no_descriptor_left(), Helped(tree, tmp_path / "audit", compiled) as helped, helped.join() as speaker:
        for number in range(2):
            # That it is not over yet is known when it is answered, and not when it is read.
            speaker.sock.send(encode_open(30 + number, [bytes(tree / "file")] * 150))
        helped.serve_until(lambda: len(helped.reasons()) == 300)
        helped.serve()
        assert helped.in_flight <= 253
        counts = []
        for _ in range(2):
            answer = speaker.receive()
            assert answer is not None
            counts.append(len(answer.descriptors))
            answer.descriptors.close()
        assert sorted(counts) == [0, 150]
        assert speaker.open_one(bytes(tree / "file")).content == b"content"


def rates(burst: int) -> dict[str, int]:
    """Return a rate that gives so many at once, and one more in a second: later than a test ends."""
    return {"opens_per_second": 1, "opens_burst": burst}


@pytest.mark.parametrize("of_rule", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_limits_hold_for_what_helpers_open_and_each_file_is_counted_once(
    tmp_path: Path, *, of_rule: bool, mixed: bool
) -> None:
    tree = filled(tmp_path / "tree")
    outer, inner = root_at(tree, "tree", "loop"), root_at(tree / "directory", "inner", "helpers")
    limited = {"limits": rates(10)} if of_rule else {}
    compiled = policy(
        tree,
        rule("all"),
        rule("inner", root="inner", **limited),
        roots=[outer, inner],
        limits={} if of_rule else rates(10),
    )
    helped_file, own_file = bytes(tree / "directory" / "inner"), bytes(tree / "file")
    with no_descriptor_left(), Helped(tree, tmp_path / "audit", compiled) as helped:
        speaker = helped.join()
        asked = [helped_file, own_file] if mixed else [helped_file]
        given = 0
        for _ in range(6):
            answer = speaker.ask(encode_open(7, asked * 2))
            given += [opened.content for opened in read_opened(answer)].count(b"inner")
        # Of the loop's files none counts for the rule about the others; in all, they do.
        assert given == (5 if mixed and not of_rule else 10)
        reason = "rule_opens_per_second" if of_rule else "opens_per_second"
        assert helped.reasons().count(reason) == (14 if mixed and not of_rule else 2)


def test_what_helpers_find_is_a_request_of_its_rule(tmp_path: Path) -> None:
    tree = filled(tmp_path / "tree")
    limited = rule("all", limits={"requests_per_second": 1, "requests_burst": 2})
    compiled = policy(tree, limited, roots=[root_at(tree, "tree", "helpers")])
    path = bytes(tree / "file")
    with no_descriptor_left(), Helped(tree, tmp_path / "audit", compiled) as helped:
        speaker = helped.join()
        assert speaker.stat(path, path).results[1][0].status is Status.GIVEN
        assert [opened.reason for opened in speaker.open(path, path)] == ["ok", "ok"]
        [(told, facts)] = speaker.stat(path).results
        assert told.limit is not None
        assert told.limit.limit is Limit.RULE_REQUESTS_PER_SECOND
        assert facts is None
        assert [opened.reason for opened in speaker.open(path)] == ["limit"]


def test_what_a_rule_gives_by_helpers_is_under_way_until_it_is_received(tmp_path: Path) -> None:
    tree = filled(tmp_path / "tree")
    limited = rule("all", limits={"in_flight": 3})
    compiled = policy(tree, limited, roots=[root_at(tree, "tree", "helpers")])
    path = bytes(tree / "file")
    with no_descriptor_left(), Helped(tree, tmp_path / "audit", compiled) as helped:
        stalled, other = helped.join(), helped.join()
        stalled.send(encode_open(7, [path] * 2))
        assert [opened.reason for opened in other.open(path, path)] == ["ok", "limit"]
        answer = stalled.receive()
        assert answer is not None
        answer.descriptors.close()
        assert [opened.reason for opened in other.open(*[path] * 4)] == ["ok", "ok", "ok", "limit"]
