"""Structures describe the keys of a mapping; readers and the JSON Schema take them from there."""

from __future__ import annotations

from typing import Annotated, Literal

from fdbroker.config.structures import UNSET, Meta, Structure, UnsetType, json_schemas, key_named, keys_of


class Inner(Structure):
    """What is within."""

    count: Annotated[int, Meta(ge=1, le=9)] | UnsetType = UNSET


class Base(Structure):
    """What two have."""

    name: Annotated[Annotated[str, Meta(pattern="^a")], Meta(description="A name.")]
    word: Literal["b", "a"] = "a"


class Derived(Base):
    """And more.

    In two lines.
    """

    in_: str | Annotated[list[Inner], Meta(min_length=1)] = key_named("in")
    lists: Annotated[dict[str, Inner] | UnsetType, Meta(extra_json_schema={"maxProperties": 2})] = key_named(
        "not", default=UNSET
    )
    flag: bool = False


def test_keys_are_those_of_the_base_first_by_their_names_in_the_file() -> None:
    assert list(keys_of(Derived).items()) == [
        ("name", True),
        ("word", False),
        ("in", True),
        ("not", False),
        ("flag", False),
    ]
    assert list(keys_of(Base)) == ["name", "word"]


def test_a_schema_has_what_annotations_say_and_each_structure_once() -> None:
    schemas = json_schemas(Derived, Inner)
    assert schemas.keys() == {"Derived", "Inner"}
    assert schemas["Inner"] == {
        "title": "Inner",
        "description": "What is within.",
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "additionalProperties": False,
    }
    inner = {"$ref": "#/$defs/Inner"}
    assert schemas["Derived"] == {
        "title": "Derived",
        "description": "And more.\n\nIn two lines.",
        "type": "object",
        "properties": {
            "name": {"description": "A name.", "type": "string", "pattern": "^a"},
            "word": {"enum": ["b", "a"], "default": "a"},
            "in": {"anyOf": [{"type": "string"}, {"type": "array", "items": inner, "minItems": 1}]},
            "not": {
                "type": "object",
                "propertyNames": {"type": "string"},
                "additionalProperties": inner,
                "maxProperties": 2,
            },
            "flag": {"type": "boolean", "default": False},
        },
        "required": ["name", "in"],
        "additionalProperties": False,
    }
