"""What both commands share: sockets are opened, bound and connected; messages go in and out."""

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from zmqmsg.notices import Failure
from zmqmsg.system import HAS_CONNECTION_TIMEOUT

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
Secure = Callable[[Socket], object]  # gives a socket its CURVE keys

# The delay before libzmq connects again by itself: 24 days, so in practice never. Its own "never",
# -1, would throw away a reply that came just before the end of the connection.
NO_RECONNECT_MS = 2**31 - 1
# The time for a handshake, and so how long a client waits whose key cannot be checked just now.
# With 5 s, CURVE fails where a round trip takes 1.5 s.
HANDSHAKE_LIMIT_MS = 10_000
# Messages that libzmq receives ahead from each peer, so that none can fill the memory. With 8, a
# stream of small messages takes 5 % longer; with 1, a CURVE server with a ZAP handler receives
# nothing.
RECEIVE_LIMIT = 16
# Replies that wait for a peer which sends ahead and reads later; a REP socket drops further ones
# without a word.
SEND_LIMIT = 100_000
# A context's sockets, three for each endpoint that is connected to; libzmq's own limit is 1,023.
MAX_SOCKETS = 10_000
# A peer that is gone without a word is found within 30 s. Heartbeats would cut off slow large
# messages as well: libzmq takes only a whole message for a sign of life.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 10, 5, 3  # seconds, seconds, probes
UNACKNOWLEDGED_LIMIT_MS = 30_000
# Half-open connections must not keep honest clients out.
BACKLOG = 1024

ADDRESS_IN_USE = "address in use; stop the server there, or choose another address"
NOT_HERE = "this machine has no such address or interface"
# By errors of zmq. On Windows, libzmq's EADDRINUSE and EADDRNOTAVAIL are not those of errno.
_REASONS = {
    int(zmq.EADDRINUSE): ADDRESS_IN_USE,
    int(zmq.EADDRNOTAVAIL): "this machine has no such address",
    errno.ENODEV: NOT_HERE,
    errno.ENOENT: "there is no such directory",
}


def share_context() -> Context:
    """Return the context of the process.

    pyzmq would terminate any other one, and block on what is not sent yet.
    """
    context: Context = zmq.Context.instance()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def new_socket(context: Context, socket_type: int) -> Socket:
    """Return a socket that discards what is not sent yet when it is closed.

    Raises Failure if there are too many.
    """
    try:
        socket = context.socket(socket_type)
    except zmq.ZMQError as error:
        raise cannot_open(error) from error
    socket.linger = 0
    return socket


def open_socket(
    context: Context,
    socket_type: int,
    *,
    max_size: int = -1,
    linger: int = 0,
    secure: Secure | None = None,
) -> Socket:
    """Open a socket with the options that both commands share. Its receive timeout is 0.

    ``max_size``: bytes of the largest frame that a peer may send (-1: any). ``linger``:
    milliseconds for which closing keeps what is not sent yet (-1: no limit). ``secure``: gives
    the socket its CURVE keys. Raises Failure.
    """
    socket = new_socket(context, socket_type)
    socket.rcvtimeo = 0
    socket.linger = linger
    socket.maxmsgsize = max_size
    socket.rcvhwm = RECEIVE_LIMIT
    socket.sndhwm = SEND_LIMIT
    socket.reconnect_ivl = NO_RECONNECT_MS
    socket.handshake_ivl = HANDSHAKE_LIMIT_MS
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = KEEPALIVE_IDLE
    socket.tcp_keepalive_intvl = KEEPALIVE_INTERVAL
    socket.tcp_keepalive_cnt = KEEPALIVE_COUNT
    if HAS_CONNECTION_TIMEOUT:
        socket.tcp_maxrt = UNACKNOWLEDGED_LIMIT_MS
    socket.backlog = BACKLOG
    if secure:
        secure(socket)
    return socket


def cannot_open(error: zmq.ZMQError) -> Failure:
    """Return the failure to open a socket, with what helps."""
    text = f"cannot open a socket: {zmq.strerror(error.errno or 0)}"
    if error.errno == errno.EMFILE:
        text += "; raise the limit, for example with: ulimit -n 4096"
    return Failure(text)


def connect(socket: Socket, endpoint: str) -> None:
    """Connect ``socket``; raise Failure if libzmq does not accept ``endpoint``."""
    reason = _attach(socket.connect, socket, endpoint)
    if reason:
        raise Failure(f"cannot connect to {endpoint}: {reason}")


def bind(socket: Socket, endpoint: str) -> str:
    """Bind ``socket``; return why that cannot be done, or nothing."""
    return _attach(socket.bind, socket, endpoint)


def _attach(method: Callable[[Any], object], socket: Socket, endpoint: str) -> str:
    socket.ipv6 = "[" in endpoint  # not always: libzmq would then try localhost as ::1 alone
    try:
        method(as_typed(endpoint))
    except TypeError:  # pyzmq cannot describe a path in bytes whose directory is missing
        return _REASONS[errno.ENOENT]
    except zmq.ZMQError as error:
        number = error.errno or 0
        return _REASONS.get(number) or zmq.strerror(number)
    return ""


def as_typed(endpoint: str) -> str | bytes:
    """Return ``endpoint`` so that pyzmq, which encodes text in UTF-8, uses the bytes as typed."""
    data = os.fsencode(endpoint)
    return endpoint if data == endpoint.encode(errors="surrogateescape") else data


def receive(socket: Socket) -> list[zmq.Frame]:
    """Return the frames of the next message, not copied; none if none comes within RCVTIMEO."""
    try:
        frame = socket.recv(copy=False)
    except zmq.Again:
        return []
    return [frame, *socket.recv_multipart(copy=False)] if frame.more else [frame]


def send(socket: Socket, frames: Sequence[Any], flags: int = 0) -> None:
    """Send ``frames``, bytes or Frames, as one message.

    With NOBLOCK, raises zmq.Again if libzmq takes none now.
    """
    # Bytes are copied: to send them without a copy, pyzmq starts a thread and opens sockets at
    # that moment, which fails where descriptors are short. Frames that were received need neither.
    if len(frames) == 1:  # half the cost of the general call
        socket.send(frames[0], flags)
    else:
        socket.send_multipart(frames, flags)
