"""`NamedTuple` as typing has it, for a worker that has its files to read and no time to load typing.

To load typing and make the messages by it takes a process longer than anything
else of this package: 7 ms of a start of 30.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 - given on
else:

    class _RecordType(type):
        """Makes a named tuple of each class that has `NamedTuple` as its base."""

        def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, object]) -> type:
            """Return a subclass of tuple with the members of the class, and its annotations as the fields."""
            if not bases:
                return super().__new__(cls, name, bases, members)
            fields = list(members["__annotations__"])
            # Those that have one are the last ones: a type checker says so where it is not.
            defaults = [members.pop(field) for field in fields if field in members]
            module = members.pop("__module__")
            made = namedtuple(name, fields, defaults=defaults, module=module)  # noqa: PYI024 - see above
            for member, value in members.items():
                setattr(made, member, value)
            return made

    class NamedTuple(metaclass=_RecordType):
        """The base of a class whose annotations are the fields of a tuple."""
