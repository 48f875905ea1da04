"""YAML to checked to compiled policy.

Runs as root, for a moment, before the broker: the broker itself never reads
YAML. `python -m fdbroker.config` compiles and checks from the command line.

Nothing is imported before it is asked for: the launcher, which opens compiled
policies as carefully as others, has no business with YAML.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.config.compile import compile_policy, load_policy_file
    from fdbroker.config.compiled import CompiledPolicy, dumps
    from fdbroker.config.errors import ConfigError, Problem
    from fdbroker.config.identities import Fault, Lookups, OfflineLookups, SystemLookups
    from fdbroker.config.schema import json_schema
    from fdbroker.config.sources import read_policy_file

DEFAULT_POLICY = "/etc/fdbroker/policy.yaml"

__all__ = [
    "DEFAULT_POLICY",
    "CompiledPolicy",
    "ConfigError",
    "Fault",
    "Lookups",
    "OfflineLookups",
    "Problem",
    "SystemLookups",
    "compile_policy",
    "dumps",
    "json_schema",
    "load_policy_file",
    "read_policy_file",
]

_MODULES = {
    "compile": ["compile_policy", "load_policy_file"],
    "compiled": ["CompiledPolicy", "dumps"],
    "errors": ["ConfigError", "Problem"],
    "identities": ["Fault", "Lookups", "OfflineLookups", "SystemLookups"],
    "schema": ["json_schema"],
    "sources": ["read_policy_file"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562)."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"fdbroker.config.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'fdbroker.config' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
