"""What a worker answers for a file, as bytes; read as what they are, hostile.

An answer is a head (the number of the file, the bytes it had, how many engines
answer), and for each engine, in the order in which both sides know them, a kind, a
reason, and text: names with a NUL between them, or a sentence. All little-endian,
exact to the byte. A message has one answer or several, one after the other.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.scan.verdict import MOST_NAMES, Answer, Clean, Error, Infected, Reason, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST_ENGINES = 8

_HEAD = struct.Struct("<QQB")
_ENGINE = struct.Struct("<BBH")  # kind, reason, bytes of text
_CLEAN, _INFECTED, _ERROR = 1, 2, 3
_REASONS = tuple(Reason)
_NUMBERS = {reason: number for number, reason in enumerate(_REASONS)}
# Of one engine. The longest name, or sentence, has a quarter of it; names beyond it are left out.
_MOST_TEXT = 4096
# And of a message, however many answers are in it.
LONGEST_ANSWER = _HEAD.size + MOST_ENGINES * (_ENGINE.size + _MOST_TEXT)
_CLEAN_BYTES = _ENGINE.pack(_CLEAN, 0, 0)
_CLEAN_VERDICT = Clean()
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


class AnswerError(ValueError):
    """The bytes are no answer."""


class FileAnswer(NamedTuple):
    """An answer. `size`: the bytes that the worker was told of and found the file to have."""

    number: int
    size: int
    answers: tuple[Answer, ...]


def all_clean(engines: Iterable[str]) -> tuple[Answer, ...]:
    """Return what nearly all files get: clean, by each engine."""
    return tuple(Answer(engine, _CLEAN_VERDICT) for engine in engines)


def encode(number: int, size: int, answers: Sequence[Answer]) -> bytes:
    """Return the answer as bytes."""
    data = _HEAD.pack(number, size, len(answers))
    for _, verdict in answers:
        data += _CLEAN_BYTES if isinstance(verdict, Clean) else _encode_bad(verdict)
    return data


def _encode_bad(verdict: Infected | Error) -> bytes:
    if isinstance(verdict, Infected):
        text = _text(verdict.name)
        for name in verdict.more:
            longer = text + b"\0" + _text(name)
            if len(longer) <= _MOST_TEXT:
                text = longer
        return _ENGINE.pack(_INFECTED, 0, len(text)) + text
    text = _text(verdict.text)
    return _ENGINE.pack(_ERROR, _NUMBERS[verdict.reason], len(text)) + text


def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def decode(data: bytes, clean: tuple[Answer, ...]) -> list[FileAnswer]:
    """Return the answers in a message of a worker that has the engines of `clean`, at least one.

    `clean` is what `all_clean` gave for them. It is itself the answer to a file that all of them call clean.

    Raises:
        AnswerError: it is none, or something in it is none.

    """
    at, end, wanted = 0, len(data), len(clean)
    all_say_clean = _CLEAN_BYTES * wanted
    said = []
    while True:
        if end < at + _HEAD.size:
            raise AnswerError(f"{end - at} bytes are no answer")
        number, size, count = _HEAD.unpack_from(data, at)
        if count != wanted:
            raise AnswerError(f"{count} engines answer, not {wanted}")
        at += _HEAD.size
        if data.startswith(all_say_clean, at):
            at += len(all_say_clean)
            said.append(_new(FileAnswer, (number, size, clean)))
        else:
            answers = []
            for engine, _ in clean:
                verdict, at = _decode_verdict(data, at)
                answers.append(Answer(engine, verdict))
            said.append(FileAnswer(number, size, tuple(answers)))
        if at == end:
            return said


def _decode_verdict(data: bytes, at: int) -> tuple[Verdict, int]:
    """Return what one engine says, and where that ends."""
    if len(data) < at + _ENGINE.size:
        raise AnswerError("it ends too early")
    kind, reason, length = _ENGINE.unpack_from(data, at)
    at += _ENGINE.size
    text = data[at : at + length]
    if len(text) != length or length > _MOST_TEXT:
        raise AnswerError("a text that ends too early, or is too long")
    return _verdict_of(kind, reason, text), at + length


def _verdict_of(kind: int, reason: int, data: bytes) -> Verdict:
    if kind == _CLEAN and not reason and not data:
        return _CLEAN_VERDICT
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AnswerError("a text that is not UTF-8") from error
    if kind == _INFECTED and not reason:
        first, *more = text.split("\0", MOST_NAMES)
        try:
            return Infected(first, tuple(more))
        except ValueError as error:
            raise AnswerError(str(error)) from error
    if kind == _ERROR and reason < len(_REASONS):
        return Error(_REASONS[reason], text)
    raise AnswerError(f"kind {kind} with reason {reason} and {len(data)} bytes")
