"""Engines by name: those of fdbroker, and what is installed under the entry point group `fdbroker.engines`.

A name that two packages claim is nobody's: it must not depend on the order of a
directory who scans. The names of fdbroker's own are taken. `Configured` is how a
process that configures engines tells another one, as JSON, which to make; no code
and no pickle goes that way.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.config.errors import did_you_mean
from fdbroker.scan.engine import Engine, EngineError, Inside, Outside
from fdbroker.scan.options import OptionsError, read_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GROUP = "fdbroker.engines"

BUILT_IN = {
    "clamd": "fdbroker.scan.engines.clamd:Clamd",
    "command": "fdbroker.scan.engines.command:Command",
    "hashes": "fdbroker.scan.engines.hashes:Hashes",
    "libclamav": "fdbroker.scan.engines.libclamav:LibClamAV",
    "yara-x": "fdbroker.scan.engines.yara:YaraX",
}

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Configured(NamedTuple):
    """An engine and its options. `target`: `module:Class`; `options`: values of JSON."""

    name: str
    target: str
    options: Mapping[str, object]


def installed() -> dict[str, str]:
    """Return the names of the engines that are installed, each with its `module:Class`.

    Raises:
        EngineError: two packages have an engine of one name.

    """
    from importlib import metadata  # noqa: PLC0415 - it takes as long as all else here, and a worker has no use for it

    targets = dict(BUILT_IN)
    for entry in metadata.entry_points(group=GROUP):
        known = targets.setdefault(entry.name, entry.value)
        if known != entry.value:
            raise EngineError(
                f"two engines are called {entry.name!a}: {known} and {entry.value}; uninstall one"
            )
    return targets


def configure(name: str, options: Mapping[str, object] | None = None) -> Configured:
    """Return a checked configuration of an engine that is installed.

    Raises:
        EngineError: there is no such engine, it is not one, or its options are wrong.

    """
    configured = Configured(name, _target(name), dict(options or {}))
    make(configured)
    return configured


def options_type(name: str) -> type:
    """Return the dataclass of the options that an engine has.

    Raises:
        EngineError: there is no such engine, or it is not one.

    """
    return _kind(name, _target(name)).options_type


def _target(name: str) -> str:
    """Return the `module:Class` of an engine that is installed; EngineError."""
    target = BUILT_IN.get(name)
    if target is None:
        targets = installed()
        target = targets.get(name)
        if target is None:
            cure = did_you_mean(name, targets, f"installed are: {', '.join(sorted(targets))}")
            raise EngineError(f"there is no engine {name!a}; {cure}")
    return target


def make(configured: Configured) -> Inside | Outside:
    """Return the engine, not loaded.

    Raises:
        EngineError: its module can't be imported, it is no engine, or its options are wrong.

    """
    where = f"engine {configured.name}"
    kind = _kind(configured.name, configured.target)
    try:
        made = kind(read_options(kind.options_type, dict(configured.options), where=where))
    except OptionsError as error:
        raise EngineError(str(error)) from error
    if not isinstance(made, Inside | Outside):
        raise EngineError(f"{where}: {configured.target} is derived from neither Inside nor Outside")
    return made


def make_inside(configured: Configured) -> Inside:
    """Return the engine, not loaded, if it is one for a worker.

    Raises:
        EngineError: as `make`; or it runs elsewhere.

    """
    engine = make(configured)
    if not isinstance(engine, Inside):
        raise EngineError(f"engine {configured.name}: it does not run in a worker")
    return engine


def _kind(name: str, target: str) -> type[Engine]:
    """Return the class of an engine; EngineError."""
    where = f"engine {name}"
    if not _TARGET.fullmatch(target):
        raise EngineError(f"{where}: {target!a} is not module:Class")
    module, _, attribute = target.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        cure = (
            f'pip install "fdbroker[{_EXTRAS[error.name]}]"' if error.name in _EXTRAS else "is it installed?"
        )
        raise EngineError(f"{where}: {error}; {cure}") from error
    except AttributeError:
        raise EngineError(f"{where}: {module} has no {attribute}") from None
    if not isinstance(kind, type) or not issubclass(kind, Engine):
        raise EngineError(f"{where}: {target} is not derived from fdbroker.scan.engine.Engine")
    if not _NAME.fullmatch(kind.name) or kind.name != name:
        raise EngineError(f"{where}: it calls itself {kind.name!a}")
    return kind


_EXTRAS = {"yara_x": "yara"}


def to_json(engines: Sequence[Configured]) -> str:
    """Return the configurations as ASCII text for another process."""
    return json.dumps([[one.name, one.target, dict(one.options)] for one in engines])


def from_json(text: str) -> list[Configured]:
    """Return the configurations that `to_json` made text of.

    Raises:
        EngineError: it is none.

    """
    configured = []
    try:
        for name, target, options in json.loads(text):
            if not (isinstance(name, str) and isinstance(target, str) and isinstance(options, dict)):
                raise EngineError("not a list of engines")
            configured.append(Configured(name, target, options))
    except (ValueError, TypeError) as error:
        raise EngineError(f"not a list of engines: {error}") from error
    return configured
