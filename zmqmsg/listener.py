"""What ``serve`` binds: the endpoints, what the user is told of them, and the clients that do not get through."""

import errno
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

import zmq

from zmqmsg.console import CLIENT_INTERVAL, ClientNotices, Failure, notify
from zmqmsg.sockets import Socket, bind, open_monitor
from zmqmsg.system import UNIX_FAMILY, start_thread

HUNG_UP = (
    "the handshake was broken off: its socket is no REQ or DEALER, it does not speak ZeroMQ, one side has keys, and the"
    " other has none, it is an old client (ZMTP 1 or 2) that is done, or it looks why it has to wait"
)
WRONG = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "one side has keys, and the other has none",
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): "its --server-key is not the key of this server",
}


@contextmanager
def bound(socket: Socket, endpoint: str) -> Iterator[str]:
    """Bind ``socket`` while the context lasts, and yield the real endpoint, with its port; raise Failure."""
    # A name that begins with @ is an abstract one of Linux: no file.
    path = endpoint.removeprefix("ipc://") if re.match("ipc://[^@]", endpoint) else ""
    if path and _is_taken(path):
        raise Failure(
            f"cannot bind {endpoint}: a server or a file is there already; choose another path"
        )
    bind(socket, endpoint)
    inode = os.lstat(path).st_ino if path else None
    try:
        yield cast(bytes, socket.last_endpoint).rstrip(b"\0").decode()
    finally:
        with suppress(OSError):  # libzmq leaves the socket file behind
            if path and os.lstat(path).st_ino == inode:
                os.unlink(path)


def _is_taken(path: str) -> bool:
    """Return whether there is more than a stale socket at ``path``, which libzmq would unlink; raise OSError."""
    import socket  # 3 ms, for servers on ipc paths alone

    if not os.path.lexists(path):
        return False
    with socket.socket(UNIX_FAMILY) as probe:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
        probe.setblocking(False)
        # Only where nobody listens is it refused; a busy server answers EAGAIN.
        return not is_socket or probe.connect_ex(path) != errno.ECONNREFUSED


LOCAL = (
    "tcp://127.",
    "tcp://[::1]",
    "ipc://",
)  # how endpoints begin that only this machine can reach
ALL_ADDRESSES = {"tcp://0.0.0.0": "all IPv4 addresses", "tcp://[::]": "all IPv4 and IPv6 addresses"}


def notify_of_endpoint(endpoint: str, *, open_to_all: bool) -> None:
    """Tell the user what is bound, with a warning if other machines can reach it and nobody is kept out."""
    host, _, port = endpoint.rpartition(":")
    everywhere = ALL_ADDRESSES.get(host)
    notify(f"listening on {everywhere}, port {port}" if everywhere else f"listening on {endpoint}")
    if open_to_all and not endpoint.startswith(LOCAL):
        where = f"port {port}" if everywhere else endpoint
        text = (
            f"anyone who can reach {where} can use it; restrict access with --key and --client-keys"
        )
        notify(f"warning: {text}", "yellow")


def watch_handshakes(socket: Socket) -> None:
    """Notify the user of clients of ``socket``, not bound yet, whose handshakes fail; raise Failure or OSError."""
    # A thread reads the monitor, even while the server waits for a command: one that nobody reads stops the server.
    handshake = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    failure = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    events = zmq.EVENT_ACCEPTED | handshake | failure | zmq.EVENT_DISCONNECTED
    monitor = open_monitor(socket, "inproc://zmqmsg.listener", events)
    start_thread(lambda: _report_handshakes(monitor))


def _report_handshakes(monitor: Socket) -> None:
    notices = ClientNotices()
    addresses: dict[int, str] = {}  # of each connection, by its descriptor
    unfinished: set[int] = set()  # connections whose handshakes have certainly not succeeded
    explained: dict[
        str, float
    ] = {}  # addresses of which more is known than that they hang up, and since when
    reason = ""
    with monitor, suppress(zmq.ContextTerminated):
        while True:
            event, value = struct.unpack("=HI", monitor.recv_multipart()[0])
            if event == zmq.EVENT_ACCEPTED:
                addresses[value] = _peer_address(value)
                unfinished.add(value)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                reason = WRONG.get(value, "it broke the protocol of the handshake")
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                reason = HUNG_UP
            elif (
                event != zmq.EVENT_DISCONNECTED
            ):  # it succeeded, or ZAP tells of it; whose, libzmq does not say
                unfinished.clear()
            else:  # which follows the others, and says whose they are
                address = addresses.pop(value, "an unknown address")
                # It ends without a word where our side finds a socket of the wrong type first.
                reason = reason or (HUNG_UP if value in unfinished else "")
                unfinished.discard(value)
                # A client that looks why it does not get through also hangs up.
                now = time.monotonic()
                explained = {
                    each: since
                    for each, since in explained.items()
                    if now - since < CLIENT_INTERVAL
                }
                if reason and not (reason is HUNG_UP and address in explained):
                    notices.report(f"a client from {address} did not get through: {reason}")
                if reason and reason is not HUNG_UP:
                    explained[address] = now
                reason = ""


def _peer_address(descriptor: int) -> str:
    """Return the address of whoever is connected to the socket with this ``descriptor`` of libzmq."""
    from socket import socket

    with suppress(OSError):  # it is gone already
        peer = socket(fileno=descriptor)
        try:
            name = peer.getpeername()
            return str(name[0]) if isinstance(name, tuple) else "a Unix socket"
        finally:
            peer.detach()
    return "an unknown address"
