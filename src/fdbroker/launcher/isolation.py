"""A start that neither the working directory nor the environment can lead to other code.

The `fdbrokerd` script runs the interpreter isolated (-I). `python -m` without it
has PYTHONPATH, user site-packages and the working directory in front, so then
the first thing is to start again, isolated and with an environment of our own,
of which only what systemd says to its services is left. What ran before that
can't be undone.
"""

from __future__ import annotations

import os
import sys

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
# sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3). The pid in them stays true through execve.
_FROM_SYSTEMD = (
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


def clean_environment() -> dict[str, str]:
    """Return the environment to start again with."""
    kept = {name: os.environ[name] for name in _FROM_SYSTEMD if name in os.environ}
    return _ENVIRONMENT | kept


def isolate(arguments: list[str]) -> None:
    """Start again unless this process is isolated; with --dev, only leave out what -P would.

    Does not return if it starts again.
    """
    if sys.flags.isolated:
        return
    if "--dev" in arguments:
        if not sys.flags.safe_path:
            del sys.path[0]  # of the script, or the working directory
        return
    os.execve(  # noqa: S606 - ourselves, no shell
        sys.executable,
        [sys.executable, "-I", "-m", "fdbroker.launcher", *arguments],
        clean_environment(),
    )
