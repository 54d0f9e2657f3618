import http.server
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import LIMIT, Process, bind, free_endpoint, listening, open_server, until

Start = Callable[..., Process]
Serve = Callable[..., tuple[Process, str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]

SOON = 5
"""Seconds within which the user is told of what takes a second, on a busy machine."""


def refuse_as_http(connection: socket.socket) -> None:
    """Answer as nginx answers what is no HTTP."""
    connection.recv(1024)
    body = b"<html>\n<head><title>400 Bad Request</title></head>\n<body>400 Bad Request</body>\n</html>\n" * 2
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def greet_as_ssh(connection: socket.socket) -> None:
    """Greet and wait, as sshd does. libzmq takes it for ZMTP 1, which has no handshake to miss."""
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    while connection.recv(1024):
        pass


def speak_zmtp_2(connection: socket.socket) -> None:
    """Echo as a REP socket of ZMTP 2.0 does: small frames of flags, length, body. Hang up at poison."""
    with connection.makefile("rb") as stream:
        connection.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\1\4\0\0")  # signature; revision, type; identity
        stream.read(10 + 2 + 2)
        while delimiter := stream.read(2):
            assert delimiter == b"\1\0"
            flags, length = stream.read(2)
            assert flags == 0
            if (body := stream.read(length)) == b"poison":
                return
            connection.sendall(delimiter + bytes([flags, length]) + body)


def test_commands_at_the_right_time_need_no_notices(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--count", "2")
    assert send("--connect", endpoint, "a", "b").stderr == b""
    assert server.finish()[2] == [f"zmqmsg: listening on {endpoint}", "zmqmsg: 2 requests served"]


def test_send_before_serve_waits_aloud(serve: Serve, start: Start) -> None:
    endpoint = free_endpoint()
    started = time.monotonic()
    sender = start("send", "--connect", endpoint, "x")
    sender.wait_for_notice(f"waiting for {endpoint}: nothing accepts connections there", SOON)
    assert time.monotonic() - started > 1
    serve("--bind", endpoint)
    status, output, notices = sender.finish()
    assert (status, output) == (0, b"x\n")
    assert notices[1:] == [f"zmqmsg: connected to {endpoint}"]


def test_a_name_that_does_not_resolve_is_waited_for_aloud(start: Start) -> None:
    sender = start("send", "--connect", "tcp://no.such.name.invalid:5555", "x")
    sender.wait_for_notice("waiting for tcp://no.such.name.invalid:5555: cannot resolve no.such.name.invalid")


def test_a_server_that_freezes_with_a_request_in_hand_is_waited_for_aloud(serve: Serve, start: Start) -> None:
    server, endpoint = serve()
    sender = start("send", "--connect", endpoint)
    sender.send_line(b"before")
    assert sender.read_line() == b"before"
    server.signal(signal.SIGSTOP)
    started = time.monotonic()
    sender.send_line(b"meanwhile")
    sender.wait_for_notice(f"waiting for the reply of {endpoint}", SOON)
    assert time.monotonic() - started > 1
    server.signal(signal.SIGCONT)
    assert sender.finish() == (0, b"meanwhile\n", [f"zmqmsg: waiting for the reply of {endpoint}"])


@pytest.mark.parametrize("seconds", [0.5, pytest.param(15, marks=pytest.mark.soak)])
def test_a_server_that_is_frozen_from_the_start_serves_once_when_it_thaws(
    serve: Serve, start: Start, seconds: float
) -> None:
    server, endpoint = serve()
    server.signal(signal.SIGSTOP)
    sender = start("send", "--connect", endpoint, "x")
    sender.wait_for_notice(f"waiting for .*{endpoint}", SOON)
    time.sleep(seconds)
    server.signal(signal.SIGCONT)
    assert sender.finish()[:2] == (0, b"x\n")
    server.signal(signal.SIGTERM)
    assert server.finish()[1] == b"x\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.name.invalid"])
def test_a_message_that_was_never_sent_within_the_timeout_is_not_tried_again(send: Send, host: str) -> None:
    endpoint = free_endpoint().replace("127.0.0.1", host)
    done = send("--connect", endpoint, "--timeout", "0.5", "x")
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rb"zmqmsg: no server .*\n", done.stderr)
    assert b"within 0.5 s" in done.stderr
    assert endpoint.encode() in done.stderr


def test_a_timeout_is_tried_again_until_the_retries_are_used_up(context: Context, start: Start) -> None:
    mute, endpoint = open_server(context, zmq.ROUTER)
    sender = start("send", "--connect", endpoint, "--timeout", "0.4", "--retries", "2", "x", "never sent")
    assert [mute.recv_multipart()[2] for _ in range(3)] == [b"x"] * 3
    status, output, notices = sender.finish()
    assert (status, output) == (1, b"")
    assert notices[:2] == [
        f"zmqmsg: no reply within 0.4 s from {endpoint}, trying again ({attempt} of 2)" for attempt in (1, 2)
    ]
    assert "no reply to 'x', sent 3 times" in notices[2]
    assert len(notices) == 3
    assert not mute.poll(200)


def test_a_server_that_is_mute_twice_and_then_well_is_asked_until_it_answers(context: Context, start: Start) -> None:
    server, endpoint = open_server(context, zmq.ROUTER)
    sender = start("send", "--connect", endpoint, "--timeout", "0.4", "x")
    for _ in range(3):
        request = server.recv_multipart()
    server.send_multipart(request)
    status, output, notices = sender.finish()
    assert (status, output) == (0, b"x\n")
    assert [notice[-8:] for notice in notices] == ["(1 of 3)", "(2 of 3)"]


def test_a_later_attempt_that_finds_no_server_is_a_failed_one(context: Context, start: Start) -> None:
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--connect", endpoint, "--timeout", "0.6", "--retries", "2", "x")
    assert server.recv() == b"x"
    server.close()
    status, _, notices = sender.finish()
    assert status == 1
    assert f"connection to {endpoint} lost, trying again (1 of 2)" in notices[0]
    assert "no server" in notices[1]
    assert "trying again (2 of 2)" in notices[1]
    assert "no reply to 'x', sent once: no server" in notices[-1]


def test_a_lost_connection_is_followed_by_a_wait_aloud(context: Context, serve: Serve, start: Start) -> None:
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--connect", endpoint, "x")
    assert server.recv() == b"x"
    server.close()
    sender.wait_for_notice(f"waiting for {endpoint}: nothing accepts", SOON)
    serve("--bind", endpoint)
    assert sender.finish()[:2] == (0, b"x\n")
    assert re.search(r"lost, trying again \(1 of 3\)", sender.notices[0])


def test_a_reply_beyond_the_limit_is_a_reason_to_give_up(serve: Serve, send: Send) -> None:
    _server, endpoint = serve("--quiet")
    done = send("--connect", endpoint, "--max-size", "1K", "x" * 2000)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"sent 4 times" in done.stderr
    assert b"--max-size" in done.stderr


def test_a_peer_of_the_wrong_type_is_given_up_at_once(context: Context, send: Send) -> None:
    _peer, endpoint = open_server(context, zmq.PUB)
    done = send("--connect", endpoint, "x")
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"{endpoint} is not a REP socket".encode() in done.stderr


def test_a_peer_that_answers_as_http_is_no_zeromq(send: Send) -> None:
    with listening(refuse_as_http) as endpoint:
        done = send("--connect", endpoint, "message")
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.search(rf"{endpoint} .* no ZeroMQ".encode(), done.stderr)


def test_a_banner_whose_sender_hangs_up_at_the_request_may_be_no_zeromq(send: Send) -> None:
    requests: list[bytes] = []

    def hang_up_at_a_line(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        with connection.makefile("rb") as stream:
            requests.append(stream.readline())

    with listening(hang_up_at_a_line) as endpoint:
        done = send("--connect", endpoint, "--retries", "1", "message\n")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"sent 2 times" in done.stderr
    assert b"never finished a handshake, and may be no ZeroMQ server" in done.stderr
    assert sum(b"message" in request for request in requests) == 2


def test_a_silent_listener_and_a_web_server_are_told_for_what_they_are(start: Start) -> None:
    web_server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=web_server.serve_forever)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as silent, web_server:
        try:
            endpoints = [f"tcp://127.0.0.1:{port}" for port in (silent.getsockname()[1], web_server.server_port)]
            started = time.monotonic()
            senders = [start("send", "--connect", endpoint, "x") for endpoint in endpoints]
            for sender, endpoint in zip(senders, endpoints, strict=True):
                sender.wait_for_notice(f"waiting for {endpoint}: it does not answer as ZeroMQ")
                assert time.monotonic() - started > 5
                sender.signal(signal.SIGINT)
                assert sender.wait(2) == 130
        finally:
            web_server.shutdown()
            thread.join(LIMIT)


def test_a_zmtp_2_peer_is_usable(send: Send) -> None:
    """It never raises HANDSHAKE_SUCCEEDED."""
    with listening(speak_zmtp_2) as endpoint:
        done = send("--connect", endpoint, "a", "b")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\nb\n", b"")


def test_a_zmtp_2_peer_that_dies_of_a_request_gets_it_no_more_often_than_allowed(send: Send) -> None:
    """libzmq reports its break as a failed handshake."""
    with listening(speak_zmtp_2) as endpoint:
        done = send("--connect", endpoint, "--retries", "0", "a", "poison")
    assert (done.returncode, done.stdout) == (1, b"a\n")
    assert b"no reply to 'poison', sent once" in done.stderr


def test_ctrl_c_ends_every_wait(context: Context, serve: Serve, start: Start) -> None:
    frozen, frozen_endpoint = serve()
    frozen.signal(signal.SIGSTOP)
    lost, lost_endpoint = open_server(context, zmq.REP)
    _mute, mute_endpoint = open_server(context, zmq.REP)
    with socket.create_server(("127.0.0.1", 0)) as silent, listening(greet_as_ssh) as banner:
        endpoints = [
            free_endpoint(),
            "tcp://no.such.name.invalid:5555",
            f"tcp://127.0.0.1:{silent.getsockname()[1]}",
            banner,
            mute_endpoint,
            frozen_endpoint,
            lost_endpoint,
        ]
        senders = [start("send", "--connect", endpoint, "x") for endpoint in endpoints]
        lost.recv()
        lost.close()
        for sender in senders:
            sender.wait_for_notice("waiting for")
        for sender in senders:
            sender.signal(signal.SIGINT)
            assert sender.wait(2) == 130
            assert sender.finish()[1] == b""


def test_ctrl_c_ends_a_wait_for_the_reader_of_the_replies(serve: Serve, start: Start) -> None:
    server, endpoint = serve("--quiet")
    sender = start("send", "--connect", endpoint, *["x" * 100_000] * 3)
    assert sender.popen.stdout
    assert sender.popen.stdout.read(1) == b"x"
    sender.signal(signal.SIGINT)
    assert sender.wait(2) == 130
    assert server.popen.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serve_though_its_output_blocks(serve: Serve, send: Send, number: int) -> None:
    server, endpoint = serve()
    message = "x" * 100_000  # more than a pipe takes
    assert send("--connect", endpoint, message).returncode == 0
    server.signal(number)
    assert server.wait(SOON) == 0
    assert server.notices[-3:-1] == [
        "zmqmsg: standard output blocks: the last request is not wholly printed",
        "zmqmsg: 1 request served",
    ]


def test_a_signal_ends_serve_though_its_notices_block_as_well(start: Start, send: Send) -> None:
    server = start("serve", "--bind", "tcp://127.0.0.1:*", stderr=subprocess.STDOUT)
    endpoint = server.read_line().split()[-1]
    assert send("--connect", endpoint, "x" * 100_000).returncode == 0
    server.signal(signal.SIGTERM)
    assert server.wait(SOON) == 0


def test_a_signal_lets_a_slow_reader_of_serve_have_all(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    message = b"x" * 2_000_000
    assert send("--connect", endpoint, "--file", "-", input=message).returncode == 0
    server.signal(signal.SIGTERM)
    assert server.popen.stdout
    read = b""
    while chunk := os.read(server.popen.stdout.fileno(), 65536):
        read += chunk
        time.sleep(0.1)
    assert (server.wait(), read) == (0, message + b"\n")


def test_a_second_signal_ends_serve_at_once(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    assert send("--connect", endpoint, "x" * 100_000).returncode == 0
    server.signal(signal.SIGINT)
    until(lambda: not is_caught(server, signal.SIGTERM))
    server.signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM


def is_caught(process: Process, number: int) -> bool:
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def test_serve_whose_reader_is_gone_answers_first(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    assert server.popen.stdout
    server.popen.stdout.close()
    assert send("--connect", endpoint, "x").stdout == b"x\n"
    assert server.wait() == 1
    assert server.notices[:-1] == [f"zmqmsg: listening on {endpoint}"]


def test_serve_whose_output_is_full_answers_first(serve: Serve, send: Send) -> None:
    with open("/dev/full", "wb") as full:
        server, endpoint = serve(stdout=full)
    assert send("--connect", endpoint, "x").stdout == b"x\n"
    assert server.wait() == 1
    assert server.notices[1] == "zmqmsg: cannot write to standard output: No space left on device"


@contextmanager
def queue(backend: str) -> Iterator[str]:
    """Run a ROUTER/DEALER queue whose workers connect to ``backend``, and give its front's endpoint."""
    context: Context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    endpoint = bind(front)
    bind(back, backend)

    def run() -> None:
        with front, back, suppress(zmq.ContextTerminated):
            zmq.proxy(front, back)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield endpoint
    finally:
        context.term()
        thread.join(LIMIT)


def has_notices(process: Process, text: str, count: int) -> bool:
    return sum(text in notice for notice in process.notices) == count


def test_a_worker_waits_aloud_for_its_queue_loses_it_and_finds_it_again(start: Start, send: Send) -> None:
    backend = free_endpoint()
    worker = start("serve", "--connect", backend)
    for number in (1, 2):
        until(partial(has_notices, worker, f"waiting for {backend}", number))
        with queue(backend) as front:
            until(partial(has_notices, worker, f"connected to {backend}", number))
            assert send("--connect", front, "--timeout", str(LIMIT), str(number)).stdout == b"%d\n" % number
    worker.signal(signal.SIGTERM)
    status, output, notices = worker.finish()
    assert (status, output) == (0, b"1\n2\n")
    assert len(notices) == 5, "each wait and each end of it once, and the count"
