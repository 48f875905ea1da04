"""A broker that runs by itself, with a socket for each transport."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.broker.conftest import fill
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker
from tests.running_broker import BROKER_UID, RunningBroker, policy, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = (Speaker, StreamSpeaker, DatagramSpeaker)


class Everywhere(NamedTuple):
    """A broker with its tree and sockets."""

    broker: RunningBroker
    tree: Path

    def call(self, kind: type[Speaker], *, hello: bool = True) -> Speaker:
        """Return a new client."""
        directory = self.tree.parent
        if kind is DatagramSpeaker:
            return DatagramSpeaker.to(directory / "broker.dgram", broker_uid=BROKER_UID)
        if kind is StreamSpeaker:
            return StreamSpeaker.connect(directory / "broker.stream", hello=hello)
        return Speaker.connect(self.broker.socket, hello=hello)


@contextlib.contextmanager
def served_everywhere(
    directory: Path, limits: dict[str, Any] | None = None, *, most_descriptors: int | None = None
) -> Iterator[Everywhere]:
    """Run a broker whose tree has the usual files; `most_descriptors` as of `running_broker`."""
    tree = directory / "tree"
    tree.mkdir()
    fill(tree)
    sockets = [f"--{option}={directory / f'broker.{option}'}" for option in ("stream", "dgram")]
    compiled = policy(tree, limits=limits)
    with running_broker(directory, compiled, *sockets, most_descriptors=most_descriptors) as broker:
        yield Everywhere(broker, tree)
