#!/usr/bin/python3 -I
"""A worker for one client, as systemd starts it with Accept=yes: told a path, it answers with the SHA-256.

It runs as a user that did not exist before (DynamicUser=), with a file system in which there is nothing,
and opens what the broker's policy gives its unit. fdbroker-worker.socket says how to try it.
"""

from __future__ import annotations

import hashlib
import sys

import fdbroker

LONGEST = 4096  # PATH_MAX with its end: what is longer is no path, and is not to fill memory


def main() -> None:
    path = sys.stdin.buffer.readline(LONGEST).removesuffix(b"\n")
    try:
        with fdbroker.connect() as client, client.open(path) as file:
            print(hashlib.file_digest(file, "sha256").hexdigest())
    except (OSError, ValueError) as error:
        print(f"error: {error}")


main()
