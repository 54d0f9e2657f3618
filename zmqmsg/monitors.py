"""Monitors: sockets from which libzmq's reports of another socket's connections are read."""

import struct
from typing import NamedTuple

import zmq

from zmqmsg.sockets import Socket, cannot_open, new_socket

# Arithmetic with zmq's own enum is slow.
CONNECTED = int(zmq.EVENT_CONNECTED)
CONNECT_RETRIED = int(zmq.EVENT_CONNECT_RETRIED)
ACCEPTED = int(zmq.EVENT_ACCEPTED)
HANDSHAKE_DONE = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
# How a handshake has failed: ZAP has refused the client, what came was wrong, or the connection
# ended.
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
PROTOCOL_BROKEN = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
CUT_SHORT = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
CLOSED = int(zmq.EVENT_CLOSED)
DISCONNECTED = int(zmq.EVENT_DISCONNECTED)


class Event(NamedTuple):
    """What libzmq reports; what ``value`` is depends on the kind."""

    kind: int
    value: int
    endpoint: str


def open_monitor(socket: Socket, address: str, events: int) -> Socket:
    """Return a socket that receives ``events`` of ``socket`` at an inproc ``address``.

    Raises Failure if there are too many sockets.
    """
    monitor = new_socket(socket.context, zmq.PAIR)
    monitor.rcvhwm = 0  # a full monitor would stop libzmq's thread (libzmq issue 3745)
    try:
        socket.monitor(address, events)
    except zmq.ZMQError as error:
        monitor.close()
        raise cannot_open(error) from error
    monitor.connect(address)
    return monitor


def read_event(monitor: Socket) -> Event:
    """Return the next event; raise ContextTerminated.

    As zmq.utils.monitor does, which takes 40 ms to import, because of asyncio.
    """
    header, endpoint = monitor.recv_multipart()
    kind, value = struct.unpack("=HI", header)
    return Event(kind, value, endpoint.decode(errors="backslashreplace"))
