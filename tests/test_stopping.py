"""A server that stops: what it has received is answered, and what stands in the way of that is said."""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context, Socket

from conftest import LIMIT, LINUX, POSIX, Send, Serve, Start, ask, broker, memory, open_server, stop


def slow_echo(seconds: float) -> str:
    """Return a command that is the echo, and takes its time."""
    if sys.platform != "win32":
        return f"sleep {seconds}; cat"
    return f'"{sys.executable}" -c "import sys, time; time.sleep({seconds}); sys.stdout.write(sys.stdin.read())"'


def clients_of(context: Context, endpoint: str, count: int) -> list[Socket]:
    """Return plain REQ sockets, each of which has sent a request."""
    clients = []
    for number in range(count):
        client = context.socket(zmq.REQ)
        client.linger = 0
        client.rcvtimeo = LIMIT * 1000
        client.connect(endpoint)
        client.send(b"%d" % number)
        clients.append(client)
    return clients


def test_all_that_was_received_is_answered_before_the_end(context: Context, serve: Serve) -> None:
    server, endpoint = serve("--verbose", "--exec", slow_echo(0.05))
    count = 20 if sys.platform != "win32" else 10
    clients = clients_of(context, endpoint, count)
    server.wait_for_notice("request 1 from")
    time.sleep(0.3)  # nothing tells when the others have come
    server.signal(signal.SIGTERM)
    replies = [client.recv() for client in clients]
    assert replies == [b"%d" % number for number in range(count)], server.notices
    status, output, _ = server.finish()
    assert (status, len(output.splitlines())) == (0, count)


@POSIX
def test_a_worker_that_stops_answers_what_its_broker_has_handed_over(
    context: Context, start: Start
) -> None:
    with broker() as (front, back):
        workers = [start("serve", "--connect", back, "--exec", slow_echo(0.05)) for _ in range(2)]
        for worker in workers:
            worker.wait_for_notice("connected to")
        clients = clients_of(context, front, 20)
        assert workers[0].read_line().isdigit()
        assert stop(workers[0])[0] == 0
        assert [client.recv() for client in clients] == [b"%d" % number for number in range(20)]


def test_what_takes_longer_than_five_seconds_is_left_and_told_of(
    context: Context, serve: Serve
) -> None:
    server, endpoint = serve("--exec", slow_echo(0.5))
    _clients = clients_of(context, endpoint, 20)
    assert server.read_line().isdigit()  # the first one is served, whoever it is
    started = time.monotonic()
    status, _, notices = stop(server)
    assert (status, 4 < time.monotonic() - started < 8) == (0, True)
    assert any("still wait are not answered" in notice for notice in notices), notices


@LINUX
@pytest.mark.parametrize("option", ["--exec", "--filter"])
@pytest.mark.parametrize("size", [1, 10_000_000], ids=["small request", "large request"])
def test_a_command_that_prints_without_end_is_stopped(
    serve: Serve, start: Start, tmp_path: Path, option: str, size: int
) -> None:
    (tmp_path / "request").write_bytes(b"x" * size)
    server, endpoint = serve(option, "read line; exec cat /dev/zero", "--max-size", "16M")
    client = start("send", "--connect", endpoint, "--retries", "0", "--file", f"{tmp_path}/request")
    peak = 0
    while server.popen.poll() is None:
        with suppress(IndexError, OSError):  # it has just ended
            peak = memory(server.pid, "VmHWM")
        time.sleep(0.01)
    status, output, notices = server.finish()
    assert (status, output, peak < 200 << 10) == (1, b"", True)
    assert "printed more than --max-size" in notices[-1]
    assert client.finish()[0] in (1, 3)


@pytest.mark.parametrize(("option", "end"), [("--exec", ""), ("--filter", "chr(10)")])
def test_a_reply_may_have_just_the_size_that_is_allowed(
    serve: Serve, send: Send, option: str, end: str
) -> None:
    for size in 1000, 1001:
        program = f"input(); print({size} * chr(120), end={end or 'str()'}, flush=True); input()"
        server, endpoint = serve(option, f'"{sys.executable}" -c "{program}"', "--max-size", "1000")
        done = send("--connect", endpoint, "--retries", "0", "x\n")
        assert (done.returncode, len(done.stdout)) == ((0, 1001) if size == 1000 else (3, 0))
    assert any("printed more than --max-size" in notice for notice in server.finish()[2])


def test_an_output_that_is_closed_stops_it_after_the_reply(context: Context, serve: Serve) -> None:
    server, endpoint = serve()
    assert server.popen.stdout
    server.popen.stdout.close()
    assert ask(context, endpoint, b"x") == [b"x"]
    assert server.wait() == 1
    assert (
        server.notices[-2]
        == "zmqmsg: standard output is closed; 1 request answered, but not printed"
    )


@LINUX
def test_a_reply_that_came_while_send_was_stopped_is_printed(
    context: Context, start: Start
) -> None:
    """A laptop that sleeps oversleeps the deadline as well."""
    server, endpoint = open_server(context, zmq.REP)
    senders = [
        start("send", "--connect", endpoint, "--timeout", "0.5", "--retries", "0") for _ in range(5)
    ]
    for sender in senders:
        sender.send_line(b"x")
        request = server.recv()
        sender.signal(signal.SIGSTOP)
        server.send(request)
    time.sleep(0.8)  # longer than the timeout
    for sender in senders:
        sender.signal(signal.SIGCONT)
    assert [sender.finish()[:2] for sender in senders] == [(0, b"x\n")] * 5
