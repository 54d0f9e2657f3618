"""What both commands share: endpoints are checked; sockets are opened and connected; messages go in and out."""

import errno
import re
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.console import Failure
from zmqmsg.diagnosis import resolve_numeric
from zmqmsg.system import HAS_ABSTRACT_NAMES, HAS_CONNECTION_TIMEOUT, start_thread

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
ApplyKeys = Callable[[Socket], None]

# After so long libzmq may connect again by itself. Its own "never" (-1) would throw away a reply that came just before
# the end of the connection.
NO_RECONNECT_MS = 2**31 - 1
# A client whose key cannot be checked now waits for as long; with 5 s, CURVE fails where a round trip takes 1.5 s.
HANDSHAKE_LIMIT_MS = 10_000
# Messages that libzmq receives ahead from each peer, so that none can fill the memory. With 8, a stream of small
# messages takes 5 % longer; with 1, a CURVE server with a ZAP handler receives nothing.
RECEIVE_LIMIT = 16
MOST_SOCKETS = 10_000  # three for each endpoint that is connected to; libzmq's own limit is 1,023

_TCP = re.compile(
    r"tcp://(?P<host>\*|[A-Za-z0-9][\w.%-]*|\[[\w.:]+(?:%[\w.-]+)?\]):(?P<port>\*|\d{1,5})",
    re.ASCII,
)

NOT_HERE = "this machine has no such address or interface"
# libzmq's own numbers: on Windows they are not those of Python's errno.
_REASONS = {
    int(zmq.EADDRINUSE): "address in use; stop the server there, or choose another address",
    int(zmq.EADDRNOTAVAIL): "this machine has no such address",
    errno.ENODEV: NOT_HERE,
    errno.ENOENT: "there is no such directory",
}


def check_endpoint(endpoint: str, *, bind: bool) -> str:
    """Return ``endpoint`` if it can be bound (or else connected to); raise ValueError."""
    example = DEFAULT_ENDPOINT
    problem = ""
    if not endpoint.isprintable():
        problem = "has characters that cannot be printed"
    elif endpoint.startswith("inproc://"):
        problem = "only works within one process"
    elif endpoint.startswith("ipc://"):
        example = "ipc:///tmp/zmqmsg.sock"
        path = endpoint.encode().removeprefix(b"ipc://")
        if not zmq.has("ipc"):
            example, problem = (
                DEFAULT_ENDPOINT,
                "needs Unix sockets, which ZeroMQ does not have on this system",
            )
        elif path.startswith(b"@") and not HAS_ABSTRACT_NAMES:
            problem = "has an abstract name, which only Linux has"
        elif path in (b"", b"@") or path.startswith(b"*") or len(path) > zmq.IPC_PATH_MAX_LEN:
            problem = f"needs a path of 1 to {zmq.IPC_PATH_MAX_LEN} bytes, without wildcards"
    elif not (match := _TCP.fullmatch(endpoint)):
        problem = "is neither tcp://HOST:PORT (IPv6 in brackets) nor ipc://PATH"
    elif not bind and ("*" in match.groups() or not int(match["port"])):
        problem = "has a wildcard or port 0, which only --bind accepts"
    elif match["port"] != "*" and int(match["port"]) > 65535:  # which libzmq would wrap
        problem = "has a port above 65535"
    if problem:
        raise ValueError(f"'{endpoint}' {problem}; for example {example}")
    return endpoint


def share_context() -> Context:
    """Return the context of the process: pyzmq would terminate another one, and block on what is not sent yet."""
    context: Context = zmq.Context.instance()
    context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
    return context


def new_socket(context: Context, socket_type: int) -> Socket:
    """Return a socket that discards what is not sent yet when it is closed; raise Failure if there are too many."""
    try:
        socket = context.socket(socket_type)
    except zmq.ZMQError as error:
        raise Failure(f"cannot open a socket: {error.strerror}") from error
    socket.linger = 0
    return socket


def open_socket(
    context: Context,
    socket_type: int,
    *,
    max_size: int = -1,
    linger: int = 0,
    apply_keys: ApplyKeys | None = None,
) -> Socket:
    """Open a socket with the options that both commands share. Its receive timeout is 0.

    ``max_size``: bytes of the largest frame that a peer may send (-1: any). ``linger``: milliseconds for which closing
    keeps what is not sent yet (-1: no limit). ``apply_keys``: lets the socket use CURVE.
    """
    socket = new_socket(context, socket_type)
    socket.rcvtimeo = 0
    socket.linger = linger
    socket.maxmsgsize = max_size
    socket.rcvhwm = RECEIVE_LIMIT
    socket.reconnect_ivl = NO_RECONNECT_MS
    socket.handshake_ivl = HANDSHAKE_LIMIT_MS
    # A peer that is gone without a FIN is found within 30 s. Heartbeats would cut off slow large messages as well:
    # libzmq takes only a whole message for a sign of life.
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = 10
    socket.tcp_keepalive_intvl = 5
    socket.tcp_keepalive_cnt = 3
    if HAS_CONNECTION_TIMEOUT:
        socket.tcp_maxrt = 30_000
    # Half-open connections must not keep honest clients out.
    socket.backlog = 1024
    if apply_keys:
        apply_keys(socket)
    return socket


def open_monitor(socket: Socket, address: str, events: int) -> Socket:
    """Return a socket that receives ``events`` of ``socket`` at an inproc ``address``; raise Failure, as above."""
    monitor = new_socket(socket.context, zmq.PAIR)
    monitor.rcvhwm = 0  # a full monitor would stop libzmq's thread (libzmq issue 3745)
    try:
        socket.monitor(address, events)
    except zmq.ZMQError as error:
        raise Failure(f"cannot open a socket: {error.strerror}") from error
    monitor.connect(address)
    return monitor


def is_named(endpoint: str) -> bool:
    """Return whether ``endpoint`` has a name that must be resolved before libzmq can connect to it."""
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return endpoint.startswith("tcp://") and ":" not in host and not re.fullmatch(r"[\d.]+", host)


def connect(socket: Socket, endpoint: str) -> None:
    """Connect ``socket``; raise Failure if libzmq does not accept ``endpoint``."""
    if problem := _attach(socket.connect, socket, endpoint):
        raise Failure(f"cannot connect to {endpoint}: {problem}")


def bind(socket: Socket, endpoint: str) -> None:
    """Bind ``socket``; raise Failure if that cannot be done."""
    problem = ""

    def run() -> None:
        nonlocal problem
        problem = _attach(socket.bind, socket, endpoint)
        if problem == NOT_HERE and is_named(endpoint):  # it may have IPv6 addresses alone
            addresses = next(resolve_numeric(endpoint.replace("*", "0")))
            if not all(_attach(socket.bind, socket, address) for address in addresses):
                problem = ""

    # To bind a name may take as long as a name server likes, and meanwhile Python could not handle signals.
    start_thread(run).join()
    if problem:
        raise Failure(f"cannot bind {endpoint}: {problem}")


def _attach(attach: Callable[[str], object], socket: Socket, endpoint: str) -> str:
    """Bind or connect ``socket`` by its method ``attach``; return why that cannot be done, or nothing."""
    socket.ipv6 = "[" in endpoint  # with it, libzmq tries localhost as ::1 alone
    try:
        attach(endpoint)
    except zmq.ZMQError as error:
        return _REASONS.get(error.errno or 0) or str(error.strerror)
    return ""


def receive(socket: Socket) -> list[zmq.Frame]:
    """Return the frames of the next message, not copied; none if there is no message within RCVTIMEO."""
    try:
        frame = socket.recv(copy=False)
    except zmq.Again:
        return []
    return [frame, *socket.recv_multipart(copy=False)] if frame.more else [frame]


def send(socket: Socket, frames: Sequence[Any], flags: int = 0) -> None:
    """Send ``frames``, bytes or Frames, as one message. With NOBLOCK, raises zmq.Again if libzmq takes none now."""
    # Frames below pyzmq's COPY_THRESHOLD, 64 KiB, are copied all the same, which is faster for them.
    if len(frames) == 1:  # half the cost of the general call
        socket.send(frames[0], flags, copy=False)
    else:
        socket.send_multipart(frames, flags, copy=False)
