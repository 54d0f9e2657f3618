"""Resolves the names in endpoints to numeric addresses. Does not import zmq."""

import errno
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from zmqmsg.system import UNIX_FAMILY

Address = tuple[int, Any]  # family and address, in the form that the socket module uses


def split_endpoint(endpoint: str) -> tuple[str, str]:
    """Return host, without brackets, and port of a tcp endpoint."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), port


def is_named(endpoint: str) -> bool:
    """Return whether ``endpoint`` has a name of a host, or of an interface after a ``%``."""
    if not endpoint.startswith("tcp://"):
        return False
    host, _port = split_endpoint(endpoint)
    address, _, scope = host.partition("%")
    is_numeric = ":" in address or re.fullmatch(r"[\d.]+|\*", address)
    return not is_numeric or bool(scope and not scope.isdigit())


def is_interface(name: str) -> bool:
    """Return whether ``name`` is that of a network interface of this machine."""
    import socket

    with suppress(OSError):
        return name in (interface for _index, interface in socket.if_nameindex())
    return False


def resolve(endpoint: str) -> list[Address]:
    """Return the addresses that ``endpoint`` may mean, IPv4 first. May take long.

    Raises OSError, or UnicodeError for a name that is not valid.
    """
    import socket

    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        # The kernel marks abstract names by a NUL, libzmq by an @.
        return [(UNIX_FAMILY, f"\0{rest[1:]}" if rest.startswith("@") else rest)]
    host, port = split_endpoint(endpoint)
    scope = host.partition("%")[2]
    if scope and not scope.isdigit() and not is_interface(scope):
        raise OSError(errno.ENODEV, f"this machine has no network interface '{scope}'")
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    addresses = [(int(family), address) for family, _, _, _, address in found]
    return sorted(dict.fromkeys(addresses), key=lambda each: each[0] != socket.AF_INET)


def resolve_to_endpoints(endpoint: str) -> Iterator[list[str]]:
    """Yield the endpoints with numeric addresses that ``endpoint`` stands for; none if that fails.

    It yields once, so that it can run as a Background.
    """
    addresses: list[Address] = []
    with suppress(OSError, UnicodeError):
        addresses = resolve(endpoint)
    yield [to_endpoint(address) for _family, address in addresses]


def to_endpoint(address: Any) -> str:
    """Return the tcp endpoint of a socket's address."""
    host, port, *ipv6 = address
    if not ipv6:
        return f"tcp://{host}:{port}"
    _flow, scope = ipv6  # a link-local address needs its scope
    return f"tcp://[{host}%{scope}]:{port}" if scope else f"tcp://[{host}]:{port}"


def plain_address(address: str) -> str:
    """Return a numeric address; one of IPv4 as such, also where a socket of IPv6 shows it."""
    return address.removeprefix("::ffff:") if "." in address else address


def in_words(error: Exception) -> str:
    """Return the system's own words for ``error``."""
    if isinstance(error, UnicodeError):  # whose words are about codecs
        return "not a valid name"
    if isinstance(error, TimeoutError):
        return "connection timed out"
    words = getattr(error, "strerror", None) or str(error)
    return words[:1].lower() + words[1:]
