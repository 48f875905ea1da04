"""What systemd passes is taken by name and looked at; what a unit lacks is named with its option."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import namespaces
from fdbroker.launcher.activation import Activation, check_services, take_from_systemd
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.unit_options import check_user_namespace
from tests.launcher.starting import lay_out, run, started
from tests.running_broker import BROKER_UID, CLIENT_UID, OTHER_UID, policy, reachable_directory

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.for_other_users import ForOtherUsers
    from tests.kernel.conftest import Children

AS_A_SERVICE = str(Path(__file__).parent / "as_a_service.py")
UNDER_A_FILTER = str(Path(__file__).parent / "under_a_filter.py")
BY_SYSTEMD = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


def passing(
    in_child: Children, names: list[str], make: Callable[[], list[socket.socket]], **variables: str
) -> object:
    """Take, in a child, what systemd would pass: these sockets from descriptor 3 on, with these names."""

    def child() -> object:
        made = make()
        spare = [os.dup(sock.fileno()) for sock in made]
        high = [os.dup2(number, 500 + number) for number in spare]
        for place, number in enumerate(high, 3):
            os.dup2(number, place)
        for name in BY_SYSTEMD:
            os.environ.pop(name, None)
        if names:
            os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(names))}
            os.environ["LISTEN_FDNAMES"] = ":".join(names)
        os.environ |= {name: text.replace("PID", str(os.getpid())) for name, text in variables.items()}
        try:
            taken = take_from_systemd()
            check_services(taken, {"clamd": "stream", "other": "stream", "scan": "seqpacket"})
        except LaunchError as error:
            return str(error)
        sockets = (*taken.listeners, *taken.services)
        inheritable = [number for number, _ in sockets if os.get_inheritable(number)]
        return [taken, inheritable, sorted(name for name in BY_SYSTEMD if name in os.environ)]

    return in_child(child)


def listeners(directory: Path, *kinds: socket.SocketKind) -> Callable[[], list[socket.socket]]:
    def make() -> list[socket.socket]:
        made = []
        for number, kind in enumerate(kinds):
            sock = socket.socket(socket.AF_UNIX, kind)
            sock.bind(str(directory / f"s{number}"))
            if kind != socket.SOCK_DGRAM:
                sock.listen()
            made.append(sock)
        return made

    return make


SEQPACKET = socket.SOCK_SEQPACKET
_CLONE_NEWUSER = 0x10000000


@pytest.mark.parametrize(
    ("names", "requests", "control"),
    [
        (["seqpacket", "control"], [3], 4),
        (["control", "seqpacket"], [4], 3),
        (["seqpacket", "control", "seqpacket"], [3, 5], 4),
        (["seqpacket"], [3], None),
    ],
)
def test_sockets_are_known_by_their_names(
    tmp_path: Path, in_child: Children, names: list[str], requests: list[int], control: int | None
) -> None:
    taken = passing(in_child, names, listeners(tmp_path, *[SEQPACKET] * len(names)))
    expected = Activation([(number, "seqpacket") for number in requests], [], [], control, None, None)
    # Close-on-exec until they are handed over, and nothing of it is left in the environment.
    assert taken == [json.loads(json.dumps(expected)), [], []]


def test_each_kind_of_socket_has_its_name_and_any_other_is_of_a_service(
    tmp_path: Path, in_child: Children
) -> None:
    names = ["clamd", "dgram", "stream", "seqpacket", "other"]
    kinds = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM, SEQPACKET, socket.SOCK_STREAM]
    taken = passing(in_child, names, listeners(tmp_path, *kinds))
    requests = [(4, "dgram"), (5, "stream"), (6, "seqpacket")]
    expected = Activation(requests, [(3, "clamd"), (7, "other")], [], None, None, None)
    assert taken == [json.loads(json.dumps(expected)), [], []]


def test_datagrams_tell_who_sends_them_from_the_first_moment(tmp_path: Path, in_child: Children) -> None:
    made = listeners(tmp_path, socket.SOCK_DGRAM)()
    with made[0]:
        passing(in_child, ["dgram"], lambda: made)
        assert made[0].getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1


@pytest.mark.parametrize(
    ("names", "kinds", "said"),
    [
        (
            ["stream"],
            [SEQPACKET],
            (
                "socket 'stream' of systemd: descriptor 3 is a SOCK_SEQPACKET socket, which is not what is"
                " served there; make it SOCK_STREAM (ListenStream=)"
            ),
        ),
        (["dgram"], [socket.SOCK_STREAM], "make it SOCK_DGRAM (ListenDatagram=)"),
        (["clamd"], [SEQPACKET], "socket 'clamd' of systemd: descriptor 3 is a SOCK_SEQPACKET socket"),
        (["clamd"], [socket.SOCK_DGRAM], "make it SOCK_STREAM (ListenStream=)"),
        (["scan"], [socket.SOCK_STREAM], "make it SOCK_SEQPACKET (ListenSequentialPacket=)"),
        (
            ["scand"],
            [socket.SOCK_STREAM],
            (
                "socket 'scand' of systemd: no socket of fdbroker has this name, and no service in listeners"
                " of the policy; name them"
            ),
        ),
        (["unknown"], [socket.SOCK_STREAM], "socket 'unknown' of systemd: no socket of fdbroker has this"),
        (
            ["fdbroker.socket"],
            [SEQPACKET],
            "has this name; name them by FileDescriptorName= of the .socket unit",
        ),
        (
            ["seqpacket"],
            [socket.SOCK_STREAM],
            (
                "SOCK_STREAM socket, which is not what is served there; make it SOCK_SEQPACKET"
                " (ListenSequentialPacket=)"
            ),
        ),
        (["control"], [socket.SOCK_DGRAM], "SOCK_DGRAM socket"),
        (["control", "control"], [SEQPACKET] * 2, "passed 2 sockets with the name 'control'; keep one"),
        (["connection"], [SEQPACKET], "is a listening socket, not a connection"),
    ],
)
def test_a_socket_that_is_not_what_its_name_says_stops_the_start(
    tmp_path: Path, in_child: Children, names: list[str], kinds: list[socket.SocketKind], said: str
) -> None:
    text = passing(in_child, names, listeners(tmp_path, *kinds))
    assert isinstance(text, str)
    assert said in text


@pytest.mark.parametrize("kind", [SEQPACKET, socket.SOCK_STREAM])
def test_a_connection_of_accept_yes_is_served_as_an_inherited_one(
    in_child: Children, kind: socket.SocketKind
) -> None:
    pair = socket.socketpair(socket.AF_UNIX, kind)
    with pair[0], pair[1]:
        taken = passing(in_child, ["connection"], lambda: [pair[0]])
    assert taken == [[[], [], [[3, "connection"]], None, None, None], [], []]


@pytest.mark.root
def test_sockets_for_datagrams_of_another_network_namespace_are_refused(
    tmp_path: Path, in_child: Children
) -> None:
    def elsewhere() -> list[socket.socket]:
        made = listeners(tmp_path, socket.SOCK_DGRAM)()
        namespaces.unshare(namespaces.CLONE_NEWNET)
        return made

    text = passing(in_child, ["dgram"], elsewhere)
    assert "socket 'dgram' of systemd is of another network namespace" in str(text)
    assert "set PrivateNetwork=no" in str(text)


def test_what_is_probed_of_a_socket_for_datagrams_is_nothing_to_be_answered(
    tmp_path: Path, in_child: Children
) -> None:
    made = listeners(tmp_path, socket.SOCK_DGRAM)()
    with made[0]:
        passing(in_child, ["dgram"], lambda: made)
        made[0].settimeout(0)
        with pytest.raises(BlockingIOError):
            made[0].recv(1)


def test_sockets_for_datagrams_that_nobody_can_reach_are_refused(in_child: Children) -> None:
    text = passing(in_child, ["dgram"], lambda: [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)])
    assert "descriptor 3 is a socket without a name, so nobody can send anything there; bind it" in str(text)


def test_sockets_for_another_process_are_not_ours(tmp_path: Path, in_child: Children) -> None:
    taken = passing(
        in_child,
        [],
        listeners(tmp_path, SEQPACKET),
        LISTEN_PID="1",
        LISTEN_FDS="1",
        LISTEN_FDNAMES="seqpacket",
    )
    assert isinstance(taken, list)
    assert taken[0] == [[], [], [], None, None, None]


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_notify_socket_is_connected_and_the_watchdog_read(
    tmp_path: Path, in_child: Children, kind: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = f"@fdbroker-test-{os.getpid()}" if kind == "abstract" else str(tmp_path / "notify")
        manager.bind(address.replace("@", "\0"))
        variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "PID"}
        taken = passing(in_child, [], list, **variables)
    assert isinstance(taken, list)
    [_, _, _, control, notify, watchdog], _, left = taken
    assert (control, watchdog, left) == (None, 3_000_000, [])
    assert notify > 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WATCHDOG_USEC": "5"}, None),  # nobody to ping
        ({"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "5"}, None),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "5"}, None),
        ({"NOTIFY_SOCKET": "{}", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "{}", "WATCHDOG_USEC": "5"}, 5),
        ({"NOTIFY_SOCKET": "{}", "WATCHDOG_USEC": "x"}, "WATCHDOG_USEC is 'x', not a number of microseconds"),
    ],
)
def test_a_watchdog_that_is_not_ours_is_none(
    tmp_path: Path, in_child: Children, variables: dict[str, str], expected: int | str | None
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        given = {name: text.format(tmp_path / "notify") for name, text in variables.items()}
        taken = passing(in_child, [], list, **given)
    if isinstance(expected, str):
        assert isinstance(taken, str)
        assert expected in taken
    else:
        assert isinstance(taken, list)
        assert taken[0][5] == expected


# ---- what a unit lacks ----


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        lay_out(path)
        (path / "policy.json").write_text(json.dumps(policy(path / "tree")))
        (path / "run").mkdir()
        yield path


def inherited(
    directory: Path, others: ForOtherUsers, *without: str, uid: int = BROKER_UID, file: str = "policy.json"
) -> str:
    """Start as a service without some options of its unit; return what it says when it does not start."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        prefix = [sys.executable, AS_A_SERVICE, str(uid), *without, "--"]
        options = ["--audit=none", f"--inherited={theirs.fileno()}"]
        done = run(
            directory / file,
            *options,
            prefix=prefix,
            pass_fds=[theirs.fileno()],
            python=others.python,
            env={"PYTHONPATH": str(others.directory)},
        )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("without", "options"),
    [
        ("bounding", "CapabilityBoundingSet=CAP_DAC_READ_SEARCH"),
        (
            "securebits",
            "SecureBits=noroot noroot-locked no-setuid-fixup no-setuid-fixup-locked",
        ),
        ("view", "is not read-only (ReadOnlyPaths=/) and not nosuid (NoNewPrivileges=yes) in the view"),
        ("nosuid", "is not nosuid (NoNewPrivileges=yes) in the view"),
        ("ambient", "AmbientCapabilities=CAP_DAC_READ_SEARCH"),
    ],
)
def test_what_a_unit_lacks_is_named_by_its_option(
    directory: Path, others: ForOtherUsers, without: str, options: str
) -> None:
    if without == "ambient":
        # Without it not even the compiled policy can be read, unless everybody can.
        (directory / "policy.json").chmod(0o644)
    assert options in inherited(directory, others, without)


@pytest.mark.root
def test_what_a_process_may_still_do_for_itself_needs_no_option(directory: Path) -> None:
    """no_new_privs is everybody's to set: so it is set, and not asked for."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        prefix = [sys.executable, AS_A_SERVICE, str(BROKER_UID), "nnp", "--"]
        options = ["--audit=none", f"--inherited={theirs.fileno()}"]
        with started(
            directory / "policy.json", *options, prefix=prefix, pass_fds=[theirs.fileno()]
        ) as process:
            status = Path(f"/proc/{process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status


@pytest.mark.root
def test_another_user_than_that_of_the_policy_is_named(directory: Path, others: ForOtherUsers) -> None:
    text = inherited(directory, others, uid=OTHER_UID)
    assert (
        f"user ids are ({OTHER_UID}, {OTHER_UID}, {OTHER_UID}, {OTHER_UID}), not {BROKER_UID} (User=)" in text
    )


@pytest.mark.root
def test_yaml_is_for_root_to_compile(directory: Path, others: ForOtherUsers) -> None:
    text = inherited(directory, others, file="policy.yaml")
    assert (
        "policy.yaml is for root to compile; let systemd do so before the start (ExecStartPre=+fdbroker"
        in text
    )


@pytest.mark.root
def test_sockets_can_not_be_made_by_a_service(directory: Path) -> None:
    prefix = [sys.executable, AS_A_SERVICE, str(BROKER_UID), "--"]
    done = run(directory / "policy.json", "--audit=none", f"--socket={directory}/run/s", prefix=prefix)
    assert done.returncode == 2
    assert "start as root; a service of systemd gets its sockets from .socket units" in done.stderr


@pytest.mark.root
def test_an_audit_file_can_not_be_opened_by_a_service(directory: Path) -> None:
    (directory / "audit").touch()
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        prefix = [sys.executable, AS_A_SERVICE, str(BROKER_UID), "--"]
        options = [f"--audit={directory}/audit", f"--inherited={theirs.fileno()}"]
        done = run(directory / "policy.json", *options, prefix=prefix, pass_fds=[theirs.fileno()])
    assert done.returncode == 2
    assert f"leaves audit.to out and sets StandardOutput=append:{directory}/audit" in done.stderr


def test_a_user_namespace_with_few_ids_is_recognised(in_child: Children) -> None:
    def child() -> str:
        namespaces.unshare(_CLONE_NEWUSER)
        with pytest.raises(LaunchError) as caught:
            check_user_namespace()
        return str(caught.value)

    assert "PrivateUsers=no" in in_child(child)


@pytest.mark.root
@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("landlock_create_ruleset", "EPERM", "landlock_create_ruleset is refused (Operation not permitted)"),
        ("memfd_create", "EPERM", "memfd_create is refused (Operation not permitted); SystemCallFilter="),
        # What RestrictSUIDSGID=yes does.
        ("openat2", "ENOSYS", "RestrictSUIDSGID= of systemd does: leave it off for this service"),
    ],
)
def test_a_filter_that_refuses_what_the_broker_needs_is_recognised(
    directory: Path, call: str, error: str, said: str
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        done = run(
            directory / "policy.json",
            "--audit=none",
            f"--inherited={theirs.fileno()}",
            prefix=[sys.executable, UNDER_A_FILTER, call, error, "--"],
            pass_fds=[theirs.fileno()],
        )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.root
def test_who_is_neither_root_nor_a_service_is_told_so(directory: Path, others: ForOtherUsers) -> None:
    done = run(
        directory / "policy.json",
        "--audit=none",
        prefix=["setpriv", f"--reuid={CLIENT_UID}", "--clear-groups"],
        python=others.python,
        env={"PYTHONPATH": str(others.directory)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fdbroker: only root can start the broker")


# As systemd does it, in a directory: what is hidden is covered by a directory of /run/systemd/inaccessible.
HIDE = """
set -e
cd {directory}
mount -t tmpfs none run
mkdir -p run/systemd/inaccessible/dir/alice
mount --bind home/alice kept
"""
COVER = "mount --bind run/systemd/inaccessible/dir home\n"
BIND_BACK = "mount --bind kept home/alice\n"
PRIVATE_TMP = """
mkdir -p systemd-private-760b-x.service-Su5/tmp/alice
mount --bind systemd-private-760b-x.service-Su5/tmp home
"""


def in_a_view(directory: Path, root: str, script: str) -> subprocess.CompletedProcess[str]:
    """Start fdbrokerd for one root, in a mount namespace where `script` was run; if it serves it ends."""
    for name in ("home/alice", "kept"):
        (directory / name).mkdir(parents=True)
    (directory / "policy.json").write_text(json.dumps(policy(directory / root)))
    script = HIDE.format(directory=directory) + script + 'cd /; exec "$@"'
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    ours.close()  # so it ends as soon as it serves
    with theirs:
        return run(
            directory / "policy.json",
            f"--audit={directory}/audit",
            f"--inherited={theirs.fileno()}",
            prefix=["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh"],
            pass_fds=[theirs.fileno()],
        )


HIDDEN = "is hidden from this service, as ProtectHome=yes or InaccessiblePaths= does at {}/home"


@pytest.mark.root
@pytest.mark.parametrize(
    ("root", "script", "said"),
    [
        ("home", COVER, HIDDEN),
        ("home/alice", COVER, HIDDEN),
        ("home/bob", COVER, HIDDEN),
        # Bound first and covered then: it can't be seen, although its mount is the deeper one.
        ("home/alice", BIND_BACK + COVER, HIDDEN),
        ("home", PRIVATE_TMP, "is another directory for this service, as PrivateTmp=yes does at {}/home"),
    ],
)
def test_a_root_that_a_unit_hides_is_recognised(directory: Path, root: str, script: str, said: str) -> None:
    done = in_a_view(directory, root, script)
    assert done.returncode == 2
    assert f"fdbroker: root 'tree' ({directory}/{root}) {said.format(directory)}; " in done.stderr


@pytest.mark.root
def test_a_root_that_is_bound_back_over_a_hidden_one_is_served(directory: Path) -> None:
    done = in_a_view(directory, "home/alice", COVER + BIND_BACK)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
def test_what_is_hidden_below_a_root_is_told_and_no_obstacle(directory: Path) -> None:
    done = in_a_view(directory, "", COVER)
    assert done.returncode == 0
    assert f"what is below {directory}/home is not served: the unit hides it" in done.stderr
