"""One connection to one endpoint: whether its peer is ready, and why not.

libzmq tells when a connection is made, ready and ended. Why nobody is ready is asked of the peer: see ``diagnosis``.
"""

import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from threading import Thread
from typing import Any, Generic, TypeVar, cast

import zmq

from zmqmsg.console import NOTICE_DELAY, Failure, notify
from zmqmsg.diagnosis import CONNECT_LIMIT, Finding, diagnose, resolve_numeric
from zmqmsg.sockets import Socket, connect, is_named, open_monitor

LOOK_DELAY = 0.5
"""Seconds without a ready peer before the first look at what stands in the way."""

LOOK_INTERVAL = 1.0
"""Seconds between the end of a look and the next one."""

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
CONNECTED = int(zmq.EVENT_CONNECTED)
READY = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
DISCONNECTED = int(zmq.EVENT_DISCONNECTED)
RETRIED = int(zmq.EVENT_CONNECT_RETRIED)
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
FAILED = REFUSED | int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
ENDED = DISCONNECTED | RETRIED | FAILED | int(zmq.EVENT_CLOSED)

T = TypeVar("T")
_names = (f"inproc://zmqmsg.monitor.{number}" for number in count())


NO_ANSWER = Finding("no answer yet")
UNFINISHED = Finding("connected, but the ZeroMQ handshake is not finished yet")
HANDSHAKE_FAILING = Finding("connected, but the ZeroMQ handshake fails")
CURVE_FAILING = Finding("CURVE handshake failing; check --server-key")
NOT_LET_IN = Finding("it refused: the server does not let us in", hopeless=True)
KEY_NOT_KNOWN = Finding("it refused: the server does not know this key", hopeless=True)
# Statuses of ZAP, ZeroMQ's authentication protocol (RFC 27): a temporary error, and an internal one.
NOT_REFUSED_FOR_GOOD = {
    300: Finding("it refused for now: the server could not check who we are"),
    500: Finding("it refused: the server failed to check who we are"),
}


class Background(Generic[T]):
    """An iterator that runs in a daemon thread, as a name server or a peer may hold it up for as long as it likes.

    ``latest``: what it has yielded last. ``began`` and ``ended``: when, in seconds; infinity if it has not ended.
    """

    def __init__(self, iterator: Iterator[T]) -> None:
        """Start to run ``iterator``."""
        self.latest: T | None = None
        self.began = time.monotonic()
        self.ended = math.inf
        self._iterator = iterator
        try:
            Thread(target=self._run, daemon=True).start()
        except RuntimeError:  # no more threads just now; whoever wants the answer asks again
            self.ended = self.began

    def _run(self) -> None:
        # Without descriptors nothing can be imported; whoever wants the answer asks again.
        with suppress(OSError, ImportError, LookupError):
            for latest in self._iterator:
                self.latest = latest
        self.ended = time.monotonic()


class Addresses:
    """The endpoints, with addresses in numbers, that an endpoint stands for; one that has no name stands for itself.

    libzmq would resolve a name on the thread that does everything else, and try only the first address.
    """

    def __init__(self, endpoint: str) -> None:
        """Begin with the first address of ``endpoint``."""
        self.left: list[str] = []
        self._endpoint = endpoint
        self._resolver: Background[list[str]] | None = None

    def next(self) -> str | None:
        """Return the next one, or None while the name is resolved. After the last one, it is resolved again."""
        if not is_named(self._endpoint):
            return self._endpoint
        if self._resolver and self._resolver.ended < math.inf and self._resolver.latest:
            self.left = self._resolver.latest
            self._resolver = None
        elif not self.left and (not self._resolver or time.monotonic() >= self._resolver.ended + RESOLVE_INTERVAL):
            self._resolver = Background(resolve_numeric(self._endpoint))
        return self.left.pop(0) if self.left else None


class Waiting:
    """A wait for a peer at an endpoint: why it is not ready, and what the user was told of it.

    ``since``: when it began. ``failure``: how the last handshake has failed. ``notice``: what the user was told last.
    """

    def __init__(self, endpoint: str, look_delay: float) -> None:
        """Begin to wait; the first look at what stands in the way is due after ``look_delay`` seconds."""
        self.since = time.monotonic()
        self.failure = NO_ANSWER
        self.notice = ""
        self._endpoint = endpoint
        self._look_delay = look_delay
        self._look: Background[Finding] | None = None
        self._looks_at: Link | None = None  # what was connected when the look began
        self._finding: Finding | None = None

    @property
    def trouble(self) -> Finding:
        """Why the peer is not ready: as the peer or the system says, or else as the last handshake has failed."""
        if self._finding and self._finding.reason:
            return self._finding
        return UNFINISHED if self._finding and self.failure is NO_ANSWER else self.failure

    def look(self, link: "Link", now: float, *, known: bool) -> bool:
        """Look at what stands in the way of ``link``, if it is time to; return whether it can be used all the same.

        That is so if the peer is an old one, and the link was connected when the look began.
        """
        look = self._look
        if now >= (self.since + self._look_delay if look is None else look.ended + LOOK_INTERVAL):
            self._looks_at = link if link.connected else None
            wanted = ("REP", "ROUTER") if link.socket.type == zmq.REQ else ("DEALER", "REQ")
            self._look = Background(diagnose(self._endpoint, wanted, curve=link.uses_curve, known=known))
            return False
        # What is found on the way counts only where the look is held up.
        if look and (look.ended <= now or now - look.began >= self._look_delay):
            self._finding = look.latest
        found = self._finding or NO_ANSWER
        return found.old and not found.hopeless and self._looks_at is link

    def report(self, now: float) -> None:
        """Tell the user of a wait that lasts, and again when the reason is another one."""
        trouble = self.trouble
        notice = f"waiting for {self._endpoint}: {trouble.reason}"
        # The handshake of a server that has just come is about to end.
        too_early = self._look and trouble is UNFINISHED and now < self._look.ended + LOOK_DELAY
        if self._finding and now - self.since >= NOTICE_DELAY and notice != self.notice and not too_early:
            notify(notice)
            self.notice = notice


class Link:
    """A socket with the one TCP connection of its life, and all that libzmq reports of it.

    libzmq is told never to connect again. So what was sent over a link that has ended cannot be sent a second time
    behind our back. ``status``: of ZAP, if the peer has refused us; else 0.
    """

    def __init__(self, socket: Socket) -> None:
        """Watch ``socket``, which is not connected yet; raise Failure, and close it, if there are too many sockets."""
        self.socket = socket
        self.connecting = False
        self.status = 0
        self._events = 0  # all that have happened
        try:
            self.monitor = open_monitor(socket, next(_names), CONNECTED | READY | ENDED)
        except Failure:
            socket.close()
            raise

    @property
    def connected(self) -> bool:
        """Whether there is, or was, a TCP connection."""
        return self._events & CONNECTED != 0

    @property
    def ready(self) -> bool:
        """Whether messages can be sent."""
        return self._events & (READY | ENDED) == READY

    @property
    def ended(self) -> bool:
        """Whether the connection has ended, or could not be made."""
        return self._events & ENDED != 0

    @property
    def failure(self) -> Finding | None:
        """How the handshake has failed, if it has."""
        if self.status:
            return NOT_REFUSED_FOR_GOOD.get(self.status, KEY_NOT_KNOWN if self.uses_curve else NOT_LET_IN)
        if self.ended and self._events & (CONNECTED | READY) == CONNECTED:
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
        self.connecting = True
        if endpoint.startswith("inproc://"):  # which raises no events
            self._events = CONNECTED | READY

    def trust(self) -> None:
        """Take the handshake as done: libzmq reports none of ZMTP 1 and 2."""
        self._events |= READY

    def read_events(self) -> None:
        """Take note of what has happened, and do nothing about it."""
        while cast(int, self.monitor.get(zmq.EVENTS)) & POLLIN:
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self._events |= event
            if event == REFUSED:
                self.status = value

    def was_rejected(self) -> bool:
        """Return whether our side has ended the connection because of what came over it.

        If the peer has ended it, libzmq says that it would connect again: wait for that. A flipped bit in an encrypted
        message is a failed handshake to libzmq, even after the handshake.
        """
        end = time.monotonic() + RETRY_DELAY
        while not self._events & (RETRIED | FAILED):
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


class Connection:
    """Connects to an endpoint again and again until a peer is ready, and tells the user what it waits for.

    ``link``: the latest one. ``known``: whether a peer has been ready in this run.
    """

    def __init__(
        self,
        endpoint: str,
        open_socket: Callable[[], Socket],
        *,
        look_delay: float = LOOK_DELAY,
        announce: bool = False,
        verbose: bool = False,
    ) -> None:
        """Prepare to connect what ``open_socket`` opens to ``endpoint``; ``update()`` connects it.

        ``look_delay``: seconds before the first look at what stands in the way. ``announce``: say when a peer is ready
        for the first time. ``verbose``: say so each time, and when it is lost.
        """
        self.endpoint = endpoint
        self.link = Link(open_socket())
        self.known = False
        self._open_socket = open_socket
        self._look_delay = look_delay
        self._announce = announce or verbose  # whether to say when a peer is ready next
        self._verbose = verbose
        self._addresses = Addresses(endpoint)
        self._waiting: Waiting | None = Waiting(endpoint, look_delay)  # None: a peer is ready
        self._next_connect = 0.0
        self._next_update = 0.0  # while a peer is ready

    @property
    def trouble(self) -> Finding:
        """Why the peer is not ready. It is never hopeless where a good peer was before, which may come back."""
        found = self._waiting.trouble if self._waiting else NO_ANSWER
        return found._replace(hopeless=found.hopeless and not self.known)

    def pause(self, now: float) -> float:
        """Return the seconds until ``update()`` is due without an event: more the longer the wait has been."""
        return min(max((now - self._waiting.since) / 10, 0.002), 0.3) if self._waiting else math.inf

    def update(self) -> bool:
        """Do what follows from what has happened: connect, look for trouble, notify. Return whether a peer is ready."""
        now = time.monotonic()
        if now < self._next_update:
            return True
        self.link.read_events()
        if not self.link.ready:
            self._seek_peer(now)
        if self.link.ready:
            if self._waiting and (self._announce or self._waiting.notice):
                notify(f"connected to {self.endpoint}")
            self._waiting = None
            self.known = True
            self._next_update = now + UPDATE_INTERVAL
            return True
        return False

    def _seek_peer(self, now: float) -> None:
        if self.link.ended:
            if self._verbose and not self._waiting:
                notify(f"connection to {self.endpoint} lost")
            self.renew()
        if not self.link.connecting and now >= self._next_connect and (address := self._addresses.next()):
            self._next_connect = now + CONNECT_INTERVAL
            self.link.connect(address, limit=CONNECT_LIMIT if address != self.endpoint else 0)
        if self._waiting and self._waiting.look(self.link, now, known=self.known):
            self.link.trust()
        elif self._waiting:
            self._waiting.report(now)

    def renew(self) -> None:
        """Start again with a new link. A request that lies in the old one is not sent any more."""
        if not self._waiting:
            self._announce = self._verbose
            self._addresses = Addresses(self.endpoint)
            self._waiting = Waiting(self.endpoint, self._look_delay)
        self._next_update = 0
        link = self.link
        self._waiting.failure = link.failure or self._waiting.failure
        if link.ended and not link.connected and self._addresses.left:
            self._next_connect = 0  # an address that does not accept connections holds up none of the others
        link.close()
        self.link = Link(self._open_socket())

    def close(self) -> None:
        """Close the socket."""
        self.link.close()


def wait(connections: Sequence[Connection], sources: Sequence[Any], until: float) -> None:
    """Wait until ``connections``, or ``sources``, sockets and descriptors, may have something to say.

    It takes a second at most, and ends at ``until``, by ``time.monotonic()``.
    """
    now = time.monotonic()
    pause = min([until - now, 1, *(connection.pause(now) for connection in connections)])
    items = [*sources, *(connection.link.monitor for connection in connections)]
    zmq.zmq_poll([(item, zmq.POLLIN) for item in items], max(math.ceil(pause * 1000), 0))


def fail_if_hopeless(connections: Sequence[Connection]) -> None:
    """Raise Failure, with the reasons, if none of ``connections`` can ever be ready."""
    troubles = [connection.trouble for connection in connections]
    if all(trouble.hopeless for trouble in troubles):
        told = zip(connections, troubles, strict=True)
        raise Failure("; ".join(f"{connection.endpoint}: {trouble.reason}" for connection, trouble in told))
