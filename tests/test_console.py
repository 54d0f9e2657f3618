"""Any bytes and any pipe, through real processes: what goes in is what comes out."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fcntl import F_SETPIPE_SZ, fcntl, ioctl
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from termios import FIONREAD

import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zmqmsg.sockets import Context

from conftest import COMMAND, LIMIT, Process, bind

Serve = Callable[..., tuple[Process, str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Process]
Silent = Callable[[], tuple[zmq.Socket[bytes], str]]

PAGE = os.sysconf("SC_PAGESIZE")

# Each example is a process of its own.
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def messages_without(end: bytes, least: int = 0) -> st.SearchStrategy[list[bytes]]:
    return st.lists(st.binary(max_size=100).map(lambda text: text.replace(end, b"")), min_size=least, max_size=16)


def ended(frames: Iterable[bytes], end: bytes = b"\n") -> bytes:
    return b"".join(frame + end for frame in frames)


def printed(process: Process, expected: bytes) -> bytes:
    """Return as much standard output as is expected, or what there is of it in time."""
    assert process.popen.stdout
    taken = b""
    while len(taken) < len(expected) and select.select([process.popen.stdout], [], [], LIMIT)[0]:
        if not (data := os.read(process.popen.stdout.fileno(), len(expected) - len(taken))):
            break
        taken += data
    return taken


def in_pipe(pipe: int) -> int:
    return int.from_bytes(ioctl(pipe, FIONREAD, bytes(4)), sys.byteorder)


def holds(pipe: int, size: int) -> bool:
    return in_pipe(pipe) >= size


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def close_reader(process: Process) -> None:
    assert process.popen.stdout
    process.popen.stdout.close()
    process.popen.stdout = None


def in_shell(redirections: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run zmqmsg with what ``redirections`` make of its standard streams; standard input is one line."""
    script = f'"$@" {redirections}'
    return subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, *arguments], input=b"line\n", capture_output=True, timeout=LIMIT
    )


@pytest.fixture
def silent(context: Context) -> Silent:
    """Open a REP socket that does nothing of itself, and return it and its endpoint."""

    def silent() -> tuple[zmq.Socket[bytes], str]:
        server = context.socket(zmq.REP)
        server.rcvtimeo = LIMIT * 1000
        return server, bind(server)

    return silent


@pytest.mark.parametrize(("end", "options"), [(b"\n", []), (b"\0", ["--null"])], ids=["lines", "null"])
def test_any_messages_of_standard_input_come_back(serve: Serve, send: Send, end: bytes, options: list[str]) -> None:
    server, endpoint = serve(*options)

    @few
    @given(messages_without(end))
    @example([b"", b"\r", b"\xff\xfe", b"a\r", b""])
    def check(messages: list[bytes]) -> None:
        done = send("--connect", endpoint, *options, input=ended(messages, end))
        assert (done.returncode, done.stdout, done.stderr) == (0, ended(messages, end), b"")
        assert printed(server, done.stdout) == done.stdout

    check()


def test_any_arguments_come_back(serve: Serve, send: Send) -> None:
    server, endpoint = serve()

    @few
    @given(messages_without(b"\0", least=1))
    @example([b"", b"-", b"--", b"--help", b"-x", b"\xff\xfe", "\N{SNOWMAN}".encode(), b"\n", b"\xed\xb2\x80"])
    def check(messages: list[bytes]) -> None:
        done = send("--connect", endpoint, "--", *messages)
        assert (done.returncode, done.stdout, done.stderr) == (0, ended(messages), b"")
        assert printed(server, done.stdout) == done.stdout

    check()


def test_any_files_come_back(serve: Serve, send: Send, tmp_path: Path) -> None:
    server, endpoint = serve()

    @few
    @given(st.lists(st.binary(max_size=1000), min_size=1, max_size=8))
    @example([b"", b"\0\n\r\n", bytes(range(256)) * 300])
    def check(contents: list[bytes]) -> None:
        with TemporaryDirectory(dir=tmp_path) as folder:
            options = []
            for number, content in enumerate(contents):
                path = Path(folder, str(number))
                path.write_bytes(content)
                options += ["--file", str(path)]
            done = send("--connect", endpoint, *options)
        assert (done.returncode, done.stdout, done.stderr) == (0, ended(contents), b"")
        assert printed(server, done.stdout) == done.stdout

    check()


def test_any_frames_come_from_anywhere_and_are_one_request(silent: Silent, send: Send, tmp_path: Path) -> None:
    server, endpoint = silent()
    path = tmp_path / "content"
    taken: list[list[bytes]] = []

    def answer_backwards() -> None:
        taken.append(server.recv_multipart())
        server.send_multipart(taken[-1][::-1])

    @few
    @given(messages_without(b"\0"), st.binary(max_size=1000), st.binary(max_size=1000))
    @example([b"", b""], b"", bytes(range(256)) * 300)
    def check(arguments: list[bytes], content: bytes, piped: bytes) -> None:
        path.write_bytes(content)
        thread = threading.Thread(target=answer_backwards)
        thread.start()
        files = ["--file", "-", "--file", str(path)]
        done = send("--connect", endpoint, "--multipart", *files, "--", *arguments, input=piped)
        thread.join(LIMIT)
        frames = [*arguments, piped, content]
        assert taken[-1] == frames
        assert (done.returncode, done.stdout, done.stderr) == (0, ended(frames[::-1]), b"")

    check()


def test_any_frames_come_back_through_serve(serve: Serve, send: Send) -> None:
    server, endpoint = serve()

    @few
    @given(messages_without(b"\0", least=1))
    def check(frames: list[bytes]) -> None:
        done = send("--connect", endpoint, "--multipart", "--null", input=ended(frames, b"\0"))
        assert (done.returncode, done.stdout, done.stderr) == (0, ended(frames, b"\0"), b"")
        assert printed(server, ended(frames)) == ended(frames)

    check()


@pytest.mark.parametrize("messages", [[""], ["", "", "a", ""]])
def test_an_empty_argument_is_an_empty_message_and_leaves_standard_input_unread(
    echo: str, send: Send, messages: list[str]
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"not to be read")
    done = send("--connect", echo, *messages, stdin=reader)
    os.close(writer)
    with open(reader, "rb") as rest:
        assert rest.read() == b"not to be read"
    assert (done.returncode, done.stdout) == (0, ended(message.encode() for message in messages))


def test_a_file_leaves_standard_input_unread(echo: str, send: Send, tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(b"content")
    reader, writer = os.pipe()
    os.write(writer, b"not to be read")
    done = send("--connect", echo, "--file", str(path), stdin=reader)
    os.close(writer)
    with open(reader, "rb") as rest:
        assert rest.read() == b"not to be read"
    assert (done.returncode, done.stdout) == (0, b"content\n")


def test_arguments_come_first_and_then_the_files_in_their_order(echo: str, send: Send, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    order = ["--file", str(second), "a", "--file", "-", "b", "--file", str(first)]
    done = send("--connect", echo, *order, input=b"all\nof it\n")
    assert (done.returncode, done.stdout) == (0, b"a\nb\n2\nall\nof it\n\n1\n")


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_can_be_one_message(echo: str, send: Send, name: str) -> None:
    content = b"\n\0\r" + bytes(300_000)
    done = send("--connect", echo, "--file", name, input=content)
    assert (done.returncode, done.stdout) == (0, content + b"\n")


def test_a_fifo_is_a_file(echo: str, start: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    client = start("send", "--connect", echo, "--file", str(fifo))
    with fifo.open("wb") as pipe:
        pipe.write(b"through ")
        pipe.flush()
        pipe.write(b"a fifo")
    assert client.finish() == (0, b"through a fifo\n", [])


@pytest.mark.parametrize("name", ["missing", ".", ""])
def test_a_file_that_cannot_be_read_is_wrong_usage_and_nothing_is_sent(
    serve: Serve, send: Send, tmp_path: Path, name: str
) -> None:
    server, endpoint = serve()
    done = send("--connect", endpoint, "argument", "--file", "-", "--file", name, input=b"piped", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"zmqmsg: ")
    assert done.stderr.count(b"\n") == 1
    assert send("--connect", endpoint, "later").returncode == 0
    assert server.read_line() == b"later"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_without_permission_is_wrong_usage(send: Send, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0)
    assert send("--file", str(path)).returncode == 2


def test_a_file_that_fails_while_it_is_read_is_named_with_the_reason(echo: str, send: Send) -> None:
    done = send("--connect", echo, "--file", "/proc/self/mem")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"zmqmsg: cannot read /proc/self/mem: Input/output error\n"


@pytest.mark.parametrize("options", [[], ["--file", "-"]])
def test_standard_input_that_cannot_be_read_is_one_line_with_the_reason(
    echo: str, send: Send, tmp_path: Path, options: list[str]
) -> None:
    with (tmp_path / "written").open("wb") as write_only:
        done = send("--connect", echo, *options, stdin=write_only)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"zmqmsg: cannot read ")
    assert done.stderr.endswith(b": Bad file descriptor\n")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ([], b"", b""),
        ([], b"no newline", b"no newline\n"),
        ([], b"one\nno newline", b"one\nno newline\n"),
        ([], b"\n", b"\n"),
        ([], b"\n\na\n\n", b"\n\na\n\n"),
        ([], b"dos\r\n\r\n", b"dos\r\n\r\n"),
        ([], b"a\0b\n", b"a\0b\n"),
        (["--null"], b"two\nlines\0no end\n", b"two\nlines\0no end\n\0"),
        (["--null"], b"\0\0", b"\0\0"),
    ],
)
def test_an_end_of_line_ends_a_message_and_is_no_part_of_it(
    echo: str, send: Send, options: list[str], given: bytes, expected: bytes
) -> None:
    done = send("--connect", echo, *options, input=given)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


def test_a_line_may_have_megabytes(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--count", "3")
    lines = ended([b"short", os.urandom(8_000_000).replace(b"\n", b" "), b"short again"])
    outputs: list[bytes] = []
    reader = threading.Thread(target=lambda: outputs.append(printed(server, lines)))
    reader.start()
    done = send("--connect", endpoint, input=lines)
    reader.join(LIMIT)
    assert done.returncode == 0
    assert done.stdout == lines
    assert outputs == [lines]


def test_each_line_is_answered_before_the_next_is_read(serve: Serve, start: Start) -> None:
    server, endpoint = serve()
    client = start("send", "--connect", endpoint)
    for line in (b"one", b"", b"three"):
        client.send_line(line)
        assert client.read_line() == line
        assert server.read_line() == line
    assert client.finish() == (0, b"", [])


def test_a_line_in_pieces_is_one_message(echo: str, start: Start) -> None:
    client = start("send", "--connect", echo, bufsize=0)
    assert client.popen.stdin
    pipe = client.popen.stdin.fileno()
    for piece in (b"in ", b"three ", b"pieces\nand "):
        client.popen.stdin.write(piece)
        wait_until(lambda: in_pipe(pipe) == 0)
    assert printed(client, b"in three pieces\n") == b"in three pieces\n"
    client.popen.stdin.write(b"more")
    assert client.finish() == (0, b"and more\n", [])


def test_many_frames_are_printed_each_on_its_line_and_in_order(silent: Silent, start: Start) -> None:
    server, endpoint = silent()
    client = start("send", "--connect", endpoint, "question")
    assert server.recv() == b"question"
    frames = [b"first", b"", b"\xff\0\r", b"large " * 20_000, b""]
    server.send_multipart(frames)
    assert client.finish() == (0, ended(frames), [])


def test_no_frames_at_all_are_wrong_usage_and_nothing_is_sent(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    assert send("--connect", endpoint, "--multipart").returncode == 2
    assert send("--connect", endpoint, "later").returncode == 0
    assert server.read_line() == b"later"


def test_a_closed_reader_ends_send_quietly_while_messages_flow(echo: str, start: Start) -> None:
    client = start("send", "--connect", echo)
    client.send_line(b"one")
    assert client.read_line() == b"one"
    close_reader(client)
    assert client.popen.stdin
    with pytest.raises(BrokenPipeError):
        client.popen.stdin.write(b"more\n" * 1_000_000)
    assert (client.wait(), client.notices[:-1]) == (1, [])


def test_a_closed_reader_ends_send_quietly_while_it_waits_for_input(echo: str, start: Start) -> None:
    client = start("send", "--connect", echo)
    client.send_line(b"one")
    assert client.read_line() == b"one"
    close_reader(client)
    assert (client.wait(), client.notices[:-1]) == (1, [])


@pytest.mark.parametrize("option", ["--multipart", "--file=-"])
def test_a_closed_reader_ends_send_quietly_while_it_gathers_a_message(start: Start, option: str) -> None:
    client = start("send", "--connect", "tcp://127.0.0.1:1", option, bufsize=0)
    assert client.popen.stdin
    pipe = client.popen.stdin.fileno()
    client.popen.stdin.write(b"some of it")
    wait_until(lambda: in_pipe(pipe) == 0)
    close_reader(client)
    assert (client.wait(), client.notices[:-1]) == (1, [])


def test_a_closed_reader_ends_send_quietly_while_it_waits_for_a_reply(silent: Silent, start: Start) -> None:
    server, endpoint = silent()
    client = start("send", "--connect", endpoint, "question")
    assert server.recv() == b"question"
    close_reader(client)
    assert (client.wait(), client.notices[:-1]) == (1, [])


def test_a_closed_reader_ends_send_while_it_waits_for_a_server(start: Start) -> None:
    client = start("send", "--connect", "tcp://127.0.0.1:1", "question")
    client.wait_for_notice("waiting for")
    close_reader(client)
    assert client.wait() == 1
    assert len(client.notices[:-1]) == 1


def test_a_closed_reader_ends_serve_quietly_and_the_request_in_hand_is_answered(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    close_reader(server)
    done = send("--connect", endpoint, "in hand")
    assert (done.returncode, done.stdout) == (0, b"in hand\n")
    assert server.wait() == 1
    assert server.notices[:-1] == [f"zmqmsg: listening on {endpoint}"]


def test_a_pipeline_that_takes_one_line_ends(echo: str) -> None:
    command = f"yes | {' '.join(COMMAND)} send --connect {echo} | head -1"
    done = subprocess.run(["bash", "-c", f"{command}; echo ${{PIPESTATUS[1]}}"], capture_output=True, timeout=LIMIT)
    assert (done.stdout, done.stderr) == (b"y\n1\n", b"")


def test_a_full_disk_ends_send_with_one_line_of_the_systems_words(serve: Serve, send: Send) -> None:
    server, endpoint = serve()
    with Path("/dev/full").open("wb") as full:
        done = send("--connect", endpoint, "one", "two", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr == b"zmqmsg: cannot write to standard output: No space left on device\n"
    assert send("--connect", endpoint, "later").returncode == 0
    assert [server.read_line(), server.read_line()] == [b"one", b"later"]


def test_a_full_disk_ends_serve_after_it_has_answered_the_request_in_hand(serve: Serve, send: Send) -> None:
    with Path("/dev/full").open("wb") as full:
        server, endpoint = serve(stdout=full)
    done = send("--connect", endpoint, "in hand")
    assert (done.returncode, done.stdout) == (0, b"in hand\n")
    assert server.wait() == 1
    assert server.notices[1:-1] == ["zmqmsg: cannot write to standard output: No space left on device"]


@pytest.mark.parametrize(
    ("redirections", "size"),
    [(">&-", 0), (">&-", 100_000), (">&- <&-", 1), (">&- 2>&-", 1), (">&- <&- 2>&-", 1), ("1</dev/null", 1)],
)
def test_a_reply_that_cannot_be_written_is_no_success(
    serve: Serve, tmp_path: Path, redirections: str, size: int
) -> None:
    server, endpoint = serve("--count", "1", "--quiet")
    path = tmp_path / "content"
    path.write_bytes(bytes(size))
    done = in_shell(redirections, "send", "--connect", endpoint, "--file", str(path))
    assert done.returncode == 1
    words = b"" if "2>" in redirections else b"zmqmsg: cannot write to standard output: Bad file descriptor\n"
    assert (done.stdout, done.stderr) == (b"", words)
    assert server.wait() == 0, "what was sent is what was asked"


def test_a_line_whose_reply_cannot_be_written_is_no_success(echo: str) -> None:
    done = in_shell(">&-", "send", "--connect", echo)
    words = b"zmqmsg: cannot write to standard output: Bad file descriptor\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", words)


def test_closed_standard_input_is_a_failure_in_one_line(echo: str) -> None:
    done = in_shell("<&-", "send", "--connect", echo)
    words = b"zmqmsg: cannot read standard input: Bad file descriptor\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", words)


@pytest.mark.parametrize("redirections", ["<&-", "2>&-", "<&- 2>&-"])
def test_closed_streams_that_are_not_needed_do_no_harm(echo: str, redirections: str) -> None:
    done = in_shell(redirections, "send", "--connect", echo, "one", "two")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\ntwo\n", b"")


@pytest.mark.parametrize("number", [0, 2])
def test_serve_needs_neither_standard_input_nor_standard_error(
    start: Start, send: Send, tmp_path: Path, number: int
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    server = start("serve", "--count", "1", "--bind", endpoint, preexec_fn=lambda: os.close(number))
    assert send("--connect", endpoint, "one").stdout == b"one\n"
    assert server.finish()[:2] == (0, b"one\n")


def test_serve_without_standard_output_answers_the_request_in_hand_and_fails(serve: Serve, send: Send) -> None:
    server, endpoint = serve(preexec_fn=lambda: os.close(1))
    assert send("--connect", endpoint, "in hand").stdout == b"in hand\n"
    words = "zmqmsg: cannot write to standard output: Bad file descriptor"
    assert (server.wait(), server.notices[1:-1]) == (1, [words])


def test_serve_that_prints_nothing_needs_no_standard_output(serve: Serve, send: Send) -> None:
    server, endpoint = serve("--quiet", "--count", "1", preexec_fn=lambda: os.close(1))
    assert send("--connect", endpoint, "one").stdout == b"one\n"
    assert server.wait() == 0


def test_notices_that_cannot_be_written_do_no_harm(start: Start, send: Send, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    with Path("/dev/full").open("wb") as full:
        server = start("serve", "--count", "1", "--bind", endpoint, stderr=full)
        done = send("--connect", endpoint, "--timeout", str(LIMIT), "one", capture_output=False, stderr=full)
    assert done.returncode == 0
    assert server.finish() == (0, b"one\n", [])


@contextmanager
def pipe_that_does_not_block() -> Iterator[tuple[int, int]]:
    """Open a pipe of one page, and give its two ends."""
    reader, writer = os.pipe()
    fcntl(writer, F_SETPIPE_SZ, PAGE)
    with open(reader, "rb", 0), open(writer, "wb", 0):
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        yield reader, writer


def read_slowly(reader: int, size: int) -> bytes:
    """Read only when the writer can write no more, or has written all that is left of ``size``."""
    taken = b""
    while len(taken) < size:
        wait_until(partial(holds, reader, min(PAGE - 16, size - len(taken))))
        taken += os.read(reader, 1000)
        taken += os.read(reader, PAGE) if in_pipe(reader) else b""
    return taken


MESSAGES = [b"".join(b"line %d\n" % number for number in range(2000)), os.urandom(100_000).replace(b"\n", b"") + b"\n"]


@pytest.fixture(params=MESSAGES, ids=["short", "long"])
def lines(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.write_bytes(request.param)
    return path


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_every_reply_once(
    echo: str, start: Start, lines: Path
) -> None:
    expected = lines.read_bytes()
    with pipe_that_does_not_block() as (reader, writer), lines.open("rb") as file:
        client = start("send", "--connect", echo, stdin=file, stdout=writer)
        assert read_slowly(reader, len(expected)) == expected
        assert client.wait() == 0
        assert in_pipe(reader) == 0
        assert client.notices == ["(end)"]


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_every_request_once(
    serve: Serve, start: Start, lines: Path
) -> None:
    expected = lines.read_bytes()
    with pipe_that_does_not_block() as (reader, writer), lines.open("rb") as file:
        server, endpoint = serve("--count", str(expected.count(b"\n")), stdout=writer)
        client = start("send", "--connect", endpoint, stdin=file, stdout=subprocess.DEVNULL)
        assert read_slowly(reader, len(expected)) == expected
        assert (client.wait(), server.wait()) == (0, 0)
        assert in_pipe(reader) == 0


def test_a_closed_reader_of_a_pipe_that_does_not_block_ends_send_quietly(echo: str, start: Start) -> None:
    with pipe_that_does_not_block() as (reader, writer):
        client = start("send", "--connect", echo, "--", "long" * PAGE, stdout=writer)
        wait_until(lambda: in_pipe(reader) == PAGE)
    assert (client.wait(), client.notices) == (1, ["(end)"])


def test_standard_input_that_does_not_block_is_read_to_its_end(echo: str, start: Start) -> None:
    with pipe_that_does_not_block() as (reader, writer):
        client = start("send", "--connect", echo, stdin=reader)
        for piece in (b"one\n", b"in ", b"pieces\nla"):
            os.write(writer, piece)
            wait_until(lambda: in_pipe(writer) == 0)
        assert printed(client, b"one\nin pieces\n") == b"one\nin pieces\n"
        assert client.popen.stdout
        assert not select.select([client.popen.stdout], [], [], 1.2)[0], "neither a message nor the end"
        os.write(writer, b"st")
    assert client.finish() == (0, b"last\n", [])


def peak_memory_after(client: Process, count: int, line: bytes) -> int:
    """Let ``client`` send ``line`` so many times, and return the most MiB that it has had in memory."""
    assert client.popen.stdin
    pipe = client.popen.stdin

    def write() -> None:
        for _ in range(count):
            pipe.write(line)
        pipe.flush()

    thread = threading.Thread(target=write)
    thread.start()
    assert all(client.popen.stdout and client.popen.stdout.readline() == line for _ in range(count))
    thread.join(LIMIT)
    status = Path(f"/proc/{client.popen.pid}/status").read_text()
    return next(int(entry.split()[1]) // 1024 for entry in status.splitlines() if entry.startswith("VmHWM:"))


def check_memory(endpoint: str, start: Start, counts: tuple[int, int], line: bytes) -> None:
    """Check that many lines need no more memory than few."""
    few, many = [peak_memory_after(start("send", "--connect", endpoint), count, line) for count in counts]
    assert many <= few + 4, f"{counts} lines took {few} and {many} MiB"


def test_long_input_needs_no_more_memory_than_short(echo: str, start: Start) -> None:
    """30 MB against 1 MB, of which nothing may be held back."""
    check_memory(echo, start, (100, 3000), b"x" * 10_000 + b"\n")


@pytest.mark.soak
def test_a_million_lines_need_no_more_memory_than_a_thousand(echo: str, start: Start) -> None:
    check_memory(echo, start, (1000, 1_000_000), b"line\n")
