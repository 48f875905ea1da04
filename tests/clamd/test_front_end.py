"""clamd's clients at the scan service: between users, with who is slow, without room, in its log."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.clamd.scenarios import LIMIT, fill
from tests.clamd.speaking import HALF_CLOSE, Passed, Until, converse
from tests.clamd.talks import chunks
from tests.hanging.fuse import fuse_mounted
from tests.processes import in_child, wait_until
from tests.running_broker import reachable_directory
from tests.scan.clamav import BAD, BAD_NAME, make_database
from tests.scan.descriptors import lingering_socket
from tests.scan.running_scand import (
    ANN,
    BOB,
    OF_A_WORKER,
    SCAND_UID,
    RunningScand,
    client_of,
    copy_treacherous_engine,
    own,
    scand_and_broker,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.clamd.speaking import Step
    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root

_CONFIGURATION = """
engines: {{libclamav: {{database: {directory}/database, max_file_size: {limit}}}}}
listeners:
  scan: {{protocol: scan}}
  clamd: {{protocol: clamd, max_stream: 5MiB, read_timeout: 1min{listener}}}
workers: 1
spare_workers: 1
stream_memory: 8MiB
may_renew: {{user: ['{ann}']}}
"""


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """Give a directory with a tree and a database."""
    with reachable_directory() as path:
        (path / "tree").mkdir()
        fill(path / "tree")
        database = make_database(path / "database")
        for one in (database, *database.iterdir()):
            one.chmod(0o755)
        yield path


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with prepared() as path:
        yield path


def configuration(directory: Path, listener: str = "") -> str:
    return _CONFIGURATION.format(directory=directory, limit=LIMIT, ann=ANN, listener=listener)


@pytest.fixture(scope="module")
def scand(others: ForOtherUsers, directory: Path) -> Iterator[RunningScand]:
    with scand_and_broker(others, directory, configuration(directory)) as (running, _):
        yield running


def asked(scand: RunningScand, *steps: Step, uid: int = ANN) -> bytes:
    return in_child(lambda: converse(scand.clamd, steps), uid=uid)


def test_nobody_learns_anything_of_what_is_not_theirs(scand: RunningScand, directory: Path) -> None:
    """Whatever is there, and however it is asked for: the answer is that to what is not there."""
    bob = directory / "tree" / "bob"
    (bob / "to bad").symlink_to(bob / "bad")
    (bob / "to Ann's").symlink_to(directory / "tree" / "ann" / "clean")
    (bob / "to nothing").symlink_to(bob / "none")
    os.mkfifo(bob / "fifo")
    own(bob / "fifo", BOB, 0o666)
    (bob / "open to all").write_bytes(BAD)
    own(bob / "open to all", BOB, 0o666)
    os.link(bob / "bad", directory / "tree" / "ann" / "linked")
    home = bytes(bob)
    theirs = [b"", *(b"/" + os.fsencode(one.name) for one in bob.iterdir()), b"/none", b"/none/x"]
    theirs += [
        b"/clean/x",
        b"/sub/worse",
        b"/sub/none",
        b"/to bad/x",
        b"/" + b"x" * 255,
        b"/\xff",
        b"/n\ton e",
    ]
    names = [home + name for name in theirs] + [bytes(directory / "tree" / "ann" / "linked")]
    assert home + b"/bad" in names
    assert home + b"/sub" in names
    forms = [(b"z%b %b\0", b"\0"), (b"n%b %b\n", b"\n"), (b"%b %b\n", b"\n")]

    def ask() -> tuple[set[bytes], bytes, bytes]:
        answers = set()
        before = converse(scand.clamd, (b"zSTATS\0",))
        for command in (b"SCAN", b"CONTSCAN", b"MULTISCAN", b"ALLMATCHSCAN"):
            for form, end in forms[: 2 if command == b"ALLMATCHSCAN" else 3]:
                for name in names:
                    said = converse(scand.clamd, (form % (command, name),))
                    shown = name if end == b"\0" else name.replace(b"\t", b"\\x09")
                    assert said.startswith(shown + b": "), (command, name, said)
                    answers.add(said[len(shown) :])
        session = b"".join(b"zSCAN %b\0" % name for name in names)
        said = converse(scand.clamd, (b"zIDSESSION\0" + session + b"zEND\0",))
        for number, name in enumerate(names, 1):
            [one] = [one for one in said.split(b"\0") if one.startswith(b"%d: " % number)]
            answers.add(one.removeprefix(b"%d: %b" % (number, name)))
        return answers, before, converse(scand.clamd, (b"zSTATS\0",))

    logged = scand.errors()
    answers, before, after = in_child(ask, uid=ANN)
    assert {answer.rstrip(b"\0\n") for answer in answers} == {b": Access denied. ERROR"}
    assert before == after
    assert scand.errors() == logged
    for name in (b"/clean", b"/sub"):
        assert b" OK\0" in asked(scand, b"zCONTSCAN " + home + b"/clean\0", uid=BOB), name
    assert b": " + BAD_NAME.encode() + b" FOUND\0" in asked(scand, b"zSCAN " + home + b"/bad\0", uid=BOB)
    (directory / "tree" / "ann" / "linked").unlink()


def test_what_is_in_somebody_elses_directory_changes_no_answer_about_ones_own(
    scand: RunningScand, directory: Path
) -> None:
    mine = directory / "tree" / "ann" / "with Bob's"
    inner = mine / "of Bob"
    inner.mkdir(parents=True)
    own(mine, ANN, 0o755)
    own(inner, BOB, 0o700)
    (mine / "fine").write_bytes(b"fine")
    own(mine / "fine", ANN)

    def answers() -> set[bytes]:
        commands = (b"SCAN", b"CONTSCAN", b"MULTISCAN", b"ALLMATCHSCAN")
        return {asked(scand, b"z%b %b\0" % (command, bytes(mine))) for command in commands}

    expected = {bytes(mine) + b": Access denied. ERROR\0"}
    assert answers() == expected
    for name, content in (("fine", b"fine"), ("bad", BAD), ("large", bytes(LIMIT + 1))):
        (inner / name).write_bytes(content)
        own(inner / name, BOB)
        assert answers() == expected
    shutil.rmtree(mine)


def test_a_finding_is_told_although_something_else_is_an_error(scand: RunningScand, directory: Path) -> None:
    mixed = directory / "tree" / "ann" / "mixed"
    (mixed / "worse").write_bytes(BAD)
    own(mixed / "worse", ANN)
    said = asked(scand, b"zCONTSCAN " + bytes(mixed) + b"\0").split(b"\0")
    assert sorted(line.removeprefix(bytes(mixed)) for line in said) == [
        b"",
        b"/large: 100001 bytes are more than max_file_size. ERROR",
        b"/worse: " + BAD_NAME.encode() + b" FOUND",
    ]
    # SCAN goes on behind an error, up to what it finds.
    assert BAD_NAME.encode() + b" FOUND\0" in asked(scand, b"zSCAN " + bytes(mixed) + b"\0")
    (mixed / "worse").unlink()


def test_who_may_have_the_engines_renewed_is_configured(scand: RunningScand) -> None:
    assert asked(scand, b"zRELOAD\0", uid=BOB) == b"COMMAND UNAVAILABLE\0"
    before = scand.errors().count("loaded anew")
    assert asked(scand, b"zRELOAD\0") == b"RELOADING\0"
    wait_until(lambda: scand.errors().count("loaded anew") > before, "they are loaded anew")
    assert asked(scand, b"zSHUTDOWN\0") == asked(scand, b"zQUIT\0", uid=0) == b"COMMAND UNAVAILABLE\0"


def test_what_is_found_is_logged_with_the_name_of_the_file(scand: RunningScand, directory: Path) -> None:
    home = directory / "tree" / "ann"
    strange = home / "new\nline: OK\x1b"
    strange.write_bytes(BAD)
    own(strange, ANN)
    found = f"{BAD_NAME} FOUND"
    begin = len(scand.errors())
    bad = Passed(b"zFILDES\0\0", ((bytes(home / "bad"), os.O_RDONLY),))
    asked(scand, bad)
    asked(scand, b"zINSTREAM\0" + chunks(BAD))
    asked(scand, b"zSCAN " + bytes(strange) + b"\0")
    asked(scand, b"zSCAN " + bytes(home / "none") + b"\0")  # that it was refused is in the audit
    strange.unlink()
    assert scand.errors()[begin:].splitlines() == [
        f"fdbroker-scand: uid {ANN}: {home}/bad: {found}",
        f"fdbroker-scand: uid {ANN}: instream(local): {found}",
        rf"fdbroker-scand: uid {ANN}: {home}/new\x0aline: OK\x1b: {found}",
    ]


def test_descriptors_that_can_be_written_are_scanned_as_copies(scand: RunningScand, directory: Path) -> None:
    bad = bytes(directory / "tree" / "ann" / "bad")
    said = asked(scand, b"zIDSESSION\0", Passed(b"zFILDES\0\0", ((bad, os.O_RDWR),)), Until(b"\0"), b"zEND\0")
    assert re.fullmatch(rb"1: fd\[\d+\]: " + BAD_NAME.encode() + rb" FOUND\0", said)


def test_a_file_of_a_users_own_file_system_is_an_error_of_that_file_alone(
    scand: RunningScand, directory: Path
) -> None:
    target = directory / "fuse"
    target.mkdir()
    theirs = Passed(b"zFILDES\0\0", ((bytes(target / "file"), os.O_RDONLY),))
    clean = Passed(b"zFILDES\0\0", ((bytes(directory / "tree" / "ann" / "clean"), os.O_RDONLY),))
    with fuse_mounted(target, {"file": b"fine"}, owner=ANN):
        said = asked(scand, theirs)
        session = asked(scand, b"zIDSESSION\0", theirs, Until(b"1: "), clean, Until(b"2: "), b"zEND\0")
    reason = rb"[^\0]*its file system may be a program of a user's[^\0]*\. ERROR"
    assert re.fullmatch(rb"fd\[\d+\]: %b\x00" % reason, said)
    assert re.fullmatch(rb"1: fd\[\d+\]: %b\x002: fd\[\d+\]: OK\x00" % reason, session)


def test_answers_of_a_session_come_as_they_are_ready(scand: RunningScand, directory: Path) -> None:
    home = bytes(directory / "tree" / "ann")
    many = b"".join(b"zSCAN " + home + (b"/bad\0" if n % 2 else b"/clean\0") for n in range(300))
    said = asked(scand, b"zIDSESSION\0", many + b"zPING\0zEND\0").split(b"\0")[:-1]
    told = dict(line.split(b": ", 1) for line in said)
    assert len(said) == len(told) == 301
    assert told.pop(b"301") == b"PONG"
    assert all(line.endswith(b"FOUND" if int(number) % 2 == 0 else b"OK") for number, line in told.items())


def test_who_reads_nothing_keeps_nobody_waiting(scand: RunningScand, directory: Path) -> None:
    """It asks for more than it reads: it is not read from any more. Others have their answers."""

    def fill_up() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(scand.clamd))
        sock.settimeout(0)
        sock.send(b"zIDSESSION\0")
        end = time.monotonic() + 20
        silent = 0
        while silent < 5:
            assert time.monotonic() < end
            try:
                sock.send(b"zSTATS\0" * 1000)
                silent = 0
            except BlockingIOError:
                silent += 1
                converse(scand.clamd, (b"zPING\0",))
        return sock

    def ask() -> bytes:
        sock = fill_up()
        bad = bytes(directory / "tree" / "ann" / "bad")
        said = converse(scand.clamd, (b"zSCAN " + bad + b"\0",))
        sock.settimeout(30)
        answers = b""
        while b"\n50: POOLS" not in answers.replace(b"\0", b"\n"):
            answers += sock.recv(65536)
        sock.close()
        return said

    assert in_child(ask, uid=ANN).endswith(b" FOUND\0")


def test_who_hands_over_what_can_not_be_received_is_told_so(scand: RunningScand, directory: Path) -> None:
    """The kernel throws descriptors away for which the process has no number left."""
    with socket.socket(socket.AF_UNIX) as sock, open(directory / "tree/ann/bad", "rb") as file:
        sock.settimeout(20)
        sock.connect(str(scand.clamd))
        sock.sendall(b"zIDSESSION\0zPING\0")
        assert sock.recv(100) == b"1: PONG\0"
        soft, hard = in_child(lambda: resource.prlimit(scand.pid, resource.RLIMIT_NOFILE), uid=SCAND_UID)
        set_most_descriptors(scand, 3, hard)
        try:
            socket.send_fds(sock, [b"zFILDES\0\0"], [file.fileno()])
            assert sock.recv(100) == b"File descriptors could not be received. ERROR\n"
            assert sock.recv(100) == b""
        finally:
            set_most_descriptors(scand, soft, hard)
    assert asked(scand, b"zPING\0") == b"PONG\0"


def test_what_can_not_be_received_and_lingers_when_it_is_closed_holds_up_nobody(scand: RunningScand) -> None:
    """Of two descriptors the kernel throws one away, and the service closes the other one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(20)
        sock.connect(str(scand.clamd))
        sock.sendall(b"zIDSESSION\0zPING\0")
        assert sock.recv(100) == b"1: PONG\0"
        soft, hard = in_child(lambda: resource.prlimit(scand.pid, resource.RLIMIT_NOFILE), uid=SCAND_UID)
        taken = set(map(int, os.listdir(f"/proc/{scand.pid}/fd")))
        set_most_descriptors(scand, min(set(range(len(taken) + 1)) - taken) + 1, hard)
        try:
            # So that it is the service that closes it for the last time.
            os.kill(scand.pid, signal.SIGSTOP)
            with lingering_socket(listener.getsockname()) as lingering:
                socket.send_fds(sock, [b"zFILDES\0\0"], [lingering.fileno()] * 2)
                os.close(lingering.detach())
        finally:
            os.kill(scand.pid, signal.SIGCONT)
            assert sock.recv(100) == b"File descriptors could not be received. ERROR\n"
            set_most_descriptors(scand, soft, hard)
        began = time.monotonic()
        assert asked(scand, b"zPING\0") == b"PONG\0"
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("said", [b"zFILDES\0\0", b"zPING\0", b"nonsense\n", b"zIDSESSION\0zEND\0"])
def test_what_nobody_reads_and_lingers_when_it_is_closed_holds_up_nobody(
    scand: RunningScand, directory: Path, said: bytes, *, stays: bool
) -> None:
    """It lies behind all that a client wants, or a client goes: then it is closed with the connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        open(directory / "tree" / "ann" / "clean", "rb") as file,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        # So that it is the service that closes it for the last time.
        os.kill(scand.pid, signal.SIGSTOP)
        try:
            sock.connect(str(scand.clamd))
            socket.send_fds(sock, [said], [file.fileno()] if b"FILDES" in said else [])
            with lingering_socket(listener.getsockname()) as lingering:
                socket.send_fds(sock, [b"\0"], [lingering.fileno()])
                os.close(lingering.detach())
            if not stays:
                sock.close()
        finally:
            os.kill(scand.pid, signal.SIGCONT)
        began = time.monotonic()
        for _ in range(3):  # one of them after what was said
            assert asked(scand, b"zPING\0") == b"PONG\0"
        assert time.monotonic() - began < 5


def test_descriptors_that_linger_are_few_however_many_are_handed_over(scand: RunningScand) -> None:
    """Who hands over what can't be closed, and goes, has no more of it taken."""
    before = scand.descriptors()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with contextlib.ExitStack() as stack:
            # So that it is the service that closes them for the last time.
            os.kill(scand.pid, signal.SIGSTOP)
            try:
                for _ in range(8):
                    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                    sock.connect(str(scand.clamd))
                    with lingering_socket(listener.getsockname()) as lingering:
                        socket.send_fds(sock, [b"zFILDES\0\0"], [lingering.fileno()] * 250)
                        os.close(lingering.detach())
            finally:
                os.kill(scand.pid, signal.SIGCONT)
            assert asked(scand, b"zPING\0") == b"PONG\0"
        for _ in range(2):
            assert asked(scand, b"zPING\0") == b"PONG\0"
        assert scand.descriptors() < before + 3 * 250
    wait_until(lambda: scand.descriptors() <= before, "they are closed", 20)


def set_most_descriptors(scand: RunningScand, soft: int, hard: int) -> None:
    """Set the limit of the service, as its own user: root may lack the capability."""
    in_child(lambda: resource.prlimit(scand.pid, resource.RLIMIT_NOFILE, (soft, hard)), uid=SCAND_UID)


def test_streams_that_have_no_room_wait_for_it(scand: RunningScand) -> None:
    """Each has 4 MiB, there are 8 for all, and a user has half of that; all are scanned in the end."""

    def ask() -> list[bytes]:
        socks = [socket.socket(socket.AF_UNIX) for _ in range(6)]
        parts = [chunks(bytes(LIMIT // 2))[:-4] for _ in range(70)]
        left: list[bytes] = []
        for sock in socks:
            sock.connect(str(scand.clamd))
            sock.settimeout(0)
            left.append(b"zINSTREAM\0" + b"".join(parts) + bytes(4))
        said = [b""] * len(socks)
        end = time.monotonic() + 30
        while not all(said):
            assert time.monotonic() < end, [len(one) for one in left]
            for number, sock in enumerate(socks):
                try:
                    if left[number]:
                        left[number] = left[number][sock.send(left[number][:65536]) :]
                    else:
                        said[number] += sock.recv(100)
                except BlockingIOError:
                    continue
        return said

    assert in_child(ask, uid=BOB) == [b"stream: 3500000 bytes are more than max_file_size. ERROR\0"] * 6


def test_a_client_that_goes_takes_its_scan_with_it(scand: RunningScand, directory: Path) -> None:
    idle = scand.descriptors()
    home = bytes(directory / "tree" / "ann")

    def ask() -> None:
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(scand.clamd))
                sock.sendall(b"zIDSESSION\0" + b"zSCAN " + home + b"/sub\0zINSTREAM\0\0\0\0\5x")

    in_child(ask, uid=ANN)
    wait_until(lambda: scand.descriptors() <= idle + OF_A_WORKER, "its descriptors are closed")
    assert asked(scand, b"zSCAN " + home + b"/clean\0").endswith(b" OK\0")


def test_files_to_be_copied_are_closed_though_their_client_is_gone_at_once(
    scand: RunningScand, directory: Path
) -> None:
    """It closes with answers unread, so its end is seen in the round in which its files are."""
    idle = scand.descriptors()

    def ask() -> None:
        with open(directory / "tree/ann/bad", "r+b") as file:
            for _ in range(50):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(20)
                    sock.connect(str(scand.clamd))
                    sock.sendall(b"zIDSESSION\0zPING\0")
                    sock.recv(1)
                    for _ in range(5):
                        socket.send_fds(sock, [b"zFILDES\0\0"], [file.fileno()])

    in_child(ask, uid=ANN)
    wait_until(lambda: scand.descriptors() <= idle + OF_A_WORKER, "its descriptors are closed")
    assert "Traceback" not in scand.errors()


def test_old_answers_are_given_where_that_is_configured(others: ForOtherUsers) -> None:
    with (
        prepared() as directory,
        scand_and_broker(
            others,
            directory,
            configuration(directory, ", unscanned: ok, write_timeout: 1s") + "log: clamd\n",
        ) as (scand, _),
    ):
        home = directory / "tree" / "ann"
        for name in ("large", "locked", "mixed"):
            said = asked(scand, b"zSCAN " + bytes(home / name) + b"\0")
            assert said == bytes(home / name) + b": OK\0"
        # What the policy does not give stays an error.
        assert asked(scand, b"zSCAN " + bytes(home / "shared") + b"\0").endswith(b": Access denied. ERROR\0")
        asked(scand, b"zSCAN " + bytes(home / "bad") + b"\0", HALF_CLOSE)
        [line] = [line for line in scand.errors().splitlines() if "FOUND" in line]
        assert re.fullmatch(
            r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4} -> " + re.escape(f"{home}/bad: {BAD_NAME} FOUND"), line
        )
        assert in_child(lambda: ended_for_not_reading(scand), uid=ANN)


def ended_for_not_reading(scand: RunningScand) -> bool:
    """Ask for much and read nothing until the connection has ended."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(scand.clamd))
        sock.sendall(b"zIDSESSION\0")
        try:
            for _ in range(10_000):
                sock.sendall(b"zSTATS\0" * 1000)
        except (BrokenPipeError, ConnectionResetError):
            return True
    return False


def test_the_service_ends_though_clients_are_there(others: ForOtherUsers) -> None:
    with (
        prepared() as directory,
        scand_and_broker(others, directory, configuration(directory)) as (scand, _),
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.connect(str(scand.clamd))
        sock.sendall(b"zIDSESSION\0zPING\0")
        assert sock.recv(100) == b"1: PONG\0"
        assert scand.stop() == 0
        assert sock.recv(100) == b""


def test_a_client_that_goes_takes_its_hanging_file_with_it(others: ForOtherUsers) -> None:
    """It has said all at once, so nothing more is read from it; that it goes is seen all the same."""
    treacherous = """
engines: {{treacherous: {{word: {directory}/word}}}}
listeners: {{scan: {{protocol: scan}}, clamd: {{protocol: clamd}}}}
workers: 1
"""

    def ask() -> None:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(scand.clamd))
                sock.sendall(b"zINSTREAM\0" + chunks(b"hang"))
                wait_until(under_way, "it hangs")
            wait_until(lambda: not under_way(), "it is let go of", 2.0)

    def under_way() -> bool:
        with client_of(scand.socket) as service:
            return bool(service.status()["files_under_way"])

    with prepared() as directory:
        (directory / "word").write_bytes(b"word")
        copy_treacherous_engine(directory)
        with scand_and_broker(
            others, directory, treacherous.format(directory=directory), str(directory / "engines")
        ) as (scand, _):
            in_child(ask, uid=ANN)
