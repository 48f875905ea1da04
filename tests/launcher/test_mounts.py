from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import files, namespaces, process
from fdbroker.kernel.errors import SyscallError
from fdbroker.launcher import mounts
from fdbroker.launcher.mounts import (
    Mount,
    ReadOnlyViewError,
    check_read_only_view,
    mounts_on_the_way,
    not_read_only,
    parse_mounts,
)
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
        Mount(27, 1, b"ext4", b"/", b"/", frozenset({b"rw", b"relatime"})),
        Mount(28, 27, b"proc", b"/", b"/proc", frozenset({b"ro", b"nosuid", b"nodev", b"noexec"})),
        Mount(29, 27, b"tmpfs", b"/sub", b"/mnt/with space\\and\nmore", frozenset({b"ro", b"nosuid"})),
        Mount(30, 27, b"ext4", b"/", b"/srv", frozenset({b"rw", b"nosuid", b"nodev"})),
    ]


BEHIND_A_SERVER = rb"""27 1 254:0 / / ro,nosuid - ext4 /dev/vda rw
30 27 0:31 / /srv rw,nosuid,nodev - fuse.sshfs there rw
31 30 0:32 / /srv/disk ro,nosuid,nodev - ext4 /dev/vdb rw
32 30 0:33 / /srv/other rw,nosuid,nodev - tmpfs none rw
"""


def test_a_root_behind_what_may_not_answer_is_judged_by_its_mount_and_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(mounts, "read_mounts", lambda: parse_mounts(BEHIND_A_SERVER))
    monkeypatch.setattr(os, "statvfs", hang)
    check_read_only_view([("disk", "/srv/disk/mail", False)])
    with pytest.raises(ReadOnlyViewError, match=r"root 'other' \(/srv/other\) is not read-only"):
        check_read_only_view([("other", "/srv/other", False)])


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


def way(path: str, *mounts: tuple[int, int, str]) -> list[int]:
    """Return the numbers of the mounts on the way; mounts by number, parent and point."""
    table = [Mount(one, parent, b"ext4", b"/", at.encode(), frozenset()) for one, parent, at in mounts]
    return [mount.number for mount in mounts_on_the_way(path.encode(), table)]


def test_the_way_to_a_path_goes_through_what_is_mounted_and_not_covered() -> None:
    table = [(20, 1, "/"), (21, 20, "/home"), (22, 21, "/home/a/b"), (23, 20, "/homely"), (24, 20, "/srv/x")]
    assert way("/", *table) == [20]
    assert way("/home", *table) == [20, 21]
    assert way("/home/a", *table) == [20, 21]
    assert way("/home/a/b/c", *table) == [20, 21, 22]
    assert way("/homely", *table) == [20, 23]
    assert way("/srv", *table) == [20]
    # A later mount covers what lies in the directory that it is on, and one on the very point comes on top.
    assert way("/srv/x/y", *table, (25, 20, "/srv")) == [20, 25]
    assert way("/srv/x/y", *table, (25, 24, "/srv/x")) == [20, 24, 25]
    # rootfs is its own parent; what a chroot has above it is not to be seen.
    assert way("/home/a", (1, 1, "/"), (20, 1, "/"), (21, 20, "/home")) == [1, 20, 21]
    assert way("/home/a", (21, 20, "/home"), (22, 20, "/srv")) == [21]
    assert way("/home/a", (22, 20, "/srv")) == []


@pytest.mark.root
def test_the_way_ends_in_the_mount_in_which_the_kernel_finds_the_path(
    tmp_path: Path, in_child: Children
) -> None:
    for name in ("a/b/c", "a/d", "e"):
        (tmp_path / name).mkdir(parents=True)

    def number_of(path: Path) -> int:
        descriptor = os.open(path, os.O_PATH)
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
            return next(int(line.split()[1]) for line in info if line.startswith("mnt_id:"))

    def child() -> None:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        # On a/b, inside it, over all of a (with directories for more), on the very point of that, and inside.
        for at in ("a/b", "a/b/c", "e", "a", "a/b", "a", "a/d"):
            (tmp_path / at).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / at)], check=True)
            for name in ("b/c", "d"):
                (tmp_path / "a" / name).mkdir(parents=True, exist_ok=True)
            table = mounts.read_mounts()
            for path in (tmp_path, *tmp_path.rglob("*")):
                assert mounts_on_the_way(bytes(path), table)[-1].number == number_of(path), (at, path)

    in_child(child)


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
