"""A group of commands that says which one was meant."""

from __future__ import annotations

import difflib

import click


class SuggestingGroup(click.Group):
    """Names the command that is most like one that there is not."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command as click does, and say more where it finds none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            if not close:
                raise
            text = f"No such command {args[0]!r}. Did you mean {close[0]}?"
            raise click.UsageError(text, ctx) from error
