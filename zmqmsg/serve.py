"""``zmqmsg serve``: answers requests on a bound REP socket, and as a worker of brokers."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial

import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.answers import Answer, AnswerOptions, Unanswered
from zmqmsg.clients import client_address, client_key_name
from zmqmsg.handshakes import watch_handshakes
from zmqmsg.keys import CurveKeys, Keys
from zmqmsg.listener import StopRequested, bound, notify_of_endpoint
from zmqmsg.messages import Form, Frames
from zmqmsg.notices import NOTICE_DELAY, Failure, notify
from zmqmsg.output import Output
from zmqmsg.peer import Peer, poll, update_all
from zmqmsg.quoting import count_of, describe
from zmqmsg.refusals import ClientNotices
from zmqmsg.sockets import Context, Secure, Socket, open_socket, receive, send, share_context
from zmqmsg.stopping import ANSWER_LIMIT, STOPPING, Guard
from zmqmsg.system import leave_signals_to_other_threads, raise_descriptor_limit

# A server that only binds waits for so long in receive() before it polls: a wait there takes one
# system call, and a poll six.
RECEIVE_WAIT_MS = 20
# While stopping, there is nothing left to answer if nothing comes for this long. libzmq moves
# messages from a connection to the socket on a thread of its own, 16 at a time. A broker has many
# for a worker: on a busy machine, or over a long way, 20 ms may pass between two of them.
LAST_WAIT_MS = 20
WORKER_LAST_WAIT_MS = 200


def run(
    *,
    bind: Sequence[str],
    connect: Sequence[str],
    answer: AnswerOptions,
    keys: Keys,
    form: Form,
    max_size: int,
    count: int | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Answer requests until a signal comes or ``count`` requests are answered.

    ``bind`` and ``connect`` are endpoints; without any, the default endpoint is bound.
    ``max_size``: bytes of a frame. ``quiet``: do not print requests. ``verbose``: notify the user
    of each request, and of clients that do not get through. Raises UsageError or Failure.
    """
    # Check and load everything that can be refused
    endpoints = bind or (() if connect else (DEFAULT_ENDPOINT,))
    answer.check()
    keys.check_for_serve(binds=bool(endpoints), connects=bool(connect))
    raise_descriptor_limit()  # with the usual 1,024, a few clients would keep out all others
    output = None if quiet else Output(form)
    guard = Guard(output)
    client_notices = ClientNotices(guard.notices.notify)
    answers = answer.choose(form, max_size, guard)
    curve = keys.load(guard.notices.notify, client_notices) if keys.are_given() else None
    secure_bound, secure_connected = choose_security(keys, curve, bool(endpoints))

    # Signals are handled before the first port is open
    guard.start()
    context = share_context()
    server = Server(
        answers,
        guard,
        output=output,
        count=count,
        client_notices=client_notices,
        verbose=verbose,
    )
    with ExitStack() as stack:
        # At the end, sockets are closed, then replies flushed, and then notices.
        stack.callback(guard.notices.finish)
        stack.callback(flush, context, server, guard)

        # Bind and connect
        open_rep = partial(open_socket, context, zmq.REP, max_size=max_size, linger=-1)
        listeners: list[Socket] = []
        if endpoints:
            listener = stack.enter_context(open_rep(secure=secure_bound))
            listener.rcvtimeo = 0 if connect else RECEIVE_WAIT_MS
            listeners.append(listener)
            if verbose:
                watch_handshakes(listener, client_notices)
        open_worker = partial(open_rep, secure=secure_connected)
        new_peer = partial(
            Peer,
            open_socket=open_worker,
            announce=True,
            verbose=verbose,
            survives_shortage=True,
        )
        peers = [stack.enter_context(closing(new_peer(endpoint))) for endpoint in connect]
        with suppress(StopRequested):  # then server.run() finds that it is to stop
            for endpoint in endpoints:
                real = stack.enter_context(bound(listener, endpoint, guard.stop))
                notify_of_endpoint(real, checks_clients=bool(keys.client_keys))

        # Serve
        server.run(listeners, peers)
        notify(f"{count_of(server.served, 'request')} served")


def choose_security(
    keys: Keys, curve: CurveKeys | None, binds: bool
) -> tuple[Secure | None, Secure | None]:
    """Return what gives keys to the bound socket, and to the connected ones."""
    if not curve:
        return None, None
    secure_bound = curve.secure_server if keys.key and binds else None
    secure_connected = curve.secure_client if keys.server_key else None
    return secure_bound, secure_connected


def flush(context: Context, server: "Server", guard: Guard) -> None:
    """Wait until the last replies are on their way, or the guard ends the process.

    Without a signal there is no limit; over TCP, TCP_MAXRT cuts off a client that does not read.
    """
    if not server.served:
        return
    end = "a second signal ends it" if guard.was_signalled else "two signals end it"
    guard.stalls.withdraw(STOPPING)
    leave_signals_to_other_threads()  # pyzmq gives term() up if a signal interrupts it
    with (
        guard.naming_loss("the last reply may not have reached its client: it had not been read"),
        guard.stalls.expecting(
            f"waiting for the last reply to reach its client; {end} at once", NOTICE_DELAY
        ),
    ):
        context.term()


# The loop


class Server:
    """Answers one request after the other: receive, answer, send, print."""

    def __init__(
        self,
        answer: Answer,
        guard: Guard,
        *,
        output: Output | None = None,
        count: int | None = None,
        client_notices: ClientNotices | None = None,
        verbose: bool = False,
    ) -> None:
        """``output`` gets each request after its reply is sent. ``count``: requests to answer.

        ``verbose``: notify the user of each request. ``client_notices`` are told who was served.
        """
        self.served = 0  # requests that were answered
        self._answer = answer
        self._guard = guard
        self._output = output
        self._pipe = output if output and output.descriptors else None  # whose reader may go
        self._count = count
        self._client_notices = client_notices
        self._verbose = verbose
        self._print_failure = ""  # why requests cannot be printed any more
        self._unprinted = 0  # requests that were answered since then

    def run(self, listeners: Sequence[Socket], peers: Sequence[Peer] = ()) -> None:
        """Answer what comes to REP sockets, ``listeners`` and those of ``peers``.

        When it is time to stop, what has already arrived is answered: nobody else can do it. Raises
        Failure if there is nothing left to serve, if there can be no more replies, if a request
        cannot be printed, or if some still wait when the time for answers is over.
        """
        is_complete = True
        try:
            with self._answer:
                is_complete = self._answer_all(listeners, peers)
        except Unanswered as unanswered:
            # Whoever signalled our command meant to stop us, too, so this is a normal stop, with
            # status 0. Clients such as zmqmsg send see the connection end, and ask again.
            notify(str(unanswered), "yellow")
        if self._print_failure:
            unprinted = ""
            if self._unprinted:
                requests = count_of(self._unprinted, "request")
                unprinted = f"; {requests} answered, but not printed"
            raise Failure(f"{self._print_failure}{unprinted}")
        if not is_complete:
            raise Failure(
                f"stopped after {ANSWER_LIMIT:g} s; {count_of(self.served, 'request')} served;"
                " requests that still wait are not answered"
            )

    def _answer_all(self, listeners: Sequence[Socket], peers: Sequence[Peer]) -> bool:
        """Answer requests until it is time to stop; return whether none was left waiting."""
        stop = self._guard.stop
        last_wait_ms = WORKER_LAST_WAIT_MS if peers else LAST_WAIT_MS
        sockets = listeners
        while self.served != self._count:
            if self._pipe:
                self._check_reader(self._pipe)
            if peers:
                update_all(peers, needed=not listeners)
                sockets = [*listeners, *(peer.link.socket for peer in peers)]
            if self._answer_each(sockets):
                if stop.is_requested and self._is_late():
                    return not does_request_come(sockets, within_ms=0)
            elif stop.is_requested:
                if not does_request_come(sockets, within_ms=last_wait_ms):
                    return True
            else:
                self._answer.check()
                self._wait(sockets, peers)
        return True

    def _check_reader(self, pipe: Output) -> None:
        """Take no further request if nobody would read it."""
        if not self._print_failure and pipe.is_abandoned():
            self._stop_printing("standard output is closed", unprinted=0)

    def _answer_each(self, sockets: Sequence[Socket]) -> bool:
        """Answer one request from each of ``sockets``; return whether there was any."""
        stop = self._guard.stop
        any_came = False
        for socket in sockets:
            request = receive(socket)
            if request:
                self._serve(request, socket)
                any_came = True
                if self.served == self._count or (stop.is_requested and self._is_late()):
                    break
        return any_came

    def _is_late(self) -> bool:
        """Return whether the time for answers is over."""
        return self._guard.stop.has_lasted(ANSWER_LIMIT)

    def _serve(self, request: Frames, socket: Socket) -> None:
        """Answer one request, print it, and report it."""
        # monotonic() has steps of 15 ms on Windows.
        started = time.perf_counter() if self._verbose else 0.0
        reply = self._answer.reply_to(request, socket)
        send(socket, reply)
        self.served += 1
        if self._verbose:
            self._report(request, reply, socket, time.perf_counter() - started)
        if self._print_failure:
            self._unprinted += 1
        elif self._output:
            self._print(self._output, request)

    def _print(self, output: Output, frames: Frames) -> None:
        try:
            output.write(frames)
        except BrokenPipeError:
            self._stop_printing("standard output is closed", unprinted=1)
        except Failure as error:
            self._stop_printing(str(error), unprinted=1)

    def _stop_printing(self, reason: str, *, unprinted: int) -> None:
        self._print_failure = reason
        self._unprinted = unprinted
        self._guard.stop.request()

    def _report(self, request: Frames, reply: Frames, socket: Socket, seconds: float) -> None:
        """Notify the user of a request that was answered after ``seconds``."""
        address = client_address(request)
        if self._client_notices:
            self._client_notices.note_served(address)
        client = address or "unknown address"
        if key_name := client_key_name(request, socket):
            client = f"{client} ({key_name})"
        notify(
            f"request {self.served} from {client}: {describe(request)};"
            f" reply: {describe(reply)}, {seconds * 1000:.2f} ms"
        )

    def _wait(self, sockets: Sequence[Socket], peers: Sequence[Peer]) -> None:
        """Wait for a request, a signal, the end of our reader, or something to do for a peer."""
        descriptors = self._output.descriptors if self._output else []
        poll(peers, [*sockets, *descriptors, *self._guard.stop.sources], math.inf)


def does_request_come(sockets: Sequence[Socket], within_ms: int) -> bool:
    """Return whether a request waits at any of ``sockets``, or comes ``within_ms``."""
    return bool(zmq.zmq_poll([(each, zmq.POLLIN) for each in sockets], within_ms))
