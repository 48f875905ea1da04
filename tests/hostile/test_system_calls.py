"""Which system calls each confined process may make: lists for people to review, held to the truth here.

`system_calls/PROCESS.txt` has what its seccomp program allows, with the
conditions on arguments. A call is seen in a traced process, by these tests, or
has its reason beside it. What is not in the list can't be seen: it would kill.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel.bpf import KILL_PROCESS
from fdbroker.kernel.libc import MACHINE
from fdbroker.kernel.syscall_table import AUDIT_ARCH, SYSCALLS
from fdbroker.launcher import broker_seccomp, helper_seccomp
from fdbroker.sandbox import Confinement, filters
from fdbroker.scan.plugins import configure
from fdbroker.scan.supervisor import Supervisor
from tests.hostile.sessions import SESSIONS, served
from tests.hostile.tracing import calls, traced
from tests.kernel.bpf_interpreter import Call, decide
from tests.processes import children_of, wait_until
from tests.running_broker import reachable_directory
from tests.scan.descriptors import make_and_open
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fdbroker.kernel.bpf import Condition

LISTS = Path(__file__).with_name("system_calls")
WORKER_UID = FIRST_UID + 61
_LINE = re.compile(r"(?P<call>\w+)(?: if (?P<conditions>[^#]+?))?(?: *# (?P<reason>.+))?")
PROGRAMS: dict[str, tuple[object, Callable[[str], bytes]]] = {
    "broker": (broker_seccomp, broker_seccomp.broker_filter),
    "starter": (helper_seccomp, helper_seccomp.starter_filter),
    "helper": (helper_seccomp, helper_seccomp.helper_filter),
    "worker": (filters, lambda machine: filters.filter_for(Confinement(), machine)),
}


def committed(process: str) -> dict[str, tuple[str, str]]:
    """Return the conditions of each call in a list, and the reason where nobody sees it made."""
    found = {}
    for line in (LISTS / f"{process}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = _LINE.fullmatch(line)
            assert match, line
            assert match["call"] not in found, line
            found[match["call"]] = (match["conditions"] or "", match["reason"] or "")
    return found


def in_words(conditions: Sequence[Condition] | None) -> str:
    """Write down conditions: arguments are counted from 0."""
    said = []
    for condition in conditions or ():
        for (argument, mask), values in _by_argument(condition).items():
            which = f"arg{argument}" if mask in {0xFFFFFFFF, 2**64 - 1} else f"arg{argument}&{mask:#x}"
            said.append(f"{which}={'|'.join(map(hex, values))}")
    return " ".join(said)


def _by_argument(condition: Condition) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for argument, mask, value in condition:
        found.setdefault((argument, mask), []).append(value)
    return found


@pytest.mark.skipif(MACHINE != "x86_64", reason="the lists are those of x86-64")
@pytest.mark.parametrize("process", PROGRAMS)
def test_list_is_what_the_seccomp_program_allows(monkeypatch: pytest.MonkeyPatch, process: str) -> None:
    module, make = PROGRAMS[process]
    allowed: dict[str, Sequence[Condition] | None] = {}

    def note(given: Mapping[str, Sequence[Condition] | None], **_others: object) -> bytes:
        allowed.update(given)
        return b""

    monkeypatch.setattr(module, "assemble", note)
    make("x86_64")
    assert {call: said for call, (said, _) in committed(process).items()} == {
        call: in_words(conditions) for call, conditions in allowed.items()
    }


@pytest.mark.parametrize("process", PROGRAMS)
@pytest.mark.parametrize("machine", sorted(SYSCALLS))
def test_whatever_the_list_does_not_have_kills_also_calls_of_kernels_to_come(
    process: str, machine: str
) -> None:
    program = PROGRAMS[process][1](machine)
    ours = {number for call, number in SYSCALLS[machine].items() if call in committed(process)}
    for number in {
        *range(1024),
        2**31 - 1,
        2**32 - 1,
        *(0x40000000 | number for number in range(600)),
    } - ours:
        for words in ((0,) * 6, (2**64 - 1,) * 6):
            assert decide(program, Call(number, words, AUDIT_ARCH[machine])) == KILL_PROCESS, number


def check(process: str, seen: set[str]) -> None:
    """Check that a list has what was seen, and that the rest has its reasons."""
    listed = committed(process)
    assert seen <= listed.keys(), f"{process} made calls that it may not: {sorted(seen - listed.keys())}"
    unexplained = {call for call, (_, reason) in listed.items() if not reason} - seen
    assert not unexplained, f"{process} may make calls that nothing here needs: {sorted(unexplained)}"


@pytest.mark.root
@pytest.mark.unmeasured
@pytest.mark.skipif(MACHINE != "x86_64", reason="the lists are those of x86-64")
def test_broker_and_helpers_make_each_call_of_their_lists_or_it_has_its_reason(tmp_path: Path) -> None:
    with contextlib.ExitStack() as after, contextlib.ExitStack() as running:
        directory = after.enter_context(reachable_directory())
        place = running.enter_context(served(directory))
        broker = place.broker.pid
        starter, helpers = place.broker.starter_and_helpers()
        after.enter_context(traced([broker, starter, *helpers], tmp_path / "calls", forks=True))
        for session in SESSIONS.values():
            assert session(place).answered
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
        wait_until(lambda: not set(helpers) & set(children_of(starter)), "the helpers are gone")
        wait_until(lambda: SESSIONS["open_by_helpers"](place).got, "others have come")
        running.close()  # it is stopped before strace is
    seen = by_process(tmp_path / "calls", broker, starter, helpers)
    for process, names in seen.items():
        check(process, names)


def by_process(written: Path, broker: int, starter: int, helpers: Sequence[int]) -> dict[str, set[str]]:
    """Return which calls each of them made. What the starter forks is a helper from its program on.

    So is one of `helpers` that has not come so far when it is traced.
    """
    seen: dict[str, set[str]] = {"broker": set(), "starter": set(), "helper": set()}
    made: dict[int, list[str]] = {}
    for pid, call in re.findall(r"^(\d+) +(\w+)\(", written.read_text(), re.MULTILINE):
        made.setdefault(int(pid), []).append(call)
    for pid, names in made.items():
        if pid in {broker, starter}:
            seen["broker" if pid == broker else "starter"].update(names)
            continue
        confined = names.index("seccomp") + 1 if "seccomp" in names else 0 if pid in helpers else len(names)
        seen["starter"].update(names[:confined])
        seen["helper"].update(names[confined:])
    return seen


@pytest.mark.root
@pytest.mark.unmeasured
@pytest.mark.skipif(MACHINE != "x86_64", reason="the lists are those of x86-64")
def test_worker_makes_each_call_of_its_list_or_it_has_its_reason(tmp_path: Path) -> None:
    with Supervisor([configure("hashes")], ids=(WORKER_UID, WORKER_UID)) as supervisor:
        supervisor.start()
        assert supervisor.worker_pid is not None
        with traced([supervisor.worker_pid], tmp_path / "calls"):
            for name in ("first", "second"):
                list(supervisor.submit(b"file", make_and_open(tmp_path / name, bytes(300_000))))
                assert [done.size for done in supervisor.finish()] == [300_000]
        check("worker", set(calls((tmp_path / "calls").read_text())))
