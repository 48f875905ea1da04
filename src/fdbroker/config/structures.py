"""Keys of a YAML mapping as a class, which readers of files and the JSON Schema take from there.

    class Root(Structure):
        '''A tree that can be reached.'''

        path: Annotated[str, Meta(min_length=1, description="Absolute path of a directory.")]
        opens: Literal["loop", "helpers"] = "loop"
        in_: str | UnsetType = key_named("in", default=UNSET)

The classes only describe; nothing is ever made of one. A key with a default
may be left out; with the default UNSET, that is not the same as any value.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, get_args, get_origin

JsonSchema: TypeAlias = dict[str, Any]


class UnsetType:
    """The type of UNSET, for annotations."""


UNSET: Final = UnsetType()


class Meta(NamedTuple):
    """What an annotation says of a value besides its type.

    `min_length` is of a text, a list or a mapping; `ge` and `le` bound a
    number, both included; `extra_json_schema` is for the JSON Schema alone.
    """

    description: str | None = None
    pattern: str | None = None
    min_length: int | None = None
    ge: int | None = None
    le: int | None = None
    extra_json_schema: Mapping[str, Any] | None = None


class _Key(NamedTuple):
    name: str
    default: object


_REQUIRED: Final = object()


def key_named(name: str, default: object = _REQUIRED) -> Any:  # noqa: ANN401 - it stands for a value of any type
    """Give a key a name that is no attribute's, as `in`. It is required if it has no default."""
    return _Key(name, default)


class Structure:
    """What classes that describe a mapping derive from. Keys of a base class come first."""

    __attributes__: ClassVar[Mapping[str, _Key]] = MappingProxyType({})
    __keys__: ClassVar[Mapping[str, bool]] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        """Note the annotations of the new class, which are not evaluated."""
        attributes = dict(cls.__attributes__)
        for attribute in cls.__annotations__:
            value = getattr(cls, attribute, _REQUIRED)
            attributes[attribute] = value if isinstance(value, _Key) else _Key(attribute, value)
        cls.__attributes__ = MappingProxyType(attributes)
        cls.__keys__ = MappingProxyType({key.name: key.default is _REQUIRED for key in attributes.values()})


def keys_of(structure: type[Structure]) -> Mapping[str, bool]:
    """Return the keys of a structure in their order, each with whether it is required."""
    return structure.__keys__


def json_schemas(*structures: type[Structure]) -> dict[str, JsonSchema]:
    """Return JSON Schemas (draft 2020-12) of structures and of all that they mention, by the class's name.

    They refer to each other as `#/$defs/NAME`.
    """
    schemas: dict[str, JsonSchema] = {}
    for structure in structures:
        _describe(structure, schemas)
    return schemas


def _describe(structure: type[Structure], schemas: dict[str, JsonSchema]) -> None:
    import inspect  # noqa: PLC0415 - takes long, and a start describes nothing

    if structure.__name__ in schemas:
        return
    schema = schemas[structure.__name__] = {
        "title": structure.__name__,
        "description": inspect.cleandoc(structure.__doc__ or ""),
        "type": "object",
    }
    annotations = typing.get_type_hints(structure, include_extras=True)
    properties = {}
    for attribute, (name, default) in structure.__attributes__.items():
        properties[name] = _of(annotations[attribute], schemas)
        if default is not _REQUIRED and default is not UNSET:
            properties[name]["default"] = default
    schema["properties"] = properties
    required = [name for name, needed in structure.__keys__.items() if needed]
    if required:
        schema["required"] = required
    schema["additionalProperties"] = False


_SIMPLE = {str: "string", int: "integer", bool: "boolean"}
_LENGTH = {"string": "minLength", "array": "minItems", "object": "minProperties"}


def _of(annotation: Any, schemas: dict[str, JsonSchema]) -> JsonSchema:  # noqa: ANN401 - whatever can stand there
    """Return the schema of what is annotated so; structures in it are added to `schemas`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    schema: JsonSchema
    if origin is Annotated:
        schema = _of(inner[0], schemas)
        for meta in inner[1:]:
            schema = _with(meta, schema)
    elif origin in {typing.Union, types.UnionType}:
        kinds = [_of(kind, schemas) for kind in inner if kind is not UnsetType]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    elif origin is Literal:
        schema = {"enum": list(inner)}
    elif origin is list:
        schema = {"type": "array", "items": _of(inner[0], schemas)}
    elif origin is dict:
        schema = {
            "type": "object",
            "propertyNames": _of(inner[0], schemas),
            "additionalProperties": _of(inner[1], schemas),
        }
    elif annotation in _SIMPLE:
        schema = {"type": _SIMPLE[annotation]}
    else:
        _describe(annotation, schemas)
        schema = {"$ref": f"#/$defs/{annotation.__name__}"}
    return schema


def _with(meta: Meta, schema: JsonSchema) -> JsonSchema:
    said: JsonSchema = {"pattern": meta.pattern, "minimum": meta.ge, "maximum": meta.le}
    if meta.min_length is not None:
        said[_LENGTH[schema["type"]]] = meta.min_length
    described = {} if meta.description is None else {"description": meta.description}
    given = {name: value for name, value in said.items() if value is not None}
    return {**described, **schema, **given, **(meta.extra_json_schema or {})}
