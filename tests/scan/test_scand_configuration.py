"""scand.yaml: what it says, and what is said of mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdbroker.config.errors import ConfigError
from fdbroker.launcher.errors import LaunchError
from fdbroker.scan.plugins import configure
from fdbroker.scan.service.configuration import Configuration, Limits, Listener, Tcp, read_configuration
from fdbroker.scan.service.main import limits_within, main
from tests.config.fake_lookups import FakeLookups

ROOT = Path(__file__).parents[2]


def read(text: str) -> Configuration:
    return read_configuration(text.encode(), "s.yaml", FakeLookups())


def test_a_configuration_may_say_nothing_but_its_version() -> None:
    configuration = read("version: 1")
    assert configuration.engines == (configure("hashes"),)
    assert configuration.listeners == {"scan": Listener()}
    assert configuration.workers == configuration.spare_workers >= 1
    assert configuration.may_renew == {0}


def test_everything_can_be_said() -> None:
    configuration = read("""
version: 1
broker: /run/b
listeners:
  a: {protocol: scan}
  b: {protocol: clamd}
  c:
    {protocol: clamd, max_stream: 5MiB, command_timeout: 1s, read_timeout: 2s, write_timeout: 1min,
      unscanned: found}
engines:
  libclamav: {max_file_size: 1MiB, accept: [encrypted]}
  command: {argv: [/bin/true, x], clean: [0]}
accept: [rar]
workers: 3
spare_workers: 0
files_per_worker: 7
timeout: 2min
max_size: 1GiB
max_copy: 1MiB
stream_memory: 2GiB
queue: {per_client: 10, total: 100}
check_databases: 5s
may_renew: {user: [app]}
may_stop: {user: [app]}
log: clamd
tcp: {address: '::1', port: 3310, connections: 5, max_stream: 6MiB, read_timeout: 4s}
""")
    assert configuration == Configuration(
        engines=(
            configure("libclamav", {"max_file_size": "1MiB", "accept": ["encrypted", "rar"]}),
            configure("command", {"argv": ["/bin/true", "x"], "clean": [0]}),
        ),
        broker="/run/b",
        listeners={
            "a": Listener("scan"),
            "b": Listener("clamd"),
            "c": Listener("clamd", 5 << 20, 1.0, 2.0, 60.0, "found"),
        },
        workers=3,
        spare_workers=0,
        files_per_worker=7,
        timeout=120.0,
        max_size=1 << 30,
        max_copy=1 << 20,
        stream_memory=2 << 30,
        limits=Limits(10, 100),
        check_databases=5.0,
        may_renew=frozenset({0, 113}),
        may_stop=frozenset({113}),
        log="clamd",
        tcp=Tcp("::1", 3310, 5, Listener("clamd", 6 << 20, read_timeout=4.0)),
    )
    assert read("version: 1\ntcp: {}").tcp == Tcp()


def test_the_example_says_what_is_usual() -> None:
    text = (ROOT / "config" / "scand.yaml").read_text()
    assert read(text) == read("version: 1")
    written_out = text.partition("# The defaults, written out:\n#\n")[2].replace("# ", "", 1)
    lines = [line.removeprefix("# ") for line in written_out.splitlines()]
    usual = read("version: 1\n" + "\n".join(lines).replace("user: [root]", "user: ['0']"))
    assert usual._replace(workers=1, spare_workers=1, max_size=None) == read("version: 1")._replace(
        workers=1, spare_workers=1
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("worker: 1", "2:1: unknown key 'worker'; did you mean 'workers'?"),
        ("workers: 0", "2:10: workers: 0 is out of bounds; write one from 1 to 256"),
        ("workers: yes", "2:10: workers: 'yes' is not a number; write decimal digits only, as in 512"),
        ("timeout: 5", "2:10: timeout: '5' is not a duration; write digits with a unit: 30s, 5min, 2h or 7d"),
        (
            "engines: {libclamv: {}}",
            "2:11: there is no engine 'libclamv'; did you mean 'libclamav'?",
        ),
        (
            "engines: {hashes: {list: /x}}",
            "2:11: engine hashes: there is no option 'list'; did you mean 'lists'?",
        ),
        ("accept: [rar]", "2:10: accept: no engine here looks into containers; remove it, or add libclamav"),
        (
            "listeners: {scan: {protocol: ftp}}",
            "2:30: listeners: scan: protocol: 'ftp' is not a choice here; write clamd or scan",
        ),
        (
            "listeners: {clamd: {protocol: clam, max_stream: 5MiB, read_timeout: 2s, unscanned: ok}}",
            "2:31: listeners: clamd: protocol: 'clam' is not a choice here; did you mean 'clamd'?",
        ),
        (
            "listeners: {clamd: {max_stream: 5MiB, read_timeout: 2s}}",
            "2:20: listeners: clamd: key 'protocol' is missing; add 'protocol: ...'",
        ),
        (
            "listeners: {scan: {protocol: scan, max_stream: 1MiB}}",
            "2:36: listeners: scan: max_stream: it is for the protocol clamd; remove it",
        ),
        (
            "tcp: {address: 0.0.0.0}",
            (
                "2:16: tcp: address: '0.0.0.0' is no loopback address, and nobody is asked who they are;"
                " write 127.0.0.1 or ::1"
            ),
        ),
        ("tcp: {address: local}", "2:16: tcp: address: 'local' is no address; write 127.0.0.1 or ::1"),
        ("tcp: {port: 0}", "2:13: tcp: port: 0 is out of bounds; write one from 1 to 65535"),
        (
            "tcp: {ports: 3310}",
            "2:7: tcp: unknown key 'ports'; did you mean 'port'?",
        ),
        ("may_renew: {user: nobody-known}", None),
        (
            "engines: {hashes: {lists: [bad.sha256]}}",
            "2:11: engine hashes: lists[0]: 'bad.sha256' is not an absolute path, as in /srv/x; SEE",
        ),
        ("engines: {}", "2:10: engines is empty; write names with options, as in 'libclamav: {}'"),
    ],
)
def test_a_mistake_is_shown_with_place_reason_and_cure(text: str, problem: str | None) -> None:
    with pytest.raises(ConfigError) as raised:
        read("version: 1\n" + text)
    [told] = map(str, raised.value.problems)
    if problem is not None:
        assert told == f"s.yaml:{problem}".replace("SEE", "see docs/scanning.md for its options")


def test_what_may_wait_follows_from_the_descriptors_that_there_may_be() -> None:
    configuration = Configuration((), workers=2, spare_workers=2)
    assert limits_within(configuration, 1 << 20) == Limits()
    assert limits_within(configuration, 2048) == Limits(256, 2048 - 64 - 16 - 1024 - 4 * 128)
    with_port = configuration._replace(tcp=Tcp(connections=10))
    assert limits_within(with_port, 2048).total == limits_within(configuration, 2048).total - 10 * 3
    with pytest.raises(LaunchError, match="too few for 4 workers; raise LimitNOFILE="):
        limits_within(configuration, 1024)


@pytest.mark.root
def test_it_does_not_run_as_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "it does not run as root" in capsys.readouterr().err


def test_a_configuration_is_checked_by_whoever_may_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scand.yaml"
    path.write_text("version: 1\nworker: 1\n")
    assert main(["--check", "--dev", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"{path}:2:1: unknown key 'worker'; did you mean 'workers'?\n"
    path.write_text("version: 1\n")
    assert main(["--check", "--dev", "--config", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no problems\n"


def test_each_key_is_documented() -> None:
    text = (ROOT / "docs" / "scand.md").read_text()
    for name in {*Configuration._fields, *Listener._fields[1:], *Tcp._fields[:-1]} - {
        "openings"
    }:  # that follows from others
        assert f"| `{'queue' if name == 'limits' else name}` |" in text
