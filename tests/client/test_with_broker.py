"""Both clients with a real broker: walks and restarts, with nothing between them but the kernel."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from fdbroker import Incomplete, MissingError, WalkInterrupted, WalkKind, aio, connect
from tests.running_broker import policy, reachable_directory, rule, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

COUNT = 400


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as made:
        tree = made / "tree"
        for number in range(COUNT):
            (tree / f"{number // 40}").mkdir(parents=True, exist_ok=True)
            (tree / f"{number // 40}" / f"{number % 40}").write_bytes(b"x" * number)
        yield made


def test_a_walk_passes_every_file_and_says_so(directory: Path) -> None:
    tree = directory / "tree"
    with running_broker(directory, policy(tree)) as broker, connect(broker.socket) as client:
        with client.walk(tree) as walk:
            seen = {}
            for entry in walk:
                with entry, entry.file as file:
                    content = file.read()
                seen[entry.relative] = content
                assert entry.stat.size == len(content)
        assert seen == {f"{number // 40}/{number % 40}": b"x" * number for number in range(COUNT)}
        assert walk.end == (COUNT, COUNT, 11, 0)

        async def main() -> None:
            async with await aio.connect(broker.socket) as other:
                kinds = WalkKind.REGULAR | WalkKind.DIRECTORY
                async with other.walk(tree, kinds=kinds, globs=["3", "3/*"], descriptors=False) as some:
                    names = {str(entry.relative) async for entry in some}
                assert names == {"3", *(f"3/{number}" for number in range(40))}
                async with other.walk(tree, batch=3) as left:
                    (await anext(left)).close()
                assert (await other.status())["generation"]
                with pytest.raises(MissingError):
                    await anext(other.walk(f"{tree}/absent"))

        asyncio.run(main())


def test_a_walk_goes_on_with_the_broker_that_comes_back(directory: Path) -> None:
    tree = directory / "tree"
    with running_broker(directory, policy(tree), stop=False) as first:
        client = connect(first.socket)
        walk = client.walk(tree, batch=5, ahead=1)
        names = []
        for _ in range(123):
            with next(walk) as entry:
                names.append(entry.relative)
        first.process.kill()
    with client, walk, running_broker(directory, policy(tree)):
        for entry in walk:
            with entry:
                assert os.fstat(entry.descriptor).st_size == entry.stat.size
            names.append(entry.relative)
        assert len(names) == len(set(names)) == COUNT
        assert walk.resumed == 1
        assert walk.end is not None
        assert (walk.end.entries, walk.end.incomplete) == (COUNT, Incomplete.FAILED)


def test_a_walk_whose_place_is_gone_when_the_broker_comes_back_is_interrupted(directory: Path) -> None:
    tree = directory / "tree"
    gone = tree / "zz"
    gone.mkdir()
    for number in range(30):
        (gone / str(number)).touch()
    with running_broker(directory, policy(tree, rule("all")), stop=False) as first:
        client = connect(first.socket)
        walk = client.walk(gone, batch=5, ahead=1)
        for _ in range(5):
            next(walk).close()
        last = os.fsdecode(walk.last)
        first.process.kill()
    (gone / last).unlink()
    with client, walk, running_broker(directory, policy(tree)):
        with pytest.raises(WalkInterrupted) as caught:
            next(walk)
        assert (caught.value.last, caught.value.entries) == (last.encode(), 5)
        assert isinstance(caught.value.__cause__, MissingError)
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
