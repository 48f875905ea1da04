"""Messages of docs/protocol.md: bytes in, values out, and back. No I/O.

Trusted: this folder is loaded into the process that holds the capability. It
uses the standard library only.
"""
