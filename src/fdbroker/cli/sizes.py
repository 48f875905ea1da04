"""Sizes as values of options."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fdbroker.config.scalars import ScalarError, parse_size

if TYPE_CHECKING:
    from click import Context, Parameter


def size_of_option(_context: Context, _parameter: Parameter, value: str | None) -> int | None:
    """Return the bytes that an option says, as its callback: `50MiB`, `1GB`; None where it is left out.

    Raises:
        BadParameter: it is no size.

    """
    if value is None:
        return None
    try:
        return parse_size(value)
    except ScalarError as error:
        raise click.BadParameter(str(error)) from error
