"""docs/scan-protocol.md names what may be missing, and its example does what it says."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.wire.format import Incomplete
from tests.running_broker import reachable_directory
from tests.scan.descriptors import EICAR, EICAR_NAME
from tests.scan.running_scand import ANN, own, run_as_ann, scand_and_broker

if TYPE_CHECKING:
    from tests.for_other_users import ForOtherUsers

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "scan.py"


def test_everything_that_may_be_missing_is_documented() -> None:
    text = (DOCS / "scan-protocol.md").read_text()
    [table] = re.findall(r"^`complete` is false.*?\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    walks = {flag.name.lower() for flag in Incomplete if flag.name is not None}
    assert named == walks | {"broker_gone", "stopping", "malformed"}


def test_the_example_takes_what_is_refused_for_no_verdict(tmp_path: Path) -> None:
    path = str(tmp_path / "scan")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with subprocess.Popen(
            [sys.executable, "-I", EXAMPLE, "/somewhere"],
            env={"FDBROKER_SCAN_SOCKET": path},
            stderr=subprocess.PIPE,
            text=True,
        ) as example:
            client, _ = listener.accept()
            with client:
                for answer in ({"type": "welcome"}, {"type": "refused", "id": 1, "message": "not now"}):
                    assert client.recv(4096)
                    client.send(json.dumps(answer).encode())
                _, errors = example.communicate(timeout=60)
    assert (example.returncode, errors) == (2, "not now\n")


@pytest.mark.root
def test_the_example_scans_a_tree_by_the_service(others: ForOtherUsers) -> None:
    with reachable_directory() as directory:
        home = directory / "tree" / "ann"
        home.mkdir(parents=True)
        own(home, ANN, 0o700)
        _try_the_example(others, directory, home)


def _try_the_example(others: ForOtherUsers, directory: Path, home: Path) -> None:
    with scand_and_broker(others, directory) as (scand, _):
        for name, contents, status, said in (
            ("clean", b"fine", 0, ""),
            ("bad", EICAR, 1, f"'{home}/bad' {EICAR_NAME}\n"),
        ):
            (home / name).write_bytes(contents)
            own(home / name, ANN)
            done = run_as_ann(
                [others.python, "-I", "-c", EXAMPLE.read_text(), str(home)],
                {"FDBROKER_SCAN_SOCKET": scand.socket},
            )
            assert (done.stdout, done.stderr, done.returncode) == (said, "", status)
