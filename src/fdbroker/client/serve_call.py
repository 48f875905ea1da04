"""A request to serve the clients of a listener, and what comes by it. No I/O."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from fdbroker.client.answers import check_served
from fdbroker.client.engine import ServeListener
from fdbroker.client.errors import protocol_error
from fdbroker.client.link import Call
from fdbroker.wire.client import AcceptedReply

if TYPE_CHECKING:
    from fdbroker.client.engine import Answer
    from fdbroker.wire.messages import AcceptedClient


class ServeCall(Call):
    """A request to serve. After its first answer, each is a client that was handed over, or the end."""

    __slots__ = ()

    def __init__(self, listener: bytes) -> None:
        super().__init__(ServeListener(listener))

    def abandon(self) -> None:
        """Have the clients released that nobody took, and those that still come."""
        if self.link is not None:
            for answer in self.answers:
                if isinstance(answer.reply, AcceptedReply):
                    self.link.release_later(answer.reply.client.number)
        super().abandon()


def accepted_by(call: ServeCall, listener: bytes) -> tuple[AcceptedClient, socket.socket]:
    """Take the next client that was handed over; return it and its socket, which the caller owns.

    Raises:
        IndexError: none has come.
        BrokerError: none will: the policy does not let this process serve the listener any more.
        ProtocolError: what came is no socket; it was closed.

    """
    answer = call.answers.pop(0)
    if not isinstance(answer.reply, AcceptedReply):
        call.answers.insert(0, answer)  # whoever else asks is told as well
        check_served(answer, listener)
    return accepted_of(answer)


def accepted_of(answer: Answer) -> tuple[AcceptedClient, socket.socket]:
    """Return a client that was handed over, and its socket, which the caller owns.

    Raises:
        ProtocolError: what came is no socket; it was closed.

    """
    assert isinstance(answer.reply, AcceptedReply)  # noqa: S101 - for the type checker
    with answer.descriptors:
        try:
            sock = socket.socket(fileno=answer.descriptors.numbers()[0])
        except OSError as error:
            raise protocol_error(f"a client whose descriptor is no socket: {error}", answer.id) from error
        answer.descriptors.take()
    return answer.reply.client, sock
