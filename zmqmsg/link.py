"""One connection: a socket that connects once, and what libzmq reports of that."""

import math
import time
from itertools import count
from typing import cast

import zmq

from zmqmsg.diagnosis import Finding
from zmqmsg.monitors import (
    CLOSED,
    CONNECT_RETRIED,
    CONNECTED,
    CUT_SHORT,
    DISCONNECTED,
    HANDSHAKE_DONE,
    PROTOCOL_BROKEN,
    REFUSED,
    open_monitor,
    read_event,
)
from zmqmsg.notices import Failure
from zmqmsg.sockets import Socket, connect

RETRY_DELAY = 0.1  # seconds; by then, libzmq has reported CONNECT_RETRIED if the peer hung up

POLLIN = int(zmq.POLLIN)  # arithmetic with the enum itself is slow

HANDSHAKE_FAILED = REFUSED | PROTOCOL_BROKEN | CUT_SHORT
ENDED = HANDSHAKE_FAILED | CONNECT_RETRIED | DISCONNECTED | CLOSED

# Why a handshake failed
HANDSHAKE_FAILING = Finding("connected, but the ZeroMQ handshake fails")
CURVE_FAILING = Finding(
    "CURVE handshake failing; check --server-key (or the server cannot check clients just now)"
)
NOT_LET_IN = Finding("it refused: the server does not let us in", hopeless=True)
KEY_NOT_KNOWN = Finding("it refused: the server does not know this key", hopeless=True)
# By status of ZAP, ZeroMQ's authentication protocol (RFC 27): 300 temporary, 500 internal error.
TEMPORARY_REFUSALS = {
    300: Finding("it refused for now: the server could not check who we are"),
    500: Finding("it refused: the server failed to check who we are"),
}

_monitor_addresses = (f"inproc://zmqmsg.monitor.{number}" for number in count())


class Link:
    """A socket that connects once, and all that libzmq reports of that connection.

    libzmq never connects it again (see NO_RECONNECT_MS in sockets), so what was sent over it cannot
    be sent a second time behind our back.
    """

    def __init__(self, socket: Socket) -> None:
        """Watch ``socket``, which is not connected yet.

        Raises Failure, and closes it, if there are too many sockets.
        """
        self.socket = socket
        self.uses_curve = socket.mechanism == zmq.CURVE
        self.connected_at = math.inf  # when TCP connected, by time.monotonic(); infinity: not yet
        self._events = 0  # all that have happened
        self._zap_status = 0  # why the server has refused us
        try:
            self.monitor = open_monitor(
                socket, next(_monitor_addresses), CONNECTED | HANDSHAKE_DONE | ENDED
            )
        except Failure:
            socket.close()
            raise

    @property
    def handshake_done(self) -> bool:
        """Whether libzmq has reported that the handshake is done."""
        return self._events & HANDSHAKE_DONE != 0

    @property
    def ended(self) -> bool:
        """Whether the connection has ended, or could not be made."""
        return self._events & ENDED != 0

    @property
    def handshake_finding(self) -> Finding | None:
        """How the handshake has failed, if it has."""
        if self._zap_status:
            refused = KEY_NOT_KNOWN if self.uses_curve else NOT_LET_IN
            return TEMPORARY_REFUSALS.get(self._zap_status, refused)
        if self.ended and self.connected_at < math.inf and not self.handshake_done:
            return CURVE_FAILING if self.uses_curve else HANDSHAKE_FAILING
        return None

    def connect(self, endpoint: str, limit: float) -> None:
        """Connect to ``endpoint``, whose address is numeric; raise Failure.

        ``limit``: seconds in which it has to accept the connection.
        """
        self.socket.connect_timeout = round(limit * 1000)
        connect(self.socket, endpoint)

    def read_events(self) -> None:
        """Collect the events that libzmq has reported; the caller acts upon them."""
        while cast(int, self.monitor.get(zmq.EVENTS)) & POLLIN:
            event = read_event(self.monitor)
            self._events |= event.kind
            if event.kind == CONNECTED:
                self.connected_at = time.monotonic()
            elif event.kind == REFUSED:
                self._zap_status = event.value

    def was_ended_by_us(self) -> bool:
        """Return whether libzmq closed the connection on our side, as it rejected what came.

        If the peer closed it, libzmq reports CONNECT_RETRIED within 0.1 s, or HANDSHAKE_FAILED if a
        bit was damaged.
        """
        end = time.monotonic() + RETRY_DELAY
        while not self._events & (CONNECT_RETRIED | HANDSHAKE_FAILED):
            seconds_left = end - time.monotonic()
            if seconds_left <= 0:
                return True
            self.monitor.poll(math.ceil(seconds_left * 1000))
            self.read_events()
        return False

    def close(self) -> None:
        """Close the socket. What is not sent yet keeps its linger if there is a connection."""
        if self.socket.closed:
            return
        self.read_events()
        # Before monitor.close(): libzmq's I/O thread would wait for ever to report the closing to a
        # monitor that is gone.
        self.socket.disable_monitor()
        is_connected = self.connected_at < math.inf and not self.ended
        self.socket.close(None if is_connected else 0)  # None: the linger that it was opened with
        self.monitor.close()
