"""docs/protocol.md and the code say the same, byte by byte."""

from __future__ import annotations

import errno
import re

import pytest

from fdbroker.wire.client import decode_reply
from fdbroker.wire.format import (
    ERRNO_OF,
    MAX_COPY,
    MAX_FRAME,
    MAX_GLOB,
    MAX_LIST_ENTRIES,
    MAX_LISTENER_NAME,
    MAX_PATHS,
    MAX_REPLY,
    MAX_WALK_GLOBS,
    Limit,
    Reason,
)
from fdbroker.wire.messages import MalformedError, StatusRequest
from fdbroker.wire.requests import decode_request
from fdbroker.wire.stream import FrameBuffer, framed
from tests.wire.frames import (
    PROTOCOL,
    REPLY_TYPES,
    REQUEST_TYPES,
    Vector,
    encode_reply,
    encode_request,
    vectors,
)

VECTORS = vectors()
GOOD = [vector for vector in VECTORS if vector.message is not None]
BAD = [vector for vector in VECTORS if vector.message is None]


def name_of(vector: Vector) -> str:
    return vector.why or f"{type(vector.message).__name__}-{vector.message.id}"


@pytest.mark.parametrize("vector", GOOD, ids=name_of)
def test_a_message_of_the_document_encodes_to_its_bytes(vector: Vector) -> None:
    encode = encode_request if vector.direction == "request" else encode_reply
    assert encode(vector.message).hex(" ") == vector.frame.hex(" ")


@pytest.mark.parametrize("vector", GOOD, ids=name_of)
def test_the_bytes_of_the_document_decode_to_their_message(vector: Vector) -> None:
    decode = decode_request if vector.direction == "request" else decode_reply
    assert decode(vector.frame) == vector.message
    assert type(decode(vector.frame)) is type(vector.message)


@pytest.mark.parametrize("vector", BAD, ids=name_of)
def test_what_the_document_calls_malformed_is_refused(vector: Vector) -> None:
    decode = decode_request if vector.direction == "request" else decode_reply
    with pytest.raises(MalformedError):
        decode(vector.frame)


def test_the_document_has_a_vector_for_each_type() -> None:
    for direction, types in (("request", REQUEST_TYPES), ("reply", REPLY_TYPES)):
        assert {vector.frame[0] for vector in GOOD if vector.direction == direction} == types


def test_the_document_lists_the_types() -> None:
    text = PROTOCOL.read_text()
    rows = re.findall(
        r"^\| [a-z (),]+ \| (?:0x(..)|-) \| (?:0x(..)|-)([^|]*)\|",
        text[: text.index("## hello")],
        re.MULTILINE,
    )
    assert {int(request, 16) for request, _, _ in rows if request} == REQUEST_TYPES
    replies = {int(reply, 16) for _, reply, _ in rows if reply}
    replies |= {int(more, 16) for _, _, said in rows for more in re.findall(r"0x(..)", said)}
    assert replies == REPLY_TYPES


def test_a_malformed_vector_is_so_for_the_reason_it_names() -> None:
    """One byte that was wrong in a former version may be right in the next."""
    told = {
        "shorter than a header": "shorter than its header",
        "an unknown type": "unknown request type",
        "a flag that open does not have": "flags or reserved",
        "an unknown status": "not a valid Status",
        "a walk of no kind": "kinds",
        "a walk with an empty glob": "glob",
        "a copy that ends early": "instead of",
        "a copy of a stat record": "copy where none can be",
        "a walk with the path '../a'": "impossible path",
        "a list with the name '..'": "impossible name",
    }
    for vector in BAD:
        if vector.why in told:
            decode = decode_request if vector.direction == "request" else decode_reply
            with pytest.raises(MalformedError, match=told.pop(vector.why)):
                decode(vector.frame)
    assert not told


def test_the_frame_on_a_stream_is_the_one_without_it_and_its_length() -> None:
    text = PROTOCOL.read_text()
    [content] = re.findall(r"^```stream\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    sent = bytes.fromhex(re.sub(r"#.*", "", content))
    [status] = [vector.frame for vector in GOOD if vector.message == StatusRequest(6)]
    assert framed(status) == sent
    buffer = FrameBuffer()
    buffer.add(sent)
    assert buffer.next_frame() == status


def test_the_document_lists_each_reason_with_its_errno() -> None:
    text = PROTOCOL.read_text()
    section = text[text.index("\n## Reasons") : text.index("\n## Test vectors")]
    rows = re.findall(r"^\| (\d+) \| (\w+) \| ([^|]+) \|", section, re.MULTILINE)
    listed = {int(code): (name, numbers.split(", ")) for code, name, numbers in rows}
    assert listed.keys() == {int(reason) for reason in Reason if reason}
    for reason, (name, numbers) in listed.items():
        assert name == Reason(reason).name.lower()
        if numbers != ["as it came"]:
            assert ERRNO_OF[Reason(reason)] in {getattr(errno, number) for number in numbers}


def test_the_document_lists_each_limit_that_is_told() -> None:
    text = PROTOCOL.read_text()
    section = text[text.index("\n## The limit record") : text.index("\n## open (0x02)")]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", section, re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [
        (limit.value, limit.name.lower()) for limit in Limit
    ]


def test_the_document_has_the_limits() -> None:
    text = PROTOCOL.read_text()
    assert f"1 to {MAX_PATHS}" in text
    assert f"({MAX_FRAME:,})" in text
    assert f"0 to {MAX_LIST_ENTRIES:,}" in text
    assert f"({MAX_COPY:,})" in text
    assert f"{MAX_REPLY:,} bytes" in text
    assert f"up to {MAX_WALK_GLOBS} globs of 1 to {MAX_GLOB:,} bytes" in text
    assert f"1 to {MAX_LISTENER_NAME} bytes" in text
