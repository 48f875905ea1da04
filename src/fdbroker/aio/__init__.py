"""The client for asyncio: what `fdbroker.connect` gives, with `await`.

    from fdbroker import aio

    async with await aio.connect() as client:
        with await client.open("/var/log/syslog") as file:
            ...

Any number of tasks may share a client: what they ask is sent at once and
answered in any order. There are no threads: the event loop watches one socket
that never blocks. What it cannot watch is reading a regular file, which waits
for the disk as it does anywhere.

Cancelling is safe: a file that comes for a task that is not there any more is
closed, and a walk that is left is cancelled at the broker.
"""

from fdbroker.aio.client import Client, connect
from fdbroker.aio.files import Results
from fdbroker.aio.service import ServedClient, Service
from fdbroker.aio.walk import Walk
from fdbroker.client.blocking import DEFAULT_SOCKET, DEFAULT_TIMEOUT

__all__ = [
    "DEFAULT_SOCKET",
    "DEFAULT_TIMEOUT",
    "Client",
    "Results",
    "ServedClient",
    "Service",
    "Walk",
    "connect",
]
