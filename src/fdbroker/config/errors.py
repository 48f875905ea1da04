"""What is wrong with a configuration file: where, why, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fdbroker.config.names import printable

MAX_PROBLEMS = 100
_MAX_SHOWN = 80
_MAX_LISTED = 12
# difflib takes time by the product of both lengths; no name that is meant is longer.
_MAX_COMPARED = 64


class Mark(NamedTuple):
    """A place in a file. Line and column count from 1; columns count characters, not bytes."""

    line: int
    column: int
    file: str

    def __str__(self) -> str:
        """Return `file:line:column`, printable."""
        return f"{printable(self.file)}:{self.line}:{self.column}"

    def seen_from(self, other: Mark) -> str:
        """Return this place in words, for a message about `other`."""
        return f"in line {self.line}" if self.file == other.file else f"at {self}"


class Problem(NamedTuple):
    """One thing that is wrong, and its cure.

    `line` and `column` are None when the file as a whole is meant: who owns
    it, or that it can't be opened.
    """

    file: str
    line: int | None
    column: int | None
    message: str
    cure: str

    def __str__(self) -> str:
        """Return `file:line:column: message; cure`, always one printable line."""
        place = printable(self.file)
        if self.line is not None:
            place += f":{self.line}:{self.column}"
        return f"{place}: {self.message}; {self.cure}"


class ConfigError(Exception):
    """A configuration file is refused. `problems` holds everything that was found, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ProblemList:
    """Collects the problems of one policy, so that one run reports all of them.

    `file` is the one that is read now, and that is meant where a problem has no place.
    """

    def __init__(self, file: str) -> None:
        self._problems: list[Problem] = []
        self._left_out = 0
        self._order: dict[str, int] = {}
        self.begin(file)

    def begin(self, file: str) -> None:
        """Go on with another file of the policy."""
        self.file = file
        self._order.setdefault(file, len(self._order))

    def __bool__(self) -> bool:
        return bool(self._problems)

    def add(self, mark: Mark | None, message: str, cure: str | Callable[[], str]) -> None:
        """Note one problem; beyond `MAX_PROBLEMS` they are only counted.

        A cure that takes time, as looking for similar names does, comes as a
        function and is asked for only when it will be shown.
        """
        if len(self._problems) >= MAX_PROBLEMS:
            self._left_out += 1
            return
        if not isinstance(cure, str):
            cure = cure()
        line, column, file = mark if mark is not None else (None, None, self.file)
        self._problems.append(Problem(file, line, column, message, cure))

    def raise_if_any(self) -> None:
        """Raise what was collected, file by file and in the order of each.

        Raises:
            ConfigError: there is at least one problem.

        """
        if not self._problems:
            return
        found = sorted(
            self._problems,
            key=lambda problem: (self._order.get(problem.file, 0), problem.line or 0, problem.column or 0),
        )
        if self._left_out:
            found.append(
                Problem(
                    self.file,
                    None,
                    None,
                    f"{self._left_out} more problems are not shown",
                    "mend these first and check again",
                )
            )
        raise ConfigError(found)


def quoted(text: str) -> str:
    """Return `text` as shown in messages: in quotes, printable, cut to a readable length."""
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 3] + "..."
    return repr(text)


def listed(names: Sequence[str]) -> str:
    """Return some of `names` as a list in words, for a cure."""
    return ", ".join(names if len(names) <= _MAX_LISTED else [*names[:_MAX_LISTED], "..."])


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that the author of `word` probably meant, or None."""
    if len(word) > _MAX_COMPARED:
        return None
    import difflib  # noqa: PLC0415 - for a mistake only

    # Case is lost for comparing only: names themselves are case-sensitive.
    by_folded = {name.casefold(): name for name in known if len(name) <= _MAX_COMPARED}
    matches = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a cure that suggests the closest of `known`, or `otherwise` when none is close."""
    match = closest(word, known)
    return otherwise if match is None else f"did you mean {quoted(match)}?"
