"""An endpoint that is connected to again and again: whether its peer is ready, and why not.

A ``Peer`` makes one ``Link`` after the other until one is ready, and has a ``Prober`` ask meanwhile
why none is.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeVar, cast

import zmq

from zmqmsg.background import Background
from zmqmsg.diagnosis import Expected, Finding, diagnose
from zmqmsg.link import Link
from zmqmsg.names import is_named, resolve_to_endpoints
from zmqmsg.notices import NOTICE_DELAY, REPEAT_INTERVAL, Failure, notify
from zmqmsg.prober import PROBE_DELAY, Prober
from zmqmsg.sockets import Socket

# Times, in seconds
# How long an address has to accept a connection: in the first pass over all addresses, the second,
# and all others. With short limits, the next address is soon tried, and so is the same one after an
# outage: the system itself repeats its first packet less and less often. Long ones reach far peers.
CONNECT_LIMITS = (1.0, 3.0, 5.0)
CONNECT_INTERVAL = 0.3  # at least, from the start of one pass to that of the next
RESOLVE_INTERVAL = 1.0  # after a name could not be resolved, until it is tried again
# A look at the monitor of a ready peer before each request would cost 10 % of the throughput, so
# there is one per interval. A request that is sent into a connection which ended since the last
# look counts as one that was sent.
UPDATE_INTERVAL = 0.001
SETTLE_DELAY = 0.5  # how long a passing state must last before it is reported
# How long a peer may take to greet. After that, it is probably hung, or not a ZeroMQ peer. The
# short time is for commands that say everything in one last line, which should say this, too.
GREETING_DELAY, BRIEF_GREETING_DELAY = 5.0, 0.2
MIN_PAUSE, MAX_PAUSE = 0.002, 0.3  # between updates while the peer is not ready
MAX_WAIT = 1.0  # of a poll

NO_ANSWER = Finding("no answer yet")
CONNECTING = Finding("connecting takes long", passing=True)
UNFINISHED = Finding(
    "the ZeroMQ handshake is not finished yet; the server is slow, or cannot check clients just"
    " now",
    passing=True,
)

T = TypeVar("T")
# A coroutine: it does what can be done now, and yields when it has to wait; next() resumes it. What
# was read before a yield, such as the time, may be out of date after it.
Steps = Generator[None, None, T]


class WaitNotices:
    """What the user is told of one wait for a peer.

    The same notice is given once a minute: the reasons of several addresses alternate.
    """

    def __init__(self, endpoint: str) -> None:
        self.last = ""  # empty as long as nothing was told
        self._endpoint = endpoint
        self._given_at: dict[str, float] = {}

    def give_reason(self, reason: str, now: float) -> None:
        """Say why the peer is waited for, unless that was the last thing that was said."""
        notice = f"waiting for {self._endpoint}: {reason}"
        if notice != self.last:
            self.give(notice, now)

    def give(self, notice: str, now: float) -> None:
        """Give ``notice``, unless it was given within the last minute."""
        if now >= self._given_at.get(notice, -math.inf) + REPEAT_INTERVAL:
            notify(notice)
            self._given_at[notice] = now
            self.last = notice


class Peer:
    """An endpoint that is connected to again and again. It tells the user what it waits for."""

    def __init__(
        self,
        endpoint: str,
        open_socket: Callable[[], Socket],
        *,
        probe_delay: float = PROBE_DELAY,
        announce: bool = False,
        verbose: bool = False,
        brief: bool = False,
        survives_shortage: bool = False,
    ) -> None:
        """Prepare to connect what ``open_socket`` opens; ``update()`` connects it.

        ``probe_delay``: seconds before the first probe. ``announce``: say when the peer is ready
        for the first time. ``verbose``: say so each time, and when it is lost. ``brief``: do not
        say what is waited for. ``survives_shortage``: try again if there are no descriptors for a
        new socket. Raises Failure.
        """
        self.endpoint = endpoint
        self.link = Link(open_socket())
        self.was_ready = False  # in this run
        self._open_socket = open_socket
        self._probe_delay = probe_delay
        self._announce = announce
        self._verbose = verbose
        self._brief = brief
        self._survives_shortage = survives_shortage
        self._next_update = 0.0
        self._begin_wait(first_try_at=0.0)

    def _begin_wait(self, first_try_at: float) -> None:
        """Set all that belongs to one wait for the peer; nothing of an earlier wait is left."""
        is_req = self.link.socket.type == zmq.REQ
        accepted_types = ("REP", "ROUTER") if is_req else ("DEALER", "REQ")
        patience = BRIEF_GREETING_DELAY if self._brief else GREETING_DELAY
        expected = Expected(accepted_types, self.link.uses_curve, self.was_ready, patience)
        self.ready = False  # whether requests may be sent over the link
        self.finding = NO_ANSWER  # why not
        self._found_at = time.monotonic()  # when that was found
        self._waiting_since = self._found_at
        self._handshake_finding: Finding | None = None  # how the last handshake failed
        self._notices = WaitNotices(self.endpoint)
        self._address = self.endpoint  # that is being connected to, with numbers for names
        self._prober = Prober(partial(diagnose, self.endpoint, expected), self._probe_delay)
        self._tries = self._try_addresses(first_try_at)

    def update(self) -> bool:
        """Act upon what has happened: connect, or probe. Return whether the peer is ready."""
        now = time.monotonic()
        if self.ready and now < self._next_update:
            return True
        self._next_update = now + UPDATE_INTERVAL
        self.link.read_events()
        if self.ready and self.link.ended:
            self.renew()
            if self._verbose and not self.ready:  # otherwise there was no socket for a new link yet
                notify(f"connection to {self.endpoint} lost")
        if not self.ready:
            self._approach(now)
        return self.ready

    def renew(self) -> None:
        """Replace the link by a new one, which is not connected yet: a link connects once.

        A request that libzmq has not sent yet is dropped with the old link, and so is a late reply.
        If the peer was ready, a new wait begins; otherwise the current one goes on. Raises Failure;
        a peer that survives shortages keeps its old link instead, and is to be renewed later.
        """
        old = self.link
        if not self._survives_shortage:
            old.close()  # first, as it drops a request
        try:
            self.link = Link(self._open_socket())
        except Failure as failure:
            if not self._survives_shortage:
                raise
            self._notices.give(f"{failure.message}; trying again", time.monotonic())
            return
        old.close()  # reads the last events, too
        if old.handshake_finding:
            self._handshake_finding = old.handshake_finding
        if self.ready:
            # At once, unless the old connection lasted less than CONNECT_INTERVAL.
            self._begin_wait(first_try_at=old.connected_at + CONNECT_INTERVAL)

    def tell(self, now: float) -> None:
        """Tell the user of a wait that lasts, and again when the reason is another one."""
        if self.ready or self._brief or self.finding == NO_ANSWER:
            return
        may_pass = self.finding.passing and now < self._found_at + SETTLE_DELAY
        if now >= self._waiting_since + NOTICE_DELAY and not may_pass:
            self._notices.give_reason(self.finding.reason, now)

    def pause(self, now: float) -> float:
        """Return the seconds until ``update()`` is due without an event.

        The pause grows with the wait.
        """
        if self.ready:
            return math.inf
        waited = now - self._waiting_since
        return min(max(waited / 10, MIN_PAUSE), MAX_PAUSE)

    def close(self) -> None:
        """Close the socket."""
        self.link.close()

    # Until the peer is ready

    def _approach(self, now: float) -> None:
        """Take the next steps that are due towards a ready peer."""
        next(self._tries)
        self._prober.update(now)
        if self._has_become_ready():
            is_first = not self.was_ready
            self.ready = self.was_ready = True
            self._announce_ready(is_first)
            return
        finding = self._judge()
        if finding != self.finding:
            self.finding = finding
            self._found_at = now

    def _try_addresses(self, start: float) -> Steps[None]:
        """Connect to one address after the other, each as soon as the last connection has ended.

        ``_approach`` resumes this generator. An exception in it, Failure, ends the program.
        """
        for limit in chain(CONNECT_LIMITS, repeat(CONNECT_LIMITS[-1])):
            yield from pause_until(start)
            start = time.monotonic() + CONNECT_INTERVAL
            addresses = yield from self._resolve()
            for address in addresses:
                yield from self._try_address(address, limit)

    def _try_address(self, address: str, limit: float) -> Steps[None]:
        """Connect the link to ``address``; return once that link has ended and been replaced.

        The client may replace it as well, when an attempt ends. The peer is not ready then, so that
        ``renew`` does not restart this generator.
        """
        self._address = address
        link = self.link
        link.connect(address, limit)
        while link is self.link:
            if link.ended:
                self.renew()
            if link is self.link:
                yield

    def _resolve(self) -> Steps[list[str]]:
        """Return the endpoints, with numeric addresses, that the endpoint stands for."""
        if not is_named(self.endpoint):
            return [self.endpoint]
        # libzmq would resolve a name on the thread that does everything else, and try only the
        # first address.
        while True:
            resolver = Background(resolve_to_endpoints(self.endpoint))
            while not resolver.is_over():
                yield
            if resolver.latest:
                return cast(list[str], resolver.latest)
            yield from pause_until(resolver.ended_at + RESOLVE_INTERVAL)

    def _has_become_ready(self) -> bool:
        # libzmq reports no handshake of ZMTP 1 and 2. Only a probe that began after this connection
        # was made says something about it.
        connected_at = self.link.connected_at
        return self.link.handshake_done or self._prober.has_found_old_peer_since(connected_at)

    def _announce_ready(self, is_first: bool) -> None:
        if self._verbose or self._notices.last or (self._announce and is_first):
            notify(f"connected to {self.endpoint}")

    def _judge(self) -> Finding:
        """Return why the peer is not ready.

        That is what the probe heard, or else how the last handshake failed, or else what the link
        is doing. Before any probe has a result, it is NO_ANSWER.
        """
        probed = self._prober.finding
        if probed and probed.reason:
            return probed
        if self._handshake_finding:
            return self._handshake_finding
        if not probed:
            return NO_ANSWER
        return self._judge_link()

    def _judge_link(self) -> Finding:
        """Return what the link waits for, if nothing is wrong with the peer."""
        if self.link.connected_at < math.inf:
            return UNFINISHED
        if self._address == self.endpoint:
            return CONNECTING
        return Finding(f"connecting to {self._address} takes long", passing=True)


def pause_until(end: float) -> Steps[None]:
    """Wait until ``end``, by time.monotonic()."""
    while time.monotonic() < end:
        yield


# All peers of a command


def update_all(peers: Sequence[Peer], *, needed: bool) -> list[Peer]:
    """Let all ``peers`` act upon what has happened; return those that are ready.

    Tells the user of those that have been waited for long enough. Raises Failure, with the
    reasons, if they are ``needed`` and none can ever be ready; one that was ready may come back.
    """
    ready = [peer for peer in peers if peer.update()]
    if needed and all(peer.finding.hopeless and not peer.was_ready for peer in peers):
        raise Failure("; ".join(f"{peer.endpoint}: {peer.finding.reason}" for peer in peers))
    if len(ready) < len(peers):
        now = time.monotonic()
        for peer in peers:
            peer.tell(now)
    return ready


def poll(peers: Sequence[Peer], sources: Sequence[Any], until: float) -> None:
    """Wait until one of ``peers`` or ``sources`` has something to say, or ``until``.

    ``sources``: sockets that may be readable, and numbers of descriptors whose reader may go. Waits
    a second at most.
    """
    now = time.monotonic()
    seconds = min([until - now, MAX_WAIT, *(peer.pause(now) for peer in peers)])
    sockets = [*sources, *(peer.link.monitor for peer in peers)]
    items = [(each, zmq.POLLERR if isinstance(each, int) else zmq.POLLIN) for each in sockets]
    zmq.zmq_poll(items, max(math.ceil(seconds * 1000), 0))
