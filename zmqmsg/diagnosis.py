"""What stands in the way at an endpoint: connect with a plain socket, and report how far the handshake gets.

Everything here is asked of the peer or of the system; nothing is deduced from what libzmq reports. Does not import zmq.
ZMTP, the protocol, is described at https://rfc.zeromq.org/spec/23 (3.0), /15 (2.0) and /13 (1.0).
"""

import math
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from zmqmsg.quoting import abridge
from zmqmsg.system import UNIX_FAMILY, start_thread

if TYPE_CHECKING:
    from socket import socket  # otherwise for names and in trouble only: to import it takes 3 ms

# Times, in seconds
GREETING_DELAY = 5.0  # after which a peer that has not greeted is likely to be no ZeroMQ, or hung
STEP_LIMIT = 60.0  # in which a peer has to take the next step before the probe ends
CONNECT_LIMIT = 10.0  # in which one of several addresses has to accept a connection

# A greeting of ZMTP 3.0. ZMTP 2 begins in the same way.
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING_VERSION = b"\x03\x00"
GREETING_REST = b"NULL".ljust(20, b"\0") + bytes(32)  # mechanism, as-server and filler
# The command that ends a handshake of ours: flags, length, name, and one property with the length of its value.
READY = b"\x04\x19\x05READY\x0bSocket-Type" + (3).to_bytes(4) + b"REQ"
# The socket types of ZMTP 2, in the order of their numbers.
OLD_TYPES = ("PAIR", "PUB", "SUB", "REQ", "REP", "DEALER", "ROUTER", "PULL", "PUSH", "XPUB", "XSUB")

WRONG_MECHANISM = {
    "CURVE": "it requires CURVE; pass --server-key",
    "NULL": "it does not use CURVE: is it the right server?",
}


class Finding(NamedTuple):
    """What a probe has found."""

    reason: str  # completes "waiting for ENDPOINT: ..."; empty if nothing is wrong
    hopeless: bool = False  # whether waiting does not help
    old: bool = False  # whether the peer speaks ZMTP 1 or 2, whose handshake libzmq does not report


OLD_PEER = Finding("", old=True)


class Background:
    """Runs an iterator in a daemon thread, as a name server or a peer may hold it up for as long as it likes."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.latest: Any = None  # what it has yielded last
        self.began = time.monotonic()
        self.ended = math.inf
        self._iterator = iterator
        try:
            start_thread(self._run)
        except OSError:  # too many threads; whoever wants the answer asks again
            self.ended = self.began

    def _run(self) -> None:
        # Without descriptors nothing can be imported; whoever wants the answer asks again.
        with suppress(OSError, ImportError, LookupError):
            for latest in self._iterator:
                self.latest = latest
        self.ended = time.monotonic()


def diagnose(
    endpoint: str, wanted: Collection[str], *, curve: bool, was_ready: bool
) -> Iterator[Finding]:
    """Yield where the way to a peer at ``endpoint`` stands, step by step; the last finding is final.

    ``wanted``: the types that its socket may have. ``curve``: whether we use CURVE. ``was_ready``: whether a good peer
    has been there, so that the port is certainly right. Each step takes ``STEP_LIMIT`` seconds at most; name resolution
    has no limit.
    """
    yield Finding("resolving the name takes long")
    try:
        addresses = resolve(endpoint)
    except (OSError, UnicodeError) as error:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        yield Finding(f"cannot resolve {host}: {in_words(error)}")
        return

    yield Finding("connecting takes long")
    try:
        peer = connect_to_any(addresses)
    except OSError as error:
        yield Finding(in_words(error))
        return

    with peer:
        try:
            yield from greet(peer, wanted, curve=curve, was_ready=was_ready)
        except TimeoutError:
            return
        except OSError:
            yield Finding("connected, but the connection was closed during the ZeroMQ handshake")


def resolve_numeric(endpoint: str) -> Iterator[list[str]]:
    """Yield, once, the endpoints with addresses in numbers that ``endpoint`` stands for; none if there are none."""
    addresses: list[tuple[int, Any]] = []
    with suppress(OSError, UnicodeError):
        addresses = resolve(endpoint)
    yield [
        # An IPv6 address has a flow label and a scope, which a link-local one needs.
        f"tcp://[{host}{f'%{rest[1]}' if rest[1] else ''}]:{port}"
        if rest
        else f"tcp://{host}:{port}"
        for _family, (host, port, *rest) in addresses
    ]


def resolve(endpoint: str) -> list[tuple[int, Any]]:
    """Return family and address of each socket that ``endpoint`` may mean, IPv4 first; raise OSError. May take long."""
    import socket

    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return [(UNIX_FAMILY, f"\0{rest[1:]}" if rest.startswith("@") else rest)]
    host, _, port = rest.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    addresses = [(int(family), address) for family, _, _, _, address in found]
    return sorted(dict.fromkeys(addresses), key=lambda each: each[0] != socket.AF_INET)


def connect_to_any(addresses: list[tuple[int, Any]]) -> "socket":
    """Return a connection to the first of ``addresses`` that accepts one; raise the first OSError if none does."""
    import socket

    failures: list[OSError] = []
    for family, address in addresses:
        peer = None
        try:
            peer = socket.socket(family, socket.SOCK_STREAM)
            peer.settimeout(STEP_LIMIT if len(addresses) == 1 else CONNECT_LIMIT)
            peer.connect(address)
            # TCP can connect to a free port from that very port.
            if family != UNIX_FAMILY and peer.getsockname() == peer.getpeername():
                raise ConnectionRefusedError("Connection refused")
        except OSError as error:
            failures.append(error)
            if peer:
                peer.close()
        else:
            return peer
    raise failures[0]


def greet(
    peer: "socket", wanted: Collection[str], *, curve: bool, was_ready: bool
) -> Iterator[Finding]:
    """Begin to greet ``peer``, and yield what can be said of it until its handshake ends.

    libzmq hangs up on a whole greeting with another mechanism before it shows its own, and JeroMQ 0.3 on any whole
    greeting. So each part is sent only when the peer has said enough.
    """
    mute = "connected, but no ZeroMQ greeting yet"
    yield Finding(mute)
    peer.sendall(SIGNATURE)
    received = b""
    peer.settimeout(GREETING_DELAY)
    try:
        received = read(peer, received, 1)
    except TimeoutError:
        yield Finding(
            f"{mute}; {'the server may be hung' if was_ready else 'wrong port, or a hung server?'}"
        )
    peer.settimeout(STEP_LIMIT)
    received = read(peer, received, 1)
    if received[:1] == SIGNATURE[:1]:
        received = read(peer, received, len(SIGNATURE))
        if received[9:10] == SIGNATURE[9:]:
            yield from shake_hands(peer, received, wanted, curve=curve)
            return
    # ZMTP 1 begins with a frame: the length of what follows, flags (0), and an identity.
    elif received[1:2] in (b"", b"\0"):
        received = read(peer, received, 1 + received[0])
        if received[1:2] == b"\0" and len(received) == 1 + received[0]:
            yield judge("", wanted, old="ZMTP 1", curve=curve)
            return
    yield Finding(f"it does not speak ZeroMQ; it says {abridge(received)}", hopeless=True)


def shake_hands(
    peer: "socket", received: bytes, wanted: Collection[str], *, curve: bool
) -> Iterator[Finding]:
    """Go on after the signature of ``peer``, and yield what it is."""
    yield Finding("connected, but the ZeroMQ handshake is not finished yet")
    peer.sendall(GREETING_VERSION)
    received = read(peer, received, 12)
    if received[10] < 3:
        socket_type = (
            OLD_TYPES[received[11]] if received[10] and received[11] < len(OLD_TYPES) else ""
        )
        yield judge(socket_type, wanted, old="ZMTP 2", curve=curve)
        return

    received = read(peer, received, 64)
    mechanism = received[12:32].rstrip(b"\0").decode(errors="backslashreplace")
    if mechanism != ("CURVE" if curve else "NULL"):
        yield Finding(
            WRONG_MECHANISM.get(mechanism, f"it requires {mechanism}, which zmqmsg does not speak"),
            True,
        )
    elif curve:
        yield Finding("")  # whether it knows our key, libzmq reports
    else:
        peer.sendall(GREETING_REST)
        socket_type = read_socket_type(peer, received)
        if socket_type in ("REP", "ROUTER"):
            peer.sendall(READY)  # or the server would report a client that hangs up
        yield judge(socket_type, wanted)


def read_socket_type(peer: "socket", received: bytes) -> str:
    """Return the Socket-Type of the READY command after the greeting's 64 bytes; empty if something else follows."""
    received = read(peer, received, 66)
    length = received[65]
    if received[64] & 2:  # a long command
        length = int.from_bytes(read(peer, received, 73)[65:73])
    received = read(peer, received, 66 + min(length, 1024))
    value = received[64:].partition(b"\x0bSocket-Type")[2]
    return value[4 : 4 + int.from_bytes(value[:4])].decode(errors="backslashreplace")


def judge(
    socket_type: str, wanted: Collection[str], *, old: str = "", curve: bool = False
) -> Finding:
    """Return what to think of a peer whose socket is of ``socket_type`` (empty: not known); ``old``: its protocol."""
    if old and curve:
        return Finding(f"it speaks {old}, which is too old for CURVE", hopeless=True)
    if not socket_type or socket_type in wanted:
        return OLD_PEER if old else Finding("")
    return Finding(f"it is a {socket_type} socket, not a {' or '.join(wanted)}", hopeless=True)


def read(peer: "socket", received: bytes, size: int) -> bytes:
    """Return ``received`` and what comes after it, ``size`` bytes at least; raise OSError if they do not come."""
    while len(received) < size:
        if not (data := peer.recv(4096)):
            raise ConnectionError
        received += data
    return received


def in_words(error: Exception) -> str:
    """Return the system's own words for ``error``."""
    if isinstance(error, UnicodeError):  # whose words are about codecs
        return "not a valid name"
    if isinstance(error, TimeoutError):
        return "connection timed out"
    words = getattr(error, "strerror", None) or str(error)
    return words[:1].lower() + words[1:]
