"""Paths as arguments: what this process sees under a relative path is not what the broker sees."""

from __future__ import annotations

import os

import click

from fdbroker.config.names import printable


def absolute(path: str) -> bytes:
    """Return a path as the broker takes it, without a look at the file system: `a/../b` is `b`.

    Raises:
        UsageError: it is empty, or relative where the working directory can't be told.

    """
    if not path:
        raise click.UsageError("a path is empty: name a file or a directory")
    try:
        whole = os.path.abspath(os.fsencode(path))
    except OSError as error:
        why = f"the working directory can't be told ({error.strerror})"
        raise click.UsageError(f"{printable(path)} is relative, and {why}: name the whole path") from error
    # POSIX leaves two slashes at the beginning alone, and the broker takes one.
    return b"/" + whole.lstrip(b"/")
