"""The examples of docs/client.md run, and its table is complete."""

from __future__ import annotations

import errno
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fdbroker
from fdbroker import aio
from fdbroker.testing import FakeBroker

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_an_example_runs(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, bytes | fdbroker.Reason | OSError] = {
        "/srv/data/report.txt": b"one\ntwo\n",
        "/srv/data/secret.key": fdbroker.Reason.DENIED,
    }
    with FakeBroker(files) as fake, fake.connect() as client:
        monkeypatch.setattr(fdbroker, "connect", fake.connect, raising=False)
        monkeypatch.setattr(aio, "connect", lambda: aio.Client.from_socket(fake.connect_socket()))
        known = {"client": client, "errno": errno, "fdbroker": fdbroker}
        exec(compile(example, "docs/client.md", "exec"), known)  # noqa: S102


def test_the_service_of_the_example_answers() -> None:
    [example] = [example for example in EXAMPLES if "serve_for_ever" in example]
    known: dict[str, Any] = {}
    exec(compile(example, "docs/client.md", "exec"), known)  # noqa: S102
    with FakeBroker({"/a": b"12345"}) as fake, ThreadPoolExecutor(1) as pool:
        client = fake.connect()
        serving = pool.submit(known["serve_for_ever"], client)
        with fake.hand_over("clamd") as sock:
            sock.sendall(b"/a")
            assert sock.recv(100) == b"5 bytes\n"
        client.close()
        assert isinstance(serving.exception(5), ValueError)


def test_the_table_has_every_error_with_what_it_is_besides() -> None:
    listed = {}
    for names, others in re.findall(r"^\| (`\w+Error`[^|]*) \| ([^|]+) \|", TEXT, re.MULTILINE):
        names_of_row = re.findall(r"\w+Error", names)
        others_of_row = [one.strip() for one in others.split(",")]
        listed.update(dict(zip(names_of_row, others_of_row * len(names_of_row), strict=False)))
    public = {name for name in fdbroker.__all__ if name.endswith("Error") and name != "BrokerError"}
    assert listed.keys() == public
    for name, other in listed.items():
        kind = getattr(fdbroker, name)
        assert issubclass(kind, fdbroker.BrokerError)
        if other != "-":
            assert issubclass(kind, __builtins__[other])  # type: ignore[index] # a dict in imported modules
