"""What clients stream and is kept: counted to the byte, shared by users, no reason to wait for ever."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.scan.service.memory import Kept, Memory
from fdbroker.scan.service.streams import Stream

TOTAL = 1000


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 400))))
def test_there_is_never_more_than_there_may_be_but_for_one_of_each_user(
    steps: list[tuple[int, int, int]],
) -> None:
    memory = Memory(TOTAL)
    files: dict[int, list[Kept]] = {}
    for user, step, size in steps:
        mine = files.setdefault(user, [])
        growing = [one for one in mine if not one.whole]
        if step == 0:
            mine.append(memory.keep(user, lambda: None))
        elif step == 1 and mine:
            mine.pop(size % len(mine)).let_go()
        elif step == 2 and growing:
            growing[0].end()
        elif growing:
            one = growing[size % len(growing)]
            before = sum(kept.size for kept in mine)
            if one.may_grow(size):
                share = TOTAL // (1 + sum(map(bool, files.values())))
                room = memory.used + size <= TOTAL and before + size <= share
                assert one is growing[0] or room
                one.grow(size)
        # Of each user one may go on, whatever all have.
        assert all(
            next(one for one in kept if not one.whole).may_grow(TOTAL)
            for kept in files.values()
            if not all(one.whole for one in kept)
        )
        assert memory.used == sum(one.size for kept in files.values() for one in kept)


def test_who_waits_for_room_hears_of_it_once() -> None:
    memory = Memory(TOTAL)
    heard: list[str] = []
    first = memory.keep(1, lambda: heard.append("first"))
    second = memory.keep(1, lambda: heard.append("second"))
    first.grow(450)
    assert not second.may_grow(100)
    memory.keep(2, lambda: heard.append("other")).let_go()
    assert heard == []
    first.end()
    assert heard == ["second"]
    first.let_go()
    first.let_go()
    second.let_go()
    assert (memory.used, heard) == (0, ["second"])


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 1 << 20])
def test_a_stream_is_what_came_and_nobody_can_change_it(size: int) -> None:
    memory = Memory(TOTAL)
    content = os.urandom(size)
    stream = Stream(1, memory.keep(1, lambda: None))
    for at in range(0, size, 10_000):
        stream.add(content[at : at + 10_000])
    descriptor = stream.whole()
    assert isinstance(descriptor, int)
    try:
        assert os.read(descriptor, size + 1) == content
        for change in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, size + 1)):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(descriptor)
    assert memory.used == size
    stream.kept.let_go()
    assert memory.used == 0
