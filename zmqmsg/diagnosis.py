"""What stands in the way at an endpoint: try it with a plain socket, and report how far that gets.

Everything here is asked of the peer or of the system; nothing is deduced from what libzmq reports.
Does not import zmq. ZMTP, the protocol, is described at https://rfc.zeromq.org/spec/23 (3.0),
/15 (2.0) and /13 (1.0).
"""

from collections.abc import Collection, Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from zmqmsg.names import Address, in_words, is_named, resolve, split_endpoint
from zmqmsg.quoting import abridge
from zmqmsg.system import UNIX_FAMILY

if TYPE_CHECKING:
    from socket import socket  # imported below only in trouble: it takes 3 ms

# Times, in seconds
STEP_LIMIT = 60.0  # in which a peer has to take the next step before the probe ends
HANG_UP_LIMIT = 0.5  # in which a server hangs up on another mechanism
ADDRESS_LIMIT = 3.0  # in which one of several addresses has to accept a connection

# The greeting of ZMTP 3.0: signature (10 bytes), version (2), mechanism (20), as-server (1) and
# filler (31). ZMTP 2 has the same signature, then its revision (1 byte) and socket type (1).
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
VERSION_AT = 10
MECHANISM_AT = 12
MECHANISM_END = 32
GREETING_SIZE = 64
VERSION = b"\x03\x00"
MECHANISM_SIZE = 20
REST_OF_GREETING = bytes(32)
# A command of ZMTP 3.0: flags (1 byte), size (1 byte, or 8 if the flags say so), and a body that
# begins with the command's name. READY has properties: name, size of the value (4 bytes), value.
LONG_FLAG = 2
COMMAND_LIMIT = 1024  # bytes of a READY command to read; the Socket-Type is among the first
SOCKET_TYPE = b"\x0bSocket-Type"
READY_FROM_REQ = b"\x04\x19\x05READY" + SOCKET_TYPE + (3).to_bytes(4) + b"REQ"
# The socket types of ZMTP 2, in the order of their numbers.
ZMTP_2_TYPES = (
    "PAIR", "PUB", "SUB", "REQ", "REP", "DEALER", "ROUTER", "PULL", "PUSH", "XPUB", "XSUB"
)  # fmt: skip

WRONG_MECHANISM = {
    "CURVE": "it requires CURVE; pass --server-key",
    "NULL": "it does not use CURVE: is it the right server?",
}


class Finding(NamedTuple):
    """What a probe has found."""

    reason: str  # completes "waiting for ENDPOINT: ..."; empty if nothing is wrong
    hopeless: bool = False  # whether waiting does not help
    old: bool = False  # whether the peer speaks ZMTP 1 or 2, whose handshake libzmq does not report
    passing: bool = False  # whether it is a state of the link, which soon becomes another one


USABLE = Finding("")
USABLE_OLD_PEER = Finding("", old=True)


class Expected(NamedTuple):
    """The peer that is looked for at an endpoint."""

    socket_types: Collection[str]
    curve: bool  # whether we use CURVE
    was_ready: bool  # whether such a peer has been there, so that the port is certainly right
    patience: float  # seconds after which a peer that says nothing is likely to be no such peer


class Stream:
    """All that a peer says over a connection, kept from its first byte on."""

    def __init__(self, connection: "socket") -> None:
        self.send = connection.sendall
        self._connection = connection
        self.received = b""

    def read_at_least(self, size: int, limit: float = STEP_LIMIT) -> bytes:
        """Return all that has come, once it is ``size`` bytes at least.

        Raises TimeoutError after ``limit`` seconds of silence, or OSError if the connection ends.
        """
        self._connection.settimeout(limit)
        while len(self.received) < size:
            data = self._connection.recv(4096)
            if not data:
                raise ConnectionError
            self.received += data
        return self.received


def diagnose(endpoint: str, expected: Expected) -> Iterator[Finding]:
    """Yield where the way to a peer at ``endpoint`` stands, step by step; the last one is final.

    Each step takes ``STEP_LIMIT`` seconds at most, but resolving a name has no limit.
    """
    # Resolve
    if is_named(endpoint):
        yield Finding("resolving the name takes long")
    try:
        addresses = resolve(endpoint)
    except (OSError, UnicodeError) as error:
        host, _port = split_endpoint(endpoint)
        yield Finding(f"cannot resolve {host}: {in_words(error)}")
        return

    # Connect
    connection = yield from connect_to_any(addresses)
    if not connection:
        return

    # Shake hands
    with connection:
        try:
            yield from greet(Stream(connection), expected)
        except TimeoutError:
            return  # what was found before stays true
        except OSError:
            yield Finding("connected, but the connection was closed during the ZeroMQ handshake")


def connect_to_any(addresses: list[Address]) -> Generator[Finding, None, "socket | None"]:
    """Yield what happens at each of ``addresses``; return a connection to the first that accepts.

    If there are several, the findings name them.
    """
    several = len(addresses) > 1
    reasons: list[str] = []
    for family, address in addresses:
        host = address[0] if several else ""
        yield Finding(f"connecting to {host} takes long" if several else "connecting takes long")
        try:
            return connect(family, address, ADDRESS_LIMIT if several else STEP_LIMIT)
        except OSError as error:
            reasons.append(f"{in_words(error)} ({host})" if several else in_words(error))
    yield Finding("; ".join(dict.fromkeys(reasons)))
    return None


def connect(family: int, address: object, limit: float) -> "socket":
    """Return a connection to ``address``; raise OSError, TimeoutError after ``limit`` seconds."""
    import socket

    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(limit)
        connection.connect(address)  # type: ignore[arg-type]  # what getaddrinfo() has returned
        # TCP can connect to a free port from that very port.
        if family != UNIX_FAMILY and connection.getsockname() == connection.getpeername():
            raise ConnectionRefusedError("Connection refused")
    except OSError:
        connection.close()
        raise
    return connection


def greet(stream: Stream, expected: Expected) -> Iterator[Finding]:
    """Begin to greet, and yield what can be said of the peer until its handshake ends.

    libzmq hangs up on a whole greeting with another mechanism before it shows its own, and JeroMQ
    0.3 on any whole greeting. So each part is sent only when the peer has said enough.
    """
    silent = "connected, but no ZeroMQ greeting yet"
    yield Finding(silent)
    stream.send(SIGNATURE)
    with suppress(TimeoutError):
        stream.read_at_least(1, expected.patience)
    if not stream.received:
        guess = "the server may be hung" if expected.was_ready else "wrong port, or a hung server?"
        yield Finding(f"{silent}; {guess}")

    if sends_signature(stream):
        yield from shake_hands(stream, expected)
    elif speaks_zmtp_1(stream):
        yield judge_old_peer("ZMTP 1", "", expected)
    else:
        said = abridge(stream.received)
        yield Finding(f"it does not speak ZeroMQ; it says {said}", hopeless=True)


def sends_signature(stream: Stream) -> bool:
    """Return whether the peer begins with the signature of ZMTP 2 and later."""
    first, last = SIGNATURE[:1], SIGNATURE[-1:]
    if not stream.read_at_least(1).startswith(first):
        return False
    size = len(SIGNATURE)
    return stream.read_at_least(size)[:size].endswith(last)  # what is between them may differ


def speaks_zmtp_1(stream: Stream) -> bool:
    """Return whether the peer says what one of ZMTP 1 begins with: a frame with its identity.

    The frame is the size of what follows (1 byte), flags (1 byte, 0) and the identity. Anything
    more, as in the banner of an SSH server, is another protocol.
    """
    received = stream.read_at_least(1)
    flags = received[1:2]  # nothing if they have not come yet
    if received.startswith(SIGNATURE[:1]) or flags not in (b"", b"\0"):
        return False
    size = 1 + received[0]
    received = stream.read_at_least(size)
    return received[1:2] == b"\0" and len(received) == size


def shake_hands(stream: Stream, expected: Expected) -> Iterator[Finding]:
    """Go on after the signature of ZMTP 2 or later, and yield what the peer is."""
    yield Finding("connected, but the ZeroMQ handshake is not finished yet")
    stream.send(VERSION)
    received = stream.read_at_least(MECHANISM_AT)
    version, number = received[VERSION_AT], received[VERSION_AT + 1]
    if version < VERSION[0]:
        is_known = version > 0 and number < len(ZMTP_2_TYPES)
        yield judge_old_peer("ZMTP 2", ZMTP_2_TYPES[number] if is_known else "", expected)
        return

    received = stream.read_at_least(GREETING_SIZE)
    mechanism = received[MECHANISM_AT:MECHANISM_END].rstrip(b"\0").decode(errors="backslashreplace")
    ours = "CURVE" if expected.curve else "NULL"
    if mechanism != ours:
        # So that the server can report a client with another mechanism, not one that hangs up.
        with suppress(OSError):
            send_mechanism(stream, ours)
            stream.read_at_least(GREETING_SIZE + 1, HANG_UP_LIMIT)
        reason = f"it requires {mechanism}, which zmqmsg does not speak"
        yield Finding(WRONG_MECHANISM.get(mechanism, reason), hopeless=True)
        return
    if expected.curve:
        yield USABLE  # whether it knows our key, libzmq reports
        return

    send_mechanism(stream, ours)
    socket_type = read_socket_type(stream)
    if "REP" in expected.socket_types and socket_type in expected.socket_types:
        stream.send(READY_FROM_REQ)  # or the server would report a client that hangs up
    yield judge(socket_type, expected)


def send_mechanism(stream: Stream, mechanism: str) -> None:
    """Send the rest of our greeting; raise OSError."""
    stream.send(mechanism.encode().ljust(MECHANISM_SIZE, b"\0") + REST_OF_GREETING)


def read_socket_type(stream: Stream) -> str:
    """Return the Socket-Type of the READY command after the greeting; empty if there is none."""
    size_at = GREETING_SIZE + 1
    body_at = size_at + 1
    received = stream.read_at_least(body_at)
    size = received[size_at]
    if received[GREETING_SIZE] & LONG_FLAG:
        body_at = size_at + 8
        size = int.from_bytes(stream.read_at_least(body_at)[size_at:body_at])
    received = stream.read_at_least(body_at + min(size, COMMAND_LIMIT))
    _before, _name, value = received[body_at:].partition(SOCKET_TYPE)
    value_size = int.from_bytes(value[:4])
    return value[4 : 4 + value_size].decode(errors="backslashreplace")


def judge(socket_type: str, expected: Expected) -> Finding:
    """Return what to think of a peer with a socket of ``socket_type`` (empty: not known)."""
    if not socket_type or socket_type in expected.socket_types:
        return USABLE
    wanted = " or ".join(expected.socket_types)
    return Finding(f"it is a {socket_type} socket, not a {wanted}", hopeless=True)


def judge_old_peer(protocol: str, socket_type: str, expected: Expected) -> Finding:
    """Return what to think of a peer that speaks an old ``protocol``."""
    if expected.curve:
        return Finding(f"it speaks {protocol}, which is too old for CURVE", hopeless=True)
    finding = judge(socket_type, expected)
    return USABLE_OLD_PEER if finding == USABLE else finding
