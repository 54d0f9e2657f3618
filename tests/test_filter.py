"""``zmqmsg serve --filter``: a program that stays, a line in and a line out."""

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zmqmsg.sockets import Context

from conftest import LIMIT, POSIX, Process, Send, Serve, Start, is_running, soak, until

pytestmark = POSIX

PYTHON = f"{sys.executable} -u -c 'for line in open(0): print(line[::-1].strip())'"
COUNTER = 'n=0; while read -r line; do n=$((n+1)); echo "$n $line"; done'


def ask(send: Send, endpoint: str, *messages: str | bytes) -> bytes:
    done = send("--connect", endpoint, *messages)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.mark.parametrize(
    ("command", "replies"),
    [
        ("cat", b"one\n\ntwo words\n"),
        (COUNTER, b"1 one\n2 \n3 two words\n"),
        ("sed -u s/o/0/g", b"0ne\n\ntw0 w0rds\n"),
        (PYTHON, b"eno\n\nsdrow owt\n"),
        ("gawk '{print NR; fflush()}'", b"1\n2\n3\n"),
        ("jq --unbuffered -R length", b"3\n0\n9\n"),
    ],
    ids=["cat", "shell", "sed", "python", "gawk", "jq"],
)
def test_each_request_is_answered_by_a_line_of_the_program_that_stays(
    serve: Serve, send: Send, command: str, replies: bytes
) -> None:
    if not shutil.which(command.split()[0]) and command != COUNTER:
        pytest.skip(f"{command.split()[0]} is not installed")
    server, endpoint = serve("--filter", command, "--count", "3")
    assert ask(send, endpoint, "one", "", "two words") == replies
    assert server.finish()[:2] == (0, b"one\n\ntwo words\n")


@pytest.mark.parametrize(
    ("option", "request_"), [("--null", b"two\nlines"), ("--raw", b"a\\n"), ("--quoted", b"a\tb\n\0\xff")]
)
def test_what_a_line_is_depends_on_the_form(
    serve: Serve, send: Send, tmp_path: Path, option: str, request_: bytes
) -> None:
    _, endpoint = serve("--filter", "cat", option)
    (tmp_path / "request").write_bytes(request_)
    done = send("--raw", "--connect", endpoint, "--file", f"{tmp_path}/request")
    assert (done.returncode, done.stdout) == (0, request_)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_any_frames_come_back_through_a_quoted_filter(quoted_cat: "Client", frames: list[bytes]) -> None:
    assert quoted_cat.ask(frames) == frames


class Client:
    """A plain REQ socket."""

    def __init__(self, context: Context, endpoint: str) -> None:
        self._socket = context.socket(zmq.REQ)
        self._socket.rcvtimeo = LIMIT * 1000
        self._socket.connect(endpoint)

    def ask(self, frames: Sequence[bytes]) -> list[bytes]:
        self._socket.send_multipart(frames)
        return self._socket.recv_multipart()


@pytest.fixture
def quoted_cat(context: Context, serve: Serve) -> Client:
    """A client of a server that echoes through a quoted filter."""
    return Client(context, serve("--quiet", "--quoted", "--filter", "cat")[1])


def test_a_large_request_goes_through_while_the_filter_answers(context: Context, serve: Serve) -> None:
    _, endpoint = serve("--quiet", "--filter", "cat")
    message = os.urandom(64 << 20).replace(b"\n", b" ")
    client = Client(context, endpoint)
    assert client.ask([message]) == [message]
    assert client.ask([b"next"]) == [b"next"]


def test_a_line_cannot_hold_its_own_end_and_the_next_requests_get_their_own_replies(
    context: Context, serve: Serve
) -> None:
    server, endpoint = serve("--filter", COUNTER)
    client = Client(context, endpoint)
    assert [client.ask([body]) for body in (b"a", b"two\nlines", b"x\n\n", b"b")] == [[b"1 a"], [b""], [b""], [b"2 b"]]
    server.signal(signal.SIGTERM)
    assert sum("since a filter reads one; use --exec, or --quoted" in notice for notice in server.finish()[2]) == 2


def test_the_end_of_a_line_that_ends_a_request_is_the_end_of_the_line(context: Context, serve: Serve) -> None:
    """As of a file of one line."""
    _, endpoint = serve("--filter", COUNTER)
    client = Client(context, endpoint)
    assert [client.ask([body]) for body in (b"a\n", b"\n", b"b")] == [[b"1 a"], [b"2 "], [b"3 b"]]


def test_several_frames_are_joined_and_a_notice_says_so_once(context: Context, serve: Serve) -> None:
    server, endpoint = serve("--filter", "cat")
    client = Client(context, endpoint)
    assert [client.ask([b"a", b"b"]) for _ in range(2)] == [[b"ab"]] * 2
    server.signal(signal.SIGTERM)
    assert sum("--quoted keeps them apart" in notice for notice in server.finish()[2]) == 1


def test_a_filter_that_does_not_flush_is_told_of_and_waited_for(serve: Serve, start: Start) -> None:
    server, endpoint = serve("--filter", "read line; sleep 1.5; echo late; cat")
    client = start("send", "--connect", endpoint, "x")
    server.wait_for_notice("the filter has not answered for a second; it may not flush its output, or read ahead")
    assert client.finish()[:2] == (0, b"late\n")


STRAY = "which no request asked for; replies cannot be told apart"
ENDED = "so there can be no more replies"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("read line; exit 3", f"the filter exited with status 3, {ENDED}"),
        ("read line; kill -KILL $$", f"the filter was killed by signal 9, {ENDED}"),
        ("read line; exec >&-; sleep 5", f"the filter closed its input or output, {ENDED}"),
        ("read line; printf 'no end'; exit 0", f"the filter exited with status 0, {ENDED}"),
        (r"read line; printf 'one\ntwo\n'; cat", rf"the filter printed 'two\n', {STRAY}"),
        ("read line; printf 'one\ntwo'; cat", f"the filter printed 'two', {STRAY}"),
    ],
)
def test_the_request_at_hand_stays_unanswered_when_replies_cannot_be_told_apart(
    serve: Serve, start: Start, command: str, reason: str
) -> None:
    server, endpoint = serve("--filter", command)
    client = start("send", "--connect", endpoint, "--retries", "0", "x")
    status, output, notices = server.finish()
    assert (status, output, notices[-1]) == (1, b"", f"zmqmsg: {reason}")
    status, output, notices = client.finish()
    assert (status, output) == (3, b"")
    assert f"connection to {endpoint} lost" in notices[-1]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo hello; cat", STRAY),
        ("exit 1", ENDED),
        ("no-such-command", "exited with status 127"),
        ("sleep 0.2", ENDED),
    ],
)
def test_a_filter_that_speaks_or_ends_before_any_request_ends_serve(serve: Serve, command: str, reason: str) -> None:
    server, _ = serve("--filter", command)
    status, _, notices = server.finish()
    assert status == 1
    assert reason in notices[-1]


def test_a_late_second_line_is_no_reply_to_a_later_request(serve: Serve, send: Send, start: Start) -> None:
    server, endpoint = serve("--filter", "read line; echo one; sleep 0.3; echo stray; cat")
    assert ask(send, endpoint, "x") == b"one\n"
    assert server.wait() == 1
    assert STRAY in server.notices[-2]


# Stopping


def started(server: Process) -> list[int]:
    """Return the ids of the processes that a filter has told of."""
    return [int(pid) for pid in server.wait_for_notice(r"^\d+( \d+)*$")[0].split()]


@pytest.mark.parametrize("command", ["exec cat", "trap '' TERM INT HUP; cat; sleep 600", "sleep 600 & cat"])
def test_a_signal_ends_the_filter_by_the_end_of_its_input_and_then_by_force(serve: Serve, command: str) -> None:
    server, _ = serve("--filter", f"echo $$ >&2; {command}")
    pids = started(server)
    server.signal(signal.SIGTERM)
    assert server.finish()[0] == 0
    until(lambda: not any(map(is_running, pids)))


def test_the_first_signal_waits_for_the_reply_and_the_second_ends_all_at_once(serve: Serve, start: Start) -> None:
    server, endpoint = serve("--filter", "read line; sleep 600 & echo $$ $! >&2; wait")
    start("send", "--connect", endpoint, "x")
    pids = started(server)
    server.signal(signal.SIGINT)
    server.wait_for_notice("stopping after the current request; a second signal ends it at once")
    server.signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT
    until(lambda: not any(map(is_running, pids)))


def test_a_filter_that_is_stopped_together_with_us_is_no_failure(serve: Serve) -> None:
    server, _ = serve("--filter", "echo $$ >&2; exec cat")
    for pid in (*started(server), server.pid):
        os.kill(pid, signal.SIGTERM)
    assert server.finish()[0] == 0


# At full size


@pytest.mark.parametrize(("count", "kills"), [(1000, 2), pytest.param(100_000, 10, marks=soak)])
def test_no_reply_goes_to_the_wrong_request_though_the_server_is_killed(
    serve: Serve, start: Start, count: int, kills: int
) -> None:
    server, endpoint = serve("--quiet", "--filter", "cat")
    sender = start("send", "--connect", endpoint)
    requests = [b"%d" % number for number in range(count)]

    def feed() -> None:
        for request in requests:
            sender.send_line(request)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    replies: list[bytes] = []
    for kill in range(1, kills + 1):
        replies += [sender.read_line() for _ in range(count * kill // (kills + 1) - len(replies))]
        server.signal(signal.SIGKILL)
        server.wait()
        server, _ = serve("--quiet", "--filter", "cat", "--bind", endpoint)
    replies += [sender.read_line() for _ in range(count - len(replies))]
    feeder.join(LIMIT)
    assert replies == requests
    assert re.fullmatch("0|1", str(sender.finish()[0]))
