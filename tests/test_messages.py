"""Any bytes and any pipe, through real processes: what goes in is what comes out."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zmqmsg.sockets import Context

from conftest import (
    COMMAND,
    LIMIT,
    LINUX,
    POSIX,
    Process,
    Send,
    Serve,
    Start,
    free_endpoint,
    memory,
    open_server,
    until,
)

with suppress(ImportError):  # Windows has none
    from fcntl import ioctl
    from termios import FIONREAD

NO_SPACE = "zmqmsg: cannot write to standard output: No space left on device"
CLOSED = "zmqmsg: cannot write to standard output: Bad file descriptor"

# Each example is a process of its own.
few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def messages_without(end: bytes) -> st.SearchStrategy[list[bytes]]:
    return st.lists(
        st.binary(max_size=100).map(lambda text: text.replace(end, b"")), min_size=1, max_size=16
    )


def ended(frames: Iterable[bytes], end: bytes = b"\n") -> bytes:
    return b"".join(frame + end for frame in frames)


def read(process: Process, size: int) -> bytes:
    """Return the next ``size`` bytes of standard output."""
    assert process.popen.stdout
    return process.popen.stdout.read(size)


# Any bytes


@POSIX
@pytest.mark.parametrize(
    ("end", "options"), [(b"\n", []), (b"\0", ["--null"])], ids=["lines", "null"]
)
def test_any_messages_of_standard_input_come_back(
    serve: Serve, send: Send, end: bytes, options: list[str]
) -> None:
    server, endpoint = serve(*options)

    @few
    @given(messages_without(end))
    @example([b"", b"\r", b"\xff\xfe", b"a\r", b""])
    def check(messages: list[bytes]) -> None:
        done = send("--connect", endpoint, *options, input=ended(messages, end))
        assert (done.returncode, done.stdout) == (0, ended(messages, end))
        assert read(server, len(done.stdout)) == done.stdout

    check()


@POSIX
def test_any_frames_come_from_anywhere_and_are_one_request(
    context: Context, send: Send, tmp_path: Path
) -> None:
    server, endpoint = open_server(context, zmq.REP)
    path = tmp_path / "content"
    requests: list[list[bytes]] = []

    def answer_backwards() -> None:
        requests.append(server.recv_multipart())
        server.send_multipart(requests[-1][::-1])

    @few
    @given(messages_without(b"\0"), st.binary(max_size=100), st.binary(max_size=100))
    @example([b"", b"-", b"--help", b"\xff\xfe", b"\n", b"\xed\xb2\x80"], b"", b"")
    @example([b"", b""], bytes(range(256)) * 300, b"\n\0\r" + bytes(300_000))
    def check(arguments: list[bytes], content: bytes, piped: bytes) -> None:
        path.write_bytes(content)
        thread = threading.Thread(target=answer_backwards)
        thread.start()
        files = ["--file", "-", "--file", str(path)]
        done = send("--connect", endpoint, "-m", *files, "--", *arguments, input=piped)
        thread.join(LIMIT)
        assert requests[-1] == [*arguments, piped, content]
        assert (done.returncode, done.stdout) == (0, ended(requests[-1][::-1]))

    check()


# Arguments and files


def test_arguments_come_first_and_then_the_files_in_their_order(
    echo: str, send: Send, tmp_path: Path
) -> None:
    (tmp_path / "first").write_bytes(b"1")
    (tmp_path / "second").write_bytes(b"2\n\0")
    order = ["--file", "second", "a", "--file", "-", "", "--file", "first"]
    done = send("--connect", echo, *order, input=b"all\nof it\n", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"a\n\n2\n\0\nall\nof it\n\n1\n")


@pytest.mark.parametrize("arguments", [[""], ["--file", os.devnull]])
def test_an_empty_message_is_one_and_leaves_standard_input_unread(
    echo: str, send: Send, arguments: list[str]
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"not to be read")
    done = send("--connect", echo, *arguments, stdin=reader)
    os.close(writer)
    with open(reader, "rb") as rest:
        assert rest.read() == b"not to be read"
    assert (done.returncode, done.stdout) == (0, b"\n")


NOT_ROOT = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root may read any file"
)


@pytest.mark.parametrize("name", ["missing", ".", "", pytest.param("secret", marks=NOT_ROOT)])
def test_a_file_that_cannot_be_read_is_wrong_usage_before_anything_is_sent(
    send: Send, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").touch(mode=0)
    files = ["--file", "-", "--file", name]
    done = send("--connect", free_endpoint(), "x", *files, input=b"piped", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"'{name}'".encode() in done.stderr


@LINUX
def test_a_file_that_fails_while_it_is_read_is_named_with_the_reason(echo: str, send: Send) -> None:
    done = send("--connect", echo, "--file", "/proc/self/mem")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"zmqmsg: cannot read /proc/self/mem: Input/output error\n"


@POSIX
def test_a_non_blocking_input_that_another_reads_too_is_read_to_its_end(
    echo: str, start: Start
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    clients = [start("send", "--connect", echo, stdin=reading) for _ in range(2)]
    for number in range(100):
        os.write(writing, b"%d\n" % number)
        until(lambda: is_empty(reading))  # whoever was faster has it
    os.close(writing)
    os.close(reading)
    ends = [client.finish() for client in clients]
    assert [status for status, _, _ in ends] == [0, 0]
    assert sum(output.count(b"\n") for _, output, _ in ends) == 100


def is_empty(pipe: int | IO[bytes]) -> bool:
    """Return whether all that was written to a pipe has been read."""
    return bool(ioctl(pipe, FIONREAD, bytes(4)) == bytes(4))


# Lines


@POSIX
@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ([], b"one\nno newline", b"one\nno newline\n"),
        (["--null"], b"two\nlines\0\0no end\n", b"two\nlines\0\0no end\n\0"),
    ],
)
def test_an_end_of_line_ends_a_message_and_is_no_part_of_it(
    echo: str, send: Send, options: list[str], given: bytes, expected: bytes
) -> None:
    done = send("--connect", echo, *options, input=given)
    assert (done.returncode, done.stdout) == (0, expected)


def test_with_raw_there_is_nothing_after_a_message(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--raw", "--reply", "pong", "--count", "3")
    done = send("--raw", "--connect", endpoint, input=b"one\ntwo\n\n")
    assert (done.returncode, done.stdout) == (0, b"pongpongpong")
    assert server.finish()[1] == b"onetwo"


@pytest.mark.parametrize("options", [[], ["--null"], ["--file", "-", "--multipart"]])
def test_nothing_to_send_is_told_unless_an_empty_message_is_given(
    send: Send, options: list[str], echo: str
) -> None:
    """An unset variable must not look like a healthy service."""
    done = send("--connect", echo, *options, input=b"")
    assert done.returncode == 0
    assert (b"nothing to send" in done.stderr) is ("--file" not in options)


def test_each_line_is_answered_before_the_next_is_read(serve: Serve, start: Start) -> None:
    server, endpoint = serve()
    client = start("send", "--connect", endpoint)
    for line in (b"one", b"", b"three"):
        client.send_line(line)
        assert client.read_line() == line
        assert server.read_line() == line
    assert client.finish()[:2] == (0, b"")


@POSIX
def test_a_line_in_pieces_is_one_message(echo: str, start: Start) -> None:
    client = start("send", "--connect", echo, bufsize=0)
    pipe = client.popen.stdin
    assert pipe
    for piece in (b"in ", b"three ", b"pieces\nand "):
        pipe.write(piece)
        until(lambda: is_empty(pipe))
    assert read(client, len(b"in three pieces\n")) == b"in three pieces\n"
    pipe.write(b"more")
    assert client.finish()[:2] == (0, b"and more\n")


def peak(client: Process, lines: bytes) -> int:
    """Let ``client`` send ``lines``, and return the most KiB that it has had in memory."""
    thread = threading.Thread(target=client.send_line, args=(lines[:-1],))
    thread.start()
    assert read(client, len(lines)) == lines
    thread.join(LIMIT)
    return memory(client.pid, "VmHWM")


@LINUX
@pytest.mark.parametrize(
    ("line", "few", "many"),
    [
        (b"x" * 10_000 + b"\n", 100, 1500),
        pytest.param(b"line\n", 1000, 1_000_000, marks=pytest.mark.soak),
    ],
)
def test_long_input_needs_no_more_memory_than_short(
    echo: str, start: Start, line: bytes, few: int, many: int
) -> None:
    short, long = (peak(start("send", "--connect", echo), line * count) for count in (few, many))
    assert long <= short + 4096


# Readers that want no more


@pytest.mark.parametrize("lines", [b"two", b"more\n" * 1_000_000], ids=["one line", "a stream"])
def test_a_closed_reader_ends_send_quietly_at_the_next_write(
    echo: str, start: Start, lines: bytes
) -> None:
    client = start("send", "--connect", echo)
    client.send_line(b"one")
    assert client.read_line() == b"one"
    assert client.popen.stdout
    client.popen.stdout.close()
    with suppress(BrokenPipeError):
        client.send_line(lines)
    assert client.wait() == 1
    assert not [notice for notice in client.notices if "output" in notice]


def close_reader(process: Process) -> None:
    assert process.popen.stdout
    process.popen.stdout.close()


@POSIX
@pytest.mark.parametrize("options", [[], ["--filter", "cat"], ["--exec", "cat"], ["--verbose"]])
def test_serve_ends_by_itself_when_its_reader_has_gone(
    serve: Serve, send: Send, options: list[str]
) -> None:
    """As ``serve | head -n 1`` does, before it takes a request that it could not print."""
    server, endpoint = serve(*options)
    assert send("--connect", endpoint, "one").returncode == 0
    assert server.read_line() == b"one"
    close_reader(server)
    assert server.wait() == 1
    assert server.notices.count("zmqmsg: standard output is closed") == 1


@POSIX
def test_a_worker_that_waits_ends_when_its_reader_has_gone(start: Start) -> None:
    worker = start("serve", "--connect", free_endpoint())
    worker.wait_for_notice("waiting for")
    close_reader(worker)
    assert worker.wait() == 1


@POSIX
def test_without_requests_to_print_no_reader_is_needed(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--quiet", "--count", "2")
    assert send("--connect", endpoint, "one").returncode == 0
    close_reader(server)
    assert send("--connect", endpoint, "two").stdout == b"two\n"
    assert server.wait() == 0


@POSIX
def test_send_sends_nothing_more_when_its_reader_has_gone(serve: Serve, start: Start) -> None:
    server, endpoint = serve("--count", "2")
    client = start("send", "--connect", endpoint)
    client.send_line(b"one")
    assert client.read_line() == b"one"
    close_reader(client)
    client.send_line(b"never sent")
    assert (client.wait(), client.notices) == (1, ["(end)"])
    assert start("send", "--connect", endpoint, "two").wait() == 0
    assert server.finish()[:2] == (0, b"one\ntwo\n")


@POSIX
def test_send_waits_for_no_server_when_its_reader_has_gone(start: Start) -> None:
    client = start("send", "--connect", free_endpoint(), "x")
    client.wait_for_notice("waiting for tcp")
    close_reader(client)
    assert (client.wait(), len(client.notices)) == (1, 2)


@POSIX
def test_send_waits_for_no_reply_when_its_reader_has_gone(context: Context, start: Start) -> None:
    _mute, endpoint = open_server(context, zmq.REP)
    client = start("send", "--connect", endpoint, "x")
    client.wait_for_notice("waiting for a reply")
    close_reader(client)
    assert (client.wait(), client.notices[-2]) == (3, "zmqmsg: standard output is closed")


# Byte order marks


@pytest.mark.parametrize(
    ("mark", "name"),
    [
        (b"\xef\xbb\xbf", "UTF-8"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--null"]])
def test_a_byte_order_mark_in_standard_input_is_sent_and_told(
    echo: str, send: Send, mark: bytes, name: str, options: list[str]
) -> None:
    done = send("--connect", echo, *options, input=mark + b"one\n" + mark + b"two")
    end = b"\0" if options else b"\n"
    assert (done.returncode, done.stdout) == (0, mark + b"one\n" + mark + b"two" + end)
    told = [line for line in done.stderr.decode().splitlines() if "byte order mark" in line]
    assert len(told) == 1
    assert name in told[0]


def test_a_byte_order_mark_in_a_file_or_an_argument_is_not_told(
    echo: str, send: Send, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfone")
    done = send("--connect", echo, "--file", f"{tmp_path}/file", "\ufefftwo")
    assert (done.returncode, done.stderr) == (0, b"")


# Streams that are full or closed


@LINUX
def test_a_full_disk_ends_send_before_the_next_message(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    with Path("/dev/full").open("wb") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE, "capture_output": False}
        done = send("--connect", endpoint, "one", "two", **streams)
    assert (done.returncode, done.stderr.decode().splitlines()[-1:]) == (1, [NO_SPACE])
    assert send("--connect", endpoint, "later").returncode == 0
    assert [server.read_line(), server.read_line()] == [b"one", b"later"]


def closing(*numbers: int) -> Callable[[], object]:
    """Return what a process is to do before it starts, to start with these descriptors closed."""

    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def make_input_write_only() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 0)


@POSIX
@pytest.mark.parametrize("closed", [[1], [0, 1], [1, 2], [0, 1, 2]])
def test_a_reply_that_cannot_be_written_is_no_success(
    serve: Serve, send: Send, closed: list[int]
) -> None:
    server, endpoint = serve("--count", "1", "--quiet")
    done = send("--connect", endpoint, "x" * 100_000, preexec_fn=closing(*closed))
    assert done.returncode == 1
    assert 2 in closed or done.stderr.decode().splitlines()[-1] == CLOSED
    assert server.wait() == 0


@POSIX
@pytest.mark.parametrize("options", [[], ["--file", "-"]], ids=["lines", "whole"])
@pytest.mark.parametrize(
    "prepare", [closing(0), make_input_write_only], ids=["closed", "write-only"]
)
def test_standard_input_that_cannot_be_read_is_a_failure_in_one_line(
    echo: str, send: Send, options: list[str], prepare: Callable[[], object]
) -> None:
    done = send("--connect", echo, *options, preexec_fn=prepare)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"zmqmsg: cannot read standard input: Bad file descriptor\n"


@POSIX
@pytest.mark.parametrize("closed", [[0], [2], [0, 2]])
def test_closed_streams_that_are_not_needed_do_no_harm(
    start: Start, send: Send, tmp_path: Path, closed: list[int]
) -> None:
    endpoint, options = "ipc://socket", {"cwd": tmp_path, "preexec_fn": closing(*closed)}
    server = start("serve", "--count", "2", "--bind", endpoint, **options)
    done = send("--connect", endpoint, "one", "two", **options)
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\n")
    assert server.finish()[:2] == (0, b"one\ntwo\n")


@LINUX
@pytest.mark.parametrize(
    ("arguments", "status"), [(["send", "hi"], 0), (["send", "-f", "/missing"], 2), ([], 2)]
)
def test_notices_that_cannot_be_written_change_no_exit_status(
    echo: str, arguments: list[str], status: int
) -> None:
    environment = os.environ | {"ZMQMSG_SEND_CONNECT": echo, "ZMQMSG_SEND_VERBOSE": "1"}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=full,
            timeout=LIMIT,
        )
    assert done.returncode == status
