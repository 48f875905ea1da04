"""The assembler, against a model of what was asked for and against the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.kernel import bpf, process, seccomp
from fdbroker.kernel.libc import LIBC, MACHINE
from fdbroker.kernel.syscall_table import AUDIT_ARCH, SYSCALLS, X32_SYSCALL_BIT
from tests.kernel.bpf_interpreter import Call, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tests.kernel.conftest import Children

Allowed = dict[str, "Sequence[bpf.Condition] | None"]
EPERM = bpf.errno_action(errno.EPERM)
NATIVE = AUDIT_ARCH[MACHINE]


def expected(
    allowed: Mapping[str, Sequence[bpf.Condition] | None],
    errnos: Mapping[str, int],
    otherwise: int,
    call: Call,
    machine: str = "x86_64",
) -> int:
    """Say what a program should decide, in the plainest way."""
    if call.architecture != AUDIT_ARCH[machine] or (machine == "x86_64" and call.number >= X32_SYSCALL_BIT):
        return bpf.KILL_PROCESS
    for name, number in SYSCALLS[machine].items():
        if number != call.number:
            continue
        if name in allowed and all(
            any(call.arguments[c.argument] & c.mask == c.value for c in condition)
            for condition in allowed[name] or ()
        ):
            return bpf.ALLOW
        if name in errnos:
            return bpf.errno_action(errnos[name])
    return otherwise


NOTED = [*range(9), 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0xFFFFFFFF00000000]
WORDS = st.integers(0, 2**64 - 1) | st.sampled_from(NOTED)
MASKS = st.integers(1, 2**64 - 1) | st.sampled_from(NOTED[1:])


@st.composite
def conditions(draw: st.DrawFn) -> bpf.Condition:
    def comparison() -> bpf.Condition:
        mask = draw(MASKS)
        return bpf.masked(draw(st.integers(0, 5)), mask, draw(WORDS) & mask)

    return bpf.either(*(comparison() for _ in range(draw(st.integers(1, 3)))))


RULES = st.none() | st.lists(conditions(), min_size=1, max_size=2)


@st.composite
def calls_about(draw: st.DrawFn, allowed: Allowed, machine: str) -> Call:
    """Give calls near to what is allowed: most others would meet the same refusal."""
    name = draw(st.sampled_from(sorted(allowed))) if allowed else "read"
    arguments = [draw(WORDS)] * 6
    # As each condition has it, or a bit beside it; what is not asked for is there now and then.
    for condition in allowed.get(name) or ():
        one = draw(st.sampled_from(condition))
        beside = draw(st.sampled_from([0, 0, 0, ~one.mask, ~one.mask, 1, 1 << 32]))
        arguments[one.argument] = (one.value ^ beside) & 2**64 - 1
    number = SYSCALLS[machine][name]
    others = [number + 1, abs(number - 1), number | X32_SYSCALL_BIT, *range(0, 500, 60), 2**31, 2**32 - 1]
    return Call(
        draw(st.sampled_from([number] * 20 + others)),
        tuple(arguments),
        draw(st.sampled_from([AUDIT_ARCH[machine]] * 15 + [0x40000003])),
    )


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@given(data=st.data())
def test_a_program_decides_what_was_asked_for(machine: str, data: st.DataObject) -> None:
    names = sorted(SYSCALLS[machine])
    allowed: Allowed = data.draw(st.dictionaries(st.sampled_from(names), RULES, max_size=12))
    free = sorted(set(names) - {name for name, rule in allowed.items() if rule is None})
    errnos = data.draw(st.dictionaries(st.sampled_from(free), st.integers(1, 4095), max_size=10))
    otherwise = data.draw(st.sampled_from([bpf.KILL_PROCESS, EPERM, bpf.LOG, bpf.ALLOW]))
    program = bpf.assemble(allowed, machine=machine, otherwise=otherwise, errnos=errnos)
    for call in data.draw(st.lists(calls_about(allowed, machine), min_size=1, max_size=10)):
        assert decide(program, call) == expected(allowed, errnos, otherwise, call, machine)


@given(st.integers(1, 130), st.integers(1, 6), st.integers(0, 2**64 - 1))
@example(130, 6, 0)
def test_targets_farther_than_a_conditional_jump_reaches_are_reached(
    values: int, rules: int, other: int
) -> None:
    names = sorted(SYSCALLS["x86_64"])[:rules]
    allowed: Allowed = {
        name: [
            bpf.one_of(index % 6, range(index << 32, (index << 32) + values)),
            bpf.without_bits(5, 1 << 40),
        ]
        for index, name in enumerate(names)
    }
    # The refusal of each call differs, so none of them is near to all that go there.
    errnos = {name: index + 1 for index, name in enumerate(names)}
    program = bpf.assemble(allowed, machine="x86_64", errnos=errnos)
    for index, name in enumerate(names):
        for value in (index << 32, (index << 32) + values - 1, (index << 32) + values, other):
            for last in (0, 1 << 40):
                arguments = [0, 0, 0, 0, 0, last]
                arguments[index % 6] |= value
                call = Call(SYSCALLS["x86_64"][name], tuple(arguments))
                assert decide(program, call) == expected(allowed, errnos, bpf.KILL_PROCESS, call)


@pytest.mark.parametrize("yes_distance", [0, 1, 253, 254, 255, 256, 257])
@pytest.mark.parametrize("no_distance", [0, 1, 253, 254, 255, 256, 257])
def test_both_ways_of_a_jump_arrive_at_every_distance(yes_distance: int, no_distance: int) -> None:
    program = bpf._Program()
    places: dict[int, int] = {}
    place = program.give(3)
    for distance in range(259, -1, -1):
        place = program.load(4 * (distance % 4), place)  # what is between
        if distance in {yes_distance, no_distance}:
            places[distance] = place = program.give(1000 + distance)
    start = program.jump_if(0x35, 5, places[yes_distance], places[no_distance])
    program.load(0, start)
    assembled = program.to_bytes()
    assert decide(assembled, Call(5)) == 1000 + yes_distance
    assert decide(assembled, Call(4)) == 1000 + no_distance


def test_each_system_call_alone_is_told_from_its_neighbours() -> None:
    for machine, numbers in SYSCALLS.items():
        everything = bpf.assemble(dict.fromkeys(numbers), machine=machine)
        for name, number in numbers.items():
            alone = bpf.assemble({name: None}, machine=machine)
            for step, action in ((-1, bpf.KILL_PROCESS), (0, bpf.ALLOW), (1, bpf.KILL_PROCESS)):
                call = Call((number + step) & 0xFFFFFFFF, architecture=AUDIT_ARCH[machine])
                assert decide(alone, call) == action
                assert decide(everything, call) == expected(
                    dict.fromkeys(numbers), {}, bpf.KILL_PROCESS, call, machine
                )


def test_a_program_for_many_calls_takes_few_steps() -> None:
    allowed: Allowed = dict.fromkeys(sorted(SYSCALLS["x86_64"])[::2])
    program = bpf.assemble(allowed, machine="x86_64")
    # Ranges of equal outcome are one, returns are shared: a jump for each border, and the head.
    assert len(program) // 8 < 2 * len(allowed) + 10


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("otherwise", [bpf.ALLOW, EPERM])
def test_a_foreign_architecture_is_killed(machine: str, otherwise: int) -> None:
    program = bpf.assemble({"read": None}, machine=machine, otherwise=otherwise)
    number = SYSCALLS[machine]["read"]
    foreign = {*AUDIT_ARCH.values(), 0x40000003, 0} - {AUDIT_ARCH[machine]}
    assert {decide(program, Call(number, architecture=code)) for code in foreign} == {bpf.KILL_PROCESS}
    assert decide(program, Call(number, architecture=AUDIT_ARCH[machine])) == bpf.ALLOW


@pytest.mark.parametrize("otherwise", [bpf.ALLOW, EPERM])
def test_x32_is_killed(otherwise: int) -> None:
    program = bpf.assemble({"read": None}, machine="x86_64", otherwise=otherwise)
    for number in (X32_SYSCALL_BIT, X32_SYSCALL_BIT | 514, 0x7FFFFFFF, 0xFFFFFFFF):
        assert decide(program, Call(number)) == bpf.KILL_PROCESS


def test_the_upper_half_of_an_int_argument_does_not_matter_and_that_of_a_long_does() -> None:
    program = bpf.assemble(
        {"fcntl": [bpf.equal_int(1, 3)], "lseek": [bpf.equal(1, 3)]}, machine="x86_64", otherwise=EPERM
    )
    garbage = (0, 0xDEAD_0000_0003, 0, 0, 0, 0)
    assert decide(program, Call(SYSCALLS["x86_64"]["fcntl"], garbage)) == bpf.ALLOW
    assert decide(program, Call(SYSCALLS["x86_64"]["lseek"], garbage)) == EPERM


def test_a_negative_int_is_compared_as_the_kernel_sees_it() -> None:
    program = bpf.assemble({"openat": [bpf.equal_int(0, -100)]}, machine="x86_64", otherwise=EPERM)
    for at_fdcwd in (0xFFFFFF9C, 0xFFFFFFFFFFFFFF9C):
        call = Call(SYSCALLS["x86_64"]["openat"], (at_fdcwd, 0, 0, 0, 0, 0))
        assert decide(program, call) == bpf.ALLOW


@pytest.mark.parametrize(
    ("allowed", "errnos", "machine", "text"),
    [
        ({"raed": None}, {}, "x86_64", "raed"),
        ({"open": None}, {}, "aarch64", "aarch64 has no system call open"),
        ({}, {"raed": 1}, "x86_64", "raed"),
        ({"read": None}, {}, "sparc", "sparc"),
        ({"read": None}, {"read": 1}, "x86_64", "read is allowed without conditions"),
        ({"read": []}, {}, "x86_64", "empty list of conditions"),
    ],
)
def test_a_list_that_means_nothing_is_refused(
    allowed: Allowed, errnos: dict[str, int], machine: str, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        bpf.assemble(allowed, machine=machine, errnos=errnos)


@pytest.mark.parametrize(
    ("argument", "mask", "value"),
    [(6, 1, 1), (-1, 1, 1), (0, 0, 0), (0, 1, 2), (0, 2**64, 0), (0, -1, 0), (0, 1, -1)],
)
def test_a_comparison_that_is_always_or_never_true_is_refused(argument: int, mask: int, value: int) -> None:
    with pytest.raises(ValueError, match="no such comparison"):
        bpf.masked(argument, mask, value)


@pytest.mark.parametrize("number", [0, -1, 4096])
def test_an_action_for_no_errno_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="is no errno"):
        bpf.errno_action(number)


def test_a_choice_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="never holds"):
        bpf.one_of(0, [])


def test_a_program_that_the_kernel_would_not_take_is_refused() -> None:
    values = [index * 0x1_0000_0001 for index in range(2000)]
    with pytest.raises(ValueError, match="4096"):
        bpf.assemble({"read": [bpf.one_of(0, values)]}, machine="x86_64")


# ---- the tables ----


def numbers_of(header: str) -> dict[str, int]:
    """Return the `#define`s of a header of the C library, following one level of names."""
    found: dict[str, str] = dict(
        re.findall(r"^#define (__NR\w*)\s+(\w+)", Path(header).read_text(), re.MULTILINE)
    )
    numbers = {name.removeprefix("__NR_"): found.get(value, value) for name, value in found.items()}
    return {
        name: int(value) for name, value in numbers.items() if value.isdigit() and not name.startswith("__NR")
    }


def header(*candidates: str) -> str:
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    pytest.skip(f"none of these is installed: {', '.join(candidates)}")


def assert_agree(ours: Mapping[str, int], theirs: Mapping[str, int], but: Iterable[str] = ()) -> None:
    assert {name: number for name, number in theirs.items() if name not in {*but}}.items() <= ours.items()
    newest = max(theirs.values())
    assert {number for number in ours.values() if number <= newest} >= set(theirs.values())


def test_the_numbers_of_x86_64_are_those_of_the_header() -> None:
    theirs = numbers_of(
        header("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h")
    )
    assert len(theirs) > 300
    assert_agree(SYSCALLS["x86_64"], theirs)


def test_the_numbers_of_aarch64_are_those_of_the_generic_header() -> None:
    theirs = numbers_of(header("/usr/include/asm-generic/unistd.h"))
    assert len(theirs) > 300
    # What the header has for 32-bit machines, and its own bookkeeping.
    but = {name for name in theirs if re.search(r"64$|64_64$|^mmap2$|^llseek$|^sync_file_range2$", name)}
    but -= {"pread64", "pwrite64", "getdents64", "prlimit64", "fadvise64"}
    but |= {"syscalls", "arch_specific_syscall"}
    theirs = {name: number for name, number in theirs.items() if name not in but}
    assert_agree(SYSCALLS["aarch64"], theirs)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_no_number_has_two_names_and_the_newest_calls_are_there(machine: str) -> None:
    numbers = SYSCALLS[machine]
    assert len(set(numbers.values())) == len(numbers)
    assert {"mseal", "removexattrat", "openat2", "open_tree_attr"} <= numbers.keys()
    assert numbers["mseal"] == 462
    assert numbers["uprobe" if machine == "x86_64" else "kexec_file_load"] == 336 - 42 * (
        machine == "aarch64"
    )


# ---- the kernel ----

# What a Python process needs to answer and to end.
TO_ANSWER: Allowed = dict.fromkeys(
    ["write", "exit_group", "brk", "munmap", "madvise", "rt_sigprocmask", "futex"]
)


def confine(
    allowed: Allowed, otherwise: int = bpf.KILL_PROCESS, errnos: dict[str, int] | None = None
) -> None:
    process.set_no_new_privs()
    more: Allowed = {**TO_ANSWER, "mmap": [bpf.without_bits(2, mmap.PROT_EXEC)], **allowed}
    seccomp.install(bpf.assemble(more, machine=MACHINE, otherwise=otherwise, errnos=errnos))


def error_of(name: str, *arguments: int) -> int:
    """Make a system call and return its errno, 0 if it succeeded."""
    words = [ctypes.c_long(argument) for argument in arguments]
    ctypes.set_errno(0)
    LIBC.syscall(ctypes.c_long(SYSCALLS[MACHINE][name]), *words)
    return ctypes.get_errno()


def test_the_kernel_refuses_what_is_not_listed(in_child: Children) -> None:
    def child() -> list[int]:
        confine({"getppid": None}, otherwise=EPERM, errnos={"getpgid": errno.ENOTTY})
        return [error_of("getppid"), error_of("getsid", 0), error_of("getpgid", 0)]

    assert in_child(child) == [0, errno.EPERM, errno.ENOTTY]


def test_the_kernel_kills_for_what_is_not_listed(in_child: Children) -> None:
    def child() -> None:
        confine({})
        os.getppid()

    assert in_child.killed_by(child) == signal.SIGSYS


def test_the_kernel_compares_arguments_as_the_model_does(in_child: Children) -> None:
    # lseek(-1, ...) is EBADF where it is allowed.
    allowed: Allowed = {
        "lseek": [
            bpf.equal_int(0, -1),
            bpf.either(bpf.masked(1, 0xFF00_0000_0000_FF00, 0x1200_0000_0000_3400), bpf.equal(1, 7)),
            bpf.without_bits(2, 1 << 33),
        ]
    }
    calls = [
        (-1, 7, 0),
        (-1, 7 | 1 << 32, 0),
        (-1, 0x12FF_FFFF_FFFF_34FF, 0),
        (-1, 0x1200_0000_0000_3500, 0),
        (-1, 0x1300_0000_0000_3400, 0),
        (-1, 7, 1 << 33),
        (-1, 7, 1 << 34),
        (1, 7, 0),
    ]

    def child() -> list[int]:
        confine(allowed, otherwise=EPERM)
        return [error_of("lseek", *call) for call in calls]

    words = [(*(argument & 2**64 - 1 for argument in call), 0, 0, 0) for call in calls]
    model = [
        expected(allowed, {}, EPERM, Call(SYSCALLS[MACHINE]["lseek"], w, NATIVE), MACHINE) for w in words
    ]
    assert in_child(child) == [errno.EBADF if action == bpf.ALLOW else errno.EPERM for action in model]
    assert {*model} == {bpf.ALLOW, EPERM}


def test_the_kernel_takes_a_program_with_long_jumps(in_child: Children) -> None:
    values = [index * 0x1_0000_0001 for index in range(1, 700)]

    def child() -> list[int]:
        confine({"getpgid": None, "lseek": [bpf.one_of(1, values)]}, otherwise=EPERM)
        known = (values[0], values[-1], values[-1] + 1)
        return [
            error_of("getpgid", 0),
            error_of("getsid", 0),
            *(error_of("lseek", -1, value, 0) for value in known),
        ]

    assert in_child(child) == [0, errno.EPERM, errno.EBADF, errno.EBADF, errno.EPERM]


@pytest.mark.skipif(MACHINE != "x86_64", reason="x32 is an ABI of x86_64")
def test_the_kernel_kills_a_call_by_x32_even_where_all_others_are_allowed(in_child: Children) -> None:
    def child() -> None:
        process.set_no_new_privs()
        seccomp.install(bpf.assemble({}, machine="x86_64", otherwise=bpf.ALLOW))
        LIBC.syscall(ctypes.c_long(X32_SYSCALL_BIT | SYSCALLS["x86_64"]["getpid"]))

    assert in_child.killed_by(child) == signal.SIGSYS


@pytest.mark.skipif(MACHINE != "x86_64", reason="int 0x80 is an instruction of x86")
def test_the_kernel_kills_a_call_by_the_32_bit_entry(in_child: Children) -> None:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b8 14 00 00 00  cd 80  c3"))  # mov eax, 20 (getpid); int 0x80; ret
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def unfiltered() -> bool:
        return call() == os.getpid()

    def child() -> None:
        process.set_no_new_privs()
        seccomp.install(bpf.assemble({}, machine="x86_64", otherwise=bpf.ALLOW))
        call()

    status, _ = in_child._run(unfiltered)
    if os.WIFSIGNALED(status):
        pytest.skip("this kernel has no 32-bit entry")
    assert in_child.killed_by(child) == signal.SIGSYS
