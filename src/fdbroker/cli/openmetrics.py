"""The whole status as metrics, for Prometheus: docs/metrics.md has them all.

Names, units and types are by the conventions of OpenMetrics. What is counted
is the broker's; here it only gets its form, in a process without any right.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from fdbroker.cli.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric

# The bounds of the histogram: 2**n nanoseconds, 4 us to 17 s. What is shorter stands in the first bucket.
_LEAST_BITS, _MOST_BITS = 12, 34


def openmetrics_text(status: Mapping[str, Any]) -> str:
    """Return the whole status, with its lists, in the text format of OpenMetrics 1.0."""
    return _generate(status, generate_openmetrics).decode()


def classic_text(status: Mapping[str, Any] | None) -> bytes:
    """Return the same in Prometheus' own text format 0.0.4; None: no broker answered."""
    return _generate(status, generate_latest)


def write_textfile(path: str, text: bytes) -> None:
    """Write a file for the textfile collector of node_exporter, which sees the old one or the new one whole.

    Raises:
        OSError: that failed, and the old one is there as before.

    """
    with whole_file(path, 0o644) as file:
        file.write(text)


def _generate(status: Mapping[str, Any] | None, generate: Callable[[CollectorRegistry], bytes]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(status))
    return generate(registry)


class _Status(Collector):
    """Metrics of one status."""

    def __init__(self, status: Mapping[str, Any] | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Return them."""
        yield _gauge("up", "Whether the broker answered.", int(self._status is not None))
        if self._status is not None:
            yield from _of_process(self._status)
            yield from _of_requests(self._status)
            yield from _of_decisions(self._status)
            yield from _of_clients(self._status)


def _of_process(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "fdbroker_build", "Which version of fdbroker the broker is.", {"version": status["version"]}
    )
    yield _gauge("start_time_seconds", "When the broker started.", _seconds(status["started"]), "seconds")
    yield _gauge("identity_level", "How well the kernel can say who asks: 0 to 2.", status["identity_level"])
    yield _gauge("policy_generation", "Number of the policy in force: 1 at the start.", status["generation"])
    yield _gauge(
        "policy_loaded_time_seconds", "When it came into force.", _seconds(status["loaded"]), "seconds"
    )
    yield _gauge("policy_rules", "Rules in it.", status["rules"])
    yield _counter("audit_records", "Records of the audit.", status["audit_sequence"])
    yield _counter("audit_failures", "Writes of the audit that failed.", status["audit_failures"])
    yield _counters(
        "events",
        "Records that are not about a path, by their name in the audit.",
        ("event",),
        (((event,), count) for event, count in status["events"].items()),
    )
    yield _gauge("helpers_stuck", "Open helpers that were given up and can't end.", status["helpers_stuck"])


def _of_requests(status: Mapping[str, Any]) -> Iterator[Metric]:
    totals, requests = status["totals"], status["requests"]
    yield _gauge("connections", "Connections of now.", totals["connections"])
    yield _gauge("connections_most", "As many there may be.", status["connections_most"])
    yield _counter("connections_accepted", "Connections that were made.", totals["accepted"])
    yield _counter("connections_refused", "Connections that were not served.", totals["refused_connections"])
    yield _counters(
        "requests",
        "Requests, by transport and type.",
        ("transport", "type"),
        (((row["transport"], row["type"]), row["requests"]) for row in requests),
    )
    durations = HistogramMetricFamily(
        "fdbroker_request_duration_seconds",
        "From the moment that the broker turned to a request until its reply was sent.",
        labels=("transport", "type"),
        unit="seconds",
    )
    for row in requests:
        if row["timed"]:
            labels = (row["transport"], row["type"])
            durations.add_metric(labels, list(_buckets(row)), row["nanoseconds"] / 1e9)
    yield durations
    yield _counter("descriptors_sent", "Descriptors that clients were sent.", totals["descriptors_sent"])
    yield _gauge("descriptors_in_flight", "Of these, those that were not received yet.", totals["in_flight"])
    yield _counter(
        "copied_bytes", "Contents of files that were sent in replies.", totals["bytes_copied"], "bytes"
    )
    yield _gauge(
        "unsent_replies", "Replies that wait for room in a client's queue.", status["unsent_replies"]
    )
    yield _gauge("walks", "Walks that go on.", status["walks"])
    yield _gauge("clients_served", "Clients that services act for.", status["clients_served"])


def _of_decisions(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield _counters(
        "decisions",
        "Paths that were decided on. rule is empty where no single one decided.",
        ("action", "outcome", "rule", "reason"),
        (
            (
                (
                    row["action"],
                    "allow" if row["reason"] == "ok" else "deny",
                    row["rule"] or "",
                    row["reason"],
                ),
                row["count"],
            )
            for row in status["decisions"]
        ),
    )
    yield _counters(
        "limits_hit",
        "How often a limit of the policy was reached. rule is empty where it is for all.",
        ("limit", "rule"),
        (((row["limit"], row["rule"] or ""), row["count"]) for row in status.get("limits_hit", ())),
    )


def _of_clients(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield what is known by uid; the last one may be of all others."""
    rows = [("others" if row["uid"] is None else str(row["uid"]), row) for row in status["clients"]]
    connections = GaugeMetricFamily(
        "fdbroker_client_connections", "Connections of now, by uid.", labels=("uid",)
    )
    for uid, row in rows:
        connections.add_metric((uid,), row["connections"])
    yield connections
    yield _counters(
        "client_requests", "Requests, by uid.", ("uid",), (((uid,), row["requests"]) for uid, row in rows)
    )
    yield _counters(
        "client_paths",
        "Paths that were decided on, by uid.",
        ("uid", "outcome"),
        (
            ((uid, outcome), row[told])
            for uid, row in rows
            for outcome, told in (("allow", "allowed"), ("deny", "denied"))
        ),
    )


def _buckets(row: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield bounds in seconds, and how many requests took no longer."""
    by_bits = {int(bits): count for bits, count in row["by_bits"].items()}
    for bound in range(_LEAST_BITS, _MOST_BITS + 1):
        within = sum(count for bits, count in by_bits.items() if bits <= bound)
        yield str(floatToGoString((1 << bound) / 1e9)), within  # type: ignore[no-untyped-call]
    yield "+Inf", row["timed"]


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _gauge(name: str, text: str, value: float, unit: str = "") -> Metric:
    return GaugeMetricFamily(f"fdbroker_{name}", text, value, unit=unit)


def _counter(name: str, text: str, value: float, unit: str = "") -> Metric:
    return CounterMetricFamily(f"fdbroker_{name}", text, value, unit=unit)


def _counters(
    name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], int]]
) -> Metric:
    family = CounterMetricFamily(f"fdbroker_{name}", text, labels=labels)
    for values, count in rows:
        family.add_metric(values, count)
    return family
