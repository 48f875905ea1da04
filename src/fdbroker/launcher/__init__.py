"""`fdbrokerd`: what runs before the broker and is gone by execve.

Sockets, audit, lock, mount view, ids, capabilities, filter. `command` is the way through all of it.
"""
