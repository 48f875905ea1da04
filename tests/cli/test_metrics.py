"""`fdbroker status` in all its forms: what it says is what happened, and what docs/metrics.md describes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from fdbroker.cli.main import missing_extra
from fdbroker.cli.openmetrics import classic_text, openmetrics_text, write_textfile
from fdbroker.client import control
from tests.broker.speaking import Speaker
from tests.cli.commands import run_as, run_here
from tests.cli.status_schema import CONNECTIONS, OWN, WHOLE, schema_of
from tests.running_broker import CLIENT_UID, OTHER_UID, policy, reachable_directory, rule, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from tests.for_other_users import ForOtherUsers

root = pytest.mark.root
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()


class Served(NamedTuple):
    """A broker that has served some."""

    directory: Path
    control: str

    def status(self, *options: str) -> str:
        """Return what the command writes."""
        result = run_here("status", *options, "--control", self.control)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with reachable_directory() as directory:
        tree = directory / "tree"
        tree.mkdir()
        (tree / "file").write_bytes(b"x")
        rules = rule("the files"), rule("keys", effect="deny", paths=["*.key"])
        compiled = policy(tree, *rules, admins={"uids": [OTHER_UID], "gids": []})
        path = str(directory / "control")
        with running_broker(directory, compiled, f"--control={path}") as broker:
            with Speaker.connect(broker.socket) as speaker:
                for _ in range(3):
                    speaker.open(*[bytes(tree / "file")] * 2, bytes(tree / "a.key"))
                speaker.stat(bytes(tree / "missing"))
            yield Served(directory, path)


DECISIONS = {
    ("open", "allow", "the files", "ok"): 6,
    ("open", "deny", "keys", "deny_rule"): 3,
    ("stat", "deny", "the files", "not_found"): 1,
}


@root
def test_json_has_all_that_the_document_describes_and_nothing_else(served: Served) -> None:
    document = json.loads(served.status("--json"))
    jsonschema.validate(document, schema_of(WHOLE))
    section = DOCUMENT[DOCUMENT.index("\n## The whole status") : DOCUMENT.index("\n## Metrics")]
    keys = {key for names in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in keys_in(names)}
    assert keys - {"limits_hit"} == document.keys() - {"limits_hit"}
    for key, schema in WHOLE.items():
        [told] = re.findall(rf"^\| .*?`{key}`.*? \| .*? \|(.*)\|$", section, re.MULTILINE)
        for member in schema.get("properties", schema.get("items", {}).get("properties", ())):
            assert f"`{member}`" in told, f"{member} of {key}"


def keys_in(names: str) -> list[str]:
    return re.findall(r"`(\w+)`", names)


@root
def test_json_says_what_happened(served: Served) -> None:
    document = json.loads(served.status("--json"))
    found = {(row["action"], row["rule"], row["reason"]): row["count"] for row in document["decisions"]}
    assert found == {(action, rule, reason): n for (action, _, rule, reason), n in DECISIONS.items()}
    assert (document["totals"]["allowed"], document["totals"]["denied"]) == (6, 4)
    assert document["events"]["started"] == 1
    [client] = [row for row in document["clients"] if row["uid"] == 0]
    assert (client["allowed"], client["denied"]) == (6, 4)


@root
def test_connections_are_as_their_schema_says(served: Served) -> None:
    with control.connect(served.control) as connection:
        rows = connection.rows("connections")
    jsonschema.validate(rows, CONNECTIONS)
    assert [row["pid"] for row in rows] == [os.getpid()]


@root
def test_people_get_durations_in_words_and_decisions_by_rule(served: Served) -> None:
    text = served.status()
    assert re.search(r"transport seqpacket, type open, requests 3, mean .* [um]s, 50 % within .* [um]s", text)
    assert "  action open, rule the files, reason ok, count 6\n" in text
    assert "by bits" not in text


@root
def test_others_hear_of_themselves_and_get_no_metrics(served: Served, others: ForOtherUsers) -> None:
    options = ("--control", served.control)
    told = run_as(CLIENT_UID, others, "status", "--json", *options)
    jsonschema.validate(json.loads(told.stdout), schema_of(OWN))
    for form in (("--openmetrics",), ("--textfile", "/tmp/fdbroker-never.prom")):
        refused = run_as(CLIENT_UID, others, "status", *form, *options)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "metrics are for root and those whom the policy names as admins" in refused.stderr
    assert not Path("/tmp/fdbroker-never.prom").exists()


@root
def test_admins_get_metrics(served: Served, others: ForOtherUsers) -> None:
    told = run_as(OTHER_UID, others, "status", "--openmetrics", "--control", served.control)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.endswith("# EOF\n")


def families(text: str) -> dict[str, Metric]:
    parsed: Iterator[Metric] = parse_openmetrics(text)  # type: ignore[no-untyped-call]
    return {family.name: family for family in parsed}


def samples(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


@root
def test_openmetrics_says_what_happened(served: Served) -> None:
    found = families(served.status("--openmetrics"))
    decisions = {
        tuple(sample.labels[name] for name in ("action", "outcome", "rule", "reason")): sample.value
        for sample in found["fdbroker_decisions"].samples
    }
    assert decisions == DECISIONS
    assert samples(found["fdbroker_up"]) == {(): 1}
    of_root = {key: n for key, n in samples(found["fdbroker_client_paths"]).items() if key[1] == "0"}
    assert of_root == {("allow", "0"): 6, ("deny", "0"): 4}
    durations = found["fdbroker_request_duration_seconds"]
    assert (durations.type, durations.unit) == ("histogram", "seconds")
    of_open = [sample for sample in durations.samples if sample.labels["type"] == "open"]
    within = [sample.value for sample in of_open if sample.name.endswith("_bucket")]
    bounds = [float(sample.labels["le"]) for sample in of_open if sample.name.endswith("_bucket")]
    assert (bounds[0], bounds[-2:]) == (4.096e-06, [17.179869184, float("inf")])
    assert within == sorted(within)
    assert within[-1] == 3
    [took] = [sample.value for sample in of_open if sample.name.endswith("_sum")]
    assert 0 < took < 3


@root
def test_the_documents_table_has_each_metric_with_its_type_and_labels(served: Served) -> None:
    section = DOCUMENT[DOCUMENT.index("\n## Metrics") : DOCUMENT.index("\n## node_exporter")]
    told = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\|", section, re.MULTILINE)
    }
    status = json.loads(served.status("--json"))
    status["limits_hit"] = [{"limit": "connections", "rule": None, "count": 1}]
    found = {}
    for family in families(openmetrics_text(status)).values():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        found[family.name + suffix] = (family.type, labels)
    assert {name: (kind, set(labels)) for name, (kind, labels) in told.items()} == found


def test_what_the_alerts_of_the_document_ask_for_exists() -> None:
    section = DOCUMENT[DOCUMENT.index("\n## Alerts") :]
    table = DOCUMENT[: DOCUMENT.index("\n## node_exporter")]
    for name in set(re.findall(r"\bfdbroker_\w+", section)):
        assert f"`{name.removesuffix('_bucket')}`" in table


A_STATUS: dict[str, Any] = {
    "version": "1",
    "started": "2026-01-31T12:00:00.000000Z",
    "loaded": "2026-01-31T12:00:00.000000Z",
    "identity_level": 2,
    "generation": 3,
    "rules": 4,
    "audit_sequence": 5,
    "audit_failures": 6,
    "events": {},
    "helpers_stuck": 0,
    "totals": dict.fromkeys(
        ("connections", "accepted", "refused_connections", "descriptors_sent", "in_flight", "bytes_copied"), 1
    ),
    "connections_most": 10,
    "requests": [],
    "unsent_replies": 0,
    "walks": 0,
    "clients_served": 0,
    "decisions": [],
    "clients": [],
}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=5))
def test_any_name_of_a_rule_survives_in_a_label(names: list[str]) -> None:
    rows = [{"action": "open", "rule": name, "reason": "ok", "count": n} for n, name in enumerate(names)]
    status = A_STATUS | {"decisions": rows}
    for text, parse in (
        (openmetrics_text(status), parse_openmetrics),
        (classic_text(status).decode(), parse_classic),
    ):
        [family] = [one for one in parse(text) if one.name == "fdbroker_decisions"]
        assert {sample.labels["rule"]: sample.value for sample in family.samples} == {
            name: n for n, name in enumerate(names)
        }


def test_those_who_are_not_kept_apart_are_called_others() -> None:
    row = {"uid": None, "connections": 1, "requests": 2, "allowed": 3, "denied": 4}
    found = families(openmetrics_text(A_STATUS | {"clients": [row]}))
    assert samples(found["fdbroker_client_requests"]) == {("others",): 2}


def test_what_is_shorter_or_longer_than_all_bounds_is_counted() -> None:
    row = {
        "transport": "stream",
        "type": "open",
        "requests": 9,
        "timed": 6,
        "nanoseconds": 10,
        "by_bits": {"0": 1, "12": 2, "40": 3},
    }
    found = families(openmetrics_text(A_STATUS | {"requests": [row]}))
    buckets = {
        sample.labels["le"]: sample.value
        for sample in found["fdbroker_request_duration_seconds"].samples
        if "le" in sample.labels
    }
    assert (buckets["4.096e-06"], buckets["17.179869184"], buckets["+Inf"]) == (3, 3, 6)
    assert samples(found["fdbroker_requests"]) == {("stream", "open"): 9}


# The file for node_exporter


@root
def test_a_textfile_has_the_same_in_the_form_that_node_exporter_reads(served: Served) -> None:
    path = served.directory / "fdbroker.prom"
    path.write_text("old")
    path.chmod(0o600)
    assert served.status("--textfile", str(path)) == ""
    assert path.stat().st_mode & 0o7777 == 0o644
    found = {family.name: family for family in parse_classic(path.read_text())}
    # What the collector would take for an error: types that only OpenMetrics has.
    assert {family.type for family in found.values()} <= {"counter", "gauge", "histogram"}
    of_rule = [sample for sample in found["fdbroker_decisions"].samples if sample.labels["rule"] == "keys"]
    assert [sample.value for sample in of_rule] == [3]
    assert [name for name in os.listdir(served.directory) if ".prom" in name] == ["fdbroker.prom"]


def test_without_a_broker_the_textfile_says_so_and_so_does_the_exit_status(tmp_path: Path) -> None:
    path = tmp_path / "fdbroker.prom"
    result = run_here("status", "--textfile", str(path), "--control", str(tmp_path / "nobody"))
    assert result.returncode == 2
    assert "no broker has its socket there" in result.stderr
    [family] = parse_classic(path.read_text())
    assert (family.name, [sample.value for sample in family.samples]) == ("fdbroker_up", [0])


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_textfile_that_can_not_be_written_leaves_the_old_one_and_nothing_beside_it(
    tmp_path: Path, failing: str
) -> None:
    path = tmp_path / "x.prom"
    path.write_text("old")
    with (
        mock.patch.object(os, failing, side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        write_textfile(str(path), b"new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["x.prom"])


@root
def test_where_no_textfile_can_be_made_is_said(served: Served) -> None:
    result = run_here("status", "--textfile", "/nowhere/x.prom", "--control", served.control)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "fdbroker: /nowhere/x.prom: the file could not be written: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--json", "--openmetrics"), "are three forms: choose one"),
        (("--textfile", "x.prom", "--json"), "are three forms: choose one"),
        (("--textfile", "/tmp/x.txt"), "/tmp/x.txt: the textfile collector reads files named *.prom alone"),
    ],
)
def test_wrong_use_of_the_forms_is_said(options: tuple[str, ...], said: str) -> None:
    result = run_here("status", *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr


def test_without_prometheus_client_it_is_said_what_to_install() -> None:
    error = ModuleNotFoundError("No module named 'prometheus_client'", name="prometheus_client")
    assert missing_extra(error) == "the command needs prometheus_client: pip install 'fdbroker[metrics]'"
