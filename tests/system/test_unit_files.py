"""The files of systemd/, as far as they can be checked without a systemd that runs."""

from __future__ import annotations

import shutil
import subprocess
from configparser import RawConfigParser
from typing import TYPE_CHECKING

import pytest

from tests.system.booted import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

SYSTEMD = REPOSITORY / "systemd"
# What `systemd-analyze security` may find, in tenths.
EXPOSED = {"fdbroker.service": 12, "fdbroker-scand.service": 12, "examples/fdbroker-worker@.service": 3}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd: apt-get install systemd")
@pytest.mark.parametrize("unit", EXPOSED)
def test_a_unit_leaves_little_exposed(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSED[unit]}", SYSTEMD / unit],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert not done.stderr, "unknown keys are told there alone"


@pytest.mark.parametrize("unit", sorted(EXPOSED))
def test_no_unit_locks_what_newer_systemds_change_after_the_user(unit: str) -> None:
    # systemd 257 clears keep-caps itself, and fails with status 217 where that is locked.
    text = (SYSTEMD / unit).read_text()
    assert "keep-caps" not in text


def test_each_service_and_socket_has_its_exposure_and_its_preset() -> None:
    units = {path.name for path in SYSTEMD.iterdir() if path.suffix in {".service", ".socket"}}
    preset = (SYSTEMD / "system-preset/50-fdbroker.preset").read_text().splitlines()
    assert {line.split()[1] for line in preset if line and not line.startswith("#")} == units
    assert {unit for unit in units if unit.endswith(".service")} <= EXPOSED.keys()


@pytest.mark.parametrize("path", sorted(SYSTEMD.glob("fdbroker-*.socket")), ids=lambda path: path.name)
def test_a_socket_of_the_broker_is_known_by_its_name_and_comes_with_the_service(path: Path) -> None:
    unit = RawConfigParser(strict=False)  # keys in lower case
    unit.read(path)
    service = unit["Socket"]["Service"]
    name = path.stem.removeprefix("fdbroker-")
    assert unit["Socket"]["FileDescriptorName"] == name
    if service == "fdbroker.service":
        assert unit["Install"]["WantedBy"] == "sockets.target fdbroker.service"
        text = (SYSTEMD / service).read_text()
        assert path.name in text, "the service comes after all its sockets"


@pytest.mark.skipif(not shutil.which("apparmor_parser"), reason="needs apparmor: apt-get install apparmor")
def test_the_apparmor_profile_is_one_and_is_that_of_the_unit() -> None:
    profile = REPOSITORY / "packaging" / "apparmor" / "fdbroker"
    parse = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--names", str(profile)]
    done = subprocess.run(parse, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (0, "fdbroker\n"), done
    assert "\nAppArmorProfile=-fdbroker\n" in (SYSTEMD / "fdbroker.service").read_text()
