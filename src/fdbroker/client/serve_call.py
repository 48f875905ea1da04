"""A request to serve the clients of a listener, and what comes by it. No I/O."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from fdbroker.client.answers import check_served
from fdbroker.client.engine import ServeListener
from fdbroker.client.errors import protocol_error
from fdbroker.client.link import Call
from fdbroker.wire.client import AcceptedReply

if TYPE_CHECKING:
    from fdbroker.wire.messages import AcceptedClient


class ServeCall(Call):
    """A request to serve. After its first answer, each is a client that was handed over, or the end."""

    __slots__ = ("listener", "sockets")

    def __init__(self, listener: bytes) -> None:
        super().__init__(ServeListener(listener))
        self.listener = listener
        # Family, type and protocol of its clients' sockets, by the first: a listener has one of each, and
        # to ask for them takes the kernel, and Python, longer than all else that is done with a socket.
        self.sockets: tuple[int, int, int] | None = None

    def abandon(self) -> None:
        """Have the clients released that nobody took, and those that still come."""
        if self.link is not None:
            for answer in self.answers:
                if isinstance(answer.reply, AcceptedReply):
                    self.link.release_later(answer.reply.client.number)
        super().abandon()


def accepted_by(call: ServeCall) -> tuple[AcceptedClient, socket.socket]:
    """Take the next client that was handed over; return it and its socket, which the caller owns.

    Raises:
        IndexError: none has come.
        BrokerError: none will: the policy does not let this process serve the listener any more.
        ProtocolError: what came is no socket; it was closed.

    """
    answer = call.answers.pop(0)
    if type(answer.reply) is not AcceptedReply:
        call.answers.insert(0, answer)  # whoever else asks is told as well
        check_served(answer, call.listener)
    assert type(answer.reply) is AcceptedReply  # noqa: S101 - for the type checker
    number = answer.descriptors.take()
    try:
        if call.sockets is None:
            sock = socket.socket(fileno=number)
            call.sockets = int(sock.family), int(sock.type), sock.proto
        else:
            sock = socket.socket(*call.sockets, fileno=number)
    except OSError as error:
        os.close(number)
        raise protocol_error(f"a client whose descriptor is no socket: {error}", answer.id) from error
    return answer.reply.client, sock
