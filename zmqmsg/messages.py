"""Messages in and out: how they look as bytes, where they come from, and standard output."""

import errno
import math
import os
import stat
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, TextIO, cast

import click

from zmqmsg.notices import STALL_DELAY, Failure, notify, standard_error, unbuffered
from zmqmsg.quoting import escape, quote, unquote
from zmqmsg.system import (
    CAN_POLL_OUTPUT,
    END_OF_INPUT,
    LINES_END_WITH_CR_LF,
    READER_GONE,
    TERMINAL_LINE_LIMIT,
    watch_for_errors,
    write_parts,
)

# Bytes that are read at a time; frames from this size on are not copied to be written.
CHUNK = 65536
LONG_INPUT = 65536  # bytes of redirected standard input from which on there is a progress bar
RETRY_INTERVAL = 0.01  # seconds between attempts at a non-blocking stream that is not ready
BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark (UTF-8)",
    b"\xff\xfe": "a byte order mark of UTF-16",
    b"\xfe\xff": "a byte order mark of UTF-16",
}

Frames = Sequence[Any]  # of bytes, or of zmq's Frames, which have them in a buffer


class Form(NamedTuple):
    """How messages look as bytes: as they are, or as quoted lines."""

    separator: bytes  # ends a message in the input
    terminator: bytes  # follows each frame in the output
    quoted: bool
    cr_lf: bool  # whether a CR before the separator belongs to it

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
        """Return ``line``, read up to the separator, without a CR that belongs to its end."""
        return line.removesuffix(b"\r") if self.cr_lf else line

    def decode(self, message: bytes) -> list[bytes]:
        """Return the frames of a message without its separator; raise ValueError for a bad one."""
        return unquote(message) if self.quoted else [message]

    def decode_argument(self, argument: str, option: str = "") -> list[bytes]:
        """Return the frames of a message on the command line; raise UsageError for a bad one.

        ``option``: whose value it is.
        """
        try:
            return self.decode(os.fsencode(argument))
        except ValueError as error:
            place = f"{option}: in" if option else "in"
            raise click.UsageError(f"{place} '{argument}': {error}") from error


# Output


class Output:
    """Standard output, for messages only: each is written at once.

    On a terminal, a message is written as readable text.
    """

    def __init__(self, form: Form) -> None:
        self._form = form
        self._stream = unbuffered(sys.stdout)
        self._is_readable_text = form.quoted or (sys.stdout is not None and sys.stdout.isatty())
        self._writing_since = math.inf  # by time.monotonic(); infinity: nothing is being written
        # What poll() watches to see that the reader has gone; empty where it cannot see that.
        self.descriptors = [self._stream.fileno()] if has_reader(self._stream) else []
        self._watch = watch_for_errors(self.descriptors)

    def write(self, frames: Frames) -> None:
        """Write a message; raise BrokenPipeError if its reader has gone, or Failure."""
        if self._is_readable_text:
            frames = [self._as_text([bytes(frame) for frame in frames])]
        terminator = self._form.terminator
        self._writing_since = time.monotonic()
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            # One call for all of a message: other programs may append to the same file.
            if len(frames) == 1 and len(frames[0]) >= CHUNK:
                write_all(self._stream, frames[0], terminator)
            else:
                write_all(self._stream, terminator.join([*frames, b""]))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failure(f"cannot write to standard output: {error.strerror}") from error
        finally:
            self._writing_since = math.inf

    def is_stalled(self) -> bool:
        """Return whether a write has lasted for a second."""
        return time.monotonic() - self._writing_since >= STALL_DELAY

    def is_abandoned(self) -> bool:
        """Return whether the reader has gone, as far as the system can say."""
        return self._watch()

    def _as_text(self, frames: list[bytes]) -> bytes:
        if self._form.quoted or len(frames) > 1:
            return quote(frames)
        return escape(frames[0])


def has_reader(stream: Any) -> bool:
    """Return whether ``stream`` has a reader, whose absence poll() reports: a pipe or a socket."""
    if stream is None or not CAN_POLL_OUTPUT:
        return False
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except OSError:  # it has no descriptor
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def write_all(stream: Any, *parts: Any) -> None:
    """Write ``parts``, bytes or buffers, to an unbuffered stream, in one call if possible.

    Raises BrokenPipeError if its reader has gone, or OSError.
    """
    left = list(parts)
    try:
        while left:
            written = write_parts(stream, left)
            if written is None:
                time.sleep(RETRY_INTERVAL)
                continue
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = memoryview(left[0])[written:]
    except OSError as error:
        if error.errno in READER_GONE:
            raise reader_gone() from error
        raise


def reader_gone() -> BrokenPipeError:
    """Return the error of writing to a pipe that nobody reads."""
    return BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


# Input


class Source(NamedTuple):
    """Where the messages of ``send`` come from."""

    arguments: Sequence[list[bytes]]  # the frames of each
    files: Sequence[str]  # paths; ``-``: standard input
    multipart: bool  # whether all of them are the frames of one message
    form: Form

    def read(self) -> Generator[list[bytes]]:
        """Yield the frames of each message, as soon as it is complete.

        Arguments come first, then files; with neither, the lines of standard input. Raises
        Failure for what cannot be read. Close the generator to end the progress bar.
        """
        if not self.multipart:
            yield from self._read_each()
            return
        frames = [frame for message in self._read_each() for frame in message]
        if not frames:
            raise click.UsageError("--multipart needs at least one message")
        yield frames

    def _read_each(self) -> Iterator[list[bytes]]:
        yield from self.arguments
        for file in self.files:
            yield [b"".join(read_chunks(file))]
        if not self.arguments and not self.files:
            yield from read_lines(self.form)


def read_lines(form: Form) -> Iterator[list[bytes]]:
    """Yield the frames of each line of standard input; raise Failure."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        notify(f"reading messages, one per line; press {END_OF_INPUT} to finish")
    chunks = warn_of_byte_order_mark(read_chunks("-"))
    for number, line in enumerate(show_progress(split_lines(chunks, form)), start=1):
        if is_terminal and len(line) == TERMINAL_LINE_LIMIT:
            notify(
                f"line {number} may have been cut: a terminal passes on {TERMINAL_LINE_LIMIT}"
                " bytes of a line at most; use --file or a pipe for longer ones",
                "yellow",
            )
        try:
            yield form.decode(line)
        except ValueError as error:
            raise Failure(f"line {number} of standard input: {error}") from error


def read_chunks(file: str) -> Iterator[bytes]:
    """Yield what can be read from ``file`` (``-``: standard input), as soon as it can be read.

    Raises Failure.
    """
    try:
        with open_input(file) as stream:
            while (chunk := stream.read(CHUNK)) != b"":
                if chunk is None:  # non-blocking, and nothing there yet
                    time.sleep(RETRY_INTERVAL)
                else:
                    yield chunk
    except OSError as error:
        name = "standard input" if file == "-" else file
        raise Failure(f"cannot read {name}: {error.strerror}") from error


def open_input(file: str) -> Any:
    """Return a context with the unbuffered stream of ``file``; raise OSError."""
    if file != "-":
        return open(file, "rb", buffering=0)
    stream = unbuffered(sys.stdin)
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return nullcontext(stream)


def warn_of_byte_order_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield ``chunks``; notify the user if they begin with a byte order mark."""
    for number, chunk in enumerate(chunks):
        if number == 0:
            for mark, name in BYTE_ORDER_MARKS.items():
                if chunk.startswith(mark):
                    notify(
                        f"standard input begins with {name}, which is sent as it is;"
                        " some shells add it, as PowerShell 5.1 does",
                        "yellow",
                    )
        yield chunk


def split_lines(chunks: Iterable[bytes], form: Form) -> Iterator[bytes]:
    """Yield what stands before each separator, and after the last one if there is anything."""
    parts: list[bytes] = []
    for chunk in chunks:
        *complete, tail = chunk.split(form.separator)
        for line in complete:
            yield form.strip_cr(b"".join([*parts, line]) if parts else line)
            parts = []
        if tail:
            parts.append(tail)
    if parts:
        yield b"".join(parts)


def show_progress(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Yield ``lines``, with a progress bar if a person waits for a long file to be sent."""
    length = bytes_left(unbuffered(sys.stdin))
    output_is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if length < LONG_INPUT or not standard_error.isatty() or output_is_terminal:
        yield from lines
        return
    columns = os.get_terminal_size(unbuffered(sys.stderr).fileno()).columns or 80
    show_time = columns >= 60
    width = 36 if show_time else max(min(36, columns - 12), 1)  # 12 columns are around the bar
    with click.progressbar(
        length=length,
        file=cast(TextIO, standard_error),
        update_min_steps=length // 200,
        show_eta=show_time,
        width=width,
    ) as bar:
        for line in lines:
            yield line
            bar.update(len(line) + 1)


def bytes_left(stream: Any) -> int:
    """Return how many bytes of a regular file are left to read; 0 for anything else."""
    with suppress(OSError, AttributeError):  # the latter if it was closed from the start
        status = os.fstat(stream.fileno())
        if stat.S_ISREG(status.st_mode):
            position: int = stream.tell()
            return status.st_size - position
    return 0
