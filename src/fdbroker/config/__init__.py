"""YAML to checked to compiled policy.

Runs as root, for a moment, before the broker: the broker itself never reads
YAML. `python -m fdbroker.config` compiles and checks from the command line.
"""

from __future__ import annotations

from fdbroker.config.compile import compile_policy, load_policy_file
from fdbroker.config.compiled import CompiledPolicy, dumps
from fdbroker.config.errors import ConfigError, Problem
from fdbroker.config.identities import Fault, Lookups, OfflineLookups, SystemLookups
from fdbroker.config.schema import json_schema
from fdbroker.config.sources import read_policy_file

__all__ = [
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
