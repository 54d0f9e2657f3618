"""Which clients do not get through to what ``serve --verbose`` has bound, and why.

The client itself is told by ``zmqmsg send``; this is for whoever runs the server.
"""

import time
from contextlib import suppress
from typing import NamedTuple

import zmq

from zmqmsg.monitors import (
    ACCEPTED,
    CUT_SHORT,
    DISCONNECTED,
    HANDSHAKE_DONE,
    PROTOCOL_BROKEN,
    REFUSED,
    Event,
    open_monitor,
    read_event,
)
from zmqmsg.names import plain_address
from zmqmsg.refusals import UNIX_CLIENT, ClientNotices, not_through
from zmqmsg.sockets import HANDSHAKE_LIMIT_MS, Socket
from zmqmsg.system import start_thread

LOOK_INTERVAL_MS = 500  # between looks at the notices that are due
HANDSHAKE_TIME = HANDSHAKE_LIMIT_MS / 1000 + 1  # seconds in which every handshake has ended

OTHER_MECHANISM = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
OTHER_SERVER_KEY = int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC)


def watch_handshakes(socket: Socket, notices: ClientNotices) -> None:
    """Notify of clients of ``socket``, not bound yet, whose handshakes fail.

    Raises Failure or OSError.
    """
    # A thread reads the monitor, even while the server waits for a command: one that nobody reads
    # would stop the server.
    failed = REFUSED | PROTOCOL_BROKEN | CUT_SHORT
    events = ACCEPTED | HANDSHAKE_DONE | failed | DISCONNECTED
    monitor = open_monitor(socket, "inproc://zmqmsg.listener", events)
    watch = HandshakeWatch(notices, requires_keys=socket.mechanism == zmq.CURVE)
    start_thread(lambda: read_monitor(monitor, watch))


def read_monitor(monitor: Socket, watch: "HandshakeWatch") -> None:
    """Pass all events on to ``watch``, until the context is terminated."""
    with monitor, suppress(zmq.ContextTerminated):
        while True:
            if monitor.poll(LOOK_INTERVAL_MS):
                watch.handle(read_event(monitor))
            watch.notices.give_due()


class Connection(NamedTuple):
    """A connection of a client."""

    address: str
    accepted_at: float  # by time.monotonic()


class HandshakeWatch:
    """Infers from the events of a bound socket which client's handshake has failed.

    Only for ACCEPTED and DISCONNECTED does libzmq say which connection, by its descriptor. A failed
    handshake belongs to the connection that ends next. A successful one cannot be assigned to any
    connection, so all of them are cleared of suspicion.
    """

    def __init__(self, notices: ClientNotices, *, requires_keys: bool) -> None:
        self.notices = notices
        self._requires_keys = requires_keys
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._suspects: set[int] = set()  # those whose handshakes have not succeeded
        # libzmq reports these just before the end of the connection that they belong to:
        self._reason = ""  # why its handshake has failed
        self._is_cut_short = False  # whether its client hung up during the handshake

    def handle(self, event: Event) -> None:
        """Note an event of the bound socket; report a client if its connection ends."""
        if event.kind == ACCEPTED:
            descriptor = event.value
            address = peer_address(descriptor) or local_address(event.endpoint)
            self._connections[descriptor] = Connection(address, time.monotonic())
            self._suspects.add(descriptor)
        elif event.kind == PROTOCOL_BROKEN:
            self._reason = self._describe(event.value)
        elif event.kind == CUT_SHORT:
            self._is_cut_short = True
        elif event.kind in (HANDSHAKE_DONE, REFUSED):  # the ZAP thread reports who is refused
            self._suspects.clear()
        elif event.kind == DISCONNECTED:
            self._handle_end(event.value)

    def _handle_end(self, descriptor: int) -> None:
        connection = self._connections.pop(descriptor, None)
        if connection:
            # A socket of the wrong type often ends without any other event.
            hung_up = self._is_cut_short or descriptor in self._suspects
            # libzmq says of ZMTP 1 and 2 only that a handshake has failed, when all is over.
            is_past = time.monotonic() >= connection.accepted_at + HANDSHAKE_TIME
            if self._reason:
                notice = not_through(connection.address, self._reason)
                self.notices.report(connection.address, notice)
            elif hung_up and not is_past:
                self.notices.report_unless_explained(connection.address, connection.accepted_at)
        self._suspects.discard(descriptor)
        self._reason = ""
        self._is_cut_short = False

    def _describe(self, error: int) -> str:
        """Return in words what is wrong with a handshake, by libzmq's number."""
        if error == OTHER_MECHANISM:
            if self._requires_keys:
                return "it uses no keys, and this server requires them"
            return "it uses keys (or PLAIN), and this server does not"
        if error == OTHER_SERVER_KEY:
            return "its --server-key is not this server's"
        return "it broke the protocol of the handshake"


def peer_address(descriptor: int) -> str:
    """Return the address of the client that libzmq's ``descriptor`` is connected to.

    Nothing is returned if it is gone already.
    """
    from socket import socket

    with suppress(OSError):
        connection = socket(fileno=descriptor)
        try:
            name = connection.getpeername()
            return plain_address(name[0]) if isinstance(name, tuple) else UNIX_CLIENT
        finally:
            connection.detach()
    return ""


def local_address(endpoint: str) -> str:
    """Return where a client of ``endpoint``, which is already gone, must have come from."""
    if endpoint.startswith("ipc://"):
        return UNIX_CLIENT
    for address, beginning in (("127.0.0.1", "tcp://127."), ("::1", "tcp://[::1]")):
        if endpoint.startswith(beginning):
            return address
    return "an unknown address"
