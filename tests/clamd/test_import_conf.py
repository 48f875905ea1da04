"""What becomes of a clamd.conf: each option of the installed clamd is known, what is written can be read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.clamd.import_conf import RULES, Finding, Outcome, as_text, as_yaml, import_conf
from fdbroker.config.scalars import parse_count, parse_duration, parse_size
from fdbroker.scan.options import values_of_words
from fdbroker.scan.plugins import configure, options_type
from fdbroker.scan.service.configuration import Listener, read_configuration
from fdbroker.scan.service.main import main
from tests.config.fake_lookups import FakeLookups

PARSERS = {
    "max_file_size": parse_size,
    "max_scan_size": parse_size,
    "max_stream": parse_size,
    "max_recursion": parse_count,
    "max_files": parse_count,
    "workers": parse_count,
    "total": parse_count,
    "port": parse_count,
    "max_scan_time": parse_duration,
    "command_timeout": parse_duration,
    "read_timeout": parse_duration,
    "check_databases": parse_duration,
}


def every_option() -> str:
    """Return a clamd.conf with each option that the installed clamd knows, as its own tool writes it."""
    command = ["clamconf", "--generate-config=clamd.conf"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Options that it has no value for stand there with none; comments have several words.
    lines = re.findall(r"^#?([A-Z][A-Za-z0-9]+ \S+)$", text, re.MULTILINE)
    return "\n".join(lines)


def only(text: str) -> Finding:
    [finding] = import_conf(text.encode()).findings
    return finding


def test_each_option_that_clamd_has_is_known() -> None:
    text = every_option()
    assert len(text.splitlines()) > 110
    wrong = [finding for finding in import_conf(text.encode()).findings if finding.outcome is Outcome.WRONG]
    assert not wrong
    manual = subprocess.run(["man", "clamd.conf"], capture_output=True, text=True, check=True).stdout
    kinds = "BOOL|STRING|SIZE|NUMBER|REGEX|COMMAND|CATEGORY"
    options = set(
        re.findall(rf"^ {{7}}([A-Z]\w+)(?: (?:{kinds}))?$", re.sub(".\b", "", manual), re.MULTILINE)
    )
    assert len(options) > 100
    assert options - {"Example"} <= RULES.keys()


def test_debians_own_file_is_understood() -> None:
    imported = import_conf(Path("/etc/clamav/clamd.conf").read_bytes())
    assert not [finding for finding in imported.findings if finding.outcome is Outcome.WRONG]
    assert imported.values["engines", "libclamav", "max_file_size"] == "25MiB"
    assert imported.values["listeners", "clamd", "max_stream"] == "25MiB"


def test_what_is_written_is_yaml_that_the_service_can_read() -> None:
    imported = import_conf(every_option().encode())
    tree = yaml.safe_load(as_yaml(imported))
    assert tree["version"] == 1
    assert tree["listeners"]["clamd"]["protocol"] == "clamd"
    for path, value in imported.values.items():
        found = tree
        for name in path:
            found = found[name]
        assert str(found).casefold() == value.casefold()
        if path[-1] in PARSERS:
            PARSERS[path[-1]](value)
    of_engine = {path: value for path, value in imported.values.items() if path[0] == "engines"}
    words = [(path[2], value) for path, value in of_engine.items()]
    configure("libclamav", values_of_words(options_type("libclamav"), words, where="here"))


@pytest.mark.parametrize(
    ("line", "outcome", "text"),
    [
        ("MaxFileSize 25M", Outcome.TRANSLATED, "engines.libclamav.max_file_size: 25MiB"),
        ("MaxFileSize 1025", Outcome.TRANSLATED, "engines.libclamav.max_file_size: 1025"),
        ("MaxScanSize 9000m", Outcome.TRANSLATED, "engines.libclamav.max_scan_size: 4294967295"),
        ("MaxScanTime 1500", Outcome.TRANSLATED, "engines.libclamav.max_scan_time: 2s"),
        ("StreamMaxLength 100k", Outcome.TRANSLATED, "listeners.clamd.max_stream: 100KiB"),
        ("MaxFileSize 0", Outcome.DIFFERENT, "0 is no limit there"),
        ("MaxFileSize big", Outcome.WRONG, "a size is needed"),
        ("MaxThreads -1", Outcome.WRONG, "a number is needed"),
        ("DetectPUA YES", Outcome.TRANSLATED, "engines.libclamav.possibly_unwanted: true"),
        ("DetectPUA maybe", Outcome.WRONG, "yes or no"),
        ("ScanPE", Outcome.WRONG, "its value is missing"),
        ("Example", Outcome.WRONG, "clamd does not start"),
        ("scanpe yes", Outcome.WRONG, "no option of clamd"),
        ("AlertExceedsMax yes", Outcome.DIFFERENT, "with `unscanned: found` it is found"),
        ("BlockMax no", Outcome.DIFFERENT, "with `unscanned: ok` it is OK"),
        ("VirusEvent /bin/x", Outcome.MISSING, "nothing is run"),
        ("OnAccessIncludePath /home", Outcome.CLIENTS, "clamonacc"),
        ("StreamMinPort 1024", Outcome.OBSOLETE, "STREAM"),
        ("TCPSocket 3310", Outcome.TRANSLATED, "tcp.port: 3310 (PING, VERSION, INSTREAM; its unit"),
        ("TCPSocket 70000", Outcome.WRONG, "a port is needed"),
        ("TCPAddr 127.0.0.1", Outcome.ANYWAY, "without TCPSocket there is no port"),
        ("User clamav", Outcome.ELSEWHERE, "unit"),
    ],
)
def test_an_option_has_its_outcome(line: str, outcome: Outcome, text: str) -> None:
    finding = only(line)
    assert finding.outcome is outcome
    assert text in finding.text


def test_of_two_the_first_counts_as_in_clamd() -> None:
    imported = import_conf(b'# a comment\n\n  StreamMaxLength "1M"\r\nStreamMaxLength 2M\n')
    assert imported.values == {("listeners", "clamd", "max_stream"): "1MiB"}
    assert [(one.line, one.outcome) for one in imported.findings] == [
        (3, Outcome.TRANSLATED),
        (4, Outcome.WRONG),
    ]


def test_a_port_is_one_of_the_loopback() -> None:
    imported = import_conf(b"TCPAddr 192.0.2.1\nTCPSocket 3310\n")
    assert imported.values == {("tcp", "address"): "127.0.0.1", ("tcp", "port"): "3310"}
    assert "tcp.address: 127.0.0.1 (of this machine's loopback alone)" in as_text(imported)


def test_the_report_begins_with_what_needs_a_look() -> None:
    imported = import_conf(b"ScanPE yes\nMaxFileSize 1M\nDatabaseDirectory /a\x1b[1m\nNoSuch 1\nScanELF 1\n")
    needs_a_look = (
        "wrong:\n"
        "  4: NoSuch: it is no option of clamd 1.4\n"
        "translated:\n"
        "  2: MaxFileSize: engines.libclamav.max_file_size: 1MiB\n"
        "  3: DatabaseDirectory: engines.libclamav.database: /a?[1m\n"
    )
    assert as_text(imported) == f"{needs_a_look}so anyway: 2 more (--verbose lists them)\n"
    assert as_text(imported, verbose=True) == (
        f"{needs_a_look}so anyway:\n"
        "  1: ScanPE: libclamav looks into it\n"
        "  5: ScanELF: libclamav looks into it\n"
    )
    assert as_text(import_conf(b"")) == ""


@given(
    text=st.lists(
        st.one_of(st.sampled_from(sorted(RULES)), st.sampled_from([" ", "\n", '"', "yes"]), st.text())
    )
)
def test_any_text_is_imported_and_what_comes_of_it_is_yaml(text: list[str]) -> None:
    imported = import_conf("".join(text).encode("utf-8", "surrogatepass"))
    yaml.safe_load(as_yaml(imported))
    said = as_text(imported, verbose=True)
    assert said.isascii() or said.replace("\n", "").isprintable()


def test_the_command_writes_a_configuration_that_the_service_takes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "clamd.conf"
    conf.write_text(
        "LocalSocket /run/clamav/clamd.ctl\nMaxThreads 20\nStreamMaxLength 25M\nReadTimeout 180\n"
        "CommandReadTimeout 30\nMaxQueue 200\nSelfCheck 600\nMaxFileSize 25M\n"
    )
    assert main(["import-clamd-conf", str(conf)]) == 0
    said = capfd.readouterr()
    configuration = read_configuration(said.out.encode(), "scand.yaml", FakeLookups())
    assert configuration.listeners == {"clamd": Listener("clamd", 25 << 20, 30.0, 180.0)}
    assert (configuration.workers, configuration.limits.total) == (20, 200)
    assert "  2: MaxThreads: workers: 20 (processes, so many for one user;" in said.err
    assert "elsewhere:\n  1: LocalSocket:" in said.err


def test_what_holds_anyway_is_counted_unless_it_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "clamd.conf"
    conf.write_text("ScanPE yes\n")
    assert main(["import-clamd-conf", str(conf)]) == 0
    assert capfd.readouterr().err == "so anyway: 1 more (--verbose lists them)\n"
    assert main(["import-clamd-conf", "-v", str(conf)]) == 0
    assert capfd.readouterr().err == "so anyway:\n  1: ScanPE: libclamav looks into it\n"


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["import-clamd-conf", str(tmp_path / "none")]) == 2
    assert f"{tmp_path}/none: No such file or directory" in capfd.readouterr().err
