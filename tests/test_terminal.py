"""What a person at a terminal sees, on real pseudo-terminals and in real shells."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqmsg.sockets import Context, Socket

from conftest import (
    LIMIT,
    LINUX,
    Process,
    Send,
    Serve,
    Start,
    free_endpoint,
    memory,
    open_server,
    until,
)

termios = pytest.importorskip("termios", reason="needs POSIX: pseudo-terminals")
ioctl = pytest.importorskip("fcntl").ioctl

CTRL_C, CTRL_D, CTRL_Z = b"\x03", b"\x04", b"\x1a"
HIDDEN_CURSOR = b"\x1b[?25l"
HINT = b"zmqmsg: reading messages, one per line; press Ctrl-D to finish"

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("COLUMNS", "LANGUAGE", "LINES", "NO_COLOR")
} | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "TERM": "xterm-256color",
    "LC_ALL": "C.UTF-8",
}
PLAIN = ENVIRONMENT | {"NO_COLOR": "1"}


class Terminal:
    """A pseudo-terminal of 80 columns: processes get ``end``, and what they write is read here."""

    def __init__(self) -> None:
        self.master, self.end = os.openpty()
        termios.tcsetwinsize(self.end, (45, 80))
        attributes = termios.tcgetattr(self.end)
        attributes[1] &= ~termios.OPOST  # newlines shall arrive as they were written
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(self.end, termios.TCSANOW, attributes)
        self._attributes = termios.tcgetattr(self.end)
        self._output = b""

    @property
    def sane(self) -> bool:
        """Whether the terminal is as it was at first."""
        return bool(termios.tcgetattr(self.end) == self._attributes)

    def all(self) -> dict[str, int]:
        """Return the three standard streams, all on this terminal."""
        return dict.fromkeys(["stdin", "stdout", "stderr"], self.end)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read_until(self, text: bytes) -> bytes:
        """Return what was written, up to ``text``; what comes after it is for the next call."""
        end = time.monotonic() + LIMIT
        while text not in self._output:
            assert select.select([self.master], [], [], end - time.monotonic())[0], (
                f"no {text!r} in {self._output!r}"
            )
            self._output += os.read(self.master, 65536)
        before, found, self._output = self._output.partition(text)
        return before + found

    def read_rest(self) -> bytes:
        """Return all that was written, once no process has the terminal any more."""
        os.close(self.end)
        self.end = -1
        rest = self._output
        while select.select([self.master], [], [], LIMIT)[0]:
            try:
                if not (data := os.read(self.master, 65536)):
                    return rest
            except OSError:  # Linux's word for the end
                return rest
            rest += data
        raise AssertionError(f"not ended: {rest!r}")

    def close(self) -> None:
        for descriptor in (self.master, self.end):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Open a pseudo-terminal for the time of the test."""
    terminal = Terminal()
    yield terminal
    terminal.close()


OnTerminal = Callable[..., bytes]


@pytest.fixture
def on_terminal(echo: str, start: Start, terminal: Terminal) -> OnTerminal:
    """Run ``send`` to its end with some streams on the terminal; return what was written there."""

    def on_terminal(*arguments: str | bytes, streams: str, **options: Any) -> bytes:
        given: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "env": PLAIN,
        }
        given |= dict.fromkeys(streams.split(), terminal.end)
        client = start("send", "--connect", echo, *arguments, **given | options)
        written = terminal.read_rest()
        assert client.wait() == 0
        return written

    return on_terminal


# Messages

CONTROLS = "\x1b[2J \r\b\x7f\0 \x9b31m \u202e \u2069".encode() + b"\xff"
HARMLESS = '{\n\t"path": "C:\\x1b\\n"\n} \U0001f468\u200d\U0001f469 \u05e2\u05d1 \u65e5 e\u0301'
LONG = "\u20ac\x1b".encode() * 30_000

SHOWN = {
    CONTROLS: rb"\x1b[2J \x0d\x08\x7f\x00 \xc2\x9b31m \xe2\x80\xae \xe2\x81\xa9\xff",
    HARMLESS.encode(): HARMLESS.encode(),
    LONG: LONG.replace(b"\x1b", rb"\x1b"),
}


@pytest.mark.parametrize("command", ["serve", "send"])
def test_a_message_cannot_drive_the_terminal(
    serve: Serve, start: Start, terminal: Terminal, tmp_path: Path, command: str
) -> None:
    """Harmless text is shown as it is, and several frames as a quoted line."""
    streams: dict[str, dict[str, Any]] = {"serve": {}, "send": {}}
    streams[command] = {"stdin": subprocess.DEVNULL, "stdout": terminal.end}
    _server, endpoint = serve("--count", str(1 + len(SHOWN)), **streams["serve"])

    def files(*contents: bytes) -> Iterator[str]:
        for number, content in enumerate(contents):
            path = tmp_path / f"{len(contents)}-{number}"
            path.write_bytes(content)
            yield from ("--file", str(path))

    frames = files(b"one", b"", b"three\\\n\x1b\xff")
    sender = start("send", "--connect", endpoint, "--multipart", *frames, **streams["send"])
    assert sender.wait() == 0
    start("send", "--connect", endpoint, *files(*SHOWN), **streams["send"])
    quoted = rb"one" + b"\t\t" + rb"three\\\n\x1b\xff"
    assert terminal.read_rest() == b"".join(line + b"\n" for line in (quoted, *SHOWN.values()))


def test_ctrl_s_keeps_no_signal_from_ending_serve(
    start: Start, send: Send, terminal: Terminal
) -> None:
    """Notices go to the same terminal, and must not block either."""
    server = start("serve", "--bind", "tcp://127.0.0.1:*", "--verbose", **terminal.all())
    terminal.read_until(b"listening on ")
    endpoint = terminal.read_until(b"\n").decode().strip()
    termios.tcflow(terminal.end, termios.TCOOFF)
    assert send("--connect", endpoint, "x" * 100_000).returncode == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 1
    termios.tcflow(terminal.end, termios.TCOON)


# Notices


def test_a_notice_is_one_line_whatever_it_quotes_of_a_message(
    context: Context, start: Start, terminal: Terminal
) -> None:
    _server, endpoint = open_server(context, zmq.REP)
    message = b"a\nb\tc\r\x1b[2J\xff\x7f" + "\x9b\u202e\u2069".encode()
    options = ["--timeout", "2", "--retries", "0", "--connect", endpoint]
    shown, logged = (
        start("send", *options, "--", message, stderr=stderr, env=PLAIN)
        for stderr in (terminal.end, subprocess.PIPE)
    )
    assert (shown.wait(), logged.wait()) == (3, 3)
    quoted = r"'a\nb\tc\r\x1b[2J\xff\x7f\xc2\x9b\xe2\x80\xae\xe2\x81\xa9'"
    for lines in (terminal.read_rest().decode().splitlines(), logged.notices[:-1]):
        assert all(line.isprintable() for line in lines)
        assert lines[-1].startswith(f"zmqmsg: no reply to {quoted}")


@pytest.mark.parametrize(
    ("colours", "prefix"),
    [
        ({}, rb"\x1b\[\d+mzmqmsg:\x1b\[0m "),
        ({"NO_COLOR": ""}, rb"\x1b\[\d+mzmqmsg:\x1b\[0m "),
        ({"NO_COLOR": "1"}, b"zmqmsg: "),
    ],
)
def test_notices_have_colour_on_a_terminal_unless_no_color_is_set(
    on_terminal: OnTerminal, colours: dict[str, str], prefix: bytes
) -> None:
    written = on_terminal("--verbose", "hello", streams="stderr", env=ENVIRONMENT | colours)
    assert re.match(prefix + rb"[^\x1b]*\n", written)


def test_neither_messages_nor_a_log_have_colour(
    echo: str, start: Start, terminal: Terminal
) -> None:
    options = ["--connect", echo, "--verbose"]
    client = start("send", *options, "message", stdout=terminal.end, env=ENVIRONMENT)
    assert terminal.read_rest() == b"message\n"
    assert "\x1b" not in "".join(client.finish()[2])


# Typing


def test_a_person_who_types_gets_a_hint_and_replies_and_ends_with_ctrl_d(
    echo: str, start: Start, terminal: Terminal
) -> None:
    client = start("send", "--connect", echo, env=PLAIN, **terminal.all())
    assert terminal.read_until(b"\n") == HINT + b"\n"
    for line in (b"one\n", b"\n", b"three\n"):
        terminal.type(line)
        terminal.read_until(line)
    terminal.type(b"no newline" + CTRL_D + CTRL_D)
    assert client.wait() == 0
    assert terminal.read_rest().endswith(b"no newline\n")


@pytest.mark.parametrize(
    ("arguments", "streams"),
    [(["message"], "stdin stderr"), (["-f", "-"], "stdin stderr"), ([], "stdout stderr")],
    ids=["arguments", "one whole message", "redirected"],
)
def test_there_is_no_hint_when_no_lines_are_typed(
    terminal: Terminal, on_terminal: OnTerminal, arguments: list[str], streams: str
) -> None:
    terminal.type(b"typed\n" + CTRL_D)
    assert HINT not in on_terminal(*arguments, streams=streams)


@LINUX
@pytest.mark.parametrize("options", [[], ["--quoted"]])
def test_a_line_that_the_terminal_has_cut_is_told_with_the_way_out(
    echo: str, start: Start, terminal: Terminal, options: list[str]
) -> None:
    client = start("send", "--connect", echo, *options, env=PLAIN, **terminal.all())
    terminal.read_until(HINT + b"\n")
    terminal.type(b"x" * 4000 + b"\n")
    assert terminal.read_until(b"x\n") == b"x" * 4000 + b"\n"
    terminal.type(b"y" * 4500 + b"\n")
    notice = terminal.read_until(b"y\n")
    assert notice.startswith(b"zmqmsg: line 2 may have been cut: ")
    assert b"4095 bytes" in notice
    assert b"--file or a pipe" in notice
    assert notice.endswith(b"\n" + b"y" * 4095 + b"\n")
    terminal.type(CTRL_D)
    assert client.wait() == 0


def test_a_line_of_that_length_from_a_pipe_is_not_cut(echo: str, send: Send) -> None:
    done = send("--connect", echo, input=b"x" * 4095 + b"\n" + b"y" * 4096 + b"\n")
    assert done.stdout == b"x" * 4095 + b"\n" + b"y" * 4096 + b"\n"
    assert b"cut" not in done.stderr


# The progress bar


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """Make a file of 200 lines, 200 kB."""
    path = tmp_path / "long"
    path.write_bytes((b"x" * 999 + b"\n") * 200)
    return path


@pytest.mark.parametrize(("options", "offset"), [([], 0), (["--quoted"], 100_000)])
def test_a_long_redirected_file_has_a_progress_bar(
    on_terminal: OnTerminal, long_file: Path, options: list[str], offset: int
) -> None:
    """If a part has been read before, it is the bar of what is left."""
    with long_file.open("rb") as file:
        os.lseek(file.fileno(), offset, os.SEEK_SET)
        written = on_terminal(*options, streams="stderr", stdin=file)
    shares = [int(share) for share in re.findall(rb"(\d+)%", written)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert len(set(shares)) > 10
    assert HIDDEN_CURSOR not in written
    assert written.endswith(b"\n")


def test_the_bar_fits_a_narrow_terminal_that_knows_no_sequences(
    terminal: Terminal, on_terminal: OnTerminal, long_file: Path
) -> None:
    termios.tcsetwinsize(terminal.end, (45, 20))
    environment = ENVIRONMENT | {"TERM": "dumb"}
    with long_file.open("rb") as file:
        written = on_terminal("--verbose", streams="stderr", stdin=file, env=environment)
    assert b"\x1b" not in written
    bars = [line for line in re.split(rb"[\r\n]", written) if b"%" in line]
    assert bars
    assert max(map(len, bars)) <= 20


@pytest.mark.parametrize(
    ("arguments", "streams", "size"),
    [
        ([], "stdout stderr", 200_000),
        ([], "stderr", 1000),
        (["one"], "stderr", 200_000),
        (["-f", "-"], "stderr", 200_000),
    ],
    ids=["output on a terminal", "short file", "arguments", "one whole message"],
)
def test_there_is_no_progress_bar_otherwise(
    on_terminal: OnTerminal, long_file: Path, arguments: list[str], streams: str, size: int
) -> None:
    os.truncate(long_file, size)
    with long_file.open("rb") as file:
        written = on_terminal(*arguments, streams=streams, stdin=file)
    assert b"%" not in written
    assert b"\x1b" not in written


@pytest.fixture
def half_server(context: Context) -> tuple[Socket, str]:
    """Open the server of ``halfway``; return it and its endpoint."""
    return open_server(context, zmq.REP)


@pytest.fixture
def halfway(
    half_server: tuple[Socket, str], start: Start, terminal: Terminal, long_file: Path
) -> Process:
    """Start ``send``, and let it get no further than to the middle of its progress bar."""
    server, endpoint = half_server
    with long_file.open("rb") as file:
        streams = {"stdin": file, "stdout": subprocess.DEVNULL, "stderr": terminal.end}
        client = start("send", "--connect", endpoint, "--retries", "0", env=PLAIN, **streams)
    for _ in range(100):
        server.send(server.recv())
    terminal.read_until(b"50%")
    return client


def test_notices_begin_on_a_line_of_their_own_below_the_bar(
    halfway: Process, half_server: tuple[Socket, str], terminal: Terminal
) -> None:
    written = terminal.read_until(b"waiting for a reply")
    half_server[0].close()
    assert halfway.wait() == 3
    written += terminal.read_rest()
    remaining_time = rb"[\s\d:]*"
    notice = rb"\nzmqmsg: waiting for a reply[^\n]*"
    error = rb"\n+zmqmsg: [^\n]* lost[^\n]*\n"
    assert re.fullmatch(remaining_time + notice + error, written), written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_the_bar_leaves_the_terminal_sane(
    halfway: Process, terminal: Terminal, number: int
) -> None:
    halfway.signal(number)
    assert halfway.wait() == -number
    assert terminal.sane
    assert b"zmqmsg" not in terminal.read_rest()


@pytest.fixture
def shell(terminal: Terminal, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Start an interactive shell on the terminal, in the directory of the test."""
    with ExitStack() as stack:

        def shell(command: str) -> None:
            if not shutil.which(command.split()[0]):
                pytest.skip(f"{command} is not installed")
            streams: dict[str, Any] = dict(terminal.all())
            process = subprocess.Popen(
                command.split(),
                cwd=tmp_path,
                env=PLAIN | {"HISTFILE": "", "HOME": str(tmp_path)},
                start_new_session=True,
                preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # for job control
                **streams,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)

        yield shell


def test_ctrl_z_and_ctrl_c_at_the_bar_leave_the_terminal_sane(
    context: Context, shell: Callable[[str], None], terminal: Terminal, long_file: Path
) -> None:
    server, endpoint = open_server(context, zmq.REP)
    shell("bash --norc --noprofile --noediting -i")
    terminal.type(f"zmqmsg send --connect {endpoint} < {long_file} > /dev/null\n".encode())
    for _ in range(100):
        server.send(server.recv())
    written = terminal.read_until(b"50%")
    terminal.type(CTRL_Z)
    written += terminal.read_until(b"Stopped")
    assert terminal.sane
    terminal.type(b"fg\n")
    for _ in range(2):
        server.send(server.recv())
    written += terminal.read_until(b"51%")
    terminal.type(CTRL_C)
    terminal.type(b"echo status $?\n")
    written += terminal.read_until(b"status 130")
    assert terminal.sane
    assert HIDDEN_CURSOR not in written


# Ctrl-C at any time


@LINUX
@pytest.mark.parametrize("arguments", [[], ["--file", "-"], ["--file", "/dev/zero"]])
def test_ctrl_c_ends_send_while_it_reads_without_end(start: Start, arguments: list[str]) -> None:
    with Path("/dev/zero").open("rb") as zero:
        client = start("send", "--connect", free_endpoint(), *arguments, stdin=zero)
    until(lambda: memory(client.pid) > 60_000)
    client.signal(signal.SIGINT)
    assert (client.wait(), client.notices) == (-signal.SIGINT, ["(end)"])


@pytest.mark.parametrize("milliseconds", range(0, 150, 50))
def test_ctrl_c_ends_send_silently_from_its_first_line_on(start: Start, milliseconds: int) -> None:
    """Python names what it imports on standard error, which shows that zmqmsg has begun."""
    environment = ENVIRONMENT | {"PYTHONPROFILEIMPORTTIME": "1"}
    client = start("send", "--connect", free_endpoint(), "message", env=environment)
    client.wait_for_notice(r"\bclick\b")
    time.sleep(milliseconds / 1000)  # wherever it is by then
    client.signal(signal.SIGINT)
    assert client.wait() == -signal.SIGINT
    expected = ("import time:", "zmqmsg: waiting", "(end)")
    assert not [line for line in client.notices if not line.startswith(expected)]


# Completion

COMPLETIONS = [
    ("ser", ["serve"]),
    ("send --time", ["send", "--timeout"]),
    ("serve --client", ["serve", "--client-keys"]),
    ("send --file pic", ["send", "--file", "picture.png"]),
    ("send -f pic", ["send", "-f", "picture.png"]),
    ("send --server-key pic", ["send", "--server-key", "picture.png"]),
    ("serve --key pic", ["serve", "--key", "picture.png"]),
]


def has_bash_completion() -> bool:
    """Return whether bash has what click needs; that of macOS is too old."""
    condition = "((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404))"
    return bool(shutil.which("bash")) and subprocess.call(["bash", "-c", condition]) == 0


@pytest.mark.parametrize(
    ("command", "preparation"),
    [("bash --norc --noprofile -i", ""), ("zsh -f -i", "autoload -U compinit; compinit -u -D; ")],
    ids=["bash", "zsh"],
)
def test_the_tab_key_completes(
    terminal: Terminal, tmp_path: Path, shell: Callable[[str], None], command: str, preparation: str
) -> None:
    """The lines that the shell completes are run by a function, which shows what it got."""
    if command.startswith("bash") and not has_bash_completion():
        pytest.skip("needs bash 4.4")
    (tmp_path / "picture.png").touch()
    shell(command)
    source = f'eval "$(_ZMQMSG_COMPLETE={command.split()[0]}_source zmqmsg)"'
    show = "zmqmsg() { printf '<%s>' \"$@\"; echo; }"
    terminal.type(f"{preparation}{source}; {show}; echo re''ady\n".encode())
    terminal.read_until(b"ready")
    for typed, completed in COMPLETIONS:
        terminal.type(f"zmqmsg {typed}\t\n".encode())
        terminal.read_until("".join(f"<{word}>" for word in completed).encode())
