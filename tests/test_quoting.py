"""Quoted lines: one message a line, frames separated by TAB, special bytes escaped."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqmsg.quoting import quote, unquote
from zmqmsg.sockets import Context, Socket

from conftest import POSIX, Send, Serve, Start, ask, open_server

# What a quoted line can consist of, TAB aside: text, escapes, and bytes that are not UTF-8.
PIECES = [
    *"ab \u00e9\u20ac\U0001f44d",
    "\\\\",
    *[r"\t", r"\n", r"\r", r"\x00", r"\x1b", r"\x7f", r"\xc2\x9b", r"\xff"],
]

FRAME = st.binary(max_size=20) | st.text(max_size=20).map(str.encode)

AWKWARD = [
    [b""],
    [b"", b"", b""],
    [b"a\tb\nc\\\r\0"],
    [bytes(range(256)), "\u20ac\u202e".encode()],
    [b"\\x41"],
]
"""Messages that a log of plain lines would lose."""

without_deadline = settings(deadline=None)


@without_deadline
@given(st.lists(FRAME, min_size=1))
def test_what_is_quoted_is_read_back_the_same(frames: list[bytes]) -> None:
    line = quote(frames)
    assert unquote(line) == frames
    assert line.count(b"\t") == len(frames) - 1
    controls = {character for character in line.decode() if unicodedata.category(character) == "Cc"}
    assert controls <= {"\t"}


@without_deadline
@given(st.lists(st.sampled_from([*PIECES, "\t"])).map("".join))
def test_a_quoted_line_that_is_read_is_quoted_the_same(text: str) -> None:
    assert quote(unquote(text.encode())) == text.encode()


@pytest.mark.parametrize(
    ("frame", "quoted"),
    [
        (b"\\ \t \n \r", rb"\\ \t \n \r"),
        (b"\0 \x01 \x1b[2J \x1f \x7f", rb"\x00 \x01 \x1b[2J \x1f \x7f"),
        ("\x80 \x9f".encode(), rb"\xc2\x80 \xc2\x9f"),
        ("\u061c \u200e \u200f".encode(), rb"\xd8\x9c \xe2\x80\x8e \xe2\x80\x8f"),
        ("\u202a \u202e".encode(), rb"\xe2\x80\xaa \xe2\x80\xae"),
        ("\u2066 \u2069".encode(), rb"\xe2\x81\xa6 \xe2\x81\xa9"),
        (b"\xff \xe2\x82 \xc0\x80", rb"\xff \xe2\x82 \xc0\x80"),
        (b"\xed\xb2\x80", rb"\xed\xb2\x80"),  # a surrogate, which is no valid UTF-8
        *[
            (text.encode(), text.encode())
            for text in ('{"a": 1}', "\u65e5 \u05e2\u05d1", "\U0001f468\u200d\U0001f469")
        ],
    ],
)
def test_special_bytes_are_escaped_and_harmless_text_stays_readable(
    frame: bytes, quoted: bytes
) -> None:
    assert quote([frame]) == quoted


def answer(server: Socket, replies: list[list[bytes]]) -> list[list[bytes]]:
    """Answer requests with ``replies`` in turn, and return the requests."""
    requests = []
    for reply in replies:
        requests.append(server.recv_multipart())
        server.send_multipart(reply)
    return requests


@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline", "no final newline"])
def test_send_reads_and_prints_quoted_lines(
    context: Context, start: Start, tmp_path: Path, end: bytes
) -> None:
    server, endpoint = open_server(context, zmq.REP)
    lines = [rb"one" + b"\t\t" + rb"t\two\\", b"", rb"\x41\xfF\x00", b"raw \xff\r!", b"last"]
    (tmp_path / "lines").write_bytes(b"\n".join(lines) + end)
    with (tmp_path / "lines").open("rb") as file:
        sender = start("send", "-Q", "--connect", endpoint, stdin=file)
    assert answer(server, AWKWARD) == [
        [b"one", b"", b"t\two\\"],
        [b""],
        [b"A\xff\0"],
        [b"raw \xff\r!"],
        [b"last"],
    ]
    status, output, _ = sender.finish()
    assert status == 0
    assert [unquote(line) for line in output.removesuffix(b"\n").split(b"\n")] == AWKWARD


@pytest.mark.parametrize("escape", [r"\q", r"\x4", r"\xg0", r"\u20ac", "\\", "\\\ta"])
def test_a_wrong_escape_is_named_with_its_line_which_is_not_sent(
    context: Context, start: Start, escape: str
) -> None:
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "-Q", "--connect", endpoint)
    sender.send_line(f"good\nfine\t{escape}\nnever".encode())
    assert answer(server, [[b"reply"]]) == [[b"good"]]
    status, output, notices = sender.finish()
    assert not server.poll(100)
    assert (status, output) == (1, b"reply\n")
    assert notices[-1].startswith("zmqmsg: line 2 ")
    assert f"'{escape[:2].strip()}'" in notices[-1]


def test_arguments_and_fixed_replies_are_quoted_lines_and_files_are_not(
    serve: Serve, send: Send, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"\\q\t\n")
    server, endpoint = serve("-Q", "--reply", "status\tok\\x00")
    file = ["--file", str(tmp_path / "file")]
    done = send("-Q", "-m", "--connect", endpoint, *file, "a\\tb\tc", r"\xff")
    assert (done.returncode, done.stdout) == (0, b"status\tok\\x00\n")
    assert server.read_line() == rb"a\tb" + b"\tc\t" + rb"\xff" + b"\t" + rb"\\q\t\n"


@pytest.mark.parametrize("arguments", [["send", "good", r"bad\q"], ["serve", "--reply", r"bad\q"]])
def test_a_wrong_escape_in_an_argument_is_wrong_usage(start: Start, arguments: list[str]) -> None:
    status, output, notices = start(*arguments, "-Q").finish()
    assert (status, output, len(notices)) == (2, b"", 1)
    assert r"'bad\q': '\q' is not an escape" in notices[0]


def test_quoted_lines_with_multipart_are_the_frames_of_one_request(echo: str, send: Send) -> None:
    assert send("-Q", "-m", "--connect", echo, input=b"a\\n\tb\nc\n").stdout == b"a\\n\tb\tc\n"


@POSIX
def test_a_recorded_conversation_can_be_searched_and_played_again(
    context: Context, serve: Serve, start: Start, tmp_path: Path
) -> None:
    conversation = [[b"get", b"two\nlines"], *AWKWARD, [b"put", b"x", b"\x80\0"], [b"get", b"one"]]
    log = tmp_path / "log"
    with log.open("wb") as file:
        recorder, endpoint = serve("-Q", "--count", str(len(conversation)), stdout=file)
    for request in conversation:
        assert ask(context, endpoint, *request) == request
    assert recorder.finish()[0] == 0

    found = subprocess.run(
        "grep -a ^get log | cut -f2 | sort", shell=True, cwd=tmp_path, capture_output=True
    )
    assert found.stdout == rb"one" + b"\n" + rb"two\nlines" + b"\n"

    other, endpoint = open_server(context, zmq.REP)
    with log.open("rb") as file:
        player = start("send", "-Q", "--connect", endpoint, stdin=file)
    assert answer(other, [[b"ok"]] * len(conversation)) == conversation
    assert player.finish()[0] == 0


def test_the_heartbeat_of_a_jupyter_kernel_is_an_echo(send: Send, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    write_connection_file = pytest.importorskip("jupyter_client.connect").write_connection_file
    path, ports = write_connection_file(str(tmp_path / "kernel.json"), ip="127.0.0.1")
    kernel = subprocess.Popen(
        [sys.executable, "-m", "ipykernel_launcher", "-f", path],
        env=os.environ | {"IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert send("--connect", f"tcp://127.0.0.1:{ports['hb_port']}", "ping").stdout == b"ping\n"
    finally:
        kernel.kill()
        kernel.wait()
