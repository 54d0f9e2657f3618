"""What ``zmqmsg serve`` promises: it answers, prints, and stops without losing a reply."""

import os
import re
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import (
    LIMIT,
    LINUX,
    POSIX,
    Send,
    Serve,
    Start,
    address,
    ask,
    broker,
    free_endpoint,
    open_server,
    shell,
    soak,
    stop,
    until,
    waits,
)
from zmtp import greeting, ready, request

# Requests come in, are answered and printed


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ([], b"one\n\nt\two\n"),
        (["--null"], b"one\0\0t\two\0"),
        (["--quoted"], b"one\t\tt\\two\n"),
        (["--quiet"], b""),
    ],
)
def test_a_request_of_a_plain_req_socket_is_printed(
    context: Context, serve: Serve, options: list[str], printed: bytes
) -> None:
    server, endpoint = serve("--count", "1", *options)
    assert ask(context, endpoint, b"one", b"", b"t\two") == [b"one", b"", b"t\two"]
    assert server.finish()[:2] == (0, printed)


@LINUX
@pytest.mark.parametrize(
    ("options", "which", "is_open"),
    [
        ("--bind tcp://*:5555", "IPv4", True),
        ("--bind tcp://0.0.0.0:5555", "IPv4", True),
        ("--bind tcp://[::]:5555", "IPv4 and IPv6", True),
        ("--bind tcp://*:5555 --key server.key_secret", "IPv4", True),
        ("--bind tcp://*:5555 --key server.key_secret --client-keys .", "IPv4", False),
    ],
)
def test_a_bind_to_all_addresses_warns_unless_clients_need_keys(
    start: Start, tmp_path: Path, options: str, which: str, is_open: bool
) -> None:
    if "[::]" in options:
        try:
            socket.socket(socket.AF_INET6).close()
        except OSError:
            pytest.skip("needs IPv6")
    # In a network of its own, so that really nobody can reach it.
    isolated = shell(tmp_path, 'exec unshare --user --net "$python" "$@"')
    server = start("serve", *options.split(), cwd=tmp_path, **isolated)
    if "unshare" in server.wait_for_notice("listening|unshare")[0]:
        pytest.skip("needs unshare, and the right to make a network namespace")
    notices = stop(server)[2]
    assert f"zmqmsg: listening on all {which} addresses, port 5555" in notices
    warning = "warning: anyone .*port 5555.*--key.*--client-keys"
    assert any(re.search(warning, notice) for notice in notices) is is_open


@POSIX
def test_verbose_says_who_asked_how_much_and_how_long_it_took(
    context: Context, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    endpoints = ["--bind", "tcp://127.0.0.1:*", "--bind", "ipc://socket"]
    server, endpoint = serve("--verbose", *endpoints, "--exec", "sleep 0.2; cat")
    assert ask(context, endpoint, b"one", b"two") == [b"onetwo"]
    assert ask(context, "ipc://socket", b"x") == [b"x"]
    with socket.create_connection(address(endpoint), LIMIT) as old:  # libzmq keeps no address of it
        old.sendall(b"\xff" + bytes(8) + b"\x7f\x01\x03\0\0" + request(b"y"))
        server.wait_for_notice("request 3 from unknown address: 1 frame, 1 byte")
    line = r"request 1 from 127\.0\.0\.1: 2 frames, 6 bytes; reply: 1 frame, 6 bytes, (.*) ms$"
    assert float(server.wait_for_notice(line)[1]) >= 200
    server.wait_for_notice(f"request 2 from process {os.getpid()}: 1 frame, 1 byte")
    server.wait_for_notice("--quoted keeps them apart")


# What cannot be bound or connected to


@POSIX
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("tcp://192.0.2.1:5555", "this machine has no such address"),
        ("tcp://nosuch0:5555", "this machine has no such address or interface"),
        ("ipc:///nonexistent/a.sock", "there is no such directory"),
    ],
)
def test_an_endpoint_that_cannot_be_bound_is_a_failure_in_plain_words(
    start: Start, endpoint: str, reason: str
) -> None:
    assert start("serve", "--bind", endpoint).finish() == (
        1,
        b"",
        [f"zmqmsg: cannot bind {endpoint}: {reason}"],
    )


@POSIX
def test_a_second_bind_that_fails_leaves_no_ipc_file_behind(
    start: Start, echo: str, tmp_path: Path
) -> None:
    binds = ["--bind", "ipc://a.sock", "--bind", echo]
    status, output, notices = start("serve", *binds, cwd=tmp_path).finish()
    assert (status, output) == (1, b"")
    assert f"cannot bind {echo}: address in use" in notices[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_bad_broker_harms_neither_a_good_one_nor_what_is_bound(
    context: Context, serve: Serve, start: Start
) -> None:
    _publisher, bad = open_server(context, zmq.PUB)
    dealer, good = open_server(context, zmq.DEALER)
    reason = "it is a PUB socket, not a DEALER or REQ"
    server, endpoint = serve("--connect", bad)
    worker = start("serve", "--connect", bad, "--connect", good)
    for process in (server, worker):
        process.wait_for_notice(f"waiting for {bad}: {reason}")
    assert ask(context, endpoint, b"direct") == [b"direct"]
    dealer.send_multipart([b"", b"by the good broker"])
    assert dealer.recv_multipart() == [b"", b"by the good broker"]
    for process, printed in ((server, b"direct\n"), (worker, b"by the good broker\n")):
        status, output, notices = stop(process)
        assert (status, output) == (0, printed)
        assert sum(reason in notice for notice in notices) == 1
    status, output, notices = start("serve", "--connect", bad).finish()
    assert (status, output, notices[-1]) == (1, b"", f"zmqmsg: {bad}: {reason}")


# Workers


@POSIX
def test_one_server_serves_all_that_it_binds_and_connects_to(
    context: Context, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with broker() as (front, back):
        ends = ["--bind", "ipc://a.sock", "--bind", "tcp://127.0.0.1:*", "--connect", back]
        server, one = serve(*ends, "--count", "3", "--null", "--exec", "tr a-z A-Z")
        two = server.wait_for_notice("listening on (tcp.*)")[1]
        assert [ask(context, endpoint, b"hi") for endpoint in (one, two, front)] == [[b"HI"]] * 3
        assert server.finish()[:2] == (0, b"hi\0" * 3)


def test_a_worker_says_when_it_waits_for_its_broker_and_finds_it(
    context: Context, start: Start
) -> None:
    back = free_endpoint()
    worker = start("serve", "--connect", back)

    def count(text: str) -> int:
        return sum(f"{text} {back}" in notice for notice in worker.notices)

    def wait_for(times: int, text: str) -> None:
        until(lambda: count(text) >= times, lambda: worker.notices)

    for number in (1, 2):
        wait_for(number, "waiting for")
        with broker(back_endpoint=back) as (front, _back):
            wait_for(number, "connected to")
            assert ask(context, front, b"%d" % number) == [b"%d" % number]
    status, output, notices = stop(worker)
    assert (status, output) == (0, b"1\n2\n")
    assert count("connected to") == 2
    assert not [notice for notice in notices if "listening" in notice]


# The last reply


@contextmanager
def slow_client(endpoint: str, body: bytes) -> Iterator[BinaryIO]:
    """Send a request by hand; the context gets the stream to read the reply from, at any time."""
    with socket.socket() as client:
        # Otherwise the system would take the whole reply.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.settimeout(LIMIT)
        client.connect(address(endpoint))
        client.sendall(greeting() + ready(b"REQ"))
        with client.makefile("rb") as stream:
            stream.read(len(greeting()))
            stream.read(stream.read(2)[1])
            client.sendall(request(body))
            yield stream


@pytest.mark.parametrize("how", ["count", "signal"])
def test_the_last_reply_reaches_a_slow_client(serve: Serve, how: str) -> None:
    body = os.urandom(6_000_000)
    server, endpoint = serve(*["--count", "1"] * (how == "count"))
    with slow_client(endpoint, body) as stream:
        assert server.popen.stdout
        assert server.popen.stdout.read(len(body) + 1) == body + b"\n"  # printed, and so on its way
        if how == "signal":
            server.signal(signal.SIGTERM)
        server.wait_for_notice("waiting for the last reply")
        assert stream.read(2 + 9) == b"\x01\x00\x02" + len(body).to_bytes(8)
        assert stream.read(len(body)) == body
    assert server.wait() == 0


@LINUX
def test_a_second_signal_ends_the_wait_for_a_client_that_does_not_read(serve: Serve) -> None:
    server, endpoint = serve("--quiet")
    with slow_client(endpoint, bytes(6_000_000)) as stream:
        assert stream.read(1) == b"\x01"
        server.signal(signal.SIGTERM)
        server.wait_for_notice("waiting for the last reply.*second signal")
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM


@waits
@LINUX
@pytest.mark.parametrize("how", ["count", "signal"])
def test_a_signal_ends_that_wait_after_eight_seconds_and_says_so(serve: Serve, how: str) -> None:
    server, endpoint = serve("--quiet", *["--count", "1"] * (how == "count"))
    with slow_client(endpoint, bytes(6_000_000)) as stream:
        assert stream.read(1) == b"\x01"
        if how == "count":
            server.wait_for_notice("waiting for the last reply.*two signals")
        status, _, notices = stop(server)
    assert status == 1
    told = "the last reply may not have reached its client: it had not been read after 8 s"
    assert notices[-1] == f"zmqmsg: {told}"


@soak
def test_a_client_that_reads_nothing_ends_the_wait_within_35_seconds(serve: Serve) -> None:
    server, endpoint = serve("--quiet", "--count", "1")
    with slow_client(endpoint, bytes(6_000_000)):
        server.wait_for_notice("1 request served")
        assert server.wait(limit=35) == 0


@POSIX
def test_the_last_reply_of_a_worker_reaches_its_broker(context: Context, start: Start) -> None:
    """However soon after the start the request came."""
    command = "head -c 20000000 /dev/zero"
    for _ in range(4):
        dealer, back = open_server(context, zmq.DEALER)
        worker = start("serve", "--connect", back, "--count", "1", "--exec", command)
        dealer.send_multipart([b"", b"x"])  # waits for the worker
        assert worker.finish()[:2] == (0, b"x\n")
        assert dealer.recv_multipart() == [b"", bytes(20_000_000)]


@POSIX
def test_the_last_reply_reaches_a_broker_that_was_restarted_meanwhile(
    context: Context, start: Start, tmp_path: Path
) -> None:
    (one, one_back), (two, two_back) = (open_server(context, zmq.DEALER) for _ in range(2))
    both = ["--connect", one_back, "--connect", two_back, "--count", "2"]
    os.mkfifo(tmp_path / "fifo")
    command = "echo begun >&2; [ -p fifo ] && cat fifo; rm -f fifo; head -c 20000000 /dev/zero"
    worker = start("serve", *both, "--exec", command, cwd=tmp_path)
    for back in (one_back, two_back):
        worker.wait_for_notice(f"connected to {back}")
    one.send_multipart([b"", b"x"])
    worker.wait_for_notice("begun")
    two.close()
    two, _ = open_server(context, zmq.DEALER, two_back)
    (tmp_path / "fifo").write_bytes(b"")
    two.send_multipart([b"", b"x"])  # waits for the worker
    assert worker.finish()[:2] == (0, b"x\nx\n")
    assert (len(one.recv_multipart()), len(two.recv_multipart())) == (2, 2)


# Standard output and standard error


@LINUX
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
def test_where_printing_fails_the_request_is_answered_first(
    context: Context, serve: Serve, tmp_path: Path, redirection: str, reason: str
) -> None:
    server, endpoint = serve(**shell(tmp_path, f'exec "$python" "$@" {redirection}'))
    assert ask(context, endpoint, b"x") == [b"x"]
    status, _, notices = server.finish()
    told = f"zmqmsg: cannot write to standard output: {reason}; 1 request answered, but not printed"
    assert (status, notices[1:]) == (1, [told])


def test_a_signal_lets_a_slow_reader_have_all_that_is_printed(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    message = b"x" * 200_000  # more than a pipe holds
    assert send("--connect", endpoint, "--file", "-", input=message).returncode == 0
    assert stop(server)[:2] == (0, message + b"\n")


def test_a_signal_ends_the_wait_for_an_output_that_nobody_reads(serve: Serve, send: Send) -> None:
    unread = "zmqmsg: standard output is not being read"
    server, endpoint = serve()
    assert send("--connect", endpoint, "x" * 100_000).returncode == 0
    server.wait_for_notice(unread)
    server.signal(signal.SIGINT)
    assert server.wait() == 1
    assert server.notices[-2] == f"{unread}; 1 request was answered, but not printed"


@POSIX
def test_a_non_blocking_output_is_written_as_any_other(start: Start, echo: str) -> None:
    """Another process that shares it may have made it so."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    message = os.urandom(1_000_000)
    client = start("send", "--raw", "--connect", echo, "--file", "-", stdout=writing)
    assert client.popen.stdin
    client.popen.stdin.write(message)
    client.popen.stdin.close()
    until(lambda: not select.select([], [writing], [], 0)[1])  # it is full
    os.close(writing)
    with open(reading, "rb") as stream:
        assert stream.read() == message
    assert client.finish()[0] == 0


@POSIX
def test_notices_that_nobody_reads_keep_no_signal_from_ending_it(
    start: Start, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        server = start("serve", "--bind", "ipc://a.sock", stderr=writing, cwd=tmp_path)
        until((tmp_path / "a.sock").exists)
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
    finally:
        os.close(reading)
        os.close(writing)
