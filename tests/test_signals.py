"""Signals: the first one stops ``serve`` in order, the second one at once, in every state."""

import ctypes
import os
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import (
    LIMIT,
    LINUX,
    Send,
    Serve,
    Start,
    ask,
    descriptors,
    free_endpoint,
    is_refused,
    is_running,
    shell,
    stop,
    until,
    waits,
)

resource = pytest.importorskip("resource", reason="needs POSIX: its signals")

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
STOPPING = (
    "zmqmsg: stopping; what has been received is answered, for 8 s at most;"
    " a second signal ends it at once"
)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_an_idle_server_and_leaves_no_ipc_file_behind(
    start: Start, send: Send, tmp_path: Path, number: int
) -> None:
    server = start("serve", "--bind", "ipc://a.sock", cwd=tmp_path)
    server.wait_for_notice("listening on")
    assert send("--connect", "ipc://a.sock", "one", cwd=tmp_path).returncode == 0
    notices = ["zmqmsg: listening on ipc://a.sock", "zmqmsg: 1 request served"]
    assert stop(server, number) == (0, b"one\n", notices)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_counts_as_soon_as_the_port_is_open(start: Start) -> None:
    for _ in range(4):
        endpoint = free_endpoint()
        server = start("serve", "--bind", endpoint)
        while is_refused(endpoint):
            assert server.popen.poll() is None
        assert stop(server)[:2] == (0, b"")


def test_a_signal_after_the_last_request_changes_no_exit_status(
    context: Context, serve: Serve
) -> None:
    for _ in range(4):
        server, endpoint = serve("--count", "1")
        assert ask(context, endpoint, b"x") == [b"x"]
        server.wait_for_notice("1 request served")
        assert stop(server)[:2] == (0, b"x\n")


def test_a_storm_of_signals_ends_it_without_a_traceback(context: Context, serve: Serve) -> None:
    server, endpoint = serve("--quiet")
    client = context.socket(zmq.DEALER)
    client.sndhwm = client.rcvhwm = 0
    client.connect(endpoint)
    for _ in range(20_000):  # that keep its main thread busy
        client.send_multipart([b"", b"x"])
    assert client.poll(LIMIT * 1000)
    for _ in range(5000):
        os.kill(server.pid, signal.SIGTERM)
    status, _, notices = server.finish()
    assert status in (0, 128 + signal.SIGTERM)
    assert all(notice.startswith("zmqmsg: ") for notice in notices), notices


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    as_nohup = shell(tmp_path, """trap '' HUP; exec "$python" "$@" """)
    server, endpoint = serve(**as_nohup)
    server.signal(signal.SIGHUP)
    assert ask(context, endpoint, b"still there?") == [b"still there?"]
    assert stop(server)[0] == 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_lets_the_current_request_be_answered(
    serve: Serve, start: Start, tmp_path: Path, number: int
) -> None:
    """It may go to the whole process group, as Ctrl-C does: the command is in another session."""
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
    ("last", "option", "command"),
    [
        (signal.SIGTERM, "--exec", "sleep 600 &"),
        (signal.SIGTERM, "--exec", "trap '' INT TERM; sleep 600 &"),
        (signal.SIGTERM, "--exec", "timeout 600 sleep 600 &"),  # in a process group of its own
        (signal.SIGTERM, "--filter", "read line; sleep 600 &"),
        (signal.SIGQUIT, "--exec", "sleep 600 &"),
    ],
)
def test_a_second_signal_or_sigquit_ends_it_with_all_that_it_has_started(
    serve: Serve, start: Start, last: int, option: str, command: str
) -> None:
    server, endpoint = serve(option, f"{command} echo $$ $! >&2; wait; wait")
    start("send", "--connect", endpoint, "x")
    children = server.wait_for_notice(r"^(\d+) (\d+)$").groups()
    if last != signal.SIGQUIT:
        server.signal(signal.SIGINT)
        server.wait_for_notice(re.escape(STOPPING))
    server.signal(last)
    assert server.popen.wait(LIMIT) == 128 + last
    until(lambda: not any(is_running(int(child)) for child in children))


@pytest.mark.parametrize("first", ["serve", "command"])
def test_half_a_reply_of_a_command_that_is_stopped_with_us_is_not_sent(
    serve: Serve, start: Start, first: str
) -> None:
    """As a service manager does that signals the whole control group."""
    server, endpoint = serve("--exec", "echo half; echo $$ >&2; exec sleep 600")
    client = start("send", "--connect", endpoint, "--retries", "0", "x")
    command = int(server.wait_for_notice(r"^\d+$")[0])
    if first == "serve":
        server.signal(signal.SIGTERM)
        server.wait_for_notice(re.escape(STOPPING))
        os.kill(command, signal.SIGTERM)
    else:
        # Stopped, so that its own signal is there when it goes on, however busy the machine is.
        server.signal(signal.SIGSTOP)
        os.kill(command, signal.SIGTERM)
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGCONT)
    status, output, notices = server.finish()
    assert (status, output) == (0, b"")
    assert "not answered: its command was stopped, too" in notices[-2]
    assert "0 requests served" in notices[-1]
    assert client.finish()[:2] == (3, b"")


def test_a_whole_reply_of_a_command_that_ends_as_if_by_a_signal_is_sent(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    server, endpoint = serve("--exec", "cat fifo; exit 143", cwd=tmp_path)
    client = start("send", "--connect", endpoint, "x")
    with open(tmp_path / "fifo", "wb") as fifo:  # waits until cat has opened it, too
        server.signal(signal.SIGTERM)
        server.wait_for_notice(re.escape(STOPPING))
        fifo.write(b"whole")
    assert client.finish()[:2] == (0, b"whole\n")
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


@LINUX
def test_a_signal_that_comes_twice_at_once_counts_once(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    """GNU timeout sends it to its child, and then to the whole group."""
    os.mkfifo(tmp_path / "fifo")
    server, endpoint = serve("--exec", "cat fifo", cwd=tmp_path)
    client = start("send", "--connect", endpoint, "x")
    with open(tmp_path / "fifo", "wb") as fifo:  # waits until cat has opened it, too
        # Stopped, so that both are there when it goes on, however busy the machine is: one for the
        # process, and one for its main thread, as the kernel keeps only one of a kind for each.
        server.signal(signal.SIGSTOP)
        server.signal(signal.SIGTERM)
        assert ctypes.CDLL(None).tgkill(server.pid, server.pid, signal.SIGTERM) == 0
        server.signal(signal.SIGCONT)
        server.wait_for_notice(re.escape(STOPPING))
        fifo.write(b"whole")
    assert client.finish()[:2] == (0, b"whole\n")
    assert server.finish()[0] == 0


def test_children_of_an_ignored_sigchld_keep_their_exit_status(
    context: Context, serve: Serve, tmp_path: Path
) -> None:
    ignoring = shell(tmp_path, """trap '' CHLD; exec "$python" "$@" """)
    server, endpoint = serve("--exec", "cat; exit 3", **ignoring)
    assert ask(context, endpoint, b"x") == [b"x"]
    server.wait_for_notice("the command exited with status 3")


@waits
def test_a_command_that_leaves_its_output_open_is_told_as_that(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    server, endpoint = serve("--exec", "echo done; cat fifo &", cwd=tmp_path)
    client = start("send", "--connect", endpoint, "x")
    server.wait_for_notice("the command, .* still goes on after 5 s, .*/dev/null &")
    (tmp_path / "fifo").write_bytes(b"late")
    assert client.finish()[:2] == (0, b"done\nlate\n")


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
