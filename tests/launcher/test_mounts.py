from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import files, namespaces, process
from fdbroker.kernel.errors import SyscallError
from fdbroker.launcher import mounts
from fdbroker.launcher.mounts import Mount, ReadOnlyViewError, not_read_only, parse_mounts
from fdbroker.launcher.start import find_cgroup2
from tests.running_broker import BROKER_UID

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.kernel.conftest import Children

MOUNTINFO = rb"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
28 27 0:21 / /proc ro,nosuid,nodev,noexec shared:3 - proc proc rw
29 27 0:30 /sub /mnt/with\040space\134and\012more ro,nosuid master:1 propagate_from:2 - tmpfs ro rw
30 27 0:31 / /srv rw,nosuid,nodev - ext4 ro ro
"""


def error_of(function: Callable[..., object], *arguments: object) -> int:
    try:
        function(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def test_points_and_options_of_mounts_are_read() -> None:
    assert parse_mounts(MOUNTINFO) == [
        Mount(27, b"ext4", b"/", b"/", frozenset({b"rw", b"relatime"})),
        Mount(28, b"proc", b"/", b"/proc", frozenset({b"ro", b"nosuid", b"nodev", b"noexec"})),
        Mount(29, b"tmpfs", b"/sub", b"/mnt/with space\\and\nmore", frozenset({b"ro", b"nosuid"})),
        Mount(30, b"ext4", b"/", b"/srv", frozenset({b"rw", b"nosuid", b"nodev"})),
    ]


@pytest.mark.root
def test_cgroup2_is_found_where_a_name_has_a_space_in_it(tmp_path: Path, in_child: Children) -> None:
    place = tmp_path / "with a space"
    place.mkdir()

    def child() -> str | None:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        for words in (["--make-rprivate", "/"], ["-t", "cgroup2", "none", str(place)]):
            subprocess.run(["mount", *words], check=True)
        for mount in mounts.read_mounts():
            if mount.type == b"cgroup2" and mount.point != bytes(place):
                subprocess.run(["umount", "--lazy", os.fsdecode(mount.point)], check=True)
        return find_cgroup2()

    assert in_child(child) == str(place)


def test_a_mount_is_read_only_by_its_own_options_and_not_by_those_of_its_file_system() -> None:
    assert not_read_only(parse_mounts(MOUNTINFO)) == [b"/", b"/mnt/with space\\and\nmore", b"/srv"]


@pytest.mark.root
def test_nothing_can_be_written_in_the_view(tmp_path: Path, in_child: Children) -> None:
    (tmp_path / "file").write_text("x")

    def child() -> dict[str, int]:
        mounts.enter_read_only_view()
        return {
            "create": error_of(os.mkdir, tmp_path / "new"),
            "open": error_of(os.open, tmp_path / "file", os.O_WRONLY),
            "unlink": error_of(os.unlink, tmp_path / "file"),
            "chmod": error_of(os.chmod, tmp_path / "file", 0o777),
            "shared memory": error_of(os.mkdir, "/dev/shm/new"),
            "kernel settings": error_of(os.open, "/proc/sys/kernel/hostname", os.O_WRONLY),
        }

    assert set(in_child(child).values()) == {errno.EROFS}
    assert (tmp_path / "file").exists()


@pytest.mark.root
def test_a_descriptor_from_the_view_is_no_way_to_write_even_for_the_owner(
    tmp_path: Path, in_child: Children
) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    os.chown(path, BROKER_UID, BROKER_UID)

    def child() -> dict[str, int]:
        mounts.enter_read_only_view()
        proc = files.open_proc_self_fd()
        descriptor = os.open(path, os.O_RDONLY)
        process.change_ids(BROKER_UID, BROKER_UID)
        name = f"/proc/self/fd/{descriptor}"
        return {
            "reopen for writing": error_of(os.open, name, os.O_RDWR),
            "reopen by a held directory": error_of(
                lambda: os.open(str(descriptor), os.O_WRONLY, dir_fd=proc)
            ),
            "truncate": error_of(os.truncate, name, 0),
            "fchmod": error_of(os.fchmod, descriptor, 0o600),
            "utime": error_of(os.utime, descriptor),
            "setxattr": error_of(os.setxattr, descriptor, "user.x", b"y"),
        }

    assert set(in_child(child).values()) == {errno.EROFS}


@pytest.mark.root
def test_every_mount_is_read_only_nosuid_and_nodev(in_child: Children) -> None:
    def child() -> list[str]:
        mounts.enter_read_only_view()
        return [point.decode() for point in not_read_only(mounts.read_mounts())]

    assert in_child(child) == []


@pytest.mark.root
def test_the_mounts_of_others_stay_as_they_are(tmp_path: Path, in_child: Children) -> None:
    before = mounts.read_mounts()
    in_child(mounts.enter_read_only_view)
    assert mounts.read_mounts() == before
    (tmp_path / "file").write_text("x")


@pytest.mark.root
def test_the_view_gets_what_is_mounted_later_and_gives_nothing_back(in_child: Children) -> None:
    def fields() -> list[bytes]:
        with open("/proc/self/mountinfo", "rb") as file:
            return [b" ".join(line.partition(b" - ")[0].split(b" ")[6:]) for line in file]

    def child() -> list[bool]:
        # As systemd has it: all mounts are shared.
        ms_shared = 1 << 20
        namespaces.unshare(namespaces.CLONE_NEWNS)
        namespaces.mount_setattr(b"/", attributes=0, propagation=ms_shared, recursive=True)
        before = all(b"shared:" in field for field in fields())
        outer = os.open("/proc/self/ns/mnt", os.O_RDONLY)  # lives on, with the mounts that are followed
        mounts.enter_read_only_view()
        follows = all(b"master:" in field for field in fields())
        os.close(outer)
        return [before, follows, any(b"shared:" in field for field in fields())]

    assert in_child(child) == [True, True, False]


@pytest.mark.root
def test_what_was_open_before_goes_on(tmp_path: Path, in_child: Children) -> None:
    def child() -> None:
        with open(tmp_path / "audit", "ab", buffering=0) as audit:
            mounts.enter_read_only_view()
            audit.write(b"record\n")

    in_child(child)
    assert (tmp_path / "audit").read_bytes() == b"record\n"


@pytest.mark.root
def test_entering_twice_is_as_good_as_once(in_child: Children) -> None:
    def child() -> int:
        mounts.enter_read_only_view()
        mounts.enter_read_only_view()
        return error_of(os.mkdir, "/tmp/new")

    assert in_child(child) == errno.EROFS


def test_without_the_capability_the_error_says_what_to_do(in_child: Children) -> None:
    def child() -> str:
        if os.geteuid() == 0:
            process.change_ids(65533, 65533)
        with pytest.raises(ReadOnlyViewError) as caught:
            mounts.enter_read_only_view()
        return str(caught.value)

    text = in_child(child)
    assert "unshare" in text
    assert "CAP_SYS_ADMIN" in text
    assert "ReadOnlyPaths=/" in text


@pytest.mark.root
@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSYS, "Linux 5.12"),
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.EINVAL, "mount point"),
        (errno.EBUSY, "open for writing"),
        (errno.EIO, "no closer reason"),
    ],
)
def test_a_refusal_names_the_call_the_cure_and_who_refuses(
    in_child: Children, number: int, cure: str
) -> None:
    def child() -> str:
        def refuse(path: bytes, *, recursive: bool = False, **_rest: object) -> None:
            if recursive or path == b"/proc":
                raise SyscallError(number, "mount_setattr", path=path)

        namespaces.mount_setattr = refuse
        with pytest.raises(ReadOnlyViewError) as caught:
            mounts.enter_read_only_view()
        return str(caught.value)

    text = in_child(child)
    assert text.startswith("mount_setattr(path=b'/')")
    assert cure in text
    assert f"Refused by /proc: {os.strerror(number)}" in text


@pytest.mark.root
def test_in_a_bare_chroot_the_error_says_so(tmp_path: Path, in_child: Children) -> None:
    def child() -> str:
        os.chroot(tmp_path)
        with pytest.raises(ReadOnlyViewError) as caught:
            mounts.enter_read_only_view()
        return str(caught.value)

    text = in_child(child)
    assert "EINVAL" in text
    assert "not a bare chroot" in text


@pytest.mark.root
def test_a_view_that_is_not_read_only_all_the_same_is_an_error(in_child: Children) -> None:
    def child() -> str:
        namespaces.mount_setattr = lambda *_path, **_rest: None
        with pytest.raises(ReadOnlyViewError) as caught:
            mounts.enter_read_only_view()
        return str(caught.value)

    assert in_child(child).startswith("still not read-only, nosuid and nodev: /")


def test_a_name_that_is_cut_at_its_nul_is_refused() -> None:
    with pytest.raises(SyscallError, match=r"mount_setattr.*EINVAL"):
        namespaces.mount_setattr(b"/\0x", attributes=namespaces.MOUNT_ATTR_RDONLY)
