from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from fdbroker.sandbox import Layer, Profile
from tests.cli.commands import run, run_as
from tests.running_broker import CLIENT_UID

if TYPE_CHECKING:
    from tests.for_other_users import ForOtherUsers


def states(output: str) -> dict[str, str]:
    return {layer["name"]: layer["state"] for layer in json.loads(output)["layers"]}


@pytest.mark.root
@pytest.mark.parametrize("profile", [profile.value for profile in Profile])
def test_report_has_each_layer_and_says_that_workers_start(profile: str) -> None:
    result = run("sandbox", "report", "--profile", profile, "--json")
    assert result.returncode == 0, result.stderr
    assert states(result.stdout) == {layer.value: "ok" for layer in Layer}
    assert json.loads(result.stdout)["profile"] == profile


@pytest.mark.root
@pytest.mark.parametrize(("profile", "state", "status"), [("sealed", "weaker", 0), ("scratch", "missing", 1)])
def test_gap_has_its_reason_its_meaning_and_what_to_do(profile: str, state: str, status: int) -> None:
    result = run("sandbox", "report", "--profile", profile, "--landlock-abi", "0")
    assert result.returncode == status
    lines = result.stdout.splitlines()
    [index] = [number for number, line in enumerate(lines) if line.split()[1:2] == ["landlock"]]
    assert lines[index].startswith(f"{state} ")
    assert lines[index].endswith("this kernel has no Landlock, or it is not enabled at boot")
    assert "it means: nothing can be opened" in lines[index + 1]
    assert "CONFIG_SECURITY_LANDLOCK" in lines[index + 2]
    assert lines[-1] == f"Workers of the profile {profile} {'start' if status == 0 else 'do not start'} here."


@pytest.mark.root
@pytest.mark.parametrize("abi", [1, 5, 6])
def test_older_landlock_is_told_with_what_it_lacks(abi: int) -> None:
    result = run("sandbox", "report", "--profile", "scratch", "--landlock-abi", str(abi), "--json")
    assert result.returncode == 0
    [found] = [layer for layer in json.loads(result.stdout)["layers"] if layer["name"] == "landlock"]
    assert found["state"] == "ok"
    assert found["found"].startswith(f"ABI {abi}, one rule")
    assert ("not of this kernel" in found["found"]) == (abi < 6)


@pytest.mark.root
def test_unprivileged_user_keeps_the_uid_and_has_the_rest(others: ForOtherUsers) -> None:
    result = run_as(CLIENT_UID, others, "sandbox", "report", "--profile", "scratch", "--json")
    assert result.returncode == 0, result.stderr
    assert {name for name, state in states(result.stdout).items() if state != "ok"} == {"ids"}
    result = run_as(CLIENT_UID, others, "sandbox", "report", "-v")
    assert "weaker   ids " in result.stdout
    assert f"unchanged: uid {CLIENT_UID}, as who started it" in result.stdout
    assert result.stdout.count("it means:") == len(Layer)
