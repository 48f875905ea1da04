"""From the figures of each round to medians, a table and a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.series import VARIANTS, Series

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Figures = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """A series with what came out: one value a round."""

    series: Series
    rounds: tuple[float, ...]

    @property
    def value(self) -> float:
        """The median over the rounds."""
        return median(self.rounds)

    @property
    def holds(self) -> bool:
        """Whether the value is on the right side of the bar."""
        return self.series.holds(self.value)


def evaluate(chosen: Iterable[Series], figures: Figures) -> list[Outcome]:
    """Divide what was measured in the same round, and only that."""
    outcomes = []
    for series in chosen:
        rounds = tuple(figures[series.above])
        if series.below is not None:
            rounds = tuple(above / below for above, below in zip(rounds, figures[series.below], strict=True))
        outcomes.append(Outcome(series, rounds))
    return outcomes


def series_table(outcomes: Iterable[Outcome]) -> str:
    """Return the table of the series."""
    rows = [("series", "value", "bar", "holds", "min", "max")]
    for outcome in outcomes:
        sign = "<=" if outcome.series.better == "lower" else ">="
        rows.append(
            (
                outcome.series.name,
                f"{outcome.value:.2f}",
                f"{sign} {outcome.series.bar:.1f}",
                "yes" if outcome.holds else "NO",
                f"{min(outcome.rounds):.2f}",
                f"{max(outcome.rounds):.2f}",
            )
        )
    return _aligned(rows)


def variant_table(figures: Figures) -> str:
    """Return the table of what the ratios were made of."""
    rows = [("variant", "median", "unit", "min", "max")]
    for name, rounds in figures.items():
        rows.append(
            (
                name,
                f"{median(rounds):.2f}",
                VARIANTS[name].unit,
                f"{min(rounds):.2f}",
                f"{max(rounds):.2f}",
            )
        )
    return _aligned(rows)


def write_json(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the file that programs read."""
    content = {
        outcome.series.name: {
            "value": round(outcome.value, 4),
            "bar": outcome.series.bar,
            "better": outcome.series.better,
            "holds": outcome.holds,
        }
        for outcome in outcomes
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "ascii")


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    # Names to the left, everything else to the right.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *others in rows:
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines) + "\n"
