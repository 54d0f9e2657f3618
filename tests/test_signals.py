"""Signals: the first one stops ``serve`` in order, the second one at once, in every state."""

import os
import re
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from zmqmsg.sockets import Context
from zmqmsg.system import END_SIGNALS, STOP_SIGNALS

from conftest import (
    LIMIT,
    LINUX,
    POSIX,
    Send,
    Serve,
    Start,
    ask,
    descriptors,
    is_running,
    shell,
    stop,
    until,
)

with suppress(ImportError):  # Windows has none
    import resource

pytestmark = POSIX


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_an_idle_server_and_leaves_no_ipc_file_behind(
    serve: Serve, send: Send, tmp_path: Path, number: int
) -> None:
    server, endpoint = serve("--bind", f"ipc://{tmp_path}/a.sock")
    assert send("--connect", endpoint, "one").returncode == 0
    assert stop(server, number) == (
        0,
        b"one\n",
        [f"zmqmsg: listening on {endpoint}", "zmqmsg: 1 request served"],
    )
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    server, endpoint = serve(
        **shell(tmp_path, """trap '' HUP; exec "$python" "$@" """)
    )  # as nohup has it
    server.signal(signal.SIGHUP)
    assert ask(context, endpoint, b"still there?") == [b"still there?"]
    assert stop(server)[0] == 0


STOPPING = "zmqmsg: stopping after the current request; a second signal ends it at once"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_lets_the_current_request_be_answered(
    serve: Serve, start: Start, tmp_path: Path, number: int
) -> None:
    """It may go to the whole process group, as Ctrl-C at a terminal does: the command is in a session of its own."""
    os.mkfifo(tmp_path / "fifo")
    server, endpoint = serve("--exec", "echo half; cat fifo", cwd=tmp_path, start_new_session=True)
    client = start("send", "--connect", endpoint, "x")
    with open(tmp_path / "fifo", "wb") as fifo:  # waits until cat has opened it, too
        os.killpg(server.pid, number)
        server.wait_for_notice(re.escape(STOPPING))
        fifo.write(b"and half")
    assert client.finish()[:2] == (0, b"half\nand half\n")
    status, output, notices = server.finish()
    assert (status, output, notices[-1]) == (0, b"x\n", "zmqmsg: 1 request served")


@LINUX
@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("--exec", "sleep 600 &"),
        ("--exec", "trap '' INT TERM; sleep 600 &"),
        ("--exec", "timeout 600 sleep 600 &"),  # in a process group of its own
        ("--filter", "read line; sleep 600 &"),
    ],
)
@pytest.mark.parametrize("last", [signal.SIGTERM, *END_SIGNALS], ids=str)
def test_a_second_signal_or_sigquit_ends_it_at_once_with_all_that_its_command_has_started(
    serve: Serve, start: Start, option: str, command: str, last: int
) -> None:
    server, endpoint = serve(option, f"{command} echo $$ $! >&2; wait; wait")
    start("send", "--connect", endpoint, "x")
    children = server.wait_for_notice(r"^(\d+) (\d+)$").groups()
    if last == signal.SIGTERM:
        server.signal(signal.SIGINT)
        server.wait_for_notice(re.escape(STOPPING))
    server.signal(last)
    assert server.popen.wait(LIMIT) == 128 + last
    until(lambda: not any(is_running(int(child)) for child in children))


@pytest.mark.parametrize("delay", [0, 0.05])
def test_half_a_reply_of_a_command_that_is_stopped_with_us_is_not_sent(
    serve: Serve, start: Start, delay: float
) -> None:
    """As a service manager does that signals the whole control group, whoever comes first."""
    server, endpoint = serve("--exec", "echo half; echo $$ >&2; exec sleep 600")
    client = start("send", "--connect", endpoint, "--retries", "0", "x")
    os.kill(int(server.wait_for_notice(r"^\d+$")[0]), signal.SIGTERM)
    time.sleep(delay)
    server.signal(signal.SIGTERM)
    status, output, notices = server.finish()
    assert (status, output) == (0, b"")
    assert "not answered: its command was stopped, too" in notices[-2]
    assert "0 requests served" in notices[-1]
    status, output, notices = client.finish()
    assert (status, output) == (3, b"")
    assert f"connection to {endpoint} lost" in notices[-1]


def test_a_whole_reply_of_a_command_that_ends_as_if_by_a_signal_is_sent(
    serve: Serve, start: Start
) -> None:
    server, endpoint = serve("--exec", "echo begun >&2; read line; sleep 0.3; echo whole; exit 143")
    client = start("send", "--connect", endpoint, "x")
    server.wait_for_notice("begun")
    server.signal(signal.SIGTERM)
    assert client.finish()[:2] == (0, b"whole\n\n")
    assert server.finish()[:2] == (0, b"x\n")


@pytest.mark.parametrize("pair", list(pairwise(STOP_SIGNALS)))
def test_two_signals_in_the_same_instant_end_it_without_a_traceback(
    serve: Serve, pair: tuple[int, int]
) -> None:
    server, endpoint = serve()
    server.signal(signal.SIGSTOP)
    for number in (*pair, signal.SIGCONT):
        server.signal(number)
    assert server.wait() in (0, 128 + pair[0], 128 + pair[1])
    assert set(server.notices) <= {
        f"zmqmsg: listening on {endpoint}",
        "zmqmsg: 0 requests served",
        "(end)",
    }


def test_a_signal_that_comes_twice_at_once_counts_once(serve: Serve, start: Start) -> None:
    """GNU timeout sends it to its child, and then to the whole group."""
    server, endpoint = serve("--exec", "echo begun >&2; sleep 0.5; cat")
    client = start("send", "--connect", endpoint, "x")
    server.wait_for_notice("begun")
    for _ in range(2):
        server.signal(signal.SIGTERM)
        time.sleep(0.01)  # or the kernel makes one of them
    assert client.finish()[:2] == (0, b"x\n")
    assert server.finish()[0] == 0


def test_children_of_an_ignored_sigchld_keep_their_exit_status(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    server, endpoint = serve(
        "--exec", "cat; exit 3", **shell(tmp_path, """trap '' CHLD; exec "$python" "$@" """)
    )
    assert ask(context, endpoint, b"x") == [b"x"]
    server.wait_for_notice("the command exited with status 3")


def test_a_command_that_leaves_its_output_open_is_told_as_that(
    context: Context, serve: Serve
) -> None:
    server, endpoint = serve("--exec", "echo done; sleep 8 &")
    assert ask(context, endpoint, b"x") == [b"done\n"]
    server.wait_for_notice(
        "the command, or something that it has started, still goes on after 5 s, .*/dev/null &"
    )


@LINUX
def test_a_command_that_cannot_be_started_is_tried_until_it_can(serve: Serve, start: Start) -> None:
    """Strangers that say nothing have used up all descriptors."""
    server, endpoint = serve("--exec", "cat")
    client = start("send", "--connect", endpoint, "--retries", "0")
    client.send_line(b"one")
    assert client.read_line() == b"one"
    most = descriptors(server.pid)
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, hard))
    client.send_line(b"two")
    notice = "cannot start the command: Too many open files; trying again until it can be started"
    server.wait_for_notice(notice)
    client.wait_for_notice("waiting for a reply")
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (256, hard))
    assert client.read_line() == b"two"
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, hard))
    client.send_line(b"three")
    until(lambda: sum("waiting for a reply" in line for line in client.notices) == 2)
    status, _, notices = stop(server)
    assert status == 0
    assert sum(notice in line for line in notices) == 1
    assert client.finish()[0] == 3
