"""Notices to standard error: one line each, with whatever they quote escaped."""

import io
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import click

from zmqmsg.quoting import escape_line
from zmqmsg.system import HAS_COLOURS, start_thread

NOTICE_DELAY = 1.0  # seconds of waiting before the user is told what for
STALL_DELAY = 1.0  # seconds after which a write that has not returned counts as stalled
REPEAT_INTERVAL = 60.0  # seconds in which the same notice is given once
QUEUE_LIMIT = 100  # notices that wait to be written; further ones are dropped
FINISH_LIMIT = 1.0  # seconds to wait at the end for notices to be written

HIDE_OR_SHOW_CURSOR = re.compile(r"\033\[\?25[lh]")

Notify = Callable[[str, str], object]  # takes a text and a colour


class Failure(click.ClickException):
    """Ends the command with status 1. The message tells the user what failed, and what to do."""


class StandardError(io.TextIOBase):
    """Standard error, for notices and click's progress bar. It never fails.

    It is unbuffered: what a buffer could not write would fail again when Python ends, with
    status 120.
    """

    def __init__(self) -> None:
        self._line_begun = False
        self._writing_since = math.inf  # when the main thread began to write; infinity: it does not

    def isatty(self) -> bool:
        """Return whether standard error is a terminal."""
        return sys.stderr.isatty()

    def write(self, text: str) -> int:
        """Write ``text`` from the main thread; return its length."""
        # The progress bar hides the cursor. A signal that ends the process would leave it hidden.
        text = HIDE_OR_SHOW_CURSOR.sub("", text)
        if text == "\n" and not self._line_begun:  # click ends its bar; a notice did so already
            return len(text)
        self._writing_since = time.monotonic()
        self.write_from_any_thread(text)
        self._writing_since = math.inf
        self._line_begun = not text.endswith("\n")
        return len(text)

    def write_from_any_thread(self, text: str) -> None:
        """Write ``text`` at once, from any thread."""
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        with suppress(OSError):
            unbuffered(sys.stderr).write(text.encode(encoding, "backslashreplace"))

    def line_break_if_needed(self) -> str:
        """Return what ends the progress bar's line, if there is one."""
        return "\n" if self._line_begun else ""

    def is_stalled(self) -> bool:
        """Return whether a write of the main thread has lasted for a second."""
        return time.monotonic() - self._writing_since >= STALL_DELAY


standard_error = StandardError()


def notify(text: str, colour: str = "cyan") -> None:
    """Write a notice from the main thread."""
    standard_error.write(standard_error.line_break_if_needed() + format_notice(text, colour))


def show_error(error: click.ClickException) -> None:
    """Write ``error`` as one line, with a reference to the help after an error of usage."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        standard_error.write(f"{error.message}\n")
        return
    text = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx:
        text = text.removesuffix(".")
        see = " See" if text.endswith("?") else "; see"
        text = f"{text}{see} '{error.ctx.command_path} --help'"
    notify(text, "red")


def format_notice(text: str, colour: str) -> str:
    """Return the line of a notice."""
    prefix = "zmqmsg:"
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if HAS_COLOURS and not is_plain and standard_error.isatty():
        prefix = click.style(prefix, fg=colour)
    return f"{prefix} {escape_line(text)}\n"


def unbuffered(stream: IO[str]) -> Any:
    """Return the raw stream below ``stream``."""
    buffer = getattr(stream, "buffer", stream)
    return getattr(buffer, "raw", buffer)


class NoticeWriter:
    """Writes notices from a thread of its own, for threads that must not wait for standard error.

    If nobody reads standard error, notices that do not fit into the queue are dropped.
    """

    def __init__(self) -> None:
        """Start the thread; raise OSError if that is impossible."""
        from queue import Queue

        self._tasks: Queue[Callable[[], object]] = Queue(QUEUE_LIMIT)
        start_thread(self._work)

    def notify(self, text: str, colour: str = "cyan") -> None:
        """Have a notice written, without waiting for it."""
        from queue import Full

        with suppress(Full):
            self._tasks.put_nowait(
                lambda: standard_error.write_from_any_thread(format_notice(text, colour))
            )

    def finish(self) -> None:
        """Wait until all notices are written, for a second at most."""
        from queue import Full
        from threading import Event

        written = Event()
        end = time.monotonic() + FINISH_LIMIT
        with suppress(Full):
            self._tasks.put(written.set, timeout=FINISH_LIMIT)
            written.wait(max(0, end - time.monotonic()))

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            task()
