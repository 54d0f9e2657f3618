import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from zmqmsg.cli import cli

from conftest import COMMAND, Process

Send = Callable[..., subprocess.CompletedProcess[bytes]]


def run(*arguments: str, **options: Any) -> tuple[int, str]:
    """Run the command line in this process, and return its exit status and what it wrote to standard error."""
    result = CliRunner().invoke(cli, arguments, prog_name="zmqmsg", **options)
    assert not result.stdout
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["send", "-c", "localhost:5555"], ["'localhost:5555'", "tcp://127.0.0.1:5555", "zmqmsg send --help"]),
        (["send", "-c", "tcp://*:5555"], ["'tcp://*:5555'", "wildcard"]),
        (["send", "-c", "inproc://here"], ["'inproc://here'", "its own process"]),
        (["serve", "-b", "tcp://127.0.0.1:99999"], ["'tcp://127.0.0.1:99999'", "65535"]),
        (["serve", "-b", ""], ["''", "tcp://127.0.0.1:5555"]),
        (["serve", "-n", "0"], ["'-n'", "0"]),
        (["serve", "--max-size", "0"], ["'0'", "64M"]),
        (["serve", "--max-size", "12 parsecs"], ["'12 parsecs'", "64M"]),
        (["send", "--max-size", "-1"], ["'-1'", "64M"]),
        (["send", "--max-size", "63"], ["'63'", "64 or more"]),
        (["send", "-t", "0"], ["'0'", "seconds above 0"]),
        (["send", "-t", "-1"], ["'-1'", "seconds above 0"]),
        (["send", "-t", "nan"], ["'nan'", "seconds above 0"]),
        (["send", "-t", "inf"], ["'inf'", "seconds above 0"]),
        (["send", "-t", "soon"], ["'soon'", "seconds above 0"]),
        (["send", "-r", "-1"], ["-1", "--retries"]),
        (["send", "-f", "/nonexistent"], ["/nonexistent", "does not exist"]),
        (["send", "-f", "/"], ["'/'", "is a directory"]),
        (["send", "--multi"], ["--multi", "--multipart", "begins with - goes after --"]),
        (["send", "-1"], ["-1", "begins with - goes after --"]),
        (["serve", "--conut", "1"], ["--conut", "--count"]),
        (["sned"], ["sned", "send"]),
        (["serve", "surplus"], ["surplus"]),
        (["serve", "--key", "k"], ["--client-keys"]),
        (["serve", "--client-keys", "k"], ["--key"]),
        (["serve", "--connect", "tcp://127.0.0.1:1", "--key", "k"], ["--server-key"]),
        (["serve", "--key", "k", "--client-keys", "c", "--server-key", "s"], ["--server-key"]),
        (["send", "--key", "k", "x"], ["--server-key"]),
        (["send", "--server-key", "k", "x"], ["--key"]),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_value_and_the_way_out(arguments: list[str], words: list[str]) -> None:
    status, error = run(*arguments)
    assert status == 2
    assert error.startswith("zmqmsg: ")
    assert error.count("\n") == 1
    assert not [word for word in words if word not in error], error


def test_no_frames_at_all_are_wrong_usage() -> None:
    status, error = run("send", "--multipart", input="")
    assert status == 2
    assert error.startswith("zmqmsg: --multipart needs at least one message")


def test_every_option_can_come_from_the_environment() -> None:
    for command in cli.commands.values():
        for option in command.params:
            if option.param_type_name == "option":
                name = f"ZMQMSG_{command.name}_{option.name}".upper()
                assert option.opts[-1] == f"--{option.name}".replace("_", "-")
                wrong = {name: "/dev/null/wrong"}
                assert run(str(command.name), env={"ZMQMSG_SEND_TIMEOUT": "0.01"} | wrong, input="x\n")[0] == 2, name


def test_the_versions_are_those_of_the_tool_and_its_libraries() -> None:
    printed = CliRunner().invoke(cli, ["--version"]).stdout
    import zmq

    assert printed.startswith("zmqmsg 1.")
    assert f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}" in printed


def test_a_version_in_the_environment_is_not_taken_for_the_option() -> None:
    assert run("send", "--multipart", input="", env={"ZMQMSG_VERSION": "1"})[0] == 2


def test_without_a_command_there_is_help_and_the_status_of_wrong_usage() -> None:
    status, error = run()
    assert status == 2
    assert "zmqmsg serve" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [[*COMMAND], [str(Path(sys.executable).parent / "zmqmsg")]])
def test_the_module_and_the_script_are_the_same(command: list[str]) -> None:
    done = subprocess.run([*command, "--help"], capture_output=True, check=True)
    assert b"Usage: zmqmsg [OPTIONS] COMMAND" in done.stdout


@pytest.mark.parametrize(("arguments", "needless"), [(["--help"], "zmq"), (["send", "--help"], "zmq")])
def test_help_loads_no_zeromq(arguments: list[str], needless: str) -> None:
    assert needless not in loaded_by(*arguments)


def test_a_command_loads_only_what_it_needs(serve: Callable[..., tuple[Process, str]]) -> None:
    _server, endpoint = serve()
    by_send = loaded_by("send", "--connect", endpoint, "hello")
    by_serve = loaded_by("serve", "--bind", "nonsense")
    assert "zmqmsg.request" in by_send
    for needless in ("asyncio", "zmq.auth", "zmqmsg.reply", "zmqmsg.curve", "importlib.metadata", "socket"):
        assert needless not in by_send, needless
    assert "asyncio" not in by_serve


def loaded_by(*arguments: str) -> set[str]:
    """Return the names of the modules that zmqmsg loads, run with ``arguments``."""
    report = (
        "import sys, os; exit = os._exit; before = set(sys.modules);"
        "os._exit = lambda status: (print(*sys.modules.keys() - before, sep='\\n'), exit(0))"
    )
    run = "import runpy; runpy.run_module('zmqmsg', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", f"{report}; {run}", *arguments], capture_output=True, text=True)
    return set(done.stdout.split())
