"""``zmqmsg serve``: answers requests on a bound REP socket, and as a worker of brokers."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial

import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.answers import Answer, AnswerOptions, Request, Unanswered
from zmqmsg.connection import Peer, fail_if_hopeless, poll
from zmqmsg.handshakes import watch_handshakes
from zmqmsg.keys import CurveKeys, Keys
from zmqmsg.listener import StopRequested, bound, notify_of_endpoint
from zmqmsg.messages import Form, Frames, Output
from zmqmsg.notices import NOTICE_DELAY, ClientNotices, Failure, notify
from zmqmsg.quoting import count_of, describe
from zmqmsg.sockets import Context, Secure, Socket, open_socket, receive, send, share_context
from zmqmsg.stopping import ANSWER_LIMIT, STOPPING, Guard
from zmqmsg.system import leave_signals_to_other_threads, raise_descriptor_limit

# To wait for a request in recv takes one system call, and in a poll six.
RECEIVE_WAIT_MS = 20
# While stopping, there is nothing left to answer if nothing comes for as long: libzmq moves
# messages from a connection to the socket, 16 at a time, on a thread of its own. A broker has many
# for a worker; on a busy machine, or over a long way, 20 ms may pass between two of them.
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
        client_notices=client_notices if verbose else None,
    )
    with ExitStack() as stack:
        stack.callback(guard.notices.finish)  # the last of what happens at the end
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
        new_peer = partial(Peer, open_socket=open_worker, announce=True, verbose=verbose)
        peers = [stack.enter_context(closing(new_peer(endpoint))) for endpoint in connect]
        with suppress(StopRequested):
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

    Without a signal there is no limit: TCP_MAXRT cuts off a client that does not read.
    """
    if not server.served:
        return
    guard.unfinished = "the last reply may not have reached its client: it had not been read"
    end = "a second signal ends it" if guard.stop.is_requested() else "two signals end it"
    notice = f"waiting for the last reply to reach its client; {end} at once"
    guard.stalls.withdraw(STOPPING)
    guard.stalls.expect(notice, NOTICE_DELAY)
    leave_signals_to_other_threads()  # pyzmq gives term() up if a signal interrupts it
    context.term()
    guard.stalls.withdraw(notice)


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
    ) -> None:
        """``output`` gets each request after its reply is sent. ``count``: requests to answer.

        ``client_notices``: if given, the user is notified of each request, and these notices are
        told who was served.
        """
        self.served = 0  # requests that were answered
        self._answer = answer
        self._guard = guard
        self._output = output
        self._count = count
        self._client_notices = client_notices
        self._print_failure = ""  # why requests cannot be printed any more
        self._unprinted = 0  # requests that were answered since then
        self._leaves_requests = False  # whether some still waited when there was no time left

    def run(self, listeners: Sequence[Socket], peers: Sequence[Peer] = ()) -> None:
        """Answer what comes to REP sockets, ``listeners`` and those of ``peers``.

        When it is time to stop, what has already arrived is answered: nobody else can do it. Raises
        Failure if there is nothing left to serve, if there can be no more replies, or if a request
        cannot be printed or was left unanswered.
        """
        try:
            with self._answer:
                self._answer_all(listeners, peers)
        except Unanswered as unanswered:
            # Our own clients see the connection end, and ask again.
            notify(str(unanswered), "yellow")
        if self._print_failure:
            unprinted = ""
            if self._unprinted:
                requests = count_of(self._unprinted, "request")
                unprinted = f"; {requests} answered, but not printed"
            raise Failure(f"{self._print_failure}{unprinted}")
        if self._leaves_requests:
            raise Failure(
                f"stopping after {ANSWER_LIMIT:g} s; requests that still wait are not answered"
            )

    def _answer_all(self, listeners: Sequence[Socket], peers: Sequence[Peer]) -> None:
        stop = self._guard.stop
        last_wait = WORKER_LAST_WAIT_MS if peers else LAST_WAIT_MS
        while self.served != self._count:
            self._check_output()
            sockets = self._update(listeners, peers)
            if self._answer_each(sockets):
                if stop.has_lasted(ANSWER_LIMIT):
                    self._leaves_requests = any(socket.poll(0) for socket in sockets)
                    return
            elif stop.is_requested():
                if not zmq.zmq_poll([(each, zmq.POLLIN) for each in sockets], last_wait):
                    return
            else:
                if not listeners:
                    fail_if_hopeless(peers)
                self._answer.check()
                self._wait(sockets, peers)

    def _update(self, listeners: Sequence[Socket], peers: Sequence[Peer]) -> Sequence[Socket]:
        """Let ``peers`` act upon what has happened; return the sockets to receive from."""
        if not peers:
            return listeners
        for peer in peers:
            peer.update()
        return [*listeners, *(peer.link.socket for peer in peers)]

    def _answer_each(self, sockets: Sequence[Socket]) -> bool:
        """Answer one request from each of ``sockets``; return whether there was any."""
        any_came = False
        for socket in sockets:
            if self.served == self._count:
                break
            if frames := receive(socket):
                self._serve(socket, frames)
                any_came = True
        return any_came

    def _serve(self, socket: Socket, frames: list[zmq.Frame]) -> None:
        """Answer one request, print it, and tell of it."""
        started = time.perf_counter()  # monotonic() has steps of 15 ms on Windows
        request = Request(frames, bool(socket.zap_domain))
        reply = self._answer.reply_to(request)
        send(socket, reply)
        self.served += 1
        if self._client_notices:
            self._report(request, reply, time.perf_counter() - started)
        if self._print_failure:
            self._unprinted += 1
        elif self._output:
            self._print(self._output, frames)

    def _print(self, output: Output, frames: Frames) -> None:
        try:
            output.write(frames)
        except BrokenPipeError:
            self._unprinted = 1
            self._stop_printing("standard output is closed")
        except Failure as error:
            self._unprinted = 1
            self._stop_printing(str(error))

    def _check_output(self) -> None:
        """Take no further request if nobody would read it."""
        if self._output and not self._print_failure and self._output.is_abandoned():
            self._stop_printing("standard output is closed")

    def _stop_printing(self, reason: str) -> None:
        self._print_failure = reason
        self._guard.stop.request()

    def _report(self, request: Request, reply: Frames, seconds: float) -> None:
        """Notify the user of a request that was answered after ``seconds``."""
        address = request.client_address()
        if self._client_notices:
            self._client_notices.note_served(address)
        client = address or "unknown address"
        if key_name := request.key_name():
            client = f"{client} ({key_name})"
        notify(
            f"request {self.served} from {client}: {describe(request.frames)};"
            f" reply: {describe(reply)}, {seconds * 1000:.2f} ms"
        )

    def _wait(self, sockets: Sequence[Socket], peers: Sequence[Peer]) -> None:
        """Wait for a request, a signal, the end of our reader, or something to do for a peer."""
        descriptors = self._output.descriptors if self._output else []
        poll(peers, [*sockets, *descriptors, *self._guard.stop.sources], math.inf)
