"""The tests of the launcher change the state of processes as those of the system calls do."""

from tests.kernel.conftest import in_child

__all__ = ["in_child"]
