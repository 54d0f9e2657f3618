"""Bytes in and out: messages in, messages to standard output, notices to standard error. Does not import zmq."""

import errno
import io
import math
import os
import re
import stat
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import IO, Any, NamedTuple, TextIO, cast

import click

from zmqmsg.quoting import escape, escape_line, quote, unquote
from zmqmsg.system import END_OF_INPUT, HAS_COLOURS, LINES_END_WITH_CR_LF, READER_GONE, write_parts

CHUNK = 65536  # bytes read at a time; frames from this size on are not copied to be written with their end
LONG_INPUT = 65536  # bytes of redirected standard input from which on there is a progress bar
NOTICE_DELAY = 1.0  # seconds of waiting before the user is told what for
RETRY_INTERVAL = 0.01  # seconds between attempts at a non-blocking stream that is not ready
CLIENT_INTERVAL = 60.0  # seconds in which the user is told of the same client once
CLIENT_LIMIT = 20  # clients that the user is told of at most within CLIENT_INTERVAL


class Failure(click.ClickException):
    """Ends the command with status 1. The message tells the user what failed, and what to do."""


class Form(NamedTuple):
    """How messages look as bytes: as they are, or as quoted lines."""

    separator: bytes  # ends a message in the input
    terminator: bytes  # goes after each frame in the output
    quoted: bool
    cr_lf: bool  # whether a CR before the separator belongs to it

    @classmethod
    def choose(cls, *, null: bool, quoted: bool, raw: bool) -> "Form":
        """Return the form that the options ask for; raise UsageError if they contradict each other."""
        chosen = [
            name
            for name, given in (("--null", null), ("--quoted", quoted), ("--raw", raw))
            if given
        ]
        if len(chosen) > 1:
            raise click.UsageError(f"{' and '.join(chosen)} cannot be used together")
        end = b"\0" if null else b"\n"
        return cls(
            end, b"" if raw else end, quoted, cr_lf=LINES_END_WITH_CR_LF and not (null or quoted)
        )

    def strip_cr(self, line: bytes) -> bytes:
        """Return a line, which was read up to the separator, without a CR that belongs to its end."""
        return line.removesuffix(b"\r") if self.cr_lf else line

    def decode(self, message: bytes) -> list[bytes]:
        """Return the frames of a message that was read, without its separator; raise ValueError if it is malformed."""
        return unquote(message) if self.quoted else [message]

    def decode_argument(self, argument: str) -> list[bytes]:
        """Return the frames of a message on the command line; raise UsageError, naming it, if it is malformed."""
        try:
            return self.decode(os.fsencode(argument))
        except ValueError as error:
            raise click.UsageError(f"in '{argument}': {error}") from error


def write_all(stream: Any, *parts: Any) -> None:
    """Write ``parts``, bytes or buffers, to an unbuffered stream, by one call if possible; raise OSError."""
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
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
        raise


class _StandardError(io.TextIOBase):
    """Standard error, for notices and click's progress bar. It never fails."""

    # Unbuffered: what a buffer could not write would fail again at Python's end, with status 120.
    line_begun = False
    writing_since = math.inf

    def isatty(self) -> bool:
        return _is_terminal(sys.stderr)

    def write(self, text: str) -> int:
        # The progress bar hides the cursor. A signal may end the process at any time, and would leave it hidden.
        text = re.sub(r"\033\[\?25[lh]", "", text)
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        self.writing_since = time.monotonic()
        with suppress(OSError, AttributeError):  # the latter where it was closed from the start
            _raw(sys.stderr).write(text.encode(encoding, "backslashreplace"))
        self.writing_since = math.inf
        self.line_begun = not text.endswith("\n")
        return len(text)


_standard_error = _StandardError()


def notify(text: str, colour: str = "cyan") -> None:
    """Write a notice to standard error: one line, with whatever it quotes escaped."""
    prefix = "zmqmsg:"
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if HAS_COLOURS and not plain and _standard_error.isatty():
        prefix = click.style(prefix, fg=colour)
    # Below the progress bar, if there is one.
    _standard_error.write("\n" * _standard_error.line_begun + f"{prefix} {escape_line(text)}\n")


class ClientNotices:
    """Tells of clients that do not get in: of each once in a while, and not of too many."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}

    def report(self, notice: str) -> None:
        """Give ``notice``, which names a client, unless it was given a short time ago."""
        now = time.monotonic()
        self._given = {
            given: since for given, since in self._given.items() if now - since < CLIENT_INTERVAL
        }
        if notice not in self._given and len(self._given) >= CLIENT_LIMIT:
            notice = "further refusals are not shown for a while"
        if notice not in self._given:
            self._given[notice] = now
            notify(notice, "yellow")

    def forget(self, notice: str) -> None:
        """Give ``notice`` again when it is due: the client has got in meanwhile."""
        self._given.pop(notice, None)


def show_error(error: click.ClickException) -> None:
    """Write ``error`` to standard error, as one line."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _standard_error.write(f"{error.message}\n")
    elif isinstance(error, click.UsageError) and error.ctx and type(error) is not click.UsageError:
        text = error.format_message().removesuffix(".")
        notify(
            f"{text}{' See' if text.endswith('?') else '; see'} '{error.ctx.command_path} --help'",
            "red",
        )
    else:
        notify(error.format_message(), "red")


class Output:
    """Standard output, for messages alone: each is written at once, as bytes or, on a terminal, as readable text."""

    def __init__(self, form: Form) -> None:
        self.writing_since = (
            math.inf
        )  # when the current write began, by time.monotonic(); infinity: there is none
        self._form = form
        self._stream = _raw(sys.stdout)
        self._readable = form.quoted or _is_terminal(sys.stdout)

    def write(self, frames: Sequence[Any]) -> None:
        """Write a message of ``frames``, bytes or buffers; raise BrokenPipeError if the reader is gone, or Failure."""
        if self._readable:
            copies = [bytes(frame) for frame in frames]
            frames = [quote(copies) if self._form.quoted or len(copies) > 1 else escape(copies[0])]
        terminator = self._form.terminator
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self.writing_since = time.monotonic()
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
            self.writing_since = math.inf


def is_stalled(output: Output | None, now: float) -> bool:
    """Return whether a write to ``output``, or else to standard error, has lasted for a second."""
    return now - (output or _standard_error).writing_since >= NOTICE_DELAY


def read_messages(
    arguments: Sequence[list[bytes]], files: Sequence[str], form: Form
) -> Generator[list[bytes]]:
    """Yield the frames of each message: ``arguments``, then the contents of ``files`` (``-``: standard input).

    With neither, yield those of the lines of standard input, in the given form, each as soon as it is complete. Raises
    Failure for what cannot be read. Close the generator to end the progress bar.
    """
    yield from arguments
    for file in files:
        yield [b"".join(_read_chunks(file))]
    if not arguments and not files:
        if _is_terminal(sys.stdin):
            notify(f"reading messages, one per line; press {END_OF_INPUT} to finish")
        lines = _show_progress(_split_lines(_read_chunks("-"), form))
        for number, line in enumerate(lines, start=1):
            try:
                yield form.decode(line)
            except ValueError as error:
                raise Failure(f"line {number} of standard input: {error}") from error


def _read_chunks(file: str) -> Iterator[bytes]:
    """Yield what can be read from ``file`` (``-``: standard input), as soon as it can; raise Failure if that fails."""
    try:
        with (
            nullcontext(_raw(sys.stdin)) if file == "-" else open(file, "rb", buffering=0) as stream
        ):
            if stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            while (chunk := stream.read(CHUNK)) != b"":
                if chunk is None:  # non-blocking, and nothing there, or another reader was faster
                    time.sleep(RETRY_INTERVAL)
                else:
                    yield chunk
    except OSError as error:
        raise Failure(
            f"cannot read {'standard input' if file == '-' else file}: {error.strerror}"
        ) from error


def _split_lines(chunks: Iterator[bytes], form: Form) -> Iterator[bytes]:
    """Yield what stands between one separator and the next, where the last one may be missing."""
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


def _show_progress(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Yield ``lines``, with click's progress bar where a person waits for a long redirected file to be sent."""
    stdin = _raw(sys.stdin)
    status = os.fstat(stdin.fileno()) if stdin else None
    length = status.st_size - stdin.tell() if status and stat.S_ISREG(status.st_mode) else 0
    if length < LONG_INPUT or not _is_terminal(sys.stderr) or _is_terminal(sys.stdout):
        yield from lines
        return
    file = cast(TextIO, _standard_error)
    columns = os.get_terminal_size(_raw(sys.stderr).fileno()).columns or 80
    wide = columns >= 60  # what is around the bar takes 10 columns, and 10 more with the time
    width = 36 if wide else max(min(36, columns - 12), 1)
    with click.progressbar(
        length=length, file=file, update_min_steps=length // 200, show_eta=wide, width=width
    ) as bar:
        for line in lines:
            yield line
            bar.update(len(line) + 1)


def _raw(stream: IO[str] | None) -> Any:
    """Return the unbuffered stream below ``stream``; None if it was closed when the process started."""
    # Descriptors 0 to 2 are not used directly: libzmq may have reused one that was closed.
    buffer = getattr(stream, "buffer", stream)
    return getattr(buffer, "raw", buffer)


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()
