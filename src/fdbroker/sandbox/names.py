"""Functions that are told to another process: by name, never as code."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def name_of(function: str | Callable[..., Any]) -> str:
    """Return `module:function`, of a function that can be imported by it, or of such a name itself.

    Raises:
        ValueError: it is no such name, or nothing can be imported by it: a lambda, a
            function within another one, or of the program that was started (`__main__`).

    """
    if not isinstance(function, str):
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if not module or module == "__main__" or not name or "<" in name:
            raise ValueError(f"{function!r} can't be imported by its name: define it in a module, at the top")
        function = f"{module}:{name}"
    if not _NAME.fullmatch(function):
        raise ValueError(f"{function!r} is no name of a function: module:function")
    return function


def find(name: str) -> Callable[..., Any]:
    """Return the function of a name that `name_of` gave.

    Raises:
        ImportError: there is no such module, or nothing of this name in it.

    """
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ImportError(f"{module} has no {path}") from error
    if not callable(found):
        raise ImportError(f"{name} is no function")  # noqa: TRY004 - as if it were not there
    function: Callable[..., Any] = found
    return function
