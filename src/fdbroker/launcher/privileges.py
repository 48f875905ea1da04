"""From whatever the launcher was started with to what the broker may be.

The broker runs as its own user with CAP_DAC_READ_SEARCH and nothing else: no
other capability permitted, effective, inheritable, ambient or in the bounding
set, no_new_privs, and securebits by which uid 0 means nothing. Started by
systemd with User=, AmbientCapabilities=, CapabilityBoundingSet=, SecureBits= and
NoNewPrivileges=, all of that is there; started by hand as root, nothing is. So:
compare first, change only what differs, then compare again. The state outlives
execve, since the capability is ambient.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.kernel import capabilities, process
from fdbroker.kernel.capabilities import Capabilities
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH, ProcessState, read_process_state
from fdbroker.launcher.errors import LaunchError

# What `SecureBits=noroot noroot-locked no-setuid-fixup no-setuid-fixup-locked` sets. Not keep-caps-locked:
# systemd 257 can start nothing that has it, and with no-setuid-fixup the kernel does not look at keep-caps
# (capabilities(7)).
_SECUREBITS = (
    process.SECBIT_NOROOT
    | process.SECBIT_NOROOT_LOCKED
    | process.SECBIT_NO_SETUID_FIXUP
    | process.SECBIT_NO_SETUID_FIXUP_LOCKED
)
# Others lock keep-caps, or say whether ambient capabilities can still be raised: with one that is nothing.
_SECUREBITS_MASK = _SECUREBITS | process.SECBIT_KEEP_CAPS

_CURE = "Start it as root, or by systemd with the options in parentheses."
# By which option of a unit it comes right.
_OPTIONS = {
    "bounding": "CapabilityBoundingSet=CAP_DAC_READ_SEARCH",
    "permitted": "AmbientCapabilities=CAP_DAC_READ_SEARCH",
    "effective": "AmbientCapabilities=CAP_DAC_READ_SEARCH",
    "inheritable": "AmbientCapabilities=CAP_DAC_READ_SEARCH",
    "ambient": "AmbientCapabilities=CAP_DAC_READ_SEARCH",
}
_SECUREBITS_OPTION = "SecureBits=noroot noroot-locked no-setuid-fixup no-setuid-fixup-locked"


class PrivilegeError(LaunchError):
    """The process is not what the broker must be; the text says in what. It must not go on."""


class Privileges(NamedTuple):
    """What is compared: /proc/PID/status, and the securebits, which are not in there."""

    status: ProcessState
    securebits: int


class WantedPrivileges(NamedTuple):
    """What the broker must be."""

    uid: int
    gid: int
    capabilities: int = 1 << CAP_DAC_READ_SEARCH
    securebits: int = _SECUREBITS


def read_privileges() -> Privileges:
    """Return what this process is now."""
    return Privileges(read_process_state(), process.get_securebits())


def differences(state: Privileges, wanted: WantedPrivileges) -> list[str]:
    """Return in what `state` is not as wanted, as texts for people; [] if it is.

    Of supplementary groups, none or the primary one again will do: initgroups(3)
    adds that.
    """
    now = state.status
    found = []
    if now.uids != (wanted.uid,) * 4:
        found.append(f"user ids are {now.uids}, not {wanted.uid} (User=)")
    if now.gids != (wanted.gid,) * 4:
        found.append(f"group ids are {now.gids}, not {wanted.gid} (Group=)")
    if now.groups not in {(), (wanted.gid,)}:
        found.append(f"supplementary groups are {now.groups}, not none (SupplementaryGroups=)")
    sets = {
        "permitted": now.permitted,
        "effective": now.effective,
        "inheritable": now.inheritable,
        "ambient": now.ambient,
        "bounding": now.bounding,
    }
    found += [
        f"{name} capabilities are {bits:#x}, not {wanted.capabilities:#x} ({_OPTIONS[name]})"
        for name, bits in sets.items()
        if bits != wanted.capabilities
    ]
    if state.securebits & _SECUREBITS_MASK != wanted.securebits:
        found.append(
            f"securebits are {state.securebits:#x}, not {wanted.securebits:#x} ({_SECUREBITS_OPTION})"
        )
    if not now.no_new_privs:
        found.append("no_new_privs is not set (NoNewPrivileges=yes)")
    return found


def become_broker(uid: int, gid: int) -> Privileges:
    """Become what the broker must be, for good, and return what was verified.

    Call it with one thread: capabilities and securebits are a thread's own.

    Raises:
        PrivilegeError: the process may not change what differs, or it came out
            different all the same. It is something in between then: end it.

    """
    wanted = WantedPrivileges(uid, gid)
    if uid == 0 or gid == 0:
        raise PrivilegeError(
            "the broker's user and group must not be root's: it opens no file as uid 0; name a user of its"
            " own (User= of the unit, --user, or `user` in the policy)"
        )
    before = read_privileges()
    if before.status.threads != 1:
        raise PrivilegeError(f"{before.status.threads} threads are running; capabilities belong to each")
    missing = differences(before, wanted)
    if not missing:
        return before
    try:
        _change(before, wanted)
    except (SyscallError, RuntimeError) as error:
        raise PrivilegeError(f"{error}. To change: {'; '.join(missing)}. {_CURE}") from error
    after = read_privileges()
    remaining = differences(after, wanted)
    if remaining:
        raise PrivilegeError(f"after changing all: {'; '.join(remaining)}. {_CURE}")
    return after


def _change(before: Privileges, wanted: WantedPrivileges) -> None:
    """Change what differs, in the order in which each step still has the capability that it needs."""
    now = before.status
    # CAP_SETPCAP: the bounding set and the securebits.
    for capability in range(now.bounding.bit_length()):
        if (now.bounding & ~wanted.capabilities) >> capability & 1:
            process.drop_from_bounding_set(capability)
    if before.securebits & _SECUREBITS_MASK != wanted.securebits:
        # With no-setuid-fixup the change of uid below takes no capability, so keep-caps is not needed.
        process.set_securebits(wanted.securebits | before.securebits & ~_SECUREBITS_MASK)
    # CAP_SETUID and CAP_SETGID: the ids.
    ids_differ = now.uids != (wanted.uid,) * 4 or now.gids != (wanted.gid,) * 4
    if ids_differ or now.groups not in {(), (wanted.gid,)}:
        process.change_ids(wanted.uid, wanted.gid)
    # From here on nothing is needed but what is kept.
    process.set_no_new_privs()
    capabilities.capset(Capabilities(*(wanted.capabilities,) * 3))
    if now.ambient != wanted.capabilities:
        process.clear_ambient_capabilities()
        for capability in range(wanted.capabilities.bit_length()):
            if wanted.capabilities >> capability & 1:
                process.raise_ambient_capability(capability)
