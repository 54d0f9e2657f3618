"""The command line: wrong usage, help, options from the environment, and what is imported for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner

from zmqmsg.cli import cli

from conftest import COMMAND, LIMIT, LINUX, POSIX, Serve

PROFILE = {"PYTHONPROFILEIMPORTTIME": "1"}  # lets Python say on standard error what it imports


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run zmqmsg to its end, with further variables in its environment."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=os.environ | environment,
        input="",
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "send -c localhost:5555",
            ["'localhost:5555'", "tcp://127.0.0.1:5555", "zmqmsg send --help"],
        ),
        ("serve -b ipc://", ["'ipc://'", "example"]),
        ("serve -n 0", ["'--count'", "0 is not", "x>=1"]),
        ("serve --max-size 12parsecs", ["'12parsecs'", "64M"]),
        ("send --max-size 511", ["'511'", "512 at least"]),
        ("send --max-size 9999999999G", ["'9999999999G'", "1024G at most"]),
        ("serve --key -", ["'--key'", "'-'"]),
        ("send -t 0", ["'--timeout'", "'0'", "above 0"]),
        ("send -t nan", ["'--timeout'", "'nan'"]),
        ("send -r -1", ["'--retries'", "-1 is not", "x>=0"]),
        ("send --multipart", ["--multipart needs at least one message"]),
        ("send --multi", ["'--multi'", "'--multipart'"]),
        ("send -1", ["'-1'", "zmqmsg send --help"]),
        ("serve --conut 1", ["'--conut'", "'--count'"]),
        ("sned", ["'sned'", "'send'"]),
        ("serve surplus", ["surplus"]),
        ("serve --reply a --exec b", ["--reply and --exec"]),
        ("serve --exec=", ["--exec needs a command", "cat"]),
        ("serve --filter=", ["--filter needs a command", "cat"]),
        ("send --raw -0", ["--null and --raw"]),
        ("serve -Q --raw", ["--quoted and --raw"]),
        ("--verbose send hi", ["'--verbose'", "zmqmsg --help"]),
    ],
)
def test_wrong_usage_names_the_value_and_the_way_out(arguments: str, words: list[str]) -> None:
    done = run(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zmqmsg: ")
    assert done.stderr.count("\n") == 1
    assert not [word for word in words if word not in done.stderr], done.stderr


def test_without_a_command_there_is_help_and_the_status_of_wrong_usage() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "zmqmsg serve" in done.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "README completion"),
        (["serve"], "--exec --client-keys Exit 2"),
        (["send"], "--retries --quoted Exit 3"),
    ],
)
def test_help_pages_fit_80_columns(command: list[str], words: str, option: str) -> None:
    done = run(*command, option, COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["Usage: zmqmsg", *command, "[OPTIONS]"]))
    assert not [word for word in words.split() if word not in done.stdout]
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(done.stdout.splitlines()) <= 45 or command == ["send"]


@LINUX
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"]])
def test_help_that_cannot_be_written_is_a_failure_in_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=LIMIT
        )
    assert (done.returncode, done.stderr) == (1, b"zmqmsg: No space left on device\n")


@pytest.mark.parametrize(
    "command",
    [COMMAND, pytest.param([str(Path(sys.executable).parent / "zmqmsg")], marks=POSIX)],
    ids=["module", "script"],
)
def test_the_module_and_the_script_are_the_same(command: list[str]) -> None:
    version, page = (
        subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=LIMIT).stdout
        for arguments in (["--version"], ["send", "--help"])
    )
    assert re.fullmatch(
        rf"zmqmsg [0-9.]+, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}\n", version
    )
    assert page == run("send", "--help").stdout


@POSIX
@pytest.mark.parametrize(
    "arguments", ["send -t 0.1 -c tcp://localhost:1 x", "send -t 0.1 -c ipc:///none x", "serve"]
)
def test_too_few_descriptors_are_told_in_one_line(arguments: str) -> None:
    server = ["--bind", "tcp://127.0.0.1:*", "--client-keys", "/none", "--key", "/dev/null"] * (
        "serve" in arguments
    )
    for limit in range(12, 34, 3):
        given = [
            "sh",
            "-c",
            f'ulimit -n {limit}; exec "$@"',
            "sh",
            *COMMAND,
            *arguments.split(),
            *server,
        ]
        done = subprocess.run(given, capture_output=True, timeout=LIMIT)
        assert done.returncode in (1, 2), limit
        assert done.stderr.startswith(b"zmqmsg: "), limit
        assert done.stderr.count(b"\n") == 1, limit


# The environment

OPTIONS = [
    (command.name, option.opts[-1])
    for command in cli.commands.values()
    for option in command.params
    if option.param_type_name == "option"
]


def variable(command: str, option: str) -> str:
    return f"ZMQMSG_{command}_{option.removeprefix('--')}".replace("-", "_").upper()


def invoke(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run zmqmsg in this process, and return its exit status and standard error. Nothing can be bound."""
    given = {"ZMQMSG_SERVE_BIND": "tcp://192.0.2.1:1"} | environment
    result = CliRunner().invoke(cli, arguments, env=given, prog_name="zmqmsg")
    return result.exit_code, result.stderr


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_can_come_from_the_environment(command: str, option: str) -> None:
    """A value that is wrong for the option, or contradicts another one, is wrong usage."""
    other = {"--reply": ["--exec", "cat"]}.get(
        option, ["--reply", "x"] if option in ("--exec", "--filter") else []
    )
    assert invoke(command, *other, **{variable(command, option): "/dev/null/wrong"})[0] == 2


def test_the_environment_separates_endpoints_by_spaces_and_files_by_colons(
    echo: str, tmp_path: Path
) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_text(path.name)
    files = os.pathsep.join(map(str, paths))
    done = run("send", ZMQMSG_SEND_CONNECT=f"tcp://127.0.0.1:1 {echo}", ZMQMSG_SEND_FILE=files)
    assert done.stdout == "one\ntwo\n"


FLAGS = ["--verbose", "--null", "--quoted", "--raw", "--quiet", "--multipart"]
EMPTY_IS_A_VALUE = ["--reply"]


@pytest.mark.parametrize("value", ["", "  "], ids=["empty", "blank"])
@pytest.mark.parametrize(
    ("command", "option"), [pair for pair in OPTIONS if pair[1] not in FLAGS + EMPTY_IS_A_VALUE]
)
def test_a_variable_without_a_value_is_the_option_without_one(
    command: str, option: str, value: str
) -> None:
    """A secret that renders empty must not turn authentication off, nor anything else be taken as not given."""
    given = invoke(command, f"{option}=")
    assert given[0] == 2
    assert invoke(command, **{variable(command, option): value}) == given


@pytest.mark.parametrize("value", ["", "  "], ids=["empty", "blank"])
def test_a_flag_may_be_empty_and_so_may_a_reply(serve: Serve, value: str) -> None:
    variables = {variable(command, flag): value for command in ("send", "serve") for flag in FLAGS}
    server, endpoint = serve(
        "--count", "1", env=os.environ | variables | {variable("serve", "--reply"): value}
    )
    done = run("send", "--connect", endpoint, "hello", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    assert server.finish()[1] == b"hello\n"


# Imports


def imported(errors: list[str]) -> set[str]:
    """Return the names of the modules that PROFILE tells of."""
    return {line.rpartition("|")[2].strip() for line in errors if line.startswith("import time:")}


@pytest.mark.parametrize(
    ("arguments", "completion"),
    [
        (["--help"], {}),
        (["send", "--help"], {}),
        (
            [],
            {
                "_ZMQMSG_COMPLETE": "bash_complete",
                "COMP_WORDS": "zmqmsg send --ver",
                "COMP_CWORD": "2",
            },
        ),
    ],
    ids=["help", "help of a command", "completion"],
)
def test_help_and_completion_import_no_zeromq(
    arguments: list[str], completion: dict[str, str]
) -> None:
    done = run(*arguments, **completion, **PROFILE)
    assert "ver" in done.stdout
    modules = imported(done.stderr.splitlines())
    assert "click" in modules
    assert "zmq" not in modules


@pytest.mark.parametrize("curve", [False, True], ids=["plain", "CURVE"])
def test_neither_send_nor_serve_imports_asyncio(serve: Serve, tmp_path: Path, curve: bool) -> None:
    key = tmp_path / "server.key"
    own, others = (["--key", f"{key}_secret"], ["--server-key", str(key)]) if curve else ([], [])
    server, endpoint = serve("--count", "1", *own, env=os.environ | PROFILE)
    done = run("send", "--connect", endpoint, *others, "hello", **PROFILE)
    assert done.stdout == "hello\n"
    for errors in (done.stderr.splitlines(), server.finish()[2]):
        modules = imported(errors)
        assert "zmq" in modules
        assert "asyncio" not in modules
