"""Notices of things that last or come again, such as a command that does not end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from zmqmsg.notices import REPEAT_INTERVAL, Notify


class Given(NamedTuple):
    """When a notice was given, and how many repetitions were left out since."""

    at: float
    left_out: int


class StallNotices:
    """Gives the same notice once a minute at most, and says how often it was left out.

    The main thread says what it waits for; another thread calls ``give_due`` from time to time.
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

    @contextmanager
    def expecting(self, text: str, seconds: float) -> Iterator[None]:
        """Give a notice if this context lasts for ``seconds``."""
        self.expect(text, seconds)
        try:
            yield
        finally:
            self.withdraw(text)

    def withdraw(self, text: str) -> None:
        """Take back a notice that was expected."""
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
