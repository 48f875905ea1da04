"""Two hundred clients of clamd at a time, half of them hostile: no honest one fails, nothing is left.

Hostile ones begin and never end, say how much is to come and send other things, hand over what they should
not, ask for more than they read, and go when they like. Most are another user's than the honest ones. Some
are of the same user; of these none has files queued that it does not read about, which a user's own
connections share.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.broker.puppets import Puppet
from tests.clamd.talks import chunks
from tests.processes import in_child, wait_until
from tests.running_broker import reachable_directory
from tests.scan.clamav import BAD, BAD_NAME, make_database
from tests.scan.running_scand import ANN, BOB, own, scand_and_broker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers
    from tests.scan.running_scand import RunningScand

pytestmark = [pytest.mark.root, pytest.mark.unmeasured]

IN_FULL = bool(os.environ.get("FDBROKER_HOSTILE"))
SECONDS = 600 if IN_FULL else 20
# Most seconds before the next connection, of hostile clients and of honest ones: in full, the machine has
# nothing else to do.
PAUSE, HONEST_PAUSE = (2.0, 0.0) if IN_FULL else (20.0, 20.0)
CHANCE = random.Random()  # noqa: S311 - what comes next need not be a secret
OF_A_WORKER, MORE_WORKERS = 3, 2  # descriptors; of those that had nothing to do before
PATIENCE = 20.0  # of honest clients, for each answer
_CONFIGURATION = """
engines: {{libclamav: {{database: {database}}}}}
listeners: {{scan: {{protocol: scan}}, clamd: {{protocol: clamd}}}}
workers: 1
spare_workers: 2
"""
FOUND = b": " + BAD_NAME.encode() + b" FOUND\0"


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)  # before it has a time-out, with which a full backlog is an error at once
        sock.settimeout(PATIENCE)
    except BaseException:
        sock.close()
        raise
    return sock


# ---- hostile ----


def begin_a_command(sock: socket.socket, _: str) -> None:
    sock.sendall(
        CHANCE.choice([b"z", b"nSCAN /", b"zFILDES\0", b"zINSTREAM\0\0\0", b"PIN", b"zIDSESSION\0z"])
    )


def promise_too_much(sock: socket.socket, _home: str) -> None:
    sock.sendall(b"zINSTREAM\0\xff\xff\xff\xff")
    for _ in range(100):
        sock.sendall(bytes(65536))


def begin_a_stream(sock: socket.socket, _: str) -> None:
    sock.sendall(b"zINSTREAM\0" + struct.pack("!I", 50 << 20) + bytes(1 << 20))


def hand_over_nonsense(sock: socket.socket, home: str) -> None:
    command, flags, count = CHANCE.choice(
        [
            (b"zFILDES\0\0", os.O_PATH, 1),
            (b"zFILDES\0\0", os.O_RDONLY | os.O_DIRECTORY, 1),
            (b"zFILDES\0\0", os.O_RDONLY | os.O_DIRECTORY, 253),
            (b"zFILDES\0", os.O_PATH, 7),
            (b"zPING\0", os.O_PATH, 2),
            (b"zINSTREAM\0\0\0", os.O_PATH, 1),
            (b"z", os.O_PATH, 253),
        ]
    )
    descriptor = os.open(home, flags)
    try:
        rights = array.array("i", [descriptor] * count)
        sock.sendmsg([command], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    finally:
        os.close(descriptor)


def say_anything(sock: socket.socket, _: str) -> None:
    sock.sendall(CHANCE.randbytes(CHANCE.randrange(1, 10000)))


def never_read(sock: socket.socket, home: str) -> None:
    sock.settimeout(0.2)
    sock.sendall(b"zIDSESSION\0")
    scan = b"zSCAN " + os.fsencode(home) + b"/clean\0"
    for _ in range(100):
        sock.sendall((scan + b"zSTATS\0zVERSION\0") * 100)


def hand_over_and_go(sock: socket.socket, home: str) -> None:
    sock.sendall(b"zIDSESSION\0")
    with open(os.path.join(home, "clean"), "rb") as file:
        for _ in range(40):
            socket.send_fds(sock, [b"zFILDES\0\0"], [file.fileno()])


def say_nothing(_sock: socket.socket, _: str) -> None:
    pass


HARMLESS_TO_ITS_USER = (
    begin_a_command,
    promise_too_much,
    begin_a_stream,
    hand_over_nonsense,
    say_anything,
    say_nothing,
)
ALL = (*HARMLESS_TO_ITS_USER, never_read, hand_over_and_go)


def be_hostile(
    _memory: dict[str, Any], path: str, home: str, count: int, end: float, *, all_deeds: bool
) -> int:
    """Have so many connections at a time do what they should not; return how many there were in all."""
    made = [0] * count
    pause = threading.Event()

    def act(number: int) -> None:
        deeds: tuple[Callable[[socket.socket, str], None], ...] = ALL if all_deeds else HARMLESS_TO_ITS_USER
        turn = number
        while time.monotonic() < end:
            with contextlib.suppress(OSError), connected(path) as sock:
                made[number] += 1
                turn += 1
                deeds[turn % len(deeds)](sock, home)
                pause.wait(min(CHANCE.uniform(0.0, PAUSE), max(0.0, end - time.monotonic())))

    _all_at_once(act, count)
    return sum(made)


# ---- honest ----


def be_honest(_memory: dict[str, Any], path: str, home: str, count: int, end: float) -> tuple[int, float]:
    """Have so many connections at a time ask for what they may have; return how many answers, the slowest.

    Raises:
        AssertionError: one was wrong, or late.

    """
    made = [0] * count
    slowest = [0.0] * count
    failures: list[str] = []
    pause = threading.Event()

    def act(number: int) -> None:
        try:
            # Once at least, however busy the machine is.
            while not (failures or (made[number] and time.monotonic() >= end)):
                with connected(path) as sock:
                    if number % 2:
                        made[number] += 1
                        _one_command(sock, home, made[number])
                    else:
                        sock.sendall(b"zIDSESSION\0")
                        for command in range(1, 10):
                            made[number] += 1
                            began = time.monotonic()
                            _in_session(sock, home, command)
                            slowest[number] = max(slowest[number], time.monotonic() - began)
                if HONEST_PAUSE:
                    pause.wait(min(CHANCE.uniform(0.0, HONEST_PAUSE), max(0.0, end - time.monotonic())))
        except (OSError, AssertionError) as error:
            failures.append(f"{number}, after {made[number]}: {error!r}")

    _all_at_once(act, count)
    assert not failures, failures
    assert all(made)
    return sum(made), max(slowest)


def _one_command(sock: socket.socket, home: str, turn: int) -> None:
    bad = os.fsencode(home) + b"/bad"
    if turn % 3 == 0:
        sock.sendall(b"zSCAN " + bad + b"\0")
        expected = bad + FOUND
    elif turn % 3 == 1:
        sock.sendall(b"zINSTREAM\0" + chunks(bytes(70000), BAD))
        expected = b"stream" + FOUND
    else:
        sock.sendall(b"zPING\0")
        expected = b"PONG\0"
    said = b""
    while more := sock.recv(4096):
        said += more
    assert said == expected


def _in_session(sock: socket.socket, home: str, command: int) -> None:
    name = ("bad", "clean")[command % 2]
    with open(os.path.join(home, name), "rb") as file:
        socket.send_fds(sock, [b"zFILDES\0\0"], [file.fileno()])
    said = b""
    while not said.endswith(b"\0"):
        more = sock.recv(4096)
        assert more, said
        said += more
    assert said.startswith(b"%d: fd[" % command)
    assert said.endswith(b": OK\0" if name == "clean" else FOUND)


def _all_at_once(act: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=act, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- what is left ----


def memory_of(scand: RunningScand) -> int:
    """Return how much the process has of its own, in KiB."""
    with open(f"/proc/{scand.pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


def test_no_honest_client_fails_beside_hostile_ones(
    others: ForOtherUsers, capsys: pytest.CaptureFixture[str]
) -> None:
    with reachable_directory() as directory:
        homes = _make_homes(directory)
        database = make_database(directory / "database")
        for one in (database, *database.iterdir()):
            one.chmod(0o755)
        with scand_and_broker(others, directory, _CONFIGURATION.format(database=database)) as (scand, _):
            path = str(scand.clamd)
            in_child(lambda: be_honest({}, path, homes[ANN], 20, time.monotonic() + 0.5), uid=ANN)
            idle, memory = scand.descriptors(), memory_of(scand)
            end = time.monotonic() + SECONDS
            with (
                Puppet(uid=ANN) as ann,
                Puppet(uid=BOB) as bob,
                Puppet(uid=ANN) as neighbour,
            ):
                bob.begin(be_hostile_with_all, path, homes[BOB], 80, end)
                neighbour.begin(be_hostile_without_files, path, homes[ANN], 20, end)
                ann.begin(be_honest, path, homes[ANN], 100, end)
                answers, slowest = ann.result(SECONDS + 60)
                assert answers >= 100
                assert slowest < PATIENCE
                hostile = [one.result(SECONDS + 60) for one in (bob, neighbour)]
                assert min(hostile) >= 20
            most = idle + OF_A_WORKER * MORE_WORKERS
            wait_until(lambda: scand.descriptors() <= most, "its descriptors are closed")
            memory_after = memory_of(scand)
            if IN_FULL:
                with capsys.disabled():
                    sys.stdout.write(
                        f"\n{answers} answers to honest clients, the slowest in {slowest:.2f} s, beside"
                        f" {sum(hostile)} hostile connections; descriptors {idle} before,"
                        f" {scand.descriptors()} after; memory of its own {memory} KiB before,"
                        f" {memory_after} after\n"
                    )
            assert memory_after < memory + 32 * 1024
            assert in_child(lambda: be_honest({}, path, homes[BOB], 10, time.monotonic() + 0.1), uid=BOB)


def be_hostile_with_all(memory: dict[str, Any], path: str, home: str, count: int, end: float) -> int:
    return be_hostile(memory, path, home, count, end, all_deeds=True)


def be_hostile_without_files(memory: dict[str, Any], path: str, home: str, count: int, end: float) -> int:
    return be_hostile(memory, path, home, count, end, all_deeds=False)


def _make_homes(directory: Path) -> dict[int, str]:
    homes = {}
    for name, uid in (("ann", ANN), ("bob", BOB)):
        home = directory / "tree" / name
        home.mkdir(parents=True)
        for file, contents in (("clean", b"fine"), ("bad", BAD)):
            (home / file).write_bytes(contents)
            own(home / file, uid)
        own(home, uid, 0o700)
        homes[uid] = str(home)
    return homes
