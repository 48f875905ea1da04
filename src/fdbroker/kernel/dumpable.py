"""Whether others may look into this process; of prctl(2) the one thing that the broker itself does."""

from __future__ import annotations

from fdbroker.kernel.libc import SYS_PRCTL, syscall

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def set_dumpable(dumpable: bool) -> None:  # noqa: FBT001 - the value is the whole call
    """Say whether others of this uid may trace this process, and whether it leaves a core dump.

    PR_SET_DUMPABLE. Hazard: execve(2) sets it to true again.
    """
    syscall("prctl", SYS_PRCTL, _PR_SET_DUMPABLE, int(dumpable), 0, 0, 0, option="PR_SET_DUMPABLE")
