"""``zmqmsg serve --filter``: a program that stays, a line in and a line out."""

import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqmsg.sockets import Context

from conftest import (
    LIMIT,
    POSIX,
    Process,
    Send,
    Serve,
    Start,
    ask,
    is_running,
    soak,
    stop,
    until,
    waits,
)

pytestmark = POSIX

COUNTER = 'n=0; while read -r line; do n=$((n+1)); echo "$n $line"; done'


def test_each_request_is_answered_by_a_line_of_the_filter(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--filter", COUNTER, "--count", "3")
    assert send("--connect", endpoint, "one", "", "2 words").stdout == b"1 one\n2 \n3 2 words\n"
    assert server.finish()[:2] == (0, b"one\n\n2 words\n")


@pytest.mark.parametrize(("option", "body"), [("--null", b"two\nlines"), ("--raw", b"a\\n")])
def test_what_a_line_is_depends_on_the_form(
    context: Context, serve: Serve, option: str, body: bytes
) -> None:
    assert ask(context, serve("--filter", "cat", option)[1], body) == [body]


def test_any_frames_come_back_through_a_quoted_filter(context: Context, serve: Serve) -> None:
    _, endpoint = serve("--quiet", "--quoted", "--filter", "cat")

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.binary(max_size=200), min_size=1, max_size=5))
    def check(frames: list[bytes]) -> None:
        assert ask(context, endpoint, *frames) == frames

    check()


def test_a_large_request_goes_through_while_the_filter_answers(
    context: Context, serve: Serve
) -> None:
    _, endpoint = serve("--quiet", "--filter", "cat")
    message = os.urandom(64 << 20).replace(b"\n", b" ")
    assert ask(context, endpoint, message) == [message]
    assert ask(context, endpoint, b"next") == [b"next"]


def test_a_request_is_one_line(context: Context, serve: Serve) -> None:
    """A newline that ends a request is the end of its line, as in a file of one line."""
    server, endpoint = serve("--filter", COUNTER)
    expected = {
        (b"a",): b"1 a",
        (b"two\nlines",): b"",
        (b"x\n\n",): b"",
        (b"b\n",): b"2 b",
        (b"\n",): b"3 ",
        (b"a", b"b"): b"4 ab",
        (b"c", b"d"): b"5 cd",
    }
    for frames, reply in expected.items():
        assert ask(context, endpoint, *frames) == [reply]
    notices = "\n".join(stop(server)[2])
    assert notices.count("since a filter reads one; use --exec, or --quoted") == 2
    assert notices.count("--quoted keeps them apart") == 1


def test_a_filter_that_does_not_flush_is_told_of_and_waited_for(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    server, endpoint = serve("--filter", "read line; cat fifo -", cwd=tmp_path)
    client = start("send", "--connect", endpoint, "x")
    server.wait_for_notice(
        "the filter has not answered for a second; it may not flush its output, or read ahead"
    )
    (tmp_path / "fifo").write_bytes(b"late\n")
    assert client.finish()[:2] == (0, b"late\n")


@soak
def test_a_filter_that_hangs_again_and_again_is_told_of_once_a_minute(
    context: Context, serve: Serve
) -> None:
    server, endpoint = serve("--filter", "while read line; do sleep 1.8; echo $line; done")
    for _ in range(3):
        assert ask(context, endpoint, b"x") == [b"x"]
    notice = "the filter has not answered for a second; .*"
    server.wait_for_notice(rf"{notice} \(2 more in the last minute\)", 2 * LIMIT)
    notices = stop(server)[2]
    assert len([each for each in notices if re.search(notice, each)]) == 2


STRAY = "which no request asked for; replies cannot be told apart"
ENDED = "so there can be no more replies"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("read line; exit 3", f"the filter exited with status 3, {ENDED}"),
        ("read line; exec >&-; sleep 600", f"the filter closed its input or output, {ENDED}"),
        ("read line; printf 'no end'; exit 0", f"the filter exited with status 0, {ENDED}"),
        (r"read line; printf 'one\ntwo\n'; cat", rf"the filter printed 'two\n', {STRAY}"),
        ("read line; printf 'one\ntwo'; cat", f"the filter printed 'two', {STRAY}"),
    ],
)
def test_a_request_stays_unanswered_when_replies_cannot_be_told_apart(
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
        ("no-such-command", "exited with status 127"),
        ("sleep 0.2", ENDED),
    ],
)
def test_a_filter_that_speaks_or_ends_before_any_request_ends_serve(
    serve: Serve, command: str, reason: str
) -> None:
    server, _ = serve("--filter", command)
    status, _, notices = server.finish()
    assert status == 1
    assert reason in notices[-1]


def test_a_late_second_line_is_no_reply_to_a_later_request(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    server, endpoint = serve("--filter", "read line; echo one; cat fifo -", cwd=tmp_path)
    assert ask(context, endpoint, b"x") == [b"one"]
    (tmp_path / "fifo").write_bytes(b"stray\n")
    assert server.wait() == 1
    assert STRAY in server.notices[-2]


# Stopping


def started(server: Process) -> list[int]:
    """Return the ids of the processes that a filter has told of."""
    return [int(pid) for pid in server.wait_for_notice(r"^\d+( \d+)*$")[0].split()]


@waits
@pytest.mark.parametrize(
    ("command", "status"),
    [("exec cat", 0), ("trap '' TERM INT HUP; cat; sleep 600", 1), ("sleep 600 & cat", 0)],
)
def test_a_signal_ends_the_filter_with_its_input_or_by_force(
    serve: Serve, command: str, status: int
) -> None:
    server, _ = serve("--filter", f"echo $$ >&2; {command}")
    pids = started(server)
    server.signal(signal.SIGTERM)
    assert server.finish()[0] == status
    until(lambda: not any(map(is_running, pids)))


def test_a_filter_that_is_stopped_together_with_us_is_no_failure(serve: Serve) -> None:
    server, _ = serve("--filter", "echo $$ >&2; exec cat")
    for pid in (*started(server), server.pid):
        os.kill(pid, signal.SIGTERM)
    assert server.finish()[0] == 0
