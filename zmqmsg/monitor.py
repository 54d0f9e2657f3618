"""What the monitor of a connecting socket says, in our terms: who is there, or why nobody is.

``PeerState`` draws the conclusions, ``Connection`` owns the socket with its monitor, and ``Connections`` are all those
of a command.
"""

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from enum import Enum, IntEnum, auto
from functools import partial
from itertools import count
from typing import Any, cast

import zmq

from zmqmsg.console import Failure, notify
from zmqmsg.sockets import Context, Socket, connect, ipc_path, new_socket

NOTICE_DELAY = 1.0
"""Seconds of waiting before the user is told of it."""

REOPEN_DELAY = 1.0
"""Seconds before a socket that libzmq has given up is replaced."""

RETRY_DELAY = 0.3
"""Seconds within which CONNECT_RETRIED follows DISCONNECTED if libzmq connects again."""

PROBE_LIMIT = 1.0
"""Seconds that a peer has to send its greeting to a probe."""

UPDATE_INTERVAL = 0.001
"""Seconds at least between two looks at the monitors: to look before each request takes 10 % of a stream's time. In
that time libzmq cannot connect again (RECONNECT_IVL is 0.1 s), so an old loss does not pass for a new one."""

SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
"""How a peer of ZMTP 2 or later begins its greeting."""

POLLIN = int(zmq.POLLIN)  # arithmetic with the enum itself is slow

_names = (f"inproc://zmqmsg.monitor.{number}" for number in count())


class State(Enum):
    """Where a connection stands."""

    CONNECTING = auto()
    """There is no TCP connection; libzmq tries again and again."""
    HANDSHAKING = auto()
    """TCP is connected, and the handshake of ZMTP not finished."""
    READY = auto()
    """Requests can be sent."""
    HUNG_UP = auto()
    """The connection ended during the handshake, and libzmq has not said that it connects again."""
    GIVEN_UP = auto()
    """The connection ended, and libzmq may not connect again."""
    HOPELESS = auto()
    """The peer rejects us for good."""


class Verdict(IntEnum):
    """What a Probe has found: events beside those of libzmq, which are above 0."""

    ZMTP = -1
    NO_ZMTP = -2


class Trouble(Enum):
    """Why nobody is ready, in a notice of its own or as the end of another text: see ``Notices.explain``."""

    UNKNOWN = "{waiting}no answer yet"
    REFUSED = "{waiting}nothing accepts connections there"
    FORBIDDEN = "{waiting}no permission to connect to that path"
    UNRESOLVED = "{waiting}cannot resolve {name}"
    NOT_ZEROMQ = "connected{at}, but it has not answered as ZeroMQ; is the port right?"
    NEEDS_CURVE = "{waiting}the server may require CURVE; pass --server-key"
    CURVE_FAILING = "{waiting}CURVE handshake failing; check --server-key, and that the server uses CURVE"
    KEY_REFUSED = "{it} refused: the server does not know this key"
    WRONG_TYPE = "{it} is neither a {wanted} socket"


# What an event means depends on the state; an event that is not here changes nothing. The doubtful cases are those in
# which libzmq says too little, and a Probe looks at how the peer begins to speak.
_TRANSITIONS: dict[tuple[State, int], State] = {
    (State.CONNECTING, zmq.EVENT_CONNECTED): State.HANDSHAKING,
    (State.HANDSHAKING, zmq.EVENT_HANDSHAKE_SUCCEEDED): State.READY,
    # The handshake failed, and libzmq connects again by itself.
    (State.HANDSHAKING, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): State.CONNECTING,
    # It failed, and libzmq does not connect again.
    (State.HANDSHAKING, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): State.GIVEN_UP,
    (State.HANDSHAKING, zmq.EVENT_HANDSHAKE_FAILED_AUTH): State.HOPELESS,
    # It was broken off. If libzmq connects again, that was an ordinary break. If not, either the peer speaks ZMTP and
    # its socket is of the wrong type (hopeless, unless a good one was there before), or it speaks something else.
    (State.HANDSHAKING, zmq.EVENT_DISCONNECTED): State.HUNG_UP,
    (State.HUNG_UP, zmq.EVENT_CONNECT_RETRIED): State.CONNECTING,
    (State.HUNG_UP, Verdict.ZMTP): State.HOPELESS,
    (State.HUNG_UP, Verdict.NO_ZMTP): State.GIVEN_UP,
    # It is overdue, and the connection is up. ZMTP 1 and 2 have no handshake whose end libzmq tells, and libzmq takes a
    # banner of text for ZMTP 1.
    (State.HANDSHAKING, Verdict.ZMTP): State.READY,
    (State.HANDSHAKING, Verdict.NO_ZMTP): State.GIVEN_UP,
    # Whatever ends a connection that was ready is a loss. Mostly libzmq connects again by itself.
    (State.READY, zmq.EVENT_DISCONNECTED): State.GIVEN_UP,
    (State.READY, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): State.GIVEN_UP,
    (State.GIVEN_UP, zmq.EVENT_CONNECT_RETRIED): State.CONNECTING,
}


class PeerState:
    """The state of the peer at one endpoint, as a pure state machine: events and the time in, conclusions out.

    ``ready``: requests can be sent. ``losses`` counts the connections that ended though they were ready. ``known``: one
    was ready at some time. ``handshake_limit``: seconds.
    """

    def __init__(self, now: float, handshake_limit: float, *, curve: bool = False) -> None:
        """Begin with CONNECTING. Times are in seconds, of any one clock."""
        self.losses = 0
        self.known = False
        self._curve = curve
        self._trouble = Trouble.UNKNOWN
        self._failures = 0
        self._suspicions = 0
        self.handshake_limit = handshake_limit
        # Past its limit, libzmq has cut off whoever owes it a handshake; a tenth more allows for a busy machine.
        self._limits = {
            State.HANDSHAKING: 1.1 * handshake_limit,
            State.HUNG_UP: RETRY_DELAY,
            State.GIVEN_UP: REOPEN_DELAY,
        }
        self.restart(now)

    def restart(self, now: float) -> None:
        """Begin again with CONNECTING, for a new socket; what is known of the peer stays."""
        self._resolved = False
        self._enter(State.CONNECTING, now)

    @property
    def due(self) -> float:
        """When to probe the peer, or to replace the socket."""
        return self._since + self._limits.get(self.state, float("inf"))

    def wants_probe(self, now: float) -> bool:
        """Return whether to look at how the peer begins: events leave a doubt."""
        return self.state in (State.HANDSHAKING, State.HUNG_UP) and now >= self.due

    def wants_new_socket(self, now: float) -> bool:
        """Return whether libzmq has had time enough to connect again, or a wrong type is to be seen a second time."""
        look_again = self._trouble is Trouble.WRONG_TYPE and self._suspicions == 1 and not self.known
        return self.state is State.GIVEN_UP and (look_again or now >= self.due)

    def trouble(self, now: float) -> Trouble:
        """Return why the peer is not ready."""
        if self.state is State.HANDSHAKING and now - self._since >= min(NOTICE_DELAY, self.handshake_limit / 2):
            return Trouble.NOT_ZEROMQ
        if self.state is State.HUNG_UP and self._trouble is Trouble.UNKNOWN:
            return Trouble.NOT_ZEROMQ
        return self._trouble

    def handle_event(self, event: int, value: int, now: float) -> None:
        """Go on to the state that ``event`` leads to, and learn from it what the trouble is."""
        state = _TRANSITIONS.get((self.state, event), self.state)
        if self.state is State.HUNG_UP and state is State.HOPELESS:
            self._suspicions += 1
            # A good peer that was there before may come back. And once may be chance: the port may just have changed
            # hands, or TCP have connected to a free port from that very port.
            if self.known or self._suspicions < 2:
                state = State.GIVEN_UP
        if self.ready and state is not State.READY:
            self.losses += 1
        self._learn(event, value)
        if state is not self.state:
            self._enter(state, now)

    def _enter(self, state: State, now: float) -> None:
        self.state = state
        self.ready = state is State.READY
        self._since = now
        if self.ready:
            self.known = True
            self._failures = 0
            self._suspicions = 0
            self._trouble = Trouble.UNKNOWN

    def _learn(self, event: int, value: int) -> None:
        match self.state, event:
            case _, zmq.EVENT_CONNECT_DELAYED | zmq.EVENT_CONNECTED:
                self._resolved = True
            case _, zmq.EVENT_CLOSED:
                self._resolved = True
                self._failures = 0
                self._suspicions = 0
                self._trouble = Trouble.REFUSED
            case _, zmq.EVENT_CONNECT_RETRIED:
                if not self._resolved:
                    self._trouble = Trouble.UNRESOLVED
                self._resolved = False
            case State.HANDSHAKING, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failures += 1
                mute = value == errno.EAGAIN  # the handshake timer; anything else is a break
                # One break or two in a row are an ordinary restart, and say less than other failures did.
                lasting = self._failures > 2 and self._trouble not in (Trouble.NEEDS_CURVE, Trouble.WRONG_TYPE)
                if mute or lasting or self._trouble is Trouble.UNKNOWN:
                    self._trouble = Trouble.CURVE_FAILING if self._curve and not mute else Trouble.NOT_ZEROMQ
            case State.HANDSHAKING, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                needs_curve = value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
                others = Trouble.NEEDS_CURVE if needs_curve else Trouble.NOT_ZEROMQ
                self._trouble = Trouble.CURVE_FAILING if self._curve else others
            case State.HANDSHAKING, zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._trouble = Trouble.KEY_REFUSED
            case State.HUNG_UP, Verdict.ZMTP:
                self._trouble = Trouble.WRONG_TYPE
            case _, Verdict.NO_ZMTP:
                self._trouble = Trouble.NOT_ZEROMQ


class Probe:
    """A raw TCP connection that looks at how a peer begins: as ZMTP, or as something else."""

    def __init__(self, context: Context, endpoint: str, now: float) -> None:
        """Connect to ``endpoint``, which has ``PROBE_LIMIT`` from ``now`` on to begin."""
        self._end = now + PROBE_LIMIT
        self.socket = new_socket(context, zmq.STREAM)
        self.socket.linger = 0
        connect(self.socket, endpoint)

    def verdict(self, now: float) -> Verdict | None:
        """Return how the peer begins to speak; None if that is not known yet."""
        try:
            while True:
                identity, data = self.socket.recv_multipart(zmq.NOBLOCK)
                if data:
                    return Verdict.ZMTP if _is_zmtp(data) else Verdict.NO_ZMTP
                self.socket.send_multipart([identity, SIGNATURE], zmq.NOBLOCK)
        except zmq.ZMQError:  # nothing to read, or the connection has ended
            return Verdict.NO_ZMTP if now >= self._end else None


def _is_zmtp(greeting: bytes) -> bool:
    """Return whether a peer that begins so may be one of ZeroMQ.

    ZMTP 2 and later begin with a signature, whose last byte is odd. All that a peer of ZMTP 1 says at first is its
    identity, a frame: the length of what follows, a byte of flags (0) and the identity.
    """
    if greeting[0] == 0xFF:
        return len(greeting) < len(SIGNATURE) or greeting[len(SIGNATURE) - 1] % 2 == 1
    return greeting[1:2] == b"\0" and len(greeting) == 1 + greeting[0]


class Hopeless(Failure):
    """Waiting for a peer is of no use."""


class Notices:
    """What the user is told of one connection: a wait of more than a second with its reason, and its end."""

    def __init__(self, endpoint: str, wanted: str, now: float, *, announce: bool, verbose: bool) -> None:
        """Begin to wait at ``now``, for a peer of the ``wanted`` types; see Connection for the other parameters."""
        self._endpoint = endpoint
        self._wanted = wanted
        self._verbose = verbose
        self._waiting_since: float | None = now
        self._last_notice = ""
        self._announce_connected = announce or verbose

    def begin_wait(self, now: float) -> None:
        """Begin to wait again at ``now``, unless nobody has been ready since the last time."""
        self._waiting_since = self._waiting_since or now

    def add_detail(self, text: str) -> None:
        """Tell of what happens to the connection, if the user wants to know that much."""
        if self._verbose:
            notify(text)
            self._announce_connected = True

    def update(self, peer: PeerState, now: float) -> None:
        """Tell of a wait that has lasted a second, or of its end."""
        if peer.ready:
            if self._announce_connected:
                notify(f"connected to {self._endpoint}")
            self._announce_connected = False
            self._last_notice = ""
            self._waiting_since = None
        elif self._waiting_since and now - self._waiting_since >= NOTICE_DELAY:
            notice = self.explain(peer.trouble(now), alone=True)
            if notice != self._last_notice:
                notify(notice)
            self._announce_connected = True
            self._last_notice = notice

    def explain(self, trouble: Trouble, *, alone: bool) -> str:
        """Return ``trouble`` in words; ``alone``: as a text of its own, not to go behind the endpoint."""
        path = ipc_path(self._endpoint)
        if trouble is Trouble.REFUSED and os.path.exists(path) and not os.access(path, os.W_OK):
            trouble = Trouble.FORBIDDEN
        return trouble.value.format(
            waiting=f"waiting for {self._endpoint}: " if alone else "",
            at=f" to {self._endpoint}" if alone else "",
            it=self._endpoint if alone else "it",
            name=self._endpoint.removeprefix("tcp://").rpartition(":")[0],
            wanted=self._wanted,
        )


class Connection:
    """A socket that connects to one endpoint, with its monitor, and notices of what happens there.

    ``socket`` is a new one after each ``reopen()``. ``last_used`` is for whoever chooses among connections.
    """

    def __init__(
        self, endpoint: str, open_socket: Callable[[], Socket], *, announce: bool = False, verbose: bool = False
    ) -> None:
        """Connect what ``open_socket`` opens to ``endpoint``.

        ``announce``: say when the peer is there for the first time. ``verbose``: also each time that it comes and goes.
        """
        now = time.monotonic()
        self.endpoint = endpoint
        self.last_used = 0.0
        self._open_socket = open_socket
        self._probe: Probe | None = None
        self._old_protocol_noted = False
        self._open()
        wanted = "REP nor a ROUTER" if self.socket.type == zmq.REQ else "DEALER nor a REQ"
        self._notices = Notices(endpoint, wanted, now, announce=announce, verbose=verbose)
        limit = cast(int, self.socket.handshake_ivl) / 1000
        self.peer = PeerState(now, limit, curve=self.socket.mechanism == zmq.CURVE)
        self._assume_inproc_is_ready(now)

    def _open(self) -> None:
        with ExitStack() as failing:  # a socket that is left open would keep its context from ending
            self.socket = failing.enter_context(self._open_socket())
            self.monitor = failing.enter_context(new_socket(self.socket.context, zmq.PAIR))
            self.monitor.linger = 0
            # At the high-water mark of a monitor that nobody reads, libzmq's I/O thread would stop (libzmq 3745).
            self.monitor.rcvhwm = 0
            name = next(_names)
            self.socket.monitor(name, zmq.EVENT_ALL)
            self.monitor.connect(name)
            connect(self.socket, self.endpoint)
            failing.pop_all()

    def _assume_inproc_is_ready(self, now: float) -> None:
        if self.endpoint.startswith("inproc://"):  # which raises no events
            self.peer.handle_event(zmq.EVENT_CONNECTED, 0, now)
            self.peer.handle_event(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0, now)

    def close(self) -> None:
        """Close the socket. What lies in it unsent is taken back, or keeps its linger if a peer is there for it."""
        self._end_probe()
        if self.socket.closed:  # reopening it has failed
            return
        while self._has_events():
            self._read_events(time.monotonic())
        # First, or libzmq's I/O thread waits for ever to send an event of the closing to a monitor that is gone.
        self.socket.disable_monitor()
        self.socket.close(None if self.peer.ready else 0)
        self.monitor.close()

    def reopen(self) -> None:
        """Start again with a new socket, which knows nothing of requests under way."""
        now = time.monotonic()
        if self.peer.ready:
            self._notices.begin_wait(now)
        self._notices.add_detail(f"reopening the connection to {self.endpoint}")
        self.close()
        self._open()
        self.peer.restart(now)
        self._assume_inproc_is_ready(now)

    @property
    def sources(self) -> list[Socket]:
        """The sockets that may have something to say to ``update()``."""
        return [self.monitor, self._probe.socket] if self._probe else [self.monitor]

    def pause(self, now: float) -> float:
        """Return the seconds after which ``update()`` is due even if nothing has anything to say: a second at most."""
        return PROBE_LIMIT / 10 if self._probe else min(max(self.peer.due - now, 0), 1)

    def explain(self, now: float) -> str:
        """Return why the peer is not ready."""
        return self._notices.explain(self.peer.trouble(now), alone=False)

    def update(self) -> None:
        """Read what the monitor has to say, do what follows from it, and notify the user of it.

        Raises Hopeless when waiting is of no use: the peer refuses our key, or its socket is of the wrong type.
        """
        now = time.monotonic()
        losses = self.peer.losses
        self._read_events(now)
        self._probe_if_in_doubt(now)
        if self.peer.losses > losses:
            self._notices.begin_wait(now)
            self._notices.add_detail(f"connection to {self.endpoint} lost")
        if self.peer.state is State.HOPELESS:
            raise Hopeless(self._notices.explain(self.peer.trouble(now), alone=True))
        self._notices.update(self.peer, now)
        if self.peer.wants_new_socket(now):
            self.reopen()

    def _has_events(self) -> bool:
        return bool(cast(int, self.monitor.get(zmq.EVENTS)) & POLLIN)

    def _read_events(self, now: float) -> None:
        losses = self.peer.losses
        # A loss is for the caller to see before what came after it.
        while self.peer.losses == losses and self._has_events():
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self.peer.handle_event(event, value, now)

    def _probe_if_in_doubt(self, now: float) -> None:
        if not self.peer.wants_probe(now):
            self._end_probe()
            return
        if self.endpoint.startswith("ipc://"):
            verdict: Verdict | None = Verdict.ZMTP  # a probe needs TCP; nothing else is likely to listen on an ipc path
        else:
            self._probe = self._probe or Probe(self.socket.context, self.endpoint, now)
            verdict = self._probe.verdict(now)
        if verdict is not None:
            self._end_probe()
            self.peer.handle_event(verdict, 0, now)
            if self.peer.ready and not self._old_protocol_noted:
                self._old_protocol_noted = True
                text = f"uses an old protocol (ZMTP 1 or 2), so connecting takes {self.peer.handshake_limit:g} s"
                notify(f"{self.endpoint} {text}")

    def _end_probe(self) -> None:
        if self._probe:
            self._probe.socket.close()
            self._probe = None


class Connections:
    """The connections of a command, each to an endpoint of its own."""

    def __init__(
        self, endpoints: Sequence[str], open_socket: Callable[..., Socket], *, needed: bool = True, **options: Any
    ) -> None:
        """Connect a socket to each of ``endpoints``; ``options`` are those of Connection.

        ``open_socket(thread=N)`` opens one. Each is served by an I/O thread of its own, since one that resolves a name,
        for seconds maybe, does nothing else. ``needed``: whether ``update()`` fails when all have become hopeless.
        """
        self._needed = needed
        self._updated = 0.0
        self._ready: list[Connection] = []
        self._connections: list[Connection] = []
        try:
            for thread, endpoint in enumerate(endpoints, 1):
                self._connections.append(Connection(endpoint, partial(open_socket, thread=thread), **options))
        except Failure:
            self.close()
            raise

    def __iter__(self) -> Iterator[Connection]:
        """Return an iterator over those that are not hopeless."""
        return iter(self._connections)

    def __len__(self) -> int:
        """Return how many are not hopeless."""
        return len(self._connections)

    def close(self) -> None:
        """Close all sockets."""
        for connection in self._connections:
            connection.close()

    def pause(self) -> float:
        """Return the seconds after which ``update()`` is due: a second at most."""
        now = time.monotonic()
        return min((connection.pause(now) for connection in self._connections), default=1)

    def reopen(self, connection: Connection) -> None:
        """Start again with a new socket for ``connection``."""
        self._ready = []
        connection.reopen()

    def update(self) -> list[Connection]:
        """Keep up with the peers, unless that has just been done, and return the connections that are ready.

        Goes on without those that are hopeless; raises Hopeless when none is left.
        """
        now = time.monotonic()
        if now - self._updated < UPDATE_INTERVAL:
            return self._ready
        self._updated = now
        for connection in tuple(self._connections):
            try:
                connection.update()
            except Hopeless as hopeless:
                self._connections.remove(connection)
                connection.close()
                if self._needed and not self._connections:
                    raise
                notify(f"{hopeless}; going on without it", "yellow")
        self._ready = [connection for connection in self._connections if connection.peer.ready]
        return self._ready
