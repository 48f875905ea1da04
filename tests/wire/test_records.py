"""Named tuples that are made without typing are those that typing would make."""

from __future__ import annotations

import typing

import pytest

from fdbroker.wire import records


class Ours(records.NamedTuple):
    """Two numbers."""

    first: int
    second: int = 2

    @property
    def both(self) -> int:
        """Their sum."""
        return self.first + self.second

    @classmethod
    def of(cls, first: int) -> Ours:
        """Make one."""
        return cls(first)


class Theirs(typing.NamedTuple):
    """Two numbers."""

    first: int
    second: int = 2


def test_a_record_is_a_tuple_with_names_defaults_and_what_its_class_has() -> None:
    made = Ours.of(1)
    assert made == (1, 2) == Theirs(1)
    assert isinstance(made, tuple)
    assert (made.first, made.second, made.both) == (1, 2, 3)
    assert made._replace(first=5) == Ours(5, second=2)
    assert repr(made) == "Ours(first=1, second=2)"


@pytest.mark.parametrize("name", ["_fields", "_field_defaults", "__doc__", "__module__"])
def test_a_class_of_records_says_of_itself_what_one_of_typing_does(name: str) -> None:
    assert getattr(Ours, name) == getattr(Theirs, name)
    assert typing.get_type_hints(Ours) == typing.get_type_hints(Theirs)


def test_a_record_takes_what_it_has_names_for() -> None:
    for arguments in ((), (1, 2, 3)):
        with pytest.raises(TypeError):
            Ours(*arguments)
    with pytest.raises(TypeError):
        Ours(1, third=3)  # type: ignore[call-arg]


def test_a_record_can_not_be_changed() -> None:
    with pytest.raises(AttributeError):
        Ours(1).first = 2  # type: ignore[misc]
