"""Whatever clients do, in any order, while calls fail: the loop goes on, and nothing is left of it.

What the other tests try one by one is mixed here: limits, walks, services, reloads, clients that do not
receive, sends that fail, no descriptors. After each round the counts agree; in the end all tables are empty.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.kernel import sockets
from fdbroker.wire.client import (
    encode_cancel,
    encode_hello,
    encode_list,
    encode_more,
    encode_open,
    encode_release,
    encode_serve,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import WalkKind
from fdbroker.wire.messages import WalkFilter
from fdbroker.wire.stream import framed
from tests.broker.conftest import no_descriptor_left
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker
from tests.broker.stepping import SteppedBroker
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

DIRECTORIES, FILES, ROUNDS = 6, 12, 150
FAILURES = [BlockingIOError(errno.EAGAIN, "no room")] * 4 + [
    OSError(number, "it failed") for number in (errno.ETOOMANYREFS, errno.EPIPE, errno.ENOBUFS)
]


class Chaos:
    """A broker and whoever comes to it. All that is chosen is chosen by `dice`."""

    def __init__(self, directory: Path, dice: random.Random) -> None:
        self.dice = dice
        self.tree = directory / "tree"
        for number in range(DIRECTORIES):
            (self.tree / f"{number}").mkdir(parents=True)
            for file in range(FILES):
                (self.tree / f"{number}" / f"file{file}").write_bytes(bytes(dice.randint(0, 200)))
        (self.tree / "link").symlink_to("0/file1")
        self.broker = SteppedBroker(self.tree, self.rules(), audit=directory / "audit")
        self.native = self.broker.listen(directory)
        self.stream = self.broker.listen(directory, kind=StreamSpeaker, name="stream")
        self.datagram = self.broker.listen(directory, kind=DatagramSpeaker, name="datagram")
        self.service = self.broker.listen_for(directory, "clamd")
        self.clients: list[socket.socket] = []
        self.others: list[socket.socket] = []  # clients of the service, senders of datagrams
        self.failing = 0.0  # how many of the sends

    def rules(self) -> dict[str, Any]:
        """Return any policy that this tree can be served by."""
        dice = self.dice

        def limits() -> dict[str, Any]:
            burst = {"opens_per_second": 1000, "opens_burst": dice.choice([10, 500])}
            some = [{}, {}, {"in_flight": dice.choice([1, 20, 300])}, burst, burst | {"in_flight": 50}]
            return {"limits": chosen} if (chosen := dice.choice(some)) else {}

        def some_rule(name: str) -> dict[str, Any]:
            about = {
                "paths": dice.choice([["**"], ["0/**"], ["*/file1*"], ["**/file2"], ["1/**", "2/**"]]),
                "where": dice.choice([{}, {}, {"size": {"max": 100}}, {"links": {"max": 1}}]),
                "deliver": dice.choice([["descriptor"], ["copy"], ["descriptor", "copy"]]),
                "on_behalf_of": dice.choice([[], [{"any": True}]]),
            }
            if not dice.randrange(6):
                return rule(name, effect="deny", **about)
            return rule(name, **about, **limits(), symlinks=dice.choice(["refuse", "within-root"]))

        rules = [some_rule(f"rule {number}") for number in range(dice.randint(1, 4))]
        of_uid = dice.choice(
            [{}, {}, {"in_flight_per_uid": 253}, {"requests_per_second": 500, "requests_burst": 50}]
        )
        bounds = {"connections_per_uid": dice.choice([4, 64]), "in_flight_per_connection": 253} | of_uid
        services = [{"name": "clamd", "clients": dice.choice([[{"any": True}], [{"uids": [4711]}]])}]
        return policy(self.tree, *rules, rule("all", **limits()), limits=bounds, services=services)

    def connect(self) -> None:
        kind, path = self.dice.choice([(Speaker.kind, self.native), (StreamSpeaker.kind, self.stream)])
        client = self._reach(kind, path)
        if client is not None:
            self.clients.append(client)
            self.say(client, encode_hello(1))

    def connect_to_service(self) -> None:
        client = self._reach(socket.SOCK_STREAM, self.service)
        if client is not None:
            self.others.append(client)

    def send_datagram(self) -> None:
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.bind("")
        self.others.append(sender)
        sender.sendto(encode_open(7, self.paths()), str(self.datagram))

    @staticmethod
    def _reach(kind: int, path: Path) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.setblocking(False)  # noqa: FBT003 - the name says what is false
        try:
            sock.connect(str(path))
        except BlockingIOError:
            sock.close()
            return None
        return sock

    def paths(self) -> list[bytes]:
        count = self.dice.choice([1, 1, 5, 64, 253])
        names = [
            f"{self.dice.randrange(DIRECTORIES)}/file{self.dice.randrange(FILES + 2)}" for _ in range(count)
        ]
        return [bytes(self.tree / name) for name in ["link", *names][:count]]

    def say(self, client: socket.socket, frame: bytes) -> None:
        with contextlib.suppress(OSError):
            client.send(framed(frame) if client.type == socket.SOCK_STREAM else frame)

    def ask(self) -> None:
        dice, number = self.dice, self.dice.randint(2, 6)
        for_whom = dice.choice([None, None, *range(1, 6)])
        asked = WalkFilter(
            kinds=dice.choice([WalkKind.REGULAR, WalkKind(15)]), most_size=dice.choice([50, 1000])
        )
        frames = [
            encode_open(number, self.paths(), for_whom, copy=dice.choice([False, True])),
            encode_stat(number, self.paths(), for_whom),
            encode_list(number, bytes(self.tree / "0"), client=for_whom),
            *(
                encode_walk(
                    number, bytes(self.tree), asked, credit=credit, descriptors=True, most=dice.choice([0, 1])
                )
                for credit in (0, 5, 100)
            ),
            encode_more(number, 50),
            encode_cancel(number),
            encode_serve(number, b"clamd"),
            encode_release(number, dice.choices(range(1, 7), k=dice.choice([1, 3]))),
            encode_status(number),
            dice.randbytes(20),
        ]
        # Most of what is asked is what gives something.
        self.say(
            dice.choice(self.clients), dice.choices(frames, weights=[9, 2, 2, 3, 3, 3, 2, 2, 2, 2, 1, 0.2])[0]
        )

    def receive(self) -> None:
        client = self.dice.choice(self.clients)
        for _ in range(self.dice.choice([1, 3, 20])):
            try:
                received = sockets.receive(client, 1 << 17)
            except OSError:
                return
            received.descriptors.close()
            if not received.data:
                return

    def leave(self) -> None:
        left = self.dice.choice([self.clients, self.others])
        if left:
            left.pop(self.dice.randrange(len(left))).close()

    def stop_receiving(self) -> None:
        with contextlib.suppress(OSError):
            self.dice.choice(self.clients).shutdown(self.dice.choice([socket.SHUT_RD, socket.SHUT_RDWR]))

    def reload(self) -> None:
        self.broker.switch(self.rules())

    def fail_more_or_less(self) -> None:
        self.failing = self.dice.choice([0, 0, 0.05, 0.3])

    def lack_descriptors(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        present = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (present + self.dice.choice([0, 2, 5, 40]), hard))
        try:
            self.broker.broker.step(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def do_something(self) -> None:
        actions = {
            self.ask: 20,
            self.receive: 10,
            self.connect: 4,
            self.connect_to_service: 3,
            self.leave: 3,
            self.send_datagram: 1,
            self.stop_receiving: 1,
            self.reload: 1,
            self.fail_more_or_less: 1,
            self.lack_descriptors: 2,
        }
        [action] = (
            self.dice.choices(list(actions), list(actions.values())) if self.clients else [self.connect]
        )
        action()
        for _ in range(self.dice.randrange(3)):
            self.broker.broker.step(0)

    def check_counts(self) -> None:
        broker = self.broker.broker
        flight, clients = broker._flight, list(broker._clients())
        assert flight.total == sum(client.in_flight for client in clients) == sum(flight._of_uid.values())
        for client in clients:
            assert client.in_flight == sum(count for _, count, _ in client.under_way)

    def end(self) -> None:
        """Let all go, and see that nothing of them is left."""
        broker = self.broker.broker
        self.failing = 0.0
        for sock in (*self.clients, *self.others):
            sock.close()
        for _ in range(1000):
            if not self.broker.connections:
                break
            broker.step(0.01)
        flight, services, walks = broker._flight, broker._services, broker._walks
        for client in broker._clients():
            flight.settle(client)
        left: Sequence[object] = [
            *(
                broker._connections,
                broker._connections_of,
                broker._for_control,
                broker._busy,
                broker._deadlines,
            ),
            *(flight.total, flight._of_uid, flight._of_rule, flight._sent_by_rule, flight._clients),
            *(services.count, services._clients_of, walks.count, walks._counted_of),
        ]
        assert not any(left), left
        assert "failed" not in self.broker.events()  # which is a bug that was caught


@pytest.fixture(params=range(8))
def chaos(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    dice = random.Random(request.param)  # noqa: S311 - a test that fails does so again
    with no_descriptor_left():
        made = Chaos(tmp_path, dice)
        send = sockets.send_part

        def fail(*arguments: Any, wait: bool = True, **more: Any) -> int:  # noqa: ANN401 - as they are
            if not wait and dice.random() < made.failing:
                raise dice.choice(FAILURES)
            return send(*arguments, wait=wait, **more)

        monkeypatch.setattr(sockets, "send_part", fail)
        with made.broker:
            yield made


def test_whatever_clients_do_in_whatever_order_the_loop_goes_on_and_nothing_is_left(chaos: Chaos) -> None:
    for _ in range(ROUNDS):
        chaos.do_something()
        chaos.check_counts()
    chaos.end()
