"""How ``serve --exec`` gets its replies from a command for each request, asked over inproc."""

import os
import re
from pathlib import Path

import pytest

from zmqmsg.answers import ExecAnswer
from zmqmsg.messages import Form
from zmqmsg.sockets import Context
from zmqmsg.stopping import Guard

from conftest import PLAIN, POSIX, QUOTED, answering, ask

pytestmark = POSIX

LARGE = os.urandom(3_000_000)


def reply(
    context: Context, text: str, *requests: list[bytes], form: Form = PLAIN
) -> list[list[bytes]]:
    """Let a command reply to ``requests``, each a list of frames, and return the replies."""
    answer = ExecAnswer(text, form, 1 << 26, Guard(None))
    with answering(context, answer, len(requests)) as endpoint:
        return [ask(context, endpoint, *request) for request in requests]


def test_a_command_that_is_cat_is_the_echo(context: Context) -> None:
    bodies = [b"", b"\n", b"\0", b"no newline", b"two\n\n", bytes(range(256)), LARGE]
    requests = [[body] for body in bodies]
    assert reply(context, "cat", *requests) == requests


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("echo fine", b"fine\n"),
        ("head -c 3000000 /dev/zero; cat", bytes(3_000_000) + LARGE),
        ("exec <&-; echo closed", b"closed\n"),
    ],
    ids=["reads nothing", "prints much before it reads", "closes its input"],
)
def test_a_command_may_read_and_print_as_it_likes(
    context: Context, capfd: pytest.CaptureFixture[str], text: str, printed: bytes
) -> None:
    assert reply(context, text, [LARGE]) == [[printed]]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "printed", "notice"),
    [
        ("cat; exit 3", b"x", "exited with status 3"),
        ("cat; kill -KILL $$", b"x", "was killed by signal 9"),
        # 126 where PATH has a directory that we may not enter.
        ("no-such-command", b"", "exited with status 12[67]"),
    ],
)
def test_what_a_command_that_fails_has_printed_is_the_reply(
    context: Context, capfd: pytest.CaptureFixture[str], text: str, printed: bytes, notice: str
) -> None:
    assert reply(context, text, [b"x"], [b"x"]) == [[printed]] * 2
    notices = re.findall(f"^zmqmsg: the command {notice}$", capfd.readouterr().err, re.MULTILINE)
    assert len(notices) == 2


def test_no_request_injects_anything(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = ["'; %; '", '"; %; "', "$(%)", "`%`", "\n%\n", "; % #", "& % &", "| %", "x=%\0%"]
    bodies = [attempt.replace("%", "touch injected").encode() for attempt in attempts]
    replies = reply(context, 'cat; echo "$0 $# $*"; env', *([body] for body in bodies))
    for body, (printed,) in zip(bodies, replies, strict=True):
        assert printed.startswith(body)
        assert b"\nPWD=" in printed
        assert b"injected" not in printed.removeprefix(body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "sent", "printed", "notice"),
    [
        ("cat", [b"a\tb", b"", b"\n\\\xff"], [b"a\tb", b"", b"\n\\\xff"], ""),
        ("cut -f2", [b"one", b"two", b"three"], [b"two"], ""),
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
