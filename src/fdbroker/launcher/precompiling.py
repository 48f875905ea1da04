"""What the broker's interpreter would compile at each start, compiled once, by root, for all of them."""

from __future__ import annotations

import contextlib
import os
import py_compile
from typing import TYPE_CHECKING

from fdbroker.broker import entry
from fdbroker.launcher.directories import open_directory_of_root
from fdbroker.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterator


_BY_HASH = py_compile.PycInvalidationMode.UNCHECKED_HASH  # which is in its name, and is compared by us


def precompile(directory: str = entry.PRECOMPILED) -> None:
    """Compile the trusted folders of this installation to where its brokers look; remove what is older there.

    What is there is taken for the very source that it was made of, by the same
    interpreter, and for nothing else: after an upgrade all is compiled as before.

    Raises:
        LaunchError: somebody other than root can write to the sources or to that place, or it can't
            be written.

    """
    try:
        for path in (os.path.dirname(directory), directory):
            os.close(open_directory_of_root(path, make=True))
        names = set()
        for source in _sources():
            entry.check_only_root_writes(source)
            with open(source, "rb") as file:
                name = entry.name_of_code(source, file.read())
            names.add(name)
            path = os.path.join(directory, name)
            py_compile.compile(source, path, doraise=True, invalidation_mode=_BY_HASH)
        for name in set(os.listdir(directory)) - names:
            with contextlib.suppress(FileNotFoundError):  # another one is at it as well
                os.unlink(os.path.join(directory, name))
    except entry.UntrustedSourceError as error:
        raise LaunchError(str(error)) from error
    except OSError as error:
        raise LaunchError(f"{directory} can't be written: {error.strerror}; run this as root") from error


def _sources() -> Iterator[str]:
    base = os.path.dirname(os.path.dirname(os.path.abspath(entry.__file__)))
    for folder in sorted(entry.TRUSTED_FOLDERS):
        for name in sorted(os.listdir(os.path.join(base, folder))):
            if name.endswith(".py"):
                yield os.path.join(base, folder, name)
