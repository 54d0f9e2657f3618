"""What ``serve`` binds: the endpoints, and what the user is told of them."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

from zmqmsg.background import Background
from zmqmsg.names import is_interface, is_named, resolve_to_endpoints, split_endpoint
from zmqmsg.notices import Failure, notify
from zmqmsg.sockets import NOT_HERE, Socket, bind
from zmqmsg.stopping import Stop
from zmqmsg.system import UNIX_FAMILY, is_owned_by_another

RESOLVE_INTERVAL = 0.02  # seconds between checks whether a name was resolved

# How endpoints begin that only this machine can reach.
LOCAL = ("tcp://127.", "tcp://[::1]", "ipc://")
ALL_ADDRESSES = {"tcp://0.0.0.0": "all IPv4 addresses", "tcp://[::]": "all IPv4 and IPv6 addresses"}


class StopRequested(Exception):
    """A signal came before the endpoint was bound."""


@contextmanager
def bound(socket: Socket, endpoint: str, stop: Stop) -> Iterator[str]:
    """Bind ``socket`` while the context lasts, and yield the real endpoint, with its port.

    Raises Failure, or StopRequested while a name server does not answer.
    """
    path = socket_path(endpoint)
    if path:
        make_room(path, endpoint)
    bind_to_any(socket, endpoint, find_addresses(endpoint, stop))
    inode = os.lstat(path).st_ino if path else None
    try:
        yield os.fsdecode(cast(bytes, socket.last_endpoint).rstrip(b"\0"))
    finally:
        with suppress(OSError):  # libzmq leaves the socket file behind
            # Another server may have replaced it meanwhile.
            if path and os.lstat(path).st_ino == inode:
                os.unlink(path)


def find_addresses(endpoint: str, stop: Stop) -> list[str]:
    """Return the endpoints, with addresses in numbers, that ``endpoint`` stands for.

    libzmq would block on a name server, and then a signal would not end us. The names of interfaces
    are left to libzmq. Raises Failure or StopRequested.
    """
    host, port = split_endpoint(endpoint)
    if not is_named(endpoint) or is_interface(host):
        return [endpoint]
    scope = host.partition("%")[2]
    if scope and not is_interface(scope):
        raise Failure(f"cannot bind {endpoint}: this machine has no network interface '{scope}'")
    # getaddrinfo() accepts no wildcard as a port; 0 means the same.
    name = endpoint if port != "*" else endpoint.removesuffix("*") + "0"
    resolver = Background(resolve_to_endpoints(name))
    while not resolver.is_over():
        if stop.wait(RESOLVE_INTERVAL):
            raise StopRequested
    if not resolver.latest:
        raise Failure(f"cannot bind {endpoint}: {NOT_HERE}")
    return cast(list[str], resolver.latest)


def bind_to_any(socket: Socket, endpoint: str, addresses: list[str]) -> None:
    """Bind ``socket`` to the first of ``addresses`` that can be bound; raise Failure."""
    reasons: list[str] = []
    for address in addresses:
        reason = bind(socket, address)
        if not reason:
            return
        reasons.append(reason)
    raise Failure(f"cannot bind {endpoint}: {reasons[0]}")


# Paths of Unix sockets


def socket_path(endpoint: str) -> str:
    """Return the path of an ipc endpoint; nothing for others, and for abstract names of Linux."""
    return endpoint.removeprefix("ipc://") if re.match("ipc://[^@]", endpoint) else ""


def make_room(path: str, endpoint: str) -> None:
    """Remove a stale socket at ``path``; raise Failure if something else is there, or OSError.

    libzmq would remove whatever is there, even the socket of a server that runs.
    """
    if not os.path.lexists(path):
        return
    if not is_stale_socket(path):
        # Whether a socket is stale can be seen only by those who may use it.
        whose = (
            "another user's server or file" if is_owned_by_another(path) else "a server or a file"
        )
        raise Failure(f"cannot bind {endpoint}: {whose} is there already; choose another path")
    try:
        os.unlink(path)
    except PermissionError:
        if not is_owned_by_another(path):
            raise
        raise Failure(
            f"cannot bind {endpoint}: another user's server has left its socket there, which only"
            " that user may remove; choose another path"
        ) from None
    except FileNotFoundError:
        pass  # somebody else was faster


def is_stale_socket(path: str) -> bool:
    """Return whether there is a socket at ``path`` where nobody listens; raise OSError."""
    import socket  # 3 ms, only for servers on ipc paths

    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(UNIX_FAMILY) as client:
        client.setblocking(False)
        # A busy server answers EAGAIN.
        return client.connect_ex(path) == errno.ECONNREFUSED


# What the user is told


def notify_of_endpoint(endpoint: str, *, checks_clients: bool) -> None:
    """Tell the user what is bound, with a warning if anybody on the network may use it."""
    host, _, port = endpoint.rpartition(":")
    everywhere = ALL_ADDRESSES.get(host)
    where = f"{everywhere}, port {port}" if everywhere else endpoint
    notify(f"listening on {where}")
    if not checks_clients and not endpoint.startswith(LOCAL):
        place = f"port {port}" if everywhere else endpoint
        notify(
            f"warning: anyone who can reach {place} can use it;"
            " restrict access with --key and --client-keys",
            "yellow",
        )
