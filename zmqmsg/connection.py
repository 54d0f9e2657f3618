"""An endpoint that is connected to again and again: whether its peer is ready, and why not.

A ``Link`` is one socket with one TCP connection, and what libzmq reports of it. A ``Peer`` makes
one link after the other until one is ready. A ``Prober`` asks meanwhile why none is.
"""

import math
import struct
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import chain, count, repeat
from typing import Any, TypeVar, cast

import zmq

from zmqmsg.background import Background
from zmqmsg.diagnosis import USABLE_OLD_PEER, Expected, Finding, diagnose
from zmqmsg.names import is_named, resolve_to_endpoints
from zmqmsg.notices import NOTICE_DELAY, REPEAT_INTERVAL, Failure, notify
from zmqmsg.sockets import Socket, connect, open_monitor

# Times, in seconds
# How long an address has to accept a connection: in the first pass over all addresses, the second,
# and all others. Short limits soon reach the next address, and the same one after an outage: the
# system repeats its first packet ever more rarely. Long ones reach a peer that is far away.
CONNECT_LIMITS = (1.0, 3.0, 5.0)
CONNECT_INTERVAL = 0.3  # at least, from the start of one pass to that of the next
RESOLVE_INTERVAL = 1.0  # after a name could not be resolved, until it is tried again
PROBE_DELAY = 0.5  # without a ready peer before the first probe
PROBE_INTERVAL = 1.0  # from the end of a probe to the next one
RETRY_DELAY = 0.1  # in which libzmq says that it would connect again, if the peer hung up
# From one look at the monitor of a ready peer to the next: a look before each request would cost
# 10 % of the throughput. A request that is sent into a connection which ended in between counts as
# one that was sent.
UPDATE_INTERVAL = 0.001
# The longest sleeps before an update: while a peer is not ready, and otherwise.
MIN_PAUSE, MAX_PAUSE = 0.002, 0.3
MAX_WAIT = 1.0

POLLIN = int(zmq.POLLIN)  # arithmetic with the enum itself is slow

# Events of a socket's monitor
CONNECTED = int(zmq.EVENT_CONNECTED)
HANDSHAKE_DONE = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
HANDSHAKE_FAILED = REFUSED | int(
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
CONNECT_RETRIED = int(zmq.EVENT_CONNECT_RETRIED)
ENDED = HANDSHAKE_FAILED | CONNECT_RETRIED | int(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)

NO_ANSWER = Finding("no answer yet")
CONNECTING = Finding("connecting takes long")
UNFINISHED = Finding(
    "the ZeroMQ handshake is not finished yet; the server is slow, or cannot check clients just now"
)
HANDSHAKE_FAILING = Finding("connected, but the ZeroMQ handshake fails")
CURVE_FAILING = Finding(
    "CURVE handshake failing; check --server-key, or the server cannot check clients just now"
)
NOT_LET_IN = Finding("it refused: the server does not let us in", hopeless=True)
KEY_NOT_KNOWN = Finding("it refused: the server does not know this key", hopeless=True)
# Statuses of ZAP, ZeroMQ's authentication protocol (RFC 27): a temporary error, an internal one.
NOT_REFUSED_FOR_GOOD = {
    300: Finding("it refused for now: the server could not check who we are"),
    500: Finding("it refused: the server failed to check who we are"),
}

T = TypeVar("T")
# A generator of this type does what it can, and yields when nothing more can be done now. What was
# read before a yield, such as the time or the current link, may be out of date after it.
Steps = Generator[None, None, T]


class Peer:
    """An endpoint that is connected to again and again. It tells the user what it waits for."""

    ready: bool  # whether requests may be sent over the link
    finding: Finding  # why not
    _last_notice: str
    _prober: "Prober"
    _tries: Iterator[None]

    def __init__(
        self,
        endpoint: str,
        open_socket: Callable[[], Socket],
        *,
        probe_delay: float = PROBE_DELAY,
        announce: bool = False,
        verbose: bool = False,
        brief: bool = False,
    ) -> None:
        """Prepare to connect what ``open_socket`` opens; ``update()`` connects it.

        ``probe_delay``: seconds before the first probe. ``announce``: say when the peer is ready
        for the first time. ``verbose``: say so each time, and when it is lost. ``brief``: do not
        say what is waited for.
        """
        self.endpoint = endpoint
        self.link = Link(open_socket())
        self.was_ready = False  # in this run
        self._open_socket = open_socket
        self._probe_delay = probe_delay
        self._announce = announce
        self._verbose = verbose
        self._brief = brief
        self._next_update = 0.0
        self._handshake_finding: Finding | None = None  # how the last handshake failed
        self._begin_wait(first_try_at=0.0)

    def update(self) -> bool:
        """Act upon what has happened: connect, probe, notify. Return whether the peer is ready."""
        now = time.monotonic()
        if self.ready and now < self._next_update:
            return True
        self._next_update = now + UPDATE_INTERVAL
        self.link.read_events()
        if self.ready and self.link.ended:
            if self._verbose:
                notify(f"connection to {self.endpoint} lost")
            self.renew()
        if not self.ready:
            next(self._tries)
            self._prober.update(now)
            if self._has_become_ready():
                self._announce_ready()
                self.ready = self.was_ready = True
            else:
                self._judge(now)
        return self.ready

    def renew(self) -> None:
        """Start again with a new link.

        A link connects once. To renew it takes back a request that lies in the old one.
        """
        old = self.link
        old.close()
        self.link = Link(self._open_socket())
        self._handshake_finding = old.handshake_finding or self._handshake_finding
        if self.ready:
            self._begin_wait(old.connected_at + CONNECT_INTERVAL)

    def tell(self, now: float) -> None:
        """Tell the user of a wait that lasts, and again when the reason is another one.

        Reasons that alternate, as those of several addresses, are told once a minute.
        """
        if self.ready or self._brief or self.finding == NO_ANSWER:
            return
        if now < self._waiting_since + NOTICE_DELAY:
            return
        # A server that has just come needs a moment.
        if self.finding == self._judge_link() and now < self._found_at + PROBE_DELAY:
            return
        notice = f"waiting for {self.endpoint}: {self.finding.reason}"
        if notice == self._last_notice:
            return
        if now >= self._given_at.get(notice, -math.inf) + REPEAT_INTERVAL:
            notify(notice)
            self._given_at[notice] = now
            self._last_notice = notice

    def pause(self, now: float) -> float:
        """Return the seconds until ``update()`` is due without an event.

        They are more the longer the wait has been.
        """
        if self.ready:
            return math.inf
        waited = now - self._waiting_since
        return min(max(waited / 10, MIN_PAUSE), MAX_PAUSE)

    def close(self) -> None:
        """Close the socket."""
        self.link.close()

    # One wait for the peer

    def _begin_wait(self, first_try_at: float) -> None:
        """Set all that belongs to one wait; nothing else of an earlier wait is left."""
        wanted = ("REP", "ROUTER") if self.link.socket.type == zmq.REQ else ("DEALER", "REQ")
        expected = Expected(wanted, self.link.uses_curve, self.was_ready)
        self.ready = False
        self.finding = NO_ANSWER
        self._waiting_since = self._found_at = time.monotonic()
        self._handshake_finding = None
        self._last_notice = ""
        self._given_at: dict[str, float] = {}  # notices, by time.monotonic()
        self._address = self.endpoint  # in numbers, that is being connected to
        self._prober = Prober(partial(diagnose, self.endpoint, expected), self._probe_delay)
        self._tries = self._try_addresses(first_try_at)

    def _try_addresses(self, start: float) -> Steps[None]:
        """Connect to one address after the other, each as soon as the last connection has ended.

        Failure, which ends this generator, is fatal.
        """
        for limit in chain(CONNECT_LIMITS, repeat(CONNECT_LIMITS[-1])):
            yield from pause_until(start)
            start = time.monotonic() + CONNECT_INTERVAL
            for address in (yield from self._resolve()):
                link = self.link
                self._address = address
                link.connect(address, limit)
                while link is self.link and not link.ended:
                    yield
                if link is self.link:  # otherwise it was renewed from outside
                    self.renew()

    def _resolve(self) -> Steps[list[str]]:
        """Return the endpoints, with addresses in numbers, that the endpoint stands for."""
        # libzmq would resolve a name on the thread that does everything else, and try only the
        # first address.
        while is_named(self.endpoint):
            resolver = Background(resolve_to_endpoints(self.endpoint))
            while not resolver.is_over():
                yield
            if resolver.latest:
                return cast(list[str], resolver.latest)
            yield from pause_until(resolver.ended_at + RESOLVE_INTERVAL)
        return [self.endpoint]

    def _has_become_ready(self) -> bool:
        # libzmq reports no handshake of ZMTP 1 and 2: then the peer is ready if a probe that began
        # after this connection was made has found such a peer.
        found_old_peer = self.link.connected_at < self._prober.old_peer_probed_at
        return self.link.handshake_done or found_old_peer

    def _announce_ready(self) -> None:
        is_first = self._announce and not self.was_ready
        if self._verbose or self._last_notice or is_first:
            notify(f"connected to {self.endpoint}")

    def _judge(self, now: float) -> None:
        """Find out why the peer is not ready: ask first the prober, then the link."""
        probed = self._prober.finding
        if probed and probed.reason:
            finding = probed
        elif self._handshake_finding:
            finding = self._handshake_finding
        else:
            finding = self._judge_link() if probed else NO_ANSWER
        if finding != self.finding:
            self.finding = finding
            self._found_at = now

    def _judge_link(self) -> Finding:
        if self.link.connected_at < math.inf:
            return UNFINISHED
        if self._address == self.endpoint:
            return CONNECTING
        return Finding(f"connecting to {self._address} takes long")


class Prober:
    """Asks again and again, one probe at a time, what stands in the way at an endpoint."""

    def __init__(self, diagnose: Callable[[], Iterator[Finding]], delay: float) -> None:
        """``delay``: seconds before the first probe, and before what it has found by then counts.

        ``diagnose``: begins a probe, which yields what it finds.
        """
        self.finding: Finding | None = None  # the last one that counts
        self.old_peer_probed_at = -math.inf  # when the probe began that found a USABLE_OLD_PEER
        self._diagnose = diagnose
        self._delay = delay
        self._next_probe_at = time.monotonic() + delay
        self._probe: Background | None = None

    def update(self, now: float) -> None:
        """Note what the probe has found, or begin one if that is due."""
        if not self._probe:
            if now >= self._next_probe_at:
                self._probe = Background(self._diagnose())
            return
        is_over = self._probe.is_over()  # first: what it has found is final only then
        if is_over or now >= self._probe.began_at + self._delay:
            self.finding = self._probe.latest
        if is_over:
            if self.finding == USABLE_OLD_PEER:
                self.old_peer_probed_at = self._probe.began_at
            self._next_probe_at = self._probe.ended_at + PROBE_INTERVAL
            self._probe = None


def pause_until(end: float) -> Steps[None]:
    """Do nothing until ``end``, by time.monotonic()."""
    while time.monotonic() < end:
        yield


_monitor_addresses = (f"inproc://zmqmsg.monitor.{number}" for number in count())


class Link:
    """A socket that connects once, and all that libzmq reports of that connection.

    As libzmq never connects it again, what was sent over it cannot be sent a second time behind our
    back.
    """

    def __init__(self, socket: Socket) -> None:
        """Watch ``socket``, which is not connected yet.

        Raises Failure, and closes it, if there are too many sockets.
        """
        self.socket = socket
        self.uses_curve = socket.mechanism == zmq.CURVE
        self.connected_at = math.inf  # when a TCP connection was made, by time.monotonic()
        self._events = 0  # all that have happened
        self._zap_status = 0  # why the server has refused us
        try:
            self.monitor = open_monitor(
                socket, next(_monitor_addresses), CONNECTED | HANDSHAKE_DONE | ENDED
            )
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
    def handshake_finding(self) -> Finding | None:
        """How the handshake has failed, if it has."""
        if self._zap_status:
            refused = KEY_NOT_KNOWN if self.uses_curve else NOT_LET_IN
            return NOT_REFUSED_FOR_GOOD.get(self._zap_status, refused)
        if self.ended and self.connected_at < math.inf and not self.handshake_done:
            return CURVE_FAILING if self.uses_curve else HANDSHAKE_FAILING
        return None

    def connect(self, endpoint: str, limit: float) -> None:
        """Connect to ``endpoint``, whose address is in numbers and has ``limit`` seconds to accept.

        Raises Failure.
        """
        self.socket.connect_timeout = round(limit * 1000)
        connect(self.socket, endpoint)

    def read_events(self) -> None:
        """Collect the events that libzmq has reported. What follows from them is the caller's."""
        while cast(int, self.monitor.get(zmq.EVENTS)) & POLLIN:
            # As zmq.utils.monitor does, which takes 40 ms to import, because of asyncio.
            event, value = struct.unpack("=HI", self.monitor.recv_multipart()[0])
            self._events |= event
            if event == CONNECTED:
                self.connected_at = time.monotonic()
            elif event == REFUSED:
                self._zap_status = value

    def wait_for_rejection(self) -> bool:
        """Return whether our side has ended the connection because of what came over it.

        Takes 0.1 s in that case, and less if the peer has ended it.
        """
        # If the peer has ended it, libzmq says that it would connect again, or, after a flipped
        # bit, that the handshake failed.
        end = time.monotonic() + RETRY_DELAY
        while not self._events & (CONNECT_RETRIED | HANDSHAKE_FAILED):
            seconds_left = end - time.monotonic()
            if seconds_left <= 0:
                return True
            self.monitor.poll(math.ceil(seconds_left * 1000))
            self.read_events()
        return False

    def close(self) -> None:
        """Close the socket. What is not sent yet keeps its linger if there is a connection."""
        if self.socket.closed:
            return
        self.read_events()
        # First; otherwise libzmq's I/O thread waits for ever to send an event of the closing to a
        # monitor that is gone.
        self.socket.disable_monitor()
        is_connected = self.connected_at < math.inf and not self.ended
        self.socket.close(None if is_connected else 0)
        self.monitor.close()


# All peers of a command


def poll(peers: Sequence[Peer], sources: Sequence[Any], until: float) -> None:
    """Wait until one of ``peers`` or ``sources`` has something to say, or ``until``.

    Tells the user of peers that have been waited for long enough. ``sources``: sockets that may be readable, and numbers of descriptors whose reader may go. Waits
    a second at most.
    """
    now = time.monotonic()
    for peer in peers:
        peer.tell(now)
    seconds = min([until - now, MAX_WAIT, *(peer.pause(now) for peer in peers)])
    sockets = [*sources, *(peer.link.monitor for peer in peers)]
    items = [(each, zmq.POLLERR if isinstance(each, int) else zmq.POLLIN) for each in sockets]
    zmq.zmq_poll(items, max(math.ceil(seconds * 1000), 0))


def fail_if_hopeless(peers: Sequence[Peer]) -> None:
    """Raise Failure, with the reasons, if none of ``peers`` can ever be ready.

    One that was ready may come back.
    """
    if all(peer.finding.hopeless and not peer.was_ready for peer in peers):
        raise Failure("; ".join(f"{peer.endpoint}: {peer.finding.reason}" for peer in peers))
