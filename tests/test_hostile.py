import itertools
import random
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest
import zmq
import zmq.auth

from zmqmsg.sockets import Context

from conftest import (
    LIMIT,
    LINUX,
    Serve,
    Start,
    address,
    descriptors,
    listening,
    memory,
    processor_time,
    soak,
    until,
)
from zmtp import command, frame, greeting, ready, request, say

with suppress(ImportError):  # Windows has none
    import resource

pytestmark = LINUX

MEMORY = 8 << 10  # KiB that a server may have grown by when a flood is over

DESCRIPTORS = 3  # file descriptors that a server may have more when a flood is over

HUGE = struct.pack(">Q", 1 << 62)
HELLO = greeting() + ready(b"DEALER")

# What one connection says, by a generator of random numbers.
Say = Callable[[random.Random], bytes]

HANDSHAKE_LIMIT = (
    30  # seconds after which libzmq cuts a connection off whose handshake is not finished
)

RUBBISH: dict[str, Say] = {
    "random bytes": lambda r: r.randbytes(r.randrange(1, 2000)),
    "random bytes that begin like ZeroMQ": lambda r: (
        b"\xff" + bytes(8) + b"\x7f" + r.randbytes(r.randrange(1, 2000))
    ),
    "nothing": lambda r: b"",
    "HTTP": lambda r: b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    "TLS": lambda r: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + r.randbytes(500),
    "greeting cut off": lambda r: greeting()[: r.randrange(1, 64)],
    "greeting of an unknown mechanism": lambda r: greeting(b"MAGIC") + r.randbytes(100),
    "greeting of a version to come": lambda r: (
        greeting(version=r.randbytes(2)) + ready(b"REQ") + request(b"x")
    ),
    "greeting that claims to be the server": lambda r: (
        greeting(as_server=b"\x01") + ready(b"REQ") + request(b"x")
    ),
    "CURVE hello cut off": lambda r: (
        greeting(b"CURVE") + command(b"HELLO", r.randbytes(194))[: r.randrange(1, 200)]
    ),
    "CURVE hello of rubbish": lambda r: (
        greeting(b"CURVE") + command(b"HELLO", b"\x01\x00" + r.randbytes(192))
    ),
    "PLAIN hello": lambda r: greeting(b"PLAIN") + command(b"HELLO", b"\x05admin\x05admin"),
    "command cut off": lambda r: HELLO[: r.randrange(64, len(HELLO))],
    "command whose length is a lie": lambda r: (
        greeting() + b"\x04" + r.randbytes(1) + r.randbytes(r.randrange(60))
    ),
    "command of 2^62 bytes": lambda r: greeting() + b"\x06" + HUGE + b"\x05READY",
    "property of 4 GiB": lambda r: (
        greeting() + command(b"READY", b"\x0bSocket-Type\xff\xff\xff\xffREQ")
    ),
    "unknown command": lambda r: HELLO + command(b"DANCE", r.randbytes(40)) + request(b"x"),
    "error command": lambda r: greeting() + command(b"ERROR", b"\xff" + r.randbytes(20)),
    "wrong socket type": lambda r: (
        greeting() + ready(r.choice([b"PUB", b"PAIR", b"REP", b"X" * 200])) + request(b"x")
    ),
    "ping": lambda r: HELLO + command(b"PING", b"\xff\xff" + r.randbytes(r.randrange(16))) * 20,
    "frame of 2^62 bytes": lambda r: HELLO + b"\x02" + HUGE + r.randbytes(1000),
    "frame just below the limit": lambda r: (
        HELLO + b"\x02" + struct.pack(">Q", 64 << 20) + r.randbytes(1000)
    ),
    "reserved flags": lambda r: HELLO + bytes([r.randrange(8, 256), 5]) + b"hello",
    "no delimiter": lambda r: HELLO + frame(b"no delimiter"),
    "no delimiter in many frames": lambda r: HELLO + frame(b"x", more=True) * 10 + frame(b"x"),
    "delimiter alone": lambda r: HELLO + frame(b"") * 10,
    "unfinished request": lambda r: (
        HELLO + frame(b"", more=True) + frame(r.randbytes(1000), more=True) * 3
    ),
    "request cut off": lambda r: HELLO + request(r.randbytes(3000))[: -r.randrange(1, 2900)],
    "tiny frames": lambda r: (
        HELLO + frame(b"", more=True) + frame(b"", more=True) * 5000 + frame(b"")
    ),
    "tiny frames without end": lambda r: (
        HELLO + frame(b"", more=True) + frame(b"x", more=True) * 5000
    ),
    "requests in a row": lambda r: HELLO + request(r.randbytes(200)) * 100,
    "2.0 cut off": lambda r: (b"\xff" + bytes(8) + b"\x7f\x01\x03\x00\x00")[: r.randrange(1, 14)],
    "2.0 frame of 2^62 bytes": lambda r: (
        b"\xff" + bytes(8) + b"\x7f\x01\x03\x00\x00\x03" + HUGE + r.randbytes(50)
    ),
    "2.0 rubbish": lambda r: b"\xff" + bytes(8) + b"\x7f\x01" + r.randbytes(300),
    "2.0 without a delimiter": lambda r: (
        b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + frame(b"x") * 5
    ),
    "1.0 frame of 2^62 bytes": lambda r: b"\x01\x00\xff" + HUGE + b"\x00" + r.randbytes(50),
    "1.0 rubbish": lambda r: b"\x01\x00" + r.randbytes(300),
    "1.0 frames of no length": lambda r: b"\x01\x00" + b"\x00" * 300,
    "1.0 without a delimiter": lambda r: b"\x01\x00" + b"\x02\x00x" * 20,
}


# What a server has and uses


class Measured:
    """A server, what it had when it was at rest, and whether it has come to rest again."""

    def __init__(self, serve: Serve, *arguments: str, **options: Any) -> None:
        """Start it, and let it meet each kind of rubbish once first: what it needs for that, it keeps."""
        self.process, self.endpoint = serve(*arguments, stdout=DEVNULL, **options)
        self.descriptors = descriptors(self.process.pid)
        flood(self.endpoint, range(len(RUBBISH)))
        self._wait_for_descriptors()
        self.memory = memory(self.process.pid)

    def assert_recovered(self) -> None:
        """Wait until memory and descriptors are back."""
        self._wait_for_descriptors()
        until(lambda: memory(self.process.pid) <= self.memory + MEMORY, self.__str__)
        assert self.process.popen.poll() is None

    def assert_idle(self) -> None:
        """Watch for a second whether the processor rests."""
        before = processor_time(self.process.pid)
        time.sleep(1)
        assert processor_time(self.process.pid) - before <= 0.05

    def _wait_for_descriptors(self) -> None:
        until(lambda: descriptors(self.process.pid) <= self.descriptors + DESCRIPTORS, self.__str__)

    def __str__(self) -> str:
        now = memory(self.process.pid), descriptors(self.process.pid)
        return (
            f"{now[0]} KiB, {self.memory} before; {now[1]} descriptors, {self.descriptors} before"
        )


# Those who attack, and those who do not


def hears(connection: socket.socket, expected: bytes) -> bool:
    """Read until ``expected`` has come, and return whether it has before the end."""
    heard = b""
    while not heard.endswith(expected):
        if not (data := connection.recv(65536)):
            return False
        heard += data
    return True


def shake_hands(connection: socket.socket) -> bool:
    """Finish the handshake of a DEALER with a REP socket: libzmq hangs up on whoever speaks before it is over."""
    connection.sendall(HELLO)
    return hears(connection, ready(b"REP"))


def attack(endpoint: str, number: int) -> socket.socket:
    """Connect as the attacker of this number does, say the rubbish, and return the connection."""
    numbers = random.Random(number)
    rubbish = list(RUBBISH.values())[number % len(RUBBISH)]
    connection = socket.create_connection(address(endpoint), LIMIT)
    if number % 3 == 0:  # a third is gone with a RST
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        said = rubbish(numbers)
        if said.startswith(HELLO):
            shake_hands(connection)
        connection.sendall(said.removeprefix(HELLO))
    return connection


def flood(endpoint: str, numbers: Sequence[int], at_once: int = 40) -> None:
    """Let the attackers come one after the other, ``at_once`` of them connected."""
    connections: deque[socket.socket] = deque()
    with ExitStack() as stack:
        for number in numbers:
            connections.append(stack.enter_context(attack(endpoint, number)))
            if len(connections) > at_once:
                connections.popleft().close()


@contextmanager
def honest(start: Start, endpoint: str, *options: str) -> Iterator[None]:
    """Ask without a pause, one client for all requests and one for each, and get every reply."""
    begun, over = threading.Event(), threading.Event()
    patient = ["send", "-c", endpoint, "-t", "2", "-r", "10", *options]

    def numbers() -> Iterator[bytes]:
        numbers = itertools.takewhile(
            lambda number: number < 3 or not over.is_set(), itertools.count()
        )
        return (b"%d" % number for number in numbers)

    def ask_on() -> None:
        client = start(*patient)
        for number in numbers():
            client.send_line(number)
            assert client.read_line() == number
            begun.set()
        assert client.finish()[:2] == (0, b"")

    def ask_anew() -> None:
        for number in numbers():
            assert start(*patient, number).finish(2 * LIMIT)[:2] == (0, number + b"\n")

    with ThreadPoolExecutor() as executor:
        asking = [executor.submit(ask) for ask in (ask_on, ask_anew)]
        try:
            until(lambda: begun.is_set() or asking[0].done())
            yield
        finally:
            over.set()
        for asked in asking:
            asked.result(2 * LIMIT)


def half_open(endpoint: str, count: int, stack: ExitStack) -> list[socket.socket]:
    """Open connections that say nothing, or a part of a greeting."""
    connections = []
    for number in range(count):
        connection = stack.enter_context(socket.create_connection(address(endpoint), LIMIT))
        connection.sendall(HELLO[: number % 80])
        connections.append(connection)
    return connections


def is_cut_off(connection: socket.socket) -> bool:
    """Return whether the server closes the connection, once all that it said before is read."""
    with suppress(ConnectionResetError):
        try:
            while connection.recv(65536):
                pass
        except TimeoutError:
            return False
    return True


# Against serve


@pytest.mark.parametrize("connections", [100, pytest.param(5000, marks=soak)])
@pytest.mark.parametrize("keyed", [False, True], ids=["open", "keyed"])
def test_a_flood_of_rubbish_keeps_no_honest_client_from_its_replies_and_leaves_nothing_behind(
    serve: Serve, start: Start, tmp_path: Path, keyed: bool, connections: int
) -> None:
    """Of the full flood, finished requests of thousands of frames are left out: libzmq gives back their memory late."""
    _, secret = zmq.auth.create_certificates(tmp_path, "client")
    Path(secret).chmod(0o600)
    keys = ["--key", f"{tmp_path}/server.key_secret", "--client-keys", f"{tmp_path}/client.key"]
    server = Measured(serve, *keys * keyed)
    late = list(RUBBISH).index("tiny frames") if connections > 1000 else None
    with honest(
        start, server.endpoint, *["--key", secret, "--server-key", f"{tmp_path}/server.key"] * keyed
    ):
        flood(
            server.endpoint,
            [number for number in range(connections) if number % len(RUBBISH) != late],
        )
    server.assert_recovered()
    server.assert_idle()
    server.process.popen.terminate()
    assert server.process.finish()[0] == 0


@soak
def test_half_open_connections_keep_no_honest_client_out_and_are_cut_off(
    serve: Serve, start: Start
) -> None:
    server = Measured(serve)
    with ExitStack() as stack:
        started = time.monotonic()
        connections = half_open(server.endpoint, 500, stack)
        for connection in connections:
            connection.settimeout(HANDSHAKE_LIMIT + LIMIT)
        assert start("send", "-c", server.endpoint, "hello").finish()[1] == b"hello\n"
        assert time.monotonic() - started < HANDSHAKE_LIMIT, "before any connection is cut off"
        assert all(is_cut_off(connection) for connection in connections)
        assert time.monotonic() - started < HANDSHAKE_LIMIT + LIMIT / 2
        server.assert_recovered()


@pytest.mark.parametrize(
    ("requests", "size"), [(200, 10_000), pytest.param(5000, 50_000, marks=soak)]
)
def test_a_client_that_never_reads_its_replies_keeps_nobody_from_theirs(
    serve: Serve, start: Start, requests: int, size: int
) -> None:
    server = Measured(serve)
    assert start("send", "-c", server.endpoint, "x" * size).finish()[0] == 0
    server.memory = memory(server.process.pid)
    with socket.create_connection(address(server.endpoint), LIMIT) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert shake_hands(deaf)
        deaf.settimeout(
            1
        )  # the kernel may hold its requests back, as its window for replies is closed
        with honest(start, server.endpoint), suppress(TimeoutError):
            for _ in range(requests):
                deaf.sendall(request(bytes(size)))
    server.assert_recovered()


@pytest.mark.parametrize("connections", [60, pytest.param(400, marks=soak)])
def test_a_server_without_descriptors_serves_again_as_soon_as_it_has_some(
    serve: Serve, start: Start, connections: int
) -> None:
    most = 40

    def limit_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    server = Measured(serve, preexec_fn=limit_descriptors)
    early = start("send", "-c", server.endpoint, "-t", str(LIMIT))

    def exchange() -> None:
        early.send_line(b"x")
        assert early.read_line() == b"x"

    exchange()
    with ExitStack() as stack:
        half_open(server.endpoint, connections, stack)
        until(
            lambda: descriptors(server.process.pid) == most, lambda: descriptors(server.process.pid)
        )
        exchange()
        late = start("send", "-c", server.endpoint, "late")
        late.wait_for_notice("connected, but no ZeroMQ greeting yet")
    assert late.finish()[:2] == (0, b"late\n")
    assert early.finish()[:2] == (0, b"")
    server.assert_recovered()
    server.assert_idle()


def test_serve_raises_its_limit_of_descriptors(context: Context, serve: Serve) -> None:
    def limit_descriptors() -> None:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )

    process, _ = serve(preexec_fn=limit_descriptors)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)


def test_one_connection_cannot_fill_the_memory_of_serve(serve: Serve, context: Context) -> None:
    process, endpoint = serve("--quiet", "--exec", "sleep 1; cat")
    before = memory(process.pid)
    with socket.create_connection(address(endpoint), LIMIT) as pushy:
        assert shake_hands(pushy)
        pushy.settimeout(1)
        with suppress(TimeoutError):
            for _ in range(200):
                pushy.sendall(request(bytes(1 << 20)))
        assert memory(process.pid) - before < 64 << 10


def test_one_connection_cannot_fill_the_memory_of_an_idle_send(start: Start) -> None:
    sent: list[int] = []
    full = threading.Event()

    def flood_with_replies(connection: socket.socket) -> None:
        connection.sendall(greeting() + ready(b"REP"))
        connection.settimeout(1)
        with suppress(TimeoutError):
            for _ in range(200):
                connection.sendall(request(bytes(1 << 20)))
                sent.append(1)
        full.set()
        hears(connection, b"never said")

    with listening(flood_with_replies) as endpoint:
        client = start("send", "--verbose", "-c", endpoint)
        client.send_line(b"x")
        client.wait_for_notice("connected to")
        assert full.wait(LIMIT)
        assert memory(client.pid) < 100 << 10
    assert len(sent) < 50


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=soak)])
def test_no_request_of_a_pipelining_client_is_lost(
    serve: Serve, context: Context, count: int
) -> None:
    _process, endpoint = serve("--quiet")
    client = context.socket(zmq.DEALER)
    client.rcvtimeo = LIMIT * 1000
    client.sndhwm = client.rcvhwm = 0
    client.connect(endpoint)
    for number in range(count):
        client.send_multipart([b"", b"%d" % number])
    assert [int(client.recv_multipart()[1]) for _ in range(count)] == list(range(count))


def test_a_request_that_never_ends_is_given_up_with_its_connection(
    serve: Serve, start: Start
) -> None:
    server = Measured(serve)
    with socket.create_connection(address(server.endpoint), LIMIT) as endless:
        assert shake_hands(endless)
        endless.sendall(frame(b"", more=True))
        for _ in range(300):
            endless.sendall(frame(bytes(100_000), more=True))
        until(lambda: memory(server.process.pid) > server.memory + MEMORY, server.__str__)
        assert start("send", "-c", server.endpoint, "hello").finish()[1] == b"hello\n"
    server.assert_recovered()


def test_a_large_request_takes_its_memory_once(serve: Serve, context: Context) -> None:
    process, endpoint = serve("--quiet")
    client = context.socket(zmq.REQ)
    client.rcvtimeo = LIMIT * 1000
    client.connect(endpoint)
    client.send(b"small")
    client.recv()
    before, size = memory(process.pid), 64 << 20
    client.send(bytes(size), copy=False)
    assert len(client.recv(copy=False)) == size
    assert memory(process.pid, "VmHWM") - before < 1.5 * size / 1024


def test_a_reply_that_a_stranger_makes_the_server_drop_is_had_by_another_attempt(
    serve: Serve, start: Start
) -> None:
    """After a request without a delimiter, from a peer that is gone, a REP socket drops its next reply (rep.cpp)."""
    process, endpoint = serve()
    long = (
        "x" * 100_000
    )  # more than a pipe holds: the server prints it, and takes no further request
    assert start("send", "-c", endpoint, long).finish()[0] == 0
    with socket.create_connection(address(endpoint), LIMIT) as stranger:
        assert shake_hands(stranger)
        stranger.sendall(frame(b"no delimiter"))
        stranger.shutdown(socket.SHUT_WR)
        assert is_cut_off(stranger)
    assert process.read_line() == long.encode()
    status, output, _notices = start("send", "-c", endpoint, "--timeout", "1", "hello").finish()
    assert (status, output) == (0, b"hello\n")


# Against send


def replying(reply: bytes, connection: socket.socket) -> None:
    """Finish the handshake of a REP socket, wait for the request, say ``reply`` and hang up."""
    connection.sendall(greeting() + ready(b"REP"))
    if hears(connection, request(b"hello")):
        connection.sendall(reply)


ANSWERS = {
    **{f"rubbish {seed}": partial(say, random.Random(seed).randbytes(1000)) for seed in range(3)},
    "ZeroMQ rubbish": partial(say, greeting() + random.Random(4).randbytes(1000)),
    "PUB": partial(say, greeting() + ready(b"PUB") + frame(b"hello") * 10),
    "rubbish for a reply": partial(replying, b"\xfa" * 1000),
    "reply without a delimiter": partial(replying, frame(b"hello")),
    "reply of 2^62 bytes": partial(replying, b"\x01\x00\x02" + HUGE + bytes(1000)),
    "reply cut off": partial(replying, request(b"hello" * 1000)[:-1]),
    "reply cut off in its length": partial(replying, request(b"hello" * 1000)[:8]),
    "reply cut off between its frames": partial(
        replying, frame(b"", more=True) + frame(b"hello", more=True)
    ),
}


def test_a_server_that_answers_badly_is_an_error_and_prints_nothing(start: Start) -> None:
    with ExitStack() as stack:
        clients = {
            what: start(
                "send", "-c", stack.enter_context(listening(answer)), "-t", "1", "-r", "1", "hello"
            )
            for what, answer in ANSWERS.items()
        }
        ends = {what: client.finish() for what, client in clients.items()}
    for what, (status, output, notices) in ends.items():
        asked = "reply" in what
        assert (status, output) == (3 if asked else 1, b""), what
        expected = "no reply to 'hello'" if asked else "no server at|it is a PUB|it does not speak"
        assert re.match(f"zmqmsg: .*({expected})", notices[-1]), what


def test_a_reply_that_is_too_large_is_not_held(start: Start) -> None:
    """A frame's length comes first: the rest of it is not even read."""
    sent: list[int] = []

    def answer(connection: socket.socket) -> None:
        replying(frame(b"", more=True) + b"\x02" + struct.pack(">Q", 1 << 30), connection)
        for _ in range(200):
            connection.sendall(bytes(1 << 20))
            sent.append(1)

    with listening(answer) as endpoint:
        status, output, notices = start("send", "-c", endpoint, "hello").finish()
    assert (status, output) == (3, b"")
    assert "a frame exceeds --max-size" in notices[-1]
    assert len(sent) < 50


@pytest.mark.parametrize("reply", ["no empty frame", "too large"])
@pytest.mark.parametrize("curve", [False, True], ids=["NULL", "CURVE"])
def test_a_request_whose_reply_is_rejected_is_served_once(
    context: Context, start: Start, tmp_path: Path, reply: str, curve: bool
) -> None:
    """Another attempt would bring the same reply."""
    options = []
    server = context.socket(zmq.ROUTER)
    if curve:
        public, secret = zmq.auth.create_certificates(tmp_path, "server")
        server.curve_server = True
        server.curve_secretkey = zmq.auth.load_certificate(secret)[1] or b""
        options = ["--server-key", public]
    endpoint = f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}"
    client = start("send", "-c", endpoint, "--max-size", "64K", *options, "hello", "never sent")
    assert server.poll(LIMIT * 1000)
    identity, empty, body = server.recv_multipart()
    server.send_multipart(
        [identity, body] if reply == "no empty frame" else [identity, empty, bytes(1 << 17)]
    )
    status, output, notices = client.finish()
    assert not server.poll(100)
    assert (status, output, len(notices)) == (3, b"", 1)
    assert re.search(
        r"no reply to 'hello' \(1 attempt, .*was rejected: it lacks the empty frame.*--max-size",
        notices[0],
    )
