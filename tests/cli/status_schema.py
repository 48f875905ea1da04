"""The JSON Schema of the whole status, as docs/metrics.md describes it."""

from __future__ import annotations

from typing import Any

INTEGER: dict[str, Any] = {"type": "integer", "minimum": 0}
STRING: dict[str, Any] = {"type": "string"}
BOOLEAN: dict[str, Any] = {"type": "boolean"}
TIME: dict[str, Any] = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return schema | {"type": [schema["type"], "null"]}


def _object(**members: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with exactly these members."""
    return {
        "type": "object",
        "properties": members,
        "required": list(members),
        "additionalProperties": False,
    }


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_COUNTS = {"type": "object", "additionalProperties": INTEGER}
_OF_CLIENTS = {"requests": INTEGER, "allowed": INTEGER, "denied": INTEGER}

OWN: dict[str, dict[str, Any]] = {
    "generation": INTEGER,
    "identity_level": {"enum": [0, 1, 2]},
    "peer": _object(pid=INTEGER, uid=INTEGER, gid=INTEGER, groups=_array(INTEGER)),
    "in_flight": INTEGER,
    "audit": STRING,
    "read_only_view": {"enum": ["required", "off"]},
    "landlock": INTEGER,
    "landlock_lacks": _array(STRING),
    "seccomp": BOOLEAN,
}
LISTS: dict[str, dict[str, Any]] = {
    "decisions": _array(
        _object(
            action={"enum": ["open", "stat", "list", "walk"]},
            rule=_or_null(STRING),
            reason=STRING,
            count=INTEGER,
        )
    ),
    "clients": _array(_object(uid=_or_null(INTEGER), connections=INTEGER, **_OF_CLIENTS)),
}
WHOLE: dict[str, dict[str, Any]] = {
    **OWN,
    "pid": INTEGER,
    "version": STRING,
    "started": TIME,
    "loaded": TIME,
    "fingerprint": STRING,
    "launcher_fingerprint": _or_null(STRING),
    "rules": INTEGER,
    "roots": _array(
        _object(name=STRING, path=STRING, cross_mounts=BOOLEAN, opens={"enum": ["loop", "helpers"]})
    ),
    "roots_in_all": INTEGER,
    "limits": {"type": "object"},
    "listeners": _array(_object(name=STRING, control=BOOLEAN)),
    "audit_on_failure": {"enum": ["deny", "allow"]},
    "audit_sequence": INTEGER,
    "audit_failures": INTEGER,
    "totals": _object(
        accepted=INTEGER,
        refused_connections=INTEGER,
        allowed=INTEGER,
        denied=INTEGER,
        descriptors_sent=INTEGER,
        bytes_copied=INTEGER,
        malformed=INTEGER,
        audit_failures=INTEGER,
        connections=INTEGER,
        in_flight=INTEGER,
    ),
    "connections_most": INTEGER,
    "requests": _array(
        _object(
            transport={"enum": ["seqpacket", "stream", "datagram", "control"]},
            type=STRING,
            requests=INTEGER,
            timed=INTEGER,
            nanoseconds=INTEGER,
            by_bits=_COUNTS | {"propertyNames": {"pattern": r"^[0-9]+$"}},
        )
    ),
    "events": _COUNTS,
    "walks": INTEGER,
    "clients_served": INTEGER,
    "unsent_replies": INTEGER,
    "helpers_stuck": INTEGER,
    "limits_hit": _array(_object(limit=STRING, rule=_or_null(STRING), count=INTEGER)),
    **LISTS,
}
CONNECTIONS: dict[str, Any] = _array(
    _object(
        connection=INTEGER,
        pid=INTEGER,
        uid=INTEGER,
        transport={"enum": ["seqpacket", "stream", "control"]},
        age=INTEGER,
        **_OF_CLIENTS,
        in_flight=INTEGER,
        walks=INTEGER,
        unsent_replies=INTEGER,
    )
)


def schema_of(members: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a whole schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_object(**members)} | {
        # Where no limit can be counted, none is.
        "required": [name for name in members if name != "limits_hit"]
    }
