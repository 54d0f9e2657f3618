"""How ``serve`` gets its replies, asked over inproc: the echo, a fixed text, a command for each request."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from zmqmsg.answers import Answer, Command
from zmqmsg.attendant import Attendant
from zmqmsg.console import Form
from zmqmsg.sockets import Context

from conftest import PLAIN, POSIX, QUOTED, answering, ask

Run = Callable[..., list[list[bytes]]]


@pytest.fixture
def reply(context: Context) -> Run:
    """Let ``answer`` reply to ``requests``, each a list of frames, and return the replies."""

    def reply(answer: Answer, *requests: list[bytes]) -> list[list[bytes]]:
        with answering(context, answer, len(requests)) as endpoint:
            return [ask(context, endpoint, *request) for request in requests]

    return reply


def command(text: str, form: Form = PLAIN) -> Command:
    return Command(text, form, Attendant(), 1 << 26)


def test_a_request_is_echoed_frame_by_frame(reply: Run) -> None:
    requests = [[b"one", b"", b"\xff\0"], [b""]]
    assert reply(Answer(), *requests) == requests


@pytest.mark.parametrize("frames", [[b'{"status": "ok"}'], [b""], [b"\xff\t\n", b"", b"two"]])
def test_every_request_gets_the_fixed_reply(reply: Run, frames: list[bytes]) -> None:
    assert reply(Answer(frames), [b"one"], [b"two", b"three"]) == [frames] * 2


@POSIX
@pytest.mark.parametrize("body", [b"", b"\n", b"\0", b"no newline", b"two\n\n", bytes(range(256))])
def test_a_command_that_is_cat_is_the_echo(reply: Run, body: bytes) -> None:
    assert reply(command("cat"), [body]) == [[body]]


@POSIX
def test_a_large_request_goes_on_after_the_first_second_and_nothing_is_said(
    reply: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    body = os.urandom(3_000_000)
    assert reply(command("sleep 1.5; cat"), [body]) == [[body]]
    assert capfd.readouterr().err == ""


LARGE = os.urandom(3_000_000)


@POSIX
@pytest.mark.parametrize(
    ("text", "body", "printed"),
    [
        ("cat", os.urandom(64 << 20), None),
        ("echo fine", LARGE, b"fine\n"),
        ("head -c 3000000 /dev/zero; cat", LARGE, bytes(3_000_000) + LARGE),
        ("exec <&-; echo closed", LARGE, b"closed\n"),
    ],
    ids=["64 MiB", "reads nothing", "prints much before it reads", "closes its input"],
)
def test_a_command_may_read_and_print_as_it_likes(reply: Run, text: str, body: bytes, printed: bytes | None) -> None:
    assert reply(command(text), [body]) == [[body if printed is None else printed]]


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
    reply: Run, capfd: pytest.CaptureFixture[str], text: str, printed: bytes, notice: str
) -> None:
    assert reply(command(text), [b"x"], [b"x"]) == [[printed]] * 2
    notices = capfd.readouterr().err
    assert notices.count(f"zmqmsg: {notice}\n") == 2
    assert ("not found" in notices) is (text == "no-such-command"), "the shell's own word"


@POSIX
def test_no_request_injects_anything(reply: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = [b"'; %b; '", b'"; %b; "', b"$(%b)", b"`%b`", b"\n%b\n", b"; %b #", b"& %b &", b"| %b", b"x=%b\0%b"]
    bodies = [attempt.replace(b"%b", b"touch injected") for attempt in attempts]
    replies = reply(command('cat; echo "$0 $# $*"; env'), *([body] for body in bodies))
    for body, (printed,) in zip(bodies, replies, strict=True):
        assert printed.startswith(body)
        assert b"PATH=" in printed
        assert b"injected" not in printed.removeprefix(body)
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_several_frames_are_read_as_one_and_a_notice_says_so_once(
    reply: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert reply(command("cat"), *[[b"one", b"", b"two"]] * 2) == [[b"onetwo"]] * 2
    assert capfd.readouterr().err.count("--quoted") == 1


@POSIX
@pytest.mark.parametrize(
    ("text", "frames", "printed", "notice"),
    [
        ("cat", [b"a\tb", b"", b"\n\\\xff"], [b"a\tb", b"", b"\n\\\xff"], None),
        ("cut -f2", [b"one", b"two", b"three"], [b"two"], None),
        ("echo ok", [b"x"], [b"ok"], None),
        ("printf ok", [b"x"], [b"ok"], None),
        ("echo", [b"x"], [b""], None),
        (r"printf 'a\\q\n'", [b"x"], [b"a\\q\n"], r"'\\q'"),
        (r"printf 'a\nb\n'", [b"x"], [b"a\nb\n"], "more than one line"),
    ],
)
def test_with_quoted_a_command_reads_one_line_and_prints_one(
    reply: Run,
    capfd: pytest.CaptureFixture[str],
    text: str,
    frames: list[bytes],
    printed: list[bytes],
    notice: str | None,
) -> None:
    assert reply(command(text, QUOTED), frames) == [printed]
    notices = capfd.readouterr().err
    assert re.search(f"not print a quoted line.*{notice}", notices) if notice else notices == ""
