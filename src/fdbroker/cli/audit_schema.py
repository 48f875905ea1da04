"""What the records of the audit say, member by member, and the JSON Schema of it.

docs/audit.md tells the same in words, and a test compares. Every record that the broker
writes in the tests is validated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_ID = {"type": "integer", "minimum": 0, "maximum": 0xFFFFFFFF}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}

MEMBERS: dict[str, dict[str, Any]] = {
    "run": {
        "type": "string",
        "pattern": "^[0-9a-f]{16}$",
        "description": "random for each start of a broker",
    },
    "seq": _COUNT | {"description": "number of the record in its run, from 0 without a gap"},
    "time": {
        "type": "string",
        "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$",
        "description": "when, in UTC, to the millisecond; records are in order by seq, not by time",
    },
    "event": _TEXT | {"description": "what happened, which says what other members there are"},
    "socket": _TEXT | {"description": "name of the socket that it came by"},
    "connection": _COUNT | {"description": "number of the connection in this run, from 1"},
    "pid": _COUNT | {"description": "process that connected, or sent the datagram; of started: the broker"},
    "uid": {"oneOf": [_ID, {"type": "null"}], "description": "its user; of started: the broker's"},
    "gid": _ID | {"description": "its primary group"},
    "identity": {"enum": [0, 1, 2], "description": "level of what the kernel tells of it"},
    "for_number": _COUNT | {"description": "number of the client that a service asked for"},
    "for_pid": _COUNT | {"description": "that client's process"},
    "for_uid": _ID | {"description": "its user"},
    "for_gid": _ID | {"description": "its primary group"},
    "request": _ID | {"description": "the requester's number of the request; 0: could not be read, or none"},
    "generation": _COUNT | {"description": "of the policy that decided"},
    "path": _TEXT | {"description": "the path; U+FFFD stands for what is not UTF-8"},
    "path_hex": {
        "type": "string",
        "pattern": "^([0-9a-f]{2})+$",
        "description": "the bytes of the path, where it is not UTF-8",
    },
    "path_length": _COUNT
    | {"description": "its length in bytes, where it is above 4,096 and only its beginning is here"},
    "resolved": _TEXT | {"description": "the name to which symbolic links of the path led; as path"},
    "resolved_hex": {
        "type": "string",
        "pattern": "^([0-9a-f]{2})+$",
        "description": "the bytes of that name, where it is not UTF-8",
    },
    "decision": {"enum": ["allow", "deny"], "description": "what was decided"},
    "reason": _TEXT | {"description": "ok, or why not; or what was wrong"},
    "rule": {"type": ["string", "null"], "description": "name of the rule that decided, null: none"},
    "entries": _COUNT | {"description": "names that were sent"},
    "descriptors": _COUNT | {"description": "descriptors that were sent"},
    "directories": _COUNT | {"description": "directories that were read"},
    "incomplete": _COUNT | {"description": "bits of what is missing, as the protocol has them"},
    "errno": {"type": ["integer", "null"], "description": "number of the error of the system call"},
    "action": _TEXT | {"description": "what was asked for, or was to be explained"},
    "paths": _COUNT | {"description": "how many paths it was asked for"},
    "listener": _TEXT | {"description": "name of the service's listener"},
    "limit": _COUNT | {"description": "the value of the limit"},
    "retry_after_ms": _COUNT
    | {"description": "when to ask again, in milliseconds; 0: when something was received"},
    "helper": _COUNT | {"description": "number of the helper process"},
    "boot": _TEXT | {"description": "the kernel's boot_id, or unknown"},
    "landlock": _COUNT | {"description": "version of Landlock that holds the broker; 0: none"},
    "fingerprint": _TEXT | {"description": "of the policy that is in force now"},
    "rules": _COUNT | {"description": "rules of that policy"},
    "old_generation": _COUNT | {"description": "of the policy before"},
    "old_fingerprint": _TEXT | {"description": "of the policy before"},
    "from": _COUNT | {"description": "first number of the writes that failed"},
    "to": _COUNT | {"description": "last number of the writes that failed"},
    "broker_pid": _COUNT | {"description": "process of the broker"},
    "given": {"enum": [0, 1], "description": "whether something was given although it could not be recorded"},
}

_CLIENT = "socket connection? pid uid gid identity"
_FOR = "for_number? for_pid? for_uid? for_gid?"
_DECISION = f"{_CLIENT} {_FOR} request generation path path_hex? path_length?"
_RESOLVED = "resolved? resolved_hex?"
_LIMIT = "limit? retry_after_ms?"


class Event(NamedTuple):
    """What a kind of record says behind run, seq, time and event: member names, `?`: not always."""

    members: str
    text: str


EVENTS: dict[str, Event] = {
    "open": Event(f"{_DECISION} decision reason rule {_RESOLVED} {_LIMIT}", "a file was asked for"),
    "stat": Event(f"{_DECISION} decision reason rule {_RESOLVED} {_LIMIT}", "what a name is was asked for"),
    "list": Event(
        f"{_DECISION} entries decision reason rule {_RESOLVED} {_LIMIT}",
        "a page of a directory was asked for",
    ),
    "walk": Event(f"{_DECISION} decision reason rule", "a walk began, was refused, or opened a file"),
    "walk_ended": Event(
        f"{_CLIENT} {_FOR} request entries descriptors directories incomplete left_out_*?", "a walk ended"
    ),
    "started": Event("boot pid uid identity landlock", "the broker serves from here on: number 0 of its run"),
    "stopped": Event("", "the broker was told to end: the last of its run"),
    "reopened": Event(
        f"{_CLIENT} request generation boot broker_pid", "root brought another file: its first"
    ),
    "reopen_refused": Event(f"{_CLIENT} request reason", "another file for the audit was not taken"),
    "audit_failed": Event("from to given", "what stands under these numbers, or is missing, was not given"),
    "reloaded": Event(
        f"{_CLIENT} request generation fingerprint rules old_generation old_fingerprint",
        "another policy is in force",
    ),
    "reload_refused": Event(f"{_CLIENT} request generation? reason", "another policy was not taken"),
    "explained": Event(
        f"{_CLIENT} request generation action path path_hex? path_length? reason",
        "what a name decides was asked for",
    ),
    "undelivered": Event(
        f"{_CLIENT} request errno", "the answer to a request was not sent: nothing was given"
    ),
    "partly_delivered": Event(f"{_CLIENT} request errno", "its end was not sent; its descriptors were"),
    "malformed": Event(f"{_CLIENT} request reason", "a client broke the protocol"),
    "too_slow": Event(f"{_CLIENT} request reason", "a client did not send in time"),
    "receive_failed": Event("socket connection? pid? uid? gid? identity? errno", "receiving failed"),
    "connection_ended": Event(f"{_CLIENT} reason limit", "a connection on which nothing happened was ended"),
    "request_refused": Event(
        f"{_CLIENT} {_FOR} request generation action paths reason limit retry_after_ms",
        "a request too many in a second",
    ),
    "accept_failed": Event("socket errno", "a connection could not be accepted"),
    "connection_refused": Event("socket uid? reason limit?", "one connection too many"),
    "datagram_refused": Event("socket pid? uid? gid? identity? reason", "a datagram gets no answer"),
    "failed": Event("socket? connection? pid? uid? gid? identity? request? reason", "a bug of the broker"),
    "serve": Event(f"{_CLIENT} request generation listener reason", "a service wants its clients"),
    "serve_ended": Event(f"{_CLIENT} listener reason", "a service gets no more of them"),
    "client_accepted": Event(
        f"listener {_CLIENT} for_number for_pid for_uid for_gid", "a client was handed over to a service"
    ),
    "client_refused": Event("listener uid reason", "a client of a service was not"),
    "helper_ended": Event("helper reason uid path? path_hex? path_length?", "a helper was given up, or died"),
    "helpers_gone": Event("reason?", "no helper can be started any more"),
    **{
        f"{what}_refused": Event(
            f"{_CLIENT} {_FOR} request reason", "the sender of a message is not who connected"
        )
        for what in ("hello", "status", "explain", "serve", "release", "walk", "more", "cancel")
    },
}


def schema(*, closed: bool = False) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a record.

    Later versions may add events and members, so it allows others; `closed`: those that there are now alone.
    """
    begin = {name: MEMBERS[name] for name in ("run", "seq", "time")}
    variants = []
    for name, event in EVENTS.items():
        words = event.members.split()
        plain = [word for word in words if "*" not in word]
        variant: dict[str, Any] = {
            "title": name,
            "description": event.text,
            "type": "object",
            "properties": {**begin, "event": {"const": name}}
            | {word.rstrip("?"): MEMBERS[word.rstrip("?")] for word in plain},
            "required": ["run", "seq", "time", "event", *(word for word in plain if not word.endswith("?"))],
        }
        if "left_out_*?" in words:
            variant["patternProperties"] = {"^left_out_[a-z_]+$": _COUNT}
        if closed:
            variant["additionalProperties"] = False
        variants.append(variant)
    if not closed:
        others = {"properties": {**begin, "event": {"type": "string", "not": {"enum": list(EVENTS)}}}}
        variants.append(
            {"title": "of a later version", "type": "object", "required": ["run", "seq", "time", "event"]}
            | others
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A record of the audit of fdbroker",
        "oneOf": variants,
    }
