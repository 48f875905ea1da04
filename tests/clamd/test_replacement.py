"""The scan service in the place of a clamd that runs as root: what its clients see, side by side."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.clamd.scenarios import LIMIT, SCENARIOS, fill, rows
from tests.running_broker import reachable_directory
from tests.scan.clamav import BAD, make_database, running_clamd
from tests.scan.running_scand import ANN, own, scand_and_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers
    from tests.scan.running_scand import RunningScand

pytestmark = pytest.mark.root

MIGRATION = Path("docs/from-clamd.md")
_CONFIGURATION = """
engines: {{libclamav: {{database: {database}, max_file_size: {limit}}}}}
listeners: {{scan: {{protocol: scan}}, clamd: {{protocol: clamd, max_stream: {limit}}}}}
workers: 1
spare_workers: 1
"""


@contextlib.contextmanager
def both(others: ForOtherUsers, directory: Path) -> Iterator[tuple[Path, Path, Path, RunningScand]]:
    """Run clamd as root, and a service that has for each user what is the user's: sockets, tree, service."""
    tree = directory / "tree"
    tree.mkdir()
    fill(tree)
    database = make_database(directory / "database")
    for path in (database, *database.iterdir()):
        path.chmod(0o755)
    place = directory / "clamd-of-root"
    place.mkdir()
    configuration = _CONFIGURATION.format(database=database, limit=LIMIT)
    with (
        running_clamd(place, database, f"MaxFileSize {LIMIT}", f"StreamMaxLength {LIMIT}") as clamd,
        scand_and_broker(others, directory, configuration) as (scand, _),
    ):
        yield clamd, scand.clamd, tree, scand


@pytest.fixture(scope="module")
def running(others: ForOtherUsers) -> Iterator[tuple[Path, Path, Path]]:
    with reachable_directory() as directory, both(others, directory) as (clamd, ours, tree, _):
        yield clamd, ours, tree


@pytest.fixture(scope="module")
def table(running: tuple[Path, Path, Path]) -> list[str]:
    return rows(*running)


def test_what_clients_see_is_the_same_or_better_for_a_reason(table: list[str]) -> None:
    for scenario, row in zip(SCENARIOS, table, strict=True):
        assert ("| the same | |" in row) is (not scenario.why), row


def test_the_documentation_has_the_table_of_what_clients_see(table: list[str]) -> None:
    text = MIGRATION.read_text()
    written = text[text.index("| client | asks |") :].split("\n\n")[0].splitlines()[2:]
    assert written == table


def test_clients_need_one_line_changed(running: tuple[Path, Path, Path]) -> None:
    """The example of the documentation, with its very commands and what they say."""
    clamd, ours, tree = running
    mail = tree / "ann" / "mail"
    (mail / "sent").mkdir(parents=True)
    for name, content in (("invoice", BAD), ("sent/letter", b"fine")):
        (mail / name).write_bytes(content)
    for name in (".", "sent", "invoice", "sent/letter"):
        own(mail / name, ANN, 0o755)
    conf = tree.parent / "clamd.conf"
    conf.write_text(f"LocalSocket {clamd}\nMaxFileSize 25M\n")
    [example] = re.findall(r"^```\n(\$ sed .*?)^```$", MIGRATION.read_text(), re.MULTILINE | re.DOTALL)
    places = {"/etc/clamav/clamd.conf": conf, "/run/fdbroker/clamd": ours, "/srv/mail": mail}
    said = ""
    for command in re.findall(r"^\$ (.*)$", example, re.MULTILINE):
        text = command.replace("clamdscan", f"clamdscan --config-file={conf}")
        for place, path in places.items():
            text = text.replace(place, str(path))
        conf.chmod(0o644)
        uid = 0 if command.startswith("sed") else ANN
        done = subprocess.run(
            ["sh", "-c", text], capture_output=True, text=True, check=False, cwd="/", user=uid, group=uid
        )
        said += f"$ {command}\n{done.stdout}{done.stderr}".replace(str(mail), "/srv/mail")
    assert said == example
