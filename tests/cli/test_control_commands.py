"""`fdbroker reload`, `status` and `policy explain` with a running broker."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pytest

from fdbroker.cli import policy_explain as policy_command
from fdbroker.cli.broker import DENIED, how_to_restart
from fdbroker.cli.explanation import document_of_answer, lines_of_answer, status_of_answer
from fdbroker.cli.failure import Failure
from fdbroker.client import BrokerError, connect
from fdbroker.config.explain import Seen
from fdbroker.policy.rules import ClientFacts
from tests.cli.commands import run, run_as, run_here, run_program_as
from tests.processes import children_of, in_child
from tests.running_broker import CLIENT_UID, OTHER_UID, reachable_directory, running_broker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers
    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root

POLICY = """\
version: 1
roots:
  tree: {{path: {tree}}}
rules:
  - name: never-keys
    deny: [open, stat, list]
    in: tree
    paths: ["**/.ssh/**"]
  - name: small-files-of-the-client
    allow: [open, stat]
    in: tree
    client: {{user: {client}}}
    paths: ["**"]
    except: ["private/**"]
    where: {{size: {{max: 10}}, links: {{max: 1}}}}
  - name: lists
    allow: list
    in: tree
    client: {{user: {client}}}
    paths: ["**"]
  - name: public
    allow: [open, stat]
    in: tree
    client: any
    paths: ["public/*"]
{more}"""


class Served(NamedTuple):
    """A running broker with its control socket, its policy file, and what it serves."""

    broker: RunningBroker
    control: str
    policy: Path
    tree: Path

    @property
    def sockets(self) -> tuple[str, ...]:
        """The options that lead to it."""
        return ("--socket", str(self.broker.socket), "--control", self.control)


def policy_text(tree: Path, more: str = "") -> str:
    return POLICY.format(tree=tree, client=CLIENT_UID, more=more)


@contextlib.contextmanager
def serving() -> Iterator[Served]:
    with reachable_directory() as directory:
        tree = directory / "tree"
        for name, contents in {
            "a/small": b"small",
            "a/large": b"much too large",
            "a/.ssh/key": b"key",
            "private/x": b"x",
            "public/p": b"p",
            "odd\nname": b"o",
        }.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(contents)
            (tree / name).chmod(0o600)
        os.link(tree / "a" / "small", tree / "a" / "second")
        (tree / "a" / "link").symlink_to("small")
        tree.chmod(0o700)
        control = str(directory / "control")
        with running_broker(directory, policy_text(tree), f"--control={control}") as broker:
            yield Served(broker, control, directory / "policy.yaml", tree)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Serve all who only ask."""
    with serving() as made:
        yield made


@pytest.fixture
def to_change() -> Iterator[Served]:
    """Serve one who changes the policy or the files."""
    with serving() as made:
        yield made


# ---- reload ----


def test_reload_puts_the_changed_policy_in_force_and_names_its_generation(
    to_change: Served, others: ForOtherUsers
) -> None:
    file = str(to_change.tree / "private" / "x")
    before = run_as(CLIENT_UID, others, "cat", *to_change.sockets[:2], file)
    more = "  - {name: private, allow: open, in: tree, client: any, paths: 'private/**'}\n"
    to_change.policy.write_text(policy_text(to_change.tree, more))
    result = run_here("reload", "--dev", "--policy", str(to_change.policy), "--control", to_change.control)
    after = run_as(CLIENT_UID, others, "cat", *to_change.sockets[:2], file)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{to_change.policy} is in force: generation 2, 1 root, 5 rules\n"
    assert (before.returncode, after.returncode, after.stdout) == (1, 0, "x")
    assert [record["event"] for record in to_change.broker.records() if "fingerprint" in record] == [
        "reloaded"
    ]


def test_reload_of_a_broken_policy_shows_each_problem_with_its_place_and_changes_nothing(
    to_change: Served, others: ForOtherUsers
) -> None:
    to_change.policy.write_text(
        policy_text(to_change.tree, "  - {name: x, alow: open, in: nowhere, paths: '**'}\n")
    )
    result = run_here("reload", "--dev", "--policy", str(to_change.policy), "--control", to_change.control)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"{to_change.policy}:26:15: rule 'x': unknown key 'alow'; did you mean 'allow'?" in result.stderr
    assert "there is no root 'nowhere'" in result.stderr
    assert all(line.startswith("fdbroker: ") for line in result.stderr.splitlines())
    status = json.loads(run_here("status", "--json", *to_change.sockets).stdout)
    assert status["generation"] == 1
    still = run_as(CLIENT_UID, others, "cat", *to_change.sockets[:2], str(to_change.tree / "public" / "p"))
    assert still.stdout == "p"


def test_reload_that_the_broker_refuses_says_why_and_what_to_do(to_change: Served) -> None:
    with reachable_directory() as other:
        to_change.policy.write_text(policy_text(other))
        result = run_here(
            "reload", "--dev", "--policy", str(to_change.policy), "--control", to_change.control
        )
    assert result.returncode == 2
    assert "the broker keeps its old policy" in result.stderr
    assert f"restart the broker: {how_to_restart()}" in result.stderr


def test_reload_is_for_root(served: Served, others: ForOtherUsers) -> None:
    result = run_program_as(CLIENT_UID, others, "reload", "--control", served.control)
    assert result.returncode == 2
    assert result.stderr == "fdbroker: only root changes the policy: run this as root\n"


def test_reload_without_a_broker_says_how_to_start_one(served: Served, tmp_path: Path) -> None:
    where = str(tmp_path / "none")
    result = run_here("reload", "--dev", "--policy", str(served.policy), "--control", where)
    assert result.returncode == 2
    assert where in result.stderr
    assert "FDBROKER_CONTROL" in result.stderr
    assert "fdbrokerd --daemon" in result.stderr


# ---- status ----


def test_root_sees_the_whole_status_and_others_what_concerns_them(
    served: Served, others: ForOtherUsers
) -> None:
    whole = run_here("status", *served.sockets)
    assert (whole.returncode, whole.stderr) == (0, "")
    shown = {line.partition("  ")[0].strip(): line for line in whole.stdout.splitlines()}
    assert shown["rules"].endswith(" 4")
    assert shown["pid"].endswith(f" {served.broker.pid}")
    assert f"name tree, path {served.tree}, cross mounts no" in whole.stdout
    assert shown["seccomp"].endswith(" yes")
    document = json.loads(run_here("status", "--json", *served.sockets).stdout)
    assert document["rules"] == 4
    of_client = run_as(CLIENT_UID, others, "status", "--json", *served.sockets)
    assert "rules" not in json.loads(of_client.stdout)
    assert json.loads(of_client.stdout)["peer"]["uid"] == CLIENT_UID


def test_status_asks_the_other_socket_where_control_is_not_there(served: Served, tmp_path: Path) -> None:
    where = str(tmp_path / "none")
    result = run_here("status", "--json", "--socket", str(served.broker.socket), "--control", where)
    assert result.returncode == 0
    assert json.loads(result.stdout)["generation"] == 1
    assert f"So {served.broker.socket} was asked, which tells less." in result.stderr
    neither = run_here("status", "--socket", where, "--control", where)
    assert neither.returncode == 2
    assert neither.stdout == ""
    assert neither.stderr.count("fdbrokerd --daemon") == 2


# ---- explain ----

ASKED = [
    ("open", "a/small"),
    ("open", "a/large"),
    ("open", "a/second"),
    ("open", "a/.ssh/key"),
    ("open", "a/link"),
    ("open", "a/none"),
    ("open", "a"),
    ("open", "private/x"),
    ("open", "public/p"),
    ("open", "public/none"),
    ("open", "odd\nname"),
    ("open", "a/small/x"),
    ("stat", "a/link"),
    ("stat", "a"),
    ("stat", "a/large"),
    ("list", "a"),
    ("list", "a/small"),
    ("list", "a/.ssh"),
]


def ask(broker: RunningBroker, action: str, path: str) -> bool:
    """Return whether the broker gives it to this process."""
    with connect(broker.socket) as client:
        calls: dict[str, Callable[[str], object]] = {
            "open": client.open,
            "stat": client.stat,
            "list": client.list,
        }
        asked = calls[action]
        try:
            given = asked(path)
        except BrokerError:
            return False
        if isinstance(given, io.BufferedReader):
            given.close()
        return True


def test_offline_verdict_is_what_the_broker_does_and_records(to_change: Served) -> None:
    os.unlink(to_change.tree / "a" / "second")
    os.link(to_change.tree / "public" / "p", to_change.tree / "a" / "second")
    for uid in (CLIENT_UID, OTHER_UID):
        for action, name in ASKED:
            path = f"{to_change.tree}/{name}"
            offline = explained(to_change, path, "--as", str(uid), "--action", action)
            before = len(to_change.broker.decisions())
            given = in_child(partial(ask, to_change.broker, action, path), uid=uid)
            [record] = to_change.broker.decisions()[before:]
            verdict = (offline["decision"], offline["reason"], offline["rule"])
            assert verdict == (record["decision"], record["reason"], record["rule"]), (uid, action, name)
            assert given is (offline["decision"] == "allow")


def explained(served: Served, path: str, *options: str) -> dict[str, Any]:
    result = run_here("policy", "explain", "--json", "--policy", str(served.policy), *options, path)
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == {"allow": 0, "deny": 1, "unknown": 3}[document["decision"]]
    return document


def test_explanation_says_rule_by_rule_which_condition_fails(served: Served) -> None:
    path = f"{served.tree}/a/large"
    result = run_here("policy", "explain", "--policy", str(served.policy), "--as", str(CLIENT_UID), path)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert "rule small-files-of-the-client (allow): does not apply" in lines
    assert "  - size    must be at most 10 bytes; is 14" in lines
    assert "  + links   must be at most 1; is 1" in lines
    assert "  + except  matches none of private/**" in lines
    assert "rule never-keys (deny): does not apply" in lines
    assert "  - paths   matches none of **/.ssh/**" in lines
    assert "object  regular file, owner 0 (root)" in result.stdout
    assert lines[-1] == ("Denied: rule small-files-of-the-client would allow it, but not of this size.")


def test_name_that_plays_with_the_terminal_is_shown_escaped(served: Served) -> None:
    path = f"{served.tree}/odd\nname"
    result = run_here("policy", "explain", "--policy", str(served.policy), "--as", str(CLIENT_UID), path)
    assert result.returncode == 0
    assert rf"path    {served.tree}/odd\x0aname" in result.stdout.splitlines()


def test_user_who_may_not_read_the_policy_asks_the_broker_about_himself(
    served: Served, others: ForOtherUsers
) -> None:
    def asked(name: str, *options: str) -> tuple[int, str]:
        path = f"{served.tree}/{name}"
        result = run_as(CLIENT_UID, others, "policy", "explain", "--control", served.control, *options, path)
        assert result.stderr == ""
        return result.returncode, result.stdout

    status, shown = asked("a/.ssh/key")
    assert (status, "Denied: rule never-keys denies it" in shown) == (1, True)
    status, shown = asked("a/large")
    assert (status, "conditions of rule small-files-of-the-client" in shown) == (3, True)
    status, shown = asked("public/p")
    assert (status, "Allowed: rule public allows it" in shown) == (0, True)
    status, shown = asked("private/x", "--json")
    assert (status, json.loads(shown)["reason"]) == (1, "no_rule")
    assert "rule lists" not in asked("a", "--action", "list")[1].partition("Allowed")[0]


def test_user_who_can_not_look_at_the_file_is_told_the_next_step(
    served: Served, others: ForOtherUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{served.tree}/odd\nname"
    asked = ("policy", "explain", "--policy", str(served.policy), "--as", str(CLIENT_UID), path)
    as_root = run_here(*asked)
    monkeypatch.setattr(os, "geteuid", lambda: CLIENT_UID)
    monkeypatch.setattr("fdbroker.config.explain.look_as_broker", lambda *_: Seen(note="Permission denied"))
    as_himself = run_here(*asked)
    assert (as_root.returncode, "Root can" in as_root.stdout) == (0, False)
    assert as_himself.returncode == 3
    last = as_himself.stdout.splitlines()[-1]
    assert last == f"Root can look at it: run this again as root, with --as {CLIENT_UID}."
    of_broker = run_as(CLIENT_UID, others, "policy", "explain", "--control", served.control, path)
    assert of_broker.stdout.endswith(f": run this again as root, with --as {CLIENT_UID}.\n")


@pytest.mark.parametrize("name", ["a/none", "a", "a/link", "a/large", "private/x"])
def test_one_wording_for_what_is_denied_and_what_a_rule_with_conditions_does_not_find(
    served: Served, others: ForOtherUsers, name: str
) -> None:
    socket = served.sockets[:2]
    path = f"{served.tree}/{name}"
    by_cat = run_as(CLIENT_UID, others, "cat", *socket, path)
    by_exec = run_as(CLIENT_UID, others, "exec", *socket, path, "--", "true")
    assert f"fdbroker: {path}: {DENIED}. See why, as root " in by_cat.stderr
    assert by_exec.stderr == by_cat.stderr
    if name != "a":
        by_scan = run_as(CLIENT_UID, others, "scan", *socket, path)
        assert f"{path}: error: {DENIED}\n" in by_scan.stdout


def test_machine_without_a_policy_file_or_without_what_reads_it_asks_the_broker(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"{served.tree}/a/.ssh/key"
    asked = ("policy", "explain", "--control", served.control, key)
    monkeypatch.setattr(policy_command, "DEFAULT_POLICY", str(served.tree / "none"))
    missing = run_here(*asked)
    monkeypatch.setattr(policy_command, "DEFAULT_POLICY", str(served.policy))
    monkeypatch.setattr(policy_command, "_read", refuse)
    unreadable = run_here(*asked)
    assert "of the running broker" in missing.stdout
    assert (missing.returncode, missing.stdout) == (unreadable.returncode, unreadable.stdout)
    # About others it can't be asked.
    assert "pip install 'fdbroker[daemon]'" in run_here("policy", "explain", "--as", "0", key).stderr


def test_path_that_can_not_be_sent_is_no_problem_of_the_control_socket(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_command, "DEFAULT_POLICY", str(served.tree / "none"))
    path = "/" + "x" * 5000
    result = run_here("policy", "explain", "--control", served.control, path)
    assert result.returncode == 2
    assert result.stderr == f"fdbroker: {path}: not a path: it has 5001 bytes; name it by a shorter one\n"


def refuse(_path: str) -> None:
    raise ModuleNotFoundError("No module named 'yaml'", name="yaml")


def test_json_of_an_explanation_has_the_same_members_whoever_gives_it(
    served: Served, others: ForOtherUsers
) -> None:
    for name, action in (("a/large", "open"), ("a/.ssh/key", "open"), ("public/p", "open"), ("a", "list")):
        path = f"{served.tree}/{name}"
        by_file = explained(served, path, "--as", str(CLIENT_UID), "--action", action)
        options = ("--json", "--control", served.control, "--action", action)
        result = run_as(CLIENT_UID, others, "policy", "explain", *options, path)
        by_broker = json.loads(result.stdout)
        assert result.returncode == {"allow": 0, "deny": 1, "unknown": 3}[by_broker["decision"]]
        assert list(by_broker) == list(by_file)
        assert {type(value) for value in by_file["client"].values()} == {int, list}
        assert by_broker["client"].keys() == by_file["client"].keys()
        assert (by_file["source"], by_file["policy"], by_file["generation"]) == (
            "file",
            str(served.policy),
            None,
        )
        assert (by_broker["source"], by_broker["policy"], by_broker["generation"]) == ("broker", None, 1)
        assert by_broker["object"] is None
        if by_broker["decision"] != "unknown":
            both = [{key: one[key] for key in ("decision", "reason", "rule")} for one in (by_file, by_broker)]
            assert both[0] == both[1]
        for rule in by_broker["rules"]:
            [same] = [one for one in by_file["rules"] if one["name"] == rule["name"]]
            assert rule == {"name": same["name"], "effect": same["effect"], "applies": None, "checks": []}


def test_json_of_a_brokers_answer_has_the_rules_that_ask_about_the_file() -> None:
    answer = {
        "path": "\ufffd",
        "path_hex": "2fff",
        "action": "open",
        "generation": 3,
        "allowed": True,
        "reason": "ok",
        "root": "tree",
        "rule": None,
        "asked_of_object": ["a", "b"],
        "denies": ["c"],
    }
    document = document_of_answer(answer, b"/\xff")
    assert (document["path"], document["path_hex"]) == ("/\ufffd", "2fff")
    assert (document["decision"], document["reason"], document["rule"]) == ("unknown", "not_seen", None)
    assert [(one["name"], one["effect"]) for one in document["rules"]] == [
        ("a", "allow"),
        ("b", "allow"),
        ("c", "deny"),
    ]
    assert document["sentence"] == "it depends on the file: see the conditions of these rules"


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ({"allowed": True, "reason": "ok", "rule": "a", "root": "r"}, 0, "Allowed: rule a allows it"),
        (
            {"allowed": True, "rule": "a", "denies": ["d", "e"]},
            3,
            "deny    if the file meets the conditions of rule d, e",
        ),
        ({"allowed": True, "asked_of_object": ["b"]}, 3, "It depends on the file"),
        ({"allowed": False, "reason": "no_rule", "rule": None}, 1, "Denied: no rule allows it to you"),
        ({"allowed": False, "reason": "outside_roots"}, 1, "none of the trees"),
        ({"allowed": False, "reason": "new\x1b"}, 1, "Denied: new\\x1b."),
    ],
)
def test_answer_of_the_broker_is_told_in_words(answer: dict[str, Any], status: int, said: str) -> None:
    assert status_of_answer(answer) == status
    assert said in "\n".join(lines_of_answer(answer, b"/x"))


def test_nobody_asks_the_broker_about_others(served: Served, others: ForOtherUsers) -> None:
    result = run_as(
        CLIENT_UID, others, "policy", "explain", "--control", served.control, "--as", "root", "/x"
    )
    assert result.returncode == 2
    assert "/etc/fdbroker/policy.yaml: can't be read" in result.stderr
    assert "--policy FILE" in result.stderr


# ---- the running broker, asked as somebody ----


def asked_running(served: Served, *options: str) -> tuple[int, dict[str, Any], str]:
    fixed = ("--running", "--json", "--policy", str(served.policy), "--control", served.control)
    result = run_here("policy", "explain", *fixed, *options)
    return result.returncode, json.loads(result.stdout or "{}"), result.stderr


def test_running_broker_is_asked_as_a_user_and_tells_what_the_file_does_in_all_details(
    served: Served,
) -> None:
    before = len(served.broker.records())
    # All that the other user gets is compared with a file's answer by another test.
    asked = [(CLIENT_UID, *each) for each in ASKED] + [(OTHER_UID, *each) for each in ASKED[::5]]
    for uid, action, name in asked:
        path = f"{served.tree}/{name}"
        options = ("--as", str(uid), "--action", action)
        status, running, _ = asked_running(served, *options, path)
        by_file = explained(served, path, *options)
        assert (running["source"], running["generation"]) == ("broker", 1)
        assert running | {"source": "file", "generation": None} == by_file
        assert status == {"allow": 0, "deny": 1}[by_file["decision"]]
    # It was those users who asked.
    said = served.broker.records()[before:]
    assert [record["uid"] for record in said if record["event"] == "explained"] == [
        uid for uid, _, _ in asked
    ]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_user_who_stops_or_ends_the_process_that_asks_as_him_does_not_hold_up_root(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def connected(_: str | None) -> NoReturn:
        os.kill(os.getpid(), number)
        raise AssertionError("it was not signalled")

    monkeypatch.setattr(policy_command, "connected", connected)
    monkeypatch.setattr(policy_command, "_WAITED_FOR", 0.2)
    before = children_of(os.getpid())
    question = policy_command._Question("open", b"/x", None)
    with pytest.raises(Failure, match=f"to ask as user {CLIENT_UID} was ended"):
        policy_command._ask_as(question, ClientFacts(CLIENT_UID, frozenset()))
    assert children_of(os.getpid()) == before  # nobody is left


def test_file_that_is_not_in_force_is_told_from_what_the_broker_decides_by(to_change: Served) -> None:
    to_change.policy.write_text(
        policy_text(
            to_change.tree, "  - {name: more, allow: open, in: tree, client: any, paths: 'private/*'}\n"
        )
    )
    path = f"{to_change.tree}/private/x"
    status, running, told = asked_running(to_change, "--as", str(CLIENT_UID), path)
    assert (status, running["decision"], running["rules"]) == (1, "deny", [])
    assert running["client"]["uid"] == CLIENT_UID
    assert (
        told
        == f"fdbroker: {to_change.policy} is not what is in force; put it in force with: fdbroker reload\n"
    )
    assert (
        run_here("reload", "--dev", "--policy", str(to_change.policy), *to_change.sockets[2:]).returncode == 0
    )
    status, running, told = asked_running(to_change, "--as", str(CLIENT_UID), path)
    assert (status, running["decision"], running["generation"], told) == (0, "allow", 2, "")


def test_running_broker_is_asked_only_as_a_process_that_can_be(served: Served, others: ForOtherUsers) -> None:
    options = ("policy", "explain", "--running", "--control", served.control)
    for option in (("--unit", "a.service"), ("--cgroup", "/a"), ("--on-behalf-of", "0"), ("--label", "x")):
        wrong = run_here(*options, *option, "/x")
        assert wrong.returncode == 2
        assert "leave out --on-behalf-of, --unit, --cgroup and --label" in wrong.stderr
    other = run_as(CLIENT_UID, others, *options, "--as", str(OTHER_UID), "/x")
    assert (other.returncode, other.stdout) == (2, "")
    assert "only root can ask as another user" in other.stderr
    missing = f"{served.control}.none"
    none = run("policy", "explain", "--running", "--control", missing, "--as", "1", "/x")
    assert (none.returncode, none.stdout) == (2, "")
    assert "no broker has its socket there" in none.stderr


def test_running_broker_and_file_that_differ_though_they_are_the_same_are_a_fault(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdbroker.config.explain.answer_by_name", lambda *_: {"reason": "no_rule"})
    result = run_here(
        "policy", "explain", "--running", "--policy", str(served.policy), "--control", served.control,
        f"{served.tree}/public/p",
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert "differ in reason, which is a fault of fdbroker" in result.stderr


def test_control_group_and_groups_of_who_is_explained_are_shown(served: Served) -> None:
    result = run_here(
        "policy", "explain", "--policy", str(served.policy), "--as", "daemon", "--unit", "a.service", "/x"
    )
    assert "\nclient  user 1 (daemon), groups 1 (daemon)\n" in result.stdout
    assert "\ncgroup  /system.slice/a.service\n" in result.stdout
