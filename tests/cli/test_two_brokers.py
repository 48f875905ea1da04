"""Two brokers on one machine: what is said of the one is never said of the other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from fdbroker.cli import broker as broker_module
from fdbroker.cli import checks
from fdbroker.cli.checks import BROKEN, OK, WEAKER, Places
from tests.cli.commands import environment, run_here
from tests.running_broker import policy, reachable_directory, running_broker, with_control

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def usual() -> Iterator[RunningBroker]:
    """Give the broker whose control socket is in the usual place."""
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        with running_broker(directory, policy(directory / "tree"), with_control(directory)) as running:
            yield running


@pytest.fixture(scope="module")
def second() -> Iterator[RunningBroker]:
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        with running_broker(directory, policy(directory / "tree"), with_control(directory)) as running:
            yield running


@pytest.fixture(autouse=True)
def usual_place(monkeypatch: pytest.MonkeyPatch, usual: RunningBroker) -> None:
    monkeypatch.setattr(broker_module, "DEFAULT_CONTROL", str(usual.control))


def run_of(broker: RunningBroker) -> str:
    run: str = broker.records()[0]["run"]
    return run


@pytest.mark.parametrize("before_the_command", [True, False])
def test_status_of_another_socket_is_that_broker_s_and_says_who_tells_more(
    usual: RunningBroker,
    second: RunningBroker,
    before_the_command: bool,  # noqa: FBT001 - a parameter
) -> None:
    option = ("--socket", str(second.socket))
    arguments = (*option, "status", "--json") if before_the_command else ("status", "--json", *option)
    result = run_here(*arguments)
    assert result.returncode == 0
    assert json.loads(result.stdout)["audit"] == run_of(second) != run_of(usual)
    assert result.stderr == (
        f"fdbroker: only {second.socket} was asked: --control PATH names the control socket of the same"
        " broker, which tells more.\n"
    )


def test_control_socket_of_the_environment_is_not_that_of_a_socket_that_is_named(
    usual: RunningBroker, second: RunningBroker
) -> None:
    outside = environment(FDBROKER_CONTROL=str(usual.control))
    result = run_here("status", "--json", "--socket", str(second.socket), env=outside)
    assert json.loads(result.stdout)["audit"] == run_of(second)
    both = environment(FDBROKER_SOCKET=str(second.socket), FDBROKER_CONTROL=str(second.control))
    assert json.loads(run_here("status", "--json", env=both).stdout)["pid"] == second.pid


@pytest.mark.parametrize("before_the_command", [True, False])
def test_control_socket_that_is_named_is_asked(
    second: RunningBroker,
    before_the_command: bool,  # noqa: FBT001 - a parameter
) -> None:
    option = ("--control", str(second.control))
    arguments = (*option, "status", "--json") if before_the_command else ("status", "--json", *option)
    result = run_here("--socket", str(second.socket), *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["pid"] == second.pid


def test_without_any_option_the_usual_control_socket_is_asked(usual: RunningBroker) -> None:
    assert json.loads(run_here("status", "--json").stdout)["pid"] == usual.pid


@pytest.mark.parametrize("arguments", [("reload", "--dev", "--policy", "{}"), ("policy", "explain", "/x")])
def test_command_for_the_control_socket_never_takes_another_broker_s(
    second: RunningBroker, usual: RunningBroker, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdbroker.cli.policy.DEFAULT_POLICY", "/no/such/policy.yaml")
    file = usual.socket.with_name("policy.yaml")
    file.write_text(f"version: 1\nroots: {{tree: {{path: {file.parent}/tree}}}}\nrules: []\n")
    before = len(usual.records())
    result = run_here("--socket", str(second.socket), *(each.format(file) for each in arguments))
    assert (result.returncode, result.stdout) == (2, "")
    assert "name its control socket as well: --control PATH" in result.stderr
    assert len(usual.records()) == before


def test_doctor_of_another_socket_tells_nothing_of_the_usual_broker(second: RunningBroker) -> None:
    result = run_here("doctor", "--json", "--socket", str(second.socket), "--policy", "/no/such/policy")
    shown = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert run_of(second) in shown["its audit"]["found"]
    assert shown["control socket"]["state"] == WEAKER
    assert shown["control socket"]["found"] == "not asked: nothing says where this broker has it"
    assert "--control PATH" in shown["control socket"]["cure"]


def test_doctor_does_not_take_two_brokers_for_one(usual: RunningBroker, second: RunningBroker) -> None:
    places = Places(str(second.socket), str(usual.control), "/no/such/policy")
    shown = {check.name: check for check in checks.all_checks(places)}
    assert shown["control socket"].state == BROKEN
    assert shown["control socket"].found == f"{usual.control} is another broker's than {second.socket}"
    same = checks.all_checks(places._replace(control=str(second.control)))
    assert {check.name: check.state for check in same}["control socket"] == OK
