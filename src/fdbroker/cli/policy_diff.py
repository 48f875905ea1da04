"""`fdbroker policy diff`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from fdbroker.cli.failure import EXIT_ERROR, Failure
from fdbroker.cli.output import coloured, complain_printable, path_members, write_json, write_line
from fdbroker.cli.paths import absolute
from fdbroker.cli.policy_file import problems_as_failure, readable
from fdbroker.config.names import counted, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fdbroker.config.difference import Change, ClientKind, Found, Group, GroupKey, Loaded, Walked

EXIT_DIFFERENT = 1
_WORDS = {"copy": "open (as a copy)"}


@click.command("diff", short_help="Show what becomes allowed by another policy, and what is lost.")
@click.argument("old")
@click.argument("new")
@click.option(
    "--tree",
    "trees",
    multiple=True,
    type=click.UNPROCESSED,
    metavar="DIR",
    help="Decide about everything in DIR; may be repeated.  [default: the roots of both policies]",
)
@click.option(
    "--as",
    "users",
    multiple=True,
    metavar="USER",
    help="For whom; may be repeated.  [default: all that the rules of either policy tell apart]",
)
@click.option(
    "--examples",
    type=click.IntRange(0, 1000),
    default=3,
    show_default=True,
    metavar="N",
    help="How many paths are shown of what came out alike.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/policy-tools.md).")
def command(
    old: str, new: str, trees: tuple[str, ...], users: tuple[str, ...], examples: int, *, as_json: bool
) -> int:
    """Show what becomes allowed by the policy NEW, what is lost by it, and which settings are others.

    OLD and NEW are policy files, or compiled policies (.json). Everything in
    the tree is put to both, as the broker would decide; so run it as root,
    where all of it can be seen. Nothing is changed.

    \b
    Exit status: 0  the policies are the same
                 1  something is different
                 2  a policy has problems, a part of the tree could not be read, or wrong use

    \b
    Examples:  fdbroker policy diff /root/before.json /etc/fdbroker/policy.yaml
               fdbroker policy diff --tree /home/alice --as scanner old.yaml new.yaml
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    from fdbroker.config import difference  # noqa: PLC0415 - another extra

    before, after = _load(old), _load(new)
    kinds = _kinds(users, before, after)
    tops = [absolute(tree) for tree in trees] or difference.trees_of(before.rules, after.rules)
    for top in tops if trees else ():
        if not os.path.isdir(top):
            raise Failure(f"{printable(top)}: is no directory; name one with --tree")
    changes = difference.changes(before, after)
    walked = difference.Walked()
    found = difference.compare(before.rules, after.rules, kinds, tops, walked)
    groups = difference.grouped(_shown_while(found, walked), examples)
    if as_json:
        write_json(_document(before, after, tops, kinds, changes, groups, walked))
    else:
        _write_text(changes, groups, walked)
    if walked.first_unread is not None:
        path, reason = walked.first_unread
        more = f", and {walked.unread - 1} more" if walked.unread > 1 else ""
        complain_printable(f"{printable(path)}{more}: can't be read: {reason}; run this as root")
        return EXIT_ERROR
    return EXIT_DIFFERENT if changes or groups else 0


def _load(path: str) -> Loaded:
    from fdbroker.config.difference import load  # noqa: PLC0415 - another extra

    with readable(path, "run it as root, or name another"), problems_as_failure():
        return load(path)


def _kinds(users: Sequence[str], old: Loaded, new: Loaded) -> list[ClientKind]:
    from fdbroker.config import difference  # noqa: PLC0415 - another extra

    if not users:
        try:
            return difference.kinds_of_clients(old.rules, new.rules)
        except ValueError as error:
            raise Failure(f"{error}: name some with --as USER") from error
    kinds = []
    for user in users:
        kind = difference.kind_of_user(user)
        if kind is None:
            raise click.UsageError(f"--as {user}: there is no such user")
        kinds.append(kind)
    return kinds


def _shown_while(found: Iterator[Found], walked: Walked) -> Iterator[Found]:
    from fdbroker.cli.progress import WalkProgress  # noqa: PLC0415 - another extra

    def words(place: bytes, what: str = "in") -> str:
        return f"{counted(walked.entries, 'path')} compared, {what} {printable(place)}"

    with WalkProgress(wanted=True, words="comparing") as progress:
        walked.watch = lambda directory: progress.show(lambda: words(directory))
        walked.waits_for = lambda mount: progress.show(lambda: words(mount, "waiting for"), at_once=True)
        yield from found


# ---- for people ----


def _write_text(changes: Sequence[Change], groups: Mapping[GroupKey, Group], walked: Walked) -> None:
    for change in changes:
        old, new = (_value(value) for value in (change.old, change.new))
        if new is None:
            write_line(coloured(f"- {printable(change.what)}: {old}", "red"))
        elif old is None:
            write_line(coloured(f"+ {printable(change.what)}: {new}", "green"))
        else:
            write_line(f"~ {printable(change.what)}: {old} -> {new}")
    titles = dict.fromkeys(key.kind for key in groups)
    for kind in titles:
        write_line("")
        write_line(printable(kind.title))
        for key, group in groups.items():
            if key.kind == kind:
                _write_group(key, group)
    if changes or groups:
        write_line("")
    gained = sum(group.count for key, group in groups.items() if key.gained)
    lost = sum(group.count for key, group in groups.items() if not key.gained)
    write_line(f"{counted(walked.entries, 'path')} compared: {gained} allowed more, {lost} allowed no more")


def _write_group(key: GroupKey, group: Group) -> None:
    sign, colour = ("+", "green") if key.gained else ("-", "red")
    action = _WORDS.get(key.action, key.action)
    why = f"{key.old} -> {key.new}"
    write_line(coloured(f"  {sign} {action}: {counted(group.count, 'path')} ({printable(why)})", colour))
    for path in group.examples:
        write_line(f"      {printable(path)}")
    more = group.count - len(group.examples)
    if more and group.examples:
        write_line(f"      and {more} more")


def _value(value: object) -> str | None:
    return None if value is None else printable(json.dumps(value))


# ---- for programs ----


def _document(
    old: Loaded,
    new: Loaded,
    trees: Sequence[bytes],
    kinds: Sequence[ClientKind],
    changes: Sequence[Change],
    groups: Mapping[GroupKey, Group],
    walked: Walked,
) -> dict[str, Any]:
    return {
        "old": printable(old.path),
        "new": printable(new.path),
        "same": not (changes or groups),
        "complete": not walked.unread,
        "trees": [path_members(tree) for tree in trees],
        "clients": [printable(kind.title) for kind in kinds],
        "compared": walked.entries,
        "changes": [change._asdict() for change in changes],
        "differences": [
            {
                "client": printable(key.kind.title),
                "action": key.action,
                "change": "gained" if key.gained else "lost",
                "old": printable(key.old),
                "new": printable(key.new),
                "count": group.count,
                "examples": [path_members(path) for path in group.examples],
            }
            for key, group in groups.items()
        ],
    }
