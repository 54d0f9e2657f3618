"""Work that may take any time, in a thread of its own. Does not import zmq."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from zmqmsg.system import start_thread


class Background:
    """Runs an iterator in a daemon thread: a name server or a peer may take any time to answer.

    Its thread sets ``latest`` and, at the very end, ``ended_at``; others only read them. Once
    ``is_over()`` is true, ``latest`` is final.
    """

    def __init__(self, results: Iterator[Any]) -> None:
        """Start at once. Without threads to spare, it is over at once: ask again later."""
        self.latest: Any = None  # the last result
        self.began_at = time.monotonic()
        self.ended_at = math.inf
        self._results = results
        try:
            start_thread(self._work)
        except OSError:
            self.ended_at = self.began_at

    def is_over(self) -> bool:
        """Return whether there will be no further result."""
        return self.ended_at < math.inf

    def _work(self) -> None:
        try:
            # Without descriptors to spare nothing can be imported, and no codec be found.
            with suppress(OSError, ImportError, LookupError):
                for result in self._results:
                    self.latest = result
        finally:
            self.ended_at = time.monotonic()
