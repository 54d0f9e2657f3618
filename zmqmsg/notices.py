"""Notices to standard error: one line each, with whatever they quote escaped."""

import io
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NamedTuple

import click

from zmqmsg.quoting import escape_line
from zmqmsg.system import HAS_COLOURS, start_thread

NOTICE_DELAY = 1.0  # seconds of waiting before the user is told what for
STALL_DELAY = 1.0  # seconds after which a write that has not returned counts as stalled
REPEAT_INTERVAL = 60.0  # seconds in which the same notice is given once
CLIENT_LIMIT = 20  # clients that are named within REPEAT_INTERVAL
EXCUSE_TIME = 2.0  # seconds that a client which hung up has to come back and be served
QUEUE_LIMIT = 100  # notices that wait to be written; further ones are dropped
FINISH_LIMIT = 1.0  # seconds to wait at the end for notices to be written

UNIX_CLIENT = "a Unix socket"  # the address of clients whose process is not known

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
        self._writing_since = math.inf  # when the main thread began to write, if it has not ended

    def isatty(self) -> bool:
        """Return whether standard error is a terminal."""
        return sys.stderr is not None and sys.stderr.isatty()

    def write(self, text: str) -> int:
        """Write ``text`` from the main thread; return its length."""
        # The progress bar hides the cursor. A signal that ends the process would leave it hidden.
        text = HIDE_OR_SHOW_CURSOR.sub("", text)
        if text == "\n" and not self._line_begun:  # the end of a bar that a notice has ended
            return len(text)
        self._writing_since = time.monotonic()
        self.write_through(text)
        self._writing_since = math.inf
        self._line_begun = not text.endswith("\n")
        return len(text)

    def write_through(self, text: str) -> None:
        """Write ``text`` at once, from any thread."""
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        with suppress(OSError, AttributeError):  # the latter if it was closed from the start
            unbuffered(sys.stderr).write(text.encode(encoding, "backslashreplace"))

    def begin_line(self) -> str:
        """Return what must be written first so that the next text begins a line."""
        return "\n" if self._line_begun else ""

    def is_stalled(self) -> bool:
        """Return whether a write of the main thread has lasted for a second."""
        return time.monotonic() - self._writing_since >= STALL_DELAY


standard_error = StandardError()


def notify(text: str, colour: str = "cyan") -> None:
    """Write a notice from the main thread."""
    standard_error.write(standard_error.begin_line() + format_notice(text, colour))


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


def unbuffered(stream: IO[str] | None) -> Any:
    """Return the raw stream below ``stream``; None if it was closed when the process started."""
    # Descriptors 0 to 2 are not used directly: libzmq may have reused one that was closed.
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
                lambda: standard_error.write_through(format_notice(text, colour))
            )

    def finish(self) -> None:
        """Wait until all notices are written, for a second at most."""
        from queue import Full
        from threading import Event

        written = Event()
        with suppress(Full):
            self._tasks.put(written.set, timeout=FINISH_LIMIT)
            written.wait(FINISH_LIMIT)

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            task()


class Given(NamedTuple):
    """When a notice was given, and how often it was left out since then."""

    at: float
    left_out: int


class StallNotices:
    """Notices of things that last or come again, such as a command that does not end.

    The same text is given once a minute at most. The main thread says what it waits for; another
    thread calls ``give_due`` from time to time.
    """

    def __init__(self, notify: Notify) -> None:
        from threading import Lock

        self._notify = notify
        self._lock = Lock()  # held for all that follows
        self._due: dict[str, float] = {}
        self._given: dict[str, Given] = {}

    def notify(self, text: str) -> None:
        """Give a notice now, unless it was given a short time ago."""
        with self._lock:
            self._give(text)

    def expect(self, text: str, seconds: float) -> None:
        """Give a notice, unless it is withdrawn within ``seconds``."""
        with self._lock:
            self._due[text] = time.monotonic() + seconds

    def withdraw(self, text: str) -> None:
        """Do not give a notice that is expected."""
        with self._lock:
            self._due.pop(text, None)

    def give_due(self) -> None:
        """Give all notices that are due, and say how often others were left out."""
        now = time.monotonic()
        with self._lock:
            for text, due_at in tuple(self._due.items()):
                if now >= due_at:
                    del self._due[text]
                    self._give(text)
            for text, given in tuple(self._given.items()):
                if now - given.at >= REPEAT_INTERVAL:
                    del self._given[text]
                    if given.left_out:
                        self._give(text, f" ({given.left_out} more in the last minute)")

    def _give(self, text: str, suffix: str = "") -> None:
        if given := self._given.get(text):
            self._given[text] = given._replace(left_out=given.left_out + 1)
        else:
            self._given[text] = Given(time.monotonic(), 0)
            self._notify(text + suffix, "yellow")


class HungUp(NamedTuple):
    """A client that hung up during the handshake; times by time.monotonic()."""

    accepted_at: float
    due_at: float  # when it is to be told of


class ClientNotices:
    """Notices of clients that do not get through: of each once a minute, and not of too many.

    Several threads use it.
    """

    def __init__(self, notify: Notify) -> None:
        from threading import Lock

        self._notify = notify
        self._lock = Lock()  # held for all that follows
        self._given: dict[str, float] = {}  # notices, and when they were given
        self._explained: dict[str, float] = {}  # addresses served or told of, and when
        self._hung_up: dict[str, HungUp] = {}  # by address
        self._unknown_served_at = -math.inf  # when a client without an address was served

    def report(self, address: str, notice: str) -> None:
        """Give ``notice``, of a client at ``address``, unless it was given a short time ago."""
        with self._lock:
            self._explained[address] = time.monotonic()
            self._give(notice)

    def report_hanging_up(self, address: str, accepted_at: float) -> None:
        """Tell of a client that hung up during the handshake, unless more is known of it soon.

        It may have looked why it has to wait, as ``zmqmsg send`` does.
        """
        with self._lock:
            self._hung_up.setdefault(address, HungUp(accepted_at, time.monotonic() + EXCUSE_TIME))

    def note_served(self, address: str) -> None:
        """Do not tell that a client at ``address`` hung up: it gets through.

        ``address`` is empty for a client whose address is not known.
        """
        with self._lock:
            if not address:
                self._unknown_served_at = time.monotonic()
            elif address.startswith("process "):
                self._explained[UNIX_CLIENT] = time.monotonic()
            else:
                self._explained[address] = time.monotonic()

    def forget(self, notice: str) -> None:
        """Let ``notice`` be given again: its client has got in meanwhile."""
        with self._lock:
            self._given.pop(notice, None)

    def give_due(self) -> None:
        """Tell of the clients that hung up and did not come back."""
        now = time.monotonic()
        with self._lock:
            self._explained = drop_old(self._explained, now)
            for address, client in tuple(self._hung_up.items()):
                if now >= client.due_at:
                    del self._hung_up[address]
                    if not self._is_explained(address, client):
                        self._give(not_through(address, "it hung up during the handshake"))

    def _is_explained(self, address: str, client: HungUp) -> bool:
        explained_at = self._explained.get(address, -math.inf)
        is_known = explained_at >= client.due_at - 2 * EXCUSE_TIME
        return is_known or self._unknown_served_at >= client.accepted_at

    def _give(self, notice: str) -> None:
        now = time.monotonic()
        self._given = drop_old(self._given, now)
        if notice not in self._given and len(self._given) >= CLIENT_LIMIT:
            notice = "further refusals are not shown for a while"
        if notice not in self._given:
            self._given[notice] = now
            self._notify(notice, "yellow")


def not_through(address: str, reason: str) -> str:
    """Return the notice of a client that does not get through."""
    return f"a client from {address} did not get through: {reason}"


def drop_old(times: dict[str, float], now: float) -> dict[str, float]:
    """Return those of ``times`` that are not older than a minute."""
    return {key: at for key, at in times.items() if now - at < REPEAT_INTERVAL}
