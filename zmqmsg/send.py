"""``zmqmsg send``: Lazy Pirate (ZeroMQ Guide, chapter 4), with one REQ socket for each endpoint."""

import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import click
import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.console import Failure, Form, Output, notify, read_messages
from zmqmsg.monitor import NOTICE_DELAY, Connection, Connections
from zmqmsg.quoting import abridge, count_of, describe
from zmqmsg.sockets import HANDSHAKE_LIMIT, IO_THREADS, Context, Socket, open_socket, receive, send

SPINS = 50
"""Looks for a reply, yielding the processor before each, before going to sleep, which takes longer than a fast reply.
They save 40 % of a round trip, and 9 % on a single core."""

NOW = int(zmq.NOBLOCK)  # arithmetic with the enum itself is slow


def run(
    *,
    connect: tuple[str, ...],
    timeout: float | None,
    retries: int,
    file: tuple[str, ...],
    multipart: bool,
    verbose: bool,
    null: bool,
    quoted: bool,
    max_size: int,
    key: str | None,
    server_key: str | None,
    message: tuple[str, ...],
) -> None:
    """Send each message and print its reply; the options are those of the command. Raises Failure."""
    form = Form.choose(null=null, quoted=quoted)
    secure = None
    if key or server_key:
        from zmqmsg.curve import client_security  # 10 ms, for CURVE alone

        secure = client_security(key, server_key)
    endpoints = connect or (DEFAULT_ENDPOINT,)
    # The shared context, since pyzmq would terminate another one, and wait for an I/O thread that resolves a name.
    context: Context = zmq.Context.instance(min(1 + len(endpoints), IO_THREADS))
    limit = min(HANDSHAKE_LIMIT, 0.8 * (timeout or math.inf))  # a mute peer is known as one before the attempt ends
    open_req = partial(open_socket, context, zmq.REQ, max_size=max_size, handshake_limit=limit, secure=secure)
    output = Output(form)
    with ExitStack() as stack:
        connections = Connections(endpoints, open_req, verbose=verbose)
        stack.enter_context(closing(connections))
        client = Client(connections, timeout=timeout or math.inf, retries=retries)
        messages = stack.enter_context(closing(read_messages(message, file, form, connections.update)))
        times = Times()
        stack.callback(times.summarize)
        for frames in [_join(messages)] if multipart else messages:
            reply = client.ask(frames)
            output.write(reply.frames)
            if verbose:
                times.add(reply)


def _join(messages: Iterable[list[bytes]]) -> list[bytes]:
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
            notify(f"{self._count} replies, min/avg/max {self._min:.2f}/{average:.2f}/{self._max:.2f} ms")


class NoReply(Failure):
    """No reply came, but the request may have been served."""

    exit_code = 3


class AttemptFailed(Exception):
    """An attempt failed; another may succeed. ``sent``: whether the request may have reached a server."""

    def __init__(self, why: str, hint: str, *, sent: bool) -> None:
        super().__init__(why)
        self.hint = hint
        self.sent = sent


class Client:
    """Sends requests and waits for their replies, over the connections whose peers are ready, round-robin.

    The Guide's Lazy Pirate polls with a limit, closes the confused socket, opens a new one and sends again, at most N
    times. Here an attempt also ends as soon as the connection's monitor says that the connection is lost, so that a
    server that died is noticed without any limit.

    A malformed request can make a REP socket drop its next reply, which may be ours (libzmq's rep.cpp). As no
    connection breaks, only a ``timeout`` and another attempt help against that.
    """

    def __init__(self, connections: Connections, *, timeout: float = math.inf, retries: int = 3) -> None:
        """Ask over ``connections``.

        ``timeout``: seconds for an attempt, from name resolution to reply. ``retries``: further attempts for each
        request.
        """
        self._connections = connections
        self._timeout = timeout
        self._retries = retries

    def ask(self, frames: Sequence[bytes]) -> Reply:
        """Send ``frames`` as one request and return the reply.

        Raises NoReply if no attempt brings one, or none can, and the request may have reached a server; else Failure.
        """
        started = time.monotonic()
        sent = False
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(frames, time.monotonic() + self._timeout)
            except AttemptFailed as failed:
                sent = sent or failed.sent
                in_vain = not sent and not any(connection.peer.known for connection in self._connections)
                if in_vain or attempt > self._retries:
                    tries = f"{count_of(attempt, 'attempt')}, {time.monotonic() - started:.1f} s"
                    text = f"no reply to {abridge(frames[0])} ({tries}): {failed}" if sent else f"{failed} ({tries})"
                    error = NoReply if sent else Failure
                    raise error(f"{text}; {failed.hint}" if failed.hint else text) from None
                notify(f"{failed}; retrying ({attempt} of {self._retries})")
            except Failure as failure:
                sent = sent or any(connection.last_used >= started for connection in self._connections)
                raise (NoReply(failure.message) if sent else failure) from None

    def _attempt(self, frames: Sequence[bytes], deadline: float) -> Reply:
        connection = self._wait_for_peer(deadline)
        started = connection.last_used = time.monotonic()
        try:
            reply = self._exchange(connection, frames, deadline)
        except AttemptFailed:
            self._connections.reopen(connection)  # that takes the request back, and whatever comes late
            raise
        return Reply(reply, connection.endpoint, time.monotonic() - started)

    def _wait_for_peer(self, deadline: float) -> Connection:
        """Return the connection that has not been used for longest among those that are ready; wait for one."""
        while True:
            if ready := self._connections.update():
                return ready[0] if len(ready) == 1 else min(ready, key=attrgetter("last_used"))
            if (now := time.monotonic()) >= deadline:
                endpoints = ", ".join(connection.endpoint for connection in self._connections)
                why = "; ".join(dict.fromkeys(connection.explain(now) for connection in self._connections))
                raise AttemptFailed(f"no server at {endpoints} within {self._timeout:g} s: {why}", "", sent=False)
            self._wait([], deadline)

    def _exchange(self, connection: Connection, frames: Sequence[bytes], deadline: float) -> list[zmq.Frame]:
        """Send ``frames`` over ``connection`` and return the frames of the reply."""
        losses = connection.peer.losses
        try:
            send(connection.socket, frames, NOW)
        except zmq.Again:  # libzmq has just given the connection up, and sending would block for ever
            raise AttemptFailed(f"connection to {connection.endpoint} lost", "", sent=False) from None
        if reply := _spin(connection.socket):
            return reply
        notice_at = time.monotonic() + NOTICE_DELAY
        while True:
            self._wait([connection.socket], min(deadline, notice_at))
            # Only now: a reply that came before the connection broke lies in the socket.
            if reply := receive(connection.socket):
                return reply
            if connection.peer.losses > losses:
                hint = "the request may have crashed the server, or a frame exceeds --max-size"
                raise AttemptFailed(f"connection to {connection.endpoint} lost", hint, sent=True)
            now = time.monotonic()
            if now >= deadline:
                late = f"no reply from {connection.endpoint} within {self._timeout:g} s"
                raise AttemptFailed(late, "the server may be slow or hung", sent=True)
            if now >= notice_at:
                notify(f"waiting for a reply from {connection.endpoint}")
                notice_at = math.inf

    def _wait(self, sockets: Sequence[Socket], until: float) -> None:
        """Wait until ``sockets`` or the connections may have something to say, a second at most; keep up with them."""
        sources = [*sockets, *(source for connection in self._connections for source in connection.sources)]
        pause = max(min(self._connections.pause(), until - time.monotonic()), 0)
        zmq.zmq_poll([(source, zmq.POLLIN) for source in sources], math.ceil(pause * 1000))
        self._connections.update()


def _spin(socket: Socket) -> list[zmq.Frame]:
    """Look for a reply without going to sleep; return its frames, or none if it is not that fast."""
    for _ in range(SPINS):
        os.sched_yield()
        if reply := receive(socket):
            return reply
    return []
