"""A machine that exists only in tests: a few users, groups and directories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.config import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable

USERS = {
    "root": 0,
    "clamav": 110,
    "backup-agent": 111,
    "log-shipper": 112,
    "app": 113,
    "web": 114,
    "indexer": 115,
    "anon": 65534,
    "Alice": 1000,
}
ACCOUNTS = {
    "root": (0, 0),
    "fdbroker": (990, 991),
    "brokers": (995, 996),
    "odd": (994, 0),
    "anon": (65534, 65534),
}
GROUPS = {
    "fdbroker-clients": 992,
    "fdbroker-admin": 993,
    "users": 100,
    "projects": 2000,
    "adm": 4,
    "wheel": 4,
}
DIRECTORIES = {
    "/",
    "/etc/letsencrypt",
    "/home",
    "/home/alice",
    "/var/mail",
    "/var/log",
    "/var/lib/containers",
    "/var/lib/app",
    "/srv/projects",
}


class FakeLookups:
    def user(self, name: str) -> int | None:
        return USERS.get(name)

    def group(self, name: str) -> int | None:
        return GROUPS.get(name)

    def account(self, name: str) -> tuple[int, int] | None:
        return ACCOUNTS.get(name)

    def user_names(self) -> Iterable[str]:
        return USERS

    def group_names(self) -> Iterable[str]:
        return GROUPS

    def directory(self, path: str) -> Fault | None:
        if path in DIRECTORIES:
            return None
        return Fault(f"{path!r}: No such file or directory", "name a directory that exists")
