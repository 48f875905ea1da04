"""The way to the broker's control socket."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from fdbroker.cli.broker import obstacle
from fdbroker.cli.failure import EXIT_ERROR, Failure
from fdbroker.client import BrokerError, PathInvalidError, control
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.client.control import Control


@contextlib.contextmanager
def connected(control_path: str | None, exit_code: int = EXIT_ERROR) -> Iterator[Control]:
    """Give a connection to the control socket.

    Raises:
        Failure: there is no way to the broker, nobody said which (None), it does not answer, or it was asked
            about what is no path; the text says what to do.

    """
    if control_path is None:
        raise Failure(
            "--socket names another broker than the usual one; name its control socket as well: --control"
            " PATH",
            exit_code,
        )
    try:
        with control.connect(os.fsencode(control_path)) as connection:
            yield connection
    except PathInvalidError as error:
        path = printable(error.filename or b"")
        raise Failure(f"{path}: {error.strerror}; name it by a shorter one", exit_code) from error
    except BrokerError as error:
        raise Failure(str(obstacle(control_path, error, "--control")), exit_code) from error
