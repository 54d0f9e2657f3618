"""The attendant of ``serve``: handles stop signals, and tells of long waits, while the main thread is blocked."""

import math
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from zmqmsg.console import NOTICE_DELAY, Output, is_stalled, notify
from zmqmsg.system import (
    END_SIGNALS,
    STOP_SIGNALS,
    end_group,
    reap_orphans,
    start_command,
    start_thread,
)

if TYPE_CHECKING:
    from socket import socket
    from subprocess import Popen

LOOK_INTERVAL = 0.5  # seconds from one look at what the main thread waits for to the next
# Seconds in which the same signal counts once: GNU timeout sends it to its child, and then to the whole group.
REPEAT_DELAY = 0.05

STOPPING = "stopping after the current request; a second signal ends it at once"
UNREAD = "standard output is not being read"


class Notices:
    """Notices of what lasts, each of which is given once at most in a run."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._given: set[str] = set()

    def notify_once(self, notice: str) -> None:
        """Give ``notice`` now, unless it was given before."""
        if notice not in self._given:
            self._given.add(notice)
            notify(notice, "yellow")

    def expect(self, notice: str, seconds: float) -> None:
        """Let the attendant give ``notice``, unless it is withdrawn within ``seconds``."""
        self._due[notice] = time.monotonic() + seconds

    def withdraw(self, notice: str) -> None:
        """Do not give ``notice`` any more."""
        self._due.pop(notice, None)

    def give_due(self) -> None:
        for notice, due in tuple(self._due.items()):
            if due <= time.monotonic() and notice not in self._given:
                self._given.add(notice)
                give(notice, "yellow")


def give(notice: str, colour: str) -> None:
    """Notify the user, unless standard error blocks as well: a second signal must be seen all the same."""
    with suppress(OSError):
        start_thread(lambda: notify(notice, colour)).join(LOOK_INTERVAL)


class Attendant:
    """A daemon thread that does what the main thread cannot do in the middle of a system call.

    A Python signal handler runs in the main thread, and nothing interrupts a blocking call on Windows. So the handlers
    do nothing, and this thread reads which signals have come. The first one makes a request to stop; the second one, or
    SIGQUIT, ends the process and the commands that it has started, at once.
    """

    def __init__(self) -> None:
        from threading import Event, Lock  # these two for serve alone

        self.requested = math.inf  # when a stop was requested, by time.monotonic()
        self.serving = True  # whether there may be requests to answer
        self.notices = Notices()
        self.sources: list[socket] = []  # readable when the main thread must return from its poll
        self._output: Output | None = None
        self.stop = Event()  # set when a stop is requested
        self._first_signal = 0
        self._commands: set[Popen[bytes]] = set()
        self._starting = Lock()  # held while a command is started and noted

    def start(self, output: Output | None) -> None:
        """Handle signals from now on, but not those that are ignored; watch ``output``. Raises OSError."""
        from socket import socketpair

        self._output = output
        self._signals, self._signal_writer = socketpair()
        reader, self._waker = socketpair()
        self._signal_writer.setblocking(False)
        self._signals.settimeout(LOOK_INTERVAL)
        start_thread(self._attend)
        self.sources = [reader]
        signal.set_wakeup_fd(self._signal_writer.fileno())  # first, or a signal could be lost
        for number in (*STOP_SIGNALS, *END_SIGNALS):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)

    # What the main thread asks for

    def start_command(self, command: str) -> "Popen[bytes]":
        """Start a shell command that a second signal ends as well; raise OSError if that is impossible."""
        with self._starting:
            process = start_command(command, dict(os.environ))
            self._commands.add(process)
        return process

    def forget(self, process: "Popen[bytes]") -> None:
        """Forget a process that has ended. This blocks while all are being ended: nothing is answered then."""
        with self._starting:
            self._commands.discard(process)

    # The thread

    def _attend(self) -> None:
        while True:
            with suppress(TimeoutError):
                for number in self._signals.recv(64):
                    self._handle(number)
            if os.getpid() == 1:
                with self._starting:
                    reap_orphans({process.pid for process in self._commands})
            self._look()

    def _handle(self, number: int) -> None:
        late = time.monotonic() - self.requested >= REPEAT_DELAY
        again = self.stop.is_set() and (late or number != self._first_signal)
        if again or number in END_SIGNALS:
            self._end(128 + number)
        if not self.stop.is_set():
            self._first_signal = number
            self.requested = time.monotonic()
            if self.serving:
                self.notices.expect(STOPPING, NOTICE_DELAY)
            self.stop.set()
            self._waker.send(b"\0")

    def _look(self) -> None:
        """Give the notices that are due; end the process if it is to stop, and waits for somebody to read."""
        now = time.monotonic()
        unread = bool(self._output and is_stalled(self._output, now))
        if self.stop.is_set() and (unread or is_stalled(None, now)):
            if unread:
                give(f"{UNREAD}; 1 request was answered, but not printed", "red")
            self._end(1)
        if unread:
            self.notices.expect(f"{UNREAD}; waiting until it is", 0)
        self.notices.give_due()

    def _end(self, status: int) -> None:
        self._starting.acquire(timeout=1)
        for process in tuple(self._commands):
            end_group(process)
        os._exit(status)
