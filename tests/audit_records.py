"""Every audit that a broker writes in the tests is what docs/audit.md and the schema say."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator

from fdbroker.cli.audit_schema import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_OF_ONE_SHAPE = 20
_MOST_LINES = 2_000
_seen: dict[object, int] = {}
# The event and the members, with what their values begin with. Quotation marks in values are escaped.
_SHAPE = re.compile(rb'"(?:event":"(\w+)|(\w+)":(?:(["\[{tfn])|[-0-9]))')


@cache
def _validators() -> dict[str, Draft202012Validator]:
    """Return one for each event: an error of one variant says more than that none of thirty fits."""
    made = {}
    for variant in schema(closed=True)["oneOf"]:
        Draft202012Validator.check_schema(variant)
        made[variant["title"]] = Draft202012Validator(variant)
    return made


def check_lines(lines: Sequence[bytes]) -> None:
    """Check each record; lines that are none are left out, since tests cut some.

    Of records that have the same members of the same types, some are checked in full; of more lines than
    anybody reads, those of a flood, some that are spread over them are looked at.
    """
    for line in lines[:: 1 + len(lines) // _MOST_LINES]:
        shape = tuple(_SHAPE.findall(line))
        if _seen.get(shape, 0) >= _MOST_OF_ONE_SHAPE:
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=list)
        except ValueError:
            continue
        if not isinstance(pairs, list) or not pairs or not isinstance(pairs[0], tuple):
            continue
        record = dict(pairs)
        assert len(record) == len(pairs), f"a member twice: {line!r}"
        check_record(record)
        _seen[shape] = _seen.get(shape, 0) + 1


def check_record(record: dict[str, Any]) -> None:
    """Check one record."""
    validator = _validators().get(record["event"])
    assert validator is not None, f"an event that the schema does not have: {record}"
    errors = [error.message for error in validator.iter_errors(record)]
    assert not errors, (record, errors)
