"""What both ends share: endpoints checked, and sockets opened, bound and connected."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import zmq

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

NOW = int(zmq.NOBLOCK)  # arithmetic with the enum itself is slow

HANDSHAKE_LIMIT = 5.0
"""Seconds that a peer has to finish its handshake before libzmq drops the connection."""

_TCP = re.compile(r"tcp://([\w.%-]+;)?(?P<host>\*|[A-Za-z0-9][\w.%-]*|\[[\w.:%]+\]):(?P<port>\*|\d{1,5})", re.ASCII)

_REASONS = {
    errno.EADDRINUSE: "address in use; stop its server, or take another",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.ENODEV: "this machine has no such address or interface",
    errno.ENOENT: "there is no such folder",
}


class Failure(Exception):
    """Something failed for good; the text tells the user what, and what to do."""


def check_endpoint(endpoint: str, *, bind: bool) -> str:
    """Return ``endpoint`` if it can be bound (or else connected to); raise ValueError if not.

    libzmq takes some of what is refused here for something else: port 99999 wraps to 34463.
    """
    example = "tcp://127.0.0.1:5555"
    problem = ""
    if not endpoint.isprintable():
        problem = "has characters that cannot be printed"
    elif endpoint.startswith("inproc://"):
        problem = "can only meet sockets of its own process"
    elif endpoint.startswith("ipc://"):
        example = "ipc:///tmp/zmqmsg.sock"
        path = endpoint.encode().removeprefix(b"ipc://")
        if path in (b"", b"@", b"*") or len(path) > zmq.IPC_PATH_MAX_LEN:
            problem = f"needs a path of 1 to {zmq.IPC_PATH_MAX_LEN} bytes, without wildcard"
    elif not (match := _TCP.fullmatch(endpoint)):
        problem = "is neither tcp://HOST:PORT, IPv6 in brackets, nor ipc://PATH"
    elif not bind and ("*" in match.groups() or not int(match["port"])):
        problem = "has a wildcard, which can only be bound"
    elif match["port"] != "*" and int(match["port"]) > 65535:
        problem = "has a port beyond 65535"
    if problem:
        raise ValueError(f"'{endpoint}' {problem}; a right one is {example}")
    return endpoint


def is_local(endpoint: str) -> bool:
    """Return whether only this machine can reach what is bound at ``endpoint``, a real one."""
    return endpoint.startswith(("tcp://127.", "tcp://[::1]", "ipc://"))


def open_socket(
    context: Context,
    socket_type: int,
    *,
    max_size: int = -1,
    linger: int = 0,
    thread: int = 0,
    secure: Callable[[Socket], None] | None = None,
) -> Socket:
    """Open a socket with the options that both ends share.

    ``max_size``: bytes of the largest frame that a peer may send (-1: any). ``linger``: milliseconds that what is
    still to be sent has after closing. ``thread``: the number of the context's I/O thread that serves the socket.
    ``secure`` sets its CURVE options.
    """
    socket = context.socket(socket_type)
    socket.linger = linger
    socket.affinity = 1 << thread % 64
    socket.maxmsgsize = max_size
    socket.handshake_ivl = int(HANDSHAKE_LIMIT * 1000)
    socket.reconnect_ivl_max = 1000
    # A peer that is gone without a FIN is found in 30 s. Heartbeats would cut off slow large messages as well:
    # libzmq takes only a whole message for a sign of life.
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = 10
    socket.tcp_keepalive_intvl = 5
    socket.tcp_keepalive_cnt = 3
    socket.tcp_maxrt = 30_000
    # Half-open connections must not keep honest clients out.
    socket.backlog = 1024
    if secure:
        secure(socket)
    return socket


def connect(socket: Socket, endpoint: str) -> None:
    """Connect ``socket``; raise Failure if libzmq does not take ``endpoint``."""
    _attach(socket, endpoint, "connect to", socket.connect)


@contextmanager
def bound(socket: Socket, endpoint: str) -> Iterator[str]:
    """Bind ``socket`` for the time of the context, which gets the real endpoint, its port resolved.

    Raises Failure if it cannot be bound. An ipc socket file is removed at the end: libzmq would leave it.
    """
    # A name that begins with @ is an abstract one of Linux: no file.
    path = endpoint.removeprefix("ipc://") if re.match("ipc://[^@]", endpoint) else ""
    if path and _is_taken(path):
        raise Failure(f"cannot bind {endpoint}: there is a server or a file already; take another path")
    _attach(socket, endpoint, "bind", socket.bind)
    inode = os.lstat(path).st_ino if path else None
    try:
        yield cast(bytes, socket.last_endpoint).rstrip(b"\0").decode()
    finally:
        with suppress(OSError):
            if path and os.lstat(path).st_ino == inode:
                os.unlink(path)


def _attach(socket: Socket, endpoint: str, verb: str, attach: Callable[[str], object]) -> None:
    # With IPV6 on, libzmq tries localhost as ::1 alone.
    socket.ipv6 = "[" in endpoint
    try:
        attach(endpoint)
    except zmq.ZMQError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise Failure(f"cannot {verb} {endpoint}: {reason}") from error


def _is_taken(path: str) -> bool:
    """Return whether there is more than a stale socket at ``path``: libzmq would unlink whatever it is."""
    import socket

    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
        probe.setblocking(False)
        # Only where nobody listens is it refused; a busy server answers EAGAIN.
        return not is_socket or probe.connect_ex(path) != errno.ECONNREFUSED
    return False
