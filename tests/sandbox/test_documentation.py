"""docs/sandbox.md: its examples do what they say, and what it shows is what the commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fdbroker.sandbox import STRICT, Confinement, Layer, Profile
from tests.cli.commands import run

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "sandbox.md").read_text()


def example(name: str) -> str:
    [code] = re.findall(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    return str(code)


def run_example(name: str, directory: Path) -> str:
    """Run an example as a program, with the modules of the document beside it; return what it prints."""
    for module in ("words.py", "engine.py"):
        (directory / module).write_text(example(module))
    program = directory / "program.py"
    program.write_text(example(name))
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_of_a_function_counts(tmp_path: Path) -> None:
    data = Path("/etc/os-release").read_bytes()
    assert run_example("run", tmp_path) == f"{{'bytes': {len(data)}, 'count': {data.count(b'=')}}}\n"


def test_example_of_a_program_hashes(tmp_path: Path) -> None:
    output = run_example("spawn", tmp_path)
    assert re.fullmatch(r"[0-9a-f]{64}  -\n it ended with status 0\n", output)


def test_example_of_a_zygote_finds_what_is_suspicious(tmp_path: Path) -> None:
    assert run_example("zygote", tmp_path) == "suspicious\nit ended with status 0\n"


@pytest.mark.root
def test_report_is_as_shown() -> None:
    first, *shown = example("report").splitlines()
    result = run(*first.removeprefix("# fdbroker ").split())
    assert result.returncode == 0, result.stderr
    # What the interpreter has mapped differs.
    addresses = re.compile(r"\d+ MiB of addresses")
    assert [addresses.sub("", line) for line in result.stdout.splitlines()] == [
        addresses.sub("", line) for line in shown
    ]


def test_each_layer_and_each_profile_is_told_of() -> None:
    for layer in Layer:
        assert f"\n| {layer.value} | " in TEXT
    said = dict(re.findall(r"^\| `(sealed|scratch|program)` \| .* \| (.*) \|$", TEXT, re.MULTILINE))
    for profile in Profile:
        program = b"/bin/true" if profile is Profile.PROGRAM else None
        needed = Confinement(profile=profile, program=program).must_hold()
        named = said[profile.value].replace("those", ", ".join(f"`{layer.value}`" for layer in STRICT))
        assert {layer for layer in Layer if f"`{layer.value}`" in named} == needed


def test_uids_that_are_named_are_those_that_are_used() -> None:
    from fdbroker.sandbox.confinement import UNUSED_UIDS  # noqa: PLC0415

    assert f"it is {UNUSED_UIDS[0]} to {UNUSED_UIDS[-1]}," in TEXT
