"""Arguments are bytes, in any locale: they go out as they came in."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from zmqmsg.sockets import Context

from conftest import COMMAND, LIMIT, LINUX, Send, Start, ask, free_endpoint, stop

pytestmark = LINUX

# Characters of UTF-8, of EUC-JP and of ISO-8859-1, and bytes that are none in some of them
TYPED = "ü日".encode() + b"\xa4\xa2 \xe9 \xff\xfe\x8f\\"

Environment = dict[str, str]


@pytest.fixture(params=["C.UTF-8", "ja_JP.EUC-JP", "de_DE.ISO-8859-1"], scope="session")
def environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """Return the environment of a locale, which is made once for all tests if need be."""
    locale: str = request.param
    if locale == "C.UTF-8":
        return os.environ | {"LC_ALL": locale}
    if not shutil.which("localedef"):
        pytest.skip("needs localedef")
    language, _, encoding = locale.partition(".")
    shared = tmp_path_factory.getbasetemp().parent / "locales"  # by the processes of pytest-xdist
    shared.mkdir(exist_ok=True)
    if not (shared / locale).exists():
        draft = tmp_path_factory.mktemp("locales") / locale
        subprocess.run(
            ["localedef", "-i", language, "-f", encoding, draft],
            capture_output=True,
            timeout=LIMIT,
        )
        with suppress(OSError):  # there is none, or another process was faster
            draft.rename(shared / locale)
    if not (shared / locale).exists():
        pytest.skip(f"localedef cannot make {locale}")
    return os.environ | {"LC_ALL": locale, "LOCPATH": str(shared)}


def test_arguments_go_out_as_they_came_in(
    environment: Environment, echo: str, send: Send, tmp_path: Path
) -> None:
    (tmp_path / os.fsdecode(TYPED)).write_bytes(b"content")
    files = ["--file", TYPED]
    done = send("--connect", echo, *files, TYPED, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, TYPED + b"\ncontent\n")


@pytest.mark.parametrize(
    ("option", "value", "in_variable"),
    [
        ("--reply", TYPED, False),
        ("--exec", b"printf '%s' '" + TYPED + b"'", True),
        ("--filter", b"while read -r _; do printf '%s\\n' '" + TYPED + b"'; done", False),
    ],
    ids=["reply", "exec in a variable", "filter"],
)
def test_replies_and_commands_have_the_bytes_that_were_typed(
    environment: Environment,
    context: Context,
    start: Start,
    option: str,
    value: bytes,
    in_variable: bool,
) -> None:
    given: dict[bytes, bytes] = {
        os.fsencode(key): item.encode() for key, item in environment.items()
    }
    arguments: list[str | bytes] = [option, value]
    if in_variable:
        given[f"ZMQMSG_SERVE_{option[2:].upper()}".encode()] = value
        arguments = []
    server = start("serve", "--bind", "tcp://127.0.0.1:*", *arguments, env=given)
    endpoint = server.wait_for_notice("listening on (.*)")[1]
    assert ask(context, endpoint, b"x") == [TYPED]
    assert stop(server)[0] == 0


def test_the_path_of_a_socket_has_the_bytes_that_were_typed(
    environment: Environment, start: Start, send: Send, tmp_path: Path
) -> None:
    name = b"\xa4\xa2" if "EUC" in environment["LC_ALL"] else "日".encode()
    if "8859" in environment["LC_ALL"]:
        name = b"\xe9"
    options = {"env": environment, "cwd": tmp_path}
    server = start("serve", "--count", "1", "--bind", b"ipc://" + name, **options)
    server.wait_for_notice("listening on ")
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert send("--connect", b"ipc://" + name, "x", **options).stdout == b"x\n"
    assert server.finish()[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [b"send", b"x", b"--file", TYPED],
        [b"send", b"x", b"--connect", TYPED],
        [b"serve", b"--" + TYPED],
        [TYPED],
    ],
    ids=lambda words: b" ".join(words[:2]).decode(errors="replace"),
)
def test_wrong_usage_is_one_line_whatever_the_bytes(
    environment: Environment, arguments: list[bytes]
) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"zmqmsg: ")
    assert done.stderr.count(b"\n") == 1


def test_a_message_without_a_reply_is_quoted_in_one_line(
    environment: Environment, send: Send
) -> None:
    done = send("--connect", free_endpoint(), "--timeout", "0.5", TYPED, env=environment)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
