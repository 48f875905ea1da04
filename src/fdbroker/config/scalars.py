"""Numbers, sizes, durations, modes, booleans and paths, each from the text that the author wrote.

One spelling per meaning, and no guessing: `0777` is not a count, `2G` is not a
size, `on` is not a boolean. Every parser raises `ScalarError` with the reason
and the cure.
"""

from __future__ import annotations

import re

from fdbroker.config.errors import quoted
from fdbroker.policy.paths import problem_with_path

# What the kernel can hold in an off_t; no file is larger.
MAX_SIZE = 2**63 - 1
_MAX_DIGITS = 19
_SIZE_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_DURATION_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_WITH_UNIT = re.compile(r"(0|[1-9][0-9]*)([A-Za-z]*)")
_PATH_PROBLEMS = {
    "empty": "is empty",
    "nul": "has a NUL in it",
    "path_too_long": "is longer than a path can be",
    "relative": "is not absolute",
    "trailing_slash": "ends with '/'",
    "empty_component": "has '//' in it",
    "dot_component": "has '.' or '..' in it",
    "name_too_long": "has a name longer than 255 bytes in it",
}
_MODE = re.compile(r"0[0-7]{1,4}")


class ScalarError(ValueError):
    """A text is not what is wanted here. `message` is the reason, `cure` what to write."""

    def __init__(self, message: str, cure: str) -> None:
        self.message = message
        self.cure = cure
        super().__init__(f"{message}; {cure}")


def parse_count(text: str) -> int:
    """Return a count: decimal digits, no sign, separators or leading zeros.

    Raises:
        ScalarError: it is anything else, or longer than 19 digits.

    """
    match = _WITH_UNIT.fullmatch(text)
    if match is None or match[2] or len(text) > _MAX_DIGITS:
        raise ScalarError(f"{quoted(text)} is not a number", "write decimal digits only, as in 512")
    return int(text)


def parse_size(text: str) -> int:
    """Return a size in bytes: `4096`, `64KiB`, `100MB`, `2GiB`.

    Raises:
        ScalarError: no such number, an unknown unit, or more than a file can have.

    """
    match = _WITH_UNIT.fullmatch(text)
    if match is None or match[2] not in _SIZE_UNITS or len(match[1]) > _MAX_DIGITS:
        raise ScalarError(
            f"{quoted(text)} is not a size",
            "write bytes (4096) or digits with a unit: KiB, MiB, GiB, TiB or kB, MB, GB, TB",
        )
    size = int(match[1]) * _SIZE_UNITS[match[2]]
    if size > MAX_SIZE:
        raise ScalarError(f"{quoted(text)} is larger than any file", f"write at most {MAX_SIZE}")
    return size


def parse_duration(text: str) -> int:
    """Return a duration in seconds: `30s`, `5min`, `2h`, `7d`.

    Raises:
        ScalarError: no such number, or not one of these units.

    """
    match = _WITH_UNIT.fullmatch(text)
    if match is None or match[2] not in _DURATION_UNITS or len(match[1]) > _MAX_DIGITS:
        raise ScalarError(
            f"{quoted(text)} is not a duration", "write digits with a unit: 30s, 5min, 2h or 7d"
        )
    return int(match[1]) * _DURATION_UNITS[match[2]]


def parse_mode(text: str) -> int:
    """Return permission bits, written in octal with a leading zero: `0640`, `02000`.

    Raises:
        ScalarError: it is anything else; `0o640` and `640` are named as such.

    """
    if _MODE.fullmatch(text) is None:
        raise ScalarError(
            f"{quoted(text)} is not a file mode",
            'write octal digits that begin with 0, as in "0640" or "02000"',
        )
    return int(text, 8)


def parse_boolean(text: str) -> bool:
    """Return a boolean; `true` and `false` are the only spellings.

    Raises:
        ScalarError: it is anything else, `yes`, `no`, `on` and `off` included.

    """
    if text == "true":
        return True
    if text == "false":
        return False
    raise ScalarError(
        f"{quoted(text)} is not a boolean here", "write true or false; yes, no, on and off are not taken"
    )


def parse_path(text: str) -> str:
    """Return an absolute path in its one normal spelling.

    Raises:
        ScalarError: it is relative, too long, ends with `/`, or has `//`, `.` or `..` in it.

    """
    problem = problem_with_path(text.encode())
    if problem is not None:
        raise ScalarError(
            f"{quoted(text)} {_PATH_PROBLEMS[problem]}", "write an absolute path, as in /var/mail"
        )
    return text
