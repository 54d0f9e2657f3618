"""Bytes in and out: messages in, messages to standard output, notices to standard error. Does not import zmq."""

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple, TextIO, cast

import click

from zmqmsg.quoting import escape, escape_line, escape_lines, quote, unquote

CHUNK = 65536
"""Bytes read at a time, and from which on frames are not joined to be written at once."""

LONG_INPUT = 65536
"""Bytes of redirected standard input from which on there is a progress bar."""

SILENCE = 0.5
"""Seconds without input after which a reader looks after something else."""

HIDE_CURSOR = "\033[?25l"


class Failure(click.ClickException):
    """Ends the command with status 1. The message tells the user what failed, and what to do."""


class Form(NamedTuple):
    """How messages look on standard input and output: each ended by ``end``, and as quoted lines or as they are."""

    end: bytes
    quoted: bool

    @classmethod
    def choose(cls, *, null: bool, quoted: bool) -> "Form":
        """Return the form that the options ask for; raise UsageError if they contradict each other."""
        if null and quoted:
            raise click.UsageError("--null and --quoted cannot be used together")
        return cls(b"\0" if null else b"\n", quoted)


# Standard error


class _StandardError(io.TextIOBase):
    """Standard error as notices and click's progress bar need it.

    What cannot be written is dropped, since a notice is no reason to fail. So is what nobody reads: a reader that has
    let a full pipe stand for a second is not waited for again until it reads on.
    """

    def __init__(self) -> None:
        self._stalled = False
        self._line_begun = False

    def isatty(self) -> bool:
        return _is_terminal(sys.stderr)

    def write(self, text: str) -> int:
        # A signal may end the process at any time, and would leave a hidden cursor behind.
        data = text.replace(HIDE_CURSOR, "").encode(
            getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"
        )
        stream = _raw(sys.stderr)
        with suppress(OSError):
            if stream and select.select([], [stream], [], 0 if self._stalled else 1)[1]:
                stream.write(data)
                self._line_begun = not text.endswith("\n")
                self._stalled = False
            else:
                self._stalled = True
        return len(text)

    def write_line(self, text: str) -> None:
        """Write ``text`` on a line of its own: below the progress bar, if there is one."""
        self.write("\n" * self._line_begun + text + "\n")


_standard_error = _StandardError()


def notify(text: str, colour: str = "cyan") -> None:
    """Write a notice to standard error: one line, with whatever it quotes escaped."""
    line = "zmqmsg: " + escape_line(text)
    if _standard_error.isatty() and not os.environ.get("NO_COLOR"):
        line = line.replace("zmqmsg:", click.style("zmqmsg:", fg=colour), 1)
    _standard_error.write_line(line)


def show_error(error: click.ClickException) -> None:
    """Write ``error`` to standard error: a Failure as a notice, any other as click words it."""
    if isinstance(error, Failure):
        notify(error.message, "red")
    else:
        text = io.StringIO()
        error.show(text)
        _standard_error.write(escape_lines(text.getvalue()))


# Standard output


class Output:
    """Standard output, for messages alone: each is written at once, as bytes or, on a terminal, as readable text."""

    def __init__(self, form: Form) -> None:
        self._end = form.end
        self._quoted = form.quoted
        self._stream = _raw(sys.stdout)
        self._terminal = _is_terminal(sys.stdout)

    def write(self, frames: Sequence[Any]) -> None:
        """Write ``frames``, one or more, which are bytes or have them in a buffer.

        Raises BrokenPipeError if the reader is gone, Failure if it fails otherwise.
        """
        if self._quoted or self._terminal:
            frames = [self._make_readable([bytes(frame) for frame in frames])]
        try:
            if len(frames) == 1 and len(frames[0]) >= CHUNK:
                self._write(frames[0])
                self._write(self._end)
            else:
                self._write(self._end.join([*frames, b""]))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failure(f"cannot write to standard output: {error.strerror}") from error

    def _make_readable(self, frames: Sequence[bytes]) -> bytes:
        return quote(frames) if self._quoted or len(frames) > 1 else escape(frames[0])

    def _write(self, data: Any) -> None:
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while (written := self._stream.write(data)) != len(data):
            if written is None:  # Python's word for EAGAIN
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            data = memoryview(data)[written:]


# Messages


def read_messages(arguments: Sequence[str], files: Sequence[str], form: Form) -> Generator[list[bytes] | None]:
    """Yield the frames of each message: of ``arguments``, then of the contents of ``files`` (``-``: standard input).

    With neither, yield those of the lines of standard input, in the given form, each as soon as it is complete. Yield
    None for each half second in which standard input is silent. Raises Failure for what cannot be read. Close the
    generator to end the progress bar.
    """
    for argument in arguments:
        yield [os.fsencode(argument)]
    for file in files:
        if file == "-":
            yield from _read_whole_input()
        else:
            yield [_read_file(file)]
    if not arguments and not files:
        if _is_terminal(sys.stdin):
            notify("reading messages, one per line; press Ctrl-D to finish")
        number = 0
        for line in _show_progress(_split(_read_standard_input(), form.end)):
            if line is None:
                yield None
            else:
                number += 1
                yield _unquote_line(line, number) if form.quoted else [line]


def _unquote_line(line: bytes, number: int) -> list[bytes]:
    try:
        return unquote(line)
    except ValueError as error:
        raise Failure(f"line {number} of standard input: {error}") from error


def _read_file(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from error


def _read_whole_input() -> Iterator[list[bytes] | None]:
    chunks = []
    for chunk in _read_standard_input():
        if chunk is None:
            yield None
        else:
            chunks.append(chunk)
    yield [b"".join(chunks)]


def _read_standard_input() -> Iterator[bytes | None]:
    stream = _raw(sys.stdin)
    try:
        if stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while True:
            while not select.select([stream], [], [], SILENCE)[0]:
                yield None
            if not (chunk := stream.read(CHUNK)):
                return
            yield chunk
    except OSError as error:
        raise Failure(f"cannot read standard input: {error.strerror}") from error


def _split(chunks: Iterator[bytes | None], end: bytes) -> Iterator[bytes | None]:
    """Yield what stands between one ``end`` and the next, where the last one may be missing; pass None on."""
    parts: list[bytes] = []
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        *complete, tail = chunk.split(end)
        for line in complete:
            yield b"".join([*parts, line]) if parts else line
            parts = []
        if tail:
            parts.append(tail)
    if parts:
        yield b"".join(parts)


def _show_progress(lines: Iterator[bytes | None]) -> Iterator[bytes | None]:
    """Yield ``lines``, with click's progress bar where a person waits for a long redirected file to be sent."""
    length = _redirected_bytes()
    if length < LONG_INPUT or not _is_terminal(sys.stderr) or _is_terminal(sys.stdout):
        yield from lines
        return
    file = cast(TextIO, _standard_error)
    with click.progressbar(length=length, file=file, update_min_steps=length // 200) as bar:
        for line in lines:
            yield line
            if line is not None:
                bar.update(len(line) + 1)


def _redirected_bytes() -> int:
    """Return how many bytes are left of the file that is standard input; 0 if it is none."""
    stream = _raw(sys.stdin)
    if stream is None:
        return 0
    status = os.fstat(stream.fileno())
    return status.st_size - stream.tell() if stat.S_ISREG(status.st_mode) else 0


def _raw(stream: IO[str] | None) -> Any:
    """Return the unbuffered stream below ``stream``; None if it was closed when the process started.

    Descriptors 0 to 2 are not used directly: libzmq may have reused one that was closed.
    """
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()
