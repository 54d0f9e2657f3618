"""The REQ side: Lazy Pirate (ZeroMQ Guide, chapter 4), with one REQ socket for each endpoint."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import zmq

from zmqmsg.monitor import PATIENCE, SETTLING, Connection
from zmqmsg.sockets import NOW, Failure, Socket

SPINS = 50
"""Looks for a reply, each after making way for others, before going to sleep: that takes longer than a fast reply. It
saves 40 % of a round trip, and 9 % on a single core."""

FRESH = 0.001
"""Seconds after a request in which the monitor is not asked before the next one: 10 % of a stream's time. Within them,
libzmq cannot be back on a new connection (RECONNECT_IVL is 0.1 s), and no request be sent twice for an old loss."""

QUOTED = 40
"""Bytes of an unanswered request that an error quotes."""


class Unanswered(Exception):
    """An attempt has failed; another may succeed. ``sent``: whether the request may have reached a server."""

    def __init__(self, why: str, hint: str, *, sent: bool = True) -> None:
        super().__init__(why)
        self.hint = hint
        self.sent = sent


class Requester:
    """Sends requests and waits for their replies, over the connections that have a peer, in turn.

    The Guide's Lazy Pirate polls with a limit, closes the confused socket, opens a new one and sends again, at most N
    times. Here an attempt also ends as soon as the connection's monitor says that the connection is lost, so that a
    server that died is noticed without any limit.

    A malformed request can make a REP socket drop its next reply, which may be ours (libzmq's rep.cpp). As no
    connection breaks, only a ``timeout`` and another attempt help against that.
    """

    def __init__(
        self,
        connections: Iterable[Connection],
        tell: Callable[[str], None],
        *,
        timeout: float = math.inf,
        retries: int = 3,
        output: int | None = None,
    ) -> None:
        """Ask over ``connections``, and ``tell`` what happens on the way.

        ``timeout``: seconds for one attempt, from name resolution to reply. ``retries``: further attempts for each
        request. ``output``: a file descriptor; when its reader is gone, waiting ends with BrokenPipeError.
        """
        self._connections = list(connections)
        self._tell = tell
        self._timeout = timeout
        self._retries = retries
        self._output = output
        self._settled = len(self._connections) == 1
        self._asked = -math.inf

    def update(self) -> None:
        """Keep up with the connections, while there is nothing to ask. Raises Failure if one is hopeless."""
        for connection in self._connections:
            connection.update()

    def ask(self, frames: Sequence[bytes]) -> list[zmq.Frame]:
        """Send ``frames`` as one request and return the frames of its reply.

        Raises Failure if no attempt brought a reply, or none can.
        """
        sent = 0
        for attempt in count(1):
            try:
                return self._attempt(frames, time.monotonic() + self._timeout)
            except Unanswered as failure:
                sent += failure.sent
                if not sent:
                    raise Failure(f"{failure}: {failure.hint}") from None
                if attempt > self._retries:
                    times = "once" if sent == 1 else f"{sent} times"
                    raise Failure(f"no reply to {_quote(frames)}, sent {times}: {failure}; {failure.hint}") from None
                self._tell(f"{failure}, trying again ({attempt} of {self._retries})")
        raise AssertionError("count() does not end")

    def _attempt(self, frames: Sequence[bytes], deadline: float) -> list[zmq.Frame]:
        while True:
            connection = self._find_peer(deadline)
            reply: list[zmq.Frame] = []
            try:
                _send(connection.socket, frames)
                reply = self._wait_for_reply(connection, deadline)
            except zmq.Again:
                pass  # libzmq has just given the connection up, and sending would block for ever
            finally:
                if not reply:
                    connection.reopen()
            if reply:
                return reply

    def _find_peer(self, deadline: float) -> Connection:
        """Return the connection whose turn it is among those that have a peer; wait until one has."""
        started = now = time.monotonic()
        asked, self._asked = self._asked, now
        if len(self._connections) == 1 and now - asked < FRESH and self._connections[0].ready:
            return self._connections[0]
        while True:
            self.update()
            if peer := self._next_peer(now - started):
                peer.report()
                return peer
            for connection in self._connections:
                connection.report()
            if now >= deadline:
                endpoints = ", ".join(connection.endpoint for connection in self._connections)
                troubles = "; ".join(connection.trouble for connection in self._connections)
                raise Unanswered(f"no server at {endpoints} within {self._timeout:g} s", troubles, sent=False)
            pause = min(connection.pause for connection in self._connections)
            self._poll([connection.monitor for connection in self._connections], min(pause, deadline - now))
            now = time.monotonic()

    def _next_peer(self, waited: float) -> Connection | None:
        # At first let every server that is there be found, so that the first requests go round as well.
        if not self._settled and waited < SETTLING and not all(c.known for c in self._connections):
            return None
        ready = [connection for connection in self._connections if connection.ready]
        if not ready:
            return None
        self._settled = True
        # A connection without a handshake may be one to a frozen server: only if there is no other.
        peer = min(ready, key=lambda connection: not connection.greeted)
        self._connections.remove(peer)
        self._connections.append(peer)
        return peer

    def _wait_for_reply(self, connection: Connection, deadline: float) -> list[zmq.Frame]:
        """Return the frames of the reply; none if the handshake fails, so that the request is still here."""
        socket, endpoint, losses = connection.socket, connection.endpoint, connection.losses
        for _ in range(SPINS):
            os.sched_yield()
            if reply := _receive(socket):
                return reply
        started = now = time.monotonic()
        told = False
        while True:
            self._poll([socket, connection.monitor], min(PATIENCE, deadline - now))
            connection.update()
            # Only now: a reply that came before the connection broke lies in the socket.
            if reply := _receive(socket):
                return reply
            if connection.losses > losses:
                raise Unanswered(f"connection to {endpoint} lost", self._suspicion(connection))
            if not connection.ready:
                return []
            now = time.monotonic()
            if now >= deadline:
                raise Unanswered(f"no reply within {self._timeout:g} s from {endpoint}", "is it slow, or frozen?")
            if now - started >= PATIENCE and not told:
                self._tell(f"waiting for the reply of {endpoint}")
                told = True

    def _suspicion(self, connection: Connection) -> str:
        if not connection.greeted:
            return "it never finished a handshake, and may be no ZeroMQ server"
        if not self._retries:
            return "with --retries it would be sent again"
        return "the request may break the server or be too large for it, or its reply may be larger than --max-size"

    def _poll(self, sockets: Iterable[Socket], seconds: float) -> None:
        """Wait until one of ``sockets`` has something to say, a second at most.

        A signal that comes just before the system call is seen only after it.
        """
        items: list[tuple[Any, int]] = [(socket, zmq.POLLIN) for socket in sockets]
        if self._output is not None:
            items.append((self._output, zmq.POLLERR))
        if any(item == self._output for item, _event in zmq.zmq_poll(items, math.ceil(max(seconds, 0) * 1000))):
            raise BrokenPipeError


def _send(socket: Socket, frames: Sequence[bytes]) -> None:
    """Send ``frames`` as one message; raise zmq.Again if libzmq does not take it now.

    Those of 64 KiB and more (pyzmq's COPY_THRESHOLD) are not copied; for smaller ones, copying is faster.
    """
    if len(frames) == 1:  # half the cost of the general call
        socket.send(frames[0], NOW, copy=False)
    else:
        socket.send_multipart(frames, NOW, copy=False)


def _receive(socket: Socket) -> list[zmq.Frame]:
    """Return the frames of the next message, not copied; none if there is no message by now."""
    try:
        frame = socket.recv(NOW, copy=False)
    except zmq.Again:
        return []
    return [frame, *socket.recv_multipart(copy=False)] if frame.more else [frame]


def _quote(frames: Sequence[bytes]) -> str:
    text = frames[0][:QUOTED].decode(errors="backslashreplace")
    return f"'{text}'" if len(frames[0]) <= QUOTED else f"'{text}'..."
