"""`fdbroker policy explain`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from fdbroker.cli import broker
from fdbroker.cli.control import connected
from fdbroker.cli.explanation import (
    Source,
    document_of_answer,
    lines_of,
    lines_of_answer,
    status_of,
    status_of_answer,
    to_document,
)
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, write_json, write_line
from fdbroker.cli.paths import absolute
from fdbroker.cli.policy_file import problems_as_failure
from fdbroker.client.control import DEFAULT_TIMEOUT
from fdbroker.config import DEFAULT_POLICY
from fdbroker.config.names import primary_gid, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fdbroker.config.explain import Explanation, LoadedPolicy
    from fdbroker.policy.rules import ClientFacts

# Seconds for asking as another user, longer than asking itself may take.
_WAITED_FOR = DEFAULT_TIMEOUT + 5
_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR})


@click.command("explain", short_help="Say why a user may or may not have a file.")
@click.argument("path", type=click.UNPROCESSED)
@click.option(
    "--policy",
    "policy_path",
    metavar="FILE",
    help=f"The policy file, or a compiled policy (.json).  [default: {DEFAULT_POLICY} if you may read it;"
    " else the running broker is asked about yourself]",
)
@click.option("--as", "user", metavar="USER", help="Whom to explain for, by name or number.  [default: you]")
@click.option(
    "--on-behalf-of",
    "acted_for",
    metavar="USER",
    help="Whom the one who asks, a service, acts for.  [default: nobody]",
)
@click.option(
    "--action",
    type=click.Choice(["open", "stat", "list", "walk"]),
    default="open",
    show_default=True,
    help="Reading it, asking for size, owner and so on, listing the directory, or being met by a walk.",
)
@click.option(
    "--unit", metavar="NAME", help="Explain for a process of this systemd unit, for rules about units."
)
@click.option(
    "--cgroup", metavar="PATH", help="Explain for a process in this control group, as in /user.slice."
)
@click.option("--label", metavar="LABEL", help="Explain for a process with this label.")
@click.option(
    "--running",
    is_flag=True,
    help="Ask the running broker, as the user that --as names, and compare with the policy file.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/cli.md).")
@click.option("-v", "--verbose", is_flag=True, help="Show every rule, not only those that come near.")
@broker.control_option
def command(  # noqa: PLR0913 - one for each option
    path: str,
    policy_path: str | None,
    user: str | None,
    action: str,
    unit: str | None,
    cgroup: str | None,
    control_path: str | None,
    *,
    acted_for: str | None,
    label: str | None,
    running: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Say why a user may or may not have a file: rule by rule, condition by condition, and in one sentence.

    It reads the policy file and needs no broker. The verdict is that of the
    broker's own code. If you may not read the policy, the running broker is
    asked about yourself, who tells less.

    With --running the broker is asked in any case, by a process of the user
    that --as names (root only). Where the policy file is what is in force, all
    details are shown; where it is not, that is said.

    \b
    Exit status: 0  allowed
                 1  denied
                 2  the policy can't be read, no broker to ask, or wrong use
                 3  it depends on the file, which can't be looked at from here

    \b
    Examples:  fdbroker policy explain --running --as scanner /home/alice/x
               fdbroker policy explain /home/alice/.ssh/id_ed25519
               fdbroker policy explain --as scanner --action list /home/alice
               fdbroker policy explain --as scanner --on-behalf-of alice /home/alice/x
               fdbroker policy explain --policy draft.yaml --as 1000 /srv/x
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    asked = absolute(path)
    if running:
        if any(given is not None for given in (acted_for, unit, cgroup, label)):
            text = "the running broker can only be asked as a process that there is: leave out"
            raise click.UsageError(f"{text} --on-behalf-of, --unit, --cgroup and --label")
        return _ask(
            _Question(action, asked, control_path), user, policy_path, as_json=as_json, verbose=verbose
        )
    for_another = any(given is not None for given in (user, acted_for, unit, cgroup, label))
    loaded = _load(policy_path, may_ask=policy_path is None and not for_another)
    if loaded is None:
        with connected(control_path) as control:
            answer = control.explain(action, asked)
        return _show_answer(answer, asked, as_json=as_json)
    from fdbroker.config.explain import Asker, explain, look_as_broker  # noqa: PLC0415 - another extra

    client, group = _client(loaded, user, unit, cgroup)
    if label is not None:
        client = client._replace(label=os.fsencode(label))
    asker = Asker(client, None if acted_for is None else _user(acted_for, "--on-behalf-of"))
    explanation = explain(loaded.rules, asker, action, asked, look_as_broker)
    source = Source(DEFAULT_POLICY if policy_path is None else policy_path, loaded.notes, group)
    return _show(explanation, source, as_json=as_json, verbose=verbose)


def _show(explanation: Explanation, source: Source, *, as_json: bool, verbose: bool) -> int:
    if as_json:
        write_json(to_document(explanation, source))
    else:
        for note in source.notes:
            complain_printable(f"the broker would not take this file: {note}")
        for line in lines_of(explanation, source, verbose=verbose):
            write_line(line)
    return status_of(explanation)


def _show_answer(
    answer: Mapping[str, Any], path: bytes, client: ClientFacts | None = None, *, as_json: bool
) -> int:
    if as_json:
        write_json(document_of_answer(answer, path, client))
    else:
        for line in lines_of_answer(answer, path, client):
            write_line(line)
    return status_of_answer(answer)


# ---- the running broker ----


class _Question(NamedTuple):
    action: str
    path: bytes
    control_path: str | None


def _ask(
    question: _Question, user: str | None, policy_path: str | None, *, as_json: bool, verbose: bool
) -> int:
    """Ask the running broker, and show every detail where the policy file is what it decides by."""
    if user is not None and os.geteuid() != 0:
        raise Failure("only root can ask as another user: run this as root, or without --as")
    client = None if user is None else _user(user, "--as")
    answer = _ask_as(question, client)
    with connected(question.control_path) as control:
        status = control.status()
    loaded = _load(policy_path, may_ask=True)
    in_force = status.get("fingerprint")
    if loaded is None or in_force != loaded.rules.fingerprint:
        status_code = _show_answer(answer, question.path, client, as_json=as_json)
        if loaded is not None and in_force is not None:
            file = printable(policy_path or DEFAULT_POLICY)
            complain_printable(f"{file} is not what is in force; put it in force with: fdbroker reload")
        return status_code
    from fdbroker.config import explain  # noqa: PLC0415 - another extra

    group = explain.control_group_of_this_process()
    asking = explain.with_control_group(client or explain.client_of_this_process(), group, loaded.rules)
    asker = explain.Asker(asking)
    explanation = explain.explain(loaded.rules, asker, question.action, question.path, explain.look_as_broker)
    by_file = explain.answer_by_name(loaded.rules, asker, question.action, question.path)
    different = [key for key, value in by_file.items() if answer.get(key) != value]
    if different:
        raise Failure(
            f"the running broker and its policy file differ in {', '.join(different)}, which is a fault of"
            " fdbroker: please report it, with the output of fdbroker doctor"
        )
    generation = answer.get("generation")
    source = Source(
        policy_path or DEFAULT_POLICY,
        loaded.notes,
        group,
        generation if isinstance(generation, int) else None,
    )
    return _show(explanation, source, as_json=as_json, verbose=verbose)


def _ask_as(question: _Question, client: ClientFacts | None) -> dict[str, Any]:
    """Ask about a client by being it: the broker believes the kernel alone. None: about this process."""
    if client is None or client.uid == os.geteuid():
        with connected(question.control_path) as control:
            return control.explain(question.action, question.path)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _be_and_ask(question, client, write_end)
    os.close(write_end)
    try:
        text = _read_all(read_end)
    finally:
        os.close(read_end)
        # It is that user's process, who may have stopped it.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        # As the user may kill it.
        raise Failure(f"the process that was to ask as user {client.uid} was ended: ask again") from None
    if "failure" in answer:
        raise Failure(answer["failure"])
    return answer


def _read_all(descriptor: int) -> bytes:
    """Return what somebody writes who is given a time for it, as far as it comes."""
    text, until = b"", time.monotonic() + _WAITED_FOR
    while select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(descriptor, 65536)
        if not piece:
            break
        text += piece
    return text


def _be_and_ask(question: _Question, client: ClientFacts, write_end: int) -> NoReturn:
    """Become the client for good, ask, and write what came of it; never returns."""
    try:
        gid = primary_gid(client.uid)
        os.setgroups(sorted(client.gids))
        os.setresgid(gid, gid, gid)
        os.setresuid(client.uid, client.uid, client.uid)
        with connected(question.control_path) as control:
            told = json.dumps(control.explain(question.action, question.path))
    except Failure as failure:
        told = json.dumps({"failure": failure.message})
    except OSError as error:
        told = json.dumps({"failure": f"can't become user {client.uid}: {error.strerror}"})
    except BaseException as error:  # noqa: BLE001 - a copy of this process must not go on
        told = json.dumps({"failure": printable(repr(error))})
    with contextlib.suppress(OSError):
        os.write(write_end, told.encode())
    os._exit(0)


# ---- the policy file, and who is explained ----


def _load(policy_path: str | None, *, may_ask: bool) -> LoadedPolicy | None:
    """Return the policy; None if the broker is to be asked instead (`may_ask`)."""
    path = DEFAULT_POLICY if policy_path is None else policy_path
    try:
        with open(path, "rb"):
            pass
        return _read(path)
    except OSError as error:
        if may_ask and error.errno in _UNREADABLE:
            return None
        cure = "run it as root, or name another with --policy FILE"
        raise Failure(f"{printable(path)}: can't be read: {error.strerror}; {cure}") from error
    except ModuleNotFoundError:
        # Who only asks for files need not have what reads policies.
        if may_ask:
            return None
        raise


def _read(path: str) -> LoadedPolicy:
    from fdbroker.config.explain import load_for_explaining  # noqa: PLC0415 - another extra

    with problems_as_failure():
        return load_for_explaining(path)


def _client(
    loaded: LoadedPolicy, user: str | None, unit: str | None, cgroup: str | None
) -> tuple[ClientFacts, str | None]:
    """Return who asks, and the control group that he is in."""
    from fdbroker.config import explain  # noqa: PLC0415 - another extra
    from fdbroker.config.identities import unit_cgroup  # noqa: PLC0415 - another extra
    from fdbroker.config.scalars import ScalarError  # noqa: PLC0415 - another extra

    if unit is not None and cgroup is not None:
        raise click.UsageError("a process is in one control group: give --unit or --cgroup, not both")
    group = cgroup if cgroup is not None or user is not None else explain.control_group_of_this_process()
    if unit is not None:
        try:
            group = unit_cgroup(unit)
        except ScalarError as error:
            raise click.UsageError(f"--unit: {error}") from error
    client = _checked(explain.client_of_this_process()) if user is None else _user(user, "--as")
    if group is not None and not group.startswith("/"):
        raise click.UsageError("--cgroup: write its whole path as below /sys/fs/cgroup, as in /user.slice")
    return explain.with_control_group(client, group, loaded.rules), group


def _user(name: str, option: str) -> ClientFacts:
    from fdbroker.config.explain import client_of_user  # noqa: PLC0415 - another extra

    client = client_of_user(name)
    if client is None:
        raise click.UsageError(f"{option} {name}: there is no such user")
    return _checked(client)


def _checked(client: ClientFacts) -> ClientFacts:
    from fdbroker.config.identities import OVERFLOW_ID  # noqa: PLC0415 - another extra

    if client.uid == OVERFLOW_ID:
        raise click.UsageError(
            f"the broker serves no process with uid {OVERFLOW_ID}: every id that a user namespace does not"
            " map shows as this one. Use a user of its own."
        )
    return client
