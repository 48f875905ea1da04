"""The keys of the policy file, as typed structures.

They are the one list of keys, of which are required and of the words to choose
from: the reader takes them from here, and so does the JSON Schema that editors
complete and check with. They describe the file as a YAML editor sees it, where
a plain number is a number; fdbroker itself reads every scalar as text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from fdbroker.config.defaults import DEFAULT_USER, SERVICE_KIND
from fdbroker.config.structures import UNSET, Meta, Structure, UnsetType, json_schemas, key_named

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"

Action: TypeAlias = Literal["open", "stat", "list", "walk"]
Delivery: TypeAlias = Literal["descriptor", "copy"]
OnFailure: TypeAlias = Literal["deny", "allow"]
Opens: TypeAlias = Literal["loop", "helpers"]
Symlinks: TypeAlias = Literal["refuse", "within-root"]
ReadOnlyView: TypeAlias = Literal["required", "off"]
Identity: TypeAlias = Literal["available", "strict"]
SocketType: TypeAlias = Literal["stream", "seqpacket"]

READ_ONLY_VIEW_DEFAULT: ReadOnlyView = "required"
IDENTITY_DEFAULT: Identity = "available"
OPENS_DEFAULT: Opens = "loop"
SOCKET_TYPE_DEFAULT: SocketType = SERVICE_KIND
SYMLINKS_DEFAULT: Symlinks = "refuse"
CONNECTIONS_PER_UID = range(1, 10_000 + 1)
# One full reply has 253 descriptors: with less, a request for it could never be answered.
IN_FLIGHT_PER_CONNECTION = range(253, 8192 + 1)
MESSAGE_WITHIN = range(1, 3600 + 1)  # seconds
IN_FLIGHT_PER_UID = range(253, 1_000_000 + 1)
PER_SECOND = range(1, 1_000_000 + 1)
RULE_IN_FLIGHT = range(1, 1_000_000 + 1)
IDLE_TIMEOUT = range(1, 86400 + 1)  # seconds

_Name: TypeAlias = Annotated[str, Meta(pattern=NAME_PATTERN)]
_NORMAL = r"(?!\.\.?(/|$))[^/]+"  # a component that is not empty, nor . nor ..
_Path: TypeAlias = Annotated[str, Meta(pattern=rf"^(/|(/{_NORMAL})+)$")]
_Glob: TypeAlias = Annotated[str, Meta(pattern=rf"^{_NORMAL}(/{_NORMAL})*$")]
_Globs: TypeAlias = _Glob | Annotated[list[_Glob], Meta(min_length=1)]
_Actions: TypeAlias = Action | Annotated[list[Action], Meta(min_length=1)]
_Deliveries: TypeAlias = Delivery | Annotated[list[Delivery], Meta(min_length=1)]
_Identity: TypeAlias = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^(?!0[0-9]+$).")]
_Identities: TypeAlias = _Identity | Annotated[list[_Identity], Meta(min_length=1)]
_Unit: TypeAlias = Annotated[str, Meta(pattern=r".\.(service|scope)$")]
_Units: TypeAlias = _Unit | Annotated[list[_Unit], Meta(min_length=1)]
_PathBelow: TypeAlias = Annotated[str, Meta(pattern=rf"^(/{_NORMAL})+$")]  # any but "/"
_Cgroups: TypeAlias = _PathBelow | Annotated[list[_PathBelow], Meta(min_length=1)]
_Words: TypeAlias = (
    Annotated[str, Meta(min_length=1)]
    | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
)
_Size: TypeAlias = (
    Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]*)([kKMGT]B|[KMGT]iB|B)?$")]
)
_Duration: TypeAlias = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]*)(s|min|h|d)$")]
_Links: TypeAlias = Annotated[int, Meta(ge=1)]
_Mode: TypeAlias = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^0[0-7]{1,4}$")]


class Root(Structure):
    """A tree that can be reached."""

    path: Annotated[_Path, Meta(description="Absolute path of a directory, without symbolic links.")]
    cross_mounts: Annotated[bool, Meta(description="Whether file systems mounted below it are served.")] = (
        False
    )
    opens: Annotated[
        Opens,
        Meta(description="Who opens files there: helpers, with a deadline, where opening may take for ever."),
    ] = OPENS_DEFAULT


class Client(Structure):
    """Who asks. All keys must hold; of a list, one."""

    user: Annotated[_Identities | UnsetType, Meta(description="User names or numbers.")] = UNSET
    group: Annotated[
        _Identities | UnsetType, Meta(description="Group names or numbers; supplementary groups count.")
    ] = UNSET
    unit: Annotated[
        _Units | UnsetType, Meta(description="systemd services or scopes in the system's default slice.")
    ] = UNSET
    cgroup: Annotated[_Cgroups | UnsetType, Meta(description="Control groups, by their full path.")] = UNSET
    label: Annotated[
        _Words | UnsetType, Meta(description="Labels of a security module, whole, as SO_PEERSEC has them.")
    ] = UNSET


_Clients: TypeAlias = Literal["any"] | Client | Annotated[list[Client], Meta(min_length=1)]


class ModeCondition(Structure):
    """Bits of a file's mode, in octal."""

    all: Annotated[_Mode | UnsetType, Meta(description="Bits that must be set.")] = UNSET
    none: Annotated[_Mode | UnsetType, Meta(description="Bits that must be clear.")] = UNSET


class SizeRange(Structure):
    """An inclusive range of sizes."""

    min: _Size | UnsetType = UNSET
    max: _Size | UnsetType = UNSET


class CountRange(Structure):
    """An inclusive range of counts."""

    min: _Links | UnsetType = UNSET
    max: _Links | UnsetType = UNSET


class AgeRange(Structure):
    """An inclusive range of durations."""

    min: _Duration | UnsetType = UNSET
    max: _Duration | UnsetType = UNSET


class Where(Structure):
    """What the opened object must be like."""

    owner: Annotated[
        _Identities | UnsetType,
        Meta(description="Owners: names, numbers, or the words client and on_behalf_of."),
    ] = UNSET
    group: Annotated[_Identities | UnsetType, Meta(description="Groups: names or numbers.")] = UNSET
    mode: ModeCondition | UnsetType = UNSET
    size: Annotated[SizeRange | UnsetType, Meta(description="Size of a regular file.")] = UNSET
    links: Annotated[CountRange | UnsetType, Meta(description="Hard links of a regular file.")] = UNSET
    age: Annotated[AgeRange | UnsetType, Meta(description="Time since a regular file was last modified.")] = (
        UNSET
    )
    filesystem: Annotated[
        _Words | UnsetType, Meta(description="Types of file systems, as mount(8) shows them.")
    ] = UNSET


_Rate: TypeAlias = Annotated[int, Meta(ge=PER_SECOND[0], le=PER_SECOND[-1])]


class RuleLimits(Structure):
    """What one user may have by a rule."""

    requests_per_second: Annotated[
        _Rate | UnsetType, Meta(description="Requests in a second to which the rule gives something.")
    ] = UNSET
    requests_burst: Annotated[
        _Rate | UnsetType,
        Meta(description="Such requests at once after a rest; as many as in a second where left out."),
    ] = UNSET
    opens_per_second: Annotated[
        _Rate | UnsetType, Meta(description="Files that the rule gives in a second.")
    ] = UNSET
    opens_burst: Annotated[
        _Rate | UnsetType,
        Meta(description="Files that it gives at once after a rest; as many as in a second where left out."),
    ] = UNSET
    in_flight: Annotated[
        Annotated[int, Meta(ge=RULE_IN_FLIGHT[0], le=RULE_IN_FLIGHT[-1])] | UnsetType,
        Meta(description="Descriptors that the rule gave and that were not received yet."),
    ] = UNSET


class Rule(Structure):
    """One rule; it has either allow or deny."""

    name: Annotated[_Name, Meta(description="Shown in the audit and in explanations; unique.")]
    allow: Annotated[_Actions | UnsetType, Meta(description="Actions that this rule allows.")] = UNSET
    deny: Annotated[_Actions | UnsetType, Meta(description="Actions that this rule refuses.")] = UNSET
    client: Annotated[
        _Clients | UnsetType,
        Meta(description="Whom the rule is about; required with allow, everybody where left out with deny."),
    ] = UNSET
    on_behalf_of: Annotated[
        _Clients | UnsetType,
        Meta(description="Whom the client, a service, acts for. Without it a rule allows nothing to others."),
    ] = UNSET
    in_: Annotated[str, Meta(min_length=1, description="The root that the globs are relative to.")] = (
        key_named("in")
    )
    paths: Annotated[_Globs, Meta(description="Globs relative to the root.")]
    except_: Annotated[
        _Globs | UnsetType, Meta(description="Globs that the rule is not about, though paths match.")
    ] = key_named("except", default=UNSET)
    where: Where | UnsetType = UNSET
    deliver: Annotated[_Deliveries | UnsetType, Meta(description="How contents may be handed out.")] = UNSET
    limits: Annotated[RuleLimits | UnsetType, Meta(description="What one user may have by this rule.")] = (
        UNSET
    )
    symlinks: Annotated[
        Symlinks,
        Meta(description="Whether names that are reached by symbolic links are looked for where these lead."),
    ] = SYMLINKS_DEFAULT


class Limits(Structure):
    """Limits on every client."""

    connections_per_uid: Annotated[
        int,
        Meta(ge=CONNECTIONS_PER_UID[0], le=CONNECTIONS_PER_UID[-1], description="Connections of one user."),
    ] = 64
    in_flight_per_connection: Annotated[
        int,
        Meta(
            ge=IN_FLIGHT_PER_CONNECTION[0],
            le=IN_FLIGHT_PER_CONNECTION[-1],
            description="Descriptors sent to one connection and not yet acknowledged.",
        ),
    ] = 512
    message_within: Annotated[
        _Duration,
        Meta(description="Time for a first message, and for the rest of one that has begun; up to 1h."),
    ] = "10s"
    in_flight_per_uid: Annotated[
        Annotated[int, Meta(ge=IN_FLIGHT_PER_UID[0], le=IN_FLIGHT_PER_UID[-1])] | UnsetType,
        Meta(description="Descriptors sent to all connections of one user and not yet received."),
    ] = UNSET
    requests_per_second: Annotated[_Rate | UnsetType, Meta(description="Requests of one user.")] = UNSET
    requests_burst: Annotated[
        _Rate | UnsetType,
        Meta(description="Requests of one user at once; as many as in a second where left out."),
    ] = UNSET
    opens_per_second: Annotated[
        _Rate | UnsetType, Meta(description="Paths that one user asks to be opened.")
    ] = UNSET
    opens_burst: Annotated[
        _Rate | UnsetType,
        Meta(description="Paths of one user at once; as many as in a second where left out."),
    ] = UNSET
    idle_timeout: Annotated[
        _Duration | UnsetType,
        Meta(description="Time after which a connection is closed on which nothing happens; up to 24h."),
    ] = UNSET


class Audit(Structure):
    """The record of decisions."""

    on_failure: Annotated[
        OnFailure, Meta(description="What becomes of a request whose record can't be written.")
    ] = "deny"
    to: Annotated[
        _Path | UnsetType, Meta(description="File to append to; standard output where left out.")
    ] = UNSET


class Listener(Structure):
    """A socket that fdbrokerd makes when it is started by hand."""

    path: Annotated[_PathBelow | UnsetType, Meta(description="Where it is made.")] = UNSET
    group: Annotated[
        _Identity | UnsetType, Meta(description="Group of the socket; root's where left out.")
    ] = UNSET
    mode: Annotated[_Mode | UnsetType, Meta(description="Who may connect: whoever may write.")] = UNSET


class ServiceListener(Listener):
    """A socket whose clients the broker accepts and hands to a service, which asks on their behalf."""

    service: Annotated[
        Client | Annotated[list[Client], Meta(min_length=1)],
        Meta(description="Who may take the clients, written as the client of a rule."),
    ]
    type: Annotated[SocketType, Meta(description="What the service's clients speak on.")] = (
        SOCKET_TYPE_DEFAULT
    )


class Listeners(Structure):
    """Sockets that fdbrokerd makes; those that systemd makes are described by its units.

    Any other name is that of a service's, a `ServiceListener`.
    """

    seqpacket: Annotated[Listener | UnsetType, Meta(description="For requests.")] = UNSET
    stream: Annotated[
        Listener | UnsetType, Meta(description="For requests by SOCK_STREAM; none where left out.")
    ] = UNSET
    dgram: Annotated[
        Listener | UnsetType, Meta(description="For requests by SOCK_DGRAM; none where left out.")
    ] = UNSET
    control: Annotated[Listener | UnsetType, Meta(description="For status, explanations and reloads.")] = (
        UNSET
    )


class Admins(Structure):
    """Who, besides root, may see the full status."""

    user: Annotated[_Identities | UnsetType, Meta(description="User names or numbers.")] = UNSET
    group: Annotated[
        _Identities | UnsetType, Meta(description="Group names or numbers; supplementary groups count.")
    ] = UNSET


_EITHER = {
    "oneOf": [
        {"required": ["allow", "client"]},
        {"required": ["deny"], "not": {"anyOf": [{"required": ["deliver"]}, {"required": ["symlinks"]}]}},
    ]
}


class Policy(Structure):
    """The policy of fdbroker."""

    version: Annotated[Literal[1], Meta(description="The version of this format.")]
    roots: Annotated[
        dict[_Name, Root], Meta(min_length=1, description="The only trees that can ever be reached, by name.")
    ]
    rules: Annotated[
        list[Annotated[Rule, Meta(extra_json_schema=_EITHER)]],
        Meta(description="Any matching deny wins; else any matching allow; else denied."),
    ]
    limits: Limits | UnsetType = UNSET
    audit: Audit | UnsetType = UNSET
    read_only_view: Annotated[
        ReadOnlyView, Meta(description="Whether files are opened through read-only mounts only.")
    ] = READ_ONLY_VIEW_DEFAULT
    identity: Annotated[
        Identity, Meta(description="Whether clients are served whom the kernel identifies less well.")
    ] = IDENTITY_DEFAULT
    admins: Admins | UnsetType = UNSET
    user: Annotated[str, Meta(min_length=1, description="Whom the broker runs as.")] = DEFAULT_USER
    listeners: Listeners | UnsetType = UNSET


# Of these {} says nothing, and is refused as a mistake.
_NOT_EMPTY = (
    Admins,
    AgeRange,
    Audit,
    Client,
    CountRange,
    Limits,
    Listeners,
    ModeCondition,
    RuleLimits,
    SizeRange,
    Where,
)
# A process is in one control group.
_ONE_CONTROL_GROUP = {"not": {"required": ["unit", "cgroup"]}}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the policy file, for editors.

    What it can't say (names that must exist, globs that must compile) the
    compiler says.
    """
    parts = json_schemas(Policy, ServiceListener)
    # A structure has a fixed set of keys; here they are names that the author chooses.
    parts["Listeners"] |= {
        "additionalProperties": {"$ref": "#/$defs/ServiceListener"},
        "propertyNames": {"pattern": NAME_PATTERN},
    }
    for structure in _NOT_EMPTY:
        parts[structure.__name__]["minProperties"] = 1
    parts["Client"] |= _ONE_CONTROL_GROUP
    _tell_items_apart(parts)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": "#/$defs/Policy",
        "$defs": parts,
    }


def _tell_items_apart(part: object) -> None:
    """Say of every list of words below `part` that none is in it twice, as the reader has it."""
    if isinstance(part, dict):
        if part.get("type") == "array" and "$ref" not in part["items"]:
            part["uniqueItems"] = True
        for inner in part.values():
            _tell_items_apart(inner)
    elif isinstance(part, list):
        for inner in part:
            _tell_items_apart(inner)
