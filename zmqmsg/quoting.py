"""Messages as text: the quoted form, and what a terminal or a notice can show without harm. Pure functions.

A quoted message is one line: its frames, separated by TAB, with special bytes escaped.
"""

import re
from collections.abc import Sequence
from typing import Any

QUOTED_LIMIT = (
    40  # characters of a message that a notice quotes; in UTF-8, each has four bytes at most
)

# A terminal obeys the control characters C0 (below 0x20), DEL and C1 (0x7f to 0x9f), and Unicode's bidirectional
# controls reorder what a person reads. Bytes that are not valid UTF-8 are decoded to the surrogates from U+DC80 on.
_CONTROLS = [
    *range(0x20),
    *range(0x7F, 0xA0),
    0x61C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_HEX = {code: "".join(f"\\x{byte:02x}" for byte in chr(code).encode()) for code in _CONTROLS} | {
    0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)
}
_IN_NOTICE = _HEX | {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"}
_IN_QUOTED = _IN_NOTICE | {ord("\\"): "\\\\"}
# Newline and TAB do no harm where a message stands alone.
_ON_TERMINAL = {code: escape for code, escape in _HEX.items() if chr(code) not in "\n\t"}

_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|.|$)", re.DOTALL)
_UNESCAPED = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def quote(frames: Sequence[bytes]) -> bytes:
    """Return ``frames``, one or more, as a quoted line without its newline."""
    return b"\t".join(_translate(frame, _IN_QUOTED) for frame in frames)


def unquote(line: bytes) -> list[bytes]:
    """Return the frames of a quoted line; raise ValueError, naming it, if there is a wrong escape."""
    return [
        _ESCAPE.sub(_unescape, frame) if b"\\" in frame else frame for frame in line.split(b"\t")
    ]


def escape(frame: bytes) -> bytes:
    """Return ``frame`` as a terminal can show it: control characters and invalid UTF-8 escaped."""
    return _translate(frame, _ON_TERMINAL)


def escape_line(text: str) -> str:
    """Return ``text`` as one line that a terminal can show: newline and TAB are escaped, too."""
    return text.translate(_IN_NOTICE)


def count_of(number: int, noun: str) -> str:
    """Return ``number`` with ``noun`` in the singular or plural."""
    return f"{number} {noun}{'s' * (number != 1)}"


def describe(frames: Sequence[Any]) -> str:
    """Return how many frames and bytes there are, in words."""
    return f"{count_of(len(frames), 'frame')}, {count_of(sum(map(len, frames)), 'byte')}"


def abridge(message: bytes) -> str:
    """Return the start of ``message`` between quotation marks, for a notice."""
    text = message[: 4 * QUOTED_LIMIT + 1].decode(errors="surrogateescape")
    return f"'{text}'" if len(text) <= QUOTED_LIMIT else f"'{text[:QUOTED_LIMIT]}'..."


def _translate(frame: bytes, table: dict[int, str]) -> bytes:
    text = frame.decode(errors="surrogateescape")
    # Nothing that any table escapes is printable but the backslash.
    return frame if text.isprintable() and "\\" not in text else text.translate(table).encode()


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code[:1] == b"x" and len(code) == 3:
        return bytes.fromhex(code[1:].decode())
    if code not in _UNESCAPED:
        raise ValueError(
            rf"'{match[0].decode(errors='surrogateescape')}' is not an escape; use \\ \t \n \r or \xHH"
        )
    return _UNESCAPED[code]
