"""No client, whatever it sends, changes what another gets: a witness asks the same alone and beside others.

The neighbour is a process of another uid that sends what hypothesis makes up:
frames that are whole, cut or made of anything, ancillary data, by each
transport, and does not always receive. The witness's answers are compared byte
by byte with those that it got when it was alone.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.wire.client import (
    encode_cancel,
    encode_explain,
    encode_hello,
    encode_list,
    encode_more,
    encode_open,
    encode_release,
    encode_reload,
    encode_serve,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import HEADER, Type
from fdbroker.wire.messages import WalkFilter
from fdbroker.wire.stream import framed
from tests.broker.puppets import Puppet
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker
from tests.hostile.sessions import CONTENT, NEVER, WITHOUT_HELPERS, Served, served
from tests.running_broker import BROKER_UID, CLIENT_UID, OTHER_UID, reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.unmeasured]

EXAMPLES = 500 if os.environ.get("FDBROKER_HOSTILE") else 60
SOCKETS = {
    "broker.seqpacket": socket.SOCK_SEQPACKET,
    "broker.stream": socket.SOCK_STREAM,
    "broker.dgram": socket.SOCK_DGRAM,
    "control": socket.SOCK_SEQPACKET,
    "service": socket.SOCK_STREAM,
}
Memory = dict[str, Any]


class Deed(NamedTuple):
    """What the neighbour does: on which of its sockets, and with what."""

    what: str
    where: str
    number: int
    data: bytes


def paths() -> st.SearchStrategy[bytes]:
    """Return paths below a directory that is put in their place later, and any bytes."""
    known = st.sampled_from([*CONTENT, *NEVER, b"", b"missing", b"plain/../secret", b"helped"])
    return st.one_of(known.map(lambda name: b"TREE/" + name), st.binary(max_size=40))


def ids() -> st.SearchStrategy[int]:
    return st.sampled_from([0, 1, 7, 20, 77, 2**32 - 1])


def requests() -> st.SearchStrategy[bytes]:
    """Return frames that mean something."""
    several = st.lists(paths().filter(lambda path: b"\0" not in path), min_size=1, max_size=9)
    one = paths().filter(lambda path: b"\0" not in path)
    return st.one_of(
        st.builds(encode_hello, ids()),
        st.builds(encode_open, ids(), several, copy=st.booleans()),
        st.builds(encode_stat, ids(), several),
        st.builds(encode_list, ids(), one, st.sampled_from([0, 1, 2**63 - 1]), st.sampled_from([0, 1, 256])),
        st.builds(
            lambda number, path, credit: encode_walk(
                number, path, WalkFilter(), credit=credit, descriptors=True
            ),
            ids(),
            one,
            st.sampled_from([1, 100, 60_000]),
        ),
        st.builds(encode_more, ids(), st.sampled_from([1, 60_000])),
        st.builds(encode_cancel, ids()),
        st.builds(encode_serve, ids(), st.sampled_from([b"service", b"other"])),
        st.builds(encode_release, ids(), st.lists(ids(), min_size=1, max_size=3)),
        st.builds(encode_status, ids()),
        st.builds(encode_explain, ids(), st.just("open"), one),
        st.builds(encode_reload, ids(), st.just(0), st.sampled_from([b"{}", b"{", b"x"]), more=st.booleans()),
        st.builds(
            lambda kind, flags, count, number, body: HEADER.pack(kind, flags, count, number, 0) + body,
            st.sampled_from([int(kind) for kind in Type]) | st.integers(0, 255),
            st.integers(0, 255),
            st.integers(0, 65535),
            ids(),
            st.binary(max_size=60),
        ),
        st.binary(max_size=100),
    )


deeds = st.lists(
    st.builds(
        Deed,
        st.sampled_from(
            [
                "send",
                "send",
                "send",
                "send cut",
                "send descriptors",
                "flood",
                "connect",
                "greet",
                "hang up",
                "receive",
            ]
        ),
        st.sampled_from(sorted(SOCKETS)),
        st.integers(0, 3),
        requests(),
    ),
    min_size=4,
    max_size=40,
)


@pytest.fixture(scope="module")
def place() -> Iterator[Served]:
    with reachable_directory() as directory, served(directory) as made:
        yield made


# What the neighbour does, in its own process


def misbehave(memory: Memory, directory: Path, todo: list[Deed]) -> None:
    """Do all of that; nothing that happens to oneself matters."""
    for deed in todo:
        with contextlib.suppress(OSError):
            _do(memory.setdefault("sockets", {}), directory, deed)


def _do(known: dict[tuple[str, int], socket.socket], directory: Path, deed: Deed) -> None:
    key = (deed.where, deed.number)
    data = deed.data.replace(b"TREE", bytes(directory / "tree"))
    kind = SOCKETS[deed.where]
    if kind == socket.SOCK_STREAM and deed.what != "send cut":
        data = framed(data)
    if deed.what in {"connect", "hang up"} and key in known:
        known.pop(key).close()
    if deed.what == "hang up":
        return
    if key not in known:
        sock = known[key] = socket.socket(socket.AF_UNIX, kind)
        sock.setblocking(False)  # noqa: FBT003 - the standard library's own
        if kind == socket.SOCK_DGRAM:
            sock.bind("")
        sock.connect(str(directory / deed.where))
    sock = known[key]
    hello = encode_hello(1)
    if deed.what == "greet":
        sock.send(framed(hello) if kind == socket.SOCK_STREAM else hello)
    elif deed.what == "send cut":
        sock.send(data[: len(data) // 2])
    elif deed.what == "send descriptors":
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, sock.fileno()]))
        sock.sendmsg([data], [rights])
    elif deed.what == "flood":
        for _ in range(300):
            sock.send(data)
    elif deed.what == "receive":
        sock.recv(65536)
    else:
        sock.send(data)


# What the witness does, in its own process, on connections that stay


def begin(memory: Memory, directory: Path) -> None:
    memory["speakers"] = [
        Speaker.connect(directory / "broker.seqpacket"),
        StreamSpeaker.connect(directory / "broker.stream"),
        DatagramSpeaker.to(directory / "broker.dgram", broker_uid=BROKER_UID),
    ]


def hear_all(memory: Memory, directory: Path) -> list[tuple[bytes, list[bytes]]]:
    """Ask everything on each connection, and on a new one; return raw answers and what is in the files."""
    names = [bytes(directory / "tree") + b"/" + name for name in WITHOUT_HELPERS]
    asked = [
        encode_open(7, names),
        encode_open(8, names, copy=True),
        encode_stat(9, names),
        encode_open(10, [bytes(directory / "tree" / "helped" / "secret")]),
    ]
    heard = []
    with Speaker.connect(directory / "broker.seqpacket") as coming:
        for speaker in (*memory["speakers"], coming):
            for question in asked[:3] if isinstance(speaker, DatagramSpeaker) else asked:
                answer = speaker.ask(question)
                contents = []
                with answer.descriptors as descriptors:
                    while descriptors:
                        with open(descriptors.take(), "rb") as file:
                            contents.append(file.read())
                heard.append((answer.raw, contents))
    return heard


@pytest.fixture(scope="module")
def witness(place: Served) -> Iterator[Puppet]:
    with Puppet(uid=CLIENT_UID) as puppet:
        puppet.do(begin, place.tree.parent)
        yield puppet


@pytest.fixture(scope="module")
def alone(place: Served, witness: Puppet) -> list[tuple[bytes, list[bytes]]]:
    """Return what the witness hears while there is nobody else."""
    heard: list[tuple[bytes, list[bytes]]] = witness.do(hear_all, place.tree.parent)
    return heard


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(todo=deeds)
def test_what_a_neighbour_sends_does_not_change_what_another_client_gets(
    place: Served, witness: Puppet, alone: list[tuple[bytes, list[bytes]]], todo: list[Deed]
) -> None:
    directory = place.tree.parent
    with Puppet(uid=OTHER_UID) as neighbour:
        half = len(todo) // 2
        neighbour.do(misbehave, directory, todo[:half])
        # The rest of it at the same time.
        neighbour.begin(misbehave, directory, todo[half:])
        assert witness.do(hear_all, directory) == alone
        neighbour.result()
        assert witness.do(hear_all, directory) == alone
    assert place.broker.is_alive(), place.broker.errors()


def test_the_witness_would_notice(
    place: Served, witness: Puppet, alone: list[tuple[bytes, list[bytes]]]
) -> None:
    """The comparison sees a file that changed."""
    assert len(alone) == 15
    file = place.tree / "plain" / "file"
    content = file.read_bytes()
    file.write_bytes(b"other")
    try:
        assert witness.do(hear_all, place.tree.parent) != alone
    finally:
        file.write_bytes(content)
