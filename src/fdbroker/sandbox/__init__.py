"""Confinement of processes that read hostile bytes: layers, what they achieved, and starting such a process.

No capability is used here but those that are given up.
"""
