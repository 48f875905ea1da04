"""What every test shares: the umask, the marker for root, a copy for other users, how hypothesis searches."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from coverage import Coverage
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

import fdbroker
from tests.for_other_users import ForOtherUsers, for_other_users
from tests.uids import with_uids_of_first_block

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

HYPOTHESIS_HOME = Path(__file__).resolve().parent.parent / "build" / "hypothesis"

# What takes more than some eight seconds, in the order in which it is begun: the last would be waited for.
LONG_FILES = [
    f"tests/{name}.py"
    for name in (
        "test_demo",
        "soak/test_bystander",
        "test_quick_start",
        "documentation/test_sessions",
        "hostile/test_clamd_clients",
        "launcher/test_fdbrokerd",
        "broker/test_walking",
        "cli/test_scan_command",
        "broker/test_walks",
        "ucspi/test_ucspi",
        "broker/test_limits_running",
        "races/test_names",
        "scan/test_scand_attacked",
        "broker/test_running",
        "sandbox/test_attacks",
        "hanging/test_open_helpers",
        "scan/test_scand_in_trouble",
        "broker/test_reload",
        "launcher/test_activation",
        "broker/test_not_started",
        "hostile/test_hidden_files",
        "client/test_aio",
        "hanging/test_watchdog",
        "client/test_contract",
        "supervisors/test_supervisors",
        "clamd/test_front_end",
    )
]

set_hypothesis_home_dir(HYPOTHESIS_HOME)
# The default: the same examples in each run, so that a red run can be repeated. No deadline: machines differ.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
# For looking further: pytest --hypothesis-profile=dev
settings.register_profile(
    "dev",
    deadline=None,
    max_examples=1000,
    database=DirectoryBasedExampleDatabase(HYPOTHESIS_HOME / "examples"),
)
settings.load_profile("ci")

# Both are ignored where a shell without job control starts the tests in the background, and in all that they
# start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Many tests make what another uid, the broker or a client, has to reach. Under a stricter umask of whoever
# runs them (077 is not rare for root) it could not, as mkdir(mode=...), bind(2) and the like obey it.
os.umask(0o022)


@pytest.fixture(scope="session")
def others() -> Iterator[ForOtherUsers]:
    """Return an interpreter and the sources for processes of other uids."""
    with for_other_users() as made:
        yield made


@contextlib.contextmanager
def no_coverage() -> Iterator[None]:
    """Measure no coverage in the block. `no_cover` of pytest-cov does not do that in the workers of xdist."""
    stopped = []
    while measuring := Coverage.current():  # a worker has two, and stopping one resumes the other
        measuring.stop()
        stopped.append(measuring)
    _stopped.append(stopped)
    try:
        yield
    finally:
        _stopped.pop()
        for measuring in reversed(stopped):
            measuring.start()


@contextlib.contextmanager
def coverage_again() -> Iterator[None]:
    """Within `no_coverage`, measure it in the block."""
    stopped = _stopped[-1] if _stopped else []
    for measuring in reversed(stopped):
        measuring.start()
    try:
        yield
    finally:
        for measuring in stopped:
            measuring.stop()


# What `no_coverage` has stopped, the innermost last.
_stopped: list[list[Coverage]] = []


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Measure of the collection what the sources do when they are imported; the rest is pytest's own."""
    if Coverage.current() and not session.config.pluginmanager.has_plugin("dsession"):
        for module in pkgutil.walk_packages(fdbroker.__path__, "fdbroker."):
            importlib.import_module(module.name)
    with no_coverage():
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)  # within what begins and ends the measuring
def pytest_runtestloop() -> Generator[None, object, object]:
    """Measure what tests and their fixtures do, and not what pytest does between them."""
    with no_coverage():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, object, object]:
    """Measure what fixtures do ..."""
    with coverage_again():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """... what tests do, but not properties, each tried on a hundred examples, nor what is marked ..."""
    if pyfuncitem.get_closest_marker("unmeasured") or getattr(pyfuncitem.obj, "is_hypothesis_test", False):
        return (yield)
    with coverage_again():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """... and the ends of fixtures."""
    with coverage_again():
        return (yield)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case alike in each process, though the uid in it is one of the process's own."""
    if not isinstance(val, int | str):
        return None
    named = with_uids_of_first_block(str(val))
    return None if named == str(val) else named


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root, and say so, where the run has none; begin with the files that take longest."""
    if os.geteuid() != 0:
        skip = pytest.mark.skip(reason="needs root: run `sudo make test`")
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(skip)
    rank = {file: at for at, file in enumerate(LONG_FILES)}
    # By pytest's order otherwise. `location` would ask for the line of each.
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish() -> None:
    """Take what is there now out of the collector's sight: hundreds of tests collect what they have made.

    Looking through all of pytest and all tests would take a tenth of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def same_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hypothesis try the same cases whatever was imported: it draws from modules' constants, too."""
    monkeypatch.setattr(providers, "_get_local_constants", Constants)
    monkeypatch.setattr(providers, "CONSTANTS_CACHE", type(providers.CONSTANTS_CACHE)(1024))


@pytest.fixture(scope="module", autouse=True)
def what_other_files_left_is_not_collected() -> None:
    """Likewise what is there when the tests of a file begin, such as modules that earlier tests imported."""
    gc.collect()
    gc.freeze()
