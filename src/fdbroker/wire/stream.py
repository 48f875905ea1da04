"""Frames on a stream: each is preceded by its length, and may arrive in any number of parts. No I/O.

Where a part of a stream comes with something (descriptors, or the credentials
of its sender), it belongs to the frame that the part's *last* byte is in. The
kernel ends a read behind the part of a message that descriptors came with, and
never joins parts of different senders (unix_stream_read_generic of
net/unix/af_unix.c); what came before in the same read had nothing with it.
"""

from __future__ import annotations

from fdbroker.wire.format import HEADER, LENGTH, MAX_FRAME
from fdbroker.wire.messages import MalformedError


def framed(frame: bytes) -> bytes:
    """Return a frame as it is sent on a stream."""
    return LENGTH.pack(len(frame)) + frame


class FrameBuffer:
    """Puts frames together again. Holds at most one frame and what was received behind it."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        """Return how many bytes wait here."""
        return len(self._data)

    def add(self, data: bytes) -> None:
        """Take what was received."""
        self._data += data

    @property
    def has_frame(self) -> bool:
        """Whether `next_frame` has something to return, or to raise."""
        try:
            return self._end_of_frame() is not None
        except MalformedError:
            return True

    def next_frame(self) -> bytes | None:
        """Return the next frame that is there whole, else None.

        Raises:
            MalformedError: what is there is no beginning of a frame.

        """
        end = self._end_of_frame()
        if end is None:
            return None
        frame = bytes(self._data[LENGTH.size : end])
        del self._data[:end]
        return frame

    def _end_of_frame(self) -> int | None:
        """Return how many bytes the next frame has with its length, None if it is not there whole."""
        if len(self._data) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._data)
        if not HEADER.size <= length <= MAX_FRAME:
            raise MalformedError(f"a frame of {length} bytes: it has {HEADER.size} to {MAX_FRAME}")
        end: int = LENGTH.size + length
        return end if len(self._data) >= end else None
