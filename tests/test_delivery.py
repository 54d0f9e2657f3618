import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqmsg.sockets import Context

import conftest
from conftest import LIMIT, Process, bind, free_endpoint, open_server, until

Start = Callable[..., Process]
Serve = Callable[..., tuple[Process, str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]

soak = pytest.mark.soak

POISONED = """
import os, sys, zmq
socket = zmq.Context().socket(zmq.REP)
socket.bind(sys.argv[1])
while (request := socket.recv()) != b"poison":
    socket.send(request)
os._exit(3)
"""


def feed(process: Process, lines: Sequence[bytes], pace: float) -> None:
    """Write ``lines``, ``pace`` seconds apart."""
    with suppress(BrokenPipeError):
        for line in lines:
            process.send_line(line)
            if pace:
                time.sleep(pace)


@pytest.mark.parametrize(
    ("kills", "count", "pace"),
    [
        pytest.param(3, 400, 0.003, id="paced"),
        pytest.param(2, 6000, 0, id="tight"),
        pytest.param(20, 3000, 0.005, id="paced-full", marks=soak),
        pytest.param(5, 40_000, 0, id="tight-full", marks=soak),
    ],
)
def test_every_reply_comes_once_and_in_order_though_the_server_is_killed(
    serve: Serve, start: Start, kills: int, count: int, pace: float
) -> None:
    messages = [b"%d" % number for number in range(count)]
    replies: list[bytes] = []
    server, endpoint = serve("--quiet")
    sender = start("send", "--connect", endpoint)
    feeder = threading.Thread(target=feed, args=(sender, messages, pace), daemon=True)
    feeder.start()
    for kill in range(1, kills + 1):
        replies += [sender.read_line() for _ in range(count * kill // (kills + 1) - len(replies))]
        server.signal(signal.SIGKILL)
        server.wait()
        server, _ = serve("--quiet", "--bind", endpoint)
    replies += [sender.read_line() for _ in range(count - len(replies))]
    feeder.join(LIMIT)
    assert replies == messages
    assert sender.finish()[:2] == (0, b"")


def has_lines(file: Path, count: int) -> bool:
    return file.read_bytes().count(b"\n") >= count


@pytest.mark.parametrize(
    ("restarts", "senders", "each"), [(2, 4, 150), pytest.param(8, 20, 200, id="full", marks=soak)]
)
def test_every_request_is_served_exactly_once_though_the_server_is_replaced(
    serve: Serve, start: Start, tmp_path: Path, restarts: int, senders: int, each: int
) -> None:
    requests = [[b"%d-%d" % (sender, number) for number in range(each)] for sender in range(senders)]
    printed = tmp_path / "printed"
    counts = []
    with printed.open("ab") as output:
        server, endpoint = serve(stdout=output)
        processes = [start("send", "--connect", endpoint, *messages) for messages in requests]
        for restart in range(1, restarts + 1):
            until(partial(has_lines, printed, senders * each * restart // (restarts + 1)))
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            counts.append(server.wait_for_notice(r"(\d+) requests? served"))
            server, _ = serve("--bind", endpoint, stdout=output)
        for process, messages in zip(processes, requests, strict=True):
            assert process.finish()[:2] == (0, b"".join(message + b"\n" for message in messages))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        counts.append(server.wait_for_notice(r"(\d+) requests? served"))
    assert sorted(printed.read_bytes().split()) == sorted(itertools.chain(*requests))
    assert sum(int(found[1]) for found in counts) == senders * each


@pytest.mark.parametrize("retries", [0, 3])
def test_a_request_that_kills_its_server_is_sent_once_and_retries_times(start: Start, retries: int) -> None:
    endpoint = free_endpoint()
    arguments = ["--connect", endpoint, "--retries", str(retries)]
    sender = start("send", *arguments, "good", "poison", "never sent")
    for _ in range(1 + retries):
        with subprocess.Popen([sys.executable, "-c", POISONED, endpoint]) as server:
            try:
                assert server.wait(LIMIT) == 3
            finally:
                server.kill()
    status, output, notices = sender.finish()
    assert (status, output) == (1, b"good\n")
    times = "once" if not retries else f"{1 + retries} times"
    assert re.search(f"no reply to 'poison', sent {times}: .*{endpoint} lost", notices[-1])
    assert ("may break the server" in notices[-1]) == (retries > 0)


@pytest.mark.parametrize("away", [0, 2, pytest.param(120, marks=soak)])
def test_a_sender_that_idles_while_its_server_is_replaced_goes_on_at_once(
    serve: Serve, start: Start, away: float
) -> None:
    server, endpoint = serve()
    sender = start("send", "--connect", endpoint)
    sender.send_line(b"before")
    assert sender.read_line() == b"before"
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    time.sleep(away)
    server, _ = serve("--bind", endpoint)
    started = time.monotonic()
    sender.send_line(b"after")
    assert sender.read_line() == b"after"
    assert time.monotonic() - started < 5
    assert not [notice for notice in sender.notices if "again" in notice]
    assert sender.finish()[:2] == (0, b"")
    server.signal(signal.SIGTERM)
    assert server.finish()[:2] == (0, b"after\n")


def test_without_retries_a_request_is_sent_at_most_once(context: Context, start: Start) -> None:
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--connect", endpoint, "--retries", "0", "x")
    assert server.recv() == b"x"
    server.close()
    successor, _ = open_server(context, zmq.REP, endpoint)
    status, output, notices = sender.finish()
    assert (status, output) == (1, b"")
    assert f"no reply to 'x', sent once: connection to {endpoint} lost" in notices[-1]
    assert not successor.poll(200)


@pytest.mark.parametrize("count", [15, pytest.param(100, marks=soak)])
def test_no_reply_is_lost_to_a_server_that_answers_and_closes_at_once(
    context: Context, start: Start, count: int
) -> None:
    """With IMMEDIATE=1 libzmq would throw away the replies that lie unread when the connection breaks."""
    endpoint = free_endpoint()
    sender = start("send", "--connect", endpoint, "--retries", "0")
    for number in range(count):
        server = context.socket(zmq.REP)
        server.rcvtimeo = LIMIT * 1000
        arrivals = server.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        bind(server, endpoint)
        assert arrivals.poll(LIMIT * 1000)
        sender.send_line(b"%d" % number)
        server.send(server.recv())
        server.disable_monitor()
        server.close(linger=LIMIT * 1000)
        assert sender.read_line() == b"%d" % number
    assert sender.finish()[:2] == (0, b"")


def test_a_late_reply_of_an_abandoned_attempt_is_no_reply_to_a_later_request(context: Context, start: Start) -> None:
    server, endpoint = open_server(context, zmq.ROUTER)
    sender = start("send", "--connect", endpoint, "--timeout", "0.5", "first", "second")
    abandoned, _, first = server.recv_multipart()
    current, _, again = server.recv_multipart()
    assert (first, again) == (b"first", b"first")
    server.send_multipart([abandoned, b"", b"late"])
    server.send_multipart([current, b"", b"reply to the first"])
    current, _, second = server.recv_multipart()
    assert second == b"second"
    server.send_multipart([abandoned, b"", b"later"])
    server.send_multipart([current, b"", b"reply to the second"])
    assert sender.finish()[:2] == (0, b"reply to the first\nreply to the second\n")


def test_servers_take_turns(serve: Serve, send: Send) -> None:
    (one, first), (two, second) = serve("--count", "3"), serve("--count", "3")
    assert send("--connect", first, "--connect", second, *"abcdef").stdout == b"a\nb\nc\nd\ne\nf\n"
    assert {one.finish()[1], two.finish()[1]} == {b"a\nc\ne\n", b"b\nd\nf\n"}


@pytest.mark.parametrize("dead_first", [True, False])
def test_a_dead_server_among_living_ones_holds_nobody_up(serve: Serve, send: Send, dead_first: bool) -> None:
    _server, living = serve("--quiet")
    endpoints = [free_endpoint(), living] if dead_first else [living, free_endpoint()]
    messages = [str(number) for number in range(300)]
    started = time.monotonic()
    done = send(*itertools.chain(*(("--connect", endpoint) for endpoint in endpoints)), *messages)
    assert (done.returncode, done.stdout.decode().split(), done.stderr) == (0, messages, b"")
    assert time.monotonic() - started < 5


def test_a_request_whose_server_died_goes_to_one_that_lives(context: Context, serve: Serve, start: Start) -> None:
    dying, doomed = open_server(context, zmq.REP)
    _server, living = serve("--quiet")
    sender = start("send", "--connect", doomed, "--connect", living, "a", "b", "c")
    dying.recv()
    dying.close()
    status, output, notices = sender.finish()
    assert (status, output) == (0, b"a\nb\nc\n")
    assert notices == [f"zmqmsg: connection to {doomed} lost, trying again (1 of 3)"]


def test_a_server_that_was_frozen_before_is_not_asked_while_others_live(serve: Serve, send: Send) -> None:
    (one, frozen), (_two, living) = serve(), serve()
    one.signal(signal.SIGSTOP)
    messages = [str(number) for number in range(100)]
    done = send("--connect", frozen, "--connect", living, *messages)
    assert (done.returncode, done.stdout.decode().split(), done.stderr) == (0, messages, b"")


def test_a_request_to_a_server_that_froze_goes_to_one_that_lives_after_the_timeout(serve: Serve, start: Start) -> None:
    (one, frozen), (_two, _living) = servers = serve(), serve()
    connects = itertools.chain(*(("--connect", endpoint) for _, endpoint in servers))
    sender = start("send", *connects, "--timeout", "1")
    for line in (b"a", b"b"):  # one for each
        sender.send_line(line)
        assert sender.read_line() == line
    one.signal(signal.SIGSTOP)
    for line in (b"c", b"d"):
        sender.send_line(line)
        assert sender.read_line() == line
    status, _, notices = sender.finish()
    assert status == 0
    assert f"zmqmsg: no reply within 1 s from {frozen}, trying again (1 of 3)" in notices


@contextmanager
def slow_relay(endpoint: str, rate: int) -> Iterator[str]:
    """Pass on what one connection brings, ``rate`` bytes a second in each direction."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(rate // 100):
                time.sleep(len(data) / rate)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def relay() -> None:
        near, _address = listener.accept()
        with near, socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as far:
            back = threading.Thread(target=copy, args=(far, near), daemon=True)
            back.start()
            copy(near, far)
            back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(LIMIT)


@pytest.mark.parametrize("megabytes", [1, pytest.param(20, marks=soak)])
def test_a_large_message_gets_there_and_back_over_a_slow_link(
    serve: Serve, send: Send, tmp_path: Path, megabytes: int
) -> None:
    """ZMTP heartbeats would cut it off: only a whole message is a sign of life."""
    message = tmp_path / "message"
    message.write_bytes(os.urandom(megabytes * 1_000_000))
    _server, endpoint = serve("--quiet")
    started = time.monotonic()
    with slow_relay(endpoint, 1_000_000) as relay:
        done = send("--connect", relay, "--file", str(message), timeout=LIMIT + 4 * megabytes)
    assert time.monotonic() - started > 2 * megabytes
    assert done.returncode == 0
    assert done.stdout == message.read_bytes() + b"\n"
    assert not re.search(b"again|lost", done.stderr)


class Cable:
    """Two network namespaces, and a cable between them that can be pulled."""

    SERVER_ADDRESS = "10.111.0.1"
    SENDER_ADDRESS = "10.111.0.2"

    def __init__(self, stack: ExitStack, patch: pytest.MonkeyPatch) -> None:
        self._command = conftest.COMMAND
        self._patch = patch
        self.server, self.sender = (f"zmqmsg-{os.getpid()}-{end}" for end in ("server", "sender"))
        for name in (self.server, self.sender):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "end", "netns", self.server, "type", "veth", "peer", "name", "end", "netns", self.sender)
        for name, address in ((self.server, self.SERVER_ADDRESS), (self.sender, self.SENDER_ADDRESS)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "end")
            ip("-n", name, "link", "set", "end", "up")

    def run(self, namespace: str, start: Callable[..., Any], *arguments: str) -> Any:
        """Let ``start`` start a zmqmsg inside ``namespace``."""
        with self._patch.context() as patch:
            patch.setattr(conftest, "COMMAND", ["ip", "netns", "exec", namespace, *self._command])
            return start(*arguments)

    def pull(self) -> None:
        ip("-n", self.server, "link", "set", "end", "down")

    def plug_in(self) -> None:
        ip("-n", self.server, "link", "set", "end", "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    with ExitStack() as stack:
        try:
            cable = Cable(stack, monkeypatch)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces on this machine: {error}")
        yield cable


@soak
@pytest.mark.parametrize("acknowledged", [True, False], ids=["request-acknowledged", "data-in-flight"])
def test_a_peer_that_is_gone_without_a_word_is_noticed(
    cable: Cable, serve: Serve, start: Start, acknowledged: bool
) -> None:
    bind = f"tcp://{cable.SERVER_ADDRESS}:*"
    server, endpoint = cable.run(cable.server, serve, "--bind", bind)
    server.wait_for_notice("warning: anyone who can reach")
    sender = cable.run(cable.sender, start, "send", "--connect", endpoint)
    sender.send_line(b"before")
    assert sender.read_line() == b"before"
    if acknowledged:
        server.signal(signal.SIGSTOP)
        sender.send_line(b"in hand")
        sender.wait_for_notice("waiting for the reply")
        cable.pull()
    else:
        cable.pull()
        sender.send_line(b"in hand")
    sender.wait_for_notice(f"connection to {endpoint} lost, trying again", 35)
    sender.wait_for_notice(f"waiting for {endpoint}")
    cable.plug_in()
    server.signal(signal.SIGCONT)
    sender.wait_for_notice(f"connected to {endpoint}")
    assert sender.read_line() == b"in hand"
    assert sender.finish()[0] == 0
