"""The protocol without a socket: any parts, any bytes, the clock, and whose a descriptor is."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.clamd.protocol import (
    COMMANDS,
    FILDES_ALONE,
    FOR_STRANGERS,
    LONGEST_COMMAND,
    WHOLE_CONVERSATIONS,
    Abandoned,
    Asked,
    Chunk,
    Conversation,
    Event,
    Kind,
    Limits,
    Refusal,
    Reply,
    Streamed,
)
from fdbroker.clamd.replies import escaped, said
from fdbroker.scan.verdict import Clean, Error, Infected, Reason
from tests.clamd.talks import chunks
from tests.fuzz.targets import clamd as fuzzed

LIMITS = Limits(stream_length=1000)
# Commands, streams, and parts of them.
WORDS = st.sampled_from(
    [
        *(
            prefix + name + end
            for name in COMMANDS
            for prefix, end in ((b"n", b"\n"), (b"z", b"\0"), (b"", b"\n"))
        ),
        b"zSCAN /a\0",
        b"nSCAN /b \r\n",
        b"zFILDES\0\0",
        b"zINSTREAM\0" + chunks(b"abc"),
        b"nINSTREAM\n" + chunks(b"abc", bytes(996)) + b"zPING\0",
        b"zINSTREAM\0" + chunks(bytes(600), bytes(600)),
        bytes(5000),
        b"n" + b"A" * (LONGEST_COMMAND - 2) + b"\n",
        b"n" + b"A" * (LONGEST_COMMAND - 1) + b"\n",
    ]
)
SAID = st.lists(st.one_of(WORDS, st.binary(max_size=5)), max_size=8).map(b"".join)


def events_of(conversation: Conversation, data: bytes, descriptors: int = 0, now: float = 0.0) -> list[Event]:
    """Hand in what was read and return what comes of it."""
    conversation.receive(data, descriptors, now)
    return rest_of(conversation, now)


def rest_of(conversation: Conversation, now: float = 0.0) -> list[Event]:
    events = []
    while (event := conversation.next_event(now)) is not None:
        events.append(event)
    return events


def joined(events: list[Event]) -> list[Event]:
    """Return events with chunks of one stream put together, since where they were parted means nothing."""
    result: list[Event] = []
    for event in events:
        before = result[-1] if result else None
        if isinstance(event, Chunk) and isinstance(before, Chunk):
            result[-1] = Chunk(event.number, before.data + event.data)
        else:
            result.append(event)
    return result


def begun(*words: bytes) -> Conversation:
    """Return a conversation in which this was said."""
    conversation = Conversation(LIMITS, 0.0)
    for word in words:
        events_of(conversation, word)
    return conversation


@given(data=SAID, cuts=st.lists(st.integers(0, 6000), max_size=6), bytewise=st.booleans())
def test_how_many_parts_it_came_in_makes_no_difference(
    data: bytes, cuts: list[int], *, bytewise: bool
) -> None:
    whole, parted = Conversation(LIMITS, 0.0), Conversation(LIMITS, 0.0)
    expected = (events_of(whole, data) if data else []) + events_of(whole, b"")
    inner = range(1, len(data)) if bytewise else sorted({cut for cut in cuts if 0 < cut < len(data)})
    events = []
    for begin, end in pairwise([0, *inner, len(data)] if data else []):
        events += events_of(parted, data[begin:end])
    events += events_of(parted, b"")
    assert joined(events) == joined(expected)
    assert whole.is_over == parted.is_over == (not whole.under_way)


PARTS = st.tuples(st.one_of(st.binary(max_size=12), SAID), st.integers(0, 3))


@given(parts=st.lists(PARTS, max_size=6))
def test_any_bytes_have_an_answer_and_little_is_kept(parts: list[tuple[bytes, int]]) -> None:
    fuzzed(b"".join(bytes((len(part) % 256, count)) + part for part, count in parts))


def test_what_is_known_of_whole_conversations_is_what_comes_of_them() -> None:
    for data, reply in WHOLE_CONVERSATIONS.items():
        conversation = Conversation(LIMITS, 0.0)
        assert events_of(conversation, data) == [Reply(reply)]
        assert conversation.is_over


@pytest.mark.parametrize(("data", "terminator"), FILDES_ALONE.items())
def test_of_who_hands_in_one_file_no_more_is_read_and_how_the_answer_ends_is_known(
    data: bytes, terminator: bytes
) -> None:
    conversation = Conversation(LIMITS, 0.0)
    assert events_of(conversation, data, 1) == [Asked(Kind.FILDES, 0)]
    assert not conversation.reads_more
    assert conversation.deadline is None
    assert conversation.answer(0, b"OK", b"fd[7]") == b"fd[7]: OK" + terminator
    conversation.finish(0, 1.0)
    assert conversation.is_over


@given(
    st.lists(SAID, max_size=2),
    st.sampled_from([b"zPING\0", b"nPING\n", b"zFILDES\0\0", b"nFILDES\n\0", b"zEND\0", b""]),
    st.integers(0, 2),
    SAID,
)
def test_what_is_answered_or_begun_at_once_is_the_same_as_by_and_by(
    before: list[bytes], data: bytes, count: int, behind: bytes
) -> None:
    quick, slow = (begun(*before) for _ in range(2))
    expected = events_of(slow, data, count, now=7.0)
    if count == 0 and (reply := quick.answer_at_once(data, 7.0)) is not None:
        assert expected == [Reply(reply)]
    elif count == 1 and (asked := quick.asked_at_once(data, 7.0)) is not None:
        assert expected == [asked]
    else:
        assert events_of(quick, data, count, now=7.0) == expected
    for number in range(3):
        assert answer_of(quick, number) == answer_of(slow, number)
    assert (quick.deadline, quick.under_way, quick.is_over) == (slow.deadline, slow.under_way, slow.is_over)
    assert events_of(quick, behind, now=8.0) == events_of(slow, behind, now=8.0)
    assert (quick.deadline, quick.under_way, quick.is_over) == (slow.deadline, slow.under_way, slow.is_over)


def answer_of(conversation: Conversation, number: int) -> bytes | None:
    try:
        return conversation.answer(number, b"OK", b"fd")
    except RuntimeError:
        return None


def test_a_fildes_is_begun_at_once_where_nothing_is_half_said() -> None:
    session = begun(b"zIDSESSION\0", b"zPING\0")
    assert session.asked_at_once(b"zFILDES\0\0", 1.0) == Asked(Kind.FILDES, 2)
    assert session.asked_at_once(b"nFILDES\n\0", 1.0) == Asked(Kind.FILDES, 3)
    assert session.answer(3, b"OK", b"fd[1]") == b"3: fd[1]: OK\n"
    alone = begun()
    assert alone.asked_at_once(b"zFILDES\0\0", 1.0) == Asked(Kind.FILDES, 0)
    assert not alone.reads_more
    for data in (b"zFILDES\0", b"zFILDES\0\0z", b"zPING\0", b""):
        assert session.asked_at_once(data, 1.0) is None
    for unfinished in (b"zPI", b"zFILDES\0", b"zINSTREAM\0"):
        assert begun(unfinished).asked_at_once(b"zFILDES\0\0", 1.0) is None
    assert Conversation(LIMITS, 0.0, FOR_STRANGERS).asked_at_once(b"zFILDES\0\0", 1.0) is None


def test_of_a_session_a_ping_is_answered_at_once_and_nothing_else() -> None:
    session = begun(b"zIDSESSION\0", b"zPING\0")
    assert session.answer_at_once(b"zPING\0", 1.0) == b"2: PONG\0"
    assert session.answer_at_once(b"nPING\n", 1.0) == b"3: PONG\n"
    for data in (b"zPING\0zPING\0", b"PING\n", b"zVERSION\0", b""):
        assert session.answer_at_once(data, 1.0) is None
    assert begun().answer_at_once(b"zPING\0", 1.0) is None, "it is not in a session"
    for unfinished in (b"zPI", b"zFILDES\0", b"zINSTREAM\0"):
        assert begun(b"zIDSESSION\0", unfinished).answer_at_once(b"zPING\0", 1.0) is None
    session.receive(b"zPING\0zPING\0", 0, 1.0)
    for _ in range(2):
        assert session.answer_at_once(b"zPING\0", 1.0) is None, "others were said before"
        assert session.next_event(1.0) is not None
    strangers = Conversation(LIMITS, 0.0, frozenset({Kind.IDSESSION}))
    events_of(strangers, b"zIDSESSION\0")
    assert strangers.answer_at_once(b"zPING\0", 1.0) is None


def test_a_command_is_as_long_as_it_may_be() -> None:
    longest = b"nSCAN /" + b"a" * (LONGEST_COMMAND - 8) + b"\n"
    assert len(longest) == LONGEST_COMMAND
    [event] = events_of(begun(), longest)
    assert isinstance(event, Asked)
    [event] = events_of(begun(), longest[:-1] + b"a\n")
    assert event == Refusal(b"Command too long. ERROR\n")
    [event] = events_of(begun(b"zIDSESSION\0", b"zPING\0"), b"z" + b"A" * LONGEST_COMMAND)
    assert event == Refusal(b"2: Command too long. ERROR\0")


def test_no_command_but_those_of_the_table_is_known() -> None:
    for name, rule in COMMANDS.items():
        data = name + (b" /a" if rule.path else b"")
        for command in (b"n" + data + b"\n", data + b"\n"):
            [*events] = events_of(begun(), command)
            known = events != [Refusal(b"UNKNOWN COMMAND\n")]
            allowed = rule.kind is not Kind.END and (rule.plain or command[:1] == b"n")
            assert known == allowed, command
        [*events] = events_of(begun(b"zIDSESSION\0"), b"n" + data + b"\n")
        invalid = events == [Refusal(b"1: Command invalid inside IDSESSION. ERROR\n")]
        assert invalid == (not rule.session), name


def test_strangers_are_told_what_is_not_for_them() -> None:
    for kind in Kind:
        conversation = Conversation(LIMITS, 0.0, FOR_STRANGERS)
        path = b" /a" if COMMANDS[kind.value].path else b""
        events = events_of(conversation, b"n" + kind.value + path + b"\n")
        assert (Refusal(b"COMMAND UNAVAILABLE\n") in events) == (kind not in FOR_STRANGERS), kind


def test_events_are_taken_before_more_is_received() -> None:
    conversation = begun()
    conversation.receive(b"zPING\0", 0, 0.0)
    with pytest.raises(RuntimeError, match="take all events"):
        conversation.receive(b"x", 0, 0.0)


def test_answers_of_a_session_come_in_any_order_and_it_ends_with_the_last() -> None:
    conversation = begun(b"zIDSESSION\0")
    events = events_of(conversation, b"zSCAN /a\0nSCAN /b\n")
    assert events == [Asked(Kind.SCAN, 1, b"/a"), Asked(Kind.SCAN, 2, b"/b")]
    assert conversation.answer(2, b"OK", b"/b") == b"2: /b: OK\n"
    conversation.finish(2, 0.0)
    assert events_of(conversation, b"zEND\0") == []
    assert not conversation.is_over
    assert conversation.answer(1, b"OK", b"/a") == b"1: /a: OK\0"
    conversation.finish(1, 0.0)
    assert conversation.is_over
    for use in (lambda: conversation.answer(1, b"OK"), lambda: conversation.finish(1, 0.0)):
        with pytest.raises(RuntimeError, match="not under way"):
            use()


def test_a_stream_that_ends_early_is_abandoned() -> None:
    conversation = begun(b"zINSTREAM\0", b"\0\0\0\5abc")
    assert events_of(conversation, b"") == [Abandoned(0)]
    assert conversation.is_over
    conversation = begun(b"zIDSESSION\0", b"zINSTREAM\0")
    assert events_of(conversation, b"\0\0\3\xe9") == [
        Abandoned(1),
        Refusal(b"1: INSTREAM size limit exceeded. ERROR\0"),
    ]


def test_a_stream_ends_with_its_answer() -> None:
    conversation = begun()
    events = events_of(conversation, b"zINSTREAM\0" + chunks(b"abc") + b"zPING\0")
    assert events == [Asked(Kind.INSTREAM, 0), Chunk(0, b"abc"), Streamed(0)]
    assert conversation.answer(0, b"OK", b"stream") == b"stream: OK\0"
    assert not conversation.is_over
    conversation.finish(0, 0.0)
    assert conversation.is_over


def test_time_runs_while_nothing_is_under_way() -> None:
    conversation = Conversation(LIMITS, 10.0)
    assert conversation.deadline == 40.0
    assert events_of(conversation, b"zIDSE", now=20.0) == []
    assert conversation.deadline == 40.0
    events_of(conversation, b"SSION\0zSCAN /a\0", now=30.0)
    assert conversation.deadline is None
    conversation.expire(1e9)
    assert rest_of(conversation) == []
    conversation.finish(1, 100.0)
    assert conversation.deadline == 220.0
    conversation.expire(219.9)
    assert rest_of(conversation) == []
    conversation.expire(220.0)
    assert rest_of(conversation) == [Refusal(b"COMMAND READ TIMED OUT\n")]
    assert conversation.is_over
    assert conversation.deadline is None


def test_a_stream_has_to_go_on_whatever_is_under_way_besides() -> None:
    conversation = begun(b"zIDSESSION\0", b"zSCAN /a\0", b"zINSTREAM\0")
    events_of(conversation, b"\0\0", now=50.0)
    assert conversation.deadline == 170.0
    conversation.expire(170.0)
    assert rest_of(conversation) == [Abandoned(2), Refusal(b"COMMAND READ TIMED OUT\n")]
    assert not conversation.is_over
    conversation.finish(1, 171.0)
    assert conversation.is_over


def test_a_plain_command_is_whole_after_a_pause() -> None:
    conversation = Conversation(Limits(plain_pause=0.25), 0.0)
    assert events_of(conversation, b"PI", now=1.0) == []
    assert conversation.deadline == 1.25
    assert events_of(conversation, b"NG", now=1.125) == []
    conversation.expire(1.25)
    assert rest_of(conversation, 1.25) == []
    conversation.expire(1.375)
    assert rest_of(conversation, 1.375) == [Reply(b"PONG\n")]


@pytest.mark.parametrize("cut", range(9))
def test_a_descriptor_comes_with_any_part_of_fildes(cut: int) -> None:
    command = b"zFILDES\0\0"
    conversation = begun(b"zIDSESSION\0")
    if cut:
        assert events_of(conversation, command[:cut], 1) == []
        assert conversation.descriptors_wanted
        events = events_of(conversation, command[cut:])
    else:
        events = events_of(conversation, b"zPING\0" + command, 1)[1:]
    assert [event for event in events if isinstance(event, Asked)] == [Asked(Kind.FILDES, 2 - bool(cut))]
    assert not conversation.descriptors_wanted


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"zPING\0", b"PROTOCOL ERROR"),
        (b"zPI", b"PROTOCOL ERROR"),
        (b"zFILDES \0", b"PROTOCOL ERROR"),
        (b"zINSTREAM\0", b"PROTOCOL ERROR"),
        (b"zFILDES\0\0zPING\0", b"No file descriptor received"),
        (b"zFILDES\0\0zFILDES\0\0", b"No file descriptor received"),
    ],
)
def test_a_descriptor_that_is_nobodys_ends_the_conversation(data: bytes, text: bytes) -> None:
    conversation = begun(b"zIDSESSION\0")
    [event] = events_of(conversation, data, 1)
    assert isinstance(event, Refusal)
    assert event.data.startswith(b"1: " + text)
    assert conversation.is_over
    assert not conversation.descriptors_wanted


def test_a_descriptor_inside_a_stream_abandons_it() -> None:
    conversation = begun(b"zINSTREAM\0", b"\0\0\0\5")
    events = events_of(conversation, b"ab", 1)
    assert [type(event) for event in events] == [Chunk, Abandoned, Refusal]


def test_several_descriptors_are_refused_before_the_command_is_whole() -> None:
    for parts in (
        [(b"zFIL", 2)],
        [(b"z", 1), (b"F", 1)],
        [(b"zFILDES\0\0", 2)],
        [(b"zFILDES\0", 1), (b"\0", 1)],
    ):
        conversation = begun()
        events = [event for data, count in parts for event in events_of(conversation, data, count)]
        assert events == [Refusal(b"FILDES: several descriptors received, one is needed. ERROR\0")], parts


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


@given(name=NAMES)
def test_a_name_forges_no_reply_and_can_be_told_from_one(name: bytes) -> None:
    conversation = begun(b"nIDSESSION\n", b"nSCAN /a\n", b"zSCAN /a\0")
    line = conversation.answer(1, b"OK", name)
    assert line.endswith(b": OK\n")
    assert not re.search(rb"[\x00-\x1f\x7f]", line[:-1])
    back = re.sub(rb"\\(x[0-9a-f]{2}|\\)", _unescaped, line[3:-5])
    assert back == name
    assert conversation.answer(2, b"OK", name) == b"2: " + name + b": OK\0"


def _unescaped(match: re.Match[bytes]) -> bytes:
    return b"\\" if match[1] == b"\\" else bytes.fromhex(match[1][1:].decode())


def test_what_is_plain_is_not_escaped() -> None:
    assert escaped("/srv/Grüße (1).txt".encode()) == "/srv/Grüße (1).txt".encode()


def test_every_verdict_is_said_and_no_error_is_ok() -> None:
    assert said(Clean()) == [b"OK"]
    assert said(Infected("A", ("B",))) == [b"A FOUND", b"B FOUND"]
    for reason in Reason:
        for text in ("", "a text", "a text."):
            [line] = said(Error(reason, text))
            assert re.fullmatch(rb"[ -~]+ ERROR", line), line
    assert said(Error(Reason.DENIED, "denied by the policy")) == [b"Access denied. ERROR"]


def test_with_the_switch_a_limit_passes_or_is_found_as_by_clamd() -> None:
    passing = {reason for reason in Reason if said(Error(reason, ""), "ok") == [b"OK"]}
    found = {reason: said(Error(reason, ""), "found")[0] for reason in Reason}
    assert {reason: name for reason, name in found.items() if name.endswith(b" FOUND")} == {
        Reason.TOO_LARGE: b"Heuristics.Limits.Exceeded FOUND",
        Reason.LIMIT_EXCEEDED: b"Heuristics.Limits.Exceeded FOUND",
        Reason.UNSCANNABLE_ENCRYPTED: b"Heuristics.Encrypted FOUND",
        Reason.UNSCANNABLE_CONTAINER: b"Heuristics.Unscannable FOUND",
    }
    assert passing == {reason for reason, name in found.items() if name.endswith(b" FOUND")}
    assert said(Clean(), "found") == [b"OK"]
