"""``zmqmsg send``: Lazy Pirate (ZeroMQ Guide, chapter 4), with one REQ socket for each endpoint."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import NamedTuple

import click
import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.connection import PROBE_DELAY, Peer, fail_without_hope, wait
from zmqmsg.console import NOTICE_DELAY, Failure, Form, Output, notify, read_messages
from zmqmsg.quoting import abridge, count_of, describe
from zmqmsg.sockets import open_socket, receive, send, share_context
from zmqmsg.system import yield_processor

# Looks for a reply before going to sleep, which takes longer than a fast reply: they save 40 % of a round trip.
SPINS = 50
OVERSLEPT = 0.1  # seconds past a deadline that tell that the process was stopped; and then to wait for what has come
DO_NOT_WAIT = int(zmq.NOBLOCK)  # arithmetic with the enum itself is slow


def run(
    *,
    connect: tuple[str, ...],
    timeout: float | None,
    retries: int,
    file: tuple[str, ...],
    multipart: bool,
    verbose: bool,
    form: Form,
    max_size: int,
    key: str | None,
    server_key: str | None,
    message: tuple[str, ...],
) -> None:
    """Send each message and print its reply; the options are those of the command. Raises Failure."""
    arguments = [form.decode_argument(argument) for argument in message]
    for argument in message if not connect else ():
        if argument.startswith(("tcp://", "ipc://")):
            notify(f"'{argument}' is sent as a message; to connect there, use --connect", "yellow")
    apply_keys = None
    if key and not server_key:
        raise click.UsageError("--key needs --server-key: the public key file of the server")
    if server_key:
        from zmqmsg.curve import load_keys  # 5 ms, for CURVE alone

        _, apply_keys = load_keys(key, server_key)
    open_req = partial(
        open_socket, share_context(), zmq.REQ, max_size=max_size, apply_keys=apply_keys
    )
    probe_delay = min(
        PROBE_DELAY, (timeout or math.inf) / 4
    )  # so that an attempt ends with what was found
    new_peer = partial(Peer, open_socket=open_req, probe_delay=probe_delay, verbose=verbose)
    output = Output(form)
    with ExitStack() as stack:
        peers = [
            stack.enter_context(closing(new_peer(endpoint)))
            for endpoint in connect or (DEFAULT_ENDPOINT,)
        ]
        client = Client(peers, timeout=timeout or math.inf, retries=retries)
        messages = stack.enter_context(closing(read_messages(arguments, file, form)))
        times = Times()
        stack.callback(times.summarize)
        reply = None
        for frames in [join_frames(messages)] if multipart else messages:
            reply = client.ask(frames)
            output.write(reply.frames)
            if verbose:
                times.add(reply)
        if reply is None:
            notify("nothing to send: there is no MESSAGE, and standard input is empty", "yellow")


def join_frames(messages: Iterable[list[bytes]]) -> list[bytes]:
    """Return the frames of all ``messages`` as one message; raise UsageError if there are none."""
    frames = [frame for message in messages for frame in message]
    if not frames:
        raise click.UsageError("--multipart needs at least one message")
    return frames


class Reply(NamedTuple):
    """The frames of a reply, the endpoint that it came from, and the seconds from sending the request to it."""

    frames: list[zmq.Frame]
    endpoint: str
    seconds: float


class Times:
    """What --verbose says of replies: a line for each, and a summary at the end, like that of ping."""

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
        """Notify the user of the number of replies and of the times, if there were several."""
        if self._count > 1:
            average = self._sum / self._count
            notify(
                f"{self._count} replies, min/avg/max {self._min:.2f}/{average:.2f}/{self._max:.2f} ms"
            )


class NoReply(Failure):
    """No reply came, but the request may have been served."""

    exit_code = 3


class AttemptEnded(Exception):
    """An attempt brought no reply. ``hint``: what that may mean. ``final``: whether another attempt cannot succeed."""

    def __init__(self, why: str, hint: str = "", *, final: bool = False) -> None:
        super().__init__(why)
        self.hint = hint
        self.final = final


CRASHED = "the request may have crashed the server"
UNANSWERED = "the server may be slow or hung, or ignores requests of this form"
REJECTED = "it lacks the empty frame of REQ/REP before its body, or a frame exceeds --max-size"


class Client:
    """Sends requests and waits for their replies, over the connections to all peers that are ready, round-robin.

    Lazy Pirate polls with a limit, closes the confused socket, opens a new one and sends again, N times at most. Here
    an attempt also ends as soon as the connection does, so that a server that died is noticed without any limit. Only
    a ``timeout`` helps where a malformed request has made a REP socket drop its next reply, ours (libzmq's rep.cpp).
    """

    def __init__(
        self, peers: Iterable[Peer], *, timeout: float = math.inf, retries: int = 3
    ) -> None:
        """``timeout``: seconds for an attempt, from name resolution to reply. ``retries``: further ones per request."""
        self._peers = list(peers)  # the one that was used last is the last one
        self._timeout = timeout
        self._retries = retries
        self._sent = False  # whether a server may have received the current request

    def ask(self, frames: Sequence[bytes]) -> Reply:
        """Send ``frames`` as one request and return the reply; raise NoReply, or Failure if no server can have it."""
        started = time.monotonic()
        self._sent = False
        hint = ""
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(frames, time.monotonic() + self._timeout)
            except AttemptEnded as ended:
                # A lost connection says more about the request than a later failure.
                hint = hint if hint == CRASHED else ended.hint or ("" if ended.final else hint)
                # If no server was ever there, another attempt would not find one either.
                in_vain = not any(peer.was_ready for peer in self._peers)
                if ended.final or in_vain or attempt > self._retries:
                    tries = f"({count_of(attempt, 'attempt')}, {time.monotonic() - started:.1f} s)"
                    text = (
                        f"no reply to {abridge(frames[0])} {tries}: {ended}"
                        if self._sent
                        else f"{ended} {tries}"
                    )
                    raise self._error(f"{text}; {hint}" if hint else text) from None
                notify(f"{ended}; retrying ({attempt} of {self._retries})")
            except (Failure, MemoryError) as error:
                raise self._error(str(error) or "out of memory") from None

    def _error(self, text: str) -> Failure:
        return NoReply(text) if self._sent else Failure(text)

    def _attempt(self, frames: Sequence[bytes], deadline: float) -> Reply:
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
            if not (reply := receive_reply(peer, deadline)):
                raise AttemptEnded(
                    f"no reply from {peer.endpoint} within {self._timeout:g} s", UNANSWERED
                )
        except AttemptEnded:
            peer.renew()  # that takes the request back, and whatever comes late
            raise
        return Reply(reply, peer.endpoint, time.perf_counter() - started)

    def _wait_for_peer(self, deadline: float) -> Peer:
        """Return the peer that has not been asked for longest among those that are ready; wait for one."""
        while True:
            if ready := [peer for peer in self._peers if peer.update()]:
                self._peers.remove(ready[0])
                self._peers.append(ready[0])
                return ready[0]
            fail_without_hope(self._peers)
            now = time.monotonic()
            deadline = allow_for_sleep(deadline, now)
            if now >= deadline:
                endpoints = ", ".join(peer.endpoint for peer in self._peers)
                why = "; ".join(dict.fromkeys(peer.trouble.reason for peer in self._peers))
                for peer in self._peers:
                    if peer.link.connected_at < math.inf:  # and stuck in its handshake
                        peer.renew()
                raise AttemptEnded(f"no server at {endpoints} within {self._timeout:g} s: {why}")
            wait(self._peers, [], deadline)


def receive_reply(peer: Peer, deadline: float) -> list[zmq.Frame]:
    """Return the frames of the reply to what was just sent, none at ``deadline``; raise AttemptEnded if it is lost."""
    link = peer.link
    for _ in range(SPINS):
        yield_processor()
        if reply := receive(link.socket):
            return reply
    notice_at = time.monotonic() + NOTICE_DELAY
    while True:
        wait([peer], [link.socket], min(deadline, notice_at))
        link.read_events()
        ended = (
            link.ended
        )  # before the look into the socket: a reply may have come just before the end
        if reply := receive(link.socket):
            return reply
        if ended and link.was_rejected():
            raise AttemptEnded(
                f"the reply from {peer.endpoint} was rejected: {REJECTED}", final=True
            )
        if ended:
            raise AttemptEnded(f"connection to {peer.endpoint} lost", CRASHED)
        now = time.monotonic()
        deadline = allow_for_sleep(deadline, now)
        if now >= deadline:
            return []
        if now >= notice_at:
            notify(f"waiting for a reply from {peer.endpoint}")
            notice_at = math.inf


def allow_for_sleep(deadline: float, now: float) -> float:
    """Return ``deadline``, or a later one if the process was stopped: libzmq's thread has not run either."""
    return now + OVERSLEPT if now >= deadline + OVERSLEPT else deadline
