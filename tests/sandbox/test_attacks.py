from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Any, Unpack, cast

import pytest

from fdbroker.kernel import dumpable, process
from fdbroker.kernel.capabilities import CAP_SYS_ADMIN
from fdbroker.sandbox import STRICT, Layer, Profile
from tests.processes import ChildError, in_child
from tests.running_broker import reachable_directory
from tests.sandbox.attacks import ATTACKS, attempt_all, listening_places, look_at_a_path
from tests.sandbox.confined import WORKER_UID, Options, ask, puppet, puppets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fdbroker.sandbox import Zygote

pytestmark = pytest.mark.root

PROFILES = [Profile.SEALED, Profile.SCRATCH]

# What works for any process that owns the file and has its parent's uid, and so must be taken from a worker.
WORK_UNCONFINED = {
    "open a file",
    "open a file by openat2",
    "ask for a handle",
    "open the root directory",
    "open the parent's environment",
    "make a file",
    "make a directory",
    "make a symbolic link",
    "make a FIFO",
    "give it another name",
    "read a path's metadata",
    "read a link",
    "reopen for reading",
    "reopen for writing",
    "change its mode",
    "change its owner",
    "change its times",
    "list its extended attributes",
    "lock it",
    "lock it as POSIX does",
    "lock its open file description",
    "have signals sent for it",
    "duplicate it",
    "map it executable",
    "map writable and executable memory",
    "make memory executable",
    "make a memfd",
    "execute a memfd",
    "make a Unix socket",
    "make an Internet socket",
    "make a netlink socket",
    "connect to an abstract socket",
    "connect to a pathname socket",
    "connect by TCP",
    "make a pair of sockets",
    "make a pipe",
    "make shared memory",
    "fork",
    "fork by clone3",
    "ask whether the parent could be killed",
    "get a descriptor of the parent",
    "read the parent's limits",
    "be dumpable again",
    "outlive its parent",
    "take another name",
    "ask for another filter",
    "have another personality",
    "watch files",
    "wait for events",
    "make a timer",
}

# What a layer stops when it is the only one beside the ids and what it needs itself.
STOPPED_BY: dict[Layer, set[str]] = {
    Layer.NAMESPACES: {"connect by TCP", "connect to an abstract socket"},
    Layer.PID_NAMESPACE: {
        "ask whether the parent could be killed",
        "get a descriptor of the parent",
        "read the parent's limits",
    },
    Layer.EMPTY_ROOT: {
        "open a file",
        "open a file by openat2",
        "open the parent's environment",
        "make a file",
        "make a directory",
        "make a symbolic link",
        "make a FIFO",
        "give it another name",
        "read a path's metadata",
        "read a link",
        "reopen for reading",
        "reopen for writing",
        "connect to a pathname socket",
    },
    Layer.LANDLOCK: {
        "open a file",
        "open a file by openat2",
        "open the root directory",
        "open the parent's environment",
        "make a file",
        "make a directory",
        "make a symbolic link",
        "make a FIFO",
        "give it another name",
        "reopen for reading",
        "reopen for writing",
        "connect to an abstract socket",
        "connect by TCP",
        "ask whether the parent could be killed",
    },
    Layer.LIMITS: {"fork", "fork by clone3"},
    Layer.WRITE_EXECUTE: {"map writable and executable memory", "make memory executable"},
    Layer.SECCOMP: WORK_UNCONFINED,
}

MADE = (
    b"/tmp/fdbroker-test-made",
    b"/tmp/fdbroker-test-made-too",
    b"/tmp/fdbroker-test-made-link",
    b"/tmp/fdbroker-test-made-fifo",
    b"/tmp/fdbroker-test-linked",
)


@pytest.fixture
def own_file() -> Iterator[int]:
    """Return a descriptor for reading of a file that the worker's uid owns, on a writable mount."""
    # Below /tmp, so that a link to it can be made there.
    with reachable_directory() as directory:
        path = directory / "own"
        path.write_text("contents")
        os.chown(path, WORKER_UID, WORKER_UID)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
            clean_up()


def clean_up() -> None:
    for made in MADE:
        if os.path.isdir(made) and not os.path.islink(made):
            os.rmdir(made)
        elif os.path.lexists(made):
            os.unlink(made)


def attack(descriptor: int, **options: Unpack[Options]) -> dict[str, int]:
    """Return what came of all attacks of a worker that is confined so."""
    clean_up()
    with listening(), puppet(**options) as worker:
        answer = ask(worker, "attempt_all", descriptor, parent=os.getpid())
        return cast("dict[str, int]", answer)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Have something to connect to, at places of this process."""
    places = listening_places(os.getpid())
    with contextlib.ExitStack() as stack:
        for place in places:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(place)
            listener.listen()
        stack.callback(os.unlink, places[1])
        os.chmod(places[1], 0o666)
        yield


def worked(results: dict[str, int]) -> set[str]:
    return {name for name, number in results.items() if number == 0}


def attempt_in_unconfined_child(descriptor: int) -> dict[str, int]:
    """Attack as an ordinary process does whose parent has the same uid."""
    os.setresuid(WORKER_UID, WORKER_UID, WORKER_UID)
    dumpable.set_dumpable(True)  # the change of ids took it; a program that is started has it
    parent = os.getpid()
    with listening():
        return in_child(lambda: attempt_all(descriptor, parent))


def test_there_are_attacks_enough() -> None:
    assert len(ATTACKS) >= 80


def test_attacks_work_where_nothing_confines(own_file: int) -> None:
    results = in_child(lambda: attempt_in_unconfined_child(own_file))
    assert WORK_UNCONFINED - worked(results) == set()


def test_sealed_worker_that_root_started_can_do_nothing(own_file: int) -> None:
    assert attack(own_file, gently=True) == dict.fromkeys(ATTACKS, errno.EPERM)
    assert os.fstat(own_file).st_size == 8


def test_worker_with_a_directory_of_its_own_that_root_started_can_do_nothing_else(own_file: int) -> None:
    assert worked(attack(own_file, gently=True, profile=Profile.SCRATCH)) == set()
    assert os.fstat(own_file).st_size == 8


@pytest.mark.parametrize("profile", PROFILES)
def test_worker_of_an_unprivileged_parent_can_do_nothing_else(
    profile: Profile, own_file: int, unprivileged: Callable[[Callable[[], Any]], Any]
) -> None:
    results = unprivileged(lambda: attack(own_file, gently=True, profile=profile))
    assert worked(results) == set()
    if profile is Profile.SEALED:
        assert set(results.values()) == {errno.EPERM}


@pytest.mark.parametrize("profile", PROFILES)
def test_all_layers_beside_the_filter_stop_the_worst(profile: Profile, own_file: int) -> None:
    results = attack(own_file, profile=profile, unsafe_without=frozenset({Layer.SECCOMP}))
    stopped = set().union(*(names for layer, names in STOPPED_BY.items() if layer is not Layer.SECCOMP))
    assert worked(results) & stopped == set()


@pytest.mark.parametrize("layer", STOPPED_BY)
def test_each_layer_stops_by_itself_what_is_its_part(
    layer: Layer, own_file: int, unprivileged: Callable[[Callable[[], Any]], Any]
) -> None:
    def attack_beside(*layers: Layer) -> set[str]:
        others = frozenset(Layer) - NEEDED - set(layers)
        return worked(unprivileged(lambda: attack(own_file, gently=True, unsafe_without=others)))

    with_it = attack_beside(layer)
    if not WITHOUT_ANY:
        WITHOUT_ANY.update(attack_beside())
    without_it = WITHOUT_ANY
    # Each of them works where it is not there; else the test would show nothing.
    assert STOPPED_BY[layer] - without_it == set()
    assert STOPPED_BY[layer] & with_it == set()


# What works without any layer that can be missing, once it was tried: it is the same for each layer.
WITHOUT_ANY: set[str] = set()
# Who it is must not be root; the others are no walls of their own, or what a wall stands on.
NEEDED = frozenset({Layer.IDS, Layer.CAPABILITIES, Layer.NO_NEW_PRIVS, Layer.DESCRIPTORS})


@pytest.mark.parametrize("left_out", [layer for layer in Layer if layer not in STRICT])
@pytest.mark.parametrize("profile", PROFILES)
def test_no_single_layer_is_what_all_rests_on(profile: Profile, left_out: Layer, own_file: int) -> None:
    results = attack(own_file, gently=True, profile=profile, unsafe_without=frozenset({left_out}))
    open_then = {
        # Landlock covers no metadata, and what has no root of its own has no directory of its own either.
        (Profile.SCRATCH, Layer.EMPTY_ROOT): {"read a path's metadata"},
        # An empty root can be listed.
        (Profile.SCRATCH, Layer.LANDLOCK): {"open the root directory"},
    }
    assert worked(results) <= open_then.get((profile, left_out), set())


# Landlock lets a sealed worker open nothing, whichever it is; what each one lacks shows where something may
# be opened.
@pytest.mark.parametrize("abi", [0, 1, 5])
def test_sealed_worker_can_do_nothing_on_a_kernel_with_an_older_landlock(abi: int, own_file: int) -> None:
    assert worked(attack(own_file, gently=True, landlock_abi=abi)) == set()


@pytest.mark.parametrize("abi", range(1, 8))
def test_worker_with_a_directory_can_do_nothing_else_on_a_kernel_with_an_older_landlock(
    abi: int, own_file: int
) -> None:
    results = attack(own_file, gently=True, profile=Profile.SCRATCH, landlock_abi=abi)
    assert worked(results) == set()


@pytest.mark.parametrize("profile", PROFILES)
def test_worker_can_use_the_descriptor_as_meant(profile: Profile, own_file: int) -> None:
    with puppet(profile=profile) as worker:
        assert ask(worker, "use_as_meant", own_file) == {
            "read": "cont",
            "pread": "ents",
            "lseek": 8,
            "fstat": 8,
            "mmap": "contents",
            "anonymous memory": 0,
            "metadata by a descriptor": 0,
        }


def test_metadata_call_with_the_flag_for_no_path_meets_an_empty_root(own_file: int) -> None:
    assert look_at_a_path() == 0
    with puppet() as worker:
        assert ask(worker, "look_at_a_path") == errno.ENOENT


@pytest.mark.parametrize("name", ATTACKS)
def test_production_filter_kills_a_sealed_worker_that_tries(
    name: str, own_file: int, sealed_zygote: Zygote
) -> None:
    with sealed_zygote.spawn() as worker:
        assert ask(worker, "attempt", own_file, name=name, parent=os.getpid()) is None
        assert str(worker.stop(grace=10.0)) == "it made a system call that it may not make (SIGSYS)"


@pytest.mark.parametrize("name", ATTACKS)
def test_production_filter_kills_a_worker_with_a_directory_that_tries_or_it_fails(
    name: str, own_file: int, zygote_of_scratch: Zygote
) -> None:
    with zygote_of_scratch.spawn() as worker:
        answer = ask(worker, "attempt", own_file, name=name, parent=os.getpid())
        if answer is None:
            assert str(worker.stop(grace=10.0)) == "it made a system call that it may not make (SIGSYS)"
        else:
            assert answer in set(errno.errorcode)


@pytest.mark.parametrize("profile", PROFILES)
def test_worker_of_root_without_its_right_to_mount_can_do_nothing(profile: Profile, own_file: int) -> None:
    def start() -> set[str]:
        process.drop_from_bounding_set(CAP_SYS_ADMIN)  # as in most containers
        return worked(attack(own_file, gently=True, profile=profile))

    if profile is Profile.SEALED:
        assert in_child(start) == set()
    else:
        with pytest.raises(ChildError, match="ConfinementError: empty root"):
            in_child(start)


@pytest.fixture(scope="module")
def zygote_of_scratch() -> Iterator[Zygote]:
    with puppets(profile=Profile.SCRATCH) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def sealed_zygote() -> Iterator[Zygote]:
    with puppets() as zygote:
        yield zygote


def test_worker_can_talk_on_its_channel_alone(own_file: int) -> None:
    with puppet(gently=True) as worker:
        assert ask(worker, "talk_elsewhere", own_file) == [errno.EPERM, errno.EPERM]


def test_directory_that_is_passed_by_mistake_leads_nowhere(own_file: int) -> None:
    directory = os.open(os.path.dirname(os.readlink(f"/proc/self/fd/{own_file}")), os.O_RDONLY | os.O_CLOEXEC)
    os.fchown(directory, WORKER_UID, WORKER_UID)
    with puppet(profile=Profile.SCRATCH, gently=True) as worker:
        answer = cast("list[int]", ask(worker, "open_below", directory))
    os.close(directory)
    assert len(answer) == 7
    assert set(answer) <= {errno.EACCES, errno.EXDEV, errno.ENOENT}
