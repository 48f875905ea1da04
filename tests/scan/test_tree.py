from __future__ import annotations

import asyncio
import errno
import os
import stat
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.client import (
    BrokerError,
    BrokerTimeoutError,
    DeniedError,
    FileStat,
    ListEntry,
    NotDirectoryError,
    Reason,
    TooManyFilesError,
    UnavailableError,
)
from fdbroker.scan.service.opening import ExclusionsOnTheWay
from fdbroker.scan.tree import EXCLUDED, Exclusions, File, NotAFile, Unlisted, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fdbroker.client import Client

    Table = Mapping[bytes, Sequence[ListEntry | BrokerError] | BrokerError]

DIRECTORY, REGULAR, UNKNOWN = 4, 8, 0
DENIED = DeniedError(errno.EACCES, "no", None, Reason.DENIED)
NOT_DIRECTORY = NotDirectoryError(errno.ENOTDIR, "no", None, Reason.NOT_DIRECTORY)


class FakeClient:
    """Lists from a table: path -> entries, or an error at the beginning or the end."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def list(self, path: bytes) -> Iterator[ListEntry]:
        answer = self._table[path]
        if isinstance(answer, BrokerError):
            raise answer
        for entry in answer:
            if isinstance(entry, BrokerError):
                raise entry
            yield entry


def entry(name: bytes, kind: int, mode: int | None = None) -> ListEntry:
    facts = None if mode is None else FileStat(1, 1, mode, 1, 0, 0, 0, 0, 0)
    return ListEntry(name, kind, facts)


def found(table: Table, *starts: bytes) -> list[File | NotAFile | Unlisted]:
    return list(walk(cast("Client", FakeClient(table)), starts))


def test_deep_tree_needs_no_stack() -> None:
    depth = 5_000
    paths = [b"/t" + b"/d" * level for level in range(depth + 1)]
    table = {path: [entry(b"d", DIRECTORY)] for path in paths[:-1]}
    table[paths[-1]] = [entry(b"f", REGULAR)]
    assert found(table, b"/t") == [File(paths[-1] + b"/f")]


def test_each_kind_is_told_apart() -> None:
    kinds = {b"fifo": 1, b"character device": 2, b"block device": 6, b"symbolic link": 10, b"socket": 12}
    table: Table = {b"/t": [entry(name, kind) for name, kind in kinds.items()] + [entry(b"odd", 14)]}
    assert found(table, b"/t") == [
        *(NotAFile(b"/t/" + name, name.decode()) for name in kinds),
        NotAFile(b"/t/odd", "of an unknown kind"),
    ]


def test_stat_record_has_the_say_over_the_type_of_the_entry() -> None:
    table: Table = {
        b"/t": [
            entry(b"fifo", REGULAR, stat.S_IFIFO),
            entry(b"file", UNKNOWN, stat.S_IFREG),
            entry(b"dir", UNKNOWN, stat.S_IFDIR),
        ],
        b"/t/dir": [entry(b"inside", REGULAR)],
    }
    assert found(table, b"/t") == [NotAFile(b"/t/fifo", "fifo"), File(b"/t/file"), File(b"/t/dir/inside")]


def test_entry_of_unknown_type_is_tried_as_a_directory_and_may_be_a_file() -> None:
    table: Table = {
        b"/t": [entry(b"a", UNKNOWN), entry(b"b", UNKNOWN), entry(b"c", UNKNOWN)],
        b"/t/a": NOT_DIRECTORY,
        b"/t/b": DENIED,
        b"/t/c": [entry(b"d", REGULAR)],
    }
    assert set(found(table, b"/t")) == {File(b"/t/a"), File(b"/t/b", DENIED), File(b"/t/c/d")}


def test_start_may_be_a_file_a_directory_or_what_can_only_be_opened() -> None:
    table: Table = {
        b"/file": NOT_DIRECTORY,
        b"/denied": DENIED,
        b"/": [entry(b"x", REGULAR)],
    }
    assert found(table, b"/file", b"/denied", b"/") == [File(b"/file"), File(b"/denied", DENIED), File(b"/x")]


def test_directory_that_can_not_be_listed_is_told_and_the_others_are_listed() -> None:
    table: Table = {
        b"/t": [entry(b"no", DIRECTORY), entry(b"half", DIRECTORY), entry(b"yes", DIRECTORY)],
        b"/t/no": DENIED,
        b"/t/half": [entry(b"first", REGULAR), DENIED],
        b"/t/yes": [entry(b"last", REGULAR)],
    }
    assert set(found(table, b"/t")) == {
        Unlisted(b"/t/no", DENIED),
        File(b"/t/half/first"),
        Unlisted(b"/t/half", DENIED),
        File(b"/t/yes/last"),
    }


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError(errno.ECONNREFUSED, "gone", b"/socket"),
        BrokerTimeoutError(errno.ETIMEDOUT, "late"),
        TooManyFilesError(errno.EMFILE, "full"),
    ],
)
def test_broker_that_is_gone_is_not_an_error_of_a_directory(error: BrokerError) -> None:
    with pytest.raises(type(error), match=os.fsdecode(error.strerror or "")):
        found({b"/t": [entry(b"f", REGULAR), error]}, b"/t")


@pytest.mark.parametrize(
    ("globs", "left_out"),
    [
        ([b"*.iso"], {b"/top/a.iso", b"/top/sub/b.iso"}),
        ([b"/top/*.iso"], {b"/top/a.iso"}),
        ([b"sub"], {b"/top/sub"}),
        ([b"/top/sub/**"], {b"/top/sub"}),
        ([b"/top"], set()),
        ([b"sub/b.iso", b"c"], {b"/top/sub/b.iso", b"/top/c"}),
        ([], set()),
    ],
)
def test_what_is_excluded_is_told_and_not_entered(globs: list[bytes], left_out: set[bytes]) -> None:
    listed: list[bytes] = []

    class Listing(FakeClient):
        def list(self, path: bytes) -> Iterator[ListEntry]:
            listed.append(path)
            return super().list(path)

    table: Table = {
        b"/top": [entry(b"a.iso", REGULAR), entry(b"c", REGULAR), entry(b"sub", DIRECTORY)],
        b"/top/sub": [entry(b"b.iso", REGULAR), entry(b"d", REGULAR)],
    }
    found = list(walk(cast("Client", Listing(table)), [b"/top"], Exclusions(globs)))
    assert {one.path for one in found if one == NotAFile(one.path, EXCLUDED)} == left_out
    assert (b"/top/sub" in listed) == (b"/top/sub" not in left_out)
    every = {b"/top/a.iso", b"/top/c", b"/top/sub/b.iso", b"/top/sub/d"}
    below = {path for path in every if any(path.startswith(out) for out in left_out)}
    assert {one.path for one in found if isinstance(one, File)} == every - below


def test_a_wrong_glob_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[a-: "):
        Exclusions([b"[a-"])


_NAMES_OF_FEW = st.lists(st.sampled_from([b"a", b"b", b"ab"]), min_size=1, max_size=5)


@given(
    st.lists(st.sampled_from([b"a", b"*", b"/t/**/b", b"**", b"a/b", b"/t/a*", b"b/**/ab"]), max_size=3),
    st.lists(_NAMES_OF_FEW, max_size=12),
)
def test_exclusions_on_the_way_say_of_each_path_what_the_globs_say_of_it_and_its_directories(
    globs: list[bytes], below: list[list[bytes]]
) -> None:
    exclusions = Exclusions(globs)
    way = ExclusionsOnTheWay(exclusions, b"/t/")

    async def ask() -> None:
        for names in below:
            path = b"/t/" + b"/".join(names)
            parts = [b"/t/" + b"/".join(names[: count + 1]) for count in range(len(names))]
            wanted = next((part for part in parts if exclusions.have(part)), None)
            assert await way.excluded(path) == wanted

    asyncio.run(ask())
