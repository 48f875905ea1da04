"""Compiled rules and the decision. Pure: no system call, no clock, no I/O.

Trusted: this folder is loaded into the process that holds the capability. It
uses the standard library only.
"""
