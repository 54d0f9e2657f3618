"""Compare zmqmsg with plain loops, side by side: ``python tests/bench.py [NAME]...``.

Each NAME is one of those at the end of this file; without any, all are measured. The two sides of a
line take turns, so that both meet the same load. A figure is the median of all rounds, with the
least and the greatest; the ratio is the median of the ratios of the rounds. Needs Linux.
"""

import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import zmq

from conftest import LIMIT, address
from zmtp import greeting, ready, request

MESSAGES = 8000  # of a stream
LARGE = bytes(64 << 20)

ZMQMSG = [sys.executable, "-m", "zmqmsg"]
SEND = [*ZMQMSG, "send", "--connect"]
SERVE = [*ZMQMSG, "serve", "--bind", "tcp://127.0.0.1:*"]

REP_LOOP = """
import sys, zmq
socket = zmq.Context().socket(zmq.REP)
socket.bind("tcp://127.0.0.1:*")
print("listening on", socket.last_endpoint.rstrip(bytes(1)).decode(), file=sys.stderr, flush=True)
while True:
    socket.send(socket.recv())
"""
ECHO = [sys.executable, "-c", REP_LOOP]
WITHOUT_COPIES = "socket.send(socket.recv(copy=False), copy=False)"
LARGE_ECHO = [sys.executable, "-c", REP_LOOP.replace("socket.send(socket.recv())", WITHOUT_COPIES)]
REQ_LOOP = """
import sys, zmq
socket = zmq.Context().socket(zmq.REQ)
socket.connect(sys.argv[1])
for line in sys.stdin.buffer:
    socket.send(line[:-1])
    sys.stdout.buffer.write(socket.recv() + b"\\n")
    sys.stdout.buffer.flush()
"""
BARE_SCRIPT = """
import click, zmq
@click.command()
@click.argument("endpoint")
@click.argument("message")
def main(endpoint, message):
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(endpoint)
    socket.send(message.encode())
    click.echo(socket.recv())
main()
"""

Command = list[str]
Side = Callable[[], float]


class Line(NamedTuple):
    """One line of the table: the figures of zmqmsg and of the other side, one of each round."""

    work: str
    unit: str
    ours: list[float]
    against: str
    theirs: list[float]

    def __str__(self) -> str:
        ratio = median(map(float.__truediv__, self.ours, self.theirs))
        ours, theirs = f"{show(self.ours)} {self.unit}", f"{show(self.theirs)} {self.unit}"
        return f"{self.work:36} {ours:34} {self.against:16} {theirs:34} {ratio:6.2f}"


Lines = Iterator[Line]


def show(figures: list[float]) -> str:
    """Return the median, the least and the greatest."""
    digits = 0 if median(figures) >= 100 else 2
    middle, least, most = (f"{f(figures):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({least} to {most})" if len(figures) > 1 else middle


def take_turns(*sides: Side, rounds: int = 5) -> list[list[float]]:
    """Run all ``sides`` in each round, every other round backwards, and return what each gave."""
    figures: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = list(zip(figures, sides, strict=True))
        for column, side in reversed(order) if number % 2 else order:
            column.append(side())
    return figures


@contextmanager
def serving(command: Command, stdout: int | IO[bytes] = subprocess.DEVNULL) -> Iterator[str]:
    """Run a server for the time of the context, which gets its endpoint."""
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr
            line = next(line for line in process.stderr if b"listening on" in line)
            yield line.split()[-1].decode()
        finally:
            process.kill()


# send


def bench_start() -> Lines:
    """A whole process for a single message: its time, and its instructions."""
    with serving(ECHO) as endpoint:
        ours, bare = [*SEND, endpoint, "hi"], [sys.executable, "-c", BARE_SCRIPT, endpoint, "hi"]
        sides = partial(time_process, ours), partial(time_process, bare)
        columns = take_turns(*sides, rounds=21)
        yield Line("send hi", "ms", columns[0], "bare script", columns[1])
        if shutil.which("valgrind"):
            columns = [[count_instructions(command)] for command in (ours, bare)]
            yield Line("send hi", "million instr.", columns[0], "bare script", columns[1])


def bench_stream() -> Lines:
    """The time for each message of a stream, on all processors and on a single one."""
    with serving(ECHO) as endpoint:
        plain, quoted = [*SEND, endpoint], [*SEND, endpoint, "--quoted"]
        loop = [sys.executable, "-c", REQ_LOOP, endpoint]
        columns = take_turns(*(partial(time_message, side) for side in (plain, quoted, loop)))
        yield Line("seq N | send", "µs", columns[0], "pyzmq loop", columns[2])
        yield Line("seq N | send --quoted", "µs", columns[1], "without", columns[0])
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        with serving(ECHO) as endpoint:
            plain, loop = [*SEND, endpoint], [sys.executable, "-c", REQ_LOOP, endpoint]
            columns = take_turns(*(partial(time_message, side) for side in (plain, loop)))
            yield Line("seq N | send, on one core", "µs", columns[0], "pyzmq loop", columns[1])
    finally:
        os.sched_setaffinity(0, processors)


def time_process(command: Command, lines: bytes = b"") -> float:
    """Return the milliseconds of a whole process, which is fed ``lines``."""
    with TemporaryFile() as replies:
        started = time.perf_counter()
        subprocess.run(command, input=lines, stdout=replies, check=True)
        taken = time.perf_counter() - started
        replies.seek(0)
        assert not lines or replies.read() == lines, f"{command} printed something else"
    return taken * 1000


def time_message(command: Command) -> float:
    """Return the microseconds for one message of a stream, without the start of the process."""
    few, many = (b"".join(b"%d\n" % n for n in range(size)) for size in (100, 100 + MESSAGES))
    start = time_process(command, few)
    return (time_process(command, many) - start) * 1000 / MESSAGES


def count_instructions(command: Command) -> float:
    """Return the millions of instructions of a process."""
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # or they vary
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command]
    done = subprocess.run(valgrind, capture_output=True, env=environment, check=True)
    return int(done.stderr.partition(b"Collected : ")[2].split()[0]) / 1e6


# serve


def bench_serve() -> Lines:
    """How many requests per second are answered, if each client waits for its reply."""
    for options, clients in [(["--quiet"], 1), (["--quiet"], 256), ([], 256)]:
        sides = (partial(count_requests, side, clients) for side in ([*SERVE, *options], ECHO))
        ours, theirs = take_turns(*sides, rounds=9)
        work = f"serve {options[0] if options else '> file'}, clients: {clients}"
        yield Line(work, "requests/s", ours, "bare loop", theirs)


def bench_large() -> Lines:
    """The time of a large message to a server and back."""
    sides = (partial(time_large, side) for side in ([*SERVE, "--quiet"], LARGE_ECHO))
    ours, theirs = take_turns(*sides)
    yield Line("serve --quiet, 64 MiB", "ms", ours, "zero-copy loop", theirs)


def bench_programs() -> Lines:
    """The time of a request that a command, or a filter, answers."""
    quiet = [*SERVE, "--quiet"]
    commands = [*quiet, "--exec", "cat"], [*quiet, "--filter", "cat"], quiet
    with ExitStack() as stack:
        endpoints = [stack.enter_context(serving(command)) for command in commands]
        columns = take_turns(*(partial(time_request, endpoint) for endpoint in endpoints))
    yield Line("serve --exec cat", "ms", columns[0], "the echo", columns[2])
    yield Line("serve --filter cat", "ms", columns[1], "the echo", columns[2])


def count_requests(command: Command, clients: int, seconds: float = 0.3) -> float:
    """Return how many requests per second a new server answers.

    The clients are plain TCP connections, so that hundreds of them cost little. The server is a new
    one, since the rates of two processes of the same program differ by a tenth as long as they run.
    """
    with ExitStack() as stack:
        printed = stack.enter_context(TemporaryFile())
        endpoint = stack.enter_context(serving(command, stdout=printed))
        poll = stack.enter_context(select.epoll())
        hello = request(b"hello")
        sockets = {}
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection(address(endpoint)))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(greeting() + ready(b"REQ"))
            size = client.recv(len(greeting()) + 2, socket.MSG_WAITALL)[-1]
            client.recv(size, socket.MSG_WAITALL)
            poll.register(client, select.EPOLLIN)
            sockets[client.fileno()] = client
            client.sendall(hello)
        replies, started = 0, time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds:
            readable = poll.poll(LIMIT)
            for number, _event in readable:
                assert sockets[number].recv(len(hello), socket.MSG_WAITALL) == hello
                sockets[number].sendall(hello)
            replies += len(readable)
    return replies / taken


def time_large(command: Command) -> float:
    """Return the milliseconds of a large message to a new server and back."""
    with serving(command) as endpoint:
        return time_request(endpoint, LARGE, count=1)


def time_request(endpoint: str, message: bytes = b"hello", count: int = 50) -> float:
    """Return the milliseconds from a request to its reply, after a first one."""
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.linger = 0
        client.rcvtimeo = LIMIT * 1000
        client.connect(endpoint)
        client.send(b"first")
        client.recv()
        started = time.perf_counter()
        for _ in range(count):
            client.send(message, copy=False)
            assert len(client.recv(copy=False)) == len(message)
        return (time.perf_counter() - started) * 1000 / count


BENCHES = {
    "start": bench_start,
    "stream": bench_stream,
    "serve": bench_serve,
    "large": bench_large,
    "programs": bench_programs,
}


def main() -> None:
    """Measure what is asked for, and print each line as soon as it is known."""
    print(f"{'work':36} {'zmqmsg':34} {'against':16} {'':34} {'ratio':>6}")
    for name in sys.argv[1:] or BENCHES:
        for line in BENCHES[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
