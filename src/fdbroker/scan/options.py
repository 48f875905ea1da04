"""Options of an engine, from values of JSON to its dataclass; nothing is guessed and nothing is left over."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fdbroker.config.errors import did_you_mean
from fdbroker.config.scalars import ScalarError, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_Options = TypeVar("_Options")


class Size:
    """Marks an `int` of bytes, which may be written as `100MiB`."""


class Duration:
    """Marks a `float` of seconds, which may be written as `30s`, `5min` or `2h`."""


Bytes = Annotated[int, Size]
Seconds = Annotated[float, Duration]


class OptionsError(ValueError):
    """An option is unknown, missing or ill-typed; the text names it and the cure."""


def read_options(kind: type[_Options], values: object, *, where: str) -> _Options:
    """Return an instance of the dataclass `kind` from a mapping of option names to values.

    Fields may be `bool`, `int`, `float`, `str`, `bytes` (a path, given as text), `Bytes`, `Seconds`,
    `Literal`, tuples of any length of these, and a union with None. The dataclass may refuse more by raising
    ValueError in `__post_init__`.

    Args:
        kind: a dataclass.
        values: what was configured; None is a configuration without options.
        where: what the options are for, as an error names it: `engine libclamav`.

    Raises:
        OptionsError: the first thing that is wrong.

    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise OptionsError(f"{where}: options are names with values, not {_called(values)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(typing.cast("Any", kind))}
    for name in values:
        if name not in fields:
            raise _unknown(name, fields, where)
    read = {name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in read:
            raise OptionsError(f"{where}: the option {name} must be given")
    try:
        return kind(**read)
    except ValueError as error:
        raise OptionsError(f"{where}: {error}") from error


def values_of_words(
    kind: type, words: Iterable[tuple[str, str]], *, where: str, relative: bool = False
) -> dict[str, object]:
    """Return values for `read_options` from options as a command line has them, names with texts.

    A text becomes what the field of the dataclass `kind` wants: a number, true or false, one more item of a
    list, a path: where it may be `relative`, to the working directory, it is made absolute. What can't become
    that stays as it is, for `read_options` to refuse.

    Raises:
        OptionsError: an option is not there, or is given twice and takes one value.

    """
    hints = typing.get_type_hints(kind, include_extras=True)
    values: dict[str, object] = {}
    for name, text in words:
        if name not in hints:
            raise _unknown(name, hints, where)
        hint = hints[name]
        if typing.get_origin(hint) is tuple:
            items = values.setdefault(name, [])
            typing.cast("list[object]", items).append(
                _of_word(typing.get_args(hint)[0], text, relative=relative)
            )
        elif name in values:
            raise OptionsError(f"{where}: {name} is given twice, and takes one value")
        else:
            values[name] = _of_word(hint, text, relative=relative)
    return values


def _unknown(name: object, known: Collection[str], where: str) -> OptionsError:
    cure = did_you_mean(str(name), known, f"the options are: {', '.join(known) or 'none'}")
    return OptionsError(f"{where}: there is no option {name!a}; {cure}")


def _without_marks(hint: Any) -> tuple[Any, tuple[Any, ...]]:  # noqa: ANN401 - any annotation
    """Return the type of an annotation, and what marks it (`Size`, `Duration`)."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    hint, *marks = typing.get_args(hint)
    return hint, tuple(marks)


def _but_for_none(hint: Any) -> Any:  # noqa: ANN401 - any annotation
    """Return the other type of a union with None, None if it is no union."""
    if typing.get_origin(hint) not in {typing.Union, types.UnionType}:
        return None
    return next(one for one in typing.get_args(hint) if one is not type(None))


def _of_word(hint: Any, text: str, *, relative: bool) -> object:  # noqa: ANN401 - any annotation
    hint, marks = _without_marks(hint)
    hint = _but_for_none(hint) or hint
    if hint is bool:
        return {"true": True, "false": False}.get(text, text)
    if hint is bytes and text and relative:
        return os.path.abspath(text)
    # With a unit it is for `read_options`.
    if hint in {int, float} and text.isascii() and text.isdigit():
        return int(text)
    if hint is float and Duration not in marks:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _value(hint: Any, value: object, where: str) -> object:  # noqa: ANN401 - any annotation
    hint, marks = _without_marks(hint)
    if (inner := _but_for_none(hint)) is not None:
        return None if value is None else _value(inner, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise OptionsError(f"{where}: a list is wanted, not {_called(value)}")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, one, f"{where}[{index}]") for index, one in enumerate(value))
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            shown = ", ".join(str(one) for one in choices)
            raise OptionsError(f"{where}: {value!a} is none of: {shown}")
        return value
    return _scalar(hint, marks, value, where)


def _scalar(hint: Any, marks: tuple[Any, ...], value: object, where: str) -> object:  # noqa: ANN401 - any annotation
    try:
        if Size in marks and isinstance(value, str):
            value = parse_size(value)
        if Duration in marks and isinstance(value, str):
            value = parse_duration(value)
    except ScalarError as error:
        raise OptionsError(f"{where}: {error}") from error
    if hint is bytes and isinstance(value, str):
        if not value.startswith("/") or "\0" in value:
            raise OptionsError(f"{where}: {value!a} is not an absolute path, as in /srv/x")
        return value.encode("utf-8", "surrogateescape")
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise OptionsError(f"{where}: {_WANTED[hint]} is wanted, not {_called(value)}")
    if hint in {int, float} and typing.cast("float", value) < 0:
        raise OptionsError(f"{where}: {value} is negative")
    return value


_WANTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    bytes: "an absolute path",
}


def _called(value: object) -> str:
    names = {
        dict: "names with values",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "nothing",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
