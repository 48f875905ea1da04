"""How names are shown: what is printable of them, users and groups with their numbers; how many there are."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Mapping
from functools import cache

_LARGEST_ID = 0xFFFFFFFE  # (uid_t) -1 is no user


def printable(text: bytes | str) -> str:
    r"""Return a name in a form that can't play with a terminal and can be read back.

    Whatever is not printable, and what is not UTF-8, is `\xNN` for each of its
    bytes, a backslash is `\\`: `printf %b` gives the name again.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text  # as nearly all are; a walk shows thousands in a second
    return "".join(
        character if character.isprintable() and character != "\\" else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    try:
        data = character.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may have halves of surrogate pairs
        data = character.encode("utf-8", "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in data)


def is_number(text: str) -> bool:
    """Return whether a user is named by number, not by name."""
    return text.isascii() and text.isdigit()


def id_of_number(text: str) -> int | None:
    """Return a user by number, None if no user can have it."""
    digits = text.lstrip("0") or "0"  # int() refuses thousands of them
    return None if len(digits) > len(str(_LARGEST_ID)) or int(digits) > _LARGEST_ID else int(digits)


# Names that only another machine has numbers for, each with one below 0 here, which is no id of anybody's.
_users_elsewhere: dict[str, int] = {}
_groups_elsewhere: dict[str, int] = {}


def number_for_user(name: str) -> int:
    """Return a number below 0 that stands for a user of another machine, by which the name is shown again."""
    return _users_elsewhere.setdefault(name, -1 - len(_users_elsewhere))


def number_for_group(name: str) -> int:
    """Do the same for a group."""
    return _groups_elsewhere.setdefault(name, -1 - len(_groups_elsewhere))


@cache
def user_name(uid: int) -> str:
    """Return the name of a user, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def primary_gid(uid: int) -> int:
    """Return the primary group of a user, the number itself of one that the database does not know."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except (KeyError, OverflowError):
        return uid


@cache
def group_name(gid: int) -> str:
    """Return the name of a group, or the number."""
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return str(gid)


def user_text(uid: int) -> str:
    """Return a user's number with the name, where there is one; the name alone of one of another machine."""
    return _name_of(uid, _users_elsewhere) if uid < 0 else _with_name(uid, user_name(uid))


def group_text(gid: int) -> str:
    """Return a group's number with the name, where there is one; the name alone of one of another machine."""
    return _name_of(gid, _groups_elsewhere) if gid < 0 else _with_name(gid, group_name(gid))


def _with_name(number: int, name: str) -> str:
    return name if name == str(number) else f"{number} ({name})"


def _name_of(number: int, names: Mapping[str, int]) -> str:
    return next((name for name, its in names.items() if its == number), str(number))


def counted(number: int, thing: str) -> str:
    """Return how many there are of a thing, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
