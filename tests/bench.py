"""Measures zmqmsg side by side with plain loops, and prints one table: bench.py [--full] [WORD]...

Each WORD chooses the rows whose name contains it. The sides of a row take turns, in changing order; a ratio is the
median of those of the single rounds. ``--full`` streams a million messages. Needs Linux.
"""

import compileall
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import zmq
from zmq.auth import create_certificates

from zmtp import greeting, ready, request

T = TypeVar("T")
Process = subprocess.Popen[bytes]
Results = Iterator["Result"]

LIMIT = 900  # seconds after which a row will not end

ROUNDS = 5
MESSAGES = 8000
STREAM = 1_000_000 if "--full" in sys.argv else 100_000
LARGE = 64 << 20
STEADY = 1.4
"""The greatest of the other side's figures over the least, from which on the machine is too loaded for a judgement."""

_folder = TemporaryDirectory(prefix="zmqmsg-bench-")
FOLDER = Path(_folder.name)

SEND: list[object] = [sys.executable, "-m", "zmqmsg", "send", "--connect"]
SERVE: list[object] = [sys.executable, "-m", "zmqmsg", "serve", "--bind", "tcp://127.0.0.1:*"]
QUIET = [*SERVE, "--quiet"]

ECHO_SOURCE = """
import sys, zmq
s = zmq.Context().socket(zmq.REP)
s.bind("tcp://127.0.0.1:*")
print("listening on", s.last_endpoint.rstrip(bytes(1)).decode(), file=sys.stderr, flush=True)
while True:
    s.send(s.recv())
"""
ECHO = [sys.executable, "-c", ECHO_SOURCE]
ZERO_COPY = "s.send_multipart(s.recv_multipart(copy=False), copy=False)"
ZERO_COPY_ECHO = [sys.executable, "-c", ECHO_SOURCE.replace("s.send(s.recv())", ZERO_COPY)]
LOOP = """
import sys, zmq
s = zmq.Context().socket(zmq.REQ)
s.connect(sys.argv[1])
for line in sys.stdin.buffer:
    s.send(line[:-1])
    sys.stdout.buffer.write(s.recv() + b"\\n")
    sys.stdout.buffer.flush()
"""
LOOP_IN_C = r"""
#include <stdio.h>
#include <zmq.h>
int main(int argc, char **argv) {
    void *socket = zmq_socket(zmq_ctx_new(), ZMQ_REQ);
    char *line = NULL, reply[64];
    size_t room = 0;
    int size;
    zmq_connect(socket, argv[argc - 1]);
    while ((size = getline(&line, &room, stdin)) > 0) {
        zmq_send(socket, line, size - 1, 0);
        size = zmq_recv(socket, reply, sizeof reply - 1, 0);
        reply[size] = '\n';
        fwrite(reply, 1, size + 1, stdout);
        fflush(stdout);
    }
}
"""
BARE_SCRIPT = """
import click, zmq
@click.command()
@click.argument("message")
def main(message):
    s = zmq.Context().socket(zmq.REQ)
    s.connect("ENDPOINT")
    s.send(message.encode())
    click.echo(s.recv())
main()
"""

# By hand, so that hundreds of clients cost one thread, and no time of libzmq's.
GREETING = greeting()
READY = ready(b"REQ")
REQUEST = request(b"hello")


class Result(NamedTuple):
    """One line of the table: figures of zmqmsg and of what it is compared with, one of each round.

    ``limit`` begins with <= or >=. It is one for the ratio, or, where it ends in the unit, for zmqmsg's own figure.
    ``part`` goes after the name of the row.
    """

    unit: str
    ours: Sequence[float]
    against: str = ""
    theirs: Sequence[float] = ()
    limit: str = ""
    part: str = ""

    def columns(self) -> tuple[str, ...]:
        """Return what stands in the table from the unit on."""
        ratio = median(map(float.__truediv__, self.ours, self.theirs)) if self.theirs else 0
        figure = median(self.ours) if self.limit.endswith(self.unit) else ratio
        bound = float(self.limit.split()[1]) if self.limit else 0
        missed = bool(self.limit) and (
            figure > bound if self.limit.startswith("<=") else figure < bound
        )
        shown = f"{ratio:.2f}" if self.theirs else ""
        loaded = bool(self.theirs) and max(self.theirs) > STEADY * min(self.theirs)
        limit = self.limit + (" not judged: loaded machine" if loaded else " missed") * missed
        return self.unit, describe(self.ours), self.against, describe(self.theirs), shown, limit


def describe(figures: Sequence[float]) -> str:
    """Return the median, and the least and the greatest."""
    digits = max(0, 3 - len(f"{median(figures):.0f}")) if figures else 0
    shown = (
        [f"{figure:.{digits}f}" for figure in (median(figures), min(figures), max(figures))]
        if figures
        else [""]
    )
    return "{} ({} - {})".format(*shown) if len(figures) > 1 else shown[0]


def take_turns(*sides: Callable[[], T], rounds: int = ROUNDS) -> list[list[T]]:
    """Run all ``sides`` in each round, every other one backwards, and return what each gave."""
    gave: list[list[T]] = [[] for _ in sides]
    for number in range(rounds):
        for index in range(len(sides))[:: -1 if number % 2 else 1]:
            gave[index].append(sides[index]())
    return gave


@contextmanager
def running(command: Sequence[object], **streams: Any) -> Iterator[Process]:
    """Run a process for the time of the context."""
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | streams
    with subprocess.Popen([*map(str, command)], **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(command: Sequence[object], **streams: Any) -> Iterator[tuple[str, Process]]:
    """Run a server for the time of the context, which gets its endpoint as well."""
    with running(command, stderr=subprocess.PIPE, **streams) as process:
        assert process.stderr
        yield (
            next(line.split()[-1].decode() for line in process.stderr if b"listening on" in line),
            process,
        )


def find_free_endpoint() -> str:
    """Return an endpoint where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def time_run(command: Sequence[object], lines: bytes = b"") -> float:
    """Return the milliseconds of a whole process, which is fed ``lines`` and prints them to a file."""
    with open(FOLDER / "replies", "w+b") as file:
        started = time.perf_counter()
        subprocess.run([*map(str, command)], input=lines, stdout=file, check=True)
        taken = time.perf_counter() - started
        file.seek(0)
        assert not lines or file.read() == lines, f"{command} printed something else"
    return taken * 1000


def time_message(command: Sequence[object]) -> float:
    """Return the microseconds that a sender takes for one message, its start-up taken out."""
    few, many = (
        b"".join(b"%d\n" % number for number in range(size)) for size in (100, 100 + MESSAGES)
    )
    start_up = time_run(command, few)
    return (time_run(command, many) - start_up) * 1000 / MESSAGES


def measure_message() -> Results:
    source = FOLDER / "loop.c"
    source.write_text(LOOP_IN_C)
    compiler = shutil.which("cc") or "false"
    compiled = subprocess.run(
        [compiler, "-O2", "-o", FOLDER / "loop", source, "-lzmq"], capture_output=True
    )
    with serving(ECHO) as (endpoint, _):
        sides: list[list[object]] = [
            [*SEND, endpoint],
            [sys.executable, "-c", LOOP, endpoint],
            [FOLDER / "loop", endpoint],
        ]
        if compiled.returncode:
            del sides[2:]
        ours, theirs, *in_c = take_turns(*(partial(time_message, side) for side in sides))
    alone = len(os.sched_getaffinity(0)) == 1
    yield Result("µs", ours, "pyzmq loop", theirs, "<= 1.10" if alone else "<= 0.75")
    for column in in_c:
        yield Result("µs", ours, "C loop", column, "" if alone else "<= 0.80")
    if not in_c:
        yield Result("µs", [], "C loop: skipped, no compiler or zmq.h")


def measure_message_on_one_core() -> Results:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield from measure_message()
    finally:
        os.sched_setaffinity(0, cores)


def measure_message_with_curve() -> Results:
    for name in "server", "client":
        create_certificates(FOLDER, name)
        (FOLDER / f"{name}.key_secret").chmod(0o600)
    server = ["--key", FOLDER / "server.key_secret", "--client-keys", FOLDER / "client.key"]
    client = ["--key", FOLDER / "client.key_secret", "--server-key", FOLDER / "server.key"]
    with serving([*QUIET, *server]) as (keyed, _), serving(QUIET) as (plain, _):
        sides = [*SEND, keyed, *client], [*SEND, plain]
        ours, theirs = take_turns(*(partial(time_message, side) for side in sides))
    yield Result("µs", ours, "without", theirs)


def measure_quoted_message() -> Results:
    with serving(ECHO) as (endpoint, _):
        sides: list[list[object]] = [[*SEND, endpoint, "--quoted"], [*SEND, endpoint]]
        ours, theirs = take_turns(*(partial(time_message, side) for side in sides))
    yield Result("µs", ours, "without", theirs, "<= 1.15")


def measure_reply() -> Results:
    sides = (
        partial(count_requests, [*QUIET, *options], 16) for options in (["--reply", "hello"], [])
    )
    ours, theirs = take_turns(*sides, rounds=9)
    yield Result("requests/s", ours, "echo", theirs, ">= 0.95")


def measure_programs() -> Results:
    commands = [[*QUIET, "--exec", "cat"], [*QUIET, "--filter", "cat"], QUIET]
    with ExitStack() as stack:
        endpoints = [stack.enter_context(serving(command))[0] for command in commands]
        for_each, filtered, echo = take_turns(
            *(partial(time_request, endpoint) for endpoint in endpoints)
        )
    yield Result("ms", for_each, "echo", echo, part="--exec cat")
    yield Result("ms", filtered, "echo", echo, "<= 0.3 ms", part="--filter cat")
    yield Result("ms", filtered, "--exec cat", for_each, part="--filter cat")


def time_request(endpoint: str, count: int = 50) -> float:
    """Return the milliseconds of a request and its reply."""
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.linger = 0
        client.connect(endpoint)
        for number in range(count + 1):
            if number == 1:
                started = time.perf_counter()
            client.send(b"hello")
            assert client.recv() == b"hello"
        return (time.perf_counter() - started) * 1000 / count


def measure_start() -> Results:
    script = Path(sys.executable).with_name("zmqmsg")
    nngcat, free = shutil.which("nngcat"), find_free_endpoint()
    with (
        serving(ECHO) as (endpoint, _),
        running([nngcat or "true", "--rep", "--listen", free, "--data", "hi"]),
    ):
        (FOLDER / "bare.py").write_text(BARE_SCRIPT.replace("ENDPOINT", endpoint))
        sides = [
            [*([script] if script.exists() else SEND[:3]), *SEND[3:], endpoint, "hi"],
            [sys.executable, FOLDER / "bare.py", "hi"],
            [nngcat or "true", "--req", "--dial", free, "--data", "hi", "--raw"],
        ]
        ours, bare, nng = take_turns(*(partial(time_run, side) for side in sides), rounds=21)
    yield Result("ms", ours, "bare script", bare, "<= 1.05", part=", whole process")
    if nngcat:
        yield Result("ms", ours, "nngcat", nng, part=", whole process")


def measure_instructions() -> Results:
    if not shutil.which("valgrind"):
        return
    with serving(ECHO) as (endpoint, _):
        (FOLDER / "bare.py").write_text(BARE_SCRIPT.replace("ENDPOINT", endpoint))
        bare = count_instructions([sys.executable, FOLDER / "bare.py", "hi"])
        yield Result(
            "million",
            [count_instructions([*SEND, endpoint, "hi"])],
            "bare script",
            [bare],
            "<= 1.00",
        )
    yield Result(
        "million",
        [count_instructions([*SEND[:3], "send", "--help"])],
        "bare script",
        [bare],
        part=" (--help)",
    )


def count_instructions(command: Sequence[object]) -> float:
    """Return the millions of instructions that a process takes, of which some vary with the hashes of strings."""
    valgrind = [
        "valgrind",
        "--tool=callgrind",
        f"--callgrind-out-file={FOLDER}/callgrind",
        *map(str, command),
    ]
    done = subprocess.run(
        valgrind, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "0"}, check=True
    )
    return int(done.stderr.partition(b"Collected : ")[2].split()[0]) / 1e6


def measure_serve(clients: int, quiet: bool) -> Results:
    sides = (
        partial(count_requests, command, clients) for command in (QUIET if quiet else SERVE, ECHO)
    )
    ours, theirs = take_turns(*sides, rounds=9)
    yield Result("requests/s", ours, "bare loop", theirs, ">= 0.95" if quiet else ">= 0.85")


def count_requests(command: Sequence[object], clients: int, seconds: float = 0.3) -> float:
    """Return how many requests a second a new server answers, each client waiting for its reply.

    New, since the rates of two processes of the same program differ by a tenth as long as they run.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(FOLDER / "requests", "wb"))
        endpoint, _ = stack.enter_context(serving(command, stdout=file))
        poll = stack.enter_context(select.epoll())
        sockets = {}
        for _ in range(clients):
            client = stack.enter_context(
                socket.create_connection(("127.0.0.1", endpoint.split(":")[-1]))
            )
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(GREETING + READY)
            size = client.recv(len(GREETING) + 2, socket.MSG_WAITALL)[-1]
            client.recv(size, socket.MSG_WAITALL)
            poll.register(client, select.EPOLLIN)
            sockets[client.fileno()] = client
            client.sendall(REQUEST)
        replies, started = 0, time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds:
            ready = poll.poll()
            for number, _event in ready:
                assert sockets[number].recv(len(REQUEST), socket.MSG_WAITALL) == REQUEST
                sockets[number].sendall(REQUEST)
            replies += len(ready)
    return replies / taken


def measure_large() -> Results:
    with open(FOLDER / "requests", "wb") as file:
        sides = (partial(echo_large, command, file) for command in (QUIET, SERVE, ZERO_COPY_ECHO))
        quiet, printed, bare = (list(zip(*side, strict=True)) for side in take_turns(*sides))
    for ours, part, limit in (quiet, ", --quiet", "<= 1.10"), (printed, ", > file", ""):
        yield Result("ms", ours[0], "zero-copy loop", bare[0], limit, part)
        yield Result(
            "messages",
            ours[1],
            "zero-copy loop",
            bare[1],
            "<= 1.5 messages",
            part + ", peak memory",
        )


def echo_large(command: Sequence[object], file: Any) -> tuple[float, float]:
    """Return the milliseconds of a large message to a server and back, and the messages of memory that it took."""
    with (
        serving(command, stdout=file) as (endpoint, server),
        zmq.Context() as context,
        context.socket(zmq.REQ) as client,
    ):
        client.linger = 0
        client.connect(endpoint)

        def ask(request: bytes) -> float:
            started = time.perf_counter()
            client.send(request, copy=False)
            client.recv(copy=False)
            return (time.perf_counter() - started) * 1000

        ask(b"hi")
        idle = read_memory(server, "VmRSS")
        taken = ask(bytes(LARGE))
        ask(b"hi")  # answered only when the large one is printed
        return taken, (read_memory(server, "VmHWM") - idle) * 1024 / LARGE


def read_memory(process: Process, field: str) -> int:
    """Return a field of a process's status, in KiB."""
    return int(Path(f"/proc/{process.pid}/status").read_text().split(f"{field}:")[1].split()[0])


def measure_stream() -> Results:
    line, replies = b"hello there\n", FOLDER / "replies"
    with (
        open(FOLDER / "requests", "wb") as requests,
        open(replies, "wb") as file,
        ExitStack() as stack,
    ):
        endpoint, server = stack.enter_context(serving(SERVE, stdout=requests))
        sender = stack.enter_context(running([*SEND, endpoint], stdin=subprocess.PIPE, stdout=file))

        def feed(size: int, total: int) -> list[int]:
            assert sender.stdin
            sender.stdin.write(line * size)
            sender.stdin.flush()
            while replies.stat().st_size < len(line) * total and sender.poll() is None:
                time.sleep(0.05)
            return [read_memory(process, "VmRSS") for process in (sender, server)]

        before = feed(STREAM // 10, STREAM // 10)
        after = feed(STREAM - STREAM // 10, STREAM)
    for name, first, last in zip(("send", "serve"), before, after, strict=True):
        yield Result("KiB", [last - first], limit="<= 2048 KiB", part=name)


def measure_idle() -> Results:
    with (
        serving(SERVE) as (endpoint, server),
        running([*SEND, find_free_endpoint(), "hi"]) as lonely,
    ):
        with running([*SEND, endpoint], stdin=subprocess.PIPE) as reading:
            names = {"serve": server, "send, no server": lonely, "send, no input": reading}
            time.sleep(1.5)
            before = [spend(process) for process in names.values()]
            time.sleep(3)
            spent = [
                (spend(process) - first) / 3
                for process, first in zip(names.values(), before, strict=True)
            ]
    for name, figure in zip(names, spent, strict=True):
        yield Result("ms/s", [figure], limit="<= 5 ms/s", part=name)


def spend(process: Process) -> float:
    """Return the milliseconds of CPU that a process has spent; Linux makes the number of its clock from its own."""
    return time.clock_gettime(~process.pid << 3 | 2) * 1000


ROWS: dict[str, Callable[[], Results]] = {
    "send, a message": measure_message,
    "send, a message, one core": measure_message_on_one_core,
    "send, a message, CURVE": measure_message_with_curve,
    "send --quoted, a message": measure_quoted_message,
    "send hi": measure_start,
    "send hi, instructions": measure_instructions,
    **{
        f"serve {'--quiet' if quiet else '> file'}, clients: {clients}": partial(
            measure_serve, clients, quiet
        )
        for quiet in (True, False)
        for clients in (1, 16, 64, 256)
    },
    "serve --reply, clients: 16": measure_reply,
    "a request through serve ": measure_programs,
    "serve, 64 MiB": measure_large,
    f"memory grown in {STREAM:,} messages, ": measure_stream,
    "CPU of an idle ": measure_idle,
}


def give_up(*_signal: object) -> None:
    """Stop waiting for a row; on the way out all processes are ended."""
    raise TimeoutError


def main() -> None:
    """Measure, and print the table."""
    signal.signal(signal.SIGALRM, give_up)
    compileall.compile_dir(
        Path(__file__).parent.parent / "zmqmsg", quiet=1
    )  # as an installation does
    words = [word for word in sys.argv[1:] if word != "--full"]
    lines: list[tuple[str, ...]] = [("work", "unit", "zmqmsg", "against", "", "ratio", "limit")]
    for name, measure in ROWS.items():
        if not words or any(word in name for word in words):
            if sys.stderr.isatty():
                print(f"\r\033[K{name} ...", end="", file=sys.stderr, flush=True)
            signal.alarm(LIMIT)
            lines += [(name + result.part, *result.columns()) for result in measure()]
    if sys.stderr.isatty():
        print(end="\r\033[K", file=sys.stderr, flush=True)
    for line in lines:
        print("{:46} {:10} {:24} {:14} {:24} {:>5}  {}".format(*line).rstrip())


if __name__ == "__main__":
    main()
