"""The README's blocks, typed from top to bottom as they stand there; their output is compared where they show it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from conftest import LIMIT, POSIX, address, free_endpoint, until

pytestmark = POSIX

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##? (.*?)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))
STRICT = "-e -u -o pipefail"
BLOCK = re.compile(r"^```(\S+ \S+|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Shells:
    """Some terminals: one for what is run and ends, and others for what runs on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Any ports, as others may use the README's.
        self._ports = [
            (port, str(address(free_endpoint())[1])) for port in ("5555", "5556", "6000")
        ]
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ZMQMSG_SEND_CONNECT": f"tcp://127.0.0.1:{self._ports[0][1]}",
            "ZMQMSG_SERVE_BIND": f"tcp://127.0.0.1:{self._ports[0][1]}",
        }
        self._background: list[tuple[subprocess.Popen[bytes], IO[bytes], str]] = []

    def replace_ports(self, text: str) -> str:
        for port, other in self._ports:
            text = text.replace(port, other)
        return text

    def run(self, commands: str, options: str = "") -> str:
        """Run ``commands`` to their end in a bash with ``options``, and return what they show."""
        shell = ["bash", *options.split(), "-c", f"exec 2>&1; {commands}"]
        done = subprocess.run(
            shell,
            cwd=self._directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            timeout=LIMIT,
            check=False,
        )
        assert not options or done.returncode == 0, f"{commands}: {done.stdout!r}"
        return done.stdout.decode(errors="backslashreplace")

    def start(self, command: str, expected: str, ready: bytes | None) -> None:
        """Run ``command`` in a terminal of its own, wait until it says that it is ``ready``, and go on."""
        environment = self._environment.copy()
        if "--connect" in command:
            del environment["ZMQMSG_SERVE_BIND"]
        output = (self._directory / f".output-{len(self._background)}").open("w+b")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self._directory,
            env=environment,
            stdout=output,
            stderr=output,
        )
        self._background.append((process, output, expected))
        path = Path(output.name)
        until(lambda: ready is None or ready in path.read_bytes(), path.read_bytes)

    def stop(self) -> None:
        """Press Ctrl-C in all those terminals, and compare what they show."""
        for process, output, expected in self._background:
            process.send_signal(signal.SIGINT)
            process.wait(LIMIT)
            output.close()
            assert_shows(Path(output.name).read_text(), expected)
        self._background.clear()

    def close(self) -> None:
        for process, output, _ in self._background:
            process.kill()
            process.wait()
            output.close()


def assert_shows(output: str, expected: str) -> None:
    """Check that a terminal shows what is ``expected``, where ... stands for anything, and a time for any one."""
    shown = re.sub(r"zmqmsg: \d+ requests? served\n$", "", output)
    pattern = re.escape(expected).replace(r"\.\.\.", ".*")
    pattern = re.sub(r"[0-9]+\\\.[0-9]\\ s\\\)", r"[0-9.]+ s\)", pattern)
    assert not expected or re.fullmatch(pattern, shown), f"{shown!r} is not {expected!r}"


@pytest.fixture
def shells(tmp_path: Path) -> Iterator[Shells]:
    shells = Shells(tmp_path)
    yield shells
    shells.close()


@pytest.mark.parametrize(
    "section", [title for title, text in SECTIONS.items() if BLOCK.search(text)]
)
def test_what_the_readme_shows_is_what_happens(
    shells: Shells, tmp_path: Path, section: str
) -> None:
    has_server = False
    for kind, text in BLOCK.findall(shells.replace_ports(SECTIONS[section])):
        command, _, expected = text.removeprefix("$ ").partition("\n")
        match kind.split():
            case ["python", file]:
                (tmp_path / file).write_text(text)
            case ["console"]:
                for command, expected in re.findall(
                    r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE
                ):
                    assert_shows(shells.run(command), expected)
            case ["console", "server"]:
                shells.stop()
                shells.start(
                    command, expected, None if command.startswith("python3") else b"listening on"
                )
                has_server = True
            case ["sh", "run"]:
                if not has_server:
                    shells.start("zmqmsg serve --quiet", "", b"listening on")
                    has_server = True
                assert shells.run(
                    text if shutil.which("jq") else re.sub(".*jq.*\n", "", text), STRICT
                )
            case ["sh", "servers"]:
                (tmp_path / "command").write_text("#!/bin/sh\nexec cat\n")
                (tmp_path / "command").chmod(0o755)
                for line in filter(usable, text.splitlines()):
                    shells.stop()
                    if "send" in line:  # a tap
                        shells.start(
                            shells.replace_ports("zmqmsg serve --bind tcp://127.0.0.1:6000"),
                            "",
                            b"listening",
                        )
                    shells.start(line, "", b"listening on")
                    reply = shells.run("""zmqmsg send --timeout 5 --retries 0 '{"id": 1}'""")
                    assert ("no reply" in reply) is ("kill" in line), (line, reply)
                    assert reply
            case ["sh", "broker"]:
                shells.start(text, "", None)
            case ["sh", "worker"]:
                for _ in range(3):
                    shells.start(text, "", b"connected to")
            case ["sh", "clients"]:
                assert shells.run(text, STRICT) == "".join(
                    f"JOB {number}\n" for number in range(1, 101)
                )
    shells.stop()


def usable(line: str) -> bool:
    """Return whether ``line`` is a command that can run here."""
    return line.startswith("zmqmsg") and ("jq" not in line or shutil.which("jq") is not None)


def test_most_sections_have_something_to_run() -> None:
    assert sum(bool(BLOCK.search(text)) for text in SECTIONS.values()) >= 6
