"""What explaining says and what a broker does are never different, whatever the policy and the file."""

from __future__ import annotations

import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from fdbroker.config.explain import ALLOW, Asker, answer_by_name, explain, look_as_broker
from fdbroker.policy.rules import ClientFacts, read_policy
from tests.broker.stepping import SteppedBroker
from tests.policy.decision_cases import GID, OTHER, ROOTS, UID, documents
from tests.running_broker import policy

if TYPE_CHECKING:
    from pathlib import Path

    from tests.broker.speaking import Speaker


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Give a tree for drawn policies: files of several owners, sizes and modes, links, a FIFO."""
    for directory in ("a/b/c", "a/a", "ax", "b"):
        (tmp_path / directory).mkdir(parents=True)
    owners = [(os.getuid(), os.getgid()), (OTHER, GID), (UID, 0)]
    for number, name in enumerate(("a/c", "a/b/a", "a/b/.b", "a/b/c/a", "a/b/c/b", "ax/b", "ax/a")):
        path = tmp_path / name
        path.write_bytes(b"x" * (number % 4))
        # No age that a rule draws is reached between two looks: an hour, or none for what is of the future.
        moment = time.time() + (86400 if number % 2 else -3600)
        os.utime(path, (moment, moment))
        path.chmod(0o666 if number % 2 else 0o640)
        if os.getuid() == 0:
            os.chown(path, *owners[number % 3])
    os.link(tmp_path / "a" / "c", tmp_path / "ax" / "c")
    (tmp_path / "a" / ".b").symlink_to("b")
    os.mkfifo(tmp_path / "a" / "ax")
    return tmp_path


def moved(document: dict[str, Any], top: Path) -> dict[str, Any]:
    """Return a drawn policy with its roots below a directory, and this process as its user 1000."""
    ids = {UID: os.getuid(), GID: os.getgid()}

    def ours(value: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(value, dict) and "labels" in value:
            return {"uids": [54399]}  # nobody: a kernel without labels takes no such policy
        if isinstance(value, dict):
            return {
                key: [ids.get(number, number) for number in part] if key in {"uids", "gids"} else ours(part)
                for key, part in value.items()
            }
        return [ours(part) for part in value] if isinstance(value, list) else value

    roots = [root | {"path": f"{top}{root['path']}".rstrip("/")} for root in document["roots"]]
    changed: dict[str, Any] = ours(document) | {"roots": roots, "read_only_view": "off"}
    return changed


def done(broker: SteppedBroker, speaker: Speaker, action: str, path: bytes) -> tuple[str, str, str | None]:
    """Ask the broker for it and return what is on record: decision, reason, rule."""
    assert broker.audit_file is not None
    os.truncate(broker.audit_file, 0)
    if action == "open":
        speaker.open(path)
    elif action == "stat":
        speaker.stat(path)
    else:
        speaker.page(path)
    [record] = [
        json.loads(line) for line in broker.audit_file.read_bytes().splitlines() if b'"decision"' in line
    ]
    return record["decision"], record["reason"], record["rule"]


@pytest.mark.unmeasured
@pytest.mark.usefixtures("same_cases")
def test_explanation_is_what_the_broker_does(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By name and by object: what is answered, why, and by which rule; and what it explains itself."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    roots = [
        {"name": name, "path": f"{tree}{path}".rstrip("/"), "cross_mounts": False, "opens": "loop"}
        for name, path in ROOTS.items()
    ]
    paths = [bytes(tree)]
    for directory, directories, files in os.walk(bytes(tree)):
        paths += [os.path.join(directory, name) for name in (*directories, *files, b"absent")]
    paths += [b"/etc/passwd", bytes(tree / "a" / ".b" / "a")]
    asker = Asker(ClientFacts(os.getuid(), frozenset({os.getgid(), *os.getgroups()})))
    reached: set[tuple[str, str]] = set()
    everything = policy(tree, roots=roots, rules=[], read_only_view="off")
    with SteppedBroker(tree, everything, audit=elsewhere / "audit", cgroup_root="/sys/fs/cgroup") as broker:
        speaker = broker.join()
        asking = broker.call(broker.listen(elsewhere, control=True))

        # A failure names policy, path and action; to shrink it would take minutes.
        @settings(
            max_examples=24,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(documents)
        def check(document: dict[str, Any]) -> None:
            here = moved(document, tree)
            rules = read_policy(here)
            broker.switch(here)
            for path in paths:
                for action in ("open", "stat", "list"):
                    decision, reason, rule = explain(rules, asker, action, path, look_as_broker).verdict
                    assert done(broker, speaker, action, path) == (decision, reason, rule), (action, path)
                    reached.add((decision, reason))
                    said = asking.explain(action, path)
                    by_file = answer_by_name(rules, asker, action, path)
                    assert {key: said[key] for key in by_file} == by_file

        # Where each run has the same cases, they are not others after each change of the lines above.
        (seed(3)(check) if settings().derandomize else check)()
    assert {(ALLOW, "ok"), *(("deny", reason) for reason in ("deny_rule", "no_rule", "not_found"))} <= reached
    assert len([reason for _, reason in reached if reason.startswith("where_")]) > 1
    assert stat.S_ISFIFO(os.lstat(tree / "a" / "ax").st_mode)
