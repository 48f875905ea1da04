"""What a confinement achieved: one statement per layer, as a value and as bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Layer(Enum):
    """The layers, in the order of the report."""

    NAMESPACES = "namespaces"
    PID_NAMESPACE = "pid namespace"
    EMPTY_ROOT = "empty root"
    ENVIRONMENT = "environment"
    NO_NEW_PRIVS = "no_new_privs"
    IDS = "ids"
    PARENT_DEATH = "dies with its parent"
    DESCRIPTORS = "descriptors"
    CAPABILITIES = "capabilities"
    LANDLOCK = "landlock"
    LIMITS = "resource limits"
    WRITE_EXECUTE = "no write-execute memory"
    NOT_DUMPABLE = "not dumpable"
    SECCOMP = "seccomp"


# Without one of these there is no confined process at all. Of the ids only uid 0 is impossible: who
# is not root can't change them, and the report says so.
STRICT = frozenset({Layer.DESCRIPTORS, Layer.NO_NEW_PRIVS, Layer.IDS, Layer.CAPABILITIES, Layer.SECCOMP})

_ENTRY = struct.Struct("=BB")  # in force, length of the note
_LONGEST_NOTE = 255


class LayerState(NamedTuple):
    """One layer. `note`: ASCII, how far it goes, or why it is not in force."""

    layer: Layer
    enforced: bool
    note: str


class ReportError(ValueError):
    """The bytes are no report."""


@dataclass(frozen=True)
class LayerReport:
    """All layers. Nobody may take one for granted: look."""

    states: tuple[LayerState, ...]

    def __post_init__(self) -> None:
        """Refuse a report that leaves a layer out."""
        if tuple(state.layer for state in self.states) != tuple(Layer):
            raise ReportError("a report states each layer once, in their order")

    def state(self, layer: Layer) -> LayerState:
        """Return what is said of one layer."""
        return self.states[tuple(Layer).index(layer)]

    def missing(self) -> tuple[LayerState, ...]:
        """Return the layers that are not in force."""
        return tuple(state for state in self.states if not state.enforced)

    def encode(self) -> bytes:
        """Return the report as bytes; a note that is too long is cut."""
        parts = []
        for state in self.states:
            note = state.note.encode("ascii", "backslashreplace")[:_LONGEST_NOTE]
            parts.append(_ENTRY.pack(state.enforced, len(note)) + note)
        return b"".join(parts)


LONGEST_REPORT = len(Layer) * (_ENTRY.size + _LONGEST_NOTE)


def decode_report(data: bytes) -> LayerReport:
    """Return the report that `encode` made bytes of.

    Raises:
        ReportError: it is none, or has anything before, between or behind.

    """
    states = []
    for layer in Layer:
        if len(data) < _ENTRY.size:
            raise ReportError(f"the report ends before the layer {layer.value!r}")
        enforced, length = _ENTRY.unpack_from(data)
        note = data[_ENTRY.size : _ENTRY.size + length]
        data = data[_ENTRY.size + length :]
        if enforced > 1 or len(note) != length or not all(0x20 <= byte < 0x7F for byte in note):  # noqa: PLR2004 - printable ASCII
            raise ReportError(f"what the report says of the layer {layer.value!r} can't be read")
        states.append(LayerState(layer, bool(enforced), note.decode("ascii")))
    if data:
        raise ReportError(f"{len(data)} bytes behind the report")
    return LayerReport(tuple(states))
