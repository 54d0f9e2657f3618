"""What may be written as an endpoint, and what to write instead of what may not."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress

import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.system import HAS_ABSTRACT_NAMES

IPC_EXAMPLE = "ipc:///tmp/zmqmsg.sock"
MAX_PORT = 65535

_TCP = re.compile(
    r"tcp://"
    r"(?P<host>\*|[A-Za-z0-9][\w.%-]*|\[(?P<ipv6>[\w.:]+)(?P<scope>%[\w.-]+)?\])"
    r":(?P<port>\*|\d{1,9})",
    re.ASCII,
)
_LINK_LOCAL = re.compile("fe[89ab]", re.IGNORECASE)  # the first ten bits of fe80::/10
_IPV6 = re.compile("[^%]*::|([^:%]+:){7}[^:%]")  # that has all its parts, or :: instead
_HOST_AND_PORT = re.compile(r"(?P<host>[^/@\s]*?):(?P<port>\d{1,5})")


def check_endpoint(endpoint: str, *, bind: bool) -> str:
    """Return ``endpoint`` if it can be bound, or else connected to.

    Raises ValueError, which says what to write instead.
    """
    reason = find_fault(endpoint, bind=bind)
    if not reason:
        return endpoint
    instead = suggest_endpoint(endpoint, bind=bind)
    if instead:
        raise ValueError(f"'{endpoint}' {reason}; write {instead}")
    example = IPC_EXAMPLE if endpoint.startswith("ipc:") and zmq.has("ipc") else DEFAULT_ENDPOINT
    raise ValueError(f"'{endpoint}' {reason}; for example {example}")


def find_fault(endpoint: str, *, bind: bool) -> str:
    """Return what is wrong with ``endpoint``, or nothing."""
    if not endpoint.isprintable():
        return "has characters that cannot be printed"
    if endpoint.startswith("inproc://"):
        return "only works within one process"
    if endpoint.startswith("ipc://"):
        return find_fault_of_ipc(endpoint)
    return find_fault_of_tcp(endpoint, bind=bind)


def find_fault_of_ipc(endpoint: str) -> str:
    """Return what is wrong with an ipc endpoint, or nothing."""
    if not zmq.has("ipc"):
        return "needs Unix sockets, which ZeroMQ does not have on this system"
    path = os.fsencode(endpoint).removeprefix(b"ipc://")
    if path.startswith(b"@") and not HAS_ABSTRACT_NAMES:
        return "has an abstract name, which only Linux has"
    is_empty = path in (b"", b"@")
    if is_empty or path.startswith(b"*") or len(path) > zmq.IPC_PATH_MAX_LEN:
        return f"needs a path of 1 to {zmq.IPC_PATH_MAX_LEN} bytes, without wildcards"
    return ""


def find_fault_of_tcp(endpoint: str, *, bind: bool) -> str:
    """Return what is wrong with a tcp endpoint, or nothing."""
    match = _TCP.fullmatch(endpoint)
    if not match:
        if "," in endpoint:
            return "has a comma; repeat the option, or put spaces between endpoints in a variable"
        if not endpoint.isascii() and endpoint.startswith("tcp://"):
            return "has characters in its name that ZeroMQ does not accept"
        return "is neither tcp://HOST:PORT (IPv6 in brackets) nor ipc://PATH"
    host, port = match["host"], match["port"]
    if not bind and (host == "*" or port == "*" or int(port) == 0):
        return "has a wildcard or port 0, which only --bind accepts"
    if port != "*" and int(port) > MAX_PORT:  # libzmq would take it modulo 65536
        return f"has a port above {MAX_PORT}"
    if match["ipv6"] and _LINK_LOCAL.match(match["ipv6"]) and not match["scope"]:
        return "is a link-local address, which needs the name of its interface, such as eth0"
    return ""


def suggest_endpoint(text: str, *, bind: bool) -> str:
    """Return the endpoint that ``text`` is likely to mean, or nothing."""
    for candidate in guess_endpoints(text.strip()):
        if candidate != text and not find_fault(candidate, bind=bind):
            return candidate
    return ""


def guess_endpoints(text: str) -> Iterator[str]:
    """Yield what ``text`` may mean; the caller drops what is no endpoint."""
    scheme, rest = split_scheme(text)
    if scheme == "ipc":
        yield f"ipc://{rest}"
    elif scheme in ("tcp", "http", "zmq", "zmtp"):
        yield from guess_tcp_endpoints(rest.strip("/"))


def split_scheme(text: str) -> tuple[str, str]:
    """Return the scheme that ``text`` has, or should have, and the rest."""
    scheme, separator, rest = text.partition("://")
    if separator:
        return scheme.lower(), rest
    if match := re.match("(tcp|ipc):", text, re.IGNORECASE):  # tcp:5555 or tcp:/127.0.0.1:5555
        return match[1].lower(), text[match.end() :]
    if text.startswith("/") and ":" not in text:  # /tmp/a.sock
        return "ipc", text
    return "tcp", text  # 127.0.0.1:5555 or 5555


def guess_tcp_endpoints(text: str) -> Iterator[str]:
    """Yield what ``text``, a host and a port, may mean."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if ":" not in host:
        yield f"tcp://{host}:{port}"
        with suppress(UnicodeError):
            yield f"tcp://{host.encode('idna').decode()}:{port}"
        return
    if _LINK_LOCAL.match(host) and "%" not in host:
        host += "%eth0"
    if _IPV6.match(host):  # ::1 without a port does not get here
        yield f"tcp://[{host}]:{port}"


def looks_like_endpoint(text: str) -> bool:
    """Return whether a message looks as if its sender wanted to connect there."""
    if text.startswith(("tcp://", "ipc://")):
        return True
    match = _HOST_AND_PORT.fullmatch(text)
    if not match or int(match["port"]) > MAX_PORT:
        return False
    host = match["host"]
    return host == "localhost" or bool(re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}|\[[\da-f:]+\]", host))
