"""A command that can't do what it was asked to: the text says why, and what helps."""

from __future__ import annotations

import click

from fdbroker.cli.output import complain_printable

EXIT_ERROR = 2


class Failure(click.ClickException):
    """Ends the command with `status`. The message is printable: names in it went through `printable`."""

    def __init__(self, message: str, status: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.status = status

    def show(self, file: object = None) -> None:  # noqa: ARG002 - click's signature
        """Write it to standard error."""
        for line in self.message.splitlines():
            complain_printable(line)
