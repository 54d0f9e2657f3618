"""``zmqmsg send``: Lazy Pirate (ZeroMQ Guide, chapter 4), with one REQ socket per endpoint."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import NamedTuple

import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.keys import Keys
from zmqmsg.messages import Form
from zmqmsg.notices import NOTICE_DELAY, Failure, notify
from zmqmsg.output import Output, reader_gone
from zmqmsg.peer import Peer, poll, update_all
from zmqmsg.prober import PROBE_DELAY
from zmqmsg.quoting import abridge, count_of, describe
from zmqmsg.sockets import open_socket, receive, send, share_context
from zmqmsg.source import Source
from zmqmsg.system import raise_descriptor_limit, yield_processor

# How often to look for a reply before going to sleep. To sleep takes longer than a fast reply: this
# saves 40 % of a round trip.
SPINS = 50
# Seconds; with such a timeout, the final error comes soon enough without notices of waiting.
BRIEF_TIMEOUT = 5.0
OVERSLEPT = 0.1  # seconds past a deadline that mean that the process was stopped meanwhile
MANY_ENDPOINTS = 10  # each takes four file descriptors or more
SMALL_FRAME = 512  # bytes; every server accepts frames of this size
# Connections that were lost after the same time, in seconds, within this tolerance
SAME_TIME = 1.0
LEAST_IDLE_LIMIT = 2.0  # seconds; shorter ones are no idle limits of proxies
DO_NOT_WAIT = int(zmq.NOBLOCK)  # arithmetic with the enum itself is slow


def run(
    *,
    connect: Sequence[str],
    source: Source,
    keys: Keys,
    form: Form,
    max_size: int,
    timeout: float,
    retries: int,
    verbose: bool,
) -> None:
    """Send each message and print its reply.

    ``connect``: endpoints; without any, the default endpoint. ``max_size``: bytes of a frame.
    ``timeout``: seconds for an attempt, or infinity. ``retries``: further attempts. ``verbose``:
    notify the user of connections and replies. Raises UsageError or Failure.
    """
    # Prepare
    keys.check_for_send()
    secure = keys.load().secure_client if keys.are_given() else None
    endpoints = connect or (DEFAULT_ENDPOINT,)
    if len(endpoints) > MANY_ENDPOINTS:
        raise_descriptor_limit()
    open_req = partial(open_socket, share_context(), zmq.REQ, max_size=max_size, secure=secure)
    is_brief = timeout <= BRIEF_TIMEOUT and not verbose
    new_peer = partial(
        Peer,
        open_socket=open_req,
        probe_delay=min(PROBE_DELAY, timeout / 4),  # so that an attempt ends with a finding
        verbose=verbose,
        brief=is_brief,
    )
    output = Output(form)
    times = Times()

    # Send
    count = 0
    with ExitStack() as stack:
        peers = [stack.enter_context(closing(new_peer(endpoint))) for endpoint in endpoints]
        client = Client(peers, output, timeout=timeout, retries=retries, brief=is_brief)
        messages = stack.enter_context(closing(source.read()))
        stack.callback(times.summarize)
        for frames in messages:
            reply = client.ask(frames)
            output.write(reply.frames)
            count += 1
            if verbose:
                times.add(reply)
    if count == 0:
        notify("nothing to send: there is no MESSAGE, and standard input is empty", "yellow")


class Reply(NamedTuple):
    """A reply: its frames, its endpoint, and the seconds from sending the request to it."""

    frames: list[zmq.Frame]
    endpoint: str
    seconds: float


class Times:
    """What --verbose says of replies: a line for each, and a summary at the end, like ping's."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._min, self._max = math.inf, 0.0

    def add(self, reply: Reply) -> None:
        """Notify the user of ``reply``, and count it."""
        milliseconds = reply.seconds * 1000
        self._count += 1
        self._sum += milliseconds
        self._min = min(self._min, milliseconds)
        self._max = max(self._max, milliseconds)
        notify(f"reply from {reply.endpoint}: {describe(reply.frames)}, {milliseconds:.2f} ms")

    def summarize(self) -> None:
        """Notify the user of the number of replies and their times, if there were several."""
        if self._count > 1:
            average = self._sum / self._count
            notify(
                f"{self._count} replies,"
                f" min/avg/max {self._min:.2f}/{average:.2f}/{self._max:.2f} ms"
            )


class NoReply(Failure):
    """No reply came, but the request may have been served."""

    exit_code = 3


class AttemptEnded(Exception):
    """An attempt brought no reply. The message says why."""

    explanation = ""  # what that may mean
    is_final = False  # whether another attempt cannot succeed


class NoServer(AttemptEnded):
    """Nobody was ready to receive the request in time."""


class TimedOut(AttemptEnded):
    """The request was sent, and no reply came in time."""

    explanation = "the server may be slow or hung, or ignores requests of this form"


class ConnectionLost(AttemptEnded):
    """The connection ended before the reply came."""

    explanation = "the request may have crashed the server"

    def __init__(self, text: str, seconds: float) -> None:
        """``seconds``: from the request to the end of the connection."""
        super().__init__(text)
        self.seconds = seconds


class ReplyRejected(AttemptEnded):
    """Our side did not accept the reply."""

    is_final = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(
            f"the reply from {endpoint} was rejected: it lacks the empty frame of REQ/REP before"
            " its body, or a frame exceeds --max-size"
        )


class Deadline:
    """When an attempt ends."""

    def __init__(self, seconds: float) -> None:
        """``seconds``: from now on; may be infinite."""
        self.at = time.monotonic() + seconds
        self._was_extended = False

    def has_expired(self) -> bool:
        """Return whether the attempt is to end now; extend it, once, after a suspension.

        A process that was stopped, or a computer that slept, finds the deadline long past. libzmq's
        thread has not run either, so it gets a moment more.
        """
        now = time.monotonic()
        was_suspended = now >= self.at + OVERSLEPT
        if was_suspended and not self._was_extended:
            self.at = now + OVERSLEPT
            self._was_extended = True
        return now >= self.at


class Client:
    """Sends requests and waits for their replies, over the connections to all ready peers in turn.

    Lazy Pirate polls with a limit, closes the confused socket, opens a new one and sends again, N
    times at most. Here an attempt also ends as soon as the connection does, so that a server that
    died is noticed without any limit. A REP socket that receives a malformed request from another
    client may drop its next reply, perhaps ours (libzmq's rep.cpp): only a ``timeout`` helps then.
    """

    def __init__(
        self,
        peers: Iterable[Peer],
        output: Output,
        *,
        timeout: float,
        retries: int,
        brief: bool,
    ) -> None:
        """``output``: where replies go. ``timeout``: seconds for an attempt, or infinity.

        ``retries``: further attempts for each request. ``brief``: do not say what is waited for.
        """
        self._peers = list(peers)  # in the order in which they are asked
        self._output = output
        self._timeout = timeout
        self._retries = retries
        self._brief = brief
        self._sent = False  # whether a server may have received the current request

    def ask(self, frames: Sequence[bytes]) -> Reply:
        """Send ``frames`` as one request and return the reply.

        Raises NoReply, Failure if no server can have received the request, or BrokenPipeError if
        nobody would read the reply.
        """
        started = time.monotonic()
        self._sent = False
        ends: list[AttemptEnded] = []
        while True:
            try:
                return self._attempt(frames, Deadline(self._timeout))
            except AttemptEnded as end:
                ends.append(end)
                if not self._may_retry(ends):
                    raise self._failure(frames, ends, time.monotonic() - started) from None
                notify(f"{end}; retrying ({len(ends)} of {self._retries})")
            except Failure as failure:  # for example, if no peer can ever be ready
                raise self._error(failure.message) from None
            except MemoryError:
                raise self._error("out of memory") from None

    def _may_retry(self, ends: Sequence[AttemptEnded]) -> bool:
        # If no server was ever there, another attempt would not find one either.
        was_anybody_there = any(peer.was_ready for peer in self._peers)
        return not ends[-1].is_final and was_anybody_there and len(ends) <= self._retries

    def _failure(
        self, frames: Sequence[bytes], ends: Sequence[AttemptEnded], seconds: float
    ) -> Failure:
        """Return what ends the command after attempts that all brought no reply."""
        cost = f"({count_of(len(ends), 'attempt')}, {seconds:.1f} s)"
        if self._sent:
            text = f"no reply to {abridge(frames[0])} {cost}: {ends[-1]}"
        else:
            text = f"{ends[-1]} {cost}"
        explanation = explain(frames, ends)
        return self._error(f"{text}; {explanation}" if explanation else text)

    def _error(self, text: str) -> Failure:
        return NoReply(text) if self._sent else Failure(text)

    def _attempt(self, frames: Sequence[bytes], deadline: Deadline) -> Reply:
        """Send ``frames`` once and return the reply; raise AttemptEnded."""
        while True:
            peer = self._wait_for_peer(deadline)
            started = time.perf_counter()  # monotonic() has steps of 15 ms on Windows
            try:
                send(peer.link.socket, frames, DO_NOT_WAIT)
                break
            except zmq.Again:  # the connection has just ended; nothing was sent
                peer.renew()
        self._sent = True
        try:
            reply = self._receive_reply(peer, deadline)
        except AttemptEnded:
            peer.renew()  # drops the request if it is still unsent, and any late reply
            raise
        return Reply(reply, peer.endpoint, time.perf_counter() - started)

    def _wait_for_peer(self, deadline: Deadline) -> Peer:
        """Return the ready peer that has not been asked for longest; wait for one."""
        while True:
            if self._output.is_abandoned():
                if self._sent:
                    raise NoReply("standard output is closed")
                raise reader_gone()  # ends silently, with status 1
            ready = update_all(self._peers, needed=True)
            if ready:
                chosen = ready[0]
                self._peers.remove(chosen)
                self._peers.append(chosen)
                return chosen
            if deadline.has_expired():
                endpoints = ", ".join(peer.endpoint for peer in self._peers)
                reasons = "; ".join(dict.fromkeys(peer.finding.reason for peer in self._peers))
                for peer in self._peers:
                    peer.renew()  # it may be stuck in its handshake
                raise NoServer(f"no server at {endpoints} within {self._timeout:g} s: {reasons}")
            poll(self._peers, self._output.descriptors, deadline.at)

    def _receive_reply(self, peer: Peer, deadline: Deadline) -> list[zmq.Frame]:
        """Return the frames of the reply to what was just sent; raise AttemptEnded."""
        link = peer.link
        for _ in range(SPINS):
            yield_processor()
            if reply := receive(link.socket):
                return reply
        sent_at = time.monotonic()
        notice_at = math.inf if self._brief else sent_at + NOTICE_DELAY
        while True:
            poll([peer], [link.socket, *self._output.descriptors], min(deadline.at, notice_at))
            link.read_events()
            had_ended = link.ended  # read first: a reply may have come just before the end
            if reply := receive(link.socket):
                return reply
            if had_ended:
                seconds = time.monotonic() - sent_at
                if link.was_ended_by_us():
                    raise ReplyRejected(peer.endpoint)
                raise ConnectionLost(f"connection to {peer.endpoint} lost", seconds)
            if deadline.has_expired():
                raise TimedOut(f"no reply from {peer.endpoint} within {self._timeout:g} s")
            if self._output.is_abandoned():
                raise self._error("standard output is closed")
            if time.monotonic() >= notice_at:
                notify(f"waiting for a reply from {peer.endpoint}")
                notice_at = math.inf


def explain(frames: Sequence[bytes], ends: Sequence[AttemptEnded]) -> str:
    """Return what it may mean that attempts to send ``frames`` ended like this, or nothing.

    The first that applies: a lost connection, which says most about the request; a rejected reply,
    whose text says all; or else the last attempt that has an explanation.
    """
    lost = [end for end in ends if isinstance(end, ConnectionLost)]
    if lost:
        return explain_losses(frames, lost, every_time=len(lost) == len(ends))
    if ends[-1].is_final:
        return ""
    explanations = [end.explanation for end in ends if end.explanation]
    return explanations[-1] if explanations else ""


def explain_losses(
    frames: Sequence[bytes], lost: Sequence[ConnectionLost], *, every_time: bool
) -> str:
    """Return what it may mean that connections were lost while a reply was waited for."""
    explanation = ConnectionLost.explanation
    largest = max(len(frame) for frame in frames)
    if largest > SMALL_FRAME:
        explanation += f", or its frame of {largest} bytes exceeds the server's --max-size"
    seconds = [loss.seconds for loss in lost]
    is_regular = max(seconds) - min(seconds) <= SAME_TIME and min(seconds) >= LEAST_IDLE_LIMIT
    if every_time and len(lost) > 1 and is_regular:
        explanation = (
            f"a proxy or tunnel on the way may end idle connections after {seconds[0]:.0f} s,"
            f" or {explanation}"
        )
    return explanation
