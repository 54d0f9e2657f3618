"""How ``serve`` stops: signals, the time that is left, and the commands that end with it.

A Python signal handler runs in the main thread, and nothing interrupts a blocking call on Windows.
So the handlers do nothing, and a thread reads which signals have come: the ``Guard``. It also looks
twice a second at what the main thread cannot see while it is blocked.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from zmqmsg.notices import NOTICE_DELAY, NoticeWriter, standard_error
from zmqmsg.output import Output
from zmqmsg.stalls import StallNotices
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

# Times from the request to stop, in seconds. Docker kills after 10.
ANSWER_LIMIT = 5.0  # in which requests that have arrived are answered
END_LIMIT = 8.0  # in which work that was begun by then may finish

LOOK_INTERVAL = 0.5  # seconds from one look at what lasts to the next
REPEAT_DELAY = 0.1  # seconds in which the same signal counts once
LOCK_LIMIT = 1.0  # seconds to wait at the end for a command that is being started

STOPPING = (
    f"stopping; what has been received is answered, for {END_LIMIT:g} s at most;"
    " a second signal ends it at once"
)
UNREAD = "standard output is not being read"


class Stop:
    """Whether ``serve`` is to stop, and since when."""

    def __init__(self) -> None:
        from threading import Event

        self.is_requested = False
        self._event = Event()
        self._requested_at = math.inf
        self._waker: socket | None = None
        self.sources: list[socket] = []  # readable when the main thread must return from its poll

    def open(self) -> None:
        """Make what wakes the main thread from its poll; raise OSError."""
        from socket import socketpair

        reader, self._waker = socketpair()
        self.sources = [reader]

    def request(self) -> None:
        """Begin to stop, unless that has begun already."""
        if self.is_requested:
            return
        self._requested_at = time.monotonic()
        self.is_requested = True
        self._event.set()
        if self._waker:
            self._waker.send(b"\0")

    def wait(self, seconds: float) -> bool:
        """Wait for a request to stop; return whether there is one."""
        return self._event.wait(seconds)

    def has_lasted(self, seconds: float) -> bool:
        """Return whether stopping began ``seconds`` ago or earlier; False if it has not begun."""
        return time.monotonic() >= self._requested_at + seconds


class RunningPrograms:
    """The shell commands that run. They are killed when serve ends early."""

    def __init__(self) -> None:
        from threading import Lock

        self._processes: set[Popen[bytes]] = set()
        self._lock = Lock()  # held while one is started and noted

    def start(self, command: str, environment: dict[str, str]) -> "Popen[bytes]":
        """Start a command; raise OSError if that is impossible."""
        with self._lock:
            process = start_command(command, environment)
            self._processes.add(process)
        return process

    def forget(self, process: "Popen[bytes]") -> None:
        """Forget a process that has ended. Never returns once ``kill_all`` has begun."""
        with self._lock:
            self._processes.discard(process)

    def kill_all(self) -> None:
        """Kill all that run, just before the process ends."""
        # Never released: the main thread must neither start another command nor go on with the end
        # of one that is killed here.
        self._lock.acquire(timeout=LOCK_LIMIT)
        for process in tuple(self._processes):
            end_group(process)

    def reap_orphans(self) -> None:
        """Reap what commands have left running, if we are process 1: nobody else does."""
        if os.getpid() == 1:
            with self._lock:
                reap_orphans({process.pid for process in self._processes})


class Guard:
    """A daemon thread that handles signals, and ends the process when its time is over.

    The first signal requests to stop. The second one, or SIGQUIT, ends the process and its commands
    at once. ``stop``, ``programs``, ``notices`` and ``stalls`` may be used by any thread.
    """

    def __init__(self, output: Output | None) -> None:
        """``output``: standard output, if it is used. Raises OSError."""
        self.stop = Stop()
        self.programs = RunningPrograms()
        self.notices = NoticeWriter()
        self.stalls = StallNotices(self.notices.notify)
        self._loss = ""  # what would be cut off if the process ended now, as text
        self._output = output
        self._output_was_stalled = False  # at the last look
        self._first_signal = 0  # 0: none has come
        self._signalled_at = math.inf

    @property
    def was_signalled(self) -> bool:
        """Whether a signal has come that was handled, and a second one would end the process."""
        return self._first_signal != 0

    @contextmanager
    def naming_loss(self, loss: str) -> Iterator[None]:
        """Report ``loss`` if the process must end within this context of the main thread."""
        self._loss = loss
        try:
            yield
        finally:
            self._loss = ""

    def start(self) -> None:
        """Handle signals from now on, but not those that are ignored; raise OSError."""
        from socket import socketpair

        self.stop.open()
        signals, self._signal_writer = socketpair()
        self._signal_writer.setblocking(False)
        signals.settimeout(LOOK_INTERVAL)
        start_thread(lambda: self._work(signals))
        # Before the handlers, or a signal could be lost. If the buffer is full, more signals are
        # in it than we need.
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, *END_SIGNALS):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)

    # The thread

    def _work(self, signals: "socket") -> None:
        while True:
            with suppress(TimeoutError):
                for number in signals.recv(4096):
                    self._handle_signal(number)
            self.programs.reap_orphans()
            self._check_output()
            self._check_time()
            self.stalls.give_due()

    def _handle_signal(self, number: int) -> None:
        now = time.monotonic()
        if number == self._first_signal and now < self._signalled_at + REPEAT_DELAY:
            return  # GNU timeout signals its child, and then the whole group
        if self.was_signalled or number in END_SIGNALS:
            self._end(128 + number)
        self._first_signal = number
        self._signalled_at = now
        self.stalls.expect(STOPPING, NOTICE_DELAY)
        self.stop.request()

    def _check_output(self) -> None:
        """Report a standard output that is not read; while stopping, end the process instead."""
        is_stalled = self._output is not None and self._output.is_stalled()
        if is_stalled and self.stop.is_requested:
            self.notices.notify(f"{UNREAD}; 1 request was answered, but not printed", "red")
            self._end(1)
        if is_stalled and not self._output_was_stalled:
            self.stalls.notify(f"{UNREAD}; waiting until it is")
        self._output_was_stalled = is_stalled

    def _check_time(self) -> None:
        """End the process if it is to stop, and cannot."""
        if self.stop.is_requested and standard_error.is_stalled():
            self._end(1)
        if self.stop.has_lasted(END_LIMIT) and self._loss:
            self.notices.notify(f"{self._loss} after {END_LIMIT:g} s", "red")
            self._end(1)

    def _end(self, status: int) -> None:
        self.programs.kill_all()
        self.notices.finish()
        os._exit(status)
