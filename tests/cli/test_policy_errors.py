"""Whatever is wrong with a policy: a precise error from each command, exit status 2, and nothing is changed."""

# ruff: noqa: E501 - each case is a line

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fdbroker.client import connect, control
from tests.cli.commands import run_here
from tests.running_broker import OWNER_UID, reachable_directory, running_broker, with_control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root

GOOD = "version: 1\nroots: {{tree: {{path: {tree}}}}}\nrules:\n  - {{name: all, allow: open, client: any, in: tree, paths: '**'}}\n"
BOMB = "a: &a [x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)

# What is appended to a good policy, and what is said of it.
APPENDED = [
    ("unknown key", "limts: {}\n", "5:1: unknown key 'limts'; did you mean 'limits'?"),
    ("key of a rule", "  - {name: b, alow: open, in: tree, paths: x}\n", "5:15: rule 'b': unknown key 'alow'; did you mean 'allow'?"),
    ("key twice", "version: 1\n", "5:1: key 'version' is given twice, first in line 1; keep one of the two"),
    ("anchor", "admins: &x {user: root}\n", "5:9: anchors are not allowed, and '&' begins one: '&x'; remove it, or put the whole value in quotes"),
    ("alias", "admins: *x\n", "5:9: aliases are not allowed, and '*' begins one: '*x'; for a glob, write it in quotes: \"*x\"; otherwise write the value out"),
    ("merge key", "admins: {<<: {user: root}}\n", "5:10: merge keys ('<<') are not allowed; write the keys out"),
    ("tag", "admins: !!python/object/apply:os.system [id]\n", "5:9: tags are not allowed, and '!' begins one: 'tag:yaml.org,2002:python/object/apply:os.system'; remove it, or put the whole value in quotes"),
    ("bomb", BOMB, "6:4: anchors are not allowed, and '&' begins one: '&b'; remove it, or put the whole value in quotes"),
    ("deep", f"admins: {'[' * 40}\n", "5:40: lists and mappings are nested deeper than 32; no setting is that deep: check the brackets"),
    ("very deep", f"admins: {'[' * 5_000}\n", "5:40: lists and mappings are nested deeper than 32; no setting is that deep: check the brackets"),
    ("two documents", "---\nversion: 1\n", "5:1: a second document begins here; keep one document in a file"),
    ("list for a mapping", "limits: [1]\n", "5:9: limits must be a mapping, not a list; write some of connections_per_uid, in_flight_per_connection, message_within, in_flight_per_uid, requests_per_second, requests_burst, opens_per_second, opens_burst, idle_timeout, or leave limits out"),
    ("text for a list", "  - x\n", "5:5: rule 2 must be a mapping, not text; write a mapping that begins with '- name: ...'"),
    ("no", "read_only_view: no\n", "5:17: read_only_view: 'no' is not a choice here; write required or off"),
    ("0777", "limits: {connections_per_uid: 0777}\n", "5:31: limits: connections_per_uid: '0777' is not a number; write decimal digits only, as in 512"),
    ("22:30", "limits: {message_within: 22:30}\n", "5:26: limits: message_within: '22:30' is not a duration; write digits with a unit: 30s, 5min, 2h or 7d"),
    ("NUL", "# \0\n", "5:3: character U+0000 is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
    ("not UTF-8", "# \udcff\n", "5:3: byte 0xff is not UTF-8; save the file as UTF-8; bytes of names that are not UTF-8 are matched by ? and *"),
]  # fmt: skip


class Served:
    """A running broker, its policy file, and what the file was when it was started."""

    def __init__(self, directory: Path, broker: RunningBroker) -> None:
        self.directory = directory
        self.broker = broker
        self.file = directory / "policy.yaml"
        self.good = self.file.read_bytes()
        self.output = directory / "compiled.json"

    def is_as_it_was(self) -> None:
        """Check that the broker decides as before, by the policy of before."""
        with control.connect(self.broker.control) as connection:
            status = connection.status()
        assert (status["generation"], status["rules"]) == (1, 1)
        with (
            connect(self.broker.socket) as client,
            client.open(str(self.directory / "tree" / "file")) as file,
        ):
            assert file.read() == b"contents"
        assert self.output.read_text() == "old"

    def refusals(self, *, dev: bool = True) -> list[tuple[int, str, str]]:
        """Have it checked, compiled and reloaded; return the status, output and errors of each."""
        self.output.write_text("old")
        flags = ["--dev"] if dev else []
        file = str(self.file)
        results = [
            run_here("policy", "check", *flags, file),
            run_here("policy", "check", "--strict", "--json", *flags, file),
            run_here("policy", "compile", *flags, "--output", str(self.output), file),
            run_here("reload", *flags, "--policy", file, "--control", str(self.broker.control)),
        ]
        return [(result.returncode, result.stdout, result.stderr) for result in results]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with reachable_directory() as directory:
        tree = directory / "tree"
        tree.mkdir()
        (tree / "file").write_bytes(b"contents")
        text = GOOD.format(tree=tree)
        with running_broker(directory, text, with_control(directory)) as broker:
            yield Served(directory, broker)


@pytest.fixture
def file(served: Served) -> Iterator[Path]:
    """Give the policy file to be spoilt, and mend it afterwards."""
    yield served.file
    served.file.unlink(missing_ok=True)
    served.file.write_bytes(served.good)


def is_refused(served: Served, said: str, *, dev: bool = True) -> None:
    checked, as_json, compiled, reloaded = served.refusals(dev=dev)
    for status, output, errors in (checked, compiled, reloaded):
        assert (status, output) == (2, "")
        assert said in errors
        assert "Traceback" not in errors
    assert (as_json[0], as_json[2]) == (2, "")
    assert '"severity": "error"' in as_json[1]
    served.is_as_it_was()


@pytest.mark.parametrize(
    ("text", "said"), [case[1:] for case in APPENDED], ids=[case[0] for case in APPENDED]
)
def test_text_that_is_no_policy_is_refused_with_its_place_and_changes_nothing(
    served: Served, file: Path, text: str, said: str
) -> None:
    file.write_bytes(served.good + text.encode(errors="surrogateescape"))
    is_refused(served, f"{file}:{said}\n")


def test_policy_of_more_than_a_mebibyte_is_refused_and_changes_nothing(served: Served, file: Path) -> None:
    file.write_bytes(served.good + b"#" * (1024 * 1024))
    is_refused(served, f"{file}: has more than 1048576 bytes; a policy is smaller: use globs")


def test_missing_root_is_refused_and_changes_nothing(served: Served, file: Path) -> None:
    file.write_bytes(served.good.replace(b"/tree}", b"/gone}"))
    gone = f"{served.directory}/gone"
    is_refused(
        served, f"{file}:2:22: root 'tree': path: '{gone}': No such file or directory; name a directory"
    )


def writable_by_a_group(file: Path) -> str:
    file.chmod(0o664)
    return "has mode 0664, which lets others write; chmod go-w it"


def owned_by_another(file: Path) -> str:
    os.chown(file, OWNER_UID, 0)
    return f"belongs to uid {OWNER_UID}, not to root; chown it to root"


def with_two_names(file: Path) -> str:
    other = file.with_name("other")
    other.unlink(missing_ok=True)
    os.link(file, other)
    return "has 2 names (hard links), which may be in places that others write to; replace it by a copy"


def behind_a_link(file: Path) -> str:
    real = file.with_name("real")
    file.rename(real)
    file.symlink_to(real)
    return f"is a symbolic link; name the file by its real path, '{real}'"


def a_fifo(file: Path) -> str:
    file.unlink()
    os.mkfifo(file)
    return "is not a regular file; name the policy file"


@pytest.mark.parametrize(
    "spoil", [writable_by_a_group, owned_by_another, with_two_names, behind_a_link, a_fifo]
)
def test_file_that_others_may_have_written_is_refused_and_changes_nothing(
    served: Served, file: Path, spoil: Callable[[Path], str]
) -> None:
    is_refused(served, f"{file}: {spoil(file)}\n")


def test_parent_that_others_can_write_to_is_refused_and_changes_nothing(served: Served, file: Path) -> None:
    served.directory.chmod(0o775)
    try:
        is_refused(
            served,
            f"{served.directory}: this directory above the policy file has mode 0775, which lets others write;"
            " keep the file in a directory that only root can write to",
        )
    finally:
        served.directory.chmod(0o755)


def test_sticky_directory_of_everybodys_is_refused_outside_of_development(served: Served, file: Path) -> None:
    is_refused(
        served,
        "/tmp: this directory above the policy file has mode 01777, which lets others write",
        dev=False,
    )
