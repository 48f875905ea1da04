"""What this machine gives of the confinement of a worker, for whoever asks now: tried, not looked up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.sandbox.zygote import Zygote

if TYPE_CHECKING:
    import socket

    from fdbroker.sandbox.confinement import Confinement
    from fdbroker.sandbox.report import LayerReport


def report_of(confinement: Confinement) -> LayerReport:
    """Start a worker that is given nothing, whatever it lacks, and return what confined it.

    Raises:
        SandboxError: not even that worked: no process can be started, or root's can't become another user's.
        OSError: no process or descriptor to be had.

    """
    with (
        Zygote(None, wait, confinement=replace(confinement, report_only=True)) as zygote,
        zygote.spawn() as worker,
    ):
        return worker.report


def wait(_state: None, channel: socket.socket, _scratch: bytes | None) -> None:
    """Be the worker: wait until the other end is closed."""
    sockets.receive(channel, 1)
