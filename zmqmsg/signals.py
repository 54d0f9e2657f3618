"""How signals end the process: at once, or after what is at hand; and as process 1, too."""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

REPEAT_DELAY = 0.05
"""Seconds in which the same signal counts once: GNU timeout sends it to its child, and then to the whole group."""


def end_at_once_by_default() -> None:
    """Let signals end the process as they end any other: a shell shows 130 after Ctrl-C, and a loop around it stops.

    A signal that is ignored, as Ctrl-C is in a background job of a shell, stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:
        # In a container without an init. The kernel drops what has the default action.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, _frame: os._exit(128 + number))


class StopSignals:
    """Takes note of the first signal to stop, and ends the process at the second one.

    ``requested``: whether one has come. ``descriptor``: a file descriptor that can be read from then on, for whoever
    waits. ``sessions``: ids of the sessions of child processes that end with this process.
    """

    def __init__(self) -> None:
        """Begin without a signal; ``install()`` lets them come."""
        self.requested = False
        self.sessions: set[int] = set()
        self._first = 0, 0.0  # signal and time
        self._second = 0
        self._held = False
        self.descriptor, self._writing = os.pipe()
        os.set_blocking(self._writing, False)

    def install(self) -> None:
        """Handle the signals from now on, but for those that are ignored."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        # A signal that comes just before a poll would be seen only after it.
        signal.set_wakeup_fd(self._writing)

    def wait(self, seconds: float) -> bool:
        """Wait for a signal, ``seconds`` at most, and return whether one has come."""
        select.select([self.descriptor], [], [], seconds)
        return self.requested

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a second signal wait until the end of the context, as for the id of a session that is being started."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._second:
                self._end(self._second)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested = True
            self._first = number, now
        elif number == self._first[0] and now - self._first[1] < REPEAT_DELAY:
            return
        elif self._held:
            self._second = number
        else:
            self._end(number)

    def _end(self, number: int) -> None:
        for session in self.sessions:
            kill_session(session)
        if os.getpid() == 1:
            os._exit(128 + number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def kill_session(session: int) -> None:
    """Kill all processes of a session that was started here, those in process groups of their own included.

    GNU timeout, for example, makes such a group. Without /proc, only the first group can be found.
    """
    with suppress(OSError):
        os.killpg(session, signal.SIGKILL)
    with suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if os.getsid(int(name)) == session:
                    os.kill(int(name), signal.SIGKILL)


def reap_orphans() -> None:
    """As process 1, reap what ended commands have left running and has ended since: nobody else does."""
    if os.getpid() == 1:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
