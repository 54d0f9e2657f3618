"""An endpoint that is connected to again and again: whether its peer is ready, and why not.

libzmq tells when a connection is made, ready and ended. Why nobody is ready is asked of the peer: see ``diagnosis``.
"""

import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import zmq

from zmqmsg.console import NOTICE_DELAY, Failure, notify
from zmqmsg.diagnosis import CONNECT_LIMIT, OLD_PEER, Background, Finding, diagnose, resolve_numeric
from zmqmsg.sockets import Socket, connect, is_named, open_monitor

# Times, in seconds
PROBE_DELAY = 0.5  # without a ready peer before the first probe of what stands in the way
PROBE_INTERVAL = 1.0  # from the end of a probe to the next one
RESOLVE_INTERVAL = 1.0  # after a name could not be resolved, until it is tried again
CONNECT_INTERVAL = 0.3  # at least, from one attempt to connect to the next
RETRY_DELAY = 0.1  # within which libzmq says that it would connect again, if the peer has ended the connection
# From one look at the monitor of a ready peer to the next: one before each request would cost 10 % of the throughput.
# A request that is sent into a connection which has ended in between counts as one that was sent.
UPDATE_INTERVAL = 0.001

POLLIN = int(zmq.POLLIN)  # arithmetic with the enum itself is slow

# Events of a socket's monitor, of which libzmq says what it knows of a connection
CONNECTED = int(zmq.EVENT_CONNECTED)
HANDSHAKE_DONE = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
HANDSHAKE_REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
HANDSHAKE_FAILED = HANDSHAKE_REFUSED | int(
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
CONNECT_RETRIED = int(zmq.EVENT_CONNECT_RETRIED)
ENDED = HANDSHAKE_FAILED | CONNECT_RETRIED | int(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)

NO_ANSWER = Finding("no answer yet")
UNFINISHED = Finding(
    "the ZeroMQ handshake is not finished yet; the server is slow, or cannot check clients just now"
)
HANDSHAKE_FAILING = Finding("connected, but the ZeroMQ handshake fails")
CURVE_FAILING = Finding(
    "CURVE handshake failing; check --server-key, or the server cannot check clients just now"
)
NOT_LET_IN = Finding("it refused: the server does not let us in", hopeless=True)
KEY_NOT_KNOWN = Finding("it refused: the server does not know this key", hopeless=True)
# Statuses of ZAP, ZeroMQ's authentication protocol (RFC 27): a temporary error, and an internal one.
NOT_REFUSED_FOR_GOOD = {
    300: Finding("it refused for now: the server could not check who we are"),
    500: Finding("it refused: the server failed to check who we are"),
}


class Peer:
    """An endpoint that is connected to again and again until it is ready. It tells the user what it waits for."""

    def __init__(
        self,
        endpoint: str,
        open_socket: Callable[[], Socket],
        *,
        probe_delay: float = PROBE_DELAY,
        announce: bool = False,
        verbose: bool = False,
    ) -> None:
        """Prepare to connect what ``open_socket`` opens; ``update()`` connects it.

        ``probe_delay``: seconds before the first probe of what stands in the way. ``announce``: say when the peer is
        ready for the first time. ``verbose``: say so each time, and when it is lost.
        """
        self.endpoint = endpoint
        self.link = Link(open_socket())
        self.was_ready = False  # in this run
        self._open_socket = open_socket
        self._probe_delay = probe_delay
        self._announce = announce
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
            if self._verbose and self.link.ready:
                notify(f"connection to {self.endpoint} lost")
            self.renew()
        if not self.link.ready:
            self._approach(now)
        if self.link.ready:
            self._next_update = now + UPDATE_INTERVAL
        return self.link.ready

    def _approach(self, now: float) -> None:
        """Take each step towards a ready peer that is due."""
        link = self.link
        if not self._wait:
            wanted = ("REP", "ROUTER") if link.socket.type == zmq.REQ else ("DEALER", "REQ")
            probe = partial(
                diagnose, self.endpoint, wanted, curve=link.uses_curve, was_ready=self.was_ready
            )
            self._wait = Wait(self.endpoint, probe, self._probe_delay, now)
        wait = self._wait
        if not link.begun and now >= self._next_connect and (address := wait.next_address()):
            self._next_connect = now + CONNECT_INTERVAL
            link.connect(address, limit=CONNECT_LIMIT if address != self.endpoint else 0)
        wait.probe(now)
        # libzmq reports no handshake of an old peer. What is found at an earlier one says nothing about this one.
        if link.handshake_done or link.connected_at < wait.old_peer_probed_at:
            if self._verbose or wait.notice or (self._announce and not self.was_ready):
                notify(f"connected to {self.endpoint}")
            link.ready = self.was_ready = True
            self._wait = None
        else:
            wait.report(now)

    @property
    def trouble(self) -> Finding:
        """Why the peer is not ready."""
        return self._wait.trouble if self._wait else NO_ANSWER

    def pause(self, now: float) -> float:
        """Return the seconds until ``update()`` is due without an event: more the longer the wait has been."""
        return min(max((now - self._wait.since) / 10, 0.002), 0.3) if self._wait else math.inf

    def renew(self) -> None:
        """Start again with a new link. A request that lies in the old one is not sent any more."""
        link = self.link
        if wait := self._wait:
            wait.handshake_trouble = link.handshake_trouble or wait.handshake_trouble
            if wait.addresses and link.ended and link.connected_at == math.inf:
                self._next_connect = (
                    0  # an address that does not accept connections holds up none of the others
                )
        link.close()
        self.link = Link(self._open_socket())
        self._next_update = 0

    def close(self) -> None:
        """Close the socket."""
        self.link.close()


class Wait:
    """A wait for a peer: since when, what stands in the way, and what the user was told of it."""

    def __init__(
        self, endpoint: str, diagnose: Callable[[], Iterator[Finding]], delay: float, now: float
    ) -> None:
        """Begin at ``now`` to wait for ``endpoint``. Probes run ``diagnose``, the first after ``delay`` seconds."""
        self.since = now
        self.addresses: list[str] = []  # those that are still to be tried
        self.handshake_trouble: Finding | None = None  # how the last handshake has failed
        self.old_peer_probed_at = (
            -math.inf
        )  # when the probe began that has found a usable peer of ZMTP 1 or 2
        self.notice = ""  # the last one
        self._endpoint = endpoint
        self._diagnose = diagnose
        self._delay = delay
        self._resolutions = resolve_repeatedly(endpoint)
        self._probe: Background | None = None
        self._finding: Finding | None = None

    def next_address(self) -> str | None:
        """Return the endpoint, its address in numbers, to connect to next; None while the name is resolved."""
        self.addresses = self.addresses or next(self._resolutions)
        return self.addresses.pop(0) if self.addresses else None

    def probe(self, now: float) -> None:
        """Note what was found, on the way only if the probe is held up there; begin another probe if that is due."""
        probe = self._probe
        if probe and now >= min(probe.ended, probe.began + self._delay):
            self._finding = probe.latest
            if probe.latest == OLD_PEER:
                self.old_peer_probed_at = probe.began
        if now >= (probe.ended + PROBE_INTERVAL if probe else self.since + self._delay):
            self._probe = Background(self._diagnose())

    @property
    def trouble(self) -> Finding:
        """Why the peer is not ready: as the peer or the system says, or else as the last handshake has failed."""
        if self._finding and self._finding.reason:
            return self._finding
        return self.handshake_trouble or (UNFINISHED if self._finding else NO_ANSWER)

    def report(self, now: float) -> None:
        """Tell the user of a wait that lasts, and again when the reason is another one."""
        trouble = self.trouble
        notice = f"waiting for {self._endpoint}: {trouble.reason}"
        # The handshake of a server that has just come is about to end.
        too_early = trouble is UNFINISHED and self._probe and now < self._probe.ended + PROBE_DELAY
        if (
            self._finding
            and now - self.since >= NOTICE_DELAY
            and notice != self.notice
            and not too_early
        ):
            notify(notice)
            self.notice = notice


def resolve_repeatedly(endpoint: str) -> Iterator[list[str]]:
    """Yield the endpoints, with addresses in numbers, that ``endpoint`` stands for; none while its name is resolved."""
    # libzmq would resolve a name on the thread that does everything else, and try only the first address.
    while not is_named(endpoint):
        yield [endpoint]
    while True:
        resolver = Background(resolve_numeric(endpoint))
        while resolver.ended == math.inf:
            yield []
        while not resolver.latest and time.monotonic() < resolver.ended + RESOLVE_INTERVAL:
            yield []
        yield resolver.latest or []


_names = (f"inproc://zmqmsg.monitor.{number}" for number in count())


class Link:
    """A socket that connects once, and all that libzmq reports of that connection.

    As libzmq never connects it again, what was sent over it cannot be sent a second time behind our back.
    """

    def __init__(self, socket: Socket) -> None:
        """Watch ``socket``, which is not connected yet; raise Failure, and close it, if there are too many sockets."""
        self.socket = socket
        self.uses_curve = socket.mechanism == zmq.CURVE
        self.begun = False  # whether it was told to connect
        self.connected_at = math.inf  # when a TCP connection was made, by time.monotonic()
        self.ready = False  # whether requests may be sent, as the Peer has found out
        self._events = 0  # all that have happened
        self._zap_status = 0  # why the peer has refused us
        try:
            self.monitor = open_monitor(socket, next(_names), CONNECTED | HANDSHAKE_DONE | ENDED)
        except Failure:
            socket.close()
            raise

    @property
    def handshake_done(self) -> bool:
        """Whether libzmq has reported that the handshake is done."""
        return self._events & HANDSHAKE_DONE != 0

    @property
    def ended(self) -> bool:
        """Whether the connection has ended, or could not be made."""
        return self._events & ENDED != 0

    @property
    def handshake_trouble(self) -> Finding | None:
        """How the handshake has failed, if it has."""
        if self._zap_status:
            return NOT_REFUSED_FOR_GOOD.get(
                self._zap_status, KEY_NOT_KNOWN if self.uses_curve else NOT_LET_IN
            )
        if self.ended and self.connected_at < math.inf and not self.handshake_done:
            return CURVE_FAILING if self.uses_curve else HANDSHAKE_FAILING
        return None

    def connect(self, endpoint: str, *, limit: float) -> None:
        """Connect to ``endpoint``, whose address is in numbers; ``limit``: seconds to accept the connection, 0: any."""
        self.begun = True
        self.socket.connect_timeout = round(limit * 1000)
        connect(self.socket, endpoint)
        if endpoint.startswith("inproc://"):  # which raises no events
            self._events = HANDSHAKE_DONE

    def read_events(self) -> None:
        """Collect the events that libzmq has reported. What follows from them is up to the caller."""
        while cast(int, self.monitor.get(zmq.EVENTS)) & POLLIN:
            # As zmq.utils.monitor does, which imports asyncio: 40 ms.
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self._events |= event
            if event == CONNECTED:
                self.connected_at = time.monotonic()
            elif event == HANDSHAKE_REFUSED:
                self._zap_status = value

    def was_rejected(self) -> bool:
        """Return whether our side has ended the connection because of what came over it."""
        # If the peer has, libzmq says that it would connect again, or after a flipped bit that the handshake failed.
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
        self.socket.close(None if self.connected_at < math.inf and not self.ended else 0)
        self.monitor.close()


# All peers of a command


def wait(peers: Sequence[Peer], sources: Sequence[Any], until: float) -> None:
    """Wait until one of ``peers`` or ``sources`` (sockets) has something to say, or ``until``; a second at most."""
    now = time.monotonic()
    pause = min([until - now, 1, *(peer.pause(now) for peer in peers)])
    items = [*sources, *(peer.link.monitor for peer in peers)]
    zmq.zmq_poll([(item, zmq.POLLIN) for item in items], max(math.ceil(pause * 1000), 0))


def fail_without_hope(peers: Sequence[Peer]) -> None:
    """Raise Failure, with the reasons, if none of ``peers`` can ever be ready. One that was ready may come back."""
    if all(peer.trouble.hopeless and not peer.was_ready for peer in peers):
        raise Failure("; ".join(f"{peer.endpoint}: {peer.trouble.reason}" for peer in peers))
