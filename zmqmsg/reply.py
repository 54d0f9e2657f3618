"""The REP side: the echo loop, and how it is stopped."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from types import FrameType

import zmq

from zmqmsg.monitor import PATIENCE, Connection
from zmqmsg.sockets import NOW, Context, Socket

FLUSH_LIMIT = 5000
"""Milliseconds that the last replies have to reach their clients: the linger of a REP socket."""

STUCK = 1.0
"""Seconds that the output may block after a signal, before printing is given up."""


Take = Callable[[list[zmq.Frame]], None]


class Stuck(Exception):
    """The output blocks, and there is a signal to stop."""


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

    def __init__(self) -> None:
        self.served = 0
        self._bound: list[Socket] = []
        self._connections: Sequence[Connection] = []
        self._stopping = False
        self._taking = False

    def run(
        self,
        bound: Socket | None,
        connections: Sequence[Connection],
        take: Take | None = None,
        count: int | None = None,
    ) -> None:
        """Echo what comes to the socket ``bound``, and over ``connections`` as a worker of what is at their end.

        Each request is answered first and then given to ``take``, whose exceptions end it, as ``count`` requests or a
        signal do.
        """
        if bound:
            # A signal that comes just before the system call is seen only after it.
            bound.rcvtimeo = int(PATIENCE * 1000)
            self._bound = [bound]
        self._connections = connections
        # With one socket, waiting in recv takes fewer system calls than polling first.
        waiting = NOW if connections else 0
        with suppress(Stuck):
            while not self._stopping and self.served != count:
                for socket in self._wait() if connections else self._bound:
                    self._answer(socket, waiting, take)
                    if self._stopping or self.served == count:
                        break

    def _wait(self) -> list[Socket]:
        """Keep up with the connections, wait for requests, a second at most, and return all sockets."""
        for connection in self._connections:
            connection.update()
            connection.report()
        sockets = [*self._bound, *(connection.socket for connection in self._connections)]
        monitors = [connection.monitor for connection in self._connections]
        pause = min(connection.pause for connection in self._connections)
        zmq.zmq_poll([(socket, zmq.POLLIN) for socket in [*sockets, *monitors]], int(pause * 1000))
        return sockets

    def _answer(self, socket: Socket, waiting: int, take: Take | None) -> None:
        # Without calls of our own: the rate of requests under load shows them.
        try:
            frame = socket.recv(waiting, copy=False)
        except zmq.Again:
            return
        frames = [frame]
        while frame.more:
            frame = socket.recv(copy=False)
            frames.append(frame)
        for frame in frames:
            socket.send(frame, zmq.SNDMORE if frame.more else 0, copy=False)
        self.served += 1
        if take:
            self._taking = True
            try:
                take(frames)
            finally:
                self._taking = False

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end ``run()`` after the request in hand; a second one ends the process."""
        handlers = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop, signal.SIGALRM: self._give_up}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, STUCK, STUCK)
        self._stopping = True
        for socket in self._bound:
            if not socket.closed:
                socket.rcvtimeo = 0  # of the recv that was interrupted, too: pyzmq begins it again

    def _give_up(self, _number: int, _frame: FrameType | None) -> None:
        if self._taking:
            raise Stuck
