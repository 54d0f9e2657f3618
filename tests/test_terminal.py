"""What a person at a terminal sees, on real pseudo-terminals and in real shells."""

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import COMMAND, LIMIT, Process, bind

Serve = Callable[..., tuple[Process, str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Process]

CTRL_D = b"\x04"
CLEARED = b"\r\x1b[K\x1b[?25h"
HIDDEN_CURSOR = b"\x1b[?25l"
HINT = b"zmqmsg: reading messages, one a line; Ctrl-D ends"

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")} | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "TERM": "xterm-256color",
    "LC_ALL": "C.UTF-8",
}


class Terminal:
    """A pseudo-terminal of 45 lines of 80 characters: processes get ``end``, and what they write is read here."""

    def __init__(self) -> None:
        self.master, self.end = os.openpty()
        termios.tcsetwinsize(self.end, (45, 80))
        attributes = termios.tcgetattr(self.end)
        attributes[1] &= ~termios.OPOST  # newlines shall arrive as they were written
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(self.end, termios.TCSANOW, attributes)
        self.output = b""

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read_until(self, text: bytes) -> bytes:
        """Return all that was written, once ``text`` is in it; it is forgotten then."""
        until = time.monotonic() + LIMIT
        while text not in self.output:
            assert select.select([self.master], [], [], until - time.monotonic())[0], f"no {text!r} in {self.output!r}"
            self.output += os.read(self.master, 65536)
        taken, self.output = self.output, b""
        return taken

    def read_rest(self) -> bytes:
        """Return all that was written, once no process has the terminal any more."""
        os.close(self.end)
        self.end = -1
        rest = self.output
        while select.select([self.master], [], [], LIMIT)[0]:
            try:
                rest += os.read(self.master, 65536)
            except OSError:  # Linux's word for the end
                return rest
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


@pytest.fixture
def on_terminal(echo: str, start: Start, terminal: Terminal) -> Callable[..., bytes]:
    """Run ``send`` to its end with some streams on the terminal; return what was written there."""

    def on_terminal(*arguments: str | bytes, streams: str, **options: Any) -> bytes:
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": ENVIRONMENT}
        given |= dict.fromkeys(streams.split(), terminal.end)
        client = start("send", "--connect", echo, *arguments, **given | options)
        written = terminal.read_rest()
        assert client.wait() == 0
        return written

    return on_terminal


UNSAFE = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
HOSTILE = [
    (b"\x1b]0;title\x07", rb"\x1b]0;title\x07"),
    (b"\x1b[2J\x1b[31m", rb"\x1b[2J\x1b[31m"),
    ("\x9b31m\x85".encode(), rb"\x9b31m\x85"),
    (b"over\rwrite\b\x7f\0", rb"over\rwrite\x08\x7f\x00"),
    (b"\xff\xc0\x80\xed\xa0\x80 \xe2\x82", rb"\xff\xc0\x80\xed\xa0\x80 \xe2\x82"),
    ("user\u202etxt.exe\u2066\u200f\u061c".encode(), rb"user\u202etxt.exe\u2066\u200f\u061c"),
]
HARMLESS = [
    '{\n\t"pretty": "printed"\n}',
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467, flag \U0001f1ea\U0001f1fa, \U0001f44d\U0001f3fd",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629, \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u65e5\u672c\u8a9e, \u0939\u093f\u0928\u094d\u0926\u0940, e\u0301",
    r"C:\x1b\n",
]


@pytest.fixture(params=["serve", "send"])
def shown(
    request: pytest.FixtureRequest, serve: Serve, send: Send, start: Start, terminal: Terminal, tmp_path: Path
) -> Callable[[bytes], bytes]:
    """Let ``serve`` or ``send`` show a message on a terminal, and return what appears."""

    def shown(message: bytes) -> bytes:
        path = tmp_path / "message"
        path.write_bytes(message)
        if request.param == "serve":
            _server, endpoint = serve("--count", "1", stdin=subprocess.DEVNULL, stdout=terminal.end)
            assert send("--connect", endpoint, "--file", str(path)).stdout == message + b"\n"
        else:
            _server, endpoint = serve("--count", "1", "--quiet")
            start("send", "--connect", endpoint, "--file", str(path), stdin=subprocess.DEVNULL, stdout=terminal.end)
        return terminal.read_rest()

    return shown


def test_a_peer_cannot_drive_the_terminal(shown: Callable[[bytes], bytes]) -> None:
    lines = [line for line, _shown in HOSTILE]
    assert shown(b"\n".join(lines)).splitlines() == [shown for _line, shown in HOSTILE]


def test_no_control_character_reaches_the_terminal(shown: Callable[[bytes], bytes]) -> None:
    controls = [chr(code) for code in UNSAFE if chr(code) not in "\n\t"]
    text = shown("".join(f"{control}|" for control in controls).encode()).decode().removesuffix("\n")
    assert not set(text) & set(controls)
    assert len(text.split("|")) == len(controls) + 1
    assert all(part.startswith("\\") for part in text.split("|")[:-1])


def test_what_is_harmless_is_shown_as_it_is(shown: Callable[[bytes], bytes]) -> None:
    assert shown("\n".join(HARMLESS).encode()).decode() == "\n".join([*HARMLESS, ""])


def test_a_pipe_gets_what_a_terminal_does_not(echo: str, send: Send) -> None:
    messages = [line.replace(b"\0", b"") for line, _shown in HOSTILE]
    assert send("--connect", echo, "--", *messages).stdout == b"".join(message + b"\n" for message in messages)


def test_a_large_message_is_escaped_to_its_end(shown: Callable[[bytes], bytes]) -> None:
    """Escaped as a whole, as an invalid byte may turn up anywhere, beside characters of several bytes."""
    assert shown("\u20ac\x1b".encode() * 30_000 + b"\xff") == "\u20ac\\x1b".encode() * 30_000 + b"\\xff\n"


def test_each_frame_has_its_line_on_a_terminal(on_terminal: Callable[..., bytes]) -> None:
    assert on_terminal("--multipart", "one", "", "three", streams="stdout") == b"one\n\nthree\n"


@pytest.mark.parametrize("on", ["terminal", "pipe"])
def test_a_notice_is_one_line_whatever_it_quotes_of_a_message(
    context: Context, start: Start, terminal: Terminal, on: str
) -> None:
    server = context.socket(zmq.REP)
    message = b"a\nb\tc\r\x1b[2J\xff\x7f" + "\x9b\u202e\u2069".encode()
    stderr = terminal.end if on == "terminal" else subprocess.PIPE
    options = ["--timeout", "0.5", "--retries", "0", "--connect", bind(server)]
    client = start("send", *options, "--", message, stderr=stderr, env=ENVIRONMENT | {"NO_COLOR": "1"})
    assert client.wait() == 1
    [line] = terminal.read_rest().decode().splitlines() if on == "terminal" else client.notices[:-1]
    assert line.startswith(r"zmqmsg: no reply to 'a\nb\tc\r\x1b[2J\xff\x7f\x9b\u202e\u2069', sent once: ")
    assert line.isprintable()


@pytest.mark.parametrize("option", ["--file", "--connect", "--key", "--retries", "--max-size", "--timeout"])
def test_a_notice_is_one_line_whatever_it_quotes_of_an_option(send: Send, tmp_path: Path, option: str) -> None:
    done = send("--server-key", "a\nb", option, "\n\tb\x1b[2J\u202e/c", "message", cwd=tmp_path)
    assert done.returncode == 2
    line = done.stderr.decode()
    assert line.removesuffix("\n").isprintable()
    assert line.endswith("\n")


def test_a_notice_quotes_what_the_locale_has_no_characters_for(send: Send) -> None:
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = send("--file", "\u20ac".encode(), env=ENVIRONMENT | plain)
    assert done.returncode == 2
    assert done.stderr.startswith(b"zmqmsg: ")
    assert done.stderr.count(b"\n") == 1


def test_an_unknown_option_or_command_is_quoted_without_its_controls() -> None:
    for arguments in (["send", "--\x1b[2J\n"], ["\x1b[2J\n"]):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=LIMIT)
        assert done.returncode == 2
        assert r"\x1b[2J\n" in done.stderr.decode()
        assert done.stderr.decode().removesuffix("\n").isprintable()


def test_a_person_who_types_gets_a_hint_and_replies_and_ends_with_ctrl_d(
    echo: str, start: Start, terminal: Terminal
) -> None:
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], terminal.end)
    client = start("send", "--connect", echo, env=ENVIRONMENT | {"NO_COLOR": "1"}, **streams)
    assert terminal.read_until(b"\n") == HINT + b"\n"
    for line in (b"one\n", b"\n", b"three\n"):
        terminal.type(line)
        assert terminal.read_until(b"\n") == line
    terminal.type(b"no newline" + CTRL_D + CTRL_D)
    assert client.wait() == 0
    assert terminal.read_rest() == b"no newline\n"


def test_the_hint_comes_though_standard_error_is_no_terminal(echo: str, start: Start, terminal: Terminal) -> None:
    client = start("send", "--connect", echo, stdin=terminal.end)
    client.wait_for_notice(re.escape(HINT.decode()))
    terminal.type(CTRL_D)
    assert client.finish() == (0, b"", [HINT.decode()])


@pytest.mark.parametrize("arguments", [["message"], [""], ["--file", "/dev/null"]])
def test_there_is_no_hint_when_standard_input_is_not_read(
    on_terminal: Callable[..., bytes], arguments: list[str]
) -> None:
    assert on_terminal(*arguments, streams="stdin stderr") == b""


def test_there_is_no_hint_when_standard_input_is_no_terminal(on_terminal: Callable[..., bytes]) -> None:
    assert on_terminal(streams="stdout stderr") == b""


def test_there_is_no_hint_for_one_whole_message(echo: str, start: Start, terminal: Terminal) -> None:
    client = start("send", "--connect", echo, "--file", "-", stdin=terminal.end)
    terminal.type(b"two\nlines\n" + CTRL_D)
    assert client.finish() == (0, b"two\nlines\n\n", [])


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    path = tmp_path / "long"
    path.write_bytes((b"x" * 999 + b"\n") * 200)
    return path


def test_a_long_file_has_a_progress_bar_that_is_cleared_at_the_end(
    on_terminal: Callable[..., bytes], long_file: Path
) -> None:
    with long_file.open("rb") as file:
        written = on_terminal(streams="stderr", stdin=file)
    shares = [int(share) for share in re.findall(rb"(\d+)%", written)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 100
    assert len(set(shares)) > 10
    assert HIDDEN_CURSOR in written
    assert written.endswith(CLEARED)


def test_many_files_have_a_progress_bar(on_terminal: Callable[..., bytes], tmp_path: Path) -> None:
    options = []
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(b"content")
        options += ["--file", str(path)]
    written = on_terminal(*options, streams="stderr")
    assert [int(share) for share in re.findall(rb"(\d+)%", written)] == list(range(0, 101, 5))
    assert written.endswith(CLEARED)


def test_a_file_that_has_been_read_in_part_has_the_progress_of_its_rest(
    on_terminal: Callable[..., bytes], long_file: Path
) -> None:
    with long_file.open("rb") as file:
        os.lseek(file.fileno(), 100_000, os.SEEK_SET)
        written = on_terminal(streams="stderr", stdin=file)
    assert b"100%" in written
    assert written.endswith(CLEARED)


@pytest.mark.parametrize("case", ["output on a terminal", "short", "arguments", "few files", "at its end"])
def test_there_is_no_progress_bar_otherwise(on_terminal: Callable[..., bytes], long_file: Path, case: str) -> None:
    arguments: list[str] = []
    streams = "stderr"
    with long_file.open("r+b") as file:
        match case:
            case "output on a terminal":
                streams = "stdout stderr"
            case "short":
                file.truncate(1000)
            case "arguments":
                arguments = ["one", "two"]
            case "few files":
                arguments = ["--file", str(long_file), "--file", str(long_file)]
            case "at its end":
                os.lseek(file.fileno(), 0, os.SEEK_END)
        written = on_terminal(*arguments, streams=streams, stdin=file)
    assert b"%" not in written
    assert b"\x1b" not in written


def test_there_is_no_progress_bar_for_a_pipe(echo: str, start: Start, terminal: Terminal, long_file: Path) -> None:
    client = start("send", "--connect", echo, stdout=subprocess.DEVNULL, stderr=terminal.end, env=ENVIRONMENT)
    assert client.popen.stdin
    client.popen.stdin.write(long_file.read_bytes())
    assert client.finish() == (0, b"", [])
    assert terminal.read_rest() == b""


def test_there_is_no_progress_bar_in_a_log(echo: str, start: Start, long_file: Path) -> None:
    with long_file.open("rb") as file:
        client = start("send", "--connect", echo, stdin=file)
        assert client.finish() == (0, long_file.read_bytes(), [])


@pytest.mark.parametrize("no_colour", [{}, {"NO_COLOR": "1"}])
def test_a_notice_clears_the_progress_bar_and_so_does_a_failure(
    context: Context, start: Start, terminal: Terminal, long_file: Path, no_colour: dict[str, str]
) -> None:
    server = context.socket(zmq.REP)
    options = ["--timeout", "0.5", "--retries", "1", "--connect", bind(server)]
    with long_file.open("rb") as file:
        streams = {"stdin": file, "stdout": subprocess.DEVNULL, "stderr": terminal.end}
        client = start("send", *options, env=ENVIRONMENT | no_colour, **streams)
    written = terminal.read_rest()
    assert client.wait() == 1
    prefix = re.escape(CLEARED) + rb"(\x1b\[\d+m)?zmqmsg: (\x1b\[0m)?"
    assert re.search(prefix + rb"no reply within [^\r]*, trying again \(1 of 1\)\n", written)
    assert re.search(prefix + rb"no reply to [^\r]*\n$", written)


def test_ctrl_c_clears_the_progress_bar(context: Context, start: Start, terminal: Terminal, long_file: Path) -> None:
    with long_file.open("rb") as file:
        streams = {"stdin": file, "stdout": subprocess.DEVNULL, "stderr": terminal.end}
        endpoint = bind(context.socket(zmq.REP))
        client = start("send", "--connect", endpoint, env=ENVIRONMENT, **streams)
    terminal.read_until(b"0%")
    client.signal(signal.SIGINT)
    assert client.wait() == 130
    assert terminal.read_rest().endswith(CLEARED)


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": ""}])
def test_notices_have_colour_on_a_terminal(terminal: Terminal, start: Start, environment: dict[str, str]) -> None:
    client = start("send", "--retries", "x", stderr=terminal.end, env=ENVIRONMENT | environment)
    assert client.wait() == 2
    assert re.fullmatch(rb"\x1b\[\d+mzmqmsg: \x1b\[0m[^\x1b]*\n", terminal.read_rest())


def test_notices_have_no_colour_with_no_color(terminal: Terminal, start: Start) -> None:
    client = start("send", "--retries", "x", stderr=terminal.end, env=ENVIRONMENT | {"NO_COLOR": "1"})
    assert client.wait() == 2
    assert re.fullmatch(rb"zmqmsg: [^\x1b]*\n", terminal.read_rest())


def test_notices_have_no_colour_in_a_log(start: Start) -> None:
    client = start("send", "--retries", "x", env=ENVIRONMENT)
    status, output, [notice] = client.finish()
    assert (status, output) == (2, b"")
    assert notice.startswith("zmqmsg: ")
    assert "\x1b" not in notice


def test_messages_have_no_colour(on_terminal: Callable[..., bytes]) -> None:
    assert on_terminal("message", streams="stdin stdout stderr") == b"message\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["serve", "--help"], ["send", "--help"]])
def test_help_fits_a_terminal(start: Start, terminal: Terminal, arguments: list[str]) -> None:
    start(*arguments, env=ENVIRONMENT, **dict.fromkeys(["stdin", "stdout", "stderr"], terminal.end))
    lines = terminal.read_rest().decode().splitlines()
    assert 10 < len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert any("Exit status" in line for line in lines)
    assert not [line for line in lines if re.search(r"\w\.\.\.$", line)], "a help text is cut off"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with one file whose name no option resembles."""
    (tmp_path / "picture.png").touch()
    return tmp_path


COMPLETIONS = [
    ("ser", ["serve"]),
    ("send --time", ["send", "--timeout"]),
    ("serve --client", ["serve", "--client-keys"]),
    ("send --file pic", ["send", "--file", "picture.png"]),
    ("send -f pic", ["send", "-f", "picture.png"]),
    ("send --key pic", ["send", "--key", "picture.png"]),
    ("send --server-key pic", ["send", "--server-key", "picture.png"]),
    ("serve --key pic", ["serve", "--key", "picture.png"]),
]


@pytest.mark.parametrize(
    ("shell", "preparation"),
    [("bash --norc --noprofile -i", ""), ("zsh -f -i", "autoload -U compinit; compinit -u -D; ")],
    ids=["bash", "zsh"],
)
def test_the_tab_key_completes(terminal: Terminal, folder: Path, shell: str, preparation: str) -> None:
    """The lines that the shell completes are run by a function, which shows what it got."""
    command = shlex.split(shell)
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    streams: dict[str, Any] = dict.fromkeys(["stdin", "stdout", "stderr"], terminal.end)
    environment = ENVIRONMENT | {"TERM": "dumb", "HISTFILE": "", "HOME": str(folder)}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams) as process:
        try:
            source = f'eval "$(_ZMQMSG_COMPLETE={command[0]}_source zmqmsg)"'
            show = "zmqmsg() { printf '<%s>' \"$@\"; echo; }"
            terminal.type(f"{preparation}{source}; {show}; echo re''ady\n".encode())
            terminal.read_until(b"ready")
            for typed, completed in COMPLETIONS:
                terminal.type(f"zmqmsg {typed}\t\n".encode())
                terminal.read_until("".join(f"<{word}>" for word in completed).encode())
        finally:
            process.kill()


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(("typed", "completed"), COMPLETIONS[1::3])
def test_fish_completes(folder: Path, typed: str, completed: list[str]) -> None:
    script = f"_ZMQMSG_COMPLETE=fish_source zmqmsg | source; complete -C 'zmqmsg {typed}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        cwd=folder,
        env=ENVIRONMENT | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == completed[-1:]
    assert done.stderr == ""
