"""A policy in several files: in a defined order, each read as the first; nothing overrides anything."""

# ruff: noqa: E501
# A case of a table is one line, with the message as it is printed.

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.config import ConfigError, load_policy_file, sources
from fdbroker.config.__main__ import main
from fdbroker.config.compile import compile_files, compile_policy
from fdbroker.config.explain import load_for_explaining
from fdbroker.config.sources import MAX_FILES, PolicyFile, read_policy_files
from tests.config.fake_lookups import FakeLookups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.config import CompiledPolicy

MAIN = "version: 1\nroots: {etc: {path: /etc}}\nrules: []\n"
RULE = "version: 1\nrules:\n  - {name: %s, deny: open, in: etc, paths: x}\n"
STRANGER = 54321


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of root's whose parents are root's as well, which /tmp is not."""
    with tempfile.TemporaryDirectory(dir="/root" if os.geteuid() == 0 else None) as name:
        path = Path(name)
        write(path / "policy.yaml", MAIN)
        (path / "policy.d").mkdir(mode=0o755)
        yield path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o644)
    return path


def refusal(directory: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_policy_file(str(directory / "policy.yaml"))
    return str(caught.value).splitlines()


def compiled(*texts: str) -> CompiledPolicy:
    return compile_files(
        [PolicyFile(f"{i}.yaml", text.encode()) for i, text in enumerate(texts)], FakeLookups()
    )


def problems_of(*texts: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compiled(*texts)
    return str(caught.value).splitlines()


# Reading


@pytest.mark.root
def test_parts_are_read_behind_the_main_file_in_byte_order_of_their_names(directory: Path) -> None:
    names = ["B.yaml", "10.yaml", "9.yaml", "a.yaml", "é.yaml"]
    for number, name in enumerate(names):
        write(directory / "policy.d" / name, RULE % f"rule{number}")
    for passed_over in ("README", "a.yaml~", ".b.yaml.swp", ".hidden.yaml", "c.yaml.dpkg-old"):
        write(directory / "policy.d" / passed_over, "no: policy: at: all")
    (directory / "policy.d" / "more").mkdir()
    policy = load_policy_file(str(directory / "policy.yaml"))
    assert [rule["name"] for rule in policy["rules"]] == ["rule1", "rule2", "rule0", "rule3", "rule4"]
    files = read_policy_files(str(directory / "policy.yaml"))
    assert [os.path.basename(file.name) for file in files] == ["policy.yaml", *sorted(names, key=os.fsencode)]


@pytest.mark.root
def test_policy_without_a_directory_of_parts_is_its_one_file(directory: Path) -> None:
    (directory / "policy.d").rmdir()
    assert len(read_policy_files(str(directory / "policy.yaml"))) == 1
    write(directory / "other", MAIN)
    (directory / "other.d").mkdir()
    write(directory / "other.d" / "x.yaml", "nothing of this")
    assert len(read_policy_files(str(directory / "other"))) == 1


@pytest.mark.root
def test_part_is_taken_from_root_alone(directory: Path) -> None:
    part = write(directory / "policy.d" / "x.yaml", RULE % "x")
    os.chown(part, STRANGER, STRANGER)
    assert refusal(directory) == [f"{part}: belongs to uid {STRANGER}, not to root; chown it to root"]
    os.chown(part, 0, 0)
    part.chmod(0o664)
    assert refusal(directory) == [f"{part}: has mode 0664, which lets others write; chmod go-w it"]
    part.chmod(0o644)
    part.rename(directory / "elsewhere.yaml")
    part.symlink_to("../elsewhere.yaml")
    assert f"{part}: is a symbolic link" in refusal(directory)[0]


@pytest.mark.root
def test_directory_of_parts_is_roots_alone_also_where_it_is_empty(directory: Path) -> None:
    parts = directory / "policy.d"
    parts.chmod(0o777)
    assert refusal(directory)[0].startswith(f"{parts}: this directory above the policy file has mode 0777")
    parts.rmdir()
    (directory / "real").mkdir()
    parts.symlink_to("real")
    assert refusal(directory)[0].startswith(f"{parts}: is a symbolic link")
    parts.unlink()
    parts.symlink_to("dangling")
    assert refusal(directory)[0].startswith(f"{parts}: is a symbolic link")
    parts.unlink()
    write(parts, "a file")
    assert "can't be opened" in refusal(directory)[0]


@pytest.mark.root
@pytest.mark.parametrize("name", ["deny.yml", "DENY.YAML", "deny.Yml"])
def test_name_that_looks_like_a_part_and_would_not_be_read_is_an_error(directory: Path, name: str) -> None:
    path = write(directory / "policy.d" / name, RULE % "x")
    assert refusal(directory) == [
        f"{path}: is not read, since its name does not end in .yaml; call it {path.stem}.yaml, or take it away"
    ]


@pytest.mark.root
def test_there_is_a_limit_to_the_number_of_parts(directory: Path) -> None:
    for number in range(MAX_FILES + 1):
        write(directory / "policy.d" / f"{number}.yaml", "version: 1\n")
    assert f"has more than {MAX_FILES} parts of a policy" in refusal(directory)[0]


@pytest.mark.root
def test_directory_that_changes_while_it_is_read_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(directory / "policy.d" / "a.yaml", RULE % "a")
    read = sources.read_policy_file

    def read_and_add(path: str, *, dev: bool) -> bytes:
        if path.endswith("a.yaml"):
            write(directory / "policy.d" / "b.yaml", RULE % "b")
        return read(path, dev=dev)

    monkeypatch.setattr(sources, "read_policy_file", read_and_add)
    assert refusal(directory) == [
        f"{directory / 'policy.d'}: changed while it was read; try again when it is written"
    ]


@pytest.mark.root
def test_command_checks_parts_and_explanations_read_them(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = write(directory / "policy.d" / "a.yaml", RULE % "a")
    file = str(directory / "policy.yaml")
    assert main(["check", file]) == 0
    assert capsys.readouterr().out == f"{file}: 1 root, 1 rule, no problems\n"
    assert [rule.name for rule in load_for_explaining(file).rules.rules] == ["a"]
    part.chmod(0o666)
    assert main(["check", file]) == 2
    assert str(part) in capsys.readouterr().err
    loaded = load_for_explaining(file)
    assert [rule.name for rule in loaded.rules.rules] == ["a"]
    assert str(part) in loaded.notes[0]


# Putting together

HOME = "version: 1\nroots: {home: {path: /home}}\nrules:\n  - {name: a, deny: open, in: home, paths: x}\n"


def test_parts_add_roots_rules_listeners_and_settings() -> None:
    policy = compiled(
        HOME + "limits: {connections_per_uid: 3}\naudit: {on_failure: allow}\n",
        "version: 1\nroots: {mail: {path: /var/mail}}\nlisteners: {stream: {}}\nidentity: strict\n",
        "version: 1\nrules:\n  - {name: b, deny: stat, in: mail, paths: y}\n  - {name: c, deny: walk, in: home, paths: z}\n"
        "limits: {message_within: 5s}\nlisteners: {dgram: {}}\naudit: {to: /var/log/x}\n",
    )
    in_one = compile_policy(
        b"""\
version: 1
roots: {home: {path: /home}, mail: {path: /var/mail}}
rules:
  - {name: a, deny: open, in: home, paths: x}
  - {name: b, deny: stat, in: mail, paths: y}
  - {name: c, deny: walk, in: home, paths: z}
limits: {connections_per_uid: 3, message_within: 5s}
audit: {on_failure: allow, to: /var/log/x}
listeners: {stream: {}, dgram: {}}
identity: strict
""",
        "p.yaml",
        FakeLookups(),
    )
    assert policy == in_one


TWICE = "is given twice, first at 0.yaml"
KEEP = "; keep one of the two"


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("", "roots: {home: {path: /var/mail}}", f"2:9: root 'home' {TWICE}:2:9{KEEP}"),
        (
            "",
            "roots: {h2: {path: /home}}",
            "2:20: root 'h2': path: '/home' is that of root 'home' too, at 0.yaml:2:22; keep one root for a path",
        ),
        (
            "",
            "rules: [{name: a, deny: open, in: home, paths: x}]",
            f"2:16: rule name 'a' {TWICE}:4:12; give each rule a name of its own",
        ),
        ("listeners: {stream: {}}", "listeners: {stream: {}}", f"2:13: listener 'stream' {TWICE}:5:13{KEEP}"),
        (
            "limits: {connections_per_uid: 1}",
            "limits: {connections_per_uid: 1}",
            f"2:10: limits: 'connections_per_uid' {TWICE}:5:10{KEEP}",
        ),
        ("audit: {to: /x}", "audit: {to: /y}", f"2:9: audit: 'to' {TWICE}:5:9{KEEP}"),
        ("admins: {user: root}", "admins: {user: root}", f"2:10: admins: 'user' {TWICE}:5:10{KEEP}"),
        ("identity: strict", "identity: available", f"2:1: key 'identity' {TWICE}:5:1{KEEP}"),
        ("read_only_view: off", "read_only_view: off", f"2:1: key 'read_only_view' {TWICE}:5:1{KEEP}"),
        ("user: brokers", "user: brokers", f"2:1: key 'user' {TWICE}:5:1{KEEP}"),
        ("", "rules: x", "2:8: rules must be a list, not text; write a list; [] denies everything"),
        (
            "",
            "roots: []",
            "2:8: roots must be a mapping, not a list; name at least one, as in 'home: {path: /home}'",
        ),
        ("", "colour: red", None),
        ("", "user: *b", None),
        ("", "rules: []\nrules: []", f"3:1: key 'rules' is given twice, first in line 2{KEEP}"),
    ],
)
def test_what_two_files_say_is_a_problem_with_both_places(
    first: str, second: str, problem: str | None
) -> None:
    found = problems_of(f"{HOME}{first}\n", f"version: 1\n{second}\n")
    assert len(found) == 1
    assert found[0].startswith("1.yaml:2:") if problem is None else found == [f"1.yaml:{problem}"]


def test_problems_come_file_by_file_and_a_file_that_can_not_be_read_hides_none_of_the_others() -> None:
    assert [problem.split(": ")[0] for problem in problems_of("x: &a 1\n", "a: &b 1\nb: *b\n", "- [\n")] == [
        "0.yaml:1:4",
        "1.yaml:1:4",
        "1.yaml:2:4",
        "2.yaml:2:1",
    ]
    bad = "version: 1\nrules:\n  - {name: b, deny: fly, in: home, paths: x}\n"
    assert [
        problem.split(": ")[0] for problem in problems_of(HOME + "usr: x\n", bad, bad.replace("b,", "c,"))
    ] == [
        "0.yaml:5:1",
        "1.yaml:3:21",
        "2.yaml:3:21",
    ]


def test_each_part_says_its_version() -> None:
    assert problems_of(HOME, "rules: []\n") == [
        "1.yaml:1:1: key 'version' is missing; add 'version: 1': each file of a policy says it"
    ]
    assert "1.yaml:1:10: version 2 of the policy format is not known" in problems_of(HOME, "version: 2\n")[0]
    assert problems_of(HOME, "") == ["1.yaml:1:1: the file is empty; begin with 'version: 1'"]
