from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fdbroker import sandbox
from fdbroker.sandbox import CallError, Limits, Profile, ZygoteError
from tests.sandbox import puppets
from tests.sandbox.confined import PUPPETS, confinement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fdbroker.sandbox import Confinement


def run(
    function: str | Callable[..., object],
    *fds: int,
    arguments: dict[str, object] | None = None,
    wanted: Confinement | None = None,
    timeout: float = 60.0,
    longest: int = 1 << 24,
) -> object:
    return sandbox.run(
        function, fds, arguments, confinement=wanted or confinement(), timeout=timeout, longest=longest
    )


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_text("here are letters")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("function", [puppets.count, f"{PUPPETS}:count"])
def test_function_reads_what_it_was_given_and_its_result_comes_back(
    function: str | Callable[..., object], file: int
) -> None:
    assert run(function, file) == {"size": 16, "count": 5}
    assert run(function, file, arguments={"word": "re"}) == {"size": 16, "count": 2}


@pytest.mark.parametrize("number", [0, 1, 65536, 65537, 1_000_000])
def test_bytes_of_any_length_come_back(number: int) -> None:
    assert run(puppets.many_bytes, arguments={"number": number}) == b"x" * number


def test_result_that_is_too_long_is_an_error() -> None:
    with pytest.raises(CallError, match="more than 70000 bytes"):
        run(puppets.many_bytes, arguments={"number": 70_001}, longest=70_000)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (puppets.raises, "the function raised ValueError: this is no archive"),
        (puppets.no_json, "the function raised TypeError: Object of type set is not JSON serializable"),
        (puppets.opens, r"the function returned nothing: it made a system call .* \(SIGSYS\)"),
    ],
)
def test_function_that_fails_is_an_error_that_says_how(function: Callable[..., object], text: str) -> None:
    with pytest.raises(CallError, match=text):
        run(function)


def test_function_that_takes_too_long_is_ended() -> None:
    with pytest.raises(CallError, match="took too long"):
        run(puppets.sleeps, timeout=1.5)


def test_function_that_can_not_be_imported_is_an_error() -> None:
    with pytest.raises(ZygoteError, match=r"ImportError: .* has no such"):
        run(f"{PUPPETS}:such")
    with pytest.raises(ValueError, match="can't be imported by its name"):
        run(lambda: 1)


def test_more_descriptors_than_the_limit_allows_are_refused(file: int) -> None:
    with pytest.raises(ValueError, match=r"see Limits\.descriptors, which is 5"):
        run(puppets.count, file, file, wanted=confinement(limits=Limits(descriptors=5)))
    assert run(puppets.count, file, wanted=confinement(limits=Limits(descriptors=5))) is not None


def test_profile_for_programs_is_none_for_a_function() -> None:
    with pytest.raises(ValueError, match="for `spawn`"):
        run(puppets.count, wanted=confinement(profile=Profile.PROGRAM, program=b"/bin/true"))


def test_nothing_stays_open_after_a_call(file: int) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    run(puppets.count, file)
    assert sorted(os.listdir("/proc/self/fd")) == before
