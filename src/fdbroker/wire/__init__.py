"""Messages of docs/protocol.md: bytes in, values out, and back. No I/O.

Trusted: this folder, but for `client.py`, is loaded into the process that holds
the capability. It uses the standard library only.
"""
