"""Nothing that another attempt could deliver is lost, nothing is sent more often than allowed."""

import ctypes
import itertools
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import (
    LIMIT,
    LINUX,
    POSIX,
    Process,
    Send,
    Serve,
    Start,
    await_end,
    bind,
    free_endpoint,
    listening,
    open_server,
    relay,
    soak,
    until,
    waits,
)


def feed(process: Process, lines: Sequence[bytes], pace: float) -> None:
    """Write ``lines``, ``pace`` seconds apart."""
    with suppress(BrokenPipeError):
        for line in lines:
            process.send_line(line)
            time.sleep(pace)  # so that a kill also hits a sender that waits


def count_served(server: Process) -> int:
    """Stop the server and return how many requests it has served."""
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    return int(server.wait_for_notice(r"(\d+) requests? served")[1])


# Servers that die, and come again


@POSIX
@pytest.mark.parametrize(
    ("kills", "count", "pace"),
    [
        pytest.param(3, 300, 0.003, id="paced"),
        pytest.param(2, 1000, 0, id="tight"),
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


@pytest.mark.parametrize(
    ("restarts", "senders", "each"), [(2, 4, 150), pytest.param(8, 20, 200, id="full", marks=soak)]
)
def test_every_request_is_served_once_though_the_server_is_replaced(
    serve: Serve, start: Start, tmp_path: Path, restarts: int, senders: int, each: int
) -> None:
    requests = [
        [b"%d-%d" % (sender, number) for number in range(each)] for sender in range(senders)
    ]
    printed = tmp_path / "printed"
    served = 0
    with printed.open("ab") as output:
        server, endpoint = serve(stdout=output)
        processes = [start("send", "--connect", endpoint, *messages) for messages in requests]
        for restart in range(1, restarts + 1):
            until(partial(has_lines, printed, senders * each * restart // (restarts + 1)))
            served += count_served(server)
            server, _ = serve("--bind", endpoint, stdout=output)
        for process, messages in zip(processes, requests, strict=True):
            assert process.finish()[:2] == (0, b"".join(message + b"\n" for message in messages))
        served += count_served(server)
    assert sorted(printed.read_bytes().split()) == sorted(itertools.chain(*requests))
    assert served == senders * each


def has_lines(file: Path, count: int) -> bool:
    return file.read_bytes().count(b"\n") >= count


@POSIX
@pytest.mark.parametrize("retries", [0, 3])
def test_a_request_that_kills_its_server_is_sent_once_and_retries_times(
    serve: Serve, start: Start, retries: int
) -> None:
    endpoint = free_endpoint()
    sender = start(
        "send", "--connect", endpoint, "--retries", str(retries), "good", "poison", "never sent"
    )
    command = 'x=$(cat); [ "$x" = poison ] && kill -9 $PPID; printf %s "$x"'
    for _ in range(1 + retries):
        server, _ = serve("--bind", endpoint, "--exec", command)
        assert server.wait() == -signal.SIGKILL
    status, output, (*notices, last) = sender.finish()
    assert (status, output) == (3, b"good\n")
    assert sum("retrying" in notice for notice in notices) == retries
    attempts = f"{1 + retries} attempt{'s' * (retries > 0)}"
    assert re.search(
        rf"no reply to 'poison' \({attempts}, .* s\): connection to {endpoint} lost; .*crash", last
    )


@pytest.mark.parametrize("away", [0, pytest.param(120, marks=soak)])
def test_a_sender_that_idles_while_its_server_is_replaced_goes_on(
    serve: Serve, start: Start, away: float
) -> None:
    server, endpoint = serve()
    sender = start("send", "--connect", endpoint, "--retries", "0")
    sender.send_line(b"before")
    assert sender.read_line() == b"before"
    assert count_served(server) == 1
    await_end(endpoint)
    time.sleep(away)  # during which nothing must give up
    server, _ = serve("--bind", endpoint)
    sender.send_line(b"after")
    assert sender.read_line() == b"after"
    assert sender.finish()[:2] == (0, b"")
    assert count_served(server) == 1


def test_a_stream_whose_server_is_away_for_two_timeouts_goes_on(serve: Serve, start: Start) -> None:
    server, endpoint = serve("--quiet")
    sender = start("send", "--connect", endpoint, "--timeout", "0.7", "--retries", "99")
    sender.send_line(b"before")
    assert sender.read_line() == b"before"
    server.close()
    sender.send_line(b"after")
    sender.wait_for_notice(rf"no server at {endpoint} within 0.7 s: .*; retrying \(2 of 99\)")
    serve("--quiet", "--bind", endpoint)
    assert sender.finish()[:2] == (0, b"after\n")


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=soak)])
def test_no_reply_is_lost_to_a_server_that_replies_and_closes_at_once(
    context: Context, start: Start, count: int
) -> None:
    """With IMMEDIATE=1, libzmq would throw away replies that lie unread at the end."""
    endpoint = free_endpoint()
    sender = start("send", "--connect", endpoint, "--retries", "0")
    for number in range(count):
        server = context.socket(zmq.REP)
        server.rcvtimeo = LIMIT * 1000
        bind(server, endpoint)
        sender.send_line(b"%d" % number)
        server.send(server.recv())
        server.close(linger=LIMIT * 1000)
        assert sender.read_line() == b"%d" % number
        await_end(endpoint)
    assert sender.finish()[:2] == (0, b"")


def test_a_late_reply_of_an_earlier_attempt_is_no_reply_to_a_later_request(
    context: Context, start: Start
) -> None:
    server, endpoint = open_server(context, zmq.ROUTER)
    sender = start("send", "--connect", endpoint, "--timeout", "3", "first", "second")
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


@pytest.mark.parametrize("where", ["bound", "worker"])
def test_a_peer_that_sends_ahead_and_reads_later_gets_all_replies(
    context: Context, serve: Serve, start: Start, where: str
) -> None:
    count = 20_000
    body = bytes(1000)
    options = ["--quiet", "--count", str(count)]
    client = context.socket(zmq.DEALER)
    client.rcvtimeo = LIMIT * 1000
    client.sndhwm = 0
    client.rcvhwm = 16
    if where == "bound":
        server, endpoint = serve(*options)
        client.connect(endpoint)
    else:
        server = start("serve", "--connect", bind(client), *options)
    for number in range(count):
        client.send_multipart([b"", b"%d " % number + body])
    server.wait_for_notice(f"{count} requests served")
    replies = (client.recv_multipart()[1] for _ in range(count))
    assert [int(reply.split()[0]) for reply in replies] == list(range(count))
    assert server.finish()[0] == 0


# Servers that freeze


@POSIX
@pytest.mark.parametrize("seconds", [0, pytest.param(15, marks=soak)])
def test_a_server_that_is_frozen_serves_each_request_once_when_it_thaws(
    serve: Serve, start: Start, seconds: float
) -> None:
    """The kernel accepts connections for it."""
    server, endpoint = serve()
    server.signal(signal.SIGSTOP)
    hasty = start("send", "--connect", endpoint, "--timeout", "0.5", "--retries", "0", "never sent")
    assert hasty.finish()[0] == 1
    patient = start("send", "--connect", endpoint, "--retries", "0")
    patient.send_line(b"x")
    patient.wait_for_notice("connected, but no ZeroMQ greeting yet")
    time.sleep(seconds)  # during which nothing must give up
    server.signal(signal.SIGCONT)
    assert patient.read_line() == b"x"
    server.signal(signal.SIGSTOP)
    patient.send_line(b"meanwhile")
    patient.wait_for_notice(f"waiting for a reply from {endpoint}")
    server.signal(signal.SIGCONT)
    assert patient.finish()[:2] == (0, b"meanwhile\n")
    assert count_served(server) == 2


@waits
@POSIX
@pytest.mark.parametrize(
    ("timeout", "end", "why"),
    [
        pytest.param("4", lambda server: None, "no reply from {} within 4 s", id="freezes"),
        pytest.param("25", Process.close, "connection to {} lost", id="dies"),
    ],
)
def test_a_request_whose_server_is_lost_goes_to_one_that_lives(
    echo: str,
    serve: Serve,
    start: Start,
    timeout: str,
    end: Callable[[Process], object],
    why: str,
) -> None:
    server, endpoint = serve()
    options = ["--verbose", "--connect", endpoint, "--connect", echo, "--timeout", timeout]
    sender = start("send", *options)

    def both_are_ready() -> bool:
        sender.send_line(b"-")
        assert sender.read_line() == b"-"
        return sum("connected to" in notice for notice in sender.notices) == 2

    until(both_are_ready)
    server.signal(signal.SIGSTOP)
    for line in (b"a", b"b"):  # one for each
        sender.send_line(line)
    sender.wait_for_notice(f"waiting for a reply from {endpoint}")
    end(server)
    status, output, notices = sender.finish()
    assert (status, output) == (0, b"a\nb\n")
    retries = [notice for notice in notices if "retrying" in notice]
    assert retries == [f"zmqmsg: {why.format(endpoint)}; retrying (1 of 3)"]


# Ports and links that behave strangely


def test_a_port_that_accepts_and_hangs_up_is_waited_for_and_gets_nothing(
    serve: Serve, start: Start
) -> None:
    """So do tunnels and load balancers without a back end. Nothing was sent: -r 0 goes on."""
    hang_ups = threading.Semaphore(0)

    def accept_and_hang_up(connection: socket.socket) -> None:
        time.sleep(0.4)  # as long as such a port may take to look for its back end
        hang_ups.release()

    with listening(accept_and_hang_up) as endpoint:
        sender = start("send", "--connect", endpoint, "--retries", "0", "x")
        for _ in range(3):
            assert hang_ups.acquire(timeout=LIMIT)
        closed = "the connection was closed during the ZeroMQ handshake"
        sender.wait_for_notice(f"waiting for {endpoint}: connected, but {closed}")
    server, _ = serve("--bind", endpoint)
    status, output, notices = sender.finish()
    assert (status, output) == (0, b"x\n")
    assert not re.search("waiting for a reply|sent|lost|retrying", str(notices))
    assert count_served(server) == 1


def test_a_server_whose_port_another_holds_for_a_while_is_waited_for(
    context: Context, start: Start
) -> None:
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--verbose", "--connect", endpoint, "--retries", "0")
    sender.send_line(b"before")
    server.send(server.recv())
    assert sender.read_line() == b"before"
    server.close()
    await_end(endpoint)
    with context.socket(zmq.PUB) as other:
        bind(other, endpoint)
        sender.send_line(b"after")
        sender.wait_for_notice(f"waiting for {endpoint}: it is a PUB socket, not a REP or ROUTER")
    server, _ = open_server(context, zmq.REP, endpoint)
    server.send(server.recv())
    assert sender.finish()[:2] == (0, b"after\n")


@soak
def test_a_large_message_gets_there_and_back_over_a_slow_link(
    echo: str, send: Send, tmp_path: Path
) -> None:
    """ZMTP heartbeats would cut it off: only a whole message is a sign of life."""
    size, rate = 20_000_000, 1_000_000

    def forward(data: bytes, target: socket.socket, _upstream: bool) -> None:
        target.settimeout(None)  # the other direction rests for longer than the relay's limit
        time.sleep(len(data) / rate)  # that makes the link slow
        target.sendall(data)

    message = tmp_path / "message"
    message.write_bytes(os.urandom(size))
    with relay(echo, forward, chunk=rate // 100) as slow:
        done = send("--connect", slow, "--retries", "0", "--file", str(message), timeout=120)
    assert (done.returncode, done.stdout) == (0, message.read_bytes() + b"\n")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, 10.111.0.1 and 10.111.0.2, and a cable from "end" to "end"."""
    names = [f"zmqmsg-{os.getpid()}-{number}" for number in (1, 2)]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            here, there = (["name", "end", "netns", name] for name in names)
            ip("link", "add", *here, "type", "veth", "peer", *there)
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.111.0.{number}/24", "dev", "end")
                ip("-n", name, "link", "set", "end", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces on this machine: {error}")
        yield names


@soak
@LINUX
@pytest.mark.parametrize(
    "acknowledged", [True, False], ids=["request-acknowledged", "data-in-flight"]
)
def test_a_peer_that_is_gone_without_a_word_is_noticed(
    namespaces: list[str], serve: Serve, start: Start, acknowledged: bool
) -> None:
    here, there = namespaces
    server, endpoint = serve("--bind", "tcp://10.111.0.1:*", preexec_fn=partial(enter, here))
    sender = start("send", "--connect", endpoint, preexec_fn=partial(enter, there))
    sender.send_line(b"before")
    assert sender.read_line() == b"before"
    if acknowledged:
        server.signal(signal.SIGSTOP)
        sender.send_line(b"in hand")
        sender.wait_for_notice("waiting for a reply")
    ip("-n", here, "link", "set", "end", "down")
    if not acknowledged:
        sender.send_line(b"in hand")
    sender.wait_for_notice(f"connection to {endpoint} lost; retrying", 35)
    sender.wait_for_notice(f"waiting for {endpoint}")
    ip("-n", here, "link", "set", "end", "up")
    server.signal(signal.SIGCONT)
    sender.wait_for_notice(f"connected to {endpoint}")
    assert sender.read_line() == b"in hand"
    assert sender.finish()[0] == 0
