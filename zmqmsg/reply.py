"""The REP side: the echo loop, and how it is stopped."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import zmq

from zmqmsg.monitor import PATIENCE, Connection
from zmqmsg.sockets import Socket

FLUSH_LIMIT = 5000
"""Milliseconds that the last replies have to reach their clients: the linger of a REP socket."""

STUCK = 1.0
"""Seconds that the output may block after a signal, before printing is given up."""


class Stop(Exception):
    """Raised by a signal handler to end a wait: for a request, or for the output."""


class Echo:
    """Answers each request with the request itself, on a bound REP socket and on connected ones.

    ``served`` counts the requests that were answered.
    """

    def __init__(self, bound: Sequence[Socket] = (), connections: Sequence[Connection] = ()) -> None:
        """Serve on the sockets ``bound``, and over ``connections`` as a worker of what is at their end."""
        self.served = 0
        self._bound = bound
        self._connections = connections
        self._stopping = False
        self._waiting = False
        self._taking = False

    def run(self, take: Callable[[list[zmq.Frame]], None], count: int | None = None) -> None:
        """Echo requests until ``count`` of them are served or a signal comes.

        Each is answered first and then given to ``take``, whose exceptions end the loop as well.
        """
        try:
            while not self._stopping and self.served != count:
                for socket in self._wait():
                    self._answer(socket, take)
                    if self._stopping or self.served == count:
                        break
        except Stop:
            pass

    def _wait(self) -> list[Socket]:
        """Return the sockets that have a request, after a second at most.

        A signal that comes just before the system call is seen only after it.
        """
        sockets = [*self._bound, *(connection.socket for connection in self._connections)]
        monitors = [connection.monitor for connection in self._connections]
        pause = min((connection.pause for connection in self._connections), default=PATIENCE)
        self._waiting = True
        if self._stopping:
            raise Stop
        events = zmq.zmq_poll([(socket, zmq.POLLIN) for socket in [*sockets, *monitors]], int(pause * 1000))
        self._waiting = False
        for connection in self._connections:
            connection.update()
            connection.report()
        ready = {socket for socket, _event in events}
        return [socket for socket in sockets if socket in ready]

    def _answer(self, socket: Socket, take: Callable[[list[zmq.Frame]], None]) -> None:
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        socket.send_multipart(frames, copy=False)
        self.served += 1
        self._taking = True
        take(frames)
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
        self._stopping = True
        if self._waiting:
            raise Stop
        signal.setitimer(signal.ITIMER_REAL, STUCK)

    def _give_up(self, _number: int, _frame: FrameType | None) -> None:
        if self._taking:
            raise Stop
