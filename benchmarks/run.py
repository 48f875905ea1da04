#!/usr/bin/env python3
"""Measure fdbroker against its bars, print a table and write build/bench.json.

Run as root from a checkout: `python3 benchmarks/run.py`, or `python3 -m benchmarks.run`.
docs/benchmarks.md says what the figures mean. Exit status: 0 all bars
hold, 1 one does not, 2 it could not be measured.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

# What is measured is the checkout that this file is in, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.errors import BenchmarkError
from benchmarks.native import build
from benchmarks.report import Outcome, evaluate, series_table, variant_table, write_json
from benchmarks.series import SCAN_SERIES, SERIES, VARIANTS, Series
from benchmarks.stage import Stage
from benchmarks.tree import make_tree

CHECKOUT = Path(__file__).resolve().parent.parent
ROUNDS = 9
QUICK_ROUNDS = 3
QUICK_SCALE = 0.25
# The broker lets one uid have an eighth of this under way: 64 clients with 32 each.
DESCRIPTORS = 8 * 64 * 32


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [series.name for series in (*SERIES, *SCAN_SERIES)]
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Measure fdbroker against its bars.",
        epilog=f"Series: {', '.join(names)}.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=[series.name for series in SERIES],
        metavar="NAME",
        help="only these series (without it all but those of scans)",
    )
    which.add_argument(
        "--scans",
        action="store_const",
        dest="only",
        const=[series.name for series in SCAN_SERIES],
        help="only those of scans, which need ClamAV",
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help=f"default {ROUNDS}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds of a quarter of the opens: to see that it runs",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=CHECKOUT / "build" / "bench.json",
        metavar="FILE",
        help="where the figures go (default: build/bench.json)",
    )
    parser.add_argument(
        "--client-python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter of the clients in Python; needs oslo.privsep (default: this one)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    os.umask(0o022)  # much of what is made is for other users
    options = parse(arguments)
    chosen = [series for series in (*SERIES, *SCAN_SERIES) if series.name in options.only]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    try:
        prepare()
        figures = measure_all(chosen, rounds, options)
    except BenchmarkError as error:
        sys.stderr.write(f"\nbenchmarks: {error}\n")
        return 2
    outcomes = evaluate(chosen, figures)
    write_json(options.output, outcomes)
    sys.stdout.write(f"{series_table(outcomes)}\n{variant_table(figures)}")
    return summary(outcomes)


def measure_all(chosen: list[Series], rounds: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Take every variant once a round and return the figures, round by round."""
    floor, client = build(CHECKOUT / "benchmarks" / "c", CHECKOUT / "build" / "bench")
    needed = {series.above for series in chosen} | {series.below for series in chosen}
    names = [name for name in VARIANTS if name in needed]
    figures: dict[str, list[float]] = {name: [] for name in names}
    # Not below the checkout: other uids could perhaps not get there.
    with tempfile.TemporaryDirectory(prefix="fdbroker-bench-") as temporary:
        directory = Path(temporary)
        directory.chmod(0o755)
        one_cpu, two_cpus = choose_cpus()
        with Stage(
            directory=directory,
            tree=make_tree(directory),
            floor_program=floor,
            client_program=client,
            one_cpu=one_cpu,
            two_cpus=two_cpus,
            python=options.client_python,
            environment=client_environment(),
            scale=QUICK_SCALE if options.quick else 1.0,
        ) as stage:
            # Round 0 warms caches and counts for nothing.
            for number in range(rounds + 1):
                # Forwards and backwards in turn: what drifts drifts for both sides of a ratio.
                for name in names if number % 2 else reversed(names):
                    progress(number, rounds, name)
                    figure = VARIANTS[name].measure(stage)
                    if number > 0:
                        figures[name].append(figure)
    progress(rounds, rounds, "done")
    sys.stderr.write("\n")
    return figures


def choose_cpus() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the one CPU and the two CPUs to run on: the last ones, which interrupts like least."""
    usable = sorted(os.sched_getaffinity(0))
    return tuple(usable[-1:]), tuple(usable[-2:])


def prepare() -> None:
    """See that brokers can be started, and that they and the clients will have descriptors enough."""
    if os.geteuid() != 0:
        raise BenchmarkError("only root can start the brokers")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, DESCRIPTORS)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"RLIMIT_NOFILE is {hard} and must be {DESCRIPTORS}: {error}") from error


def client_environment() -> dict[str, str]:
    """Return the environment of the clients in Python."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join((str(CHECKOUT), str(CHECKOUT / "src"))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def progress(number: int, rounds: int, name: str) -> None:
    """Say on standard error where we are; on a terminal in one line."""
    text = f"{'warm-up' if number == 0 else f'round {number}/{rounds}'}: {name}"
    sys.stderr.write(f"\r{text:<60}" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


def summary(outcomes: list[Outcome]) -> int:
    """Return the exit status, having said what it is for."""
    missed = [outcome.series.name for outcome in outcomes if not outcome.holds]
    if missed:
        sys.stderr.write(f"benchmarks: not within the bar: {', '.join(missed)}\n")
        return 1
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
