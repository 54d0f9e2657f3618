"""What is different on Windows, and what its users meet first."""

import os
import signal
import sys
from pathlib import Path

import pytest

from zmqmsg.sockets import Context

from conftest import WINDOWS, Send, Serve, Start, ask

pytestmark = WINDOWS

PYTHON = f'"{sys.executable}"'
CAT = f'{PYTHON} -c "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"'
UPPER = f'{PYTHON} -u -c "for line in open(0): print(line.strip().upper() or exit(3))"'


def test_arguments_are_not_expanded(echo: str, send: Send) -> None:
    done = send("--connect", echo, "*", "?", "~", "%PATH%", "$PATH")
    assert (done.returncode, done.stdout) == (0, b"*\n?\n~\n%PATH%\n$PATH\n")


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ([], b"dir\r\nls\r\n\r\n", b"dir\nls\n\n"),
        ([], b"a\rb\r\r\nno end\r", b"a\rb\r\nno end\r\n"),
        (["--null"], b"one\r\ntwo\r\n\0", b"one\r\ntwo\r\n\0"),
        (["--file", "-"], b"one\r\n", b"one\r\n\n"),
    ],
)
def test_the_cr_before_the_end_of_a_plain_line_belongs_to_the_end(
    echo: str, send: Send, options: list[str], given: bytes, expected: bytes
) -> None:
    done = send("--connect", echo, *options, input=given)
    assert (done.returncode, done.stdout) == (0, expected)


def test_sixteen_mebibytes_are_exact_in_both_directions(
    serve: Serve, send: Send, tmp_path: Path
) -> None:
    body = os.urandom(16 << 20)
    (tmp_path / "body").write_bytes(body)
    server, endpoint = serve("--raw", "--count", "1")
    done = send("--raw", "--connect", endpoint, "--file", str(tmp_path / "body"))
    assert (done.returncode, done.stdout) == (0, body)
    assert server.finish()[:2] == (0, body)


def test_address_in_use_is_told_in_words(start: Start, echo: str) -> None:
    advice = "address in use; stop the server there, or choose another address"
    status, _, notices = start("serve", "--bind", echo).finish()
    assert (status, notices) == (1, [f"zmqmsg: cannot bind {echo}: {advice}"])


def test_ctrl_c_twice_ends_it_at_once(serve: Serve, start: Start) -> None:
    command = f'{PYTHON} -c "import sys, time; print(1, file=sys.stderr); time.sleep(8)"'
    server, endpoint = serve("--exec", command)
    start("send", "--connect", endpoint, "x")
    server.wait_for_notice("^1")
    server.signal(signal.SIGINT)
    server.wait_for_notice("stopping; what has been received is answered")
    server.signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT


def test_a_command_of_the_shell_answers_byte_for_byte(context: Context, serve: Serve) -> None:
    body = bytes(range(256)) * 300
    _, endpoint = serve("--exec", CAT)
    assert ask(context, endpoint, body) == [body]
    _, endpoint = serve("--exec", "echo ok")
    assert ask(context, endpoint, b"x") == [b"ok\r\n"]


def test_a_filter_answers_line_by_line_and_its_end_is_that_of_serve(
    serve: Serve, send: Send
) -> None:
    server, endpoint = serve("--filter", UPPER)
    assert send("--connect", endpoint, "one", "two").stdout == b"ONE\nTWO\n"
    assert send("--connect", endpoint, "--retries", "0", "").returncode == 3
    status, output, notices = server.finish()
    assert (status, output) == (1, b"one\ntwo\n")
    assert notices[-1] == "zmqmsg: the filter exited with status 3, so there can be no more replies"


def test_a_key_that_is_overwritten_in_place_is_not_in_force_any_more(
    serve: Serve, send: Send, tmp_path: Path
) -> None:
    (tmp_path / "clients").mkdir()
    own = ["--key", str(tmp_path / "server.key_secret")]
    _, endpoint = serve(*own, "--client-keys", str(tmp_path / "clients"))

    def status_of(name: str) -> int:
        keys = ["--key", f"{tmp_path / name}.key_secret", "--server-key", f"{tmp_path}/server.key"]
        return send("--connect", endpoint, "--timeout", "10", *keys, "x").returncode

    assert [status_of("alice"), status_of("bob")] == [1, 1]
    listed = tmp_path / "clients" / "one.key"
    listed.write_bytes((tmp_path / "alice.key").read_bytes())
    assert [status_of("alice"), status_of("bob")] == [0, 1]
    listed.write_bytes((tmp_path / "bob.key").read_bytes())
    assert [status_of("alice"), status_of("bob")] == [1, 0]
    listed.unlink()
    assert status_of("bob") == 1


def test_latencies_are_more_than_nothing(echo: str, send: Send) -> None:
    notices = send("--verbose", "--connect", echo, "x").stderr.decode()
    assert "byte, 0.00 ms" not in notices


def test_a_reply_that_ctrl_break_has_cut_off_is_not_sent(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    """Ctrl-Break ends all that runs in the console, our commands as well."""
    script, flag = tmp_path / "script.py", tmp_path / "flag"
    script.write_text(
        "import os, sys, time\n"
        "print('half', flush=True)\n"
        "print('begun', file=sys.stderr, flush=True)\n"
        f"while not os.path.exists({str(flag)!r}):\n"
        "    time.sleep(0.01)\n"
        "os._exit(0xC000013A - (1 << 32))\n"
    )
    server, endpoint = serve("--exec", f"{PYTHON} {script}")
    client = start("send", "--connect", endpoint, "--retries", "0", "x")
    server.wait_for_notice("begun")
    server.signal(signal.SIGINT)
    flag.touch()
    status, output, notices = server.finish()
    assert (status, output) == (0, b"")
    assert "not answered: its command was stopped, too" in notices[-2]
    assert client.finish()[:2] == (3, b"")


REVERSE = """\
import sys

for number, line in enumerate(sys.stdin, start=1):
    print(number, line.rstrip("\\n")[::-1], flush=True)
"""


@pytest.mark.parametrize("variable", [None, "1", "0"])
def test_a_program_in_python_reads_and_prints_utf_8_by_default(
    serve: Serve, send: Send, tmp_path: Path, variable: str | None
) -> None:
    (tmp_path / "reverse.py").write_text(REVERSE)
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUTF8"}
    if variable:
        environment["PYTHONUTF8"] = variable
    _, endpoint = serve("--filter", f"{PYTHON} {tmp_path}/reverse.py", env=environment)
    done = send("--connect", endpoint, "\u00fcml\u00e4ut")
    is_utf_8 = done.stdout.decode(errors="replace") == "1 tu\u00e4lm\u00fc\n"
    assert is_utf_8 is (variable != "0")


def test_with_quoted_a_cr_at_the_end_of_a_line_is_no_part_of_it(echo: str, send: Send) -> None:
    done = send("--connect", echo, "--quoted", input=b"one\\r\r\ntwo\tx\r\n")
    assert (done.returncode, done.stdout) == (0, b"one\\r\ntwo\tx\n")


def test_a_path_is_shown_as_it_was_typed(send: Send) -> None:
    for option in (["--file"], ["--server-key"], ["--key"]):
        other = ["--server-key", r"C:\other"] if option == ["--key"] else []
        shown = send(*option, r"C:\missing\x", *other, "x").stderr.decode()
        assert r"C:\\" not in shown
    assert r"'C:\missing\x' does not exist" in send("--file", r"C:\missing\x").stderr.decode()


@pytest.mark.parametrize("command", ["serve", "send"])
def test_what_is_shown_is_of_windows(start: Start, command: str) -> None:
    status, page, _ = start(command, "--help").finish()
    assert status == 0
    for foreign in (b"'", b"ipc://", b" tr ", b"/dev/null"):
        assert foreign not in page.replace(b"broker's", b"").replace(b"server's", b"")


def test_an_endpoint_without_unix_sockets_is_told_with_one_of_tcp(send: Send) -> None:
    shown = send("--connect", "ipc:///tmp/socket", "x").stderr
    assert b"for example tcp://" in shown
