"""What the monitor of a connecting socket says, in our terms: waiting, connected, lost, refused, and why."""

import errno
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum, auto
from itertools import count

import zmq

from zmqmsg.sockets import HANDSHAKE_LIMIT, Failure, Socket, connect

PATIENCE = 1.0
"""Seconds of waiting before the user is told of it."""

SETTLING = 0.3
"""Seconds of silence that mean something: after CONNECTED that the peer speaks ZMTP 2, whose handshake raises no
event; after DISCONNECTED that libzmq will not connect again."""

POLLIN = int(zmq.POLLIN)  # arithmetic with the enum itself is slow

NO_TROUBLE = "no answer yet"

_names = (f"inproc://zmqmsg.monitor.{number}" for number in count())


class State(Enum):
    """Where a connection stands."""

    CONNECTING = auto()
    HANDSHAKING = auto()
    READY = auto()
    BROKEN_OFF = auto()
    """Disconnected during the handshake: either CONNECT_RETRIED follows at once, or never."""
    ABANDONED = auto()
    """Libzmq does not connect again, unless CONNECT_RETRIED follows."""


class Connection:
    """A socket that connects to one endpoint, and what its monitor makes known of the peer there.

    ``socket`` is a new one after each ``reopen()``. ``losses`` counts the connections that broke while the peer was
    there, ``greeted`` says whether a peer ever finished its handshake, ``trouble`` why none is there.
    """

    def __init__(self, endpoint: str, open_socket: Callable[[], Socket], tell: Callable[[str], None]) -> None:
        """Connect what ``open_socket`` opens to ``endpoint``; ``report()`` will ``tell`` of waits."""
        self.endpoint = endpoint
        self.losses = 0
        self.greeted = False
        self._open_socket = open_socket
        self._tell = tell
        self._told = ""
        self._failures = 0
        self._doubtful = False
        self._state = State.READY
        self._open()

    def _open(self) -> None:
        with ExitStack() as failing:  # a socket that is left open would keep its context from ending
            self.socket = failing.enter_context(self._open_socket())
            self.monitor = failing.enter_context(self.socket.context.socket(zmq.PAIR))
            self.monitor.linger = 0
            # At the high-water mark of a monitor that nobody reads, libzmq's I/O thread would stop (libzmq 3745).
            self.monitor.rcvhwm = 0
            name = next(_names)
            self.socket.monitor(name, zmq.EVENT_ALL)
            self.monitor.connect(name)
            self._resolved = False
            # inproc raises no events.
            self._enter(State.READY if self.endpoint.startswith("inproc://") else State.CONNECTING)
            connect(self.socket, self.endpoint)
            failing.pop_all()

    def close(self) -> None:
        """Close the socket; what lies in it unsent is taken back."""
        # First, or libzmq's I/O thread waits for ever to send an event of the closing to a monitor that is gone.
        self.socket.disable_monitor()
        self.socket.close()
        self.monitor.close()

    def reopen(self) -> None:
        """Start again with a new socket, which knows nothing of requests under way."""
        self.close()
        self._open()

    @property
    def ready(self) -> bool:
        """Whether a peer was there at the last ``update()``."""
        return self._state is State.READY

    @property
    def known(self) -> bool:
        """Whether it is known by now that a peer is there, or why not."""
        return self.ready or self.trouble != NO_TROUBLE

    @property
    def pause(self) -> float:
        """Seconds after which ``update()`` is due even if the monitor is silent."""
        settled = self._state is State.CONNECTING and time.monotonic() - self._missed > 2 * PATIENCE
        return PATIENCE if settled or self.ready else SETTLING / 3

    def update(self) -> None:
        """Read what the monitor has to say, and draw conclusions from its silence.

        Raises Failure when waiting is of no use: the peer refuses our key, or its socket is of the wrong type.
        """
        while self.monitor.get(zmq.EVENTS) & POLLIN:
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self._hear(event, value)
        silence = time.monotonic() - self._since
        # After a failed handshake, silence may be a mute peer's instead of ZMTP 2's, until its time is up.
        patience = HANDSHAKE_LIMIT + PATIENCE if self._failures else SETTLING
        if self._state is State.HANDSHAKING and silence >= patience:
            self._enter(State.READY)
        elif self._state is State.BROKEN_OFF and silence >= SETTLING and not self._doubtful:
            self._doubtful = True  # once may be chance: TCP can connect to a free port from that very port
            self.reopen()
        elif self._state is State.BROKEN_OFF and silence >= SETTLING:
            wanted = "REP socket (nor ROUTER)" if self.socket.type == zmq.REQ else "DEALER socket (nor REQ)"
            raise Failure(f"{self.endpoint} is not a {wanted}: another type, or no ZeroMQ at all")
        elif self._state is State.ABANDONED and silence >= PATIENCE:
            self.reopen()

    def report(self) -> None:
        """Tell of a wait for the peer that has lasted a second, and of its end."""
        notice = "" if self.ready else f"waiting for {self.endpoint}: {self.trouble}"
        if self.ready and self._told:
            self._tell(f"connected to {self.endpoint}")
        elif notice != self._told and time.monotonic() - self._missed >= PATIENCE:
            self._tell(notice)
        else:
            return
        self._told = notice

    def _enter(self, state: State) -> None:
        self._since = time.monotonic()
        if self._state is State.READY:
            self._missed = self._since
        if State.READY in (self._state, state):
            self.trouble = NO_TROUBLE
        self._state = state

    def _hear(self, event: int, value: int) -> None:
        """Go on to the state that ``event`` tells of.

        The value of FAILED_NO_DETAIL is an errno: EAGAIN if nothing came until the time for the handshake was up. With
        another it also comes when a ready peer of ZMTP 2 is lost, which is left to DISCONNECTED, the next event.
        """
        match event:
            case zmq.EVENT_CONNECT_DELAYED:
                self._resolved = True
            case zmq.EVENT_CLOSED:
                self._resolved = True
                self.trouble = "nothing accepts connections there; start the server, or check the endpoint"
            case zmq.EVENT_CONNECT_RETRIED:
                if not self._resolved:
                    self.trouble = f"cannot resolve {self.endpoint.split('/')[-1].rpartition(':')[0]}; check the name"
                self._resolved = False
                self._enter(State.CONNECTING)
            case zmq.EVENT_CONNECTED:
                self._enter(State.HANDSHAKING)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._failures = 0
                self._doubtful = False
                self.greeted = True
                self._enter(State.READY)
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if value == errno.EAGAIN:
                self._failures += 1
                self._enter(State.CONNECTING)
                self.trouble = "it does not answer as ZeroMQ; check the endpoint"
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if not self.ready:
                self._failures += 1
                self._enter(State.CONNECTING)
                if self._failures > 2:  # fewer in a row are an ordinary restart
                    self.trouble = self._handshake_trouble()
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._failures += 1
                self._enter(State.ABANDONED)
                self.trouble = self._handshake_trouble()
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise Failure(f"{self.endpoint} refused: the server does not know this key")
            case zmq.EVENT_DISCONNECTED:
                self._resolved = True
                if self._state is State.READY:
                    self.losses += 1
                    self._enter(State.ABANDONED)
                elif self._state is State.HANDSHAKING:
                    self._enter(State.BROKEN_OFF)

    def _handshake_trouble(self) -> str:
        if self.socket.mechanism == zmq.CURVE:
            return "handshake failing, is --server-key right, does the server use --key?"
        return "handshake failing, is it a ZeroMQ server, does it ask for --key?"
