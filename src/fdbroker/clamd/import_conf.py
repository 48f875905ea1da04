"""Reads a clamd.conf and says what of it scand.yaml has, what holds without it, and what there is not.

Pure: text in, findings and text out. Every option of clamd 1.4 is in `RULES`, so
that nothing is passed over: what is not there is none of clamd's.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Path = tuple[str, ...]


class Outcome(StrEnum):
    """What becomes of an option."""

    TRANSLATED = "translated"
    ANYWAY = "so anyway"  # it is what happens without any option
    DIFFERENT = "different"  # it is done otherwise, and how
    ELSEWHERE = "elsewhere"  # who decides it is not the scan service
    MISSING = "missing"  # there is nothing like it
    OBSOLETE = "obsolete"  # it has no meaning in clamd either
    CLIENTS = "for clients"  # clamonacc and clamdscan read it from clamd.conf, which they keep
    WRONG = "wrong"  # clamd would not start with it


class Finding(NamedTuple):
    """What becomes of one line. `key`: where its value stands in scand.yaml, if it does."""

    line: int
    option: str
    value: str
    outcome: Outcome
    text: str
    key: Path = ()


class Imported(NamedTuple):
    """What a clamd.conf comes to: values of scand.yaml as text, by key, and a finding for each line."""

    values: dict[Path, str]
    findings: list[Finding]


class Rule(NamedTuple):
    """What an option means here. With `off`, the option is yes or no, and `off` is for no."""

    outcome: Outcome
    text: str
    off: tuple[Outcome, str] | None = None
    key: Path = ()
    convert: Callable[[str], str | None] | None = None


class _WrongValueError(ValueError):
    pass


_CLAMD = ("listeners", "clamd")
_LIBCLAMAV = ("engines", "libclamav")
_PORT, _ADDRESS = ("tcp", "port"), ("tcp", "address")
_YES = frozenset({"yes", "true", "1"})
_NO = frozenset({"no", "false", "0"})
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
# What clamd takes for more.
_MOST_BYTES = (1 << 32) - 1
_MOST_PORT = 65535


def _count(text: str) -> str | None:
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise _WrongValueError("a number is needed")
    return str(int(text)) if int(text) else None


def _size(text: str) -> str | None:
    match = re.fullmatch(r"([0-9]{1,12})([kKmM]?)", text)
    if not match:
        raise _WrongValueError("a size is needed, as 100M")
    size = min(int(match[1]) * _UNITS[match[2].lower()], _MOST_BYTES)
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size) if size else None


def _port(text: str) -> str | None:
    count = _count(text)
    if count is None or int(count) > _MOST_PORT:
        raise _WrongValueError("a port is needed, as 3310")
    return count


def _loopback(text: str) -> str:
    return text if text in {"127.0.0.1", "::1"} else "127.0.0.1"


def _seconds(text: str) -> str | None:
    count = _count(text)
    return f"{count}s" if count else None


def _milliseconds(text: str) -> str | None:
    count = _count(text)
    return f"{-(-int(count) // 1000)}s" if count else None


def _is_yes(text: str) -> bool:
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise _WrongValueError("yes or no is needed")


def _sets(key: Path, convert: Callable[[str], str | None], text: str = "") -> Rule:
    return Rule(Outcome.TRANSLATED, text, key=key, convert=convert)


def _always(what: str) -> Rule:
    """Return the rule of what can't be turned off."""
    return Rule(Outcome.ANYWAY, what, (Outcome.DIFFERENT, f"{what}, always"))


def _never(what: str) -> Rule:
    """Return the rule of what can't be turned on."""
    return Rule(Outcome.MISSING, what, (Outcome.ANYWAY, what))


def _all(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_LOG = Rule(
    Outcome.ELSEWHERE,
    "the service writes to standard error, which systemd takes; with `log: clamd` in clamd's format",
)
_LOG_SWITCH = _LOG._replace(off=(Outcome.ANYWAY, _LOG.text))
_LOOKED_INTO = _always("libclamav looks into it")
_LIBRARY_DEFAULT = Rule(Outcome.MISSING, "libclamav's own limit holds")
_LIBRARY_CHOICE = Rule(Outcome.MISSING, "libclamav's own choice holds")
_HEURISTIC = Rule(
    Outcome.MISSING, "this alert of libclamav is not raised", (Outcome.ANYWAY, "this alert is not raised")
)
_SANDBOX = "a worker unpacks into a directory of its own, in memory, that ends with it"
_POLICY = "the broker's policy says which files may be opened"
_FREE = Rule(Outcome.OBSOLETE, "clamd itself does not have it any more")
_CLIENT = Rule(Outcome.CLIENTS, "clamonacc reads it from its own configuration file, which stays")

RULES: dict[str, Rule] = {
    "MaxFileSize": _sets((*_LIBCLAMAV, "max_file_size"), _size),
    "MaxScanSize": _sets((*_LIBCLAMAV, "max_scan_size"), _size),
    "MaxRecursion": _sets((*_LIBCLAMAV, "max_recursion"), _count),
    "MaxFiles": _sets((*_LIBCLAMAV, "max_files"), _count),
    "MaxScanTime": _sets((*_LIBCLAMAV, "max_scan_time"), _milliseconds),
    "DatabaseDirectory": _sets((*_LIBCLAMAV, "database"), lambda text: text),
    "DetectPUA": _sets((*_LIBCLAMAV, "possibly_unwanted"), lambda text: "true" if _is_yes(text) else "false"),
    "StreamMaxLength": _sets((*_CLAMD, "max_stream"), _size),
    "CommandReadTimeout": _sets((*_CLAMD, "command_timeout"), _seconds),
    "ReadTimeout": _sets((*_CLAMD, "read_timeout"), _seconds),
    "MaxThreads": _sets(("workers",), _count, "processes, so many for one user; clamd's are for all"),
    "MaxQueue": _sets(("queue", "total"), _count),
    "SelfCheck": _sets(("check_databases",), _seconds),
    # What is said and written.
    **_all("LogFile LogFileMaxSize LogFacility", _LOG),
    **_all("LogFileUnlock LogTime LogSyslog LogVerbose LogRotate", _LOG_SWITCH),
    "LogClean": _never("clean files are counted, not logged"),
    "ExtendedDetectionInfo": _never("size and hash are not logged"),
    "PidFile": Rule(Outcome.ELSEWHERE, "systemd knows its process"),
    "Debug": _never("libclamav's debugging messages are not shown"),
    "LeaveTemporaryFiles": _never(_SANDBOX),
    "GenerateMetadataJson": _never("no metadata are written"),
    "ForceToDisk": _never(_SANDBOX),
    "TemporaryDirectory": Rule(Outcome.ANYWAY, _SANDBOX),
    **_all("PreludeAnalyzerName", Rule(Outcome.MISSING, "there is no Prelude")),
    "PreludeEnable": _never("there is no Prelude"),
    "VirusEvent": Rule(Outcome.MISSING, "nothing is run when something is found; the log tells of it"),
    # Who may connect.
    "LocalSocket": Rule(Outcome.ELSEWHERE, "the listener of the broker's policy; clients need its path"),
    **_all(
        "LocalSocketGroup LocalSocketMode",
        Rule(Outcome.ELSEWHERE, "group and mode of the policy's listener"),
    ),
    "FixStaleSocket": _always("a socket that nobody listens on is replaced"),
    "TCPSocket": _sets(
        _PORT, _port, "PING, VERSION, INSTREAM; its unit has no network: fdbroker-clamd-tcp.socket"
    ),
    "TCPAddr": _sets(_ADDRESS, _loopback, "of this machine's loopback alone"),
    "MaxConnectionQueueLength": Rule(Outcome.ANYWAY, "the kernel's own limit holds"),
    "SendBufTimeout": Rule(Outcome.ANYWAY, "who reads slowly delays nobody else"),
    "IdleTimeout": Rule(Outcome.ANYWAY, "spare workers are kept as the service needs them"),
    "User": Rule(Outcome.ELSEWHERE, "the unit's user; it needs no right to the files"),
    "AllowAllMatchScan": Rule(
        Outcome.ANYWAY, "it is answered", (Outcome.DIFFERENT, "ALLMATCHSCAN is answered, always")
    ),
    "Foreground": Rule(
        Outcome.ANYWAY,
        "it stays in the foreground",
        (Outcome.DIFFERENT, "it stays in the foreground, for systemd"),
    ),
    "ExitOnOOM": Rule(
        Outcome.DIFFERENT, "a worker that runs out of memory is replaced; its file is an error", None
    ),
    "ConcurrentDatabaseReload": _always("databases are loaded beside those that scan"),
    # What is scanned.
    "ExcludePath": Rule(Outcome.ELSEWHERE, f"{_POLICY}: `except`, by globs"),
    "MaxDirectoryRecursion": Rule(Outcome.ELSEWHERE, "the policy says which directories may be listed"),
    **_all(
        "FollowDirectorySymlinks FollowFileSymlinks",
        Rule(
            Outcome.ELSEWHERE,
            "the policy's `symlinks`",
            (Outcome.ANYWAY, "links are followed where the policy says `symlinks`"),
        ),
    ),
    "CrossFilesystems": Rule(
        Outcome.ELSEWHERE,
        "the policy's `cross_mounts` of each root",
        (Outcome.ANYWAY, "mounts are crossed where the policy says `cross_mounts`"),
    ),
    # What libclamav does.
    "OfficialDatabaseOnly": _never("every signature of the directory is loaded"),
    "FailIfCvdOlderThan": Rule(Outcome.MISSING, "the age of the databases is not looked at"),
    "DisableCache": Rule(
        Outcome.ANYWAY, "ClamAV's cache is not used", (Outcome.DIFFERENT, "ClamAV's cache is not used")
    ),
    "CacheSize": Rule(Outcome.ANYWAY, "ClamAV's cache is not used"),
    "Bytecode": _always("bytecode signatures are loaded"),
    **_all("BytecodeSecurity BytecodeTimeout BytecodeMode", _LIBRARY_CHOICE),
    "BytecodeUnsigned": _never("unsigned bytecode is not loaded"),
    **_all("ExcludePUA IncludePUA", Rule(Outcome.MISSING, "possibly_unwanted has no categories")),
    "HeuristicAlerts": _always("heuristic alerts are raised"),
    "HeuristicScanPrecedence": Rule(
        Outcome.DIFFERENT, "all names that match are told", (Outcome.ANYWAY, "all names that match are told")
    ),
    **_all(
        "ScanPE ScanELF ScanMail ScanHTML ScanOLE2 ScanPDF ScanSWF ScanXMLDOCS ScanHWP3 ScanOneNote"
        " ScanArchive ScanImage ScanImageFuzzyHash PhishingSignatures PhishingScanURLs",
        _LOOKED_INTO,
    ),
    "ScanPartialMessages": _never("parts of several mails are not put together"),
    "AlertExceedsMax": Rule(
        Outcome.DIFFERENT,
        "what exceeds a limit is an error; with `unscanned: found` it is found, as by clamd",
        (Outcome.DIFFERENT, "what exceeds a limit is an error; with `unscanned: ok` it is OK, as for clamd"),
    ),
    **_all(
        "AlertEncrypted AlertEncryptedArchive AlertEncryptedDoc",
        Rule(
            Outcome.DIFFERENT,
            "what is encrypted is an error; with `unscanned: found` it is found, as by clamd",
            (
                Outcome.DIFFERENT,
                "what is encrypted is an error; with `accept: [encrypted]` or `unscanned: ok` it is OK",
            ),
        ),
    ),
    **_all(
        "AlertBrokenExecutables AlertBrokenMedia AlertOLE2Macros AlertPhishingSSLMismatch AlertPhishingCloak"
        " AlertPartitionIntersection StructuredDataDetection StructuredCCOnly StructuredSSNFormatNormal"
        " StructuredSSNFormatStripped",
        _HEURISTIC,
    ),
    **_all(
        "StructuredMinCreditCardCount StructuredMinSSNCount",
        Rule(Outcome.MISSING, "structured data are not looked for"),
    ),
    "DisableCertCheck": _never("certificates of executables are looked at"),
    **_all(
        "MaxEmbeddedPE MaxHTMLNormalize MaxHTMLNoTags MaxScriptNormalize MaxZipTypeRcg MaxPartitions"
        " MaxIconsPE MaxRecHWP3 PCREMatchLimit PCRERecMatchLimit PCREMaxFileSize",
        _LIBRARY_DEFAULT,
    ),
    # Of clients.
    **_all(
        "OnAccessMountPath OnAccessIncludePath OnAccessExcludePath OnAccessExcludeRootUID"
        " OnAccessExcludeUID OnAccessExcludeUname OnAccessMaxFileSize OnAccessDisableDDD"
        " OnAccessPrevention OnAccessExtraScanning OnAccessCurlTimeout OnAccessMaxThreads"
        " OnAccessRetryAttempts OnAccessDenyOnError",
        _CLIENT,
    ),
    # What clamd still reads, or once did.
    **_all(
        "StreamMinPort StreamMaxPort",
        Rule(Outcome.OBSOLETE, "they are of the command STREAM, which clamd no longer has"),
    ),
    **_all(
        "AllowSupplementaryGroups ScanOnAccess MailFollowURLs MailMaxRecursion SafeBrowsing ArchiveMaxFiles"
        " ArchiveMaxRecursion ArchiveMaxScanSize ArchiveMaxCompressionRatio ArchiveLimitMemoryUsage"
        " ArchiveBlockMax DevACOnly DevACDepth DevLiblog DevPerformance",
        _FREE,
    ),
}
_TWICE = "it was said before, and that counts"
# Older names, which clamd still takes.
_RENAMED = {
    "AlgorithmicDetection": "HeuristicAlerts",
    "BlockMax": "AlertExceedsMax",
    "ArchiveBlockEncrypted": "AlertEncrypted",
    "DetectBrokenExecutables": "AlertBrokenExecutables",
    "OLE2BlockMacros": "AlertOLE2Macros",
    "PartitionIntersection": "AlertPartitionIntersection",
    "PhishingAlwaysBlockCloak": "AlertPhishingCloak",
    "PhishingAlwaysBlockSSLMismatch": "AlertPhishingSSLMismatch",
}
RULES |= {old: RULES[new] for old, new in _RENAMED.items()}


def import_conf(text: bytes) -> Imported:
    """Return what a clamd.conf comes to. Of an option that is there twice the first counts, as in clamd."""
    values: dict[Path, str] = {}
    findings: list[Finding] = []
    for number, raw in enumerate(text.decode("utf-8", "backslashreplace").split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        option, _, value = line.partition(" ")
        finding = _found(number, option, _unquoted(value.strip()))
        if finding.key and finding.value:
            if finding.key in values:
                finding = finding._replace(outcome=Outcome.WRONG, text=_TWICE, key=())
            else:
                values[finding.key] = finding.value
        findings.append(finding)
    if _ADDRESS in values and _PORT not in values:
        del values[_ADDRESS]
        findings = [
            one._replace(outcome=Outcome.ANYWAY, text="without TCPSocket there is no port", key=())
            if one.key == _ADDRESS
            else one
            for one in findings
        ]
    return Imported(values, findings)


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


def _found(line: int, option: str, value: str) -> Finding:
    """Return what becomes of an option. A finding with a key has the value for scand.yaml."""
    wrong = Finding(line, option, value, Outcome.WRONG, "")
    if option == "Example":
        return wrong._replace(text="clamd does not start while this line is there")
    rule = RULES.get(option)
    if rule is None:
        return wrong._replace(text="it is no option of clamd 1.4")
    if not value:
        return wrong._replace(text="its value is missing")
    try:
        if rule.convert:
            converted = rule.convert(value)
            if converted is None:
                text = "0 is no limit there; here there always is one, and the usual one holds"
                return wrong._replace(outcome=Outcome.DIFFERENT, text=text)
            key = ".".join(rule.key)
            text = f"{key}: {converted}" + (f" ({rule.text})" if rule.text else "")
            return Finding(line, option, converted, Outcome.TRANSLATED, text, rule.key)
        outcome, text = rule.outcome, rule.text
        if rule.off and not _is_yes(value):
            outcome, text = rule.off
    except _WrongValueError as error:
        return wrong._replace(text=str(error))
    return Finding(line, option, value, outcome, text)


def as_yaml(imported: Imported) -> str:
    """Return a scand.yaml of what was translated: engine libclamav, and a listener for clamd's clients."""
    tree: dict[str, object] = {"version": "1"}
    _put(tree, _LIBCLAMAV, {})
    _put(tree, (*_CLAMD, "protocol"), "clamd")
    for path, value in imported.values.items():
        _put(tree, path, value)
    return "\n".join(_lines(tree, "")) + "\n"


def _put(tree: dict[str, object], path: Path, value: object) -> None:
    for name in path[:-1]:
        below = tree.setdefault(name, {})
        assert isinstance(below, dict)  # noqa: S101 - no key is both a value and a mapping
        tree = below
    tree[path[-1]] = value


def _lines(tree: dict[str, object], indent: str) -> Iterable[str]:
    for name, value in tree.items():
        if not isinstance(value, dict):
            yield f"{indent}{name}: {_scalar(str(value))}"
        elif value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {{}}"


def _scalar(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9/][A-Za-z0-9/._-]*", text):
        return text
    plain = text.isprintable() and '"' not in text and "\\" not in text
    return f'"{text}"' if plain else json.dumps(text)


def as_text(imported: Imported, *, verbose: bool = False) -> str:
    """Return what becomes of each line, by outcome: what needs a look first, what holds anyway last.

    Of what holds anyway only how many they are, unless `verbose`: they are most of a usual file.
    """
    order = [
        Outcome.WRONG,
        Outcome.MISSING,
        Outcome.DIFFERENT,
        Outcome.ELSEWHERE,
        Outcome.CLIENTS,
        Outcome.TRANSLATED,
        Outcome.OBSOLETE,
        Outcome.ANYWAY,
    ]
    lines = []
    for outcome in order:
        found = [finding for finding in imported.findings if finding.outcome is outcome]
        if outcome is Outcome.ANYWAY and found and not verbose:
            lines.append(f"{outcome}: {len(found)} more (--verbose lists them)")
        elif found:
            lines.append(f"{outcome}:")
            lines += [f"  {one.line}: {shown(one.option)}: {shown(one.text)}" for one in found]
    return "\n".join(lines) + "\n" if lines else ""


def shown(text: str) -> str:
    """Return text with what is not printable as `?`, so that a line of the file can't forge one here."""
    return "".join(one if one.isprintable() else "?" for one in text)
