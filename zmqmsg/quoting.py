"""Messages as text: the quoted form, and what a terminal or a notice can show without harm.

A quoted message is one line: its frames, separated by TAB, with special bytes escaped. All
functions are pure.
"""

import re
from collections.abc import Sequence
from typing import Any

EXCERPT_LENGTH = 40  # characters of a message that a notice shows
MAX_UTF8_BYTES = 4  # in a character

# A terminal obeys the control characters C0 (below 0x20), DEL and C1 (0x7f to 0x9f).
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
# Unicode's bidirectional controls reorder what a person reads.
_BIDIRECTIONAL = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
# Python decodes a byte that is not valid UTF-8 to the surrogate with this number plus the byte's.
_SURROGATES = 0xDC00


def _escape_each_byte(code: int) -> str:
    return "".join(rf"\x{byte:02x}" for byte in chr(code).encode())


# Translation tables, from code points to escapes; each adds to the one above.
_HEX = {code: _escape_each_byte(code) for code in [*_CONTROLS, *_BIDIRECTIONAL]} | {
    _SURROGATES + byte: rf"\x{byte:02x}" for byte in range(0x80, 0x100)
}
_IN_NOTICE = _HEX | {ord("\n"): r"\n", ord("\t"): r"\t", ord("\r"): r"\r"}
_IN_QUOTED = _IN_NOTICE | {ord("\\"): r"\\"}
# Newline and TAB do no harm where a message stands alone.
_ON_TERMINAL = {code: escape for code, escape in _HEX.items() if chr(code) not in "\n\t"}

_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|.|$)", re.DOTALL)
_UNESCAPED = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def quote(frames: Sequence[bytes]) -> bytes:
    """Return ``frames``, one or more, as a quoted line without its newline."""
    return b"\t".join(_translate(frame, _IN_QUOTED) for frame in frames)


def unquote(line: bytes) -> list[bytes]:
    """Return the frames of a quoted line; raise ValueError, naming it, for a wrong escape."""
    return [_ESCAPE.sub(_unescape, frame) for frame in line.split(b"\t")]


def escape(frame: bytes) -> bytes:
    """Return ``frame`` as a terminal can show it: controls and invalid UTF-8 are escaped."""
    return _translate(frame, _ON_TERMINAL)


def escape_line(text: str) -> str:
    """Return ``text`` as one line that a terminal can show: newline and TAB are escaped, too."""
    return text.translate(_IN_NOTICE)


def count_of(number: int, noun: str) -> str:
    """Return ``number`` with ``noun`` in the singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe(frames: Sequence[Any]) -> str:
    """Return how many frames and bytes there are, in words."""
    size = sum(len(frame) for frame in frames)
    return f"{count_of(len(frames), 'frame')}, {count_of(size, 'byte')}"


def abridge(message: bytes) -> str:
    """Return the start of ``message`` between quotation marks, for a notice."""
    start = message[: MAX_UTF8_BYTES * EXCERPT_LENGTH + 1]
    text = start.decode(errors="surrogateescape")
    return f"'{text}'" if len(text) <= EXCERPT_LENGTH else f"'{text[:EXCERPT_LENGTH]}'..."


def _translate(frame: bytes, table: dict[int, str]) -> bytes:
    text = frame.decode(errors="surrogateescape")
    # Most frames need no escape: the backslash is the only printable character in any table.
    if text.isprintable() and "\\" not in text:
        return frame
    return text.translate(table).encode()


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code.startswith(b"x") and len(code) == 3:
        return bytes.fromhex(code[1:].decode())
    if code not in _UNESCAPED:
        wrong = match[0].decode(errors="surrogateescape")
        raise ValueError(rf"'{wrong}' is not an escape; use \\ \t \n \r or \xHH")
    return _UNESCAPED[code]
