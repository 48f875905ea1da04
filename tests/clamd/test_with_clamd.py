"""The same conversations with a real clamd and with the scan service."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.clamd.replacing import instead_of_clamd
from tests.clamd.speaking import Passed, Step, converse
from tests.clamd.talks import SLOW_TALKS, TALKS, Talk
from tests.running_broker import reachable_directory
from tests.scan.clamav import running_clamd

if TYPE_CHECKING:
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root


def said(socket_path: Path, talk: Talk, tree: Path) -> bytes:
    """Return what was said in a conversation, with what is never the same taken out."""
    root = bytes(tree)

    def placed(step: Step) -> Step:
        if isinstance(step, bytes):
            return step.replace(b"/T", root)
        if isinstance(step, Passed):
            return step._replace(
                files=tuple((name.replace(b"/T", root), flags) for name, flags in step.files)
            )
        return step

    answer = converse(socket_path, tuple(placed(step) for step in talk.steps)).replace(root, b"/T")
    answer = re.sub(rb"fd\[\d+\]", b"fd[N]", answer)
    if b"POOLS" in answer:
        # Of each thread, what it does; and numbers.
        answer = re.sub(rb"\t.*\n", b"", answer)
        answer = re.sub(rb"(?<=[ :])(\d+(\.\d+)?M?|N/A)(?=[\s\0])", b"N", answer)
    if talk.any_order:
        answer = b"".join(sorted(answer.splitlines(keepends=True) if b"\n" in answer else _frames(answer)))
    return answer


def _frames(answer: bytes) -> list[bytes]:
    return [frame + b"\0" for frame in answer.split(b"\0")[:-1]]


@pytest.mark.parametrize("talk", [talk for talk in TALKS if not talk.differs], ids=lambda talk: talk.name)
def test_the_same_is_said(talk: Talk, clamd: Path, ours: Path, tree: Path) -> None:
    assert said(ours, talk, tree) == said(clamd, talk, tree)


@pytest.mark.parametrize("talk", [talk for talk in TALKS if talk.differs], ids=lambda talk: talk.name)
def test_the_differences_are_those_that_are_meant(talk: Talk, clamd: Path, ours: Path, tree: Path) -> None:
    assert talk.differs is not None
    assert talk.differs.clamd != talk.differs.ours
    assert said(ours, talk, tree) == talk.differs.ours
    if talk.differs.clamd is not None:
        assert said(clamd, talk, tree) == talk.differs.clamd


def test_the_same_is_said_to_those_who_say_nothing(
    others: ForOtherUsers, tmp_path: Path, database: Path, tree: Path
) -> None:
    listener, more = ", command_timeout: 1s, read_timeout: 1s", "may_stop: {user: ['0']}\n"
    with (
        reachable_directory() as directory,
        instead_of_clamd(others, directory, tree, database, listener=listener, more=more) as scand,
        running_clamd(tmp_path, database, "CommandReadTimeout 1", "ReadTimeout 1") as clamd,
    ):
        with ThreadPoolExecutor(2 * len(SLOW_TALKS)) as pool:
            both = [
                [pool.submit(said, socket_path, talk, tree) for socket_path in (scand.clamd, clamd)]
                for talk in SLOW_TALKS
            ]
        for talk, (answer, expected) in zip(SLOW_TALKS, both, strict=True):
            assert answer.result() == expected.result(), talk.name
        # It stops.
        assert converse(scand.clamd, (b"nQUIT\n",)) == converse(clamd, (b"nQUIT\n",)) == b""
        scand.stopped = True
        assert scand.process.wait(timeout=20) == 0
