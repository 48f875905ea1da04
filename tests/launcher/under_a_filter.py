"""Stands in for systemd's SystemCallFilter= and RestrictSUIDSGID=, then runs a program.

    python under_a_filter.py CALL ERRNO -- PROGRAM ARGUMENT...

CALL fails with that errno from then on.
"""

from __future__ import annotations

import errno
import os
import sys

from fdbroker.kernel import bpf, process, seccomp


def main() -> None:
    """Install the filter, and become the program."""
    call, number = sys.argv[1], getattr(errno, sys.argv[2])
    process.set_no_new_privs()
    seccomp.install(bpf.assemble({}, machine=os.uname().machine, otherwise=bpf.ALLOW, errnos={call: number}))
    os.execvp(sys.argv[4], sys.argv[4:])  # noqa: S606 - as a service manager does


main()
