"""One thin function per system call; no policy.

Trusted: this folder is loaded into the process that holds the capability. It
uses the standard library only. The flags that safety needs are forced inside
the wrapper; a failure is a `SyscallError` that names the call and what it was
given.
"""
