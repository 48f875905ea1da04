"""Why fdbrokerd does not start, and the exit status that says so."""

from __future__ import annotations

EXIT_NOT_STARTED = 2
EXIT_ALREADY_RUNNING = 3


class LaunchError(Exception):
    """The broker does not start; the text says what is in the way and what to do."""

    status = EXIT_NOT_STARTED


class AlreadyRunningError(LaunchError):
    """Another broker holds the lock; the text says which process."""

    status = EXIT_ALREADY_RUNNING
