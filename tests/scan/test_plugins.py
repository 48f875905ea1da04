"""Engines by name, and their options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.scan.engine import EngineError, Needs, combined
from fdbroker.scan.engines.yara import YaraX, YaraXOptions
from fdbroker.scan.options import Bytes, OptionsError, Seconds, read_options
from fdbroker.scan.plugins import BUILT_IN, Configured, configure, from_json, make, to_json
from fdbroker.scan.stamps import Databases
from fdbroker.scan.verdict import Clean, Error, Infected, Reason
from tests.scan.descriptors import make_and_open

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Options:
    path: bytes
    size: Bytes = 1
    time: Seconds = 1.0
    count: int = 0
    text: str | None = None
    on: bool = False
    how: Literal["one", "two"] = "one"
    names: tuple[str, ...] = ()
    paths: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("count: not 13")


@pytest.mark.parametrize(
    ("given_", "read"),
    [
        ({}, {}),
        ({"size": "4KiB"}, {"size": 4096}),
        ({"size": 4096}, {"size": 4096}),
        ({"time": "2min"}, {"time": 120.0}),
        ({"time": 2}, {"time": 2.0}),
        ({"time": 0.5}, {"time": 0.5}),
        ({"text": None}, {"text": None}),
        ({"text": "x", "on": True, "how": "two"}, {"text": "x", "on": True, "how": "two"}),
        ({"names": ["a", "b"], "paths": ["/a"]}, {"names": ("a", "b"), "paths": (b"/a",)}),
    ],
)
def test_options_are_read(given_: dict[str, Any], read: dict[str, Any]) -> None:
    assert read_options(Options, {"path": "/x", **given_}, where="it") == Options(b"/x", **read)


@pytest.mark.parametrize(
    ("given_", "problem"),
    [
        ({"sise": 1}, "it: there is no option 'sise'; did you mean 'size'?"),
        ({"zzzz": 1}, "it: there is no option 'zzzz'; the options are: path, size"),
        ({"path": "x"}, "it: path: 'x' is not an absolute path, as in /srv/x"),
        ({"path": 1}, "it: path: an absolute path is wanted, not a value of type int"),
        ({"size": "4 KiB"}, "it: size: '4 KiB' is not a size; write bytes (4096) or"),
        ({"size": 1.5}, "it: size: a whole number is wanted, not a value of type float"),
        ({"size": True}, "it: size: a whole number is wanted, not true or false"),
        ({"size": -1}, "it: size: -1 is negative"),
        ({"time": "1w"}, "it: time: '1w' is not a duration"),
        ({"count": "1"}, "it: count: a whole number is wanted, not text"),
        ({"on": 1}, "it: on: true or false is wanted"),
        ({"on": "yes"}, "it: on: true or false is wanted, not text"),
        ({"how": "three"}, "it: how: 'three' is none of: one, two"),
        ({"names": "a"}, "it: names: a list is wanted, not text"),
        ({"names": ["a", 1]}, "it: names[1]: text is wanted"),
        ({"count": 13}, "it: count: not 13"),
    ],
)
def test_wrong_options_are_errors_that_name_them(given_: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionsError, match="^" + re.escape(problem)):
        read_options(Options, {"path": "/x", **given_}, where="it")


def test_an_option_without_a_default_must_be_given() -> None:
    no_options: tuple[object, ...] = ({}, None)
    for nothing in no_options:
        with pytest.raises(OptionsError, match="it: the option path must be given"):
            read_options(Options, nothing, where="it")
    with pytest.raises(OptionsError, match="it: options are names with values, not a list"):
        read_options(Options, [], where="it")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(list(Options.__dataclass_fields__)), JSON))
def test_any_values_are_options_or_an_error(values: dict[str, Any]) -> None:
    try:
        read = read_options(Options, values, where="it")
    except OptionsError as error:
        assert str(error).startswith("it: ")  # noqa: PT017 - of any values
        return
    assert isinstance(read.path, bytes)
    assert type(read.size) is int
    assert all(isinstance(name, str) for name in read.names)


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_engine_calls_itself_as_it_is_called(name: str) -> None:
    options = {"yara-x": {"rules": ["/x"]}, "command": {"argv": ["/bin/cat"]}}.get(name, {})
    configured = configure(name, options)
    assert make(configured).name == name
    assert from_json(to_json([configured])) == [configured]


@pytest.mark.parametrize(
    ("configured", "problem"),
    [
        (Configured("x", "os", {}), "'os' is not module:Class"),
        (Configured("x", "no.such:Thing", {}), "No module named 'no'; is it installed"),
        (Configured("x", "os:Thing", {}), "os has no Thing"),
        (Configured("x", "os:path", {}), "not derived from"),
        (Configured("x", "pathlib:Path", {}), "not derived from"),
        (Configured("x", BUILT_IN["hashes"], {}), "it calls itself 'hashes'"),
        (Configured("hashes", BUILT_IN["hashes"], {"x": 1}), "engine hashes: there is no option 'x'"),
    ],
)
def test_what_is_no_engine_is_an_error(configured: Configured, problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        make(configured)


def test_an_unknown_engine_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(EngineError, match="there is no engine 'libclam'; did you mean 'libclamav'"):
        configure("libclam")
    with pytest.raises(EngineError, match="installed are: clamd, command, hashes"):
        configure("zzzz")


@given(st.text() | JSON.map(str))
def test_any_text_is_engines_or_an_error(text: str) -> None:
    try:
        read = from_json(text)
    except EngineError:
        return
    assert all(isinstance(one, Configured) for one in read)


def test_a_worker_needs_the_most_of_what_its_engines_need() -> None:
    assert combined([]) == Needs()
    both = combined(
        [Needs(jit=True, memory=1), Needs("scratch", memory=1 << 40, scratch_size=7, descriptors=99)]
    )
    assert both == Needs("scratch", True, 1 << 40, 7, 99)  # noqa: FBT003 - in the order of its fields


def rules(directory: Path, text: str | bytes) -> YaraX:
    path = directory / "rules.yar"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return YaraX(YaraXOptions((bytes(path),), max_file_size=1000))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rule x { condition: nope }", r"rules.yar: error\[E009\]: unknown identifier"),
        ('include "/etc/passwd"', "rules.yar: error"),
        (b"\xff", "rules.yar: not UTF-8"),
        ("// nothing", "there is none"),
    ],
)
def test_wrong_rules_are_an_error_that_names_the_file(
    text: str | bytes, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=problem):
        rules(tmp_path, text).warm()


def test_rules_of_a_directory_are_taken_together_and_all_that_match_are_named(tmp_path: Path) -> None:
    for name in ("a.yar", "b.yara", "c.txt"):
        (tmp_path / name).write_text(f'rule {name[0]} {{ strings: $s = "bad" condition: $s }}')
    engine = YaraX(YaraXOptions((bytes(tmp_path),)))
    seen = Databases([engine])
    engine.warm()
    assert engine.version().endswith(", 2 rules")
    descriptor = make_and_open(tmp_path / "file", b"a bad file")
    assert engine.scan(descriptor, 10, None) == Infected("a", ("b",))
    assert seen.changed()  # by the file beside them


def test_a_file_that_is_too_large_for_memory_is_an_error(tmp_path: Path) -> None:
    engine = rules(tmp_path, "rule never { condition: false }")
    descriptor = make_and_open(tmp_path / "file", bytes(1001))
    assert engine.scan(descriptor, 1000, None) == Error(Reason.NOT_LOADED, "the rules were not compiled")
    engine.warm()
    verdict = engine.scan(descriptor, 1001, None)
    assert isinstance(verdict, Error)
    assert verdict.reason is Reason.TOO_LARGE
    assert isinstance(engine.scan(descriptor, 1000, None), Error)
    (tmp_path / "file").write_bytes(bytes(1000))
    assert engine.scan(descriptor, 1000, None) == Clean()
