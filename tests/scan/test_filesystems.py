"""Which descriptors the scan service may touch in its loop: of file systems that root has mounted here."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import namespaces
from fdbroker.scan.service.filesystems import Mounted, sort_out
from fdbroker.scan.verdict import Reason
from tests.descriptors.mounting import mount, unmount
from tests.hanging.fuse import fuse_mounted
from tests.processes import in_child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with contextlib.closing(Mounted()) as made:
        yield made


def open_and(mounted: Mounted, path: Path) -> bool:
    """Return whether a file is one of those, made and opened for that."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return mounted.have(descriptor)
    finally:
        os.close(descriptor)


def test_files_and_memory_are_here(mounted: Mounted, tmp_path: Path) -> None:
    assert open_and(mounted, tmp_path / "file")
    descriptor = os.memfd_create("x")
    assert mounted.have(descriptor)
    os.close(descriptor)
    assert not mounted.have(descriptor)


@pytest.mark.root
def test_number_of_a_file_system_that_is_gone_is_not_that_of_a_users_own(
    mounted: Mounted, tmp_path: Path
) -> None:
    mount(b"x", bytes(tmp_path), b"tmpfs", 0, b"")
    assert open_and(mounted, tmp_path / "file")
    unmount(bytes(tmp_path))
    # The kernel takes the lowest number that is free, which is this one unless others mount meanwhile.
    with fuse_mounted(tmp_path, {"file": b""}):
        assert not open_and(mounted, tmp_path / "file")
        opened = os.open(tmp_path / "file", os.O_RDONLY)
        assert [one.reason for one in sort_out([opened]).refused] == [Reason.FILESYSTEM]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(opened)


@pytest.mark.root
@pytest.mark.parametrize("layers", ["of one file system", "of two"])
def test_overlay_is_a_users_own_unless_it_is_mounted_here(
    mounted: Mounted, tmp_path: Path, layers: str
) -> None:
    """With layers of two file systems, a file in it has the device number of no mount."""

    def lay_over() -> None:
        mount(b"x", bytes(tmp_path), b"tmpfs", 0, b"")
        os.chdir(tmp_path)
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(name)
        if layers == "of two":
            mount(b"x", b"lower", b"tmpfs", 0, b"")
        (tmp_path / "lower" / "file").touch()
        mount(b"x", b"merged", b"overlay", 0, b"lowerdir=lower,upperdir=upper,workdir=work")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def elsewhere() -> None:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        mount(b"none", b"/", b"", 1 << 18 | 1 << 14, b"")  # MS_PRIVATE, MS_REC
        lay_over()
        descriptors = [os.open(path, os.O_RDONLY | os.O_CREAT, 0o600) for path in ("merged/file", "plain")]
        socket.send_fds(theirs, [b"x"], descriptors)

    with ours, theirs:
        in_child(elsewhere)
        _, descriptors, *_ = socket.recv_fds(ours, 1, 2)
    assert [mounted.have(each) for each in descriptors] == [False, False]
    found = sort_out(descriptors)
    assert len(found.refused) == 1, "tmpfs is no program"
    with found.kept:
        assert len(found.kept) == 1
    here = os.getcwd()
    lay_over()
    try:
        with open("merged/file", "rb") as file:
            assert mounted.have(file.fileno())
    finally:
        os.chdir(here)
        unmount(bytes(tmp_path / "merged"))
        if layers == "of two":
            unmount(bytes(tmp_path / "lower"))
        unmount(bytes(tmp_path))
