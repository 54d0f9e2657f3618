"""A server that stops: what it has received is answered, and what keeps it from that is said."""

import signal
import sys
import time
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context, Socket

from conftest import (
    LIMIT,
    LINUX,
    POSIX,
    Process,
    Send,
    Serve,
    Start,
    ask,
    broker,
    is_running,
    memory,
    open_server,
    stop,
    until,
    waits,
)

BLOCKED_ECHO = """\
import os, sys, time
for line in sys.stdin:
    print("begun", file=sys.stderr, flush=True)
    while not os.path.exists("go"):
        time.sleep(0.01)
    print(line, end="", flush=True)
"""  # a filter that answers nothing until there is a file with the name "go"


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


def test_all_that_was_received_is_answered_before_the_end(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "echo.py").write_text(BLOCKED_ECHO)
    server, endpoint = serve("--filter", f'"{sys.executable}" echo.py', cwd=tmp_path)
    clients = clients_of(context, endpoint, 20)
    server.wait_for_notice("begun")
    time.sleep(0.3)  # nothing tells when the others have come
    server.signal(signal.SIGTERM)
    server.wait_for_notice("stopping; what has been received is answered")
    (tmp_path / "go").touch()
    assert [client.recv() for client in clients] == [b"%d" % number for number in range(20)]
    status, output, _ = server.finish()
    assert (status, len(output.splitlines())) == (0, 20)


@POSIX
def test_a_worker_that_stops_answers_what_its_broker_has_handed_over(
    context: Context, start: Start
) -> None:
    with broker() as (front, back):
        workers = [start("serve", "--connect", back, "--exec", "sleep 0.05; cat") for _ in range(2)]
        for worker in workers:
            worker.wait_for_notice("connected to")
        clients = clients_of(context, front, 12)
        assert workers[0].read_line().isdigit()
        assert stop(workers[0])[0] == 0
        assert [client.recv() for client in clients] == [b"%d" % number for number in range(12)]


@waits
@POSIX
def test_what_takes_longer_than_five_seconds_is_left_and_told_of(
    context: Context, serve: Serve
) -> None:
    server, endpoint = serve("--exec", "sleep 0.5; cat")
    _clients = clients_of(context, endpoint, 20)
    assert server.read_line().isdigit()  # the first one is served, whoever it is
    status, _, notices = stop(server)
    assert status == 1
    assert any("still wait are not answered" in notice for notice in notices), notices


# Programs that take long, or hang

COMMAND = "its command had not finished"
FILTER = "the filter had not answered"


@waits
@POSIX
@pytest.mark.parametrize(
    ("option", "command", "why"),
    [
        ("--exec", "exec sleep 600", COMMAND),
        ("--exec", "trap '' TERM INT HUP; sleep 600; sleep 600", COMMAND),
        ("--exec", "exec >&- <&-; sleep 600", COMMAND),
        ("--exec", "sleep 600 & echo left", COMMAND),
        ("--filter", "exec sort", FILTER),
        ("--filter", "exec sleep 600", FILTER),
    ],
    ids=[
        "a command that hangs",
        "a command that ignores signals",
        "a command that has closed its streams",
        "a command that leaves a program running",
        "a filter that answers at the end",
        "a filter that reads nothing",
    ],
)
def test_one_signal_ends_it_whatever_its_command_does(
    serve: Serve, start: Start, option: str, command: str, why: str
) -> None:
    server, endpoint = serve(option, f"echo $$ >&2; {command}")
    # More than a pipe holds, so that it waits for a filter that does not read.
    client = start("send", "--connect", endpoint, "--retries", "0", "x" * 100_000)
    program = int(server.wait_for_notice(r"^(\d+)$")[1])
    if option == "--filter":
        server.wait_for_notice("the filter has not answered")
    status, output, notices = stop(server)
    assert (status, output) == (1, b"")
    assert (
        notices[-1]
        == f"zmqmsg: 1 request was received and not answered, nor any behind it: {why} after 8 s"
    )
    assert client.finish()[:2] == (3, b"")
    until(lambda: not is_running(program))


@waits
@POSIX
@pytest.mark.parametrize(
    ("option", "end", "reply"),
    [("--exec", "", b"late\n"), ("--filter", "; cat", b"late")],
    ids=["command", "filter"],
)
def test_what_is_answered_within_eight_seconds_is_answered(
    serve: Serve, start: Start, option: str, end: str, reply: bytes
) -> None:
    server, endpoint = serve(option, f"read line; echo begun >&2; sleep 6; echo late{end}")
    client = start("send", "--raw", "--connect", endpoint, "--retries", "0", "x\n")
    server.wait_for_notice("begun")
    assert stop(server)[:2] == (0, b"x\n\n")
    assert client.finish()[:2] == (0, reply)


SAVING = "cat; sleep {}; echo saved > state"
KILLED = "the filter was killed: it had not ended"


@POSIX
@pytest.mark.parametrize("how", ["signal", "count"])
def test_a_filter_has_the_time_to_save_its_state(
    context: Context, serve: Serve, tmp_path: Path, how: str
) -> None:
    count = ["--count", "1"] if how == "count" else []
    server, endpoint = serve("--filter", SAVING.format(3), *count, cwd=tmp_path)
    assert ask(context, endpoint, b"x") == [b"x"]
    if how == "signal":
        server.signal(signal.SIGTERM)
    assert server.finish()[:2] == (0, b"x\n")
    assert (tmp_path / "state").read_text() == "saved\n"


@waits
@POSIX
def test_a_filter_that_leaves_requests_has_the_time_to_save_its_state(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    slow = "while read -r line; do sleep 0.5; echo $line; done; sleep 1.5; echo saved > state"
    server, endpoint = serve("--filter", slow, cwd=tmp_path)
    _clients = clients_of(context, endpoint, 20)
    assert server.read_line().isdigit()
    status, _, notices = stop(server)
    assert status == 1
    assert "still wait are not answered" in notices[-1]
    assert (tmp_path / "state").read_text() == "saved\n"


@waits
@POSIX
@pytest.mark.parametrize("how", ["signal", "count"])
def test_a_filter_that_takes_longer_to_end_is_killed_and_told_of(
    context: Context, serve: Serve, tmp_path: Path, how: str
) -> None:
    count = ["--count", "1"] if how == "count" else []
    filter_command = f"echo $$ >&2; {SAVING.format(600)}"
    server, endpoint = serve("--filter", filter_command, *count, cwd=tmp_path)
    program = int(server.wait_for_notice(r"^(\d+)$")[1])
    assert ask(context, endpoint, b"x") == [b"x"]
    if how == "signal":
        server.signal(signal.SIGTERM)
    status, output, notices = server.finish()
    assert (status, output) == (1, b"x\n")
    told = f"{KILLED} 5 s after its input" if how == "count" else f"{KILLED} after 8 s"
    assert notices[-1] == f"zmqmsg: {told}"
    until(lambda: not is_running(program))


def freeze(worker: Process, dealer: Socket) -> None:
    """Stop the process of ``worker`` when both ends have taken the connection to ``dealer``."""
    worker.wait_for_notice("connected to")
    assert dealer.poll(LIMIT * 1000, zmq.POLLOUT)
    worker.signal(signal.SIGSTOP)


@POSIX
def test_commands_that_crash_leave_no_request_unanswered(context: Context, start: Start) -> None:
    dealer, back = open_server(context, zmq.DEALER)
    worker = start("serve", "--quiet", "--connect", back, "--exec", "cat; kill -SEGV $$")
    freeze(worker, dealer)
    for number in range(20):
        dealer.send_multipart([b"", b"%d" % number])
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGCONT)
    assert [int(dealer.recv_multipart()[1]) for _ in range(20)] == list(range(20))
    assert worker.finish()[0] == 0


# Workers with a backlog

ECHO = pytest.param([], 500, id="echo")
FILTER_ECHO = pytest.param(["--filter", "cat"], 500, id="filter")
COMMAND_ECHO = pytest.param(["--exec", "cat"], 30, id="command")


@POSIX
@pytest.mark.parametrize("size", [1, 20_000], ids=["small", "large"])
@pytest.mark.parametrize(("options", "count"), [ECHO, FILTER_ECHO, COMMAND_ECHO])
def test_a_worker_answers_its_whole_backlog_before_it_stops(
    context: Context, start: Start, options: list[str], count: int, size: int
) -> None:
    dealer, back = open_server(context, zmq.DEALER)
    worker = start("serve", "--quiet", "--connect", back, *options)
    freeze(worker, dealer)
    requests = [b"%d " % number + b"x" * size for number in range(count)]
    for body in requests:
        dealer.send_multipart([b"", body])
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGCONT)
    assert [dealer.recv_multipart()[1] for _ in requests] == requests
    status, _, notices = worker.finish()
    assert (status, notices[-1]) == (0, f"zmqmsg: {count} requests served")


@LINUX
@pytest.mark.parametrize("size", [1, 10_000_000], ids=["small request", "large request"])
def test_a_command_that_prints_without_end_is_stopped_and_serve_goes_on(
    serve: Serve, send: Send, tmp_path: Path, size: int
) -> None:
    (tmp_path / "request").write_bytes(b"x" * size)
    command = "head -c 1 | grep -q x && exec cat /dev/zero; echo fine"
    server, endpoint = serve("--quiet", "--exec", command, "--max-size", "16M")
    done = send("--raw", "--connect", endpoint, "--file", f"{tmp_path}/request")
    assert (done.returncode, done.stdout) == (0, b"")
    assert memory(server.pid, "VmHWM") < 200_000, "KiB"
    assert send("--raw", "--connect", endpoint, "y").stdout == b"fine\n"
    status, _, notices = stop(server)
    assert (status, notices[-1]) == (0, "zmqmsg: 2 requests served")
    assert "printed more than --max-size allows" in notices[1]


@LINUX
def test_a_filter_that_prints_without_end_ends_serve(serve: Serve, send: Send) -> None:
    command = "head -c 1 > /dev/null; exec cat /dev/zero"
    server, endpoint = serve("--filter", command, "--max-size", "16M")
    assert send("--connect", endpoint, "--retries", "0", "x").returncode in (1, 3)
    status, output, notices = server.finish()
    assert (status, output) == (1, b"")
    assert "printed more than --max-size allows" in notices[-1]


@pytest.mark.parametrize(
    ("option", "end", "status"), [("--exec", "", 0), ("--filter", "chr(10)", 3)]
)
def test_a_reply_may_have_just_the_size_that_is_allowed(
    serve: Serve, send: Send, option: str, end: str, status: int
) -> None:
    for size in 1000, 1001:
        program = f"input(); print({size} * chr(120), end={end or 'str()'}, flush=True); input()"
        server, endpoint = serve(option, f'"{sys.executable}" -c "{program}"', "--max-size", "1000")
        done = send("--raw", "--connect", endpoint, "--retries", "0", "x\n")
        expected = (0, 1000) if size == 1000 else (status, 0)
        assert (done.returncode, len(done.stdout)) == expected
    server.wait_for_notice("printed more than --max-size allows")


def test_an_output_that_is_closed_stops_it_after_the_reply(context: Context, serve: Serve) -> None:
    server, endpoint = serve()
    assert server.popen.stdout
    server.popen.stdout.close()
    assert ask(context, endpoint, b"x") == [b"x"]
    assert server.wait() == 1
    notice = "zmqmsg: standard output is closed; 1 request answered, but not printed"
    assert server.notices[-2] == notice


@LINUX
def test_a_reply_that_came_while_send_was_stopped_is_printed(
    context: Context, start: Start
) -> None:
    """A laptop that sleeps oversleeps the deadline as well."""
    server, endpoint = open_server(context, zmq.REP)
    options = ["--timeout", "2", "--retries", "0"]
    senders = [start("send", "--connect", endpoint, *options) for _ in range(3)]
    for sender in senders:
        sender.send_line(b"x")
        request = server.recv()
        sender.signal(signal.SIGSTOP)
        server.send(request)
    time.sleep(2.5)  # longer than the timeout
    for sender in senders:
        sender.signal(signal.SIGCONT)
    assert [sender.finish()[:2] for sender in senders] == [(0, b"x\n")] * 3
