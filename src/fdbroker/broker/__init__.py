"""The process with the capability: one epoll loop that decides, opens, records and sends.

Trusted: standard library only, and only kernel, wire and policy below it.
"""
