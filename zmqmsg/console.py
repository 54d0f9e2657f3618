"""Bytes in and out: messages in, messages to standard output, notices to standard error. Does not import zmq."""

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple, TextIO, TypeVar, cast

import click

from zmqmsg.quoting import escape, escape_line, quote, unquote

CHUNK = 65536
"""Bytes read at a time, and from which on frames are not joined to be written at once."""

LONG_INPUT = 65536
"""Bytes of redirected standard input from which on there is a progress bar."""

SILENCE = 0.5
"""Seconds without input after which whoever reads messages can do something else."""

NOTICE_DELAY = 1.0
"""Seconds of waiting before the user is told what for."""

STALL = 1.0
"""Seconds after which an output counts as one that nobody reads."""

HIDE_CURSOR = "\033[?25l"

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
"""Errors of the system that may be over soon: no descriptors, processes or memory."""


T = TypeVar("T")


class Failure(click.ClickException):
    """Ends the command with status 1. The message tells the user what failed, and what to do."""


class Form(NamedTuple):
    """How messages look as bytes: as they are, or as quoted lines.

    ``separator`` ends a message in the input; ``terminator`` goes after each frame in the output.
    """

    separator: bytes
    terminator: bytes
    quoted: bool

    @classmethod
    def choose(cls, *, null: bool, quoted: bool, raw: bool) -> "Form":
        """Return the form that the options ask for; raise UsageError if they contradict each other."""
        chosen = [name for name, given in (("--null", null), ("--quoted", quoted), ("--raw", raw)) if given]
        if len(chosen) > 1:
            raise click.UsageError(f"{' and '.join(chosen)} cannot be used together")
        end = b"\0" if null else b"\n"
        return cls(end, b"" if raw else end, quoted)

    def decode(self, message: bytes) -> list[bytes]:
        """Return the frames of a message that was read, without its separator; raise ValueError if it is malformed."""
        return unquote(message) if self.quoted else [message]

    def decode_argument(self, argument: str) -> list[bytes]:
        """Return the frames of a message on the command line; raise UsageError, naming it, if it is malformed."""
        try:
            return self.decode(os.fsencode(argument))
        except ValueError as error:
            raise click.UsageError(f"in '{argument}': {error}") from error


# Standard error


class _StandardError(io.TextIOBase):
    """Standard error, unbuffered, for notices and click's progress bar. It never fails.

    If nobody reads for a second, text is dropped until somebody does: a terminal that is stopped by Ctrl-S must not
    keep a signal from ending us. What a buffer could not write would fail again at Python's end, with status 120.
    """

    line_begun = False
    _stalled = False

    def isatty(self) -> bool:
        return _is_terminal(sys.stderr)

    def write(self, text: str) -> int:
        # A signal may end the process at any time, and would leave a hidden cursor behind.
        data = text.replace(HIDE_CURSOR, "").encode(
            getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"
        )
        stream = _raw(sys.stderr)
        with suppress(OSError):
            self._stalled = not (stream and select.select([], [stream], [], 0 if self._stalled else STALL)[1])
            if not self._stalled:
                stream.write(data)
                self.line_begun = not text.endswith("\n")
        return len(text)


_standard_error = _StandardError()


def notify(text: str, colour: str = "cyan") -> None:
    """Write a notice to standard error: one line, with whatever it quotes escaped."""
    line = "zmqmsg: " + escape_line(text)
    if _standard_error.isatty() and not os.environ.get("NO_COLOR"):
        line = line.replace("zmqmsg:", click.style("zmqmsg:", fg=colour), 1)
    # Below the progress bar, if there is one.
    _standard_error.write("\n" * _standard_error.line_begun + line + "\n")


def show_error(error: click.ClickException) -> None:
    """Write ``error`` to standard error, as one line."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _standard_error.write(f"{error.message}\n")
    elif isinstance(error, click.UsageError) and error.ctx and type(error) is not click.UsageError:
        text = error.format_message().removesuffix(".")
        notify(f"{text}{' See' if text.endswith('?') else '; see'} '{error.ctx.command_path} --help'", "red")
    else:
        notify(error.format_message(), "red")


# Standard output


class Output:
    """Standard output, for messages alone: each is written at once, as bytes or, on a terminal, as readable text."""

    def __init__(self, form: Form) -> None:
        """Write messages in ``form``."""
        self._form = form
        self._stream = _raw(sys.stdout)
        self._terminal = _is_terminal(sys.stdout)
        self._piece = self._choose_piece()
        self._unwritten: list[Any] = []
        self._told = False

    def add(self, frames: Sequence[Any]) -> None:
        """Take ``frames``, one or more, which are bytes or have them in a buffer, for the next ``flush()``."""
        if self._form.quoted or self._terminal:
            frames = [self._make_readable([bytes(frame) for frame in frames])]
        terminator = self._form.terminator
        if len(frames) == 1 and len(frames[0]) >= CHUNK:
            self._unwritten = [part for part in (frames[0], terminator) if part]
        else:
            self._unwritten = [terminator.join([*frames, b""])]

    def flush(self) -> bool:
        """Write what was added; return False if nobody has read for a second, and some of it is still to be written.

        Raises BrokenPipeError if the reader is gone, Failure if writing fails otherwise.
        """
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            while self._unwritten:
                data = self._unwritten[0]
                if self._piece:
                    if not self._is_writable():
                        return False
                    data = memoryview(data)[: self._piece]
                written = self._stream.write(data) or 0  # None is EAGAIN of a non-blocking descriptor
                if written == len(self._unwritten[0]):
                    del self._unwritten[0]
                else:
                    self._unwritten[0] = memoryview(self._unwritten[0])[written:]
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failure(f"cannot write to standard output: {error.strerror}") from error
        return True

    def _choose_piece(self) -> int:
        """Return how many bytes a writable stream takes for sure; 0 for a file, which takes all.

        Writing more could block for as long as nobody reads. A terminal's buffer grows in steps of 256 bytes.
        """
        if self._terminal:
            return 256
        if self._stream is None:
            return 0
        mode = os.fstat(self._stream.fileno()).st_mode
        return select.PIPE_BUF if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else 0

    def _is_writable(self) -> bool:
        if select.select([], [self._stream], [], STALL)[1]:
            return True
        if not self._told:
            notify("standard output is not being read; waiting until it is", "yellow")
            self._told = True
        return False

    def _make_readable(self, frames: Sequence[bytes]) -> bytes:
        return quote(frames) if self._form.quoted or len(frames) > 1 else escape(frames[0])


# Messages


def read_messages(arguments: Sequence[list[bytes]], files: Sequence[str], form: Form) -> Generator[list[bytes] | None]:
    """Yield the frames of each message: ``arguments``, then the contents of ``files`` (``-``: standard input).

    With neither, yield those of the lines of standard input, in the given form, each as soon as it is complete. Yield
    None for each half second in which standard input is silent. Raises Failure for what cannot be read. Close the
    generator to end the progress bar.
    """
    yield from arguments
    for file in files:
        for chunks in collect(_read(sys.stdin) if file == "-" else _read_file(file)):
            yield None if chunks is None else [b"".join(chunks)]
    if not arguments and not files:
        if _is_terminal(sys.stdin):
            notify("reading messages, one per line; press Ctrl-D to finish")
        number = 0
        for line in _show_progress(_split(_read(sys.stdin), form.separator)):
            if line is None:
                yield None
            else:
                number += 1
                yield _decode_line(line, number, form) if form.quoted else [line]


def _decode_line(line: bytes, number: int, form: Form) -> list[bytes]:
    try:
        return form.decode(line)
    except ValueError as error:
        raise Failure(f"line {number} of standard input: {error}") from error


def _read_file(file: str) -> Iterator[bytes | None]:
    try:
        # The ordinary open of a FIFO would wait for its writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            waiting = False
            for chunk in _read(opened, file):
                if chunk is None and not waiting:
                    notify(f"waiting for what is written to {file}")
                    waiting = True
                yield chunk
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from error


def collect(items: Iterable[T | None]) -> Iterator[list[T] | None]:
    """Yield None for each None in ``items``, and at the end a list of all others."""
    collected = []
    for item in items:
        if item is None:
            yield None
        else:
            collected.append(item)
    yield collected


def _read(stream: IO[Any] | None, name: str = "standard input") -> Iterator[bytes | None]:
    """Yield what can be read from ``stream`` as soon as it can, and None for each half second without anything."""
    raw = _raw(stream)
    try:
        if raw is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while True:
            while not select.select([raw], [], [], SILENCE)[0]:
                yield None
            chunk = raw.read(CHUNK)
            if chunk == b"":
                return
            if chunk:  # None is EAGAIN: another reader of a non-blocking descriptor was faster
                yield chunk
    except OSError as error:
        raise Failure(f"cannot read {name}: {error.strerror}") from error


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
    buffer = getattr(stream, "buffer", stream)
    return getattr(buffer, "raw", buffer)


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()
