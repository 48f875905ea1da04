"""Paths as arguments: what this process sees under a relative path is not what the broker sees."""

from __future__ import annotations

import os

import click


def absolute(path: str) -> bytes:
    """Return a path as the broker takes it, without a look at the file system: `a/../b` is `b`.

    Raises:
        UsageError: it is empty.

    """
    if not path:
        raise click.UsageError("a path is empty: name a file or a directory")
    # POSIX leaves two slashes at the beginning alone, and the broker takes one.
    return b"/" + os.path.abspath(os.fsencode(path)).lstrip(b"/")
