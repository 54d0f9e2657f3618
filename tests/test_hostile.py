"""Peers that mean harm, or do not know what they do: they keep nobody from anything for long."""

import itertools
import random
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
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
    bind,
    descriptors,
    listening,
    memory,
    open_server,
    processor_time,
    soak,
    stop,
    until,
)
from zmtp import command, frame, greeting, ready, request

with suppress(ImportError):  # Windows has none
    import resource

pytestmark = LINUX

# What a server may have more when a flood is over
MEMORY = 8 << 10  # KiB
DESCRIPTORS = 3

HUGE = struct.pack(">Q", 1 << 62)
HELLO = greeting() + ready(b"DEALER")

# What one connection says, by a generator of random numbers. How libzmq reads it is libzmq's to
# test; these are the ways to end: before, in and after the handshake, and in a request.
RUBBISH: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": lambda r: r.randbytes(r.randrange(1, 2000)),
    "greeting cut off": lambda r: greeting()[: r.randrange(64)],
    "CURVE hello of rubbish": lambda r: (
        greeting(b"CURVE") + command(b"HELLO", b"\x01\x00" + r.randbytes(192))
    ),
    "wrong socket type": lambda r: greeting() + ready(b"PUB"),
    "frame of 2^62 bytes": lambda r: HELLO + b"\x02" + HUGE + r.randbytes(1000),
    "no delimiter": lambda r: HELLO + frame(b"no delimiter"),
    "request cut off": lambda r: HELLO + request(r.randbytes(3000))[: -r.randrange(1, 2900)],
    "requests whose replies nobody reads": lambda r: HELLO + request(r.randbytes(5000)) * 100,
}


# What a server has and uses


class Measured:
    """A server, what it had when it was at rest, and whether it has come to rest again."""

    def __init__(self, serve: Serve, *arguments: str, **options: Any) -> None:
        """Start it, and let it meet each kind of rubbish: what it needs for that, it keeps."""
        self.process, self.endpoint = serve(*arguments, stdout=DEVNULL, **options)
        self.descriptors = descriptors(self.process.pid)
        flood(self.endpoint, len(RUBBISH))
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
        time.sleep(1)  # in which nothing must happen
        assert processor_time(self.process.pid) - before <= 0.05

    def _wait_for_descriptors(self) -> None:
        until(lambda: descriptors(self.process.pid) <= self.descriptors + DESCRIPTORS, self.__str__)

    def __str__(self) -> str:
        now = memory(self.process.pid), descriptors(self.process.pid)
        before = self.memory, self.descriptors
        return f"{now} KiB and descriptors, {before} before"


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
    """Finish the handshake of a DEALER: libzmq hangs up on whoever speaks before it is over."""
    connection.sendall(HELLO)
    return hears(connection, ready(b"REP"))


def attack(endpoint: str, number: int) -> socket.socket:
    """Connect as the attacker of this number does, say the rubbish, and return the connection."""
    rubbish = list(RUBBISH.values())[number % len(RUBBISH)]
    connection = socket.create_connection(address(endpoint), LIMIT)
    if number % 3 == 0:  # a third is gone with a RST
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        said = rubbish(random.Random(number))
        if said.startswith(HELLO):
            shake_hands(connection)
        connection.sendall(said.removeprefix(HELLO))
    return connection


def flood(endpoint: str, count: int, at_once: int = 40) -> None:
    """Let attackers come one after the other, ``at_once`` of them connected."""
    connections: deque[socket.socket] = deque()
    with ExitStack() as stack:
        for number in range(count):
            connections.append(stack.enter_context(attack(endpoint, number)))
            if len(connections) > at_once:
                connections.popleft().close()


@contextmanager
def honest(start: Start, endpoint: str, *options: str) -> Iterator[None]:
    """Ask without a pause, one client for all requests and one for each, and get every reply."""
    begun, over = threading.Event(), threading.Event()
    patient = ["send", "-c", endpoint, "-t", "5", "-r", "10", *options]

    def numbers() -> Iterator[bytes]:
        for number in itertools.count():
            if number > 2 and over.is_set():
                return
            yield b"%d" % number

    def ask_on() -> None:
        client = start(*patient)
        for number in numbers():
            client.send_line(number)
            assert client.read_line() == number
            begun.set()
        assert client.finish()[:2] == (0, b"")

    def ask_anew() -> None:
        for number in numbers():
            assert start(*patient, number).finish()[:2] == (0, number + b"\n")

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
def test_a_flood_of_rubbish_harms_no_honest_client_and_leaves_nothing(
    serve: Serve, start: Start, tmp_path: Path, keyed: bool, connections: int
) -> None:
    _, secret = zmq.auth.create_certificates(tmp_path, "client")
    Path(secret).chmod(0o600)
    keys = ["--key", f"{tmp_path}/server.key_secret", "--client-keys", f"{tmp_path}/client.key"]
    client_keys = ["--key", secret, "--server-key", f"{tmp_path}/server.key"]
    server = Measured(serve, *keys * keyed)
    with honest(start, server.endpoint, *client_keys * keyed):
        flood(server.endpoint, connections)
    server.assert_recovered()
    server.assert_idle()
    server.process.popen.terminate()
    assert server.process.finish()[0] == 0


@soak
def test_half_open_connections_keep_nobody_out_and_are_cut_off(serve: Serve, start: Start) -> None:
    server = Measured(serve)
    with ExitStack() as stack:
        connections = half_open(server.endpoint, 500, stack)
        assert start("send", "-c", server.endpoint, "hello").finish()[1] == b"hello\n"
        assert all(is_cut_off(connection) for connection in connections)
        server.assert_recovered()


def test_a_server_without_descriptors_serves_again_when_it_has_some(
    serve: Serve, start: Start
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
        half_open(server.endpoint, 60, stack)
        until(lambda: descriptors(server.process.pid) == most, server.__str__)
        exchange()
        late = start("send", "-c", server.endpoint, "late")
        late.wait_for_notice("connected, but no ZeroMQ greeting yet")
    assert late.finish()[:2] == (0, b"late\n")
    assert early.finish()[:2] == (0, b"")
    server.assert_recovered()
    server.assert_idle()


LARGE = "while [ ! -e go ]; do sleep 0.02; done; head -c 200000 /dev/zero | tr '\\0' x"


@pytest.mark.parametrize(
    "options",
    [
        ["--reply", "x" * 100_000],
        ["--exec", f"echo begun >&2; {LARGE}"],
        ["--filter", f"echo begun >&2; read line; {LARGE}; echo; cat"],
    ],
    ids=["reply", "command", "filter"],
)
def test_a_large_reply_needs_no_descriptors(
    context: Context, serve: Serve, start: Start, tmp_path: Path, options: list[str]
) -> None:
    most = 48

    def limit_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    process, endpoint = serve(*options, cwd=tmp_path, preexec_fn=limit_descriptors)
    client = context.socket(zmq.REQ)
    client.rcvtimeo = LIMIT * 1000
    monitor = client.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    client.connect(endpoint)
    assert monitor.poll(LIMIT * 1000)
    if options[0] == "--exec":
        client.send(b"x")
    if options[0] != "--reply":
        process.wait_for_notice("begun")
    with ExitStack() as stack:
        half_open(endpoint, 60, stack)
        until(lambda: descriptors(process.pid) == most)
        if options[0] != "--exec":
            client.send(b"x")
        (tmp_path / "go").touch()
        assert set(client.recv()) == {ord("x")}
    client.disable_monitor()
    assert start("send", "--connect", endpoint, "y").finish()[0] == 0
    assert stop(process)[0] == 0


def test_a_worker_without_descriptors_finds_its_broker_again(
    context: Context, serve: Serve
) -> None:
    most = 48

    def limit_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    broker, back = open_server(context, zmq.DEALER)
    process, endpoint = serve("--connect", back, preexec_fn=limit_descriptors)
    process.wait_for_notice("connected to")
    with ExitStack() as stack:
        half_open(endpoint, 60, stack)
        until(lambda: descriptors(process.pid) == most)
        broker.close()
        process.wait_for_notice("cannot open a socket: Too many open files.*; trying again")
    broker, _ = open_server(context, zmq.DEALER, back)
    broker.send_multipart([b"", b"x"])
    assert broker.recv_multipart() == [b"", b"x"]
    assert stop(process)[:2] == (0, b"x\n")


def test_serve_raises_its_limit_of_descriptors(serve: Serve) -> None:
    def limit_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))

    process, _ = serve(preexec_fn=limit_descriptors)
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (512, 512)


def test_one_connection_cannot_fill_the_memory_of_serve(serve: Serve) -> None:
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
    full = threading.Event()

    def flood_with_replies(connection: socket.socket) -> None:
        connection.sendall(greeting() + ready(b"REP"))
        connection.settimeout(1)
        with suppress(TimeoutError):
            for _ in range(200):
                connection.sendall(request(bytes(1 << 20)))
        full.set()
        hears(connection, b"never said")

    with listening(flood_with_replies) as endpoint:
        client = start("send", "--verbose", "-c", endpoint)
        client.send_line(b"x")
        client.wait_for_notice("connected to")
        assert full.wait(LIMIT)
        assert memory(client.pid) < 100 << 10


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


def test_a_reply_that_a_stranger_makes_the_server_drop_is_asked_for_again(
    serve: Serve, start: Start
) -> None:
    """A REP drops its next reply after a bad request from a peer that is gone (rep.cpp)."""
    process, endpoint = serve()
    long = "x" * 100_000  # more than a pipe holds: the server prints it, and reads no request
    assert start("send", "-c", endpoint, long).finish()[0] == 0
    with socket.create_connection(address(endpoint), LIMIT) as stranger:
        assert shake_hands(stranger)
        stranger.sendall(frame(b"no delimiter"))
        stranger.shutdown(socket.SHUT_WR)
        assert is_cut_off(stranger)
    assert process.read_line() == long.encode()
    status, output, _notices = start("send", "-c", endpoint, "--timeout", "2", "hello").finish()
    assert (status, output) == (0, b"hello\n")


# Against send


def reply_and_hang_up(reply: bytes, connection: socket.socket) -> None:
    """Finish the handshake of a REP socket, wait for the request, say ``reply`` and hang up."""
    connection.sendall(greeting() + ready(b"REP"))
    if hears(connection, request(b"hello")):
        connection.sendall(reply)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"\xfa" * 1000, id="rubbish"),
        pytest.param(frame(b"hello"), id="no-delimiter"),
        pytest.param(b"\x01\x00\x02" + HUGE + bytes(1000), id="2^62-bytes"),
        pytest.param(request(b"hello" * 1000)[:-1], id="cut-off"),
        pytest.param(frame(b"", more=True) + frame(b"hello", more=True), id="no-last-frame"),
    ],
)
def test_a_bad_reply_is_none_and_prints_nothing(start: Start, reply: bytes) -> None:
    with listening(partial(reply_and_hang_up, reply)) as endpoint:
        status, output, notices = start("send", "-c", endpoint, "-r", "1", "hello").finish()
    assert (status, output) == (3, b"")
    assert "no reply to 'hello'" in notices[-1]


def test_a_reply_that_is_too_large_is_not_held(start: Start) -> None:
    """A frame's length comes first: the rest of it is not even read."""
    sent: list[int] = []

    def answer(connection: socket.socket) -> None:
        reply_and_hang_up(frame(b"", more=True) + b"\x02" + struct.pack(">Q", 1 << 30), connection)
        for _ in range(200):
            connection.sendall(bytes(1 << 20))
            sent.append(1)

    with listening(answer) as endpoint:
        status, output, notices = start("send", "-c", endpoint, "hello").finish()
    assert (status, output) == (3, b"")
    assert "a frame exceeds --max-size" in notices[-1]
    assert len(sent) < 200


@pytest.fixture(params=["NULL", "CURVE"])
def router(
    request: pytest.FixtureRequest, context: Context, tmp_path: Path
) -> tuple[zmq.Socket[bytes], list[str]]:
    """A ROUTER with and without CURVE, and the options that connect to it."""
    if request.param == "NULL":
        server, endpoint = open_server(context, zmq.ROUTER)
        return server, ["-c", endpoint]
    public, secret = zmq.auth.create_certificates(tmp_path, "server")
    server = context.socket(zmq.ROUTER)
    server.rcvtimeo = LIMIT * 1000
    server.curve_server = True
    server.curve_secretkey = zmq.auth.load_certificate(secret)[1] or b""
    return server, ["-c", bind(server), "--server-key", public]


@pytest.mark.parametrize(
    "reply", [[b"no empty frame"], [b"", bytes(1 << 17)]], ids=["no-empty-frame", "too-large"]
)
def test_a_request_whose_reply_is_rejected_is_served_once(
    start: Start, router: tuple[zmq.Socket[bytes], list[str]], reply: list[bytes]
) -> None:
    """Another attempt would bring the same reply."""
    server, options = router
    client = start("send", *options, "--max-size", "64K", "hello", "never sent")
    identity, _empty, _body = server.recv_multipart()
    server.send_multipart([identity, *reply])
    status, output, notices = client.finish()
    assert not server.poll(100)  # nothing more has been sent
    assert (status, output) == (3, b"")
    assert re.search(
        r"no reply to 'hello' \(1 attempt, .*was rejected: it lacks the empty frame.*--max-size",
        notices[-1],
    )
