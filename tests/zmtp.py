"""What peers say by hand: frames and handshakes of ZMTP 3, and listeners of all kinds.

ZMTP 3 is described at https://rfc.zeromq.org/spec/23.
"""

import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial

# What a listener does with a connection, which is closed at its end.
Talk = Callable[[socket.socket], object]


def greeting(
    mechanism: bytes = b"NULL", version: bytes = b"\x03\x00", as_server: bytes = b"\x00"
) -> bytes:
    return (
        b"\xff" + bytes(8) + b"\x7f" + version + mechanism.ljust(20, b"\0") + as_server + bytes(31)
    )


def command(name: bytes, body: bytes = b"") -> bytes:
    content = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(content)]) + content


def ready(socket_type: bytes) -> bytes:
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(socket_type)) + socket_type)


def frame(body: bytes, *, more: bool = False) -> bytes:
    if len(body) < 256:
        return bytes([more, len(body)]) + body
    return bytes([2 + more]) + struct.pack(">Q", len(body)) + body


def request(*frames: bytes) -> bytes:
    """A whole request of ``frames``, after the empty delimiter."""
    return frame(b"", more=True) + b"".join(
        frame(body, more=body is not frames[-1]) for body in frames
    )


def say(words: bytes, connection: socket.socket) -> None:
    """Say ``words``, and then nothing."""
    connection.sendall(words)
    with suppress(ConnectionError):
        while connection.recv(1024):
            pass


def say_and_hang_up(words: bytes, connection: socket.socket) -> None:
    """Say ``words`` when something has come, and end the connection."""
    connection.recv(1024)
    connection.sendall(words)


def echo_as_zmtp_2(connection: socket.socket) -> None:
    """Echo small messages as a REP socket of ZMTP 2 does; hang up at poison."""
    with connection.makefile("rb") as stream:
        # Signature; revision and socket type; identity.
        connection.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\1\4\0\0")
        stream.read(10 + 2 + 2)
        while delimiter := stream.read(2):
            assert delimiter == b"\1\0"
            flags, length = stream.read(2)
            assert flags == 0
            if (body := stream.read(length)) == b"poison":
                return
            connection.sendall(delimiter + bytes([flags, length]) + body)


def echo_as_zmtp_1(connection: socket.socket) -> None:
    """Echo small messages as a REP socket of ZMTP 1 does; hang up at poison."""
    with connection.makefile("rb") as stream:
        connection.sendall(b"\1\0")  # an empty identity
        # libzmq begins with a signature of ten bytes. Read as ZMTP 1, that is an empty identity.
        stream.read(10)
        while delimiter := stream.read(2):
            assert delimiter == b"\1\1"
            length, flags = stream.read(2)
            assert flags == 0
            if (body := stream.read(length - 1)) == b"poison":
                return
            connection.sendall(delimiter + bytes([length, flags]) + body)


HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 15\r\n\r\n400 Bad Request"

OTHER_PROTOCOLS: list[tuple[Talk, str]] = [
    # libzmq takes it for ZMTP 1.
    (partial(say, b"SSH-2.0-OpenSSH_9.6\r\n"), r"SSH-2.0-OpenSSH_9.6\r\n"),
    (partial(say, b"220 mail.example.org ESMTP\r\n"), r"220 mail.example.org ESMTP\r\n"),
    (partial(say_and_hang_up, HTTP), r"HTTP/1.1 400 Bad Request\r\n"),
    (partial(say, b"\xff\xfd\x18\xff\xfd\x20\xff\xfd\x23\xff\xfd\x27"), r"\xff\xfd\x18"),  # Telnet
    (partial(say, b"\x0a\0\0\0\x0a8.0.36\0\x08\0\0\0"), r"\n\x00\x00\x00\n8.0.36"),  # MySQL
]
"""Listeners that do not speak ZeroMQ, and how they are quoted."""
