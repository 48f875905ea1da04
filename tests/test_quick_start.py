"""docs/quick-start.md: its commands, as written, do what it says, on a file system that is thrown away."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.documentation.blocks import blocks
from tests.documentation.commands import Command, commands, without_numbers
from tests.documentation.stage import run_in_one_shell
from tests.wheels import make_wheels

VERSION = "import sys; print(sys.implementation.cache_tag)"
# What the commands write to, in memory. The rest of the machine is as it is.
STAGE = """\
set -eu
mount -t tmpfs -o mode=755 stage /run
for place in /etc /opt /srv /usr/local/bin /var/log; do
    mkdir -p "/run/.stage$place"
    [ "$place" != /etc ] || cp -a /etc/. /run/.stage/etc
    mount --bind "/run/.stage$place" "$place"
done
mkdir /run/home
set +eu
umask 077  # the page sets its own
"""
# What is left after the last command: files, users and processes, but for the copies that useradd keeps.
LEFT = (
    "find /opt /srv /usr/local/bin /var/log /etc/fdbroker /run/fdbroker -mindepth 1;"
    " grep -E 'fdbroker|scanner' /etc/passwd /etc/group /proc/[0-9]*/comm; test $? = 1"
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run `sudo make test`")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Command, int, list[str]]]:
    """Run all commands in one shell, in namespaces of its own; return each with its status and output."""
    version = [sys.executable, "/usr/bin/python3"]
    if len({subprocess.check_output([each, "-c", VERSION]) for each in version}) != 1:
        pytest.skip("wheels of this interpreter are of no use to /usr/bin/python3")
    wheels = tmp_path_factory.mktemp("wheels")
    make_wheels(wheels)
    shown = [step for block in blocks("docs/quick-start.md") for step in commands(block)]
    steps = [*shown, Command("", "# ", LEFT, [])]
    # What stands for the network is told to pip by its environment; the command is as written.
    environment = {
        "HOME": "/run/home",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_INDEX": "1",
    }
    ran = run_in_one_shell(STAGE, [step.text for step in steps], environment)
    return [(step, status, output) for step, (status, output) in zip(steps, ran, strict=True)]


def test_each_command_of_the_quick_start_succeeds_unless_it_is_shown_to_be_denied_something(
    outputs: list[tuple[Command, int, list[str]]],
) -> None:
    for step, status, output in outputs:
        denied = any("enied" in line or "incomplete" in line for line in step.shown)
        assert (status != 0) == denied, (step.place, status, output)


def test_quick_start_shows_what_its_commands_print(outputs: list[tuple[Command, int, list[str]]]) -> None:
    compared = 0
    for step, _, output in outputs:
        printed = iter([without_numbers(line) for line in output])
        for line in step.shown:
            assert without_numbers(line) in printed, (step.place, line, output)
            compared += 1
    assert compared > 15


def test_last_step_of_the_quick_start_leaves_nothing(outputs: list[tuple[Command, int, list[str]]]) -> None:
    step, status, output = outputs[-1]
    assert step.text == LEFT
    assert status == 0
    assert not [line for line in output if "No such file" not in line]
