"""Another file for the audit of a broker that runs: by root alone, without losing or splitting a record."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import select
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.client import DeniedError, control
from fdbroker.kernel import sockets
from fdbroker.kernel.errors import SyscallError
from fdbroker.launcher.auditing import open_audit_file
from fdbroker.wire.client import ReopenReply, encode_open, encode_reopen, encode_status
from fdbroker.wire.format import Kind, Reason
from fdbroker.wire.messages import ErrorReply
from tests.audit_records import check_lines
from tests.broker.speaking import Speaker, StreamSpeaker, check_audit
from tests.broker.stepping import SteppedBroker
from tests.cli.commands import command, environment, run_here
from tests.processes import background, become, in_child, wait_until
from tests.running_broker import (
    CLIENT_UID,
    OTHER_UID,
    RunningBroker,
    policy,
    reachable_directory,
    running_broker,
    with_control,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

CLIENTS = 2


@pytest.fixture
def reachable() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        (path / "tree" / "file").write_bytes(b"content")
        yield path


@pytest.fixture
def running(reachable: Path) -> Iterator[RunningBroker]:
    with running_broker(reachable, policy(reachable / "tree"), with_control(reachable)) as broker:
        yield broker


def reopen(running: RunningBroker, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_here("audit", "reopen", "--control", os.fspath(running.control), str(path or running.audit))


def records_of(*files: Path) -> list[dict[str, Any]]:
    """Return the records of files, of which each line is one."""
    lines = [line for file in files for line in read(file).splitlines()]
    check_lines(lines)
    return [json.loads(line) for line in lines]


def read(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def ask(running: RunningBroker, path: Path) -> None:
    with Speaker.connect(running.socket) as speaker:
        assert speaker.open_one(bytes(path)).reason == "ok"


def test_what_is_recorded_after_a_reopen_is_in_the_new_file_alone(
    running: RunningBroker, reachable: Path
) -> None:
    old = running.audit.with_suffix(".1")
    ask(running, reachable / "tree/file")
    running.audit.rename(old)
    ask(running, reachable / "tree/file")  # still in the renamed one
    done = reopen(running)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"the audit goes to {running.audit}\n"
    ask(running, reachable / "tree/file")
    assert [record["event"] for record in records_of(old)] == ["started", "open", "open"]
    new = records_of(running.audit)
    assert [record["event"] for record in new] == ["reopened", "open"]
    check_audit(records_of(old, running.audit))
    started = records_of(old)[0]
    assert (new[0]["boot"], new[0]["broker_pid"], new[0]["uid"]) == (started["boot"], running.pid, 0)
    assert running.audit.stat().st_mode & 0o777 == 0o640
    assert str(old) not in running.descriptors().values()


def test_a_reopen_of_the_file_in_use_changes_nothing(running: RunningBroker, reachable: Path) -> None:
    before = running.descriptors()
    for _ in range(3):
        assert reopen(running).returncode == 0
        ask(running, reachable / "tree/file")
    check_audit(records_of(running.audit))
    same = sorted(before.values())
    wait_until(lambda: sorted(running.descriptors().values()) == same, "the end of the connections")


def rotate_by_hand(running: RunningBroker, number: int) -> None:
    running.audit.rename(running.audit.with_suffix(f".{number:03}"))
    new = open_audit_file(str(running.audit))
    with control.connect(running.control) as admin:
        admin.reopen_audit(new)
    os.close(new)


class Logrotate:
    """The real one, with the file of config/ for other places."""

    def __init__(self, running: RunningBroker, directory: Path) -> None:
        text = Path(__file__).parents[2].joinpath("config/logrotate/fdbroker").read_text()
        here = shlex.join([*map(str, command("audit", "reopen", "--control", os.fspath(running.control)))])
        assert text.count("/var/log/fdbroker/audit.jsonl") == 3
        text = text.replace("/var/log/fdbroker/audit.jsonl", str(running.audit))
        text = text.replace("fdbroker audit reopen", here)
        self.file, self.state = directory / "logrotate.conf", directory / "logrotate.state"
        self.file.write_text(text)
        self.file.chmod(0o644)

    def __call__(self, running: RunningBroker, number: int) -> None:
        del running, number
        done = subprocess.run(
            ["logrotate", "--force", "--state", self.state, self.file],
            env=environment(),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def open_for_ever(running: RunningBroker, path: Path) -> None:
    with Speaker.connect(running.socket) as speaker:
        for number in itertools.count(1):
            speaker.send(encode_open(number, [bytes(path)] * 2))
            answer = speaker.receive()
            assert answer is not None
            assert len(answer.descriptors) == 2  # a denial for want of a record would show
            answer.descriptors.close()
            select.select([], [], [], 0.001)


@pytest.mark.parametrize(("how", "rotations"), [("by hand", 20), ("logrotate", 4)])
def test_no_record_is_lost_or_split_over_rotations_while_clients_ask(
    running: RunningBroker, reachable: Path, how: str, rotations: int
) -> None:
    rotate = rotate_by_hand if how == "by hand" else Logrotate(running, reachable)
    with contextlib.ExitStack() as clients:
        for _ in range(CLIENTS):
            clients.enter_context(
                background(lambda: open_for_ever(running, reachable / "tree/file"), uid=CLIENT_UID)
            )
        for number in range(rotations):
            wait_until(lambda: running.audit.read_bytes().count(b"\n") > 50, "records in the new file")
            rotate(running, number)
    if how == "by hand":
        files = sorted(reachable.glob("audit.[0-9]*"))
    else:
        numbered = reachable.glob("audit.jsonl.*.gz")
        files = sorted(numbered, key=lambda file: -int(re.findall(r"\.(\d+)\.gz", file.name)[0]))
    assert len(files) == rotations
    wait_until(lambda: running.audit.read_bytes().endswith(b"\n"), "the end of a record")
    for file in files:
        assert read(file).endswith(b"\n")
    records = records_of(*files, running.audit)
    check_audit(records)
    assert [record["event"] for record in records].count("reopened") == rotations
    for file in [*files[1:], running.audit]:
        assert records_of(file)[0]["event"] == "reopened"
    verified = run_here("audit", "verify", "--json", *map(str, files), str(running.audit))
    document = json.loads(verified.stdout)
    assert (verified.returncode, document["findings"]) == (0, [])
    assert (document["records"], document["runs"]) == (len(records), 1)
    if how == "logrotate":
        whole = run_here("audit", "--rotated", "--json", str(running.audit))
        assert (whole.returncode, len(whole.stdout.splitlines())) == (0, len(records))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("owner", "must belong to root"),
        ("mode", "must belong to root"),
        ("links", "must belong to root"),
        ("symlink", "symbolic link"),
        ("fifo", ""),
        ("directory", "Is a directory"),
        ("above", "can't be used"),
    ],
)
def test_a_file_that_is_not_roots_alone_is_not_taken_and_the_old_one_stays(
    running: RunningBroker, reachable: Path, spoil: str, said: str
) -> None:
    new = reachable / "log" / "audit"
    new.parent.mkdir()
    if spoil == "fifo":
        os.mkfifo(new)
    elif spoil == "directory":
        new.mkdir()
    elif spoil == "symlink":
        new.symlink_to(running.audit)
    else:
        new.touch()
    if spoil == "owner":
        os.chown(new, OTHER_UID, 0)
    elif spoil == "mode":
        new.chmod(0o666)
    elif spoil == "links":
        os.link(new, reachable / "second")
    elif spoil == "above":
        os.chown(new.parent, OTHER_UID, 0)
    done = reopen(running, new)
    assert done.returncode == 2
    assert said in done.stderr
    ask(running, reachable / "tree/file")
    check_audit(records_of(running.audit))
    assert records_of(running.audit)[-1]["event"] == "open"


def test_a_new_file_on_a_full_disk_is_not_taken_and_the_old_one_goes_on(
    running: RunningBroker, reachable: Path
) -> None:
    disk = reachable / "disk"
    disk.mkdir(mode=0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=755", "none", disk], check=True)
    try:
        (disk / "filling").write_bytes(bytes(4096))
        done = reopen(running, disk / "audit")
        assert done.returncode == 2
        assert "the audit goes on where it was: the new file can't be written to" in done.stderr
        ask(running, reachable / "tree/file")
        assert str(disk / "audit") not in running.descriptors().values()
    finally:
        subprocess.run(["umount", disk], check=True)
    records = records_of(running.audit)
    assert [record["event"] for record in records] == ["started", "reopen_refused", "audit_failed", "open"]
    assert (records[2]["from"], records[2]["to"]) == (1, 1)


@pytest.mark.parametrize("where", ["-", "none"])
def test_an_audit_that_goes_to_no_file_can_not_be_moved(reachable: Path, where: str) -> None:
    read_end, write_end = os.pipe()
    compiled = policy(reachable / "tree")
    with (
        open(read_end, "rb"),
        open(write_end, "wb") as output,
        running_broker(
            reachable, compiled, with_control(reachable), audit=where, stdout=output.fileno()
        ) as broker,
    ):
        done = reopen(broker, reachable / "audit.jsonl")
    assert done.returncode == 2
    said = {"-": "goes to standard output, which is no file", "none": "there is no audit"}[where]
    assert said in done.stderr


def test_standard_output_that_is_a_file_is_moved_with_its_number(reachable: Path) -> None:
    """As with StandardOutput=append: of systemd."""
    first, second = reachable / "audit.jsonl", reachable / "second"
    first.write_bytes(b'{"cut')
    first.chmod(0o640)
    output = os.open(first, os.O_WRONLY | os.O_APPEND)
    try:
        with running_broker(
            reachable, policy(reachable / "tree"), with_control(reachable), audit="-", stdout=output
        ) as broker:
            done = reopen(broker, second)
            assert (done.returncode, done.stderr) == (0, "")
            ask(broker, reachable / "tree/file")
            assert os.readlink(f"/proc/{broker.pid}/fd/1") == str(second)
            assert str(first) not in broker.descriptors().values()
    finally:
        os.close(output)
    cut, *lines = first.read_bytes().splitlines()
    assert cut == b'{"cut'  # and what follows begins on a line of its own
    check_audit([*map(json.loads, lines), *records_of(second)])


def test_nobody_but_root_moves_the_audit(running: RunningBroker) -> None:
    running.control.chmod(0o666)

    def as_another() -> tuple[Reason, bool]:
        with Speaker.connect(running.control) as speaker:
            speaker.send(encode_reopen(1, comes=False))
            answer = speaker.receive()
            assert answer is not None
            assert isinstance(answer.reply, ErrorReply)
            with open("/dev/null", "wb") as file:
                try:
                    sockets.send(speaker.sock, encode_reopen(2, comes=True), [file.fileno()])
                except SyscallError as error:
                    return answer.reply.reason, isinstance(error, SyscallError)
                closed = speaker.receive()  # malformed
                assert closed is not None
                assert isinstance(closed.reply, ErrorReply)
                return answer.reply.reason, closed.reply.kind is Kind.MALFORMED

    before = running.descriptors()
    assert in_child(as_another, uid=CLIENT_UID) == (Reason.DENIED, True)
    refused = run_as_client(running)
    assert refused == "only root moves the audit: run this as root"
    assert records_of(running.audit)[-1]["uid"] == CLIENT_UID
    wait_until(lambda: running.descriptors() == before, "the end of the connection")


def run_as_client(running: RunningBroker) -> str:
    def child() -> str:
        become(CLIENT_UID)
        from fdbroker.cli.audit import reopen as reopening  # noqa: PLC0415 - in the child
        from fdbroker.cli.failure import Failure  # noqa: PLC0415 - likewise

        try:
            reopening.callback("/x", os.fspath(running.control))  # type: ignore[misc]
        except Failure as failure:
            return failure.message
        return "done"

    return in_child(child)


# In steps


@pytest.fixture
def root_speaker(reachable: Path) -> Iterator[tuple[SteppedBroker, Speaker]]:
    audit = reachable / "audit"
    os.close(open_audit_file(str(audit)))
    with SteppedBroker(reachable / "tree", audit=audit) as broker:
        speaker = broker.call(broker.listen(reachable, control=True))
        broker.audit_descriptor = None  # the broker closes it as soon as it has another one
        yield broker, speaker
        assert broker.audit._descriptor is not None
        os.close(broker.audit._descriptor)


def bring(
    broker: SteppedBroker, speaker: Speaker, *descriptors: int, comes: bool = True
) -> ErrorReply | ReopenReply:
    sockets.send(speaker.sock, encode_reopen(2, comes=comes), descriptors)
    broker.serve()
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply | ReopenReply)
    return answer.reply


def test_a_descriptor_is_taken_only_right_behind_its_announcement(
    root_speaker: tuple[SteppedBroker, Speaker], reachable: Path
) -> None:
    broker, speaker = root_speaker
    new = open_audit_file(str(reachable / "new"))
    # The kernel itself refuses one that was not announced (Linux 6.16).
    with contextlib.suppress(SyscallError):
        sockets.send(speaker.sock, encode_reopen(2, comes=True), [new])
        pytest.skip("this kernel has no SO_PASSRIGHTS")
    assert bring(broker, speaker, comes=False) == ReopenReply(2, 1, taken=False)
    assert bring(broker, speaker, new) == ReopenReply(2, 1, taken=True)
    with pytest.raises(SyscallError):
        sockets.send(speaker.sock, encode_reopen(2, comes=True), [new])
    os.close(new)


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_that_does_not_come_alone_is_malformed_and_nothing_stays_open(
    root_speaker: tuple[SteppedBroker, Speaker], reachable: Path, count: int
) -> None:
    broker, speaker = root_speaker
    new = open_audit_file(str(reachable / "new"))
    before = len(os.listdir("/proc/self/fd"))
    bring(broker, speaker, comes=False)
    reply = bring(broker, speaker, *[new] * count)
    assert isinstance(reply, ErrorReply)
    assert reply.kind is Kind.MALFORMED
    assert len(os.listdir("/proc/self/fd")) < before  # the connection is closed
    os.close(new)


def test_another_message_behind_the_announcement_is_answered_and_its_descriptors_closed(
    root_speaker: tuple[SteppedBroker, Speaker], reachable: Path
) -> None:
    broker, speaker = root_speaker
    before = len(os.listdir("/proc/self/fd"))
    bring(broker, speaker, comes=False)
    new = open_audit_file(str(reachable / "new"))
    sockets.send(speaker.sock, encode_status(3), [new])
    broker.serve()
    answer = speaker.receive()
    assert answer is not None
    assert answer.reply.id == 3
    os.close(new)
    assert len(os.listdir("/proc/self/fd")) == before
    with open(os.devnull, "wb") as file, pytest.raises(SyscallError):
        sockets.send(speaker.sock, encode_reopen(2, comes=True), [file.fileno()])


@pytest.mark.parametrize(
    ("flags", "path"),
    [
        (os.O_WRONLY, "new"),
        (os.O_RDWR | os.O_APPEND, "new"),
        (os.O_RDONLY | os.O_APPEND, "new"),
        (os.O_PATH, "new"),
        (os.O_WRONLY | os.O_APPEND, "/dev/null"),
    ],
)
def test_a_descriptor_that_is_not_for_appending_to_a_file_is_refused_and_closed(
    root_speaker: tuple[SteppedBroker, Speaker], reachable: Path, flags: int, path: str
) -> None:
    broker, speaker = root_speaker
    os.close(open_audit_file(str(reachable / "new")))
    new = os.open(reachable / path, flags)
    before = len(os.listdir("/proc/self/fd"))
    bring(broker, speaker, comes=False)
    reply = bring(broker, speaker, new)
    assert isinstance(reply, ErrorReply)
    assert (reply.kind, reply.reason) == (Kind.REFUSED, Reason.DENIED)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(new)
    assert broker.events()[-1] == "reopen_refused"


def test_a_stream_can_not_bring_a_file(reachable: Path) -> None:
    os.close(open_audit_file(str(reachable / "audit")))
    with SteppedBroker(reachable / "tree", audit=reachable / "audit") as broker:
        path = broker.listen(reachable, control=True, kind=StreamSpeaker)
        speaker = broker.call(path, StreamSpeaker)
        speaker.send(encode_reopen(2, comes=False))
        broker.serve()
        answer = speaker.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert answer.reply.kind is Kind.MALFORMED


def test_the_client_tells_what_is_wrong_with_a_file(running: RunningBroker, reachable: Path) -> None:
    os.close(open_audit_file(str(reachable / "new")))
    with control.connect(running.control) as admin:
        with open(reachable / "new", "rb") as file, pytest.raises(DeniedError) as caught:
            admin.reopen_audit(file.fileno())
        assert caught.value.strerror == "the new file must be open for appending and nothing else"
        assert admin.status()["pid"] == running.pid  # the connection goes on


def test_a_file_that_ends_in_the_middle_of_a_record_gets_the_end_of_its_line(reachable: Path) -> None:
    file = reachable / "audit"
    for before, after in ((b"", b""), (b"whole\n", b"whole\n"), (b"cut", b"cut\n")):
        file.write_bytes(before)
        os.close(open_audit_file(str(file)))
        assert file.read_bytes() == after


def test_root_that_is_gone_after_the_announcement_leaves_all_as_it_was(
    root_speaker: tuple[SteppedBroker, Speaker],
) -> None:
    broker, speaker = root_speaker
    bring(broker, speaker, comes=False)
    speaker.close()
    assert broker.connections == 0
    assert broker.events() == []


def test_a_file_from_another_process_than_the_one_that_announced_it_is_refused(
    root_speaker: tuple[SteppedBroker, Speaker], reachable: Path
) -> None:
    broker, speaker = root_speaker
    new = open_audit_file(str(reachable / "new"))
    before = len(os.listdir("/proc/self/fd"))
    bring(broker, speaker, comes=False)
    in_child(lambda: sockets.send(speaker.sock, encode_reopen(2, comes=True), [new]))
    broker.serve()
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert (answer.reply.kind, answer.reply.reason) == (Kind.REFUSED, Reason.IDENTITY)
    assert len(os.listdir("/proc/self/fd")) == before
    assert (reachable / "new").read_bytes() == b""
    os.close(new)
    assert broker.events() == ["reopen_refused"]
