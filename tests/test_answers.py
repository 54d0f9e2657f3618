"""How ``serve --exec`` gets its replies from a command for each request, asked over inproc."""

import os
import re
from pathlib import Path

import pytest

from zmqmsg.answers import Command
from zmqmsg.attendant import Attendant
from zmqmsg.console import Form
from zmqmsg.sockets import Context

from conftest import PLAIN, POSIX, QUOTED, answering, ask


def reply(
    context: Context, text: str, *requests: list[bytes], form: Form = PLAIN
) -> list[list[bytes]]:
    """Let a command reply to ``requests``, each a list of frames, and return the replies."""
    with answering(context, Command(text, form, Attendant(), 1 << 26), len(requests)) as endpoint:
        return [ask(context, endpoint, *request) for request in requests]


@POSIX
def test_a_command_that_is_cat_is_the_echo(context: Context) -> None:
    requests = [
        [body] for body in (b"", b"\n", b"\0", b"no newline", b"two\n\n", bytes(range(256)))
    ]
    assert reply(context, "cat", *requests) == requests


LARGE = os.urandom(3_000_000)


@POSIX
@pytest.mark.parametrize(
    ("text", "body", "printed"),
    [
        ("cat", os.urandom(64 << 20), None),
        ("echo fine", LARGE, b"fine\n"),
        ("head -c 3000000 /dev/zero; cat", LARGE, bytes(3_000_000) + LARGE),
        ("exec <&-; echo closed", LARGE, b"closed\n"),
        ("sleep 1.1; cat", LARGE, None),
    ],
    ids=[
        "64 MiB",
        "reads nothing",
        "prints much before it reads",
        "closes its input",
        "takes more than a second",
    ],
)
def test_a_command_may_read_and_print_as_it_likes(
    context: Context,
    capfd: pytest.CaptureFixture[str],
    text: str,
    body: bytes,
    printed: bytes | None,
) -> None:
    assert reply(context, text, [body]) == [[body if printed is None else printed]]
    assert capfd.readouterr().err == ""


@POSIX
@pytest.mark.parametrize(
    ("text", "printed", "notice"),
    [
        ("cat; exit 3", b"x", "the command exited with status 3"),
        ("cat; kill -KILL $$", b"x", "the command was killed by signal 9"),
        ("cat; kill -TERM $$", b"x", "the command was killed by signal 15"),
        ("no-such-command", b"", "the command exited with status 127"),
    ],
)
def test_what_a_command_that_fails_has_printed_is_the_reply(
    context: Context, capfd: pytest.CaptureFixture[str], text: str, printed: bytes, notice: str
) -> None:
    assert reply(context, text, [b"x"], [b"x"]) == [[printed]] * 2
    notices = capfd.readouterr().err
    assert notices.count(f"zmqmsg: {notice}\n") == 2
    assert ("not found" in notices) is (text == "no-such-command"), "the shell's own word"


@POSIX
def test_no_request_injects_anything(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = [
        b"'; %b; '",
        b'"; %b; "',
        b"$(%b)",
        b"`%b`",
        b"\n%b\n",
        b"; %b #",
        b"& %b &",
        b"| %b",
        b"x=%b\0%b",
    ]
    bodies = [attempt.replace(b"%b", b"touch injected") for attempt in attempts]
    replies = reply(context, 'cat; echo "$0 $# $*"; env', *([body] for body in bodies))
    for body, (printed,) in zip(bodies, replies, strict=True):
        assert printed.startswith(body)
        assert b"PATH=" in printed
        assert b"injected" not in printed.removeprefix(body)
    assert list(tmp_path.iterdir()) == []


@POSIX
@pytest.mark.parametrize(
    ("text", "sent", "printed", "notice"),
    [
        ("cat", [b"a\tb", b"", b"\n\\\xff"], [b"a\tb", b"", b"\n\\\xff"], ""),
        ("cut -f2", [b"one", b"two", b"three"], [b"two"], ""),
        ("echo ok", [b"x"], [b"ok"], ""),
        ("printf ok", [b"x"], [b"ok"], ""),
        ("echo", [b"x"], [b""], ""),
        (r"printf 'a\\q\n'", [b"x"], [b"a\\q\n"], r"'\\q'"),
        (r"printf 'a\nb\n'", [b"x"], [b"a\nb\n"], "more than one line"),
    ],
)
def test_with_quoted_a_command_reads_one_line_and_prints_one(
    context: Context,
    capfd: pytest.CaptureFixture[str],
    text: str,
    sent: list[bytes],
    printed: list[bytes],
    notice: str,
) -> None:
    assert reply(context, text, sent, form=QUOTED) == [printed]
    notices = capfd.readouterr().err
    assert re.search(f"not print a quoted line.*{notice}", notices) if notice else notices == ""
