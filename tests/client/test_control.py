"""The client of the control socket: what it asks, what it makes of answers, and of brokers that give none."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.client import (
    BrokenError,
    BrokerTimeoutError,
    DeniedError,
    DisconnectedError,
    PathInvalidError,
    ProtocolError,
    ReloadRefusedError,
    UnavailableError,
    control,
)
from fdbroker.client import connect as connect_for_files
from fdbroker.wire.format import ERRNO_OF, MAX_FRAME, Kind, Reason
from fdbroker.wire.messages import ErrorReply, ExplainRequest, ReloadRequest, StatusRequest
from fdbroker.wire.replies import (
    encode_error,
    encode_explain_reply,
    encode_reload_reply,
    encode_status_reply,
)
from tests.client.brokers import ThreadedBroker, hear, say, welcome
from tests.processes import in_child
from tests.running_broker import (
    CLIENT_UID,
    RunningBroker,
    policy,
    reachable_directory,
    rule,
    running_broker,
    with_control,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fdbroker.client.control import Control
    from fdbroker.wire.messages import Request


@contextmanager
def talking_to(
    directory: Path, answer: Callable[[Any], bytes | None], *, timeout: float = 30
) -> Iterator[tuple[Control, list[Request]]]:
    """Give a control connection to somebody who answers each request like that, and what was asked."""
    asked: list[Request] = []

    def serve(sock: socket.socket) -> None:
        hear(sock)
        say(sock, welcome())
        while (request := hear(sock)) is not None:
            asked.append(request)
            frame = answer(request)
            if frame is None:
                return
            if frame:
                say(sock, frame)

    path = str(directory / "control")
    with ThreadedBroker(path, serve), control.connect(path, timeout=timeout) as made:
        yield made, asked


def refusal(request: Request, reason: Reason, text: str = "so it is") -> bytes:
    return encode_error(ErrorReply(request.id, 7, Kind.REFUSED, reason, ERRNO_OF[reason], text))


def receiving(request: Request) -> bytes:
    """Answer as a broker does that takes every policy."""
    assert isinstance(request, ReloadRequest)
    received = request.offset + len(request.piece)
    return encode_reload_reply(request.id, 7 if request.more else 8, received, more=request.more)


def test_status_is_what_the_broker_says(tmp_path: Path) -> None:
    with talking_to(tmp_path, lambda r: encode_status_reply(r.id, 7, b'{"generation": 7}')) as (made, asked):
        assert made.status() == {"generation": 7}
        assert made.status() == {"generation": 7}
    assert [type(one) for one in asked] == [StatusRequest] * 2


def test_rows_are_asked_for_until_there_are_no_more(tmp_path: Path) -> None:
    def answer(request: Any) -> bytes:  # noqa: ANN401 - whatever was asked
        rows = [{"number": number} for number in range(request.row, min(request.row + 3, 7))]
        following = request.row + len(rows)
        document = {"rows": rows, "next": following if following < 7 else None}
        return encode_status_reply(request.id, 7, json.dumps(document).encode())

    with talking_to(tmp_path, answer) as (made, asked):
        assert made.rows("decisions") == [{"number": number} for number in range(7)]
        with pytest.raises(ValueError, match="'rules' is no part: choose decisions, clients, connections"):
            made.rows("rules")
    assert [(one.part, one.row) for one in asked if isinstance(one, StatusRequest)] == [
        ("decisions", 0),
        ("decisions", 3),
        ("decisions", 6),
    ]


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"rows": {}},
        {"rows": [1]},
        {"rows": [], "next": 0},
        {"rows": [{}], "next": 0},
        {"rows": [{}], "next": []},
    ],
    ids=str,
)
def test_rows_that_lead_nowhere_are_an_error_of_the_protocol(tmp_path: Path, document: object) -> None:
    answer = talking_to(tmp_path, lambda r: encode_status_reply(r.id, 7, json.dumps(document).encode()))
    with answer as (made, _), pytest.raises(ProtocolError):
        made.rows("clients")


def test_explanation_is_asked_for_by_action_and_bytes(tmp_path: Path) -> None:
    with talking_to(tmp_path, lambda r: encode_explain_reply(r.id, 7, b'{"allowed": true}')) as (made, asked):
        assert made.explain("list", "/caf\udce9") == {"allowed": True}
        assert made.explain("open", b"relative") == {"allowed": True}
    assert asked == [
        ExplainRequest(asked[0].id, "list", b"/caf\xe9"),
        ExplainRequest(asked[1].id, "open", b"relative"),
    ]


def test_what_can_not_be_asked_is_not_sent(tmp_path: Path) -> None:
    with talking_to(tmp_path, lambda _: b"") as (made, asked):
        with pytest.raises(ValueError, match="'read' is no action: choose open, stat, list, walk"):
            made.explain("read", "/a")
        with pytest.raises(PathInvalidError):
            made.explain("open", b"/a\0b")
        with pytest.raises(TypeError):
            made.explain("open", 7)  # type: ignore[arg-type]
    assert asked == []


@pytest.mark.parametrize("size", [1, MAX_FRAME - 16, MAX_FRAME - 15, 200_000])
def test_policy_goes_over_in_pieces_that_fit_and_join_again(tmp_path: Path, size: int) -> None:
    compiled = b"x" * size
    with talking_to(tmp_path, receiving) as (made, asked):
        assert made.reload(compiled) == 8
    pieces = [one for one in asked if isinstance(one, ReloadRequest)]
    assert b"".join(piece.piece for piece in pieces) == compiled
    assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert len(pieces) == -(-size // (MAX_FRAME - 16))


def test_part_of_the_launcher_is_not_handed_over(tmp_path: Path) -> None:
    compiled = policy("/r") | {"daemon": {"uid": 1}}
    with talking_to(tmp_path, receiving) as (made, asked):
        made.reload(json.dumps(compiled).encode())
    [piece] = asked
    assert isinstance(piece, ReloadRequest)
    assert json.loads(piece.piece) == policy("/r")


def test_no_policy_at_all_is_refused_without_a_word_to_the_broker(tmp_path: Path) -> None:
    with talking_to(tmp_path, receiving) as (made, asked), pytest.raises(ReloadRefusedError, match="1 to"):
        made.reload(b"")
    assert asked == []


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.POLICY, ReloadRefusedError),
        (Reason.DENIED, DeniedError),
        (Reason.AUDIT, BrokenError),
        (Reason.IDENTITY, DeniedError),
    ],
)
def test_refusal_is_the_exception_of_its_reason_and_has_the_text(
    tmp_path: Path, reason: Reason, kind: type[OSError]
) -> None:
    with talking_to(tmp_path, lambda r: refusal(r, reason, "restart the broker")) as (made, _):
        with pytest.raises(kind, match="restart the broker") as caught:
            made.reload(b"{}")
        assert caught.value.errno == ERRNO_OF[reason]
        with pytest.raises(kind):
            made.status()
        with pytest.raises(kind) as caught:
            made.explain("open", "/a")
        assert caught.value.filename == b"/a"
    if kind is ReloadRefusedError:
        assert caught.value.strerror == "restart the broker"


@pytest.mark.parametrize(
    "answer",
    [
        lambda r: encode_status_reply(r.id, 7, b"{}"),
        lambda r: encode_reload_reply(r.id, 7, 1, more=False),
        lambda r: encode_reload_reply(r.id, 7, 2, more=True),
        lambda r: encode_reload_reply(r.id + 1, 7, 2, more=False),
        lambda _: b"nonsense",
    ],
    ids=["another kind", "too little", "more", "another id", "nonsense"],
)
def test_answer_that_is_none_to_a_reload_is_an_error_of_the_protocol(
    tmp_path: Path, answer: Callable[[Any], bytes]
) -> None:
    with talking_to(tmp_path, answer) as (made, _), pytest.raises(ProtocolError):
        made.reload(b"{}")


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[]", b"\xff", b"[" * 60_000])
def test_document_that_is_no_json_object_is_an_error_of_the_protocol(tmp_path: Path, text: bytes) -> None:
    answer = talking_to(tmp_path, lambda r: encode_status_reply(r.id, 7, text))
    with answer as (made, _), pytest.raises(ProtocolError):
        made.status()


def test_broker_that_goes_away_is_a_lost_connection_and_nothing_is_repeated(tmp_path: Path) -> None:
    with talking_to(tmp_path, lambda _: None) as (made, asked):
        with pytest.raises(DisconnectedError):
            made.reload(b"{}")
        with pytest.raises(DisconnectedError):
            made.status()
    assert len(asked) == 1


def test_broker_that_does_not_answer_is_waited_for_as_long_as_was_said(tmp_path: Path) -> None:
    with talking_to(tmp_path, lambda _: b"", timeout=0.05) as (made, _), pytest.raises(BrokerTimeoutError):
        made.status()


def test_broker_that_closes_before_its_welcome_is_a_lost_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with ThreadedBroker(path, lambda sock: sock.close()), pytest.raises(DisconnectedError):
        control.connect(path)


def test_missing_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        control.connect(tmp_path / "missing")
    assert caught.value.filename == bytes(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


# A running broker


@pytest.fixture(scope="module")
def running() -> Iterator[RunningBroker]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        (path / "tree" / "file").write_bytes(b"content")
        with running_broker(path, policy(path / "tree"), with_control(path)) as broker:
            yield broker


@pytest.mark.root
def test_root_sees_all_explains_and_reloads(running: RunningBroker) -> None:
    tree = running.socket.parent / "tree"
    with (
        control.connect(running.control) as made,
        connect_for_files(running.socket) as client,
    ):
        generation = made.status()["generation"]
        assert made.status()["pid"] == running.pid
        assert made.explain("open", tree / "file")["rule"] == "all"
        with pytest.raises(ReloadRefusedError, match="restart the broker"):
            made.reload(json.dumps(policy(tree, read_only_view="off")).encode())
        changed = policy(tree, rule("never", effect="deny", paths=["file"]), rule("all"))
        assert made.reload(json.dumps(changed).encode()) == generation + 1  # type: ignore[operator]
        told = made.explain("open", tree / "file")
        assert (told["allowed"], told["reason"], told["rule"]) == (False, "deny_rule", "never")
        with pytest.raises(DeniedError):
            client.open(tree / "file")
        assert made.reload(json.dumps(policy(tree)).encode()) == generation + 2  # type: ignore[operator]
        client.open(tree / "file").close()


@pytest.mark.root
def test_others_see_themselves_and_change_nothing(running: RunningBroker) -> None:
    tree = running.socket.parent / "tree"

    def client() -> tuple[bool, object, str]:
        with control.connect(running.control) as made:
            try:
                made.reload(json.dumps(policy(tree)).encode())
            except DeniedError as error:
                said = str(error)
            else:
                said = "not refused"
            for part in ("decisions", "clients", "connections"):
                with pytest.raises(DeniedError, match="to root and the policy's admins"):
                    made.rows(part)
            return "pid" in made.status(), made.explain("open", tree / "file")["allowed"], said

    whole, allowed, said = in_child(client, uid=CLIENT_UID)
    assert (whole, allowed) == (False, True)
    assert "only root changes the policy" in said


@pytest.mark.root
def test_socket_for_files_has_no_control_and_control_has_no_files(running: RunningBroker) -> None:
    with control.connect(running.socket) as made, pytest.raises(ProtocolError, match="not for this socket"):
        made.explain("open", "/a")
    with (
        connect_for_files(running.control) as client,
        pytest.raises(ProtocolError, match="not for this socket"),
    ):
        client.open("/a")
    assert os.path.exists(running.control)
