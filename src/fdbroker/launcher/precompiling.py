"""What the broker's interpreter would compile at each start, compiled once, by root, for all of them."""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
from typing import TYPE_CHECKING

from fdbroker.broker import entry
from fdbroker.cli.whole_file import whole_file
from fdbroker.launcher.directories import open_directory_of_root
from fdbroker.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterator


_UNCHECKED_HASH = (1).to_bytes(4, "little")  # PEP 552: nobody compares it, as its name was made of it


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
            # Read once: a package manager may just be replacing it, and the name of one is not for the other.
            with open(source, "rb") as file:
                text = file.read()
            name = entry.name_of_code(source, text)
            names.add(name)
            with whole_file(os.path.join(directory, name), 0o644) as file:
                file.write(_compiled(text, source))
        for name in set(os.listdir(directory)) - names:
            # Another one may be at it as well, whose files are hidden until they are whole.
            if not name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))
    except entry.UntrustedSourceError as error:
        raise LaunchError(str(error)) from error
    except OSError as error:
        raise LaunchError(f"{directory} can't be written: {error.strerror}; run this as root") from error


def _compiled(text: bytes, path: str) -> bytes:
    """Return a `.pyc` of a source, with its assertions, however this interpreter was started."""
    code = compile(text, path, "exec", dont_inherit=True, optimize=0)
    return (
        importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(text) + marshal.dumps(code)
    )


def _sources() -> Iterator[str]:
    base = os.path.dirname(os.path.dirname(os.path.abspath(entry.__file__)))
    for folder in sorted(entry.TRUSTED_FOLDERS):
        for name in sorted(os.listdir(os.path.join(base, folder))):
            if name.endswith(".py"):
                yield os.path.join(base, folder, name)
