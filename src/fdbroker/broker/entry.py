"""The first file that the broker's interpreter runs: python3 -I -S entry.py HANDOVER_FD [--dev].

A fresh interpreter without site-packages knows nothing of `fdbroker`, and
adding a directory to sys.path would let it import whatever lies beside the
package. So one finder is registered that finds the trusted folders and nothing
else: sources that belong to root and that nobody else can write, as all their
parents do. A `.pyc` beside them is code that no reviewer reads, and is not
looked at: they are compiled each time, which takes 0.2 s, or were by root
(`fdbrokerd --precompile`), where only root can write. With --dev neither is so.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence

TRUSTED_FOLDERS = frozenset({"kernel", "wire", "policy", "broker"})
PRECOMPILED = "/var/cache/fdbroker/code"
_EXIT_NOT_STARTED = 2  # as in main.py, which is not there yet


class UntrustedSourceError(ImportError):
    """A source file or a directory above it could be changed by somebody other than root."""


def check_only_root_writes(path: str) -> None:
    """Check that `path` and every directory above it belong to root and nobody else can write them.

    Raises:
        UntrustedSourceError: one does not; the text names it and the cure.

    """
    while True:
        facts = os.lstat(path)
        if stat.S_ISLNK(facts.st_mode):
            raise UntrustedSourceError(
                f"{path} is a symbolic link to {os.path.realpath(path)}; start fdbrokerd by a path without"
                " links, or with --dev to try it out"
            )
        if facts.st_uid != 0 or facts.st_mode & 0o022:
            found, cure = f"belongs to uid {facts.st_uid}", "chown root"
            if facts.st_uid == 0:
                found, cure = f"has mode 0{stat.S_IMODE(facts.st_mode):03o}", "chmod go-w"
            raise UntrustedSourceError(
                f"{path} {found}, so somebody other than root can change it; as root: {cure} {path}, or"
                " install fdbroker where all is root's, or start with --dev to try it out"
            )
        parent = os.path.dirname(path)
        if parent == path:
            return
        path = parent


def name_of_code(path: str, source: bytes) -> str:
    """Return how the code is called in `PRECOMPILED` that this interpreter makes of the source at `path`."""
    return importlib.util.source_hash(os.fsencode(path) + b"\0" + source).hex()  # by the magic number as well


class _SourceOnly(SourceFileLoader):
    """Loads a module from its source, or what root compiled of it; never reads or writes a `.pyc`."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        compiled = f"{PRECOMPILED}/{name_of_code(path, source)}"
        if os.path.lexists(compiled):
            check_only_root_writes(compiled)
            try:
                code = SourcelessFileLoader(fullname, compiled).get_code(fullname)
            except (EOFError, ImportError, ValueError):  # cut short, as by a loss of power
                code = None
            if code is not None:
                return code
        return self.source_to_code(source, path)


class TrustedFinder:
    """Finds `fdbroker` and its trusted folders below `base`, and nothing else."""

    def __init__(self, base: str, *, check: bool) -> None:
        self._base = base
        self._check = check

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load `fullname`, None for what is not ours. See importlib.abc.MetaPathFinder.

        Raises:
            UntrustedSourceError: it is ours, but not only root's to write.

        """
        package, _, rest = fullname.partition(".")
        if package != "fdbroker":
            return None
        if not rest:
            # A bare package: fdbroker/__init__.py is for clients and imports their side.
            return ModuleSpec(fullname, None, is_package=True)
        folder, _, module = rest.partition(".")
        if folder not in TRUSTED_FOLDERS or "." in module:
            return None
        path = os.path.join(self._base, folder, f"{module or '__init__'}.py")
        if not os.path.exists(path):
            return None
        if self._check:
            check_only_root_writes(path)
        return importlib.util.spec_from_file_location(
            fullname,
            path,
            # In a checkout that is tried out, what is cached is no less trusted than the sources.
            loader=_SourceOnly(fullname, path) if self._check else SourceFileLoader(fullname, path),
            submodule_search_locations=None if module else [],
        )


def main() -> int:
    """Register the finder and start the broker; return its exit status."""
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal():  # noqa: PLR2004 - this program and its argument
        sys.stderr.write(
            "fdbroker: the broker is started by its launcher: python -I -m fdbroker.launcher --help\n"
        )
        return _EXIT_NOT_STARTED
    handover, *options = sys.argv[1:]
    check = "--dev" not in options
    base = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        if check:
            check_only_root_writes(os.path.abspath(__file__))
        sys.meta_path.append(TrustedFinder(base, check=check))
        from fdbroker.broker.main import run  # noqa: PLC0415 - it can be found from here on only
    except UntrustedSourceError as error:
        sys.stderr.write(f"fdbroker: {error}\n")
        return _EXIT_NOT_STARTED
    return run(int(handover))


if __name__ == "__main__":
    sys.exit(main())
