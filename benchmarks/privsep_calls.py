"""What oslo.privsep runs in its daemon: its usual shape, one function that reads one file.

A module of its own, because the daemon finds the function by the module's name.
"""

from __future__ import annotations

from oslo_privsep import capabilities, priv_context

CONTEXT = priv_context.PrivContext(
    __name__,
    cfg_section="fdbroker_benchmark",
    pypath=f"{__name__}.CONTEXT",
    capabilities=[capabilities.CAP_DAC_READ_SEARCH],
)


@CONTEXT.entrypoint
def read_file(path: bytes) -> bytes:
    """Return the content of a file that the caller may not read."""
    with open(path, "rb") as file:
        return file.read()


def start() -> None:
    """Fork the daemon; called as root, who may give up root afterwards."""
    CONTEXT.start(method=priv_context.Method.FORK)
