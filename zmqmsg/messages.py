"""Messages, and how they look as bytes."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from zmqmsg.quoting import unquote
from zmqmsg.system import LINES_END_WITH_CR_LF

# A message. Each frame is bytes, or one of zmq's Frames, which have them in a buffer.
Frames = Sequence[Any]


class Form(NamedTuple):
    """How messages look as bytes: as they are, or as quoted lines."""

    separator: bytes  # ends each message that is read
    terminator: bytes  # follows each frame that is written: the separator, or nothing with --raw
    quoted: bool
    cr_lf: bool  # whether a CR before the separator is not part of the message

    @property
    def end_size(self) -> int:
        """The bytes of the end of a line."""
        return len(self.separator) + (1 if self.cr_lf else 0)

    @classmethod
    def choose(cls, *, null: bool, quoted: bool, raw: bool) -> "Form":
        """Return the form that the options ask for; raise UsageError if they exclude each other."""
        options = {"--null": null, "--quoted": quoted, "--raw": raw}
        given = [name for name, is_given in options.items() if is_given]
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join(given)} cannot be used together")
        separator = b"\0" if null else b"\n"
        terminator = b"" if raw else separator
        return cls(separator, terminator, quoted, cr_lf=LINES_END_WITH_CR_LF and not null)

    def strip_cr(self, line: bytes) -> bytes:
        """Return ``line`` without the CR of a CR LF, if such ends are in use."""
        return line.removesuffix(b"\r") if self.cr_lf else line

    def decode(self, message: bytes) -> list[bytes]:
        """Return the frames of a message without its separator; raise ValueError for a bad one."""
        return unquote(message) if self.quoted else [message]

    def decode_argument(self, argument: str, option: str = "") -> list[bytes]:
        """Return the frames of a message on the command line; raise UsageError for a bad one.

        ``option``: the option whose value it is; empty for a MESSAGE.
        """
        try:
            return self.decode(os.fsencode(argument))
        except ValueError as error:
            place = f"{option}: in" if option else "in"
            raise click.UsageError(f"{place} '{argument}': {error}") from error
