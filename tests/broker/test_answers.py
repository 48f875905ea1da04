"""One path, one answer: every reason there is, what the client is told and what the audit says."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker import judging, listing, opening, outcomes
from fdbroker.broker.roots import HeldRoot, objection_to_filesystem
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.files import FilesystemFacts, open_path_beneath, read_directory
from fdbroker.wire.client import ListReply, encode_list, encode_open
from fdbroker.wire.format import MAX_REPLY, Kind, Reason, Status
from fdbroker.wire.messages import ErrorReply
from tests.broker.speaking import check_audit, path_of
from tests.broker.stepping import SteppedBroker
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

UID = os.getuid()
ELSEWHERE = UID + 1  # somebody who is not us
TOO_LATE = 9_300_000_000 * 1_000_000_000  # nanoseconds since 1970, more than 63 bits


def reason_in_audit(broker: SteppedBroker) -> str:
    """Return the reason of the last decision."""
    return broker.reasons()[-1]


def test_allowed_file_is_given_open_for_reading_and_at_its_beginning(stepped: SteppedBroker) -> None:
    speaker = stepped.join()
    answer = speaker.ask(speak_open(stepped.tree / "file"))
    with answer.descriptors as descriptors:
        [number] = descriptors.numbers()
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert not flags & (os.O_NONBLOCK | os.O_PATH | os.O_APPEND)
        assert os.lseek(number, 0, os.SEEK_CUR) == 0
        assert os.read(number, 100) == b"content"
    [record] = [record for record in stepped.records() if "decision" in record]
    assert record["decision"] == "allow"
    assert record["reason"] == "ok"
    assert record["rule"] == "all"
    assert record["uid"] == UID
    assert record["pid"] == os.getpid()
    assert path_of(record) == bytes(stepped.tree / "file")


def speak_open(*paths: Path) -> bytes:
    return encode_open(3, [bytes(path) for path in paths])


def test_same_file_twice_is_two_open_file_descriptions(stepped: SteppedBroker) -> None:
    answer = stepped.join().ask(speak_open(stepped.tree / "file", stepped.tree / "file"))
    with answer.descriptors as descriptors:
        one, other = descriptors.numbers()
        assert os.read(one, 3) == b"con"
        assert os.read(other, 100) == b"content"


def test_descriptors_come_in_the_order_of_the_paths_that_are_given(stepped: SteppedBroker) -> None:
    for number in range(10):
        (stepped.tree / f"n{number}").write_text(str(number))
    asked = [bytes(stepped.tree / name) for name in ("n3", "missing", "n1", "fifo", "n9", "n1")]
    opened = stepped.join().open(*asked)
    assert [entry.content for entry in opened] == [b"3", None, b"1", None, b"9", b"1"]
    assert [entry.reason for entry in opened] == ["ok", "not_found", "ok", "not_regular", "ok", "ok"]


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda _path: None,
    "a directory": lambda path: path.mkdir(),
    "a fifo": os.mkfifo,
    "a socket": unix_socket,
    "a link": lambda path: path.symlink_to("file"),
    "a link to nothing": lambda path: path.symlink_to("missing"),
    "a link out of the root": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a directory": lambda path: path.symlink_to("directory"),
}


@pytest.mark.parametrize(
    ("made", "below", "reason", "number", "audited"),
    [
        ("nothing", b"", "not_found", errno.ENOENT, "not_found"),
        ("nothing", b"/x", "not_found", errno.ENOENT, "not_found"),
        ("a directory", b"", "not_regular", errno.EISDIR, "is_directory"),
        ("a fifo", b"", "not_regular", errno.EINVAL, "not_regular"),
        ("a fifo", b"/x", "not_directory", errno.ENOTDIR, "not_directory"),
        ("a socket", b"", "not_regular", errno.EINVAL, "not_regular"),
        ("a link", b"", "symlink", errno.ELOOP, "symlink"),
        ("a link to nothing", b"", "symlink", errno.ELOOP, "symlink"),
        ("a link out of the root", b"", "symlink", errno.ELOOP, "symlink"),
        ("a link to a directory", b"", "symlink", errno.ELOOP, "symlink"),
        ("a link to a directory", b"/inner", "symlink", errno.ELOOP, "symlink"),
    ],
)
def test_what_is_no_regular_file_is_not_opened(
    stepped: SteppedBroker, made: str, below: bytes, reason: str, number: int, audited: str
) -> None:
    MAKERS[made](stepped.tree / "object")
    speaker = stepped.join()
    opened = speaker.open_one(bytes(stepped.tree / "object") + below)
    assert opened == (reason, number, None)
    assert reason_in_audit(stepped) == audited


@pytest.mark.root
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_device_is_not_opened(stepped: SteppedBroker, kind: int) -> None:
    os.mknod(stepped.tree / "device", kind | 0o666, os.makedev(1, 3))
    assert stepped.join().open_one(bytes(stepped.tree / "device"))[:2] == ("not_regular", errno.EINVAL)


@pytest.mark.parametrize(
    ("path", "number", "audited"),
    [
        (b"", errno.EINVAL, "empty"),
        (b"file", errno.EINVAL, "relative"),
        (b"../file", errno.EINVAL, "relative"),
        (b"%s/", errno.EINVAL, "trailing_slash"),
        (b"%s/file/", errno.EINVAL, "trailing_slash"),
        (b"/%s/file", errno.EINVAL, "empty_component"),
        (b"%s//file", errno.EINVAL, "empty_component"),
        (b"%s/./file", errno.EINVAL, "dot_component"),
        (b"%s/.", errno.EINVAL, "dot_component"),
        (b"%s/directory/../file", errno.EINVAL, "dot_component"),
        (b"%s/..", errno.EINVAL, "dot_component"),
        (b"%s/" + b"n" * 256, errno.ENAMETOOLONG, "name_too_long"),
        (b"%s/" + b"n" * 256 + b"/x", errno.ENAMETOOLONG, "name_too_long"),
        (b"%s" + b"/x" * 2048, errno.ENAMETOOLONG, "path_too_long"),
        (b"/" * 4096, errno.ENAMETOOLONG, "path_too_long"),
        (b"x" * 60000, errno.ENAMETOOLONG, "path_too_long"),
    ],
)
@pytest.mark.parametrize("action", ["open", "stat", "list"])
def test_impossible_path_is_refused_before_any_rule_is_read(
    stepped: SteppedBroker, action: str, path: bytes, number: int, audited: str
) -> None:
    path = path.replace(b"%s", bytes(stepped.tree))
    speaker = stepped.join()
    if action == "open":
        assert speaker.open_one(path) == ("path_invalid", number, None)
    else:
        result = speaker.stat(path).results[0][0] if action == "stat" else speaker.page(path).result
        assert (result.status, result.reason, result.errno) == (Status.REFUSED, Reason.PATH_INVALID, number)
    record = stepped.records()[-1]
    assert (record["event"], record["reason"], record["rule"]) == (action, audited, None)
    # What is too long to be a path is recorded by its beginning and its length.
    assert path_of(record) == path[:4096]
    assert record.get("path_length", len(path)) == len(path)


def test_one_bad_path_spoils_only_itself(stepped: SteppedBroker) -> None:
    file = bytes(stepped.tree / "file")
    opened = stepped.join().open(file, b"", b"relative", file, b"/", file + b"/", file)
    assert [entry.reason for entry in opened] == [
        "ok", "path_invalid", "path_invalid", "ok", "denied", "path_invalid", "ok",
    ]  # fmt: skip


def test_longest_name_and_longest_path_are_served(stepped: SteppedBroker) -> None:
    (stepped.tree / ("n" * 255)).write_bytes(b"long name")
    speaker = stepped.join()
    assert speaker.open_one(bytes(stepped.tree) + b"/" + b"n" * 255).content == b"long name"
    room = 4095 - len(bytes(stepped.tree))
    parts = [b"d" * 200] * ((room - 2) // 201)
    last = b"f" * (room - 201 * len(parts) - 1)
    below = os.open(stepped.tree, os.O_RDONLY)
    for part in parts:
        os.mkdir(part, dir_fd=below)
        deeper = os.open(part, os.O_RDONLY, dir_fd=below)
        os.close(below)
        below = deeper
    with open(os.open(last, os.O_WRONLY | os.O_CREAT, dir_fd=below), "wb") as file:
        file.write(b"long path")
    os.close(below)
    path = b"/".join([bytes(stepped.tree), *parts, last])
    assert len(path) == 4095
    assert speaker.open_one(path).content == b"long path"
    assert speaker.open_one(path + b"f")[:2] == ("path_invalid", errno.ENAMETOOLONG)


def test_outside_the_roots_what_exists_and_what_does_not_is_one_answer(stepped: SteppedBroker) -> None:
    speaker = stepped.join()
    for path in (b"/etc/passwd", b"/etc/missing", b"/missing/x", b"/", b"/proc/self/mem", b"/dev/null"):
        assert speaker.open_one(path) == ("denied", errno.EACCES, None)
        assert reason_in_audit(stepped) == "outside_roots"


def test_outside_the_patterns_what_exists_and_what_does_not_is_one_answer(tree: Path, tmp_path: Path) -> None:
    compiled = policy(tree, rule("some", paths=["allowed/**"]))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        for name in ("file", "missing", "directory/inner", "file/x", "link/x", "fifo"):
            assert speaker.open_one(bytes(tree / name)) == ("denied", errno.EACCES, None)
            assert reason_in_audit(broker) == "no_rule"


def test_denied_by_a_rule_is_recorded_with_its_name(tree: Path, tmp_path: Path) -> None:
    compiled = policy(tree, rule("all"), rule("never", effect="deny", paths=["file"]))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        assert broker.join().open_one(bytes(tree / "file")) == ("denied", errno.EACCES, None)
        assert broker.records()[-1]["rule"] == "never"
        assert reason_in_audit(broker) == "deny_rule"


@pytest.mark.parametrize(
    ("name", "where", "audited"),
    [
        ("file", {"owner": {"uids": [ELSEWHERE], "client": False, "on_behalf_of": False}}, "where_owner"),
        ("file", {"size": {"max": 3}}, "where_size"),
        ("file", {"links": {"min": 2}}, "where_links"),
        ("file", {"mode": {"all": 0o7000}}, "where_mode"),
        ("file", {"group": {"gids": [ELSEWHERE]}}, "where_group"),
        ("missing", {"size": {"max": 3}}, "not_found"),
        ("file/x", {"size": {"max": 3}}, "not_directory"),
        ("link", {"size": {"max": 3}}, "symlink"),
        ("link/x", {"size": {"max": 3}}, "symlink"),
        ("directory", {"size": {"max": 3}}, "is_directory"),
        ("fifo", {"size": {"max": 3}}, "not_regular"),
    ],
)
def test_with_a_condition_every_refusal_is_one_answer_and_the_audit_has_the_reason(
    tree: Path, tmp_path: Path, name: str, where: dict[str, Any], audited: str
) -> None:
    with SteppedBroker(tree, policy(tree, rule("some", where=where)), audit=tmp_path / "audit") as broker:
        assert broker.join().open_one(bytes(tree / name)) == ("denied", errno.EACCES, None)
        assert reason_in_audit(broker) == audited
        assert broker.records()[-1]["rule"] == "some"


def test_condition_that_is_met_gives_the_file(tree: Path, tmp_path: Path) -> None:
    where = {
        "owner": {"uids": [], "client": True, "on_behalf_of": False},
        "group": {"gids": [(tree / "file").stat().st_gid]},
        "size": {"min": 7, "max": 7},
        "links": {"max": 1},
    }
    with SteppedBroker(tree, policy(tree, rule("mine", where=where)), audit=tmp_path / "audit") as broker:
        assert broker.join().open_one(bytes(tree / "file")).content == b"content"
        os.link(tree / "file", tree / "second")
        assert broker.join().open_one(bytes(tree / "file")).reason == "denied"
        assert reason_in_audit(broker) == "where_links"


def test_file_that_lost_its_name_is_not_given_where_links_are_counted(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lookup and the look at it, its name is removed and another stays: one link, not ours."""
    look = os.fstat
    os.link(tree / "file", tmp_path / "elsewhere")

    def remove_first(descriptor: int) -> os.stat_result:
        (tree / "file").unlink(missing_ok=True)
        return look(descriptor)

    compiled = policy(tree, rule("single", where={"links": {"max": 1}}))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        monkeypatch.setattr(os, "fstat", remove_first)
        assert speaker.open_one(bytes(tree / "file")) == ("denied", errno.EACCES, None)
        monkeypatch.undo()
        assert reason_in_audit(broker) == "lost_its_name"


def test_file_under_a_lease_is_busy_at_once(stepped: SteppedBroker, request: pytest.FixtureRequest) -> None:
    # The holder of a lease that is asked for gets a signal that would end it.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGIO, before))
    with open(stepped.tree / "file", "rb") as holder:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        assert stepped.join().open_one(bytes(stepped.tree / "file")).content == b"content"
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert stepped.join().open_one(bytes(stepped.tree / "file")) == ("busy", errno.EAGAIN, None)
        assert reason_in_audit(stepped) == "busy"
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    assert stepped.join().open_one(bytes(stepped.tree / "file")).content == b"content"


FAILURES = [
    (errno.EMFILE, "broken", errno.EMFILE, "EMFILE"),
    (errno.ENFILE, "broken", errno.ENFILE, "ENFILE"),
    (errno.ENOMEM, "broken", errno.ENOMEM, "ENOMEM"),
    (errno.EIO, "broken", errno.EIO, "EIO"),
    (errno.ENXIO, "broken", errno.ENXIO, "ENXIO"),
    (errno.EXDEV, "crosses_mount", errno.EXDEV, "crosses_mount"),
    (errno.EAGAIN, "busy", errno.EAGAIN, "busy"),
    (errno.EACCES, "denied", errno.EACCES, "kernel_denied"),
    (errno.EPERM, "denied", errno.EACCES, "kernel_denied"),
    (errno.ENAMETOOLONG, "path_invalid", errno.ENAMETOOLONG, "path_too_long"),
    (7777, "broken", 7777, "unknown"),
]


@pytest.mark.parametrize(("number", "reason", "told", "audited"), FAILURES)
def test_every_failure_to_open_is_a_refusal_that_is_recorded(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch, number: int, reason: str, told: int, audited: str
) -> None:
    def fail(*_arguments: object, **_more: object) -> int:
        raise SyscallError(number, "openat2")

    speaker = stepped.join()
    monkeypatch.setattr(opening, "open_regular_beneath", fail)
    opened = speaker.open_one(bytes(stepped.tree / "file"))
    assert opened == (reason, told, None)
    assert reason_in_audit(stepped) == audited


@pytest.mark.parametrize("number", [errno.EIO, errno.EXDEV, errno.EACCES, errno.ENOENT, 7777])
@pytest.mark.parametrize(
    ("module", "call"),
    [(judging, "open_path_beneath"), (opening, "reopen_for_reading")],
    ids=["find", "reopen"],
)
def test_failing_call_under_a_condition_tells_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: str, number: int
) -> None:
    def fail(*_arguments: object, **_more: object) -> int:
        raise OSError(number, "it failed")

    compiled = policy(tree, rule("some", where={"size": {"min": 0}}))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        monkeypatch.setattr(module, call, fail)
        assert speaker.open_one(bytes(tree / "file")) == ("denied", errno.EACCES, None)
        assert reason_in_audit(broker) not in {"denied", "ok"}


def test_error_without_a_number_is_a_refusal_as_well(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_more: object) -> int:
        raise OSError

    speaker = stepped.join()
    monkeypatch.setattr(opening, "open_regular_beneath", fail)
    assert speaker.open_one(bytes(stepped.tree / "file")) == ("broken", errno.EIO, None)


@pytest.mark.parametrize(
    ("module", "call"),
    [(judging, "open_path_beneath"), (listing, "reopen_for_reading"), (listing, "read_directory")],
    ids=["find", "reopen", "read"],
)
def test_failing_call_in_a_list_is_a_refusal_that_is_recorded(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: str
) -> None:
    def fail(*_arguments: object, **_more: object) -> int:
        raise SyscallError(errno.EIO, call)

    speaker = stepped.join()
    monkeypatch.setattr(module, call, fail)
    page = speaker.page(bytes(stepped.tree))
    assert (page.result.reason, page.result.errno, page.entries) == (Reason.BROKEN, errno.EIO, [])
    assert reason_in_audit(stepped) == "EIO"


# stat


def test_stat_describes_every_kind_of_object_and_links_themselves(stepped: SteppedBroker) -> None:
    names = ["file", "empty", "directory", "link", "fifo", "."]
    paths = [stepped.tree / name for name in names]
    reply = stepped.join().stat(*(bytes(path) for path in paths))
    for path, (result, facts) in zip(paths, reply.results, strict=True):
        there = path.lstat()
        assert result.status == Status.GIVEN
        assert facts == (
            there.st_dev, there.st_ino, there.st_mode, there.st_nlink, there.st_uid, there.st_gid,
            there.st_size, there.st_mtime_ns, there.st_ctime_ns,
        )  # fmt: skip


def test_a_file_of_the_year_2264_is_described_and_listed_as_others_are(
    stepped: SteppedBroker,
) -> None:
    # Its owner may say so, and is not to end the connections of those who look at it.
    for name in ("file", "."):
        os.utime(stepped.tree / name, ns=(0, TOO_LATE))
    speaker = stepped.join()
    [(_, facts)] = speaker.stat(bytes(stepped.tree / "file")).results
    assert facts is not None
    assert facts.mtime_ns == TOO_LATE
    assert b"file" in speaker.list_all(bytes(stepped.tree))


def test_stat_of_nothing_and_of_what_is_denied(tree: Path, tmp_path: Path) -> None:
    compiled = policy(
        tree,
        rule("some", paths=["file", "missing", "link/**"]),
        rule("mine", paths=["empty", "gone"], where={"size": {"min": 1}}),
    )
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        names = ["file", "missing", "link/x", "directory", "empty", "gone"]
        reply = broker.join().stat(*(bytes(tree / name) for name in names))
        told = [(result.reason.name.lower(), facts is not None) for result, facts in reply.results]
        assert told == [
            ("none", True), ("not_found", False), ("symlink", False), ("denied", False), ("denied", False),
            ("denied", False),
        ]  # fmt: skip
        assert broker.reasons() == ["ok", "not_found", "symlink", "no_rule", "where_size", "not_found"]


def test_stat_that_can_not_look_says_so(stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> os.stat_result:
        raise OSError(errno.EIO, "the disk is gone")

    speaker = stepped.join()
    monkeypatch.setattr(os, "fstat", fail)
    reply = speaker.stat(bytes(stepped.tree / "file"))
    monkeypatch.undo()
    [(result, facts)] = reply.results
    assert (result.status, result.errno, facts) == (Status.BROKEN, errno.EIO, None)


# list


@pytest.mark.parametrize("most", [0, 1, 2, 7, 1024])
def test_list_names_everything_once_page_by_page(stepped: SteppedBroker, most: int) -> None:
    directory = stepped.tree / "many"
    directory.mkdir()
    names = {b"%d-" % number + b"x" * (number % 200) for number in range(1000 if most != 1 else 60)}
    for name in names:
        os.close(os.open(bytes(directory) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    listed = stepped.join().list_all(bytes(directory), most)
    assert len(listed) == len(names)
    assert set(listed) == names
    assert sum(record["entries"] for record in stepped.records() if "decision" in record) == len(names)


def test_list_of_the_longest_names_fits_into_replies(stepped: SteppedBroker) -> None:
    directory = stepped.tree / "long"
    directory.mkdir()
    names = {b"%04d" % number + b"x" * 251 for number in range(300)}
    for name in names:
        os.close(os.open(bytes(directory) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    speaker = stepped.join()
    listed: list[bytes] = []
    cookie = 0
    while True:
        answer = speaker.ask(encode_list(1, bytes(directory), cookie))
        assert len(answer.raw) <= MAX_REPLY
        page = answer.reply
        assert isinstance(page, ListReply)
        listed += [entry.name for entry in page.entries]
        if page.last:
            break
        cookie = page.cookie
    assert sorted(listed) == sorted(names)


def many_names(directory: Path) -> set[bytes]:
    """Make a directory that fits one chunk, in which one name of five is `seen-...`; return these."""
    directory.mkdir()
    for number in range(100):
        (directory / (f"hidden-{number}" if number % 5 else f"seen-{number}")).touch()
    return {name.encode() for name in os.listdir(directory) if name.startswith("seen")}


@pytest.mark.parametrize("most", [1, 3, 7, 20, 21])
def test_hidden_names_do_not_count_so_that_no_page_tells_of_them(
    tree: Path, tmp_path: Path, most: int
) -> None:
    seen = many_names(tree / "many")
    compiled = policy(tree, rule("seen", paths=["many", "many/seen-*"]))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        pages = [speaker.page(bytes(tree / "many"), 0, most)]
        while not pages[-1].last:
            pages.append(speaker.page(bytes(tree / "many"), pages[-1].cookie, most))
            assert len(pages) <= len(seen)
        sizes = [len(page.entries) for page in pages]
        # As many as were wanted on each page, the rest on the last one, and none is empty.
        whole, rest = divmod(len(seen), most)
        assert sizes == [most] * whole + [rest] * bool(rest)
        names = [entry.name for page in pages for entry in page.entries]
        assert len(names) == len(set(names))
        assert set(names) == seen
        assert [record["entries"] for record in broker.records()] == sizes
        assert pages[-1].cookie == 0


@pytest.mark.parametrize("most", [0, 1])
def test_directory_in_which_all_names_are_hidden_is_one_empty_page(
    tree: Path, tmp_path: Path, most: int
) -> None:
    many_names(tree / "many")
    with SteppedBroker(
        tree, policy(tree, rule("itself", paths=["many"])), audit=tmp_path / "audit"
    ) as broker:
        page = broker.join().page(bytes(tree / "many"), 0, most)
        assert page.result.status == Status.GIVEN
        assert (page.entries, page.last, page.cookie) == ([], True, 0)


def test_list_of_an_empty_directory_is_one_page(stepped: SteppedBroker) -> None:
    (stepped.tree / "nothing").mkdir()
    page = stepped.join().page(bytes(stepped.tree / "nothing"))
    assert page.result.status == Status.GIVEN
    assert page.last
    assert page.entries == []


@pytest.mark.parametrize(
    ("name", "reason", "audited"),
    [
        ("missing", Reason.NOT_FOUND, "not_found"),
        ("file", Reason.NOT_DIRECTORY, "not_directory"),
        ("fifo", Reason.NOT_DIRECTORY, "not_directory"),
        ("link", Reason.SYMLINK, "symlink"),
        ("file/x", Reason.NOT_DIRECTORY, "not_directory"),
    ],
)
def test_list_of_what_is_no_directory_is_refused(
    stepped: SteppedBroker, name: str, reason: Reason, audited: str
) -> None:
    page = stepped.join().page(bytes(stepped.tree / name))
    assert page.result.reason == reason
    assert page.last
    assert reason_in_audit(stepped) == audited


def test_list_needs_the_action_list(tree: Path, tmp_path: Path) -> None:
    compiled = policy(tree, rule("not this", actions=["open", "stat", "walk"]))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        assert broker.join().page(bytes(tree)).result.reason == Reason.DENIED
        assert reason_in_audit(broker) == "no_rule"


def test_list_shows_what_may_be_listed_and_describes_what_may_be_described(
    tree: Path, tmp_path: Path
) -> None:
    compiled = policy(
        tree,
        rule("names", actions=["list"], paths=["**"]) | {"except": ["empty"]},
        rule("some", actions=["stat"], paths=["file", "empty", "fifo"]),
        rule("big", actions=["stat"], paths=["directory/**", "link"], where={"size": {"min": 100}}),
    )
    (tree / "directory" / "big").write_bytes(bytes(200))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        page = speaker.page(bytes(tree))
        shown = {entry.name: entry.stat is not None for entry in page.entries}
        # link: size is no condition on what is no file, so it is described.
        assert shown == {b"file": True, b"directory": True, b"link": True, b"fifo": True}
        inner = {
            entry.name: entry.stat is not None for entry in speaker.page(bytes(tree / "directory")).entries
        }
        assert inner == {b"inner": False, b"big": True}
        kinds = {entry.name: entry.kind for entry in page.entries}
        assert kinds == {b"file": 8, b"directory": 4, b"link": 10, b"fifo": 1}


def test_list_under_a_condition_shows_what_meets_it(tree: Path, tmp_path: Path) -> None:
    compiled = policy(tree, rule("small", actions=["list"], where={"size": {"max": 3}}))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        page = broker.join().page(bytes(tree))
        assert {entry.name for entry in page.entries} == {b"empty", b"directory", b"link", b"fifo"}
        assert all(entry.stat is None for entry in page.entries)


@pytest.mark.parametrize("cookie", [2**64 - 1, 2**63, 2**63 - 1, 12345678901234567])
def test_list_with_a_made_up_cookie_is_answered(stepped: SteppedBroker, cookie: int) -> None:
    page = stepped.join().page(bytes(stepped.tree), cookie)
    if page.result.status != Status.GIVEN:
        assert page.result.reason == Reason.PATH_INVALID
        assert reason_in_audit(stepped) == "cookie"
    names = {entry.name for entry in page.entries}
    assert names <= {name.encode() for name in os.listdir(stepped.tree)}


def test_directory_that_is_exchanged_during_a_list_is_busy(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_directory

    def exchange_first(descriptor: int) -> object:
        if not (stepped.tree / "moved").exists():
            (stepped.tree / "directory").rename(stepped.tree / "moved")
            (stepped.tree / "directory").mkdir()
        return read(descriptor)

    speaker = stepped.join()
    monkeypatch.setattr(listing, "read_directory", exchange_first)
    page = speaker.page(bytes(stepped.tree / "directory"))
    assert page.result.reason == Reason.BUSY
    assert page.entries == []
    assert reason_in_audit(stepped) == "moved"


@pytest.mark.parametrize(("changes", "reason"), [(1, Reason.NONE), (3, Reason.NONE), (1000, Reason.BUSY)])
def test_directory_that_changes_during_a_list_is_read_again_a_few_times(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch, changes: int, reason: Reason
) -> None:
    directory = stepped.tree / "directory"
    reads = 0

    def change_first(descriptor: int) -> object:
        nonlocal reads
        reads += 1
        names = read_directory(descriptor)
        # Each page takes two reads; the second one looks behind it.
        if reads % 2 and reads < 2 * changes:
            (directory / f"new-{reads}").touch()
        return names

    speaker = stepped.join()
    monkeypatch.setattr(listing, "read_directory", change_first)
    page = speaker.page(bytes(directory))
    assert page.result.reason == reason
    listed = {entry.name for entry in page.entries}
    assert listed == (set() if reason else {name.encode() for name in os.listdir(directory)})
    assert reason_in_audit(stepped) == ("moved" if reason else "ok")
    assert reads <= 8


def test_outcomes_of_ever_new_rules_do_not_pile_up(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MOST_KEPT", 2)
    rules = [rule(f"rule {name}", paths=[name]) for name in ("file", "empty", "directory/*")]
    with SteppedBroker(tree, policy(tree, *rules), audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        for name in ("file", "empty", "directory/inner", "file", "directory/inner"):
            assert speaker.open_one(bytes(tree / name)).reason == "ok"
        given_by = [record["rule"] for record in broker.records()]
        assert given_by == ["rule file", "rule empty", "rule directory/*", "rule file", "rule directory/*"]
        assert len(broker.opener._given) <= 2


def test_name_that_goes_away_during_a_list_is_left_out(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_directory

    def remove_after(descriptor: int) -> object:
        names = read(descriptor)
        (stepped.tree / "file").unlink(missing_ok=True)
        return names

    speaker = stepped.join()
    monkeypatch.setattr(listing, "read_directory", remove_after)
    assert b"file" not in {entry.name for entry in speaker.page(bytes(stepped.tree)).entries}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_list_for_which_the_broker_lacks_something_is_broken_and_not_a_page_with_fewer_names(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail_for_file(directory: int, path: bytes, cross_mounts: bool = False) -> int:  # noqa: FBT001, FBT002 - as it is
        if path == b"file":
            raise SyscallError(number, "openat2")
        return open_path_beneath(directory, path, cross_mounts)

    speaker = stepped.join()
    monkeypatch.setattr(listing, "open_path_beneath", fail_for_file)
    page = speaker.page(bytes(stepped.tree))
    assert (page.result.reason, page.result.errno, page.entries) == (Reason.BROKEN, number, [])
    assert reason_in_audit(stepped) == errno.errorcode[number]


# file systems and mounts


@pytest.mark.parametrize(
    ("facts", "required", "objection"),
    [
        (FilesystemFacts(0xEF53, os.ST_RDONLY), True, None),
        (FilesystemFacts(0xEF53, 0), False, None),
        (FilesystemFacts(0xEF53, 0), True, "mount_not_read_only"),
        (FilesystemFacts(0x9FA0, os.ST_RDONLY), True, "filesystem"),  # proc
        (FilesystemFacts(0x62656572, os.ST_RDONLY), False, "filesystem"),  # sysfs
        (FilesystemFacts(0x63677270, 0), False, "filesystem"),  # cgroup2
        (FilesystemFacts(0x64626720, 0), False, "filesystem"),  # debugfs
        (FilesystemFacts(0x74726163, 0), False, "filesystem"),  # tracefs
        (FilesystemFacts(0x73636673, 0), False, "filesystem"),  # securityfs
        (FilesystemFacts(0xCAFE4A11, 0), False, "filesystem"),  # bpf
        (FilesystemFacts(0x1CD1, 0), False, "filesystem"),  # devpts
        (FilesystemFacts(0x6165676C, 0), False, "filesystem"),  # pstore
        (FilesystemFacts(0x65735546, 0), False, "filesystem"),  # FUSE
        (FilesystemFacts(0x6969, 0), False, "filesystem"),  # NFS
        (FilesystemFacts(0xFF534D42, 0), False, "filesystem"),  # CIFS
        (FilesystemFacts(0x0187, 0), False, "filesystem"),  # autofs
        (FilesystemFacts(0x19800202, 0), False, "filesystem"),  # mqueue
        (FilesystemFacts(0, os.ST_RDONLY), True, "filesystem"),
    ],
)
def test_file_systems_that_are_no_storage_are_not_served(
    facts: FilesystemFacts,
    required: bool,  # noqa: FBT001 - a column of the table
    objection: str | None,
) -> None:
    assert objection_to_filesystem(facts, read_only_required=required) == objection


@pytest.mark.parametrize(
    ("objection", "reason"),
    [("filesystem", Reason.FILESYSTEM), ("mount_not_read_only", Reason.MOUNT_NOT_READ_ONLY)],
)
def test_object_behind_a_mount_that_is_not_served_is_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objection: str, reason: Reason
) -> None:
    roots = [{"name": "tree", "path": str(tree), "cross_mounts": True, "opens": "loop"}]
    with SteppedBroker(tree, policy(tree, roots=roots), audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        assert speaker.open_one(bytes(tree / "file")).content == b"content"
        monkeypatch.setattr(HeldRoot, "objection", lambda _self, _held: objection)
        opened = speaker.open_one(bytes(tree / "file"))
        assert opened.reason == reason.name.lower()
        assert reason_in_audit(broker) == objection
        # A description is no descriptor: that the mount is writable does not matter for it.
        [(result, _)] = speaker.stat(bytes(tree / "file")).results
        expected = Reason.NONE if objection == "mount_not_read_only" else reason
        assert result.reason == expected


def test_nothing_is_decided_twice_and_nothing_is_left_unrecorded(stepped: SteppedBroker) -> None:
    speaker = stepped.join()
    speaker.open(*[bytes(stepped.tree / "file")] * 5, b"", b"/etc/passwd")
    speaker.stat(bytes(stepped.tree / "file"), b"x")
    speaker.page(bytes(stepped.tree))
    records = stepped.records()
    check_audit(records)
    assert [record["event"] for record in records] == ["open"] * 7 + ["stat"] * 2 + ["list"]


def test_a_bug_in_answering_is_a_broken_reply_with_its_place_recorded_and_others_are_served(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker, bystander = stepped.join(), stepped.join()
    with monkeypatch.context() as patched:
        patched.setattr(opening.Opener, "open", lambda *_: 1 // 0)
        reply = speaker.ask(speak_open(stepped.tree / "file")).reply
    assert isinstance(reply, ErrorReply)
    assert (reply.kind, reply.reason) == (Kind.BROKEN, Reason.BROKEN)
    [failed] = [record for record in stepped.records() if record["event"] == "failed"]
    assert failed["reason"].startswith("ZeroDivisionError")
    assert "test_answers.py:" in failed["reason"]
    assert [entry.content for entry in bystander.open(bytes(stepped.tree / "file"))] == [b"content"]
