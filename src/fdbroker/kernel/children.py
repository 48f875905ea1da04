"""Forked processes that end with whoever forked them, held by a descriptor and not by a number.

A pid can be another process's a moment later; a pidfd can't.
"""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

from fdbroker.kernel.errors import renamed
from fdbroker.kernel.libc import SYS_PRCTL, syscall

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child(NamedTuple):
    """A child of this process. `pidfd` is readable when it has ended; the owner of this value closes it."""

    pid: int
    pidfd: int


def set_parent_death_signal(signal_number: int) -> None:
    """Get this signal when the *thread* that forked this process ends; 0 for none.

    PR_SET_PDEATHSIG. Hazards: any change of ids clears it, so set it again
    after that; and a parent that ended before this call sends nothing, so look
    at the parent after it.
    """
    syscall(
        "prctl",
        SYS_PRCTL,
        _PR_SET_PDEATHSIG,
        signal_number,
        0,
        0,
        0,
        option="PR_SET_PDEATHSIG",
        signal=signal_number,
    )


def fork_tied() -> Child | None:
    """Fork a child that is killed when the calling thread ends; return it, or None in the child.

    pidfd_open(2), Linux 5.3. The child never leaves this call if its parent is
    gone already.

    Raises:
        SyscallError: EAGAIN (too many processes: RLIMIT_NPROC, TasksMax= of
            systemd), ENOMEM, EMFILE. There is no child then.

    """
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        raise renamed(error, "fork") from None
    if pid == 0:
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return None
    try:
        # It is not waited for yet, so its number is its own.
        return Child(pid, os.pidfd_open(pid))
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise renamed(error, "pidfd_open", pid=pid) from None


def kill(child: Child) -> None:
    """Send SIGKILL. It may take effect late, or never: what waits for a FUSE server waits on."""
    signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)


def reap(child: Child) -> None:
    """Take note of the end of a child whose pidfd was readable, and close the pidfd."""
    os.waitpid(child.pid, 0)
    os.close(child.pidfd)
