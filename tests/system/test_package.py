"""The Debian packages in a real systemd, from installation to purge; and twice the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.documentation.blocks import blocks
from tests.documentation.commands import commands, without_numbers
from tests.running_broker import reachable_directory
from tests.system.booted import HERE, REPOSITORY, run_booted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

SECOND = "0.1.0-2"
# The packages are there already.
PAGE = [
    command
    for block in blocks("docs/packages.md")
    for command in commands(block)
    if command.text != "make deb"
]


@pytest.fixture(scope="module")
def seen(packages: list[Path]) -> Iterator[dict[str, Any]]:
    with reachable_directory() as shared:
        for name in ("first", "second"):
            (shared / name).mkdir()
        for package in packages:
            (shared / "first" / package.name).write_bytes(package.read_bytes())
            _as_second(package, shared)
        (shared / "page").write_text(json.dumps([command.text for command in PAGE]))
        program = ["/usr/bin/python3", "-I", HERE / "package_inside.py", shared]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        run_booted(program, environment=environment, shared=(REPOSITORY, shared))
        yield json.loads((shared / "seen").read_text())


def _as_second(package: Path, shared: Path) -> None:
    """Make the package again, with a higher version."""
    tree = shared / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN" / "control"
    [version] = re.findall(r"^Version: (.*)$", control.read_text(), re.MULTILINE)
    control.write_text(control.read_text().replace(version, SECOND))
    command: list[str | Path] = [
        "dpkg-deb",
        "--root-owner-group",
        "-Znone",
        "--build",
        tree,
        shared / "second",
    ]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["rm", "-r", tree], check=True)


@pytest.mark.booting
def test_every_step_of_apt_and_dpkg_succeeds(seen: dict[str, Any]) -> None:
    for step in ("install", "upgrade", "reinstall", "reinstall_scand", "remove", "again", "purge"):
        status, output = seen[step]
        assert status == 0, (step, output)
        assert "returned 101" not in output, step


@pytest.mark.booting
def test_what_is_installed_listens_allows_nothing_and_has_its_pages(seen: dict[str, Any]) -> None:
    installed = seen["installed"]
    assert installed["sockets"] == [["active", "enabled"]] * 3
    assert installed["others"] == [["inactive"]] * 3
    assert installed["service"] == ["inactive", "disabled"]
    assert installed["scanning"] == [["inactive", "disabled"]] * 3
    assert installed["policy"] == (REPOSITORY / "config" / "policy.yaml").read_text()
    assert [status for status, _ in installed["checks"]] == [0, 0], installed["checks"]
    assert installed["compiled"] > 20
    assert [status for status, _ in installed["manual"]] == [0, 0, 0]
    assert seen["asked_first"] == "DeniedError"
    assert "nobody may read anything yet" in seen["install"][1]
    assert "nobody may read anything yet" not in seen["reinstall"][1] + seen["upgrade"][1]


@pytest.mark.booting
def test_the_page_about_packages_shows_what_its_commands_print_and_undoes_it(seen: dict[str, Any]) -> None:
    for command, (status, output) in zip(PAGE, seen["page"], strict=True):
        printed = [without_numbers(line) for line in output.splitlines()]
        for line in command.shown:
            assert without_numbers(line) in printed, (command.place, line, output)
        refused = "enied" in " ".join(command.shown) and "fdbroker audit" not in command.text
        assert (status != 0) == refused, (command.place, status, output)
    assert seen["as_before"]["policy"] == (REPOSITORY / "config" / "policy.yaml").read_text()
    assert seen["as_before"]["sockets"] == [["active"]] * 3


@pytest.mark.booting
def test_what_ci_of_a_distribution_runs_succeeds(seen: dict[str, Any]) -> None:
    for name, (status, output) in seen["tried"].items():
        assert status == 0, (name, output)


@pytest.mark.booting
def test_a_client_gets_its_file_when_the_policy_says_so(seen: dict[str, Any]) -> None:
    assert seen["restart"] == [0, ""]
    assert seen["asked_then"] == "content"


@pytest.mark.booting
def test_the_command_is_the_same_with_the_versions_of_the_distribution(seen: dict[str, Any]) -> None:
    assert seen["walk"] == [0, ""]
    assert seen["wrong_use"] == [2, 2, 2, 2]


@pytest.mark.booting
def test_an_upgrade_under_load_fails_no_call(seen: dict[str, Any]) -> None:
    upgraded = seen["upgraded"]
    (before, since), (after, still_since) = upgraded["before"], upgraded["after"]
    assert before[0] != after[0], "the broker is the new one"
    assert (before[1], after[1]) == ("active", "active")
    assert since == still_since, "the sockets stayed"
    assert upgraded["policy_is_ours"]
    for calls, errors, longest in seen["load"]:
        assert not errors
        assert calls > 100
        assert longest < 10
    assert seen["asked_after_upgrade"] == "content"


@pytest.mark.booting
def test_an_upgrade_with_a_broken_policy_leaves_the_broker_running(seen: dict[str, Any]) -> None:
    assert seen["broken"] == {"same": True, "asked": "content"}
    assert "the policy has errors, so the broker of before goes on" in seen["reinstall"][1]


@pytest.mark.booting
def test_an_upgrade_while_files_are_scanned_gives_no_wrong_verdict_and_ends_what_is_under_way_alone(
    seen: dict[str, Any],
) -> None:
    for way, (said, longest) in seen["scans"].items():
        counts = dict(said)
        assert counts.pop("marked: infected") > 10, (way, said)
        assert counts.pop("clean: clean") > 10, (way, said)
        # Nothing else than that there is no verdict, once for each of broker and service at most.
        assert not {name for name in counts if "clean: i" in name or "marked: c" in name}, (way, said)
        assert sum(counts.values()) <= 2, (way, said)
        assert longest < 20, way


@pytest.mark.booting
def test_the_scan_service_is_the_new_one_after_an_upgrade_with_its_engines(seen: dict[str, Any]) -> None:
    assert [status for status, _ in seen["scanning"]] == [0] * 3, seen["scanning"]
    scanner = seen["scanner"]
    assert scanner["another"]
    assert scanner["state"] == [["active", "enabled"]] * 3
    assert scanner["configuration_is_ours"]
    for scanned in (seen["scanned"], scanner["scanned"]):
        assert (
            "infected: Test-Marker.UNOFFICIAL (hashes: clean, libclamav: Test-Marker.UNOFFICIAL)" in scanned
        )


@pytest.mark.booting
def test_an_upgrade_with_a_broken_configuration_leaves_the_scan_service_running(seen: dict[str, Any]) -> None:
    assert seen["broken_scand"]["same"]
    assert "infected: Test-Marker.UNOFFICIAL" in seen["broken_scand"]["scanned"]
    assert "its configuration has errors, so the service of before goes on" in seen["reinstall_scand"][1]


@pytest.mark.booting
def test_removal_stops_all_and_keeps_what_is_the_administrators(seen: dict[str, Any]) -> None:
    removed = seen["removed"]
    assert removed["states"] == [["inactive"]] * 3
    assert removed["service"] == ["inactive"]
    assert removed["scanning"] == [["inactive"]] * 3
    assert removed["kept"] == [True, "{}\n", True]
    assert not removed["left"]
    assert not removed["programs"]


@pytest.mark.booting
def test_a_policy_that_was_removed_stays_so_when_the_package_comes_again(seen: dict[str, Any]) -> None:
    assert seen["comes_back"] is False


@pytest.mark.booting
def test_a_purge_leaves_nothing(seen: dict[str, Any]) -> None:
    before, after = set(seen["files_before"]), set(seen["files_after"])
    # But for what other tests of this machine, and other programs, make meanwhile.
    left = {name for name in after - before if "__pycache__" not in name or "fdbroker" in name}
    left = {name for name in left if "fdbroker-test-" not in name}
    assert not left


@pytest.mark.booting
def test_a_purge_keeps_what_is_of_others_and_users_who_can_not_log_in(seen: dict[str, Any]) -> None:
    assert seen["ours"] == [["file"], ["clean", "marked"], ["test.ndb"]]
    # No number of theirs is to be another one's while files, or a policy, may have it.
    users, groups = seen["users"]
    ours = {"fdbroker", "fdbroker-scand", "fdbroker-worker"}
    assert {name for name, *_ in users} - {"fdbroker-test-client"} == ours
    assert {shell for name, *_, shell in users if name in ours} == {"/usr/sbin/nologin"}
    assert {name for name, *_ in groups} >= ours | {"fdbroker-clients", "fdbroker-admin"}


def test_building_elsewhere_gives_the_same_bytes(packages: list[Path], tmp_path: Path) -> None:
    [sdist] = (REPOSITORY / "dist").glob("fdbroker-*.tar.gz")
    directory = tmp_path / "a-place-with-another-name"
    environment = os.environ | {
        "DEB_BUILD_OPTIONS": "nocheck",
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C",
        "USER": "somebody",
    }
    built = subprocess.run(
        ["sh", "-c", 'umask 077; exec "$@"', "sh", REPOSITORY / "scripts" / "deb", sdist, directory],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert built.returncode == 0, built.stderr
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob("*.deb")}
        for place in (packages[0].parent, directory)
    )
    assert len(first) == len(packages)
    assert first == second


def test_every_manual_page_and_completion_is_in_one_package(packages: list[Path]) -> None:
    subprocess.run(["make", "-s", "man"], cwd=REPOSITORY, check=True, capture_output=True)
    wanted = [f"{page.name}.gz" for page in (REPOSITORY / "build" / "man").rglob("*.[1-8]")]
    wanted += [file.name for file in (REPOSITORY / "packaging" / "completions").rglob("*fdbroker*")]
    listed = [
        line.rpartition("/")[2]
        for package in packages
        for line in subprocess.check_output(["dpkg-deb", "-c", package], encoding="utf-8").splitlines()
        if re.search(r"/share/(man|bash-completion|fish|zsh)/", line) and not line.endswith("/")
    ]
    assert len(wanted) > 20
    assert sorted(listed) == sorted(wanted)
