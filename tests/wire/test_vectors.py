"""docs/protocol.md and the code say the same, byte by byte."""

from __future__ import annotations

import errno
import re

import pytest

from fdbroker.wire.client import decode_reply
from fdbroker.wire.format import ERRNO_OF, MAX_FRAME, MAX_LIST_ENTRIES, MAX_PATHS, REPLY, Reason, Type
from fdbroker.wire.messages import MalformedError
from fdbroker.wire.requests import decode_request
from tests.wire.frames import PROTOCOL, Vector, encode_reply, encode_request, vectors

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
    types = {vector.frame[0] for vector in GOOD}
    both = {kind | bit for kind in Type if kind is not Type.ERROR for bit in (0, REPLY)}
    assert types == both | {Type.ERROR}


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


def test_the_document_has_the_limits() -> None:
    text = PROTOCOL.read_text()
    assert f"1 to {MAX_PATHS}" in text
    assert f"({MAX_FRAME:,})" in text
    assert f"0 to {MAX_LIST_ENTRIES:,}" in text
