"""``zmqmsg serve --filter``: a program that stays, a line in and a line out."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqmsg.sockets import Context

from conftest import POSIX, Process, Send, Serve, Start, ask, is_running, stop, until

pytestmark = POSIX

COUNTER = 'n=0; while read -r line; do n=$((n+1)); echo "$n $line"; done'


@pytest.mark.parametrize(
    ("command", "replies"),
    [
        ("sed -u s/o/0/g", b"0ne\n\ntw0 w0rds\n"),
        ("gawk '{print NR; fflush()}'", b"1\n2\n3\n"),
        ("jq --unbuffered -R length", b"3\n0\n9\n"),
    ],
    ids=["sed", "gawk", "jq"],
)
def test_each_request_is_answered_by_a_line_of_the_program_that_stays(
    serve: Serve, send: Send, command: str, replies: bytes
) -> None:
    if not shutil.which(command.split()[0]):
        pytest.skip(f"{command.split()[0]} is not installed")
    server, endpoint = serve("--filter", command, "--count", "3")
    assert send("--connect", endpoint, "one", "", "two words").stdout == replies
    assert server.finish()[:2] == (0, b"one\n\ntwo words\n")


@pytest.mark.parametrize(("option", "body"), [("--null", b"two\nlines"), ("--raw", b"a\\n")])
def test_what_a_line_is_depends_on_the_form(
    context: Context, serve: Serve, option: str, body: bytes
) -> None:
    assert ask(context, serve("--filter", "cat", option)[1], body) == [body]


def test_any_frames_come_back_through_a_quoted_filter(context: Context, serve: Serve) -> None:
    _, endpoint = serve("--quiet", "--quoted", "--filter", "cat")

    @settings(max_examples=200, deadline=None)
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


def test_a_request_is_one_line_and_the_next_ones_get_their_own_replies(
    context: Context, serve: Serve
) -> None:
    """A newline that ends a request is the end of its line, as in a file of one line."""
    server, endpoint = serve("--filter", COUNTER)
    requests = [[b"a"], [b"two\nlines"], [b"x\n\n"], [b"b\n"], [b"\n"], [b"a", b"b"], [b"c", b"d"]]
    replies = [b"1 a", b"", b"", b"2 b", b"3 ", b"4 ab", b"5 cd"]
    assert [ask(context, endpoint, *frames) for frames in requests] == [
        [reply] for reply in replies
    ]
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


def test_a_late_second_line_is_no_reply_to_a_later_request(context: Context, serve: Serve) -> None:
    server, endpoint = serve("--filter", "read line; echo one; sleep 0.3; echo stray; cat")
    assert ask(context, endpoint, b"x") == [b"one"]
    assert server.wait() == 1
    assert STRAY in server.notices[-2]


# Stopping


def started(server: Process) -> list[int]:
    """Return the ids of the processes that a filter has told of."""
    return [int(pid) for pid in server.wait_for_notice(r"^\d+( \d+)*$")[0].split()]


@pytest.mark.parametrize(
    "command", ["exec cat", "trap '' TERM INT HUP; cat; sleep 600", "sleep 600 & cat"]
)
def test_a_signal_ends_the_filter_by_the_end_of_its_input_and_then_by_force(
    serve: Serve, command: str
) -> None:
    server, _ = serve("--filter", f"echo $$ >&2; {command}")
    pids = started(server)
    server.signal(signal.SIGTERM)
    assert server.finish()[0] == 0
    until(lambda: not any(map(is_running, pids)))


def test_a_filter_that_is_stopped_together_with_us_is_no_failure(serve: Serve) -> None:
    server, _ = serve("--filter", "echo $$ >&2; exec cat")
    for pid in (*started(server), server.pid):
        os.kill(pid, signal.SIGTERM)
    assert server.finish()[0] == 0
