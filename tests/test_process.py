"""The main job, with real processes, signals and ports, and with other implementations at the other end."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyomq
import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import LIMIT, Process, bind
from zmtp import greeting, ready, request

Serve = Callable[..., tuple[Process, str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Process]

MESSAGES = ["first message", "second message", "third message"]
LINES = b"first message\nsecond message\nthird message\n"


def test_three_messages_are_seen_at_the_server_and_their_replies_at_the_client(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--count", "3")
    done = send("--connect", endpoint, *MESSAGES)
    assert (done.returncode, done.stdout, done.stderr) == (0, LINES, b"")
    assert server.finish() == (0, LINES, [f"zmqmsg: listening on {endpoint}", "zmqmsg: 3 requests served"])


def test_the_client_may_start_first_and_waits_aloud(serve: Serve, start: Start, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/a.sock"
    client = start("send", "--connect", endpoint, *MESSAGES)
    client.wait_for_notice(f"waiting for {endpoint}")
    serve("--bind", endpoint)
    status, output, notices = client.finish()
    assert (status, output) == (0, LINES)
    assert notices[-1] == f"zmqmsg: connected to {endpoint}"
    assert len(notices) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serve_cleanly(serve: Serve, send: Send, number: int, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    server, endpoint = serve("--bind", f"ipc://{path}")
    send("--connect", endpoint, "one")
    server.signal(number)
    assert server.finish() == (0, b"one\n", [f"zmqmsg: listening on {endpoint}", "zmqmsg: 1 request served"])
    assert not path.exists()


def test_a_signal_ends_a_worker_that_waits_for_its_queue(start: Start) -> None:
    worker = start("serve", "--connect", "tcp://127.0.0.1:1")
    worker.wait_for_notice("waiting for")
    worker.signal(signal.SIGTERM)
    assert worker.finish()[:2] == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_last_reply_of_count_reach_its_client(context: Context, serve: Serve, number: int) -> None:
    server, endpoint = serve("--quiet", "--count", "1")
    with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as client:
        client.sendall(greeting() + ready(b"REQ"))
        size = 30_000_000  # more than the system's buffers hold
        heard = client.makefile("rb")
        heard.read(len(greeting()))
        heard.read(heard.read(2)[1])
        client.sendall(request(bytes(size)))
        server.wait_for_notice("1 request served")
        server.signal(number)
        assert heard.read(3 + 8) == b"\x01\x00\x02" + size.to_bytes(8)
        assert heard.read(size) == bytes(size)
    assert server.wait() == 0


@pytest.mark.parametrize("wait_for", ["connection", "input"])
def test_ctrl_c_ends_send_at_once(serve: Serve, start: Start, wait_for: str) -> None:
    if wait_for == "connection":
        client = start("send", "--connect", "tcp://127.0.0.1:1", "hello")
        client.wait_for_notice("waiting for")
    else:
        client = start("send", "--connect", serve()[1])
        client.send_line(b"hello")
        assert client.read_line() == b"hello"
    client.signal(signal.SIGINT)
    assert client.wait(2) == 130
    assert not any("Traceback" in notice for notice in client.notices)


def test_ctrl_c_during_the_imports_shows_no_traceback(start: Start) -> None:
    """A signal comes when Python has its handler and imports the rest, which takes most of the start."""
    begin = "import os, signal, sys; sys.path_hooks.insert(0, lambda path: os.kill(os.getpid(), signal.SIGINT))"
    run = "sys.path_importer_cache.clear(); from zmqmsg.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", f"{begin}; {run}"], capture_output=True)
    assert done.returncode in (130, -signal.SIGINT)


def test_serve_binds_and_connects_to_several_endpoints(
    context: Context, serve: Serve, send: Send, tmp_path: Path
) -> None:
    queue = context.socket(zmq.DEALER)
    back_end = bind(queue)
    server, one = serve("--bind", f"ipc://{tmp_path}/a.sock", "--bind", "tcp://127.0.0.1:*", "--connect", back_end)
    two = server.wait_for_notice("listening on (tcp.*)")[1]
    queue.send_multipart([b"", b"queued"])
    assert queue.poll(LIMIT * 1000)
    assert queue.recv_multipart() == [b"", b"queued"]
    assert send("--connect", one, "one").stdout == b"one\n"
    assert send("--connect", two, "two").stdout == b"two\n"


def test_serve_connect_alone_binds_nothing(context: Context, start: Start) -> None:
    queue = context.socket(zmq.DEALER)
    worker = start("serve", "--connect", bind(queue), "--count", "1")
    queue.send_multipart([b"", b"queued"])
    assert worker.finish() == (0, b"queued\n", ["zmqmsg: 1 request served"])


def test_workers_behind_a_queue_share_the_requests_of_several_senders(context: Context, start: Start) -> None:
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    front_end, back_end = bind(front), bind(back)

    def forward() -> None:
        try:
            zmq.proxy(front, back)
        except zmq.ZMQError:
            front.close()
            back.close()

    with back.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
        workers = [start("serve", "--connect", back_end) for _ in range(3)]
        for _ in workers:
            assert monitor.poll(LIMIT * 1000)
            monitor.recv_multipart()
        back.disable_monitor()
    thread = threading.Thread(target=forward)
    thread.start()
    senders = [start("send", "--connect", front_end) for _ in range(3)]
    for number, sender in enumerate(senders):
        for line in range(20):
            sender.send_line(b"%d %d" % (number, line))
    for number, sender in enumerate(senders):
        status, output, _notices = sender.finish()
        assert status == 0
        assert output.splitlines() == [b"%d %d" % (number, line) for line in range(20)]
    for worker in workers:
        worker.signal(signal.SIGTERM)
    served = [worker.finish()[1].splitlines() for worker in workers]
    assert sum(map(len, served)) == 60
    assert all(served)
    context.destroy(linger=0)
    thread.join(LIMIT)


def test_quiet_prints_no_requests(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--quiet", "--count", "1")
    assert send("--connect", endpoint, "hush").stdout == b"hush\n"
    assert server.finish()[1] == b""


def test_an_address_in_use_is_a_failure_in_plain_words(serve: Serve, start: Start) -> None:
    _server, endpoint = serve()
    status, output, notices = start("serve", "--bind", endpoint).finish()
    assert (status, output) == (1, b"")
    assert notices == [f"zmqmsg: cannot bind {endpoint}: address in use; stop its server, or take another"]


class TestOtherImplementations:
    """Both ends against a peer that is not ours: plain pyzmq over libzmq, and pyomq."""

    def test_a_plain_rep_socket(self, context: Context, start: Start) -> None:
        server = context.socket(zmq.REP)
        client = start("send", "--connect", bind(server), "ping", "ping")
        for _ in range(2):
            assert server.recv() == b"ping"
            server.send_multipart([b"pong", b"more"])
        assert client.finish()[:2] == (0, b"pong\nmore\npong\nmore\n")

    def test_a_plain_router_that_takes_identity_empty_body(self, context: Context, start: Start) -> None:
        router = context.socket(zmq.ROUTER)
        client = start("send", "--connect", bind(router), "ping")
        identity, empty, body = router.recv_multipart()
        router.send_multipart([identity, empty, body.upper()])
        assert client.finish()[:2] == (0, b"PING\n")

    def test_a_plain_req_socket(self, context: Context, serve: Serve) -> None:
        server, endpoint = serve("--count", "1")
        client = context.socket(zmq.REQ)
        client.connect(endpoint)
        client.send_multipart([b"one", b"two"])
        assert client.recv_multipart() == [b"one", b"two"]
        assert server.finish()[:2] == (0, b"one\ntwo\n")

    def test_a_rep_socket_of_pyomq(self, start: Start) -> None:
        with pyomq.Context() as context, context.socket(pyomq.REP) as server:
            port = server.bind_to_random_port("tcp://127.0.0.1")
            client = start("send", "--connect", f"tcp://127.0.0.1:{port}", "ping")
            assert server.recv() == b"ping"
            server.send(b"pong")
            assert client.finish()[:2] == (0, b"pong\n")

    def test_a_req_socket_of_pyomq(self, serve: Serve) -> None:
        server, endpoint = serve("--count", "1")
        with pyomq.Context() as context, context.socket(pyomq.REQ) as client:
            client.connect(endpoint)
            client.send(b"hello")
            assert client.recv() == b"hello"
        assert server.finish()[:2] == (0, b"hello\n")
