"""The REP side: the echo loop, and how it is stopped."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any

import zmq

from zmqmsg.monitor import PATIENCE, Connection
from zmqmsg.sockets import NOW, Context, Socket

FLUSH_LIMIT = 5000
"""Milliseconds that the last replies have to reach their clients: the linger of a REP socket."""

RAPID = 20
"""Milliseconds within which requests follow each other in quick succession."""

LARGE = 4096
"""Bytes from which on a message is echoed faster as a Frame, without copying."""

STUCK = 0.5
"""Seconds between two looks, after a signal to stop, at whether the output gets on; if not, it is given up."""


class Stuck(Exception):
    """The output does not get on, and there was a signal to stop."""


def flush(context: Context) -> None:
    """End ``context`` when the last replies are on their way, or their time is up.

    In a thread, since a signal ends pyzmq's ``term()`` early, and an I/O thread that resolves a name holds it up.
    """
    thread = Thread(target=context.term, daemon=True)
    thread.start()
    thread.join(FLUSH_LIMIT / 1000 + 1)


class Echo:
    """Answers each request with the request itself, on a bound REP socket and on connected ones.

    ``served`` counts the requests that were answered.
    """

    def __init__(
        self,
        take: Callable[[list[Any]], None] | None = None,
        count: int | None = None,
        written: Callable[[], int] = int,
    ) -> None:
        """Answer ``count`` requests, and give the frames of each to ``take`` after that, as bytes or Frames.

        ``written``: how many bytes of that have got out so far.
        """
        self.served = 0
        self._take = take
        self._count = count
        self._written = written
        self._written_before = -1
        self._stopping = False
        self._taking = False
        # Small requests in quick succession are copied, all others are not: so a large one takes its memory once. To
        # do without a Frame is 8 % of the rate under load.
        self._copying = False
        self._signals: list[int] = []

    def run(self, bound: Socket | None, connections: Sequence[Connection]) -> None:
        """Echo what comes to the socket ``bound``, and over ``connections`` as a worker of what is at their end.

        ``count`` requests end it, a signal, or what ``take`` raises. Raises Stuck as ``hand_over()`` does.
        """
        if bound:
            bound.rcvtimeo = RAPID
        while not self._stopping:
            # In quick succession, waiting in recv takes one system call, and polling six.
            if bound and not connections and self._answer(bound, 0):
                continue
            for socket in self._wait(bound, connections):
                if not self._stopping:
                    self._answer(socket, NOW)

    def _wait(self, bound: Socket | None, connections: Sequence[Connection]) -> list[Socket]:
        """Wait for requests, keeping up with the connections, and return the sockets that may have some."""
        for connection in connections:
            connection.update()
            connection.report()
        sockets = [*([bound] if bound else []), *(connection.socket for connection in connections)]
        monitors = [connection.monitor for connection in connections]
        pause = min((connection.pause for connection in connections), default=PATIENCE)
        zmq.zmq_poll([(item, zmq.POLLIN) for item in [*sockets, *monitors, *self._signals]], int(pause * 1000))
        return sockets

    def _answer(self, socket: Socket, flags: int) -> bool:
        """Answer a request and return True, or return False if there is none by now, or by RCVTIMEO."""
        try:
            frames: list[Any] = [socket.recv(flags, self._copying)]
        except zmq.Again:
            self._copying = False
            return False
        try:
            socket.send(frames[0])
        except zmq.ZMQError as error:
            # A REP socket cannot answer yet: there are more frames. To ask for RCVMORE each time takes longer.
            if error.errno != zmq.EFSM:
                raise
            frames += socket.recv_multipart(copy=False)
            socket.send_multipart(frames)
        self._copying = len(frames[0]) < LARGE
        self.served += 1
        if self.served == self._count:
            self._stopping = True
        if self._take:
            self.hand_over(frames, self._take)
        return True

    def hand_over(self, what: Any, take: Callable[[Any], None]) -> None:
        """Give ``what`` to ``take``. Raises Stuck if that blocks when there was a signal to stop."""
        self._taking = True
        try:
            take(what)
        finally:
            self._taking = False

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end ``run()`` after the request in hand; a second one ends the process."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        # What a signal writes to it ends polling, also when it comes just before.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        self._signals = [reading]
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            os.close(reading)
            os.close(writing)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, STUCK, STUCK)
        self._stopping = True

    def _look(self, _number: int, _frame: FrameType | None) -> None:
        if not self._taking:
            return
        before, self._written_before = self._written_before, self._written()
        # What the interrupted write itself has got out is counted only the next time.
        if before == self._written_before:
            raise Stuck
