"""Confinement of processes that read hostile bytes: a warm zygote, its workers, and what confines them.

docs/sandbox.md tells how to use it. No capability is used here but those that are given up.
"""

from __future__ import annotations

from fdbroker.sandbox.calls import CallError, run
from fdbroker.sandbox.confinement import SCRATCH, Confinement, Limits, Profile
from fdbroker.sandbox.errors import ConfinementError, SandboxError, ZygoteError
from fdbroker.sandbox.programs import Program, Programs, spawn
from fdbroker.sandbox.report import STRICT, Layer, LayerReport, LayerState
from fdbroker.sandbox.zygote import Ended, Worker, Zygote

__all__ = [
    "SCRATCH",
    "STRICT",
    "CallError",
    "Confinement",
    "ConfinementError",
    "Ended",
    "Layer",
    "LayerReport",
    "LayerState",
    "Limits",
    "Profile",
    "Program",
    "Programs",
    "SandboxError",
    "Worker",
    "Zygote",
    "ZygoteError",
    "run",
    "spawn",
]
