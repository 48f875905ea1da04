from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.sandbox.report import (
    LONGEST_REPORT,
    Layer,
    LayerReport,
    LayerState,
    ReportError,
    decode_report,
)

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=255)
REPORTS = st.lists(st.tuples(st.booleans(), PRINTABLE), min_size=len(Layer), max_size=len(Layer)).map(
    lambda said: LayerReport(
        tuple(LayerState(layer, *statement) for layer, statement in zip(Layer, said, strict=True))
    )
)


def report(note: str = "") -> LayerReport:
    return LayerReport(tuple(LayerState(layer, enforced=True, note=note) for layer in Layer))


@given(REPORTS)
def test_report_survives_being_sent(sent: LayerReport) -> None:
    assert decode_report(sent.encode()) == sent


@given(st.binary(max_size=400))
def test_any_bytes_are_a_whole_report_or_an_error(data: bytes) -> None:
    try:
        received = decode_report(data)
    except ReportError:
        return
    assert received.encode() == data


def test_every_beginning_of_a_report_is_an_error() -> None:
    data = report("note").encode()
    for length in range(len(data)):
        with pytest.raises(ReportError):
            decode_report(data[:length])


def test_bytes_behind_a_report_are_an_error() -> None:
    with pytest.raises(ReportError, match="1 bytes behind"):
        decode_report(report().encode() + b"\0")


def test_long_note_is_cut_and_odd_characters_are_escaped() -> None:
    note = decode_report(report("é" * 300).encode()).states[0].note
    assert len(note) == 255
    assert note.startswith("\\xe9")
    assert len(report("x" * 300).encode()) == LONGEST_REPORT


def test_control_characters_in_a_note_are_an_error() -> None:
    with pytest.raises(ReportError, match="can't be read"):
        decode_report(report("a\nb").encode())


def test_report_without_a_layer_can_not_be_made() -> None:
    with pytest.raises(ReportError, match="each layer once"):
        LayerReport(report().states[1:])


def test_missing_layers_are_those_not_in_force() -> None:
    states = [*report().states]
    states[3] = states[3]._replace(enforced=False, note="why")
    assert LayerReport(tuple(states)).missing() == (states[3],)
