"""What can go wrong on the way to a confined process."""

from __future__ import annotations


class SandboxError(Exception):
    """There is no confined process, or it did not do what it was asked for; the text says why."""


class ConfinementError(SandboxError):
    """A layer that must be there is not; the text says which and why. There is no process then."""


class ZygoteError(SandboxError):
    """The zygote could not be started, or is gone, or does not answer. So are its workers, if it had any."""
