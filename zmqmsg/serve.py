"""``zmqmsg serve``: answers requests on a bound REP socket, and on connected ones as a worker of brokers."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from threading import Thread
from types import FrameType
from typing import Any

import click
import zmq

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.connection import NOTICE_DELAY, Connection, fail_if_hopeless, wait
from zmqmsg.console import Form, Output, notify
from zmqmsg.quoting import count_of, describe, quote, unquote
from zmqmsg.sockets import Context, Secure, Socket, bound, is_local, open_socket, receive, send

RAPID = 20
"""Milliseconds to wait for the next request in recv, which takes one system call, before polling, which takes six."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Frames = Sequence[Any]  # of bytes, or of Frames, which have them in a buffer
Answer = Callable[[Frames], Frames]


def run(
    *,
    bind: tuple[str, ...],
    connect: tuple[str, ...],
    reply: str | None,
    command: str | None,
    count: int | None,
    quiet: bool,
    verbose: bool,
    null: bool,
    quoted: bool,
    max_size: int,
    key: str | None,
    client_keys: str | None,
    server_key: str | None,
) -> None:
    """Answer requests until a signal comes or ``count`` is reached; the options are those of the command.

    Raises Failure.
    """
    form = Form.choose(null=null, quoted=quoted)
    answer = choose_answer(reply, command, quoted=quoted)
    bind = bind or (() if connect else (DEFAULT_ENDPOINT,))
    secure_bound, secure_connected = _load_security(key, client_keys, server_key, bool(bind), bool(connect))
    # The shared context, since pyzmq would terminate another one, and wait for what we do not want to wait for.
    context: Context = zmq.Context.instance()
    open_rep = partial(open_socket, context, zmq.REP, max_size=max_size, linger=-1)
    server = Server(answer, output=None if quiet else Output(form), count=count, verbose=verbose)
    server.stop_on_signals()
    with ExitStack() as stack:
        stack.callback(_flush, context, server)
        listener = stack.enter_context(open_rep(secure=secure_bound))
        listener.rcvtimeo = 0 if connect else RAPID
        open_worker = partial(open_rep, secure=secure_connected)
        connections = [
            stack.enter_context(closing(Connection(endpoint, open_worker, announce=True, verbose=verbose)))
            for endpoint in connect
        ]
        for endpoint in bind:
            _announce(stack.enter_context(bound(listener, endpoint)), open_to_all=not client_keys)
        server.run([listener] if bind else [], connections)
        notify(f"{count_of(server.served, 'request')} served")


def _load_security(
    key: str | None, client_keys: str | None, server_key: str | None, binds: bool, connects: bool
) -> tuple[Secure | None, Secure | None]:
    if not (key or client_keys or server_key):
        return None, None
    from zmqmsg.curve import server_security  # 10 ms, for CURVE alone

    return server_security(key, client_keys, server_key, binds=binds, connects=connects)


def _announce(endpoint: str, *, open_to_all: bool) -> None:
    host, _, port = endpoint.rpartition(":")
    everywhere = host in ("tcp://0.0.0.0", "tcp://[::]")
    notify(f"listening on all addresses, port {port}" if everywhere else f"listening on {endpoint}")
    if open_to_all and not is_local(endpoint):
        where = f"port {port}" if everywhere else endpoint
        text = f"anyone who can reach {where} can use it; restrict access with --key and --client-keys"
        notify(f"warning: {text}", "yellow")


def _flush(context: Context, server: "Server") -> None:
    """Wait until the last replies of ``server``, if there are any, are on their way, however long that takes.

    TCP_MAXRT cuts off a peer that does not read. In a thread, since a signal ends pyzmq's ``term()`` early.
    """
    if not server.served:
        return
    thread = Thread(target=context.term, daemon=True)
    thread.start()
    thread.join(NOTICE_DELAY)
    if thread.is_alive():
        notify("waiting for the last reply to reach its client; a second signal ends it at once")
        thread.join()


# Answers


class CommandStopped(Exception):
    """A signal to stop has ended the command; ``reply`` is what it had printed by then."""

    def __init__(self, reply: Frames) -> None:
        super().__init__()
        self.reply = reply


def choose_answer(reply: str | None, command: str | None, *, quoted: bool) -> Answer:
    """Return the function that makes the reply to a request; raise UsageError if the options contradict each other."""
    if reply is not None and command is not None:
        raise click.UsageError("--reply and --exec cannot be used together")
    if command is not None:
        if not command.strip():
            raise click.UsageError("--exec needs a command, for example --exec cat")
        return Command(command, quoted=quoted)
    if reply is not None:
        frames = [os.fsencode(reply)]
        return lambda request: frames
    return lambda request: request


class Command:
    """Answers a request with what a shell command prints, which reads the request on its standard input.

    The request is never a part of the command line or of the environment, so that it cannot inject anything.
    """

    def __init__(self, command: str, *, quoted: bool) -> None:
        """Run ``command`` for each request; ``quoted``: it reads one quoted line and prints one."""
        self._arguments = ["/bin/sh", "-c", command]
        self._quoted = quoted
        self._boundaries_told = False
        self.running = False

    def __call__(self, request: Frames) -> Frames:
        """Run the command and return what it printed; raise CommandStopped if a signal to stop has ended it."""
        self.running = True
        try:
            process = subprocess.Popen(self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            printed, _ = process.communicate(self._to_input(request))
        except OSError as error:
            notify(f"cannot run the command, so the reply is empty: {error.strerror}", "red")
            return [b""]
        finally:
            self.running = False
        reply = self._from_output(printed)
        status = process.returncode
        if status:
            how = f"exited with status {status}" if status > 0 else f"was killed by signal {-status}"
            notify(f"the command {how}", "yellow")
        # The shell reports a signal that ended its child as 128 and its number.
        if status in {way for number in STOP_SIGNALS for way in (-number, 128 + number)}:
            raise CommandStopped(reply)
        return reply

    def _to_input(self, request: Frames) -> bytes:
        frames = [bytes(frame) for frame in request]
        if self._quoted:
            return quote(frames) + b"\n"
        if len(frames) > 1 and not self._boundaries_told:
            self._boundaries_told = True
            notify("frames are joined for the command; use --quoted to keep them apart", "yellow")
        return b"".join(frames)

    def _from_output(self, printed: bytes) -> Frames:
        if not self._quoted:
            return [printed]
        try:
            line = printed.removesuffix(b"\n")
            if b"\n" in line:
                raise ValueError("more than one line")
            return unquote(line)
        except ValueError as error:
            notify(f"the command did not print a quoted line: {error}; sending its output as it is", "yellow")
            return [printed]


# The loop


class Server:
    """Answers one request after the other: receive, answer, send, print. ``served`` counts the answered ones."""

    def __init__(
        self, answer: Answer, *, output: Output | None = None, count: int | None = None, verbose: bool = False
    ) -> None:
        """Make replies with ``answer``.

        ``output`` gets each request after its reply is sent. ``count`` requests stop the loop. ``verbose``: notify the
        user of each.
        """
        self.served = 0
        self._answer = answer
        self._output = output
        self._count = count
        self._verbose = verbose
        self._stopping = False
        self._wakeup: list[int] = []

    def run(self, bound_sockets: Sequence[Socket], connections: Sequence[Connection] = ()) -> None:
        """Answer what comes to REP sockets, ``bound_sockets`` and those of ``connections``, until it is time to stop.

        Raises Failure if there is nothing left to serve, or if a request cannot be printed, and BrokenPipeError if its
        reader is gone.
        """
        sockets = bound_sockets
        while not self._stopping:
            if connections:
                for connection in connections:
                    connection.update()
                sockets = [*bound_sockets, *(connection.link.socket for connection in connections)]
            idle = True
            for socket in sockets:
                if not self._stopping and (request := receive(socket)):
                    self._serve(socket, request)
                    idle = False
            if idle:
                if connections and not bound_sockets:
                    fail_if_hopeless(connections)
                wait(connections, [*sockets, *self._wakeup], math.inf)

    def _serve(self, socket: Socket, request: list[zmq.Frame]) -> None:
        started = time.monotonic() if self._verbose else 0
        try:
            reply = self._answer(request)
        except CommandStopped as stopped:
            if self._stopping:
                # Half a reply must not pass for a whole one. A client of ours sees its connection break.
                notify("the last request was not answered: its command was stopped, too", "yellow")
                return
            reply = stopped.reply
        send(socket, reply)
        self.served += 1
        if self.served == self._count:
            self._stopping = True
        if self._verbose:
            self._report(socket, request, reply, time.monotonic() - started)
        if self._output:
            self._output.write(request)

    def _report(self, socket: Socket, request: list[zmq.Frame], reply: Frames, seconds: float) -> None:
        peer = "this process"
        with suppress(zmq.ZMQError):  # inproc has no addresses
            peer = str(request[0].get("Peer-Address"))
            # Where no ZAP handler is asked, a peer could choose its user id: libzmq believes what it says.
            if socket.zap_domain:
                peer = f"{peer} ({request[0].get('User-Id')})"
        notify(
            f"request {self.served} from {peer}: {describe(request)}; reply: {describe(reply)}, {seconds * 1000:.2f} ms"
        )

    def stop_on_signals(self) -> None:
        """Let a signal stop ``run()`` after the current request; a second one ends the process."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)
        # What a signal writes to it ends polling, also when it comes just before.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        self._wakeup = [reading]

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._stop:
                signal.signal(number, signal.SIG_DFL)
        self._stopping = True
        if isinstance(self._answer, Command) and self._answer.running:
            notify("stopping after the current request; a second signal ends it at once")
