"""The command line: wrong usage, help, and options from the environment."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth

from zmqmsg.cli import cli
from zmqmsg.sockets import Context

from conftest import COMMAND, LIMIT, LINUX, POSIX, Serve, address, ask, free_endpoint, refusal

NOT_OURS = "tcp://192.0.2.1:1"  # an address that no machine has, so that nothing can be bound


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
            ["'localhost:5555'", "write tcp://localhost:5555", "send --help"],
        ),
        ("serve -b ipc://", ["'ipc://'", "example"]),
        ("serve -n 0", ["'--count'", "0 is not", "x>=1"]),
        ("serve --max-size 12parsecs", ["'12parsecs'", "64M"]),
        ("send --max-size 511", ["'511'", "512 at least"]),
        ("send --max-size 9999999999G", ["'9999999999G'", "1024G at most"]),
        ("send --max-size 64MB", ["'64MB'", "64M"]),
        ("send --max-size 64.5M", ["'64.5M'", "64M"]),
        ("serve --key -", ["'--key'", "'-'"]),
        ("send -t 0", ["'--timeout'", "'0'", "above 0"]),
        ("send -t nan", ["'--timeout'", "'nan'"]),
        ("send -r -1", ["'--retries'", "-1 is not", "x>=0"]),
        ("send --multipart", ["--multipart needs at least one message"]),
        ("send --multi", ["'--multi'", "'--multipart'"]),
        ("sned", ["'sned'", "'send'"]),
        ("serve surplus", ["surplus"]),
        ("serve --reply a --exec b", ["--reply", "--exec"]),
        ("serve --exec=", ["--exec needs a command", "cat"]),
        ("serve --filter=", ["--filter needs a command", "cat"]),
        ("send --key k", ["--key needs --server-key", "send --help"]),
        ("serve --quoted --reply a\\q", ["--reply", "a\\q", "serve --help"]),
        ("send --raw -0", ["--null", "--raw"]),
        ("serve -Q --raw", ["--quoted", "--raw"]),
        ("--verbose send hi", ["'--verbose'", "zmqmsg --help"]),
    ],
)
def test_wrong_usage_names_the_value_and_the_way_out(arguments: str, words: list[str]) -> None:
    said = refusal(*arguments.split())
    assert not [word for word in words if word not in said], said


def test_a_refusal_is_all_that_is_printed() -> None:
    done = run("serve", "surplus")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == refusal("serve", "surplus")


def test_without_a_command_there_is_help_and_the_status_of_wrong_usage() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "zmqmsg serve" in done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["serve", "send", "completion"]),
        ("serve", ["tcp://127.0.0.1:5555", "--exec", "--client-keys", "Exit status"]),
        ("send", ["tcp://127.0.0.1:5555", "--retries", "--quoted", "Exit status"]),
    ],
)
def test_help_pages_fit_80_columns(command: str, words: list[str]) -> None:
    done = run(*command.split(), "-h", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["Usage:", "zmqmsg"]
    assert not [word for word in words if word not in done.stdout]
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 45


def test_the_script_for_completion_is_a_success() -> None:
    done = run(_ZMQMSG_COMPLETE="fish_source")
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete --no-files --command zmqmsg" in done.stdout


@LINUX
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"]])
def test_help_that_cannot_be_written_is_a_failure_in_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=LIMIT
        )
    assert (done.returncode, done.stderr) == (1, b"zmqmsg: No space left on device\n")


@POSIX
@pytest.mark.parametrize("arguments", ["--help", "--version", "send --help"])
def test_help_for_a_closed_output_is_no_success(arguments: str) -> None:
    script = f'exec "$@" {arguments} >&-'
    done = subprocess.run(["sh", "-c", script, "sh", *COMMAND], capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (1, b"zmqmsg: Bad file descriptor\n")


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
    libraries = f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
    assert re.fullmatch(rf"zmqmsg [0-9.]+, {libraries}\n", version)
    assert page == run("send", "--help").stdout


@POSIX
@pytest.mark.parametrize(
    "arguments",
    [
        "send -t 0.1 -c tcp://localhost:PORT x",
        "send -t 0.1 -c ipc:///none x",
        f"serve -b {NOT_OURS} --client-keys /none --key /dev/null",
    ],
    ids=["send to a name", "send to a path", "serve with keys"],
)
def test_too_few_descriptors_are_told_in_one_line(arguments: str) -> None:
    arguments = arguments.replace("PORT", str(address(free_endpoint())[1]))
    for limit in range(12, 34, 7):
        script = f'ulimit -n {limit}; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *COMMAND, *arguments.split()],
            capture_output=True,
            timeout=LIMIT,
        )
        assert done.returncode in (1, 2), limit
        assert done.stderr.startswith(b"zmqmsg: "), limit
        assert done.stderr.count(b"\n") == 1, limit


# Warnings of Python

DEVELOPMENT = [sys.executable, "-X", "dev", "-W", "error", *COMMAND[1:]]


def warnings_of(*arguments: str, **options: Any) -> list[str]:
    """Run zmqmsg to its end in Python's development mode; return what is no notice."""
    done = subprocess.run(
        [*DEVELOPMENT, *arguments],
        input="lines\n",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        **options,
    )
    return [line for line in done.stderr.splitlines() if not line.startswith("zmqmsg: ")]


@pytest.mark.parametrize(
    "arguments",
    [
        "--version",
        "serve --help",
        "serve --reply a --exec b",
        f"serve --bind {NOT_OURS} --filter cat",
        f"serve --bind {NOT_OURS} --key NEW",
        f"serve --bind {NOT_OURS} --key SECRET --client-keys DIRECTORY",
        "send --key SECRET --server-key SECRET x",
        "serve --bind ipc:///missing/socket",
        "send --connect ECHO",
        "send --connect ECHO --verbose x y",
        "send --connect ECHO --multipart --file - x",
        "send --connect ECHO --quoted x\\q",
        "send --connect ECHO --key SECRET --server-key PUBLIC --timeout 1 x",
        "send --connect FREE --timeout 0.6 x",
        "send --connect tcp://a..b:1 --timeout 0.6 x",
    ],
)
@POSIX
def test_python_has_nothing_to_warn_of(arguments: str, echo: str, tmp_path: Path) -> None:
    zmq.auth.create_certificates(tmp_path, "KEY")
    words = {
        "ECHO": echo,
        "FREE": free_endpoint(),
        "SECRET": "KEY.key_secret",
        "PUBLIC": "KEY.key",
        "DIRECTORY": ".",
    }
    assert warnings_of(*(words.get(word, word) for word in arguments.split()), cwd=tmp_path) == []


@POSIX
@pytest.mark.parametrize(
    ("options", "end"),
    [
        ([], "count"),
        ([], "signal"),
        (["--verbose", "--quoted"], "signal"),
        (["--exec", "cat; exit 3"], "count"),
        (["--exec", "cat; exit 3"], "signal"),
        (["--filter", "cat"], "count"),
        (["--filter", "cat"], "signal"),
        (["--filter", "read -r line; echo $line"], "signal"),
        (["--filter", "cat; sleep 600"], "two signals"),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given) or "echo",
)
def test_python_has_nothing_to_warn_of_a_server(
    options: list[str], end: str, context: Context
) -> None:
    count = ["--count", "1"] if end == "count" else []
    with subprocess.Popen(
        [*DEVELOPMENT, "serve", "--bind", "tcp://127.0.0.1:*", *options, *count],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr
        endpoint = server.stderr.readline().split()[-1]
        assert ask(context, endpoint, b"x") == [b"x"]
        if end != "count":
            server.terminate()
        lines = []
        for line in server.stderr:
            lines.append(line)
            if end == "two signals" and "stopping" in line:
                server.terminate()
        assert [line for line in lines if not line.startswith("zmqmsg: ")] == []


# The environment

OPTIONS = [
    (command.name, option.opts[-1])
    for command in cli.commands.values()
    for option in command.params
    if option.param_type_name == "option"
]
FLAGS = ["--verbose", "--null", "--quoted", "--raw", "--quiet", "--multipart"]
EMPTY_IS_A_VALUE = ["--reply"]


def variable(command: str, option: str) -> str:
    return f"ZMQMSG_{command}_{option.removeprefix('--')}".replace("-", "_").upper()


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_can_come_from_a_variable_and_a_wrong_one_is_named(
    command: str, option: str
) -> None:
    """A value is wrong for the option, or contradicts another one."""
    other = {"--reply": ["--exec", "cat"], "--exec": ["--reply", "x"], "--filter": ["--reply", "x"]}
    name = variable(command, option)
    environment = {"ZMQMSG_SERVE_BIND": NOT_OURS} | {name: "/dev/null/wrong"}
    assert f"(from {name})" in refusal(command, *other.get(option, []), **environment)


def test_the_environment_separates_endpoints_by_spaces_and_files_by_colons(
    echo: str, tmp_path: Path
) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_text(path.name)
    files = os.pathsep.join(map(str, paths))
    endpoints = f"{free_endpoint()} {echo}"
    done = run("send", ZMQMSG_SEND_CONNECT=endpoints, ZMQMSG_SEND_FILE=files)
    assert done.stdout == "one\ntwo\n"


@pytest.mark.parametrize("value", ["", "  "], ids=["empty", "blank"])
@pytest.mark.parametrize(
    ("command", "option"), [pair for pair in OPTIONS if pair[1] not in FLAGS + EMPTY_IS_A_VALUE]
)
def test_a_variable_without_a_value_is_the_option_without_one(
    command: str, option: str, value: str
) -> None:
    """A secret that renders empty must not turn authentication off."""
    given = {"ZMQMSG_SERVE_BIND": NOT_OURS}
    assert refusal(command, f"{option}=", **given)
    assert refusal(command, **given | {variable(command, option): value})


CONTRADICTIONS = [
    ("serve --filter cat", {"EXEC": "cat"}, ["EXEC"]),
    ("serve", {"EXEC": "cat", "FILTER": "cat"}, ["EXEC", "FILTER"]),
    ("serve", {"CLIENT_KEYS": "."}, ["CLIENT_KEYS"]),
    ("serve", {"SERVER_KEY": "key"}, ["SERVER_KEY"]),
    ("serve --quoted", {"REPLY": "\\q"}, ["REPLY"]),
    ("send --raw x", {"NULL": "1"}, ["NULL"]),
    ("send", {"MULTIPART": "1"}, ["MULTIPART"]),
    ("send x", {"KEY": "key"}, ["KEY"]),
    ("send x", {"CONNECT": "tcp://127.0.0.1:1 localhost:2"}, ["CONNECT"]),
    ("send x", {"FILE": os.pathsep.join([os.devnull, "missing"])}, ["FILE"]),
]


@pytest.mark.parametrize(("arguments", "variables", "named"), CONTRADICTIONS)
def test_a_variable_is_named_where_it_causes_an_error(
    arguments: str, variables: dict[str, str], named: list[str]
) -> None:
    command, *options = arguments.split()
    prefix = f"ZMQMSG_{command.upper()}_"
    given = {prefix + name: value for name, value in variables.items()}
    said = refusal(command, *options, **given)
    assert said.endswith(f"; see 'zmqmsg {command} --help'\n")
    assert re.findall(r"\(from (\w+)\)", said) == [prefix + name for name in named]


def test_a_variable_is_not_named_where_an_option_causes_the_error() -> None:
    variables = {"ZMQMSG_SEND_TIMEOUT": "5", "ZMQMSG_SEND_QUOTED": "1"}
    assert "ZMQMSG" not in refusal("send", "--timeout", "5s", "x", **variables)


def test_a_large_size_is_accepted_without_a_unit() -> None:
    assert "--count" in refusal("serve", "--max-size", "20000000000", "--count", "0")


@pytest.mark.parametrize("value", ["", "  "], ids=["empty", "blank"])
def test_a_flag_may_be_empty_and_so_may_a_reply(serve: Serve, value: str) -> None:
    variables = {variable(command, flag): value for command in ("send", "serve") for flag in FLAGS}
    environment = os.environ | variables | {variable("serve", "--reply"): value}
    server, endpoint = serve("--count", "1", env=environment)
    done = run("send", "--connect", endpoint, "hello", **variables)
    assert (done.returncode, done.stdout) == (0, "\n")
    assert server.finish()[1] == b"hello\n"


def test_a_surplus_argument_that_may_be_a_key_is_not_shown() -> None:
    key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
    said = refusal("serve", key)
    assert key not in said
    assert "may be a key" in said
