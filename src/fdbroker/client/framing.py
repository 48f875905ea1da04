"""Frames that come on a stream, each with the descriptors that belong to it. No I/O.

Descriptors come with the first byte of their frame; whatever was received
together with them ends within that frame or at its end (wire/stream.py says
why). So they belong to the frame that the last byte received is in, and that
frame can't have begun before.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from fdbroker.kernel.descriptors import Descriptors
from fdbroker.wire.messages import MalformedError
from fdbroker.wire.stream import FrameBuffer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class StreamFrames:
    """Puts frames together again. Owns their descriptors until the frame is taken."""

    __slots__ = ("_begun", "_buffer", "_whole")

    def __init__(self) -> None:
        self._buffer = FrameBuffer()
        # Of the frame that is not whole yet.
        self._begun = Descriptors()
        self._whole: deque[tuple[bytes, Descriptors]] = deque()

    def __len__(self) -> int:
        """Return how many bytes wait for the rest of their frame."""
        return len(self._buffer)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def add(self, data: bytes, descriptors: Descriptors) -> None:
        """Take what was received at once; the descriptors are owned here from now on.

        Raises:
            MalformedError: what is there is no beginning of a frame, or has descriptors that belong to
                none. Everything was closed.

        """
        within = len(self._buffer) > 0
        whole: list[bytes] = []
        try:
            self._buffer.add(data)
            while (frame := self._buffer.next_frame()) is not None:
                whole.append(frame)
            ends = len(self._buffer) == 0  # the last byte was the last of a frame
            if descriptors and within and len(whole) == ends:
                raise MalformedError(f"{len(descriptors)} descriptors came within a frame that had begun")
        except MalformedError:
            descriptors.close()
            self.close()
            raise
        for frame in whole:
            self._whole.append((frame, self._begun))
            self._begun = Descriptors()
        if descriptors:
            if ends:
                self._whole[-1] = (whole[-1], descriptors)
            else:
                self._begun = descriptors

    def next_frame(self) -> tuple[bytes, Descriptors] | None:
        """Return the next frame with its descriptors, which the caller owns; None: none is whole."""
        return self._whole.popleft() if self._whole else None

    def close(self) -> None:
        """Close the descriptors of all that was not taken."""
        self._begun.close()
        while self._whole:
            self._whole.popleft()[1].close()
