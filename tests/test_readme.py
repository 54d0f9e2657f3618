"""The README's commands, typed as they stand there."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import LIMIT, Process

README = Path(__file__).parent.parent / "README.md"
RUNNABLE = re.findall(r"^```sh run\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("commands", RUNNABLE)
def test_the_commands_that_are_marked_as_runnable_run(
    start: Callable[..., Process], tmp_path: Path, commands: str
) -> None:
    server = start("serve", "--quiet", "--bind", f"ipc://{tmp_path}/a.sock")
    server.wait_for_notice("listening")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ZMQMSG_SEND_CONNECT": f"ipc://{tmp_path}/a.sock",
    }
    (tmp_path / "empty").mkdir()
    shell = ["bash", "-e", "-u", "-o", "pipefail", "-c", commands]
    if "jq " in commands:
        subprocess.run(["sh", "-c", "command -v jq"], capture_output=True).returncode and pytest.skip("there is no jq")
    done = subprocess.run(
        shell, cwd=tmp_path / "empty", env=os.environ | environment, capture_output=True, timeout=LIMIT
    )
    assert done.returncode == 0, done
    assert b"zmqmsg: " not in done.stderr, done.stderr
    assert done.stdout


def test_there_are_commands_that_run() -> None:
    assert len(RUNNABLE) >= 2
