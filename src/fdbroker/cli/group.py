"""A group of commands that says which one was meant."""

from __future__ import annotations

import difflib

import click


class SuggestingGroup(click.Group):
    """Names the command that is most like one that there is not; none at all is wrong use."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Do as click does, but for no arguments: with click 8.1 the help for that would be a success."""
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            raise click.UsageError(ctx.get_help(), ctx)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command as click does, and say more where there is none."""
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), 1) or self._below(
                ctx, args[0]
            )
            if close:
                raise click.UsageError(f"No such command {args[0]!r}. Did you mean {close[0]}?", ctx)
            raise click.UsageError(f"No such command {args[0]!r}.", ctx)
        return super().resolve_command(ctx, args)

    def _below(self, ctx: click.Context, name: str) -> list[str]:
        """Return the commands of that name in the groups that this one has."""
        groups = ((each, self.get_command(ctx, each)) for each in self.list_commands(ctx))
        return [
            f"{each} {name}"
            for each, group in groups
            if isinstance(group, click.Group) and group.get_command(ctx, name) is not None
        ]
