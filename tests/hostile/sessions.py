"""Everything that can be asked of a broker, by a client of each kind; and what came of it.

The tree has files that may be had and ones that may not, by name and by what they are.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.wire.client import (
    AcceptedReply,
    ListReply,
    OpenReply,
    ServeReply,
    StatReply,
    WalkReply,
    encode_list,
    encode_open,
    encode_release,
    encode_serve,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import Status
from fdbroker.wire.messages import ErrorReply, WalkFilter
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker
from tests.running_broker import BROKER_UID, RunningBroker, running_broker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.broker.speaking import Answer

POLICY = """
version: 1
roots:
  tree: {path: DIRECTORY/tree}
  helped: {path: DIRECTORY/tree/helped, opens: helpers}
rules:
  - {name: never, deny: [open, stat, list, walk], in: tree, paths: ["**/secret"]}
  - {name: never-helped, deny: [open, stat, list, walk], in: helped, paths: [secret]}
  - {name: plain, allow: [open, stat, list, walk], client: any, in: tree, paths: ["plain/**"]}
  - name: judged
    allow: [open, stat, list, walk]
    client: any
    in: tree
    paths: ["judged/**"]
    where: {size: {max: 100}, links: {max: 1}}
  - name: copied
    allow: [open, stat]
    client: any
    in: tree
    paths: ["copied/**"]
    deliver: [descriptor, copy]
  - name: helped
    allow: [open, stat]
    client: any
    in: helped
    paths: ["**"]
    where: {links: {max: 1}}
  - name: for-clients
    allow: [open, stat]
    client: any
    on_behalf_of: any
    in: tree
    paths: ["plain/file"]
listeners:
  seqpacket: {path: DIRECTORY/broker.seqpacket, mode: "0666"}
  stream: {path: DIRECTORY/broker.stream, mode: "0666"}
  dgram: {path: DIRECTORY/broker.dgram, mode: "0666"}
  control: {path: DIRECTORY/control, mode: "0666"}
  service: {path: DIRECTORY/service, mode: "0666", service: {user: root}}
"""
# What may be had, and what is in it.
CONTENT = {
    b"plain/file": b"plain",
    b"plain/other": b"other",
    b"judged/file": b"judged",
    b"copied/file": b"copied",
    b"helped/file": b"helped",
}
NEVER = [
    b"secret",
    b"plain/secret",
    b"judged/secret",
    b"judged/big",
    b"judged/linked",
    b"helped/secret",
    b"copied/secret",
    b"plain/link",
    b"plain/fifo",
    b"plain",
]
WITHOUT_HELPERS = [path for path in (*CONTENT, *NEVER) if not path.startswith(b"helped")]


class Got(NamedTuple):
    """What became of one path: by which request, whether it was given, and its contents if it was."""

    action: str
    path: bytes
    given: bool
    content: bytes | None = None


class Session(NamedTuple):
    """What one client heard. `answered`: each of its requests was answered, whatever with."""

    got: list[Got]
    answered: bool


class Served(NamedTuple):
    """A broker and its tree."""

    broker: RunningBroker
    tree: Path

    def path(self, name: bytes) -> bytes:
        """Return the absolute path of a name."""
        return bytes(self.tree) + b"/" + name

    def name(self, path: bytes) -> bytes:
        """Return the name of an absolute path."""
        return path.removeprefix(bytes(self.tree) + b"/")


def fill(tree: Path) -> None:
    """Make the tree."""
    for name in ("plain", "judged", "copied", "helped"):
        (tree / name).mkdir()
        (tree / name / "secret").write_bytes(b"SECRET")
    for path, content in CONTENT.items():
        (tree / os.fsdecode(path)).write_bytes(content)
    (tree / "secret").write_bytes(b"SECRET")
    (tree / "judged" / "big").write_bytes(bytes(101))
    (tree / "judged" / "linked").write_bytes(b"SECRET")
    os.link(tree / "judged" / "linked", tree / "elsewhere")
    (tree / "plain" / "link").symlink_to("secret")
    os.mkfifo(tree / "plain" / "fifo")


@contextlib.contextmanager
def served(directory: Path) -> Iterator[Served]:
    """Run a broker with a listener of each kind, one of a service, and helpers for a part of the tree."""
    tree = directory / "tree"
    tree.mkdir()
    fill(tree)
    text = POLICY.replace("DIRECTORY", str(directory))
    with running_broker(directory, text, own_socket=False) as broker:
        yield Served(broker, tree)


def _read(action: str, names: list[bytes], answer: Answer | None) -> Session:
    """Return what an answer to `open` or `stat` says, with each file read and closed."""
    if answer is None:
        return Session([], answered=False)
    got = []
    with answer.descriptors as descriptors:
        reply = answer.reply
        if isinstance(reply, ErrorReply):
            return Session([], answered=True)
        assert isinstance(reply, OpenReply | StatReply), reply
        copies = list(reply.copies) if isinstance(reply, OpenReply) else []
        results = (
            list(reply.results) if isinstance(reply, OpenReply) else [result for result, _ in reply.results]
        )
        for name, result in zip(names, results, strict=True):
            content = None
            if result.status is Status.COPIED:
                content = copies.pop(0)
            elif result.status is Status.GIVEN and action == "open":
                with open(descriptors.take(), "rb") as file:
                    content = file.read()
            got.append(Got(action, name, result.status in {Status.GIVEN, Status.COPIED}, content))
        assert not descriptors
    return Session(got, answered=True)


def _opened(speaker: Speaker, served: Served, names: list[bytes], *, copy: bool = False) -> Session:
    paths = [served.path(name) for name in names]
    return _read("open", names, _ask(speaker, encode_open(7, paths, copy=copy)))


def _ask(speaker: Speaker, frame: bytes) -> Answer | None:
    """Return the answer, None if the connection ended instead."""
    try:
        speaker.send(frame)
        return speaker.receive()
    except (BrokenPipeError, ConnectionResetError):
        return None


@contextlib.contextmanager
def _speaker(served: Served, kind: type[Speaker] = Speaker, path: Path | None = None) -> Iterator[Speaker]:
    """Connect and greet. Where that fails, the block finds an end of the connection."""
    if path is None:
        path = served.broker.socket if kind is Speaker else served.tree.parent / "broker.stream"
    with kind.connect(path, hello=False) as speaker:
        with contextlib.suppress(AssertionError, ConnectionError):
            speaker.greet()
        yield speaker


def open_files(served: Served) -> Session:
    """Open everything, what may be had and what may not, in one request."""
    with _speaker(served) as speaker:
        return _opened(speaker, served, WITHOUT_HELPERS)


def open_on_a_stream(served: Served) -> Session:
    """Do so by a stream."""
    with _speaker(served, StreamSpeaker) as speaker:
        return _opened(speaker, served, WITHOUT_HELPERS)


def copy_files(served: Served) -> Session:
    """Ask for the contents of small files."""
    with _speaker(served) as speaker:
        return _opened(speaker, served, WITHOUT_HELPERS, copy=True)


def describe_files(served: Served) -> Session:
    """Describe everything."""
    with _speaker(served) as speaker:
        paths = [served.path(name) for name in WITHOUT_HELPERS]
        return _read("stat", WITHOUT_HELPERS, _ask(speaker, encode_stat(8, paths)))


def list_directories(served: Served) -> Session:
    """List two directories: of one, anything may be named; of the other, what meets the conditions."""
    got: list[Got] = []
    with _speaker(served) as speaker:
        for directory in (b"plain", b"judged"):
            answer = _ask(speaker, encode_list(9, served.path(directory)))
            if answer is None:
                return Session(got, answered=False)
            if isinstance(answer.reply, ErrorReply):
                continue
            assert isinstance(answer.reply, ListReply)
            given = answer.reply.result.status is Status.GIVEN
            got.append(Got("list", directory, given))
            got += [Got("named", directory + b"/" + entry.name, given=True) for entry in answer.reply.entries]
    return Session(got, answered=True)


def walk_the_tree(served: Served) -> Session:
    """Walk two directories with descriptors, as far as it gets."""
    got: list[Got] = []
    with _speaker(served) as speaker:
        for directory in (b"plain", b"judged"):
            start = served.path(directory)
            answer = _ask(speaker, encode_walk(20, start, WalkFilter(), credit=100, descriptors=True))
            while answer is not None and isinstance(answer.reply, WalkReply):
                with answer.descriptors as descriptors:
                    for entry in answer.reply.entries:
                        content = None
                        if entry.descriptor:
                            with open(descriptors.take(), "rb") as file:
                                content = file.read()
                        got.append(Got("walk", directory + b"/" + entry.path, entry.descriptor, content))
                if answer.reply.end is not None:
                    break
                answer = speaker.receive()
            if answer is None:
                return Session(got, answered=False)
    return Session(got, answered=True)


DESCRIBED = 8  # a request by a datagram that is no part of the session


def send_datagrams(served: Served) -> Session:
    """Ask by a datagram; a second one, which is served behind it, shows that it has no answer."""
    path = served.tree.parent / "broker.dgram"
    with DatagramSpeaker.to(path, broker_uid=BROKER_UID) as speaker:
        paths = [served.path(name) for name in WITHOUT_HELPERS]
        speaker.send(encode_open(7, paths))
        for _ in range(8):
            speaker.send(encode_stat(DESCRIBED, paths[:1]))
            answer = speaker.receive()
            assert answer is not None
            if getattr(answer.reply, "id", None) == 7:
                return _read("open", WITHOUT_HELPERS, answer)
            answer.descriptors.close()
            if speaker.is_silent():
                break
    return Session([], answered=False)


def open_by_helpers(served: Served) -> Session:
    """Open what helpers open, and describe it."""
    names = [b"helped/file", b"helped/secret", b"helped/missing", b"plain/file"]
    with _speaker(served) as speaker:
        opened = _opened(speaker, served, names)
        if not opened.answered:
            return opened
        described = _read("stat", names, _ask(speaker, encode_stat(8, [served.path(name) for name in names])))
    return Session(opened.got + described.got, described.answered)


def _client_of(speaker: Speaker, name: object) -> AcceptedReply | None:
    """Return what is said of the client with this name; others have left before they were handed over."""
    try:
        while (answer := speaker.receive()) is not None:
            with answer.descriptors as descriptors:
                if not isinstance(answer.reply, AcceptedReply):
                    return None
                with socket.socket(fileno=descriptors.take()) as client:
                    if client.getpeername() == name:
                        return answer.reply
    except TimeoutError:
        pass
    return None


def act_for_a_client(served: Served) -> Session:
    """Serve a listener, take the client that comes there, and open files for it."""
    names = [b"plain/file", b"plain/other", b"plain/secret", b"judged/file"]
    with _speaker(served) as speaker, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        answer = _ask(speaker, encode_serve(5, b"service"))
        if answer is None or not isinstance(answer.reply, ServeReply):
            return Session([], answered=answer is not None)
        if answer.reply.result.status is not Status.GIVEN:
            return Session([], answered=True)
        client.bind("")  # a name by which it is known again
        client.connect(str(served.tree.parent / "service"))
        # Whether somebody comes is not said if it fails.
        speaker.sock.settimeout(1)
        handed_over = _client_of(speaker, client.getsockname())
        if handed_over is None:
            return Session([], answered=False)
        number = handed_over.client.number
        paths = [served.path(name) for name in names]
        opened = _read("open", names, _ask(speaker, encode_open(7, paths, number)))
        with contextlib.suppress(ConnectionError):  # it may have ended by then
            speaker.sock.send(encode_release(8, [number]))
        ended = _ask(speaker, encode_status(9))
        return Session(opened.got, opened.answered and ended is not None)


def ask_the_control_socket(served: Served) -> Session:
    """Have a decision explained, and the whole status."""
    with _speaker(served, path=served.broker.control) as speaker:
        try:
            explained = speaker.explain("open", served.path(b"plain/secret"))
            speaker.status()
        except (AssertionError, ConnectionError):
            return Session([], answered=False)
    assert not explained["allowed"]
    return Session([], answered=True)


SESSIONS: dict[str, Callable[[Served], Session]] = {
    session.__name__: session
    for session in (
        open_files,
        open_on_a_stream,
        copy_files,
        describe_files,
        list_directories,
        walk_the_tree,
        send_datagrams,
        open_by_helpers,
        act_for_a_client,
        ask_the_control_socket,
    )
}
