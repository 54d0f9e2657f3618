"""One connection to one endpoint: whether its peer is ready, and why not.

libzmq tells when a connection is made, ready and ended. Why nobody is ready is asked of the peer: see ``diagnosis``.
"""

import enum
import math
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import zmq

from zmqmsg.console import NOTICE_DELAY, Failure, notify
from zmqmsg.diagnosis import CONNECT_LIMIT, Background, Finding, Probe, diagnose, resolve_numeric
from zmqmsg.sockets import Socket, connect, is_named, open_monitor

PROBE_DELAY = 0.5
"""Seconds without a ready peer before the first probe of what stands in the way."""

RESOLVE_INTERVAL = 1.0
"""Seconds after a name could not be resolved before it is tried again."""

CONNECT_INTERVAL = 0.3
"""Seconds at least from one attempt to connect to the next."""

RETRY_DELAY = 0.1
"""Seconds within which libzmq says that it would connect again, if the peer has ended the connection."""

UPDATE_INTERVAL = 0.001
"""Seconds from one look at the monitor of a ready peer to the next: a look before each request would cost 10 % of the
throughput. A request that is sent into a connection which has ended in between counts as one that was sent."""

POLLIN = int(zmq.POLLIN)  # arithmetic with the enum itself is slow

# Events of a socket's monitor, of which libzmq says what it knows of a connection
CONNECTED = int(zmq.EVENT_CONNECTED)
HANDSHAKE_DONE = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
HANDSHAKE_REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
HANDSHAKE_FAILED = HANDSHAKE_REFUSED | int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
CONNECT_RETRIED = int(zmq.EVENT_CONNECT_RETRIED)
ENDED = HANDSHAKE_FAILED | CONNECT_RETRIED | int(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)

NO_ANSWER = Finding("no answer yet")
UNFINISHED = Finding("connected, but the ZeroMQ handshake is not finished yet")
HANDSHAKE_FAILING = Finding("connected, but the ZeroMQ handshake fails")
CURVE_FAILING = Finding("CURVE handshake failing; check --server-key, or the server cannot check clients just now")
NOT_LET_IN = Finding("it refused: the server does not let us in", hopeless=True)
KEY_NOT_KNOWN = Finding("it refused: the server does not know this key", hopeless=True)
# Statuses of ZAP, ZeroMQ's authentication protocol (RFC 27): a temporary error, and an internal one.
NOT_REFUSED_FOR_GOOD = {
    300: Finding("it refused for now: the server could not check who we are"),
    500: Finding("it refused: the server failed to check who we are"),
}


class State(enum.Enum):
    """How far a peer has come with the link that it has now."""

    UNCONNECTED = enum.auto()
    CONNECTING = enum.auto()
    READY = enum.auto()


class Peer:
    """An endpoint that is connected to again and again until it is ready. The user is told what it waits for.

    ``link``: the latest one. ``was_ready``: whether that has been so in this run.
    """

    def __init__(
        self,
        endpoint: str,
        open_socket: Callable[[], Socket],
        *,
        probe_delay: float = PROBE_DELAY,
        announce: bool = False,
        verbose: bool = False,
    ) -> None:
        """Prepare to connect what ``open_socket`` opens to ``endpoint``; ``update()`` connects it.

        ``probe_delay``: seconds before the first probe of what stands in the way. ``announce``: say when the peer is
        ready for the first time. ``verbose``: say so each time, and when it is lost.
        """
        self.endpoint = endpoint
        self.link = Link(open_socket())
        self.was_ready = False
        self._state = State.UNCONNECTED
        self._open_socket = open_socket
        self._probe_delay = probe_delay
        self._announce = announce or verbose  # whether to say when the peer is ready next
        self._verbose = verbose
        self._wait: Wait | None = None  # None: not yet, or the peer is ready
        self._next_connect = 0.0
        self._next_update = 0.0

    def update(self) -> bool:
        """Act upon what has happened: connect, probe, notify. Return whether the peer is ready."""
        now = time.monotonic()
        if now < self._next_update:
            return True
        self.link.read_events()
        if self.link.ended:
            if self._verbose and self._state is State.READY:
                notify(f"connection to {self.endpoint} lost")
            self.renew()
        if self._state is not State.READY:
            self._approach(now, self._wait or self._begin_wait(now))
        if self._state is State.READY:
            self._next_update = now + UPDATE_INTERVAL
        return self._state is State.READY

    def _begin_wait(self, now: float) -> "Wait":
        wanted = ("REP", "ROUTER") if self.link.socket.type == zmq.REQ else ("DEALER", "REQ")
        probe = partial(diagnose, self.endpoint, wanted, curve=self.link.uses_curve, was_ready=self.was_ready)
        self._wait = Wait(self.endpoint, Probe(probe, now + self._probe_delay, self._probe_delay), now)
        return self._wait

    def _approach(self, now: float, wait: "Wait") -> None:
        """Take each step towards a ready peer that is due."""
        if self._state is State.UNCONNECTED and now >= self._next_connect and (address := wait.addresses.next(now)):
            self._next_connect = now + CONNECT_INTERVAL
            self.link.connect(address, limit=CONNECT_LIMIT if address != self.endpoint else 0)
            self._state = State.CONNECTING
        wait.probe.update(now)
        # libzmq reports no handshake of an old peer. What is found at an earlier one says nothing about this one.
        if self.link.greeted or wait.probe.found_old_peer_since(self.link.connected_at):
            self._state = State.READY
            self.was_ready = True
            self._wait = None
            if self._announce or wait.notice:
                notify(f"connected to {self.endpoint}")
        else:
            wait.report(now)

    @property
    def trouble(self) -> Finding:
        """Why the peer is not ready. It is never hopeless where a good peer was before, which may come back."""
        found = self._wait.trouble if self._wait else NO_ANSWER
        return found._replace(hopeless=found.hopeless and not self.was_ready)

    def pause(self, now: float) -> float:
        """Return the seconds until ``update()`` is due without an event: more the longer the wait has been."""
        return min(max((now - self._wait.since) / 10, 0.002), 0.3) if self._wait else math.inf

    def renew(self) -> None:
        """Start again with a new link. A request that lies in the old one is not sent any more."""
        if self._state is State.READY:
            self._announce = self._verbose
        wait = self._wait or self._begin_wait(time.monotonic())
        link = self.link
        wait.handshake_trouble = link.handshake_trouble or wait.handshake_trouble
        if link.ended and not link.connected and wait.addresses.left:
            self._next_connect = 0  # an address that does not accept connections holds up none of the others
        link.close()
        self.link = Link(self._open_socket())
        self._state = State.UNCONNECTED
        self._next_update = 0

    def close(self) -> None:
        """Close the socket."""
        self.link.close()


class Wait:
    """A wait for a peer: since when, what stands in the way, and what the user was told of it.

    ``handshake_trouble``: how the last handshake has failed. ``notice``: what the user was told last.
    """

    def __init__(self, endpoint: str, probe: Probe, now: float) -> None:
        """Begin to wait at ``now``; ``probe`` finds out what stands in the way of ``endpoint``."""
        self.since = now
        self.addresses = Addresses(endpoint)
        self.probe = probe
        self.handshake_trouble = NO_ANSWER
        self.notice = ""
        self._endpoint = endpoint

    @property
    def trouble(self) -> Finding:
        """Why the peer is not ready: as the peer or the system says, or else as the last handshake has failed."""
        finding = self.probe.finding
        if finding and finding.reason:
            return finding
        return UNFINISHED if finding and self.handshake_trouble is NO_ANSWER else self.handshake_trouble

    def report(self, now: float) -> None:
        """Tell the user of a wait that lasts, and again when the reason is another one."""
        trouble = self.trouble
        notice = f"waiting for {self._endpoint}: {trouble.reason}"
        # The handshake of a server that has just come is about to end.
        too_early = trouble is UNFINISHED and now < self.probe.ended + PROBE_DELAY
        if self.probe.finding and now - self.since >= NOTICE_DELAY and notice != self.notice and not too_early:
            notify(notice)
            self.notice = notice


class Addresses:
    """The endpoints, with addresses in numbers, that an endpoint stands for; one that has no name stands for itself.

    libzmq would resolve a name on the thread that does everything else, and try only the first address.
    """

    def __init__(self, endpoint: str) -> None:
        """Begin with the first address of ``endpoint``."""
        self.left: list[str] = []
        self._endpoint = endpoint
        self._resolver: Background[list[str]] | None = None

    def next(self, now: float) -> str | None:
        """Return the next one, or None while the name is resolved. After the last one, it is resolved again."""
        if not is_named(self._endpoint):
            return self._endpoint
        if self._resolver and self._resolver.ended < math.inf and self._resolver.latest:
            self.left = self._resolver.latest
            self._resolver = None
        elif not self.left and (not self._resolver or now >= self._resolver.ended + RESOLVE_INTERVAL):
            self._resolver = Background(resolve_numeric(self._endpoint))
        return self.left.pop(0) if self.left else None


_names = (f"inproc://zmqmsg.monitor.{number}" for number in count())


class Link:
    """A socket that connects once, and all that libzmq reports of that connection.

    libzmq is told never to connect again. So what was sent over a link that has ended cannot be sent a second time
    behind our back. ``connected_at``: when it was connected, by ``time.monotonic()``; infinity if it was not.
    ``zap_status``: why the peer has refused us; 0 if it has not.
    """

    def __init__(self, socket: Socket) -> None:
        """Watch ``socket``, which is not connected yet; raise Failure, and close it, if there are too many sockets."""
        self.socket = socket
        self.connected_at = math.inf
        self.zap_status = 0
        self._events = 0  # all that have happened
        try:
            self.monitor = open_monitor(socket, next(_names), CONNECTED | HANDSHAKE_DONE | ENDED)
        except Failure:
            socket.close()
            raise

    @property
    def connected(self) -> bool:
        """Whether there is, or was, a TCP connection."""
        return self.connected_at < math.inf

    @property
    def greeted(self) -> bool:
        """Whether the handshake is done, and the connection has not ended."""
        return self._events & (HANDSHAKE_DONE | ENDED) == HANDSHAKE_DONE

    @property
    def ended(self) -> bool:
        """Whether the connection has ended, or could not be made."""
        return self._events & ENDED != 0

    @property
    def handshake_trouble(self) -> Finding | None:
        """How the handshake has failed, if it has."""
        if self.zap_status:
            return NOT_REFUSED_FOR_GOOD.get(self.zap_status, KEY_NOT_KNOWN if self.uses_curve else NOT_LET_IN)
        if self.ended and self._events & (CONNECTED | HANDSHAKE_DONE) == CONNECTED:
            return CURVE_FAILING if self.uses_curve else HANDSHAKE_FAILING
        return None

    @property
    def uses_curve(self) -> bool:
        """Whether the socket has CURVE keys."""
        return bool(self.socket.mechanism == zmq.CURVE)

    def connect(self, endpoint: str, *, limit: float) -> None:
        """Connect to ``endpoint``, whose address is in numbers; ``limit``: seconds to accept the connection, 0: any."""
        self.socket.connect_timeout = round(limit * 1000)
        connect(self.socket, endpoint)
        if endpoint.startswith("inproc://"):  # which raises no events
            self._events = CONNECTED | HANDSHAKE_DONE

    def read_events(self) -> None:
        """Collect the events that libzmq has reported. What follows from them is up to the caller."""
        while cast(int, self.monitor.get(zmq.EVENTS)) & POLLIN:
            # As zmq.utils.monitor does, which imports asyncio: 40 ms.
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self._events |= event
            if event == CONNECTED:
                self.connected_at = time.monotonic()
            elif event == HANDSHAKE_REFUSED:
                self.zap_status = value

    def was_rejected(self) -> bool:
        """Return whether our side has ended the connection because of what came over it.

        If the peer has ended it, libzmq says that it would connect again: wait for that. A flipped bit in an encrypted
        message is a failed handshake to libzmq, even after the handshake.
        """
        end = time.monotonic() + RETRY_DELAY
        while not self._events & (CONNECT_RETRIED | HANDSHAKE_FAILED):
            if (left := end - time.monotonic()) <= 0:
                return True
            self.monitor.poll(math.ceil(left * 1000))
            self.read_events()
        return False

    def close(self) -> None:
        """Close the socket. What lies in it unsent keeps its linger if there is a connection, and is dropped if not."""
        if self.socket.closed:
            return
        self.read_events()
        # First; otherwise libzmq's I/O thread waits for ever to send an event of the closing to a monitor that is gone.
        self.socket.disable_monitor()
        self.socket.close(None if self.connected and not self.ended else 0)
        self.monitor.close()


# All peers of a command


def wait(peers: Sequence[Peer], sources: Sequence[Any], until: float) -> None:
    """Wait until ``peers``, or ``sources``, sockets of ZeroMQ and of the system, may have something to say.

    It takes a second at most, and ends at ``until``, by ``time.monotonic()``.
    """
    now = time.monotonic()
    pause = min([until - now, 1, *(peer.pause(now) for peer in peers)])
    items = [*sources, *(peer.link.monitor for peer in peers)]
    zmq.zmq_poll([(item, zmq.POLLIN) for item in items], max(math.ceil(pause * 1000), 0))


def fail_without_hope(peers: Sequence[Peer]) -> None:
    """Raise Failure, with the reasons, if none of ``peers`` can ever be ready."""
    troubles = [peer.trouble for peer in peers]
    if all(trouble.hopeless for trouble in troubles):
        both = zip(peers, troubles, strict=True)
        raise Failure("; ".join(f"{peer.endpoint}: {trouble.reason}" for peer, trouble in both))
