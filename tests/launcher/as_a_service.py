"""Stands in for systemd's User=, AmbientCapabilities=, ReadOnlyPaths=/ and the rest, then runs a program.

    python as_a_service.py UID [WITHOUT...] -- PROGRAM ARGUMENT...

WITHOUT leaves out: view, user, ambient, bounding, nnp, securebits, nosuid.
"""

from __future__ import annotations

import os
import sys

from fdbroker.kernel import capabilities, namespaces, process
from fdbroker.kernel.capabilities import Capabilities
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH

_SECUREBITS = 0x0F  # as in the unit: noroot, no-setuid-fixup, both locked


def main() -> None:
    """Become such a process, and then the program."""
    split = sys.argv.index("--")
    uid, without = int(sys.argv[1]), set(sys.argv[2:split])
    program = sys.argv[split + 1 :]
    if "view" not in without:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        attributes = namespaces.MOUNT_ATTR_RDONLY
        if "nosuid" not in without:
            attributes |= namespaces.MOUNT_ATTR_NOSUID
        namespaces.mount_setattr(b"/", attributes=attributes, propagation=namespaces.MS_SLAVE, recursive=True)
    if "bounding" not in without:
        for number in range(capabilities.last_capability() + 1):
            if number != CAP_DAC_READ_SEARCH and process.in_bounding_set(number):
                process.drop_from_bounding_set(number)
    if "user" not in without:
        process.set_keepcaps(True)
        process.change_ids(uid, uid)
    if "securebits" not in without:
        setpcap = 1 << capabilities.CAP_SETPCAP
        capabilities.capset(capabilities.capget()._replace(effective=setpcap))
        process.set_securebits(_SECUREBITS)
    if "nnp" not in without:
        process.set_no_new_privs()
    one = 1 << CAP_DAC_READ_SEARCH
    if "ambient" in without:
        capabilities.capset(Capabilities(0, 0, 0))
    else:
        capabilities.capset(Capabilities(one, one, one))
        process.raise_ambient_capability(CAP_DAC_READ_SEARCH)
    os.execvp(program[0], program)  # noqa: S606 - as a service manager does


main()
