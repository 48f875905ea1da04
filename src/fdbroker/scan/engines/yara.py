"""`yara-x`: YARA rules, compiled before the worker is locked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import yara_x

from fdbroker.scan.engine import MEBIBYTE, EngineError, Inside, Needs, shown
from fdbroker.scan.options import Bytes
from fdbroker.scan.reading import chunks, wrong_size
from fdbroker.scan.verdict import Clean, Error, Reason, Verdict, found

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class YaraXOptions:
    """`rules`: files with rules, or directories whose `*.yar` and `*.yara` are taken.

    `max_file_size`: larger files are errors, since the engine wants the whole file in memory. A match of any
    rule is a finding of that name; `private` rules are not named.
    """

    rules: tuple[bytes, ...]
    max_file_size: Bytes = 256 * MEBIBYTE

    def __post_init__(self) -> None:
        """Refuse what finds nothing."""
        if not self.rules:
            raise ValueError("rules: at least one file or directory of rules is needed")


class YaraX(Inside):
    """Matches rules against whole files in memory."""

    name = "yara-x"
    options_type = YaraXOptions
    options: YaraXOptions

    def __init__(self, options: YaraXOptions) -> None:
        super().__init__(options)
        self._scanner: yara_x.Scanner | None = None
        self._rules = 0
        self._release = ""

    def needs(self) -> Needs:
        """Return the memory for the largest file, twice while it is read, and that machine code was made."""
        return Needs(jit=True, memory=2 * self.options.max_file_size + 256 * MEBIBYTE)

    def databases(self) -> Sequence[bytes]:
        """Return the files and directories of rules."""
        return self.options.rules

    def warm(self) -> None:
        """Compile the rules, and scan once what uses each part of the engine."""
        compiler = yara_x.Compiler()
        # What is read is what was named: a rule must not bring in other files.
        compiler.enable_includes(False)  # noqa: FBT003 - it has no name
        for path in _files(self.options.rules):
            origin = shown(path)
            try:
                with open(path, "rb") as file:
                    source = file.read().decode("utf-8")
                # Rules of two files may have one name.
                compiler.new_namespace(origin)
                compiler.add_source(source, origin=origin)
            except OSError as error:
                raise EngineError(f"rules: {origin}: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise EngineError(f"rules: {origin}: not UTF-8") from error
            except yara_x.CompileError as error:
                raise EngineError(f"rules: {origin}: {error}") from error
        rules = compiler.build()
        self._rules = sum(1 for _rule in rules)
        if not self._rules:
            raise EngineError("rules: there is none in what was named")
        self._release = metadata.version("yara-x")
        # No set_timeout: it starts a thread. Whoever keeps the worker has a clock.
        self._scanner = yara_x.Scanner(rules)
        for data in (b"", b"text", b"\x7fELF" + bytes(60), b"MZ" + bytes(62)):
            self._scanner.scan(data)

    def version(self) -> str:
        """Return how many rules there are."""
        return f"yara-x {self._release}, {self._rules} rules"

    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:  # noqa: ARG002 - it needs none
        """Read the file into memory and match the rules."""
        if self._scanner is None:
            return Error(Reason.NOT_LOADED, "the rules were not compiled")
        if size > self.options.max_file_size:
            return Error(Reason.TOO_LARGE, f"{size} bytes are more than max_file_size")
        data = b"".join(chunks(descriptor, size))
        if (wrong := wrong_size(len(data), size)) is not None:
            return wrong
        try:
            results = self._scanner.scan(data)
        except yara_x.TimeoutError as error:
            return Error(Reason.TIMED_OUT, f"yara-x: {error}")
        except yara_x.ScanError as error:
            return Error(Reason.ENGINE_FAILED, f"yara-x: {error}")
        names = [rule.identifier for rule in results.matching_rules]
        return found(names) if names else Clean()


def _files(paths: Sequence[bytes]) -> list[bytes]:
    files = []
    for path in paths:
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            files += [os.path.join(path, name) for name in names if name.endswith((b".yar", b".yara"))]
        else:
            files.append(path)
    return files
