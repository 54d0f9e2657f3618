"""Bytes in and out: messages in, frames to standard output, notices to standard error. Knows no ZeroMQ."""

import os
import select
import stat
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from errno import EBADF
from functools import partial
from typing import IO, Any

import click

CHUNK = 65536
"""Bytes read at a time, and from which on frames are not joined to be written at once."""

LONG_INPUT = 65536
"""Bytes of redirected standard input from which on there is a progress bar."""

MANY_FILES = 10
"""Files from which on there is a progress bar."""

CLEAR_BAR = "\r\033[K\033[?25h"
"""To the start of the line, erase it, and show the cursor, which click's bar hides."""

# A terminal obeys the control characters C0 (below 0x20), DEL and C1 (0x7f to 0x9f), and Unicode's bidirectional
# controls reorder what a person reads. Newline and tab do no harm where a message stands alone.
_UNSAFE = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_IN_NOTICE = {code: chr(code).encode("unicode_escape").decode() for code in _UNSAFE}
_IN_MESSAGE = {code: escape for code, escape in _IN_NOTICE.items() if chr(code) not in "\n\t"}

_bar_shown = False


def tell(text: str, colour: str = "cyan") -> None:
    """Write one notice line to standard error, with whatever it quotes escaped."""
    # What is not UTF-8 in an argument stands in a str as surrogates.
    visible = text.encode(errors="surrogateescape").decode(errors="backslashreplace").translate(_IN_NOTICE)
    # That a notice cannot be written is no reason to fail.
    with suppress(OSError):
        clear_progress()
        prefix = "zmqmsg: " if os.environ.get("NO_COLOR") else click.style("zmqmsg: ", fg=colour)
        click.echo(prefix + visible, err=True)


class Output:
    """Standard output: frames as raw bytes, or as readable text if it is a terminal, each written at once.

    ``written`` grows while what does not go out at once goes out in parts.
    """

    def __init__(self, end: bytes) -> None:
        """Write ``end`` after each frame."""
        self.written = 0
        self._end = end
        self._stream = _raw(sys.stdout)
        self._terminal = _is_terminal(sys.stdout)
        self.descriptor = _descriptor(self._stream)

    def write(self, frames: Sequence[Any]) -> None:
        """Write ``frames``, which are bytes or have them in a buffer.

        Raises BrokenPipeError if the reader is gone, ClickException if it fails otherwise.
        """
        if self._terminal:
            frames = [bytes(f).decode(errors="backslashreplace").translate(_IN_MESSAGE).encode() for f in frames]
        try:
            if len(frames) == 1 and len(frames[0]) >= CHUNK:
                self._write(frames[0])
                self._write(self._end)
            else:
                self._write(self._end.join([*frames, b""]))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(f"cannot write to standard output: {error.strerror}") from error

    def _write(self, data: Any) -> None:
        if self._stream is None:
            raise OSError(EBADF, os.strerror(EBADF))
        while (written := self._stream.write(data)) != len(data):
            if written is None:  # a non-blocking descriptor takes no more for now
                select.select([], [self._stream], [], 1)
            else:
                self.written += written
                data = memoryview(data)[written:]


def read_messages(
    arguments: Sequence[str], files: Sequence[str], end: bytes, output: int | None, idle: Callable[[], None]
) -> Iterator[bytes]:
    """Yield ``arguments``, then the contents of ``files`` (``-``: standard input), as messages.

    With neither, yield those of standard input, each as soon as its ``end`` has come. Waiting for it calls ``idle``
    each second, and raises BrokenPipeError when the reader of the file descriptor ``output`` goes away. What cannot be
    read raises ClickException.
    """
    yield from map(os.fsencode, arguments)
    for file in files:
        yield b"".join(_read_standard_input(output, idle)) if file == "-" else _read(file, partial(_contents, file))
    if not arguments and not files:
        if _is_terminal(sys.stdin):
            tell("reading messages, one a line; Ctrl-D ends")
        yield from _split(_read_standard_input(output, idle), end)


def _contents(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()


def _split(chunks: Iterator[bytes], end: bytes) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        *complete, tail = chunk.split(end)
        for message in complete:
            yield b"".join([*parts, message]) if parts else message
            parts = []
        if tail:
            parts.append(tail)
    if parts:
        yield b"".join(parts)


def _read_standard_input(output: int | None, idle: Callable[[], None]) -> Iterator[bytes]:
    stream = _raw(sys.stdin)
    if stream is None:
        raise click.ClickException(f"cannot read standard input: {os.strerror(EBADF)}")
    descriptor = _descriptor(stream)
    poller = select.poll()
    for number, events in (descriptor, select.POLLIN), (output, 0):
        if number is not None:
            poller.register(number, events)
    while True:
        # A second at most: a signal that comes just before the system call is seen only after it.
        ready = dict(poller.poll(1000)) if descriptor is not None else {}
        if output in ready:
            raise BrokenPipeError
        if descriptor is not None and descriptor not in ready:
            idle()
            continue
        chunk = _read("standard input", partial(stream.read, CHUNK))
        if chunk:
            yield chunk
        elif chunk is not None:  # None: a non-blocking descriptor has no more for now
            return


def _read(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise click.ClickException(f"cannot read {name}: {error.strerror}") from error


def show_progress(messages: Iterator[bytes], arguments: Sequence[str], files: Sequence[str]) -> Generator[bytes]:
    """Yield ``messages``, with click's progress bar where a person waits for long input to be sent.

    That is a long file redirected to standard input, or many ``files``, and no ``arguments``, with standard error a
    terminal and standard output none. Close the generator to clear the bar.
    """
    global _bar_shown
    length = len(files) or _redirected_bytes()
    long = length >= (MANY_FILES if files else LONG_INPUT)
    if arguments or not long or not _is_terminal(sys.stderr) or _is_terminal(sys.stdout):
        yield from messages
        return
    bar = click.progressbar(length=length, file=sys.stderr, update_min_steps=max(1, length // 200))
    _bar_shown = True
    try:
        bar.render_progress()
        for message in messages:
            yield message
            bar.update(1 if files else len(message) + 1)
    finally:
        clear_progress()
        _bar_shown = False


def clear_progress() -> None:
    """Clear the progress bar, if there is one, until it is drawn again."""
    if _bar_shown:
        with suppress(OSError, RuntimeError):  # the latter from a signal handler, in the middle of another line
            click.echo(CLEAR_BAR, nl=False, err=True)


def _redirected_bytes() -> int:
    """Return how many bytes are left of the file that is standard input; 0 if it is none."""
    descriptor = _descriptor(_raw(sys.stdin))
    if descriptor is None or not stat.S_ISREG((status := os.fstat(descriptor)).st_mode):
        return 0
    return status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR)


def _raw(stream: IO[str] | None) -> Any:
    """Return the unbuffered stream below ``stream``; None if it was closed when the process started.

    Then libzmq may use its descriptor for something else: a standard stream is never to be had by its number.
    """
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError):  # closed, or in memory
        return None


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()
