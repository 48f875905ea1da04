"""A client of the scan service in one file, to be copied: scans the trees that it is given.

Standard library alone; docs/scan-protocol.md is all that it goes by. Exit status: 0 all of it is clean,
1 something is infected, 2 something has no verdict.
"""

import json
import os
import socket
import sys
from typing import Any

sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(os.environ.get("FDBROKER_SCAN_SOCKET", "/run/fdbroker/scan"))


def say(**message: object) -> None:
    """Send one message."""
    sock.send(json.dumps(message).encode("ascii"))


def receive() -> dict[str, Any]:
    """Return one message; ends the program if it is refused what it asks for, or there are no more."""
    try:
        data = sock.recv(65536)
    except ConnectionResetError:
        data = sock.recv(65536)  # what was said last is still there
    message = json.loads(data) if data else {"type": "farewell", "message": "the connection has ended"}
    if message["type"] in {"farewell", "refused"}:
        sys.stderr.write(f"{message['message']}\n")
        sys.exit(2)
    return message


say(type="hello", version=1)
receive()
infected = unknown = 0
for path in sys.argv[1:]:
    say(type="scan_tree", id=1, path_hex=os.fsencode(os.path.abspath(path)).hex())
    while (answer := receive())["type"] == "results":
        for result in answer["results"]:
            if result.get("verdict") in {"infected", "error"}:
                print(ascii(result["path"]), result.get("name") or result["message"])
    infected += answer["infected"]
    unknown += answer["errors"] + (not answer["complete"])
sys.exit(2 if unknown else bool(infected))
