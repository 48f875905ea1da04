"""From a policy's text to the compiled policy, and every way in which that is refused."""

# ruff: noqa: E501
# A case of a table is one line, with the message as it is printed.

from __future__ import annotations

import json
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.config import CompiledPolicy, ConfigError, OfflineLookups, compile_policy, dumps
from fdbroker.policy.rules import Rate, RuleLimits, read_policy
from fdbroker.wire.client import for_broker
from tests.config.fake_lookups import FakeLookups


def compiled(text: str) -> CompiledPolicy:
    return compile_policy(textwrap.dedent(text).encode(), "p.yaml", FakeLookups())


def problems_of(text: str) -> list[str]:
    try:
        compiled(text)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


SMALLEST = "version: 1\nroots: {home: {path: /home}}\nrules: []\n"


def with_rule(*lines: str) -> str:
    """A policy with one rule; its lines begin at line 4, in column 5."""
    return "version: 1\nroots: {home: {path: /home}}\nrules:\n  - " + "\n    ".join(lines) + "\n"


def allowing(line: str) -> str:
    """A policy with one allow rule that has `line`, at line 4, beside what it needs."""
    needed = ["name: r", "allow: open", "client: any", "in: home", "paths: x"]
    return with_rule(
        line, *[other for other in needed if other.split(":")[0] != line.split(":", maxsplit=1)[0]]
    )


def rule_with(line: str) -> dict[str, object]:
    [rule] = compiled(allowing(line))["rules"]
    return dict(rule)


# The sockets of a policy that says nothing else of them.
USUAL = {
    "seqpacket": {
        "kind": "seqpacket",
        "path": "/run/fdbroker/broker.seqpacket",
        "gid": 992,
        "mode": 0o660,
    },
    "stream": {"kind": "stream", "path": "/run/fdbroker/broker.stream", "gid": 992, "mode": 0o660},
    "dgram": {"kind": "dgram", "path": "/run/fdbroker/broker.dgram", "gid": 992, "mode": 0o660},
    "control": {"kind": "seqpacket", "path": "/run/fdbroker/control", "gid": 0, "mode": 0o666},
    "clamd": {"kind": "stream", "path": "/run/fdbroker/clamd", "gid": 0, "mode": 0o666},
}


def test_the_smallest_policy_has_all_defaults_written_out() -> None:
    assert compiled(SMALLEST) == {
        "version": 1,
        "roots": [{"name": "home", "path": "/home", "cross_mounts": False, "opens": "loop"}],
        "rules": [],
        "limits": {"connections_per_uid": 64, "in_flight_per_connection": 512, "message_within": 10.0},
        "audit": {"on_failure": "deny"},
        "read_only_view": "required",
        "identity": "available",
        "admins": {"uids": [], "gids": []},
        "services": [],
        "daemon": {
            "uid": 990,
            "gid": 991,
            "listeners": {
                "seqpacket": USUAL["seqpacket"],
                "control": USUAL["control"],
            },
            "audit": None,
        },
    }


def test_the_smallest_rule_has_all_defaults_written_out() -> None:
    assert compiled(with_rule("name: r", "deny: stat", "in: home", "paths: x"))["rules"] == [
        {
            "name": "r",
            "effect": "deny",
            "actions": ["stat"],
            "root": "home",
            "clients": [{"any": True}],
            "on_behalf_of": [],
            "paths": ["x"],
            "except": [],
            "where": {},
            "deliver": ["descriptor"],
            "symlinks": "refuse",
        }
    ]


WHOLE = """\
version: "1"
roots:
  home: {path: /home, cross_mounts: true, opens: helpers}
  alice: {path: /home/alice, cross_mounts: false}
rules:
  - name: scan
    allow: [open, stat, list, walk]
    client:
      - {user: [clamav, "0"], unit: [x.service, y@z.service]}
      - {group: [users, 7], cgroup: /user.slice, label: ["a:b:c_t:s0", backup (enforce)]}
    on_behalf_of: {group: users}
    in: alice
    paths: ["**", "[a]*", "{x"]
    except: "*/.cache/**"
    where:
      filesystem: [xfs, cifs, ext4, ext2]
      age: {max: 30d, min: 5s}
      links: {max: 1, min: 1}
      size: {max: 2GiB, min: 0}
      mode: {none: 0022, all: "0400"}
      group: projects
      owner: [client, clamav, "110", on_behalf_of]
    deliver: [copy, descriptor]
    symlinks: within-root
limits: {connections_per_uid: 1, in_flight_per_connection: 8192, message_within: 2min}
audit: {to: /var/log/fdbroker/audit.jsonl, on_failure: allow}
read_only_view: off
identity: strict
admins: {group: [fdbroker-admin, 7], user: [clamav, "1000"]}
user: brokers
listeners:
  control: {mode: "0600", group: "4", path: /run/x/control}
  clamd: {service: [{user: clamav}, {unit: scand.service}], mode: "0660", group: users}
  stream: {group: users}
  dgram: {}
  seqpacket: {path: /run/x/requests, group: users, mode: 0660}
"""


def test_limits_are_compiled_where_they_are_written_and_a_rate_has_a_burst() -> None:
    text = allowing("limits: {requests_per_second: 50, opens_per_second: 20000, in_flight: 256}") + (
        "limits: {requests_per_second: 100, opens_per_second: 1000, opens_burst: 64,"
        " in_flight_per_uid: 1000, idle_timeout: 5min}\n"
    )
    policy = compiled(text)
    assert policy["rules"][0]["limits"] == {
        "requests_per_second": 50,
        "requests_burst": 50,
        "opens_per_second": 20000,
        "opens_burst": 20000,
        "in_flight": 256,
    }
    assert policy["limits"] == {
        "connections_per_uid": 64,
        "in_flight_per_connection": 512,
        "message_within": 10.0,
        "requests_per_second": 100,
        "requests_burst": 100,
        "opens_per_second": 1000,
        "opens_burst": 64,
        "in_flight_per_uid": 1000,
        "idle_timeout": 300.0,
    }
    read = read_policy(for_broker(json.loads(dumps(policy))))
    assert read.settings[7:] == (1000, Rate("requests", 100, 100), Rate("opens", 1000, 64), 300.0)
    assert read.rules[0].limits == RuleLimits(
        Rate("requests: r", 50, 50), Rate("opens: r", 20000, 20000), 256
    )


def test_every_key_is_compiled_as_the_format_says() -> None:
    assert compiled(WHOLE) == {
        "version": 1,
        "roots": [
            {"name": "home", "path": "/home", "cross_mounts": True, "opens": "helpers"},
            {"name": "alice", "path": "/home/alice", "cross_mounts": False, "opens": "loop"},
        ],
        "rules": [
            {
                "name": "scan",
                "effect": "allow",
                "actions": ["open", "stat", "list", "walk"],
                "root": "alice",
                "clients": [
                    {
                        "uids": [110, 0],
                        "cgroups": [
                            "/system.slice/x.service",
                            "/system.slice/system-y.slice/y@z.service",
                        ],
                    },
                    {
                        "gids": [100, 7],
                        "cgroups": ["/user.slice"],
                        "labels": ["a:b:c_t:s0", "backup (enforce)"],
                    },
                ],
                "on_behalf_of": [{"gids": [100]}],
                "paths": ["**", "[a]*", "{x"],
                "except": ["*/.cache/**"],
                "where": {
                    "owner": {"uids": [110], "client": True, "on_behalf_of": True},
                    "group": {"gids": [2000]},
                    "mode": {"all": 0o400, "none": 0o022},
                    "size": {"min": 0, "max": 2 * 1024**3},
                    "links": {"min": 1, "max": 1},
                    "age": {"min": 5, "max": 30 * 86400},
                    "filesystem": {"types": [0x58465342, 0xFF534D42, 0xFE534D42, 0xEF53]},
                },
                "deliver": ["copy", "descriptor"],
                "symlinks": "within-root",
            }
        ],
        "limits": {"connections_per_uid": 1, "in_flight_per_connection": 8192, "message_within": 120.0},
        "audit": {"on_failure": "allow"},
        "read_only_view": "off",
        "identity": "strict",
        "admins": {"uids": [110, 1000], "gids": [993, 7]},
        "services": [
            {"name": "clamd", "clients": [{"uids": [110]}, {"cgroups": ["/system.slice/scand.service"]}]}
        ],
        "daemon": {
            "uid": 995,
            "gid": 996,
            "listeners": {
                "seqpacket": USUAL["seqpacket"] | {"path": "/run/x/requests", "gid": 100},
                "stream": USUAL["stream"] | {"gid": 100},
                "dgram": USUAL["dgram"],
                "control": USUAL["control"] | {"path": "/run/x/control", "gid": 4, "mode": 0o600},
                "clamd": USUAL["clamd"] | {"gid": 100, "mode": 0o660},
            },
            "audit": "/var/log/fdbroker/audit.jsonl",
        },
    }


def test_of_a_listener_the_path_and_mode_have_defaults_and_the_group_is_roots() -> None:
    daemon = compiled(SMALLEST + "listeners: {seqpacket: {mode: 0666}}")["daemon"]
    assert daemon["listeners"] == {
        "seqpacket": USUAL["seqpacket"] | {"gid": 0, "mode": 0o666},
        "control": USUAL["control"],
    }


def test_sockets_for_streams_and_datagrams_are_made_where_they_are_named() -> None:
    daemon = compiled(SMALLEST + "listeners: {dgram: {}, stream: {mode: 0666}, seqpacket: {}, control: {}}")[
        "daemon"
    ]
    assert daemon["listeners"] == {
        "seqpacket": USUAL["seqpacket"],
        "stream": USUAL["stream"] | {"gid": 0, "mode": 0o666},
        "dgram": USUAL["dgram"],
        "control": USUAL["control"],
    }


def test_any_other_listener_is_that_of_a_service() -> None:
    policy = compiled(
        SMALLEST + "listeners: {b2: {service: {user: app}}, clamd: {service: {group: [users]}}}"
    )
    assert policy["services"] == [
        {"name": "b2", "clients": [{"uids": [113]}]},
        {"name": "clamd", "clients": [{"gids": [100]}]},
    ]
    assert list(policy["daemon"]["listeners"]) == ["seqpacket", "control", "b2", "clamd"]
    assert policy["daemon"]["listeners"]["clamd"] == USUAL["clamd"]
    assert set(read_policy(for_broker(policy)).services) == {b"b2", b"clamd"}


def test_the_listener_of_a_service_is_of_the_type_that_is_asked_for() -> None:
    listeners = compiled(
        SMALLEST
        + "listeners: {scan: {service: {user: app}, type: seqpacket},"
        + " b: {service: {user: app}, type: stream}}"
    )["daemon"]["listeners"]
    assert (listeners["scan"]["kind"], listeners["b"]["kind"]) == ("seqpacket", "stream")


def test_a_default_that_this_system_does_not_have_is_left_open_until_the_start() -> None:
    class Bare(FakeLookups):
        def account(self, name: str) -> tuple[int, int] | None:
            return None

        def group(self, name: str) -> int | None:
            return None

    daemon = compile_policy(SMALLEST.encode(), "p.yaml", Bare())["daemon"]
    assert (daemon["uid"], daemon["gid"], daemon["listeners"]["seqpacket"]["gid"]) == (None, None, None)


@pytest.mark.parametrize("text", [SMALLEST, WHOLE])
def test_the_broker_reads_what_is_compiled(text: str) -> None:
    policy = read_policy(for_broker(json.loads(dumps(compiled(text)))))
    assert len(policy.roots) == len(compiled(text)["roots"])


def test_the_order_of_keys_is_that_of_the_format_and_not_of_the_author() -> None:
    [rule] = compiled(WHOLE)["rules"]
    assert list(rule) == [
        "name",
        "effect",
        "actions",
        "root",
        "clients",
        "on_behalf_of",
        "paths",
        "except",
        "where",
        "deliver",
        "symlinks",
    ]
    assert list(rule["where"]) == ["owner", "group", "mode", "size", "links", "age", "filesystem"]
    assert list(rule["where"]["links"]) == ["min", "max"]


def test_the_written_form_is_ascii_that_a_person_can_read() -> None:
    written = dumps(compiled(WHOLE.replace('"[a]*"', '"\\u200cé"')))
    assert written.isascii()
    assert json.loads(written)["rules"][0]["paths"][1] == "\u200cé"
    lines = written.splitlines()
    assert (
        '  "limits": {"connections_per_uid": 1, "in_flight_per_connection": 8192, "message_within": 120.0},'
        in lines
    )
    assert '      "actions": ["open", "stat", "list", "walk"],' in lines
    assert max(map(len, lines)) <= 130
    assert written.endswith("}\n")


def test_one_number_under_two_names_is_compiled_once() -> None:
    assert rule_with("client: {group: [adm, wheel, 4]}")["clients"] == [{"gids": [4]}]


def test_a_deny_rule_may_be_for_somebody_and_ask_of_the_object() -> None:
    [rule] = compiled(
        with_rule(
            "name: r", "deny: open", "client: {user: clamav}", "in: home", "paths: x", "where: {owner: root}"
        )
    )["rules"]
    assert rule["clients"] == [{"uids": [110]}]
    assert rule["where"] == {"owner": {"uids": [0], "client": False, "on_behalf_of": False}}


@pytest.mark.parametrize(
    ("words", "entries"),
    [
        ("any", [{"any": True}]),
        ("{user: clamav}", [{"uids": [110]}]),
        ("[{group: users}, {unit: x.service}]", [{"gids": [100]}, {"cgroups": ["/system.slice/x.service"]}]),
    ],
)
def test_whom_a_service_acts_for_is_written_as_a_client_is(
    words: str, entries: list[dict[str, object]]
) -> None:
    assert rule_with(f"on_behalf_of: {words}")["on_behalf_of"] == entries
    denying = with_rule("name: r", "deny: open", f"on_behalf_of: {words}", "in: home", "paths: x")
    [rule] = compiled(denying)["rules"]
    # Whoever it is who acts for them.
    assert (rule["clients"], rule["on_behalf_of"]) == ([{"any": True}], entries)


def test_owner_may_be_the_one_who_is_acted_for_beside_others() -> None:
    text = allowing("where: {owner: [on_behalf_of, '7']}").replace(
        "client: any", "client: any\n    on_behalf_of: any"
    )
    assert compiled(text)["rules"][0]["where"] == {
        "owner": {"uids": [7], "client": False, "on_behalf_of": True}
    }


@pytest.mark.parametrize(
    ("unit", "cgroup"),
    [
        ("x.service", "/system.slice/x.service"),
        ("x.scope", "/system.slice/x.scope"),
        ("a-b.service", "/system.slice/a-b.service"),
        ("foo@bar.service", "/system.slice/system-foo.slice/foo@bar.service"),
        ("foo-bar@x-y.service", r"/system.slice/system-foo\x2dbar.slice/foo-bar@x-y.service"),
        (r"a\x2db@c.service", r"/system.slice/system-a\x5cx2db.slice/a\x2db@c.service"),
        (".x@c.service", r"/system.slice/system-\x2ex.slice/_.x@c.service"),
        ("a@b@c.service", "/system.slice/system-a.slice/a@b@c.service"),
        ("a@.service", "/system.slice/system-a.slice"),
        ("a-b@.service", r"/system.slice/system-a\x2db.slice"),
        ("cpu@.scope", "/system.slice/system-cpu.slice"),
        ("init.scope", "/init.scope"),
        ("_x.service", "/system.slice/__x.service"),
        ("cpu.service", "/system.slice/_cpu.service"),
        ("cgroup.service", "/system.slice/_cgroup.service"),
        ("cpux.service", "/system.slice/cpux.service"),
        ("users@1.service", "/system.slice/system-users.slice/users@1.service"),
    ],
)
def test_a_unit_is_the_control_group_that_systemd_makes_for_it(unit: str, cgroup: str) -> None:
    assert rule_with(f"client: {{unit: '{unit}'}}")["clients"] == [{"cgroups": [cgroup]}]


GLOBS = 'write globs relative to the root, as in "*/Mail/**"'
CLIENT = "write any, or a mapping with some of user, group, unit, cgroup, label"
OTHER_SLICE = (
    "and 'unit' means the default slice, system.slice; write 'cgroup' with what 'systemctl show -P ControlGroup"
    " NAME' prints for it, or name users"
)
UNIT = "is not the name of a service or scope"
ODD_UNIT = "is not a name that a unit can have"
SYSTEMCTL = r"write it as systemctl shows it; other characters are escaped there, as in a\x20b.service"
SIZE = "is not a size; write bytes (4096) or digits with a unit: KiB, MiB, GiB, TiB or kB, MB, GB, TB"
MODE = 'is not a file mode; write octal digits that begin with 0, as in "0640" or "02000"'
COUNT = "is not a number; write decimal digits only, as in 512"
OVERFLOW = "is not allowed: every id that a user namespace does not map shows as 65534"
RULE_LIMITS = "write some of requests_per_second, requests_burst, opens_per_second, opens_burst, in_flight, or leave limits out"
LIMITS = "connections_per_uid, in_flight_per_connection, message_within, in_flight_per_uid, requests_per_second, requests_burst, opens_per_second, opens_burst, idle_timeout"  # fmt: skip


# Each line stands at line 4, column 5, of a rule that is good otherwise.
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("name: R", "4:11: rule name 'R' is not allowed; use a-z, 0-9, '_' and '-', beginning with a letter or digit"),
        ("name: _r", "4:11: rule name '_r' is not allowed; use a-z, 0-9, '_' and '-', beginning with a letter or digit"),
        ("name: [r]", "4:11: rule 1: name must be text, not a list; write a short name; the audit shows it"),
        ("name: ''", "4:11: rule 1: name is empty; write a short name; the audit shows it"),
        ("allow: [open, read]", "4:19: rule 'r': allow: 'read' is not a choice here; write open, stat, list or walk"),
        ("allow: opne", "4:12: rule 'r': allow: 'opne' is not a choice here; did you mean 'open'?"),
        ("allow: []", "4:12: rule 'r': allow: the list is empty; write some of open, stat, list, walk"),
        ("allow: [open, open]", "4:19: rule 'r': allow: 'open' is given twice, first in line 4; keep one of the two"),
        ("allow: {open: true}", "4:12: rule 'r': allow must be text, not a mapping; write some of open, stat, list, walk"),
        ("allow:", "4:11: rule 'r': allow has no value; write some of open, stat, list, walk"),
        ("in: hom", "4:9: rule 'r': in: there is no root 'hom'; did you mean 'home'?"),
        ("in: xyz", "4:9: rule 'r': in: there is no root 'xyz'; the roots are home"),
        ("in: [home]", "4:9: rule 'r': in must be text, not a list; write the name of one root; a rule is about one"),
        ("client:", f"4:12: rule 'r': client has no value; {CLIENT}"),
        ("client: {}", f"4:13: rule 'r': client is empty; {CLIENT}"),
        ("client: []", f"4:13: rule 'r': client: the list is empty; {CLIENT}"),
        ("client: ayn", "4:13: rule 'r': client: 'ayn' is neither any nor a mapping; did you mean 'any'?"),
        ("client: clamav", "4:13: rule 'r': client: 'clamav' is neither any nor a mapping; write any, or {user: clamav} if that is meant"),
        ("client: [any]", f"4:14: rule 'r': client: entry 1 must be a mapping, not text; {CLIENT}"),
        ("client: {usr: x}", "4:14: rule 'r': client: unknown key 'usr'; did you mean 'user'?"),
        ("client: {user:x}", "4:14: rule 'r': client: unknown key 'user:x'; write a space behind the colon: 'user: x'"),
        ("client: {label: []}", "4:21: rule 'r': client: label: the list is empty; write it whole, as in system_u:system_r:backup_t:s0, or 'backup (enforce)'"),
        ("client: {labels: x}", "4:14: rule 'r': client: unknown key 'labels'; did you mean 'label'?"),
        ("client: {user: clamva}", "4:20: rule 'r': client: user: there is no user 'clamva' on this system; did you mean 'clamav'?"),
        ("client: {user: alice}", "4:20: rule 'r': client: user: there is no user 'alice' on this system; did you mean 'Alice'?"),
        ("client: {user: zzzz}", "4:20: rule 'r': client: user: there is no user 'zzzz' on this system; create the user, or write its number"),
        ("client: {user: []}", "4:20: rule 'r': client: user: the list is empty; write names or numbers"),
        ("client: {user: ''}", "4:20: rule 'r': client: user is empty; write names or numbers"),
        ("client: {user: no}", "4:20: rule 'r': client: user: there is no user 'no' on this system; did you mean 'anon'?"),
        ("client: {user: -1}", "4:20: rule 'r': client: user: there is no user '-1' on this system; create the user, or write its number"),
        ("client: {user: 010}", f"4:20: rule 'r': client: user: '010' {COUNT}"),
        ("client: {user: 4294967295}", "4:20: rule 'r': client: user: 4294967295 is larger than any id; write at most 4294967294"),
        ("client: {user: 65534}", f"4:20: rule 'r': client: user: '65534' {OVERFLOW}; use a user of its own"),
        ("client: {user: nobody}", f"4:20: rule 'r': client: user: 'nobody' {OVERFLOW}; use a user of its own"),
        ("client: {user: anon}", f"4:20: rule 'r': client: user: 'anon' {OVERFLOW}; use a user of its own"),
        ("client: {group: nogroup}", f"4:21: rule 'r': client: group: 'nogroup' {OVERFLOW}; use a group of its own"),
        ("client: {group: user}", "4:21: rule 'r': client: group: there is no group 'user' on this system; did you mean 'users'?"),
        ("client: {unit: x}", f"4:20: rule 'r': client: unit: 'x' {UNIT}; write 'x.service'"),
        ("client: {unit: x.socket}", f"4:20: rule 'r': client: unit: 'x.socket' {UNIT}; write NAME.service or NAME.scope"),
        ("client: {unit: x.slice}", f"4:20: rule 'r': client: unit: 'x.slice' {UNIT}; name the slice by its path: cgroup: /NAME.slice"),
        ("client: {unit: .service}", f"4:20: rule 'r': client: unit: '.service' {ODD_UNIT}; {SYSTEMCTL}"),
        ("client: {unit: a/b.service}", f"4:20: rule 'r': client: unit: 'a/b.service' {ODD_UNIT}; {SYSTEMCTL}"),
        ('client: {unit: "user@.service"}', f"4:20: rule 'r': client: unit: 'user@.service' is below /user.slice/user-UID.slice, {OTHER_SLICE}"),
        ("client: {unit: user@1000.service}", f"4:20: rule 'r': client: unit: 'user@1000.service' is below /user.slice/user-UID.slice, {OTHER_SLICE}"),
        ("client: {unit: session-3.scope}", f"4:20: rule 'r': client: unit: 'session-3.scope' is below /user.slice/user-UID.slice, {OTHER_SLICE}"),
        ("client: {unit: machine-a.scope}", f"4:20: rule 'r': client: unit: 'machine-a.scope' is below /machine.slice, {OTHER_SLICE}"),
        ('client: {unit: "@.service"}', "4:20: rule 'r': client: unit: '@.service' is no template and no unit; write NAME@INSTANCE.service, or NAME@.service for all of them"),
        ("client: {cgroup: /}", "4:22: rule 'r': client: cgroup: every process is in or below the control group '/'; write 'client: any' if that is meant"),
        ("client: {cgroup: a}", "4:22: rule 'r': client: cgroup: 'a' is not absolute; write an absolute path, as in /var/mail"),
        ("client: {cgroup: /a/../b}", "4:22: rule 'r': client: cgroup: '/a/../b' has '.' or '..' in it; write an absolute path, as in /var/mail"),
        ("client: {cgroup: /sys/fs/cgroup/a}", "4:22: rule 'r': client: cgroup: '/sys/fs/cgroup/a' is its path in the file system; write '/a'"),
        ("client: {unit: x.service, cgroup: /a}", "4:31: rule 'r': client has both 'unit' and 'cgroup'; a unit is one control group: keep one of them, or make two entries of a list"),
        ("paths: /home/x", "4:12: rule 'r': paths: '/home/x': the glob starts with '/', but globs are relative to the root; leave out the path of the root: globs are relative to it"),
        ("paths: a/", "4:12: rule 'r': paths: 'a/': the glob has an empty component ('//' or a '/' at its end); write 'a/**' for a directory and all below it"),
        ("paths: a/../b", f"4:12: rule 'r': paths: 'a/../b': the glob has the component '..', which no path here can have; {GLOBS}"),
        ("paths: [a**]", f"4:13: rule 'r': paths: 'a**': '**' stands for whole components: write it between slashes, or use '*'; {GLOBS}"),
        ("paths: ['[a']", f"4:13: rule 'r': paths: '[a': the glob has a '[' without its ']'; {GLOBS}"),
        ("paths: [[a]]", "4:13: rule 'r': paths: an item must be text, not a list; a text that begins with [ or { must be in quotes"),
        ("paths: [x, '']", f"4:16: rule 'r': paths: an item is empty; {GLOBS}"),
        ("paths: []", f"4:12: rule 'r': paths: the list is empty; {GLOBS}"),
        ("paths:", f"4:11: rule 'r': paths has no value; {GLOBS}"),
        ("except: []", f"4:13: rule 'r': except: the list is empty; {GLOBS}"),
        ("except: //", "4:13: rule 'r': except: '//': the glob starts with '/', but globs are relative to the root; leave out the path of the root: globs are relative to it"),
        ("where: {}", "4:12: rule 'r': where is empty; write some of owner, group, mode, size, links, age, filesystem, or leave where out"),
        ("where: {onwer: x}", "4:13: rule 'r': where: unknown key 'onwer'; did you mean 'owner'?"),
        ("where: {age: 1}", "4:18: rule 'r': where: age must be a mapping, not text; write {min: 5s}, {max: 30d} or both"),
        ("where: {age: {max: 5}}", "4:24: rule 'r': where: age: max: '5' is not a duration; write digits with a unit: 30s, 5min, 2h or 7d"),
        ("where: {age: {max: 5s, min: 1min}}", "4:18: rule 'r': where: age: min 60 is more than max 5, which nothing can meet; exchange the two"),
        ("where: {filesystem: ext5}", "4:25: rule 'r': where: filesystem: 'ext5' is no type of file system that is ever served; did you mean 'ext4'?"),
        ("where: {filesystem: [xfs, proc]}", "4:31: rule 'r': where: filesystem: 'proc' is no type of file system that is ever served; they are ext2, ext3, ext4, xfs, btrfs, tmpfs, f2fs, overlay, zfs, bcachefs, squashfs, erofs, iso9660, udf, reiserfs, ramfs, fuse, nfs, cifs, smb3, smb, autofs, 9p"),
        ("where: {owner: nobody}", f"4:20: rule 'r': where: owner: 'nobody' {OVERFLOW}; use a user of its own"),
        ("where: {owner: on_behalf_of}", "4:20: rule 'r': where: owner: the rule has no 'on_behalf_of', so nobody is acted for; add 'on_behalf_of: ...' to the rule, or write client, names or numbers"),
        ("where: {group: client}", "4:20: rule 'r': where: group: there is no group 'client' on this system; create the group, or write its number"),
        ("where: {mode: 0400}", '4:19: rule \'r\': where: mode must be a mapping, not text; write {all: "0400"}, {none: "0022"} or both'),
        ("where: {mode: {}}", '4:19: rule \'r\': where: mode is empty; write {all: "0400"}, {none: "0022"} or both'),
        ("where: {mode: {all: 640}}", f"4:25: rule 'r': where: mode: all: '640' {MODE}"),
        ("where: {mode: {all: 0o640}}", f"4:25: rule 'r': where: mode: all: '0o640' {MODE}"),
        ("where: {mode: {all: 0888}}", f"4:25: rule 'r': where: mode: all: '0888' {MODE}"),
        ("where: {mode: {all: u+r}}", f"4:25: rule 'r': where: mode: all: 'u+r' {MODE}"),
        ("where: {mode: {none: 0000}}", "4:26: rule 'r': where: mode: none: 0 names no bit; name at least one, or leave the key out"),
        ("where: {mode: {all: 0600, none: 0222}}", "4:19: rule 'r': where: mode: bits 0200 must be both set and clear, which nothing can meet; name a bit in one of the two only"),
        ("where: {size: 2GiB}", "4:19: rule 'r': where: size must be a mapping, not text; write {max: 2GiB}, {min: 1} or both"),
        ("where: {size: {max: 2G}}", f"4:25: rule 'r': where: size: max: '2G' {SIZE}"),
        ("where: {size: {max: 1_000}}", f"4:25: rule 'r': where: size: max: '1_000' {SIZE}"),
        ("where: {size: {max: 1.5GiB}}", f"4:25: rule 'r': where: size: max: '1.5GiB' {SIZE}"),
        ("where: {size: {max: 0777}}", f"4:25: rule 'r': where: size: max: '0777' {SIZE}"),
        ("where: {size: {max: -1}}", f"4:25: rule 'r': where: size: max: '-1' {SIZE}"),
        ("where: {size: {max: 22:30}}", f"4:25: rule 'r': where: size: max: '22:30' {SIZE}"),
        ("where: {size: {max: 9000000TiB}}", "4:25: rule 'r': where: size: max: '9000000TiB' is larger than any file; write at most 9223372036854775807"),
        ("where: {size: {max: 1, min: 2}}", "4:19: rule 'r': where: size: min 2 is more than max 1, which nothing can meet; exchange the two"),
        ("where: {size: {mx: 1}}", "4:20: rule 'r': where: size: unknown key 'mx'; did you mean 'max'?"),
        ("where: {links: {max: 0}}", "4:26: rule 'r': where: links: max: 0: a file that has a name has at least one link; write 1 or more"),
        ("where: {links: {max: 1KiB}}", f"4:26: rule 'r': where: links: max: '1KiB' {COUNT}"),
        ("deliver: descripter", "4:14: rule 'r': deliver: 'descripter' is not a choice here; did you mean 'descriptor'?"),
        ("deliver: []", "4:14: rule 'r': deliver: the list is empty; write some of descriptor, copy"),
        ("on_behalf_of: {user: clamva}", "4:26: rule 'r': on_behalf_of: user: there is no user 'clamva' on this system; did you mean 'clamav'?"),
        ("on_behalf_of: root", "4:19: rule 'r': on_behalf_of: 'root' is neither any nor a mapping; write any, or {user: root} if that is meant"),
        ("on_behalf_of: []", f"4:19: rule 'r': on_behalf_of: the list is empty; {CLIENT}"),
        ("limits: {}", f"4:13: rule 'r': limits is empty; {RULE_LIMITS}"),
        ("limits: 5", f"4:13: rule 'r': limits must be a mapping, not text; {RULE_LIMITS}"),
        ("limits: {opens_burst: 5}", "4:27: rule 'r': limits: opens_burst says nothing without opens_per_second; write opens_per_second as well, or remove it"),
        ("limits: {opens_per_second: 0}", "4:32: rule 'r': limits: opens_per_second: 0 is out of range; write a number from 1 to 1000000"),
        ("limits: {in_flight: 0}", "4:25: rule 'r': limits: in_flight: 0 is out of range; write a number from 1 to 1000000"),
        ("limits: {open_per_second: 5}", "4:14: rule 'r': limits: unknown key 'open_per_second'; did you mean 'opens_per_second'?"),
        ("symlinks: [refuse]", "4:15: rule 'r': symlinks must be text, not a list; write refuse or within-root"),
        ("symlinks: yes", "4:15: rule 'r': symlinks: 'yes' is not a choice here; write refuse or within-root"),
        ("age: 1", "4:5: rule 'r': unknown key 'age'; the keys here are name, allow, deny, client, on_behalf_of, in, paths, except, where, deliver, limits, symlinks"),
        ("excpet: x", "4:5: rule 'r': unknown key 'excpet'; did you mean 'except'?"),
        ("Paths: x", "4:5: rule 'r': unknown key 'Paths'; the keys here are name, allow, deny, client, on_behalf_of, in, paths, except, where, deliver, limits, symlinks"),
        ("clients: any", "4:5: rule 'r': unknown key 'clients'; did you mean 'limits'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_rule_is_shown_with_place_reason_and_cure(line: str, problem: str) -> None:
    assert problems_of(allowing(line)) == [f"p.yaml:{problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "1:1: the policy must be a mapping, not a list; begin with 'version: 1'"),
        ("{}", "1:1: the policy is empty; begin with 'version: 1'"),
        (SMALLEST.replace("version: 1\n", ""), "1:1: key 'version' is missing; add 'version: 1'"),
        (SMALLEST.replace(": 1", ": 2"), "1:10: version 2 of the policy format is not known; write 'version: 1', or use the fdbroker that this policy is for"),
        (SMALLEST.replace(": 1", ": 1.0"), f"1:10: version: '1.0' {COUNT}"),
        (SMALLEST.replace(": 1", ": true"), f"1:10: version: 'true' {COUNT}"),
        (SMALLEST.replace(": 1", ":"), "1:9: version has no value; write 'version: 1'"),
        (SMALLEST.replace("rules: []\n", ""), "1:1: key 'rules' is missing; add 'rules: ...'"),
        (SMALLEST.replace("[]", ""), "3:7: rules has no value; write a list; [] denies everything"),
        (SMALLEST.replace("[]", "{}"), "3:8: rules must be a list, not a mapping; write a list; [] denies everything"),
        (SMALLEST.replace("[]", "[x]"), "3:9: rule 1 must be a mapping, not text; write a mapping that begins with '- name: ...'"),
        (SMALLEST.replace("{home: {path: /home}}", "{}"), "2:8: roots is empty; name at least one, as in 'home: {path: /home}'"),
        (SMALLEST.replace("/home}", "home}"), "2:22: root 'home': path: 'home' is not absolute; write an absolute path, as in /var/mail"),
        (SMALLEST.replace("/home}", "/home/}"), "2:22: root 'home': path: '/home/' ends with '/'; write an absolute path, as in /var/mail"),
        (SMALLEST.replace("/home}", "//home}"), "2:22: root 'home': path: '//home' has '//' in it; write an absolute path, as in /var/mail"),
        (SMALLEST.replace("/home}", "/./home}"), "2:22: root 'home': path: '/./home' has '.' or '..' in it; write an absolute path, as in /var/mail"),
        (SMALLEST.replace("/home}", "/homes}"), "2:22: root 'home': path: '/homes': No such file or directory; name a directory that exists"),
        (SMALLEST.replace("{path: /home}", "/home"), "2:15: root 'home' must be a mapping, not text; write {path: /DIRECTORY}"),
        (SMALLEST.replace("path:", "pth:"), "2:16: root 'home': unknown key 'pth'; did you mean 'path'?"),
        (SMALLEST.replace("path: /home", "cross_mounts: true"), "2:15: root 'home': key 'path' is missing; add 'path: ...'"),
        (SMALLEST.replace("{home", "{Home"), "2:9: root name 'Home' is not allowed; use a-z, 0-9, '_' and '-', beginning with a letter or digit"),
        (SMALLEST.replace("/home}", "/home, opens: helper}"), "2:36: root 'home': opens: 'helper' is not a choice here; did you mean 'helpers'?"),
        (SMALLEST.replace("/home}", "/home, opens: directly}"), "2:36: root 'home': opens: 'directly' is not a choice here; write loop or helpers"),
        (SMALLEST.replace("/home}", "/home}, h2: {path: /home}"), "2:41: root 'h2': path: '/home' is that of root 'home' too, in line 2; keep one root for a path"),
        *[
            (SMALLEST.replace("/home}", f"/home, cross_mounts: {word}}}"), f"2:43: root 'home': cross_mounts: '{word}' is not a boolean here; write true or false; yes, no, on and off are not taken")
            for word in ("yes", "no", "on", "off", "True", "1")
        ],
        (SMALLEST + "limits: {}", f"4:9: limits is empty; write some of {LIMITS}, or leave limits out"),
        (SMALLEST + "limits: {idle_timeout: 25h}", "4:24: limits: idle_timeout: 25h is out of range; write a duration from 1s to 24h"),
        (SMALLEST + "limits: {in_flight_per_uid: 252}", "4:29: limits: in_flight_per_uid: 252 is out of range; write a number from 253 to 1000000"),
        (SMALLEST + "limits: {requests_per_second: 1000001}", "4:31: limits: requests_per_second: 1000001 is out of range; write a number from 1 to 1000000"),
        (SMALLEST + "limits: {requests_burst: 5}", "4:26: limits: requests_burst says nothing without requests_per_second; write requests_per_second as well, or remove it"),
        (SMALLEST + "limits: {connections_per_uid: 0}", "4:31: limits: connections_per_uid: 0 is out of range; write a number from 1 to 10000"),
        (SMALLEST + "limits: {in_flight_per_connection: 252}", "4:36: limits: in_flight_per_connection: 252 is out of range; write a number from 253 to 8192"),
        (SMALLEST + "limits: {in_flight_per_connection: 8193}", "4:36: limits: in_flight_per_connection: 8193 is out of range; write a number from 253 to 8192"),
        (SMALLEST + "limits: {message_within: 0s}", "4:26: limits: message_within: 0s is out of range; write a duration from 1s to 1h"),
        (SMALLEST + "limits: {message_within: 61min}", "4:26: limits: message_within: 61min is out of range; write a duration from 1s to 1h"),
        (SMALLEST + "limits: {message_within: 10}", "4:26: limits: message_within: '10' is not a duration; write digits with a unit: 30s, 5min, 2h or 7d"),
        (SMALLEST + "limits: {connections_per_uid: 1_0}", f"4:31: limits: connections_per_uid: '1_0' {COUNT}"),
        (SMALLEST + "limits: {connections_per_uid: +1}", f"4:31: limits: connections_per_uid: '+1' {COUNT}"),
        (SMALLEST + "limits: {connections_per_uid: \u0661}", f"4:31: limits: connections_per_uid: '\u0661' {COUNT}"),
        (SMALLEST + "limits: {connections_per_user: 1}", "4:10: limits: unknown key 'connections_per_user'; did you mean 'connections_per_uid'?"),
        (SMALLEST + "audit: {on_failure: off}", "4:21: audit: on_failure: 'off' is not a choice here; write deny or allow"),
        (SMALLEST + "audit: deny", "4:8: audit must be a mapping, not text; write {on_failure: deny}, or leave audit out"),
        (SMALLEST + "read_only_view: no", "4:17: read_only_view: 'no' is not a choice here; write required or off"),
        (SMALLEST + "audit: {to: audit}", "4:13: audit: to: 'audit' is not absolute; write an absolute path, as in /var/mail"),
        (SMALLEST + "admins: {}", "4:9: admins is empty; write {group: NAME}, {user: NAME} or both"),
        (SMALLEST + "admins: fdbroker-admin", "4:9: admins must be a mapping, not text; write {group: NAME}, {user: NAME} or both"),
        (SMALLEST + "admins: {groups: x}", "4:10: admins: unknown key 'groups'; did you mean 'group'?"),
        (SMALLEST + "admins: {group: fdbroker-admins}", "4:17: admins: group: there is no group 'fdbroker-admins' on this system; did you mean 'fdbroker-admin'?"),
        (SMALLEST + "admins: {user: nobody}", f"4:16: admins: user: 'nobody' {OVERFLOW}; use a user of its own"),
        (SMALLEST + "user: fdbrokr", "4:7: user: there is no user 'fdbrokr' on this system; create the user"),
        (SMALLEST + "user: clamva", "4:7: user: there is no user 'clamva' on this system; did you mean 'clamav'?"),
        (SMALLEST + "user: root", "4:7: user: 'root' has root's uid or group, and the broker opens no file as root; create a user for it alone"),
        (SMALLEST + "user: odd", "4:7: user: 'odd' has root's uid or group, and the broker opens no file as root; create a user for it alone"),
        (SMALLEST + "user: anon", "4:7: user: 'anon' has id 65534, which stands for anybody; create a user for it alone"),
        (SMALLEST + "user: [a]", "4:7: user must be text, not a list; write the name of a user, as in fdbroker"),
        (SMALLEST + "listeners: {}", "4:12: listeners is empty; write some of seqpacket, stream, dgram, control, names of services, or leave listeners out"),
        (SMALLEST + "listeners: {clamd: {}}", "4:20: listeners: clamd is empty; write {service: {user: NAME}}"),
        (SMALLEST + "listeners: {clamd: {path: /run/clamd}}", "4:20: listeners: clamd: key 'service' is missing; add 'service: ...'"),
        (SMALLEST + "listeners: {clamd: {service: {user: app}, type: dgram}}", "4:49: listeners: clamd: type: 'dgram' is not a choice here; write stream or seqpacket"),
        (SMALLEST + "listeners: {clamd: {service: any}}", "4:30: listeners: clamd: service: everybody could take its clients, and act for them; write who the service is: {user: NAME}, {unit: NAME.service}"),
        (SMALLEST + "listeners: {clamd: {service: clamav}}", "4:30: listeners: clamd: service: 'clamav' is neither any nor a mapping; write any, or {user: clamav} if that is meant"),
        (SMALLEST + "listeners: {clamd: {service: {user: clamva}}}", "4:37: listeners: clamd: service: user: there is no user 'clamva' on this system; did you mean 'clamav'?"),
        (SMALLEST + "listeners: {Clamd: {service: {user: clamav}}}", "4:13: listeners: name of a service 'Clamd' is not allowed; use a-z, 0-9, '_' and '-', beginning with a letter or digit, and no word of systemd's"),
        (SMALLEST + "listeners: {connection: {service: {user: clamav}}}", "4:13: listeners: name of a service 'connection' is not allowed: it is what systemd calls a socket without a name; use a-z, 0-9, '_' and '-', beginning with a letter or digit, and no word of systemd's"),
        (SMALLEST + f"listeners: {{{'x' * 65}: {{service: {{user: clamav}}}}}}", f"4:13: listeners: name of a service '{'x' * 65}' is not allowed: it is longer than 64 bytes; use a-z, 0-9, '_' and '-', beginning with a letter or digit, and no word of systemd's"),
        (SMALLEST + "listeners: {stream: {service: {user: clamav}}}", "4:22: listeners: stream: its clients are the broker's own, so no service takes them; remove 'service', or give the service's listener a name of its own"),
        (SMALLEST + "listeners: {x: {service: {user: app}}, y: {service: {user: app}, path: /run/fdbroker/x}}", "4:12: listeners: x and y have the path '/run/fdbroker/x'; give each a path of its own"),
        (SMALLEST + "listeners: {contrl: {}}", "4:13: listeners: unknown key 'contrl'; did you mean 'control'?"),
        (SMALLEST + "listeners: {control: 0666}", "4:22: listeners: control must be a mapping, not text; write some of path, group, mode, or {} for what is usual"),
        (SMALLEST + "listeners: {control: {path: control}}", "4:29: listeners: control: path: 'control' is not absolute; write an absolute path, as in /var/mail"),
        (SMALLEST + "listeners: {control: {path: /}}", "4:29: listeners: control: path: '/' is not the name of a socket; write a path below /run/fdbroker"),
        (SMALLEST + f"listeners: {{control: {{path: /{'x' * 107}}}}}", f"4:29: listeners: control: path: '/{'x' * 76}...' is longer than 107 bytes, as the path of a socket may be; choose a shorter one"),
        (SMALLEST + "listeners: {control: {mode: 666}}", f"4:29: listeners: control: mode: '666' {MODE}"),
        (SMALLEST + "listeners: {control: {mode: 02666}}", "4:29: listeners: control: mode: '02666' has more than permissions in it; write at most 0777"),
        (SMALLEST + "listeners: {control: {group: [adm, users]}}", "4:30: listeners: control: group must be text, not a list; write the name of one group"),
        (SMALLEST + "listeners: {control: {group: usres}}", "4:30: listeners: control: group: there is no group 'usres' on this system; did you mean 'users'?"),
        (SMALLEST + "listeners: {control: {path: /run/fdbroker/broker.seqpacket}}", "4:12: listeners: seqpacket and control have the path '/run/fdbroker/broker.seqpacket'; give each a path of its own"),
        (SMALLEST + "identity: strong", "4:11: identity: 'strong' is not a choice here; write available or strict"),
        (SMALLEST + "service: x", "4:1: unknown key 'service'; the keys here are version, roots, rules, limits, audit, read_only_view, identity, admins, user, listeners"),
        (SMALLEST + "rule: []", "4:1: unknown key 'rule'; the keys here are version, roots, rules, limits, audit, read_only_view, identity, admins, user, listeners"),
        (SMALLEST + "version: 2", "4:1: key 'version' is given twice, first in line 1; keep one of the two"),
        (with_rule("name: r", "in: home", "paths: x"), "4:5: rule 'r' has neither 'allow' nor 'deny'; add one of them with a list of actions"),
        (with_rule("name: r", "in: home", "paths: x", "alow: open"), "7:5: rule 'r': unknown key 'alow'; did you mean 'allow'?"),
        (with_rule("name: r", "in: home", "paths: x", "deny: open", "allow: stat", "client: any"), "8:5: rule 'r' has both 'allow' and 'deny'; make two rules of it"),
        (with_rule("name: r", "in: home", "paths: x", "allow: open"), "4:5: rule 'r': key 'client' is missing; add 'client: ...'"),
        (with_rule("name: r", "in: home", "deny: open"), "4:5: rule 'r': key 'paths' is missing; add 'paths: ...'"),
        (with_rule("name: r", "in: home", "deny: open", "path: x"), "7:5: rule 'r': unknown key 'path'; did you mean 'paths'?"),
        (with_rule("in: home", "deny: open", "paths: x"), "4:5: rule 1: key 'name' is missing; add 'name: ...'"),
        (with_rule("name: r", "in: home", "deny: open", "paths: x", "deliver: copy"), "8:5: rule 'r': a deny rule delivers nothing; remove 'deliver'; what is denied is denied however it would be delivered"),
        (with_rule("name: r", "in: home", "deny: open", "paths: x", "symlinks: refuse"), "8:5: rule 'r': a deny rule follows no links; remove 'symlinks'; what is denied is denied by whatever link it is asked for"),
        (with_rule("name: r", "in: home", "allow: walk", "client: any", "paths: x", "symlinks: within-root"), "9:5: rule 'r': walks follow no links; remove 'symlinks', or allow open, stat or list"),
        (with_rule("name: r", "in: home", "allow: open", "client: any", "paths: x", "symlinks: within-root").replace("/home}", "/home, opens: helpers}"), "9:5: rule 'r': helpers open in root 'home', and they follow no links; remove 'symlinks', or the root's 'opens: helpers'"),
        (with_rule("name: r", "in: home", "allow: stat", "client: any", "paths: x", "deliver: copy"), "9:5: rule 'r': only what is opened is delivered; remove 'deliver', or allow open"),
        (with_rule("name: r", "in: home", "deny: open", "paths: x") + "  - {name: r, in: home, deny: stat, paths: y}", "8:12: rule name 'r' is given twice, first in line 4; give each rule a name of its own"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_policy_is_shown_with_place_reason_and_cure(text: str, problem: str) -> None:
    assert problems_of(text) == [f"p.yaml:{problem}"]


def test_all_mistakes_of_a_policy_are_shown_at_once() -> None:
    found = problems_of(
        """\
        version: 1
        roots:
          home: {path: home}
        rules:
          - name: a
            alow: [open]
            in: hme
            paths: ["/x"]
          - name: b
            allow: [reed]
            client: {user: nobody}
            in: home
            where: {size: {max: 1G}}
        limits: {connections_per_uid: many}
        """
    )
    assert [int(line.split(":")[1]) for line in found] == [3, 6, 7, 8, 9, 10, 11, 13, 14]


def test_a_rule_in_a_root_that_is_refused_is_not_blamed_for_it() -> None:
    text = allowing("in: home").replace("/home", "home")
    assert [line.split(":")[1] for line in problems_of(text)] == ["2"]


def test_what_yaml_refuses_is_not_reported_again_as_missing_or_wrong() -> None:
    text = allowing("paths: [*x]").replace("client: any", "client: !t any")
    assert [line.split(": ")[1].split(",")[0] for line in problems_of(text)] == [
        "aliases are not allowed",
        "tags are not allowed",
    ]


def test_offline_takes_names_and_directories_as_given_and_gives_no_number_that_is_anybodys() -> None:
    text = allowing("client: {user: whoever, group: them}").replace("/home", "/nowhere")
    policy = compile_policy(text.encode(), "p.yaml", OfflineLookups())
    [client] = policy["rules"][0]["clients"]
    assert all(number < 0 for number in (*client["uids"], *client["gids"]))


def test_long_values_are_cut_in_messages() -> None:
    [problem] = problems_of(allowing(f"in: {'x' * 100_000}"))
    assert len(problem) < 200


@pytest.mark.unmeasured
def test_a_policy_of_thousands_of_rules_is_compiled_in_reasonable_time() -> None:
    rules = "".join(f"- {{name: r{n}, deny: open, in: home, paths: u{n}/x/**}}\n" for n in range(3_000))
    text = SMALLEST.replace("[]", "\n" + rules)
    began = time.process_time()
    assert len(compiled(text)["rules"]) == 3_000
    assert time.process_time() - began < 9


def test_a_thousand_roots_are_not_all_listed_in_a_message() -> None:
    roots = ", ".join(f"x{number}: {{path: /home}}" for number in range(1000))
    text = allowing("in: other").replace("home: {path: /home}", roots)
    assert max(map(len, problems_of(text))) < 200


# ---- garbage ----

WORDS = st.sampled_from(
    [
        "version",
        "roots",
        "rules",
        "home",
        "path",
        "/home",
        "name",
        "allow",
        "deny",
        "open",
        "client",
        "any",
        "user",
        "group",
        "unit",
        "cgroup",
        "in",
        "paths",
        "except",
        "where",
        "owner",
        "mode",
        "all",
        "size",
        "max",
        "links",
        "deliver",
        "copy",
        "symlinks",
        "within-root",
        "limits",
        "connections_per_uid",
        "audit",
        "on_failure",
        "read_only_view",
        "off",
        "1",
        "0400",
        "2GiB",
        '"**"',
        "65534",
        "clamav",
        "x.service",
        "''",
        "~",
        '"\\ud800"',
        "[a",
        "a/",
        "{",
        "é",
        "\x00",
    ]
)
NODES = st.recursive(
    WORDS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: "[" + ", ".join(items) + "]")
        | st.lists(st.tuples(WORDS, inner), max_size=5).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=25,
)


def is_compiled_or_refused(text: bytes) -> None:
    """What comes out is read by the broker, and what is refused has a problem to show."""
    try:
        policy = compile_policy(text, "p.yaml", FakeLookups())
    except ConfigError as error:
        problems = error.problems
    else:
        read_policy(for_broker(policy))
        return
    assert problems
    assert all(problem.message and problem.cure for problem in problems)


@given(NODES)
def test_any_tree_is_compiled_or_refused(text: str) -> None:
    is_compiled_or_refused(text.encode("utf-8", "surrogatepass"))


@given(NODES, NODES, NODES, NODES)
def test_any_tree_in_the_place_of_a_value_is_compiled_or_refused(a: str, b: str, c: str, d: str) -> None:
    text = (
        f"version: 1\nroots: {{home: {{path: /home}}}}\nlimits: {a}\naudit: {b}\nrules:\n"
        f"- {{name: r, allow: open, in: home, client: {c}, paths: [x], where: {d}}}\n"
    )
    is_compiled_or_refused(text.encode("utf-8", "surrogatepass"))


@given(st.binary(), st.integers(0, len(WHOLE)), st.integers(0, 40))
def test_a_policy_with_any_bytes_in_it_is_compiled_or_refused(piece: bytes, at: int, cut: int) -> None:
    whole = WHOLE.encode()
    is_compiled_or_refused(whole[:at] + piece + whole[at + cut :])
