"""The service directories for s6 and runit: start, readiness, kill -9, logs, stop, a broken policy."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLAY = Path(__file__).with_name("supervised.py")
PROGRAMS = {"s6": "s6-svscan", "runit": "runsvdir"}

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run `sudo make test`"),
]


def packages() -> str:
    specs = [importlib.util.find_spec(name) for name in ("fdbroker", "click", "yaml")]
    return ":".join(str(Path(spec.origin).parent) for spec in specs if spec is not None and spec.origin)


@pytest.mark.parametrize("supervisor", PROGRAMS)
def test_both_programs_are_started_kept_alive_logged_and_stopped(supervisor: str) -> None:
    if shutil.which(PROGRAMS[supervisor]) is None:
        pytest.skip(f"there is no {PROGRAMS[supervisor]}")
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*namespaces, sys.executable, "-P", PLAY, supervisor, packages()],
        stdout=subprocess.PIPE,
        check=True,
        umask=0o022,
    )
    results = json.loads(done.stdout)
    assert "error" not in results, results
    for moment in ("first", "after"):
        assert results[moment]["reads"] == [0, "content\n"], moment
        status, said = results[moment]["scans"]
        assert (status, "in workers of fdbroker-scand" in said) == (0, True), said

    # One broker was killed, and the logger of the next one: no record is missing, and the longest is whole.
    status, said = results["verified"]
    verified = json.loads(said)
    assert (status, verified["findings"], verified["runs"]) == (0, [], 2), said
    records = results["records"]
    assert max(len(record.get("path_hex", "")) for record in records) > 8000
    assert records[-1]["event"] == "stopped"
    assert results["stopped"][0] == 2
    assert "version 2 of the policy format is not known" in results["messages"]
    assert not [line for line in results["messages"].splitlines() if '"run":' in line]
    assert "listener scan: serving" in results["scand says"]
    assert results["modes"] == ["0o750", "0o750"]
