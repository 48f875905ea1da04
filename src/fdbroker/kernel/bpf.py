"""Assemble a seccomp program from a list of what is allowed.

The result is an array of struct sock_filter (linux/filter.h), for
`fdbroker.kernel.seccomp.install`. seccomp(2), section "Filters".

A system call is allowed without conditions, or if all its conditions hold. A
condition is a choice of masked comparisons of one or more arguments, each
compared in all 64 bits that its mask names. Everything else gets one action;
calls by a foreign architecture's entry, or by x32, kill the process, since
their numbers mean other calls.

The program is a binary search over the number, with the tests of the arguments
as its leaves. It is built from its end, so every jump goes to what is there
already and its distance is known: the 8 bits of a conditional jump reach 255
instructions, and a farther target gets an unconditional jump (32 bits) on the
way. Equal instructions with equal targets are one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.syscall_table import AUDIT_ARCH, SYSCALLS, X32_SYSCALL_BIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# linux/seccomp.h: what a program returns.
KILL_PROCESS = 0x80000000  # Linux 4.14
LOG = 0x7FFC0000  # allow, and write it to the audit log; Linux 4.14
ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_MAX_ERRNO = 4095

# linux/bpf_common.h
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP = 0x05  # BPF_JMP | BPF_JA
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_IF_NOT_LESS = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_IF_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# struct seccomp_data: int nr, u32 arch, u64 instruction_pointer, u64 args[6].
# Both machines are little-endian: the lower half comes first.
_NUMBER = 0
_ARCHITECTURE = 4
_ARGUMENTS = 16
_ARGUMENT_COUNT = 6

_INSTRUCTION = struct.Struct("=HBBI")
_MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
_REACH = 255
_LOW = 0xFFFFFFFF
_ALL = 0xFFFFFFFFFFFFFFFF


class Comparison(NamedTuple):
    """True if `argument & mask == value`; the first argument is 0."""

    argument: int
    mask: int
    value: int


# A condition holds if one of its comparisons does.
Condition = tuple[Comparison, ...]


def masked(argument: int, mask: int, value: int) -> Condition:
    """Return the condition `argument & mask == value`.

    Raises:
        ValueError: it would hold for every value, or for none.

    """
    if not 0 <= argument < _ARGUMENT_COUNT or not 0 < mask <= _ALL or value & ~mask:
        raise ValueError(f"no such comparison: argument {argument}, mask {mask:#x}, value {value:#x}")
    return (Comparison(argument, mask, value),)


def equal(argument: int, value: int) -> Condition:
    """Return the condition that all 64 bits of an argument are `value`: pointers, sizes, unsigned long."""
    return masked(argument, _ALL, value)


def equal_int(argument: int, value: int) -> Condition:
    """Return the condition that an `int` argument is `value`.

    The kernel looks at the lower half alone and user space may leave anything
    in the upper one.
    """
    return masked(argument, _LOW, value & _LOW)


def one_of(argument: int, values: Iterable[int]) -> Condition:
    """Return the condition that all 64 bits of an argument are one of `values`."""
    return either(*(equal(argument, value) for value in values))


def one_int_of(argument: int, values: Iterable[int]) -> Condition:
    """Return the condition that an `int` argument is one of `values`."""
    return either(*(equal_int(argument, value) for value in values))


def without_bits(argument: int, bits: int) -> Condition:
    """Return the condition that none of `bits` is set in an argument."""
    return masked(argument, bits, 0)


def either(*conditions: Condition) -> Condition:
    """Return the condition that at least one of `conditions` holds.

    Raises:
        ValueError: there is none.

    """
    if not conditions:
        raise ValueError("a condition without a choice never holds")
    return tuple(comparison for condition in conditions for comparison in condition)


def errno_action(number: int) -> int:
    """Return the action that makes a call fail with this errno.

    Raises:
        ValueError: there is no such errno (0 would be a success).

    """
    if not 0 < number <= _MAX_ERRNO:
        raise ValueError(f"{number} is no errno")
    return _ERRNO | number


def assemble(
    allowed: Mapping[str, Sequence[Condition] | None],
    *,
    machine: str,
    otherwise: int = KILL_PROCESS,
    errnos: Mapping[str, int] | None = None,
) -> bytes:
    """Return the program.

    `allowed` is name -> conditions that must all hold, or None for none.
    `errnos` is name -> errno for calls that are refused gently; a call that is
    also in `allowed` gets it where its conditions do not hold. `otherwise` is
    the action for the rest.

    Raises:
        ValueError: a name that `machine` does not have, an errno for a call that
            is allowed without conditions, a list of conditions that is empty, or
            a program longer than the kernel takes.

    """
    errnos = errnos or {}
    if machine not in SYSCALLS:
        raise ValueError(f"no system call table for {machine}, only for {', '.join(SYSCALLS)}")
    unknown = sorted((allowed.keys() | errnos.keys()) - SYSCALLS[machine].keys())
    if unknown:
        raise ValueError(f"{machine} has no system call {', '.join(unknown)}")
    program = _Program()
    default = program.give(otherwise)
    starts: dict[int, int] = {}  # number -> where its instructions start
    for name in sorted(allowed.keys() | errnos.keys(), key=SYSCALLS[machine].__getitem__):
        refuse = program.give(errno_action(errnos[name])) if name in errnos else default
        start = refuse
        if name in allowed:
            conditions = allowed[name]
            if conditions is None and name in errnos:
                raise ValueError(f"{name} is allowed without conditions, so an errno for it means nothing")
            if conditions is not None and not conditions:
                raise ValueError(f"{name} has an empty list of conditions: say None if it is always allowed")
            start = program.give(ALLOW)
            for condition in reversed(conditions or ()):
                start = _test_condition(program, condition, start, refuse)
        starts[SYSCALLS[machine][name]] = start
    start = _search(program, _segments(program, starts, default, machine))
    # Numbers mean something only for one architecture, so that comes first.
    kill = program.give(KILL_PROCESS)
    start = program.load(_NUMBER, start)
    start = program.jump_if(_JUMP_IF_EQUAL, AUDIT_ARCH[machine], start, kill)
    program.load(_ARCHITECTURE, start)
    return program.to_bytes()


class _Program:
    """Instructions, the last one first. A place is an index into them, so it never changes."""

    def __init__(self) -> None:
        self._reversed: list[tuple[int, int, int, int]] = []
        self._known: dict[tuple[int, ...], int] = {}

    def give(self, action: int) -> int:
        """Return the place of a return of this action."""
        if (_RETURN, action) not in self._known:
            self._known[_RETURN, action] = self._append(_RETURN, 0, 0, action)
        return self._known[_RETURN, action]

    def load(self, offset: int, then: int) -> int:
        """Return the place of: load a word of struct seccomp_data, go on at `then`."""
        return self._before(_LOAD, offset, then)

    def keep_bits(self, mask: int, then: int) -> int:
        """Return the place of: and the word with `mask`, go on at `then`."""
        return self._before(_AND, mask, then)

    def jump_if(self, operation: int, value: int, yes: int, no: int) -> int:
        """Return the place of a conditional jump."""
        if yes == no:
            return yes
        key = (operation, value, yes, no)
        if key not in self._known:
            # The unconditional jump for `no` moves `yes` one instruction away, so it goes first.
            no = self._within_reach(no, _REACH - 1)
            yes = self._within_reach(yes, _REACH)
            self._known[key] = self._append(operation, self._distance(yes), self._distance(no), value)
        return self._known[key]

    def to_bytes(self) -> bytes:
        """Return the array of struct sock_filter.

        Raises:
            ValueError: the kernel would not take it.

        """
        if len(self._reversed) > _MAX_INSTRUCTIONS:
            raise ValueError(f"{len(self._reversed)} instructions; the kernel takes {_MAX_INSTRUCTIONS}")
        return b"".join(_INSTRUCTION.pack(*instruction) for instruction in reversed(self._reversed))

    def _before(self, operation: int, value: int, then: int) -> int:
        """Return the place of an instruction that falls through to `then`."""
        key = (operation, value, then)
        if key not in self._known:
            self._within_reach(then, 0)
            self._known[key] = self._append(operation, 0, 0, value)
        return self._known[key]

    def _within_reach(self, place: int, reach: int) -> int:
        """Return `place`, or that of a new jump to it if it is farther than `reach` from here."""
        distance = self._distance(place)
        return place if distance <= reach else self._append(_JUMP, 0, 0, distance)

    def _distance(self, place: int) -> int:
        """Return how many instructions lie between the next one to be added and `place`."""
        return len(self._reversed) - place - 1

    def _append(self, operation: int, yes: int, no: int, value: int) -> int:
        self._reversed.append((operation, yes, no, value))
        return len(self._reversed) - 1


def _test_condition(program: _Program, condition: Condition, holds: int, fails: int) -> int:
    """Return where to start for going to `holds` if one comparison is true, else to `fails`."""
    for argument, mask, value in reversed(condition):
        start = holds
        for offset, half_mask, half in ((4, mask >> 32, value >> 32), (0, mask & _LOW, value & _LOW)):
            place = _ARGUMENTS + 8 * argument + offset
            if half_mask and not half:
                start = program.load(place, program.jump_if(_JUMP_IF_ANY_BIT, half_mask, fails, start))
            elif half_mask:
                start = program.jump_if(_JUMP_IF_EQUAL, half, start, fails)
                start = program.load(
                    place, start if half_mask == _LOW else program.keep_bits(half_mask, start)
                )
        fails = start
    return fails


def _segments(
    program: _Program, starts: Mapping[int, int], default: int, machine: str
) -> list[tuple[int, int]]:
    """Return (first number, where to go) for each run of numbers that go to one place."""
    places = {0: default}
    places.update((number + 1, default) for number in starts)
    places.update(starts)
    if machine == "x86_64":
        places[X32_SYSCALL_BIT] = program.give(KILL_PROCESS)
    segments: list[tuple[int, int]] = []
    for number, place in sorted(places.items()):
        if not segments or segments[-1][1] != place:
            segments.append((number, place))
    return segments


def _search(program: _Program, segments: Sequence[tuple[int, int]]) -> int:
    """Return where to start for a binary search of the loaded number."""
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    right = _search(program, segments[middle:])
    left = _search(program, segments[:middle])
    return program.jump_if(_JUMP_IF_NOT_LESS, segments[middle][0], right, left)
