"""What peers of ZMTP 3 say (rfc.zeromq.org/spec/23), by hand."""

import struct


def greeting(mechanism: bytes = b"NULL", version: bytes = b"\x03\x00", as_server: bytes = b"\x00") -> bytes:
    return b"\xff" + bytes(8) + b"\x7f" + version + mechanism.ljust(20, b"\0") + as_server + bytes(31)


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
    return frame(b"", more=True) + b"".join(frame(body, more=body is not frames[-1]) for body in frames)
