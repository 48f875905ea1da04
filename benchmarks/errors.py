"""The one error type of the benchmarks."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Something that must work for a figure to mean anything did not; the text says what."""
