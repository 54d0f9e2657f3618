"""Where the messages of ``send`` come from: arguments, files and standard input."""

import os
import stat
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, TextIO, cast

import click

from zmqmsg.messages import Form
from zmqmsg.notices import Failure, notify, standard_error, unbuffered
from zmqmsg.output import RETRY_INTERVAL
from zmqmsg.system import END_OF_INPUT, TERMINAL_LINE_LIMIT

CHUNK = 65536  # bytes that are read at a time
LONG_INPUT = 65536  # bytes of redirected standard input for which there is a progress bar

UTF_16 = "a byte order mark of UTF-16"
BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark of UTF-8",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}

# Layout of the progress bar, in columns
BAR_WIDTH = 36
AROUND_BAR = 12
WIDTH_FOR_TIME = 60  # of a terminal that has room for the time that is left
DEFAULT_COLUMNS = 80  # of a terminal that does not know its width


class Source(NamedTuple):
    """Where the messages come from. Arguments come first, then files."""

    arguments: Sequence[list[bytes]]  # the frames of each
    files: Sequence[str]  # paths; ``-``: standard input
    multipart: bool  # whether all of them are the frames of one message
    form: Form

    def read(self) -> Generator[list[bytes]]:
        """Yield the frames of each message, as soon as it is complete.

        With neither arguments nor files, each line of standard input is a message. Raises Failure
        for what cannot be read. Close the generator to end the progress bar.
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
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        notify(f"reading messages, one per line; press {END_OF_INPUT} to finish")
    chunks = warn_of_byte_order_mark(read_chunks("-"))
    lines = show_progress(split_lines(chunks, form))
    for number, line in enumerate(lines, start=1):
        if is_terminal and TERMINAL_LINE_LIMIT and len(line) == TERMINAL_LINE_LIMIT:
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
    if file == "-":
        return nullcontext(unbuffered(sys.stdin))
    return open(file, "rb", buffering=0)


def warn_of_byte_order_mark(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield ``chunks``; notify the user if they begin with a byte order mark."""
    is_first = True
    for chunk in chunks:
        for mark, name in BYTE_ORDER_MARKS.items():
            if is_first and chunk.startswith(mark):
                notify(
                    f"standard input begins with {name}, which is sent as it is;"
                    " some shells add it, as PowerShell 5.1 does",
                    "yellow",
                )
        is_first = False
        yield chunk


def split_lines(chunks: Iterable[bytes], form: Form) -> Iterator[bytes]:
    """Yield each line without its separator, including a last one that has none."""
    parts: list[bytes] = []  # of a line that is not complete yet
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
    somebody_waits = standard_error.isatty() and not sys.stdout.isatty()
    if length < LONG_INPUT or not somebody_waits:
        yield from lines
        return
    columns = os.get_terminal_size(unbuffered(sys.stderr).fileno()).columns or DEFAULT_COLUMNS
    show_time = columns >= WIDTH_FOR_TIME
    width = BAR_WIDTH if show_time else max(min(BAR_WIDTH, columns - AROUND_BAR), 1)
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
    with suppress(OSError):
        status = os.fstat(stream.fileno())
        if stat.S_ISREG(status.st_mode):
            position: int = stream.tell()
            return status.st_size - position
    return 0
