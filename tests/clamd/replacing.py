"""A scan service in clamd's place: whoever connects may have everything of one tree scanned."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tests.running_broker import running_broker
from tests.scan.running_scand import SCAND_UID, RunningScand, running_scand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

_POLICY = """
version: 1
roots:
  tree: {{path: {tree}}}
rules:
  - name: everything
    allow: [open, walk]
    client: {{user: {scand}}}
    on_behalf_of: any
    in: tree
    paths: ["**"]
limits: {{connections_per_uid: 256}}
listeners:
  seqpacket: {{path: {directory}/broker.seqpacket, group: {scand}}}
  control: {{path: {directory}/control}}
  clamd: {{path: {directory}/clamd, service: {{user: {scand}}}}}
"""
_CONFIGURATION = """
engines: {{libclamav: {{database: {database}}}}}
listeners:
  clamd: {{protocol: clamd{listener}}}
workers: {workers}
spare_workers: 1
"""


@contextlib.contextmanager
def instead_of_clamd(
    others: ForOtherUsers,
    directory: Path,
    tree: Path,
    database: Path,
    *,
    listener: str = "",
    more: str = "",
    workers: int = 1,
    broker_may_end: bool = False,
) -> Iterator[RunningScand]:
    """Run a broker and a service with libclamav in `directory`; `listener`, `more`: of its configuration."""
    for path in (database, *database.iterdir()):
        os.chmod(path, 0o755)
    policy = _POLICY.format(tree=tree, scand=SCAND_UID, directory=directory)
    configuration = _CONFIGURATION.format(database=database, listener=listener, workers=workers) + more
    with (
        running_broker(
            directory, policy, f"--socket-group={SCAND_UID}", own_socket=False, stop=not broker_may_end
        ),
        running_scand(others, directory, configuration) as scand,
    ):
        scand.wait_for("clamd: serving")
        yield scand
