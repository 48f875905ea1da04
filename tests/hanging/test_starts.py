"""Starts beside a file system that does not answer: they succeed, or end in time and say what it is."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.config.check import check
from fdbroker.config.identities import SystemLookups
from fdbroker.launcher import roots as roots_module
from fdbroker.launcher.mounts import ReadOnlyViewError, check_read_only_view, enter_read_only_view
from tests.broker.speaking import Speaker
from tests.descriptors.mounting import mounted
from tests.hanging.fuse import Operation, abort, fuse_mounted
from tests.hanging.places import Place, mounted_beside_local, two_roots
from tests.running_broker import running_broker, start_that_fails

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kernel.conftest import Children

pytestmark = pytest.mark.root

FILES = {"good": b"good", "inner": b"a file"}
YAML = """version: 1
roots:
  tree: {{path: {local}}}
  far: {{path: {far}, opens: {opens}}}
rules:
  - {{name: all, allow: open, client: any, in: far, paths: "**"}}
"""


class StartPlace(Place):
    """Of which brokers are started."""

    def compiled(self, far: Path, opens: str = "helpers") -> dict[str, Any]:
        return two_roots(self.local, far, opens=opens)

    def yaml(self, far: Path, opens: str = "helpers") -> str:
        return YAML.format(local=self.local, far=far, opens=opens)

    def asked(self) -> int:
        """Return how often anything was asked for, but for what the mount itself asks."""
        return (
            sum(self.server.asked(operation, name) for operation in Operation for name in ("", "inner")) - 1
        )


@pytest.fixture
def place() -> Iterator[StartPlace]:
    with mounted_beside_local(FILES) as (directory, server):
        server.wait_until_asked(Operation.INIT, "")
        try:
            yield StartPlace(directory, server)
        finally:
            abort(directory / "far")


def test_a_broker_starts_while_its_root_does_not_answer_and_serves_it_when_it_does(place: StartPlace) -> None:
    place.server.never |= {(operation, "") for operation in Operation} - {(Operation.INIT, "")}
    local, good = bytes(place.local / "file"), bytes(place.far / "good")
    compiled = place.compiled(place.far)
    with running_broker(place.directory, compiled) as broker, Speaker.connect(broker.socket) as speaker:
        try:
            assert place.asked() == 0
            assert [each.reason for each in speaker.open(good, local)] == ["timed_out", "ok"]
            place.server.never.clear()
            assert [each.content for each in speaker.open(good, local)] == [b"good", b"local"]
        finally:
            abort(place.far)


@pytest.mark.parametrize("written", ["compiled", "yaml"])
def test_a_root_in_a_file_system_that_does_not_answer_ends_the_start_which_names_it(
    place: StartPlace, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setattr(roots_module, "SECONDS", 0.2)
    place.server.never.add((Operation.LOOKUP, "inner"))
    inner = place.far / "inner"
    read_end, write_end = os.pipe()
    text = start_that_fails(
        place.directory,
        place.compiled(inner) if written == "compiled" else place.yaml(inner),
        f"--ready-fd={write_end}",
        pass_fds=[write_end],
    )
    assert text == (
        f"fdbroker: root 'far' ({inner}) can't be opened: fuse at {place.far} did not answer within 0.2 s;"
        " see to its server, or unmount it (umount -l), then start the broker again; or take the root out of"
        " the policy\n"
    )
    # Asked by who opens it, and by nobody else. It waits on, and has nothing that others would wait for.
    assert place.server.asked(Operation.LOOKUP, "inner") == 1
    os.close(write_end)
    with open(read_end, "rb") as ready:
        assert ready.read() == b""


def test_a_root_that_is_no_directory_there_ends_the_start_with_the_reason(place: StartPlace) -> None:
    inner = place.far / "inner"
    text = start_that_fails(place.directory, place.compiled(inner))
    assert text == (
        f"fdbroker: root 'far' ({inner}) can't be opened at 'inner': Not a directory; it must be a directory,"
        " reached without symbolic links\n"
    )


def test_a_root_there_that_the_loop_would_open_is_refused_without_asking(place: StartPlace) -> None:
    text = start_that_fails(place.directory, place.compiled(place.far, "loop"))
    assert text == (
        f"fdbroker: root 'far' ({place.far}) is on a file system of type fuse, whose files others answer for"
        " and may hold; say 'opens: helpers' of it, or choose a directory on a local disk or tmpfs\n"
    )
    assert place.asked() == 0


def test_a_local_root_behind_such_a_file_system_is_opened_by_who_may_wait(place: StartPlace) -> None:
    with contextlib.ExitStack() as stack:
        behind = place.directory / "behind"
        behind.mkdir()
        stack.enter_context(fuse_mounted(behind, {}))
        stack.enter_context(mounted("tmpfs", behind))
        (behind / "file").write_bytes(b"behind")
        compiled = place.compiled(behind, "loop")
        broker = stack.enter_context(running_broker(place.directory, compiled))
        speaker = stack.enter_context(Speaker.connect(broker.socket))
        assert speaker.open_one(bytes(behind / "file")).content == b"behind"


def test_policies_are_compiled_and_checked_without_asking(place: StartPlace) -> None:
    assert SystemLookups().directory(str(place.far)) is None
    assert SystemLookups().directory(str(place.far / "missing" / "below")) is None
    assert SystemLookups().directory(str(place.local / "missing")) is not None
    file = place.directory / "policy.yaml"
    for far in (place.far, place.far / "inner"):
        for opens in ("loop", "helpers"):
            file.write_text(place.yaml(far, opens))
            checked = check(str(file), dev=True)
            assert not checked.errors
            found = {finding.kind for finding in checked.findings}
            assert ("network-filesystem" in found) == (opens == "loop")
    assert place.asked() == 0


def test_a_mount_that_does_not_answer_is_read_only_by_its_own_options(
    place: StartPlace, in_child: Children
) -> None:
    root = [("far", str(place.far), True)]
    with pytest.raises(ReadOnlyViewError, match=r"root 'far' .* is not read-only \(ReadOnlyPaths=/\) in"):
        check_read_only_view(root)

    def child() -> None:
        enter_read_only_view()
        check_read_only_view(root)

    in_child(child)
    assert place.asked() == 0
