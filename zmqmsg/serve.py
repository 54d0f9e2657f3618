"""``zmqmsg serve``: answers requests on a bound REP socket, and on connected ones as a worker of brokers."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial

import click
import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.answers import Answer, Unanswered, choose_answer
from zmqmsg.attendant import STOPPING, Attendant
from zmqmsg.connection import Peer, fail_without_hope, wait
from zmqmsg.console import NOTICE_DELAY, Failure, Form, Output, notify
from zmqmsg.listener import bound, notify_of_endpoint, watch_handshakes
from zmqmsg.quoting import count_of, describe
from zmqmsg.sockets import ApplyKeys, Context, Socket, open_socket, receive, send, share_context
from zmqmsg.system import leave_signals_to_other_threads, raise_descriptor_limit

STOP_LIMIT = (
    5.0  # seconds after a request to stop in which requests that have arrived are still answered
)
RECEIVE_WAIT_MS = 20  # to wait for a request in recv, which takes one system call, before polling, which takes six


def run(
    *,
    bind: tuple[str, ...],
    connect: tuple[str, ...],
    reply: str | None,
    command: str | None,
    filter_command: str | None,
    count: int | None,
    quiet: bool,
    verbose: bool,
    form: Form,
    max_size: int,
    key: str | None,
    client_keys: str | None,
    server_key: str | None,
) -> None:
    """Answer requests until a signal comes or ``count`` is reached; the options are the command's. Raises Failure."""
    attendant = Attendant()
    answer = choose_answer(reply, command, filter_command, form, attendant, max_size)
    # As Go's runtime does: with the usual 1,024, a few clients would keep out all others.
    raise_descriptor_limit()
    bind = bind or (() if connect else (DEFAULT_ENDPOINT,))
    keys_bound, keys_connected = apply_keys(
        key, client_keys, server_key, binds=bool(bind), connects=bool(connect)
    )
    context = share_context()
    open_rep = partial(open_socket, context, zmq.REP, max_size=max_size, linger=-1)
    output = None if quiet else Output(form)
    server = Server(answer, attendant, output=output, count=count, verbose=verbose)
    with ExitStack() as stack:
        stack.callback(flush, context, server, attendant)
        listener = stack.enter_context(open_rep(apply_keys=keys_bound))
        if verbose and bind:
            watch_handshakes(listener)
        listener.rcvtimeo = 0 if connect else RECEIVE_WAIT_MS
        open_worker = partial(open_rep, apply_keys=keys_connected)
        new_peer = partial(Peer, open_socket=open_worker, announce=True, verbose=verbose)
        peers = [stack.enter_context(closing(new_peer(endpoint))) for endpoint in connect]
        endpoints = [stack.enter_context(bound(listener, endpoint)) for endpoint in bind]
        # Binding may wait for a name server. Until then, a signal ends the process at once.
        attendant.start(output)
        for endpoint in endpoints:
            notify_of_endpoint(endpoint, open_to_all=not client_keys)
        server.run([listener] if bind else [], peers)
        notify(f"{count_of(server.served, 'request')} served")


def apply_keys(
    key: str | None, client_keys: str | None, server_key: str | None, *, binds: bool, connects: bool
) -> tuple[ApplyKeys | None, ApplyKeys | None]:
    """Return what lets the bound socket, and the connected ones, use CURVE."""
    if client_keys and not (key and binds):
        raise click.UsageError("--client-keys needs --key, and an endpoint that is bound")
    if server_key and not connects:
        raise click.UsageError("--server-key needs --connect")
    if key and connects and not server_key:
        raise click.UsageError(
            "--key with --connect needs --server-key: the public key file of the broker"
        )
    if server_key and binds and not key:
        raise click.UsageError(
            "--server-key with --bind needs --key, otherwise the bound endpoint is not encrypted"
        )
    if not (key or server_key):
        return None, None
    from zmqmsg.curve import load_keys  # 5 ms, for CURVE alone

    for_server, for_client = load_keys(key, server_key, client_keys)
    return for_server if key and binds else None, for_client if server_key else None


def flush(context: Context, server: "Server", attendant: Attendant) -> None:
    """Wait until the last replies are on their way, however long: TCP_MAXRT cuts off a peer that does not read."""
    if not server.served:
        return
    how = "two signals end" if attendant.requested == math.inf else "a second signal ends"
    attendant.serving = False
    attendant.notices.withdraw(STOPPING)
    attendant.notices.expect(
        f"waiting for the last reply to reach its client; {how} it at once", NOTICE_DELAY
    )
    leave_signals_to_other_threads()  # pyzmq gives term() up if a signal interrupts it
    context.term()


# The loop


class Server:
    """Answers one request after the other: receive, answer, send, print. ``served`` counts the answered ones."""

    def __init__(
        self,
        answer: Answer,
        attendant: Attendant,
        *,
        output: Output | None = None,
        count: int | None = None,
        verbose: bool = False,
    ) -> None:
        """``output`` gets each request after its reply is sent; ``verbose``: notify the user of each."""
        self.served = 0
        self._answer = answer
        self._attendant = attendant
        self._output = output
        self._count = count
        self._verbose = verbose
        self._unprinted = (
            0  # requests that were answered, but not printed, since printing has failed
        )
        self._failed_at = math.inf  # when it failed
        self._problem = ""  # why

    def run(self, bound_sockets: Sequence[Socket], peers: Sequence[Peer] = ()) -> None:
        """Answer what comes to REP sockets, ``bound_sockets`` and those of ``peers``, until it is time to stop.

        When a stop is requested, or printing fails, what has already arrived is answered: nobody else can. Raises
        Failure if there is nothing left to serve, if there can be no more replies, or if a request cannot be printed.
        """
        try:
            with self._answer:
                self._answer_all(bound_sockets, peers)
        except Unanswered as unanswered:
            notify(
                str(unanswered), "yellow"
            )  # our own clients see the connection end, and ask again
        if self._unprinted:
            raise Failure(
                f"{self._problem}; {count_of(self._unprinted, 'request')} answered, but not printed"
            )

    def _answer_all(self, bound_sockets: Sequence[Socket], peers: Sequence[Peer]) -> None:
        sockets = bound_sockets
        over = False
        while not over:
            stopping = self._attendant.requested < math.inf or self._unprinted > 0
            if peers:
                for peer in peers:
                    peer.update()
                sockets = [*bound_sockets, *(peer.link.socket for peer in peers)]
            idle = True
            for socket in sockets:
                if request := receive(socket):
                    self._serve(socket, request)
                    idle = False
                    if over := self.served == self._count or (stopping and self._is_late()):
                        break
            if idle and stopping:
                break
            if idle:
                if peers and not bound_sockets:
                    fail_without_hope(peers)
                self._answer.check()
                wait(peers, [*sockets, *self._attendant.sources], math.inf)
        if over and self.served != self._count and any(socket.poll(0) for socket in sockets):
            notify(
                f"stopping after {STOP_LIMIT:g} s; requests that still wait are not answered",
                "yellow",
            )

    def _is_late(self) -> bool:
        return time.monotonic() >= min(self._attendant.requested, self._failed_at) + STOP_LIMIT

    def _serve(self, socket: Socket, request: list[zmq.Frame]) -> None:
        started = (
            time.perf_counter() if self._verbose else 0
        )  # monotonic() has steps of 15 ms on Windows
        reply = self._answer.reply_to(request)
        send(socket, reply)
        self.served += 1
        if self._verbose:
            seconds = time.perf_counter() - started
            peer = name_peer(request[0], authenticated=bool(socket.zap_domain))
            text = (
                f"request {self.served} from {peer}: {describe(request)}; reply: {describe(reply)}"
            )
            notify(f"{text}, {seconds * 1000:.2f} ms")
        if self._unprinted:
            self._unprinted += 1
        elif self._output:
            try:
                self._output.write(request)
            except (BrokenPipeError, Failure) as error:
                self._problem = (
                    str(error) if isinstance(error, Failure) else "standard output is closed"
                )
                self._unprinted = 1
                self._failed_at = time.monotonic()


def name_peer(frame: zmq.Frame, *, authenticated: bool) -> str:
    """Return the address of the peer that ``frame`` came from, and the name of its key if it was ``authenticated``."""
    try:
        address = str(frame.get("Peer-Address"))
    except zmq.ZMQError:  # libzmq keeps none of ZMTP 1 and 2
        return "unknown address"
    if address.startswith("localhost:"):  # ipc: user, group and process
        address = f"process {address.rpartition(':')[2]}"
    # Where no ZAP handler is asked, a peer could choose its user id: libzmq believes what it says.
    return f"{address} ({frame.get('User-Id')})" if authenticated else address
