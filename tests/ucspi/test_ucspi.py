"""The broker under the super-servers of UCSPI, and the command under its clients: the real programs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fdbroker
from tests.cli.commands import command, environment
from tests.processes import children_of, wait_until
from tests.running_broker import CLIENT_UID, OTHER_UID, reachable_directory, running_broker
from tests.ucspi.serving import FILES, Place, lay_out, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root

CLIENTS = ["unixclient", "s6-ipcclient"]
both_servers = pytest.mark.parametrize("program", ["unixserver", "s6-ipcserver"])
both_clients = pytest.mark.parametrize("client", CLIENTS)


@pytest.fixture
def place() -> Iterator[Place]:
    with reachable_directory() as directory:
        yield lay_out(directory)


def server(place: Place, program: str, *options: str, before: tuple[str, ...] = ()) -> list[str]:
    """Return a super-server's command with a broker behind it."""
    broker = place.fdbrokerd("--inherited", "0", "--audit", str(place.audit))
    # Without it unixserver takes the options of the program for its own, wherever they stand.
    return [program, *options, "--", str(place.socket), *before, *broker]


def run_as(
    uid: int, others: ForOtherUsers, words: Sequence[str | bytes]
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        words,
        env=environment(PYTHONPATH=str(others.directory)),
        user=uid,
        group=uid,
        extra_groups=(),
        capture_output=True,
        timeout=60,
        cwd="/",
        check=False,
    )


def ask(
    place: Place, others: ForOtherUsers, *arguments: str | bytes, uid: int = CLIENT_UID, client: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """Run `fdbroker` as a user, under a UCSPI client or by itself."""
    way = ("--fd", "6,7") if client else ("--socket", str(place.socket))
    before = [client, str(place.socket)] if client else []
    return run_as(uid, others, [*before, *command(*way, *arguments, python=others.python)])


# Each with the other's client: no end knows which program the other one is.
@pytest.mark.parametrize(
    ("program", "client"),
    [
        ("unixserver", ""),
        ("s6-ipcserver", ""),
        ("unixserver", "s6-ipcclient"),
        ("s6-ipcserver", "unixclient"),
    ],
)
def test_a_client_gets_what_the_policy_gives_to_the_user_who_connected(
    place: Place, others: ForOtherUsers, program: str, client: str
) -> None:
    with serving(place, server(place, program)):
        given = ask(place, others, "cat", *map(place.path, (b"a", b"odd\xff\n")), client=client)
        refused = ask(place, others, "cat", place.path(b"secret"), client=client)
        of_another = ask(place, others, "cat", place.path(b"a"), uid=OTHER_UID, client=client)
    assert (given.returncode, given.stderr) == (0, b"")
    assert given.stdout == FILES[b"a"] + FILES[b"odd\xff\n"]
    for result in (refused, of_another):
        assert (result.returncode, result.stdout) == (1, b"")
        assert b"denied by the broker's policy" in result.stderr
    assert [(record["decision"], record["uid"]) for record in place.decisions()] == [
        ("allow", CLIENT_UID),
        ("allow", CLIENT_UID),
        ("deny", CLIENT_UID),
        ("deny", OTHER_UID),
    ]


@both_servers
@both_clients
def test_the_audit_names_the_process_that_connected(
    place: Place, others: ForOtherUsers, program: str, client: str
) -> None:
    """Such a client connects and then becomes the command: it is the same process."""
    with serving(place, server(place, program)):
        shell = 'echo $$; exec "$0" "$@"'
        asked = command("--fd", "6,7", "cat", place.path(b"a"), python=others.python)
        result = run_as(CLIENT_UID, others, ["sh", "-c", shell, client, str(place.socket), *asked])
    pid, _, content = result.stdout.partition(b"\n")
    assert (content, result.stderr) == (FILES[b"a"], b"")
    [record] = place.decisions()
    assert record["pid"] == int(pid)


@both_servers
def test_each_connection_has_a_broker_of_its_own_that_ends_with_it(
    place: Place, others: ForOtherUsers, program: str
) -> None:
    with serving(place, server(place, program)) as running:
        with fdbroker.connect(str(place.socket)) as first:
            [its_broker] = children_of(running.pid)
            # Another one is served meanwhile.
            assert ask(place, others, "cat", place.path(b"a")).stdout == FILES[b"a"]
            wait_until(lambda: children_of(running.pid) == [its_broker], "the end of the second broker")
            with pytest.raises(fdbroker.DeniedError):
                first.open(place.path(b"a"))  # root is nobody in this policy
            assert children_of(running.pid) == [its_broker]
        wait_until(lambda: not children_of(running.pid), "the end of the first broker")
    assert place.errors == ""


@both_servers
def test_who_is_not_in_the_group_of_the_socket_does_not_reach_a_broker(
    place: Place, others: ForOtherUsers, program: str
) -> None:
    options = {"unixserver": ("-p", "660", "-r", str(CLIENT_UID)), "s6-ipcserver": ("-a", "0660")}[program]
    with serving(place, server(place, program, *options)):
        if program == "s6-ipcserver":
            os.chown(place.socket, 0, CLIENT_UID)
        assert ask(place, others, "cat", place.path(b"a")).stdout == FILES[b"a"]
        result = ask(place, others, "cat", place.path(b"a"), uid=OTHER_UID)
        assert result.returncode == 2
        assert b"you may not connect to this broker" in result.stderr
        for client in CLIENTS:
            result = ask(place, others, "cat", place.path(b"a"), uid=OTHER_UID, client=client)
            assert result.returncode != 0
            assert b"Permission denied" in result.stderr
    assert [record["uid"] for record in place.decisions()] == [CLIENT_UID]


def rules_for(place: Place, uid: int) -> str:
    """Return a directory of rules for s6-ipcserver-access that let one user in."""
    rules = place.directory / "access"
    (rules / "uid" / str(uid)).mkdir(parents=True)
    (rules / "uid" / str(uid) / "allow").touch()
    (rules / "uid" / "default").mkdir()
    (rules / "uid" / "default" / "deny").touch()
    return str(rules)


def test_whom_the_access_rules_refuse_does_not_reach_a_broker(place: Place, others: ForOtherUsers) -> None:
    access = ("s6-ipcserver-access", "-i", rules_for(place, CLIENT_UID))
    with serving(place, server(place, "s6-ipcserver", "-a", "0666", before=access)):
        assert ask(place, others, "cat", place.path(b"a")).stdout == FILES[b"a"]
        for client in ("", *CLIENTS):
            result = ask(place, others, "cat", place.path(b"a"), uid=OTHER_UID, client=client)
            assert (result.returncode, result.stdout) == (2, b"")
            assert b"fdbroker: " in result.stderr
            assert b"Traceback" not in result.stderr
    assert [record["uid"] for record in place.decisions()] == [CLIENT_UID]


@pytest.mark.parametrize(
    ("client", "arguments", "output"),
    [
        ("unixclient", ("ls", "TREE"), b"a\n"),
        ("s6-ipcclient", ("exec", "TREE/a", "--", "cat"), b"first\n"),
        ("unixclient", ("status", "--json"), b"{"),
        ("s6-ipcclient", ("walk", "TREE"), b"/a\n"),
    ],
)
def test_other_commands_work_on_a_connection_that_a_client_made(
    place: Place, others: ForOtherUsers, client: str, arguments: tuple[str, ...], output: bytes
) -> None:
    words = [word.replace("TREE", os.fsdecode(place.tree)) for word in arguments]
    with serving(place, server(place, "unixserver")):
        result = ask(place, others, *words, client=client)
    assert result.returncode == (3 if arguments[0] == "walk" else 0)  # one file is hidden
    assert output in result.stdout


@pytest.mark.parametrize("client", ["", *CLIENTS])
def test_a_broker_that_listens_on_a_stream_serves_them_as_well(
    place: Place, others: ForOtherUsers, client: str
) -> None:
    compiled = json.loads((place.directory / "policy.json").read_text())
    with running_broker(place.directory, compiled, f"--stream={place.socket}") as broker:
        given = ask(place, others, "cat", *map(place.path, (b"a", b"odd\xff\n")), client=client)
        of_another = ask(place, others, "cat", place.path(b"a"), uid=OTHER_UID, client=client)
        decided = [(record["decision"], record["uid"]) for record in broker.decisions()]
    assert (given.returncode, given.stderr) == (0, b"")
    assert given.stdout == FILES[b"a"] + FILES[b"odd\xff\n"]
    assert (of_another.returncode, of_another.stdout) == (1, b"")
    assert decided == [("allow", CLIENT_UID)] * 2 + [("deny", OTHER_UID)]


@both_servers
def test_a_client_that_hangs_up_before_the_broker_has_begun_leaves_nothing(
    place: Place, program: str
) -> None:
    with serving(place, server(place, program)) as running:
        subprocess.run(["unixclient", str(place.socket), "true"], check=True)
        wait_until(lambda: not children_of(running.pid), "the end of its broker")
    assert place.decisions() == []
    assert "Traceback" not in place.errors


def test_the_commands_of_the_document_work(place: Place, others: ForOtherUsers) -> None:
    text = (Path(__file__).parents[2] / "docs" / "fdbrokerd.md").read_text()
    [section] = re.findall(r"^### UCSPI\n(.*?)^##", text, re.MULTILINE | re.DOTALL)
    shown = [shlex.split(line) for line in re.findall(r"^    (\S.*)$", section, re.MULTILINE)]
    servers = [words for words in shown if "fdbrokerd" in words]
    clients = [words for words in shown if "fdbroker" in words]
    assert len(servers) + len(clients) == len(shown)
    assert {words[0] for words in servers} == {"unixserver", "s6-ipcserver"}
    assert {words[0] for words in clients} == {*CLIENTS, "fdbroker"}
    here = {
        "/run/fdbroker/ucspi": str(place.socket),
        "/var/log/fdbroker/audit.jsonl": str(place.audit),
        "/etc/fdbroker/access": rules_for(place, CLIENT_UID),
        "/srv/upload": os.fsdecode(place.tree),
        "/srv/upload/notes.txt": os.fsdecode(place.path(b"a")),
        "990": str(CLIENT_UID),
    }
    for line in servers:
        at = line.index("fdbrokerd")
        words = [here.get(word, word) for word in line]
        with serving(place, [*words[:at], *place.fdbrokerd(), *words[at + 1 :]]):
            # Each client is shown to work; no server knows which one it has.
            for asked in clients if line is servers[0] else clients[:1]:
                at = asked.index("fdbroker")
                words = [here.get(word, word) for word in asked]
                result = run_as(
                    CLIENT_UID, others, [*words[:at], *command(*words[at + 1 :], python=others.python)]
                )
                assert (result.returncode, result.stderr) == (0, b""), asked
                assert result.stdout
