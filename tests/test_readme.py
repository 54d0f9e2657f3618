"""The README's blocks, typed from top to bottom as they stand there; only the ports differ.

What follows the language of a block says how it is typed:

    python NAME            saved as NAME
    python server NAME     saved, and also run in a terminal of its own, in place of other servers
    console server         a command in a terminal of its own, in place of other servers
    console worker         the same in three terminals, beside the servers before it
    console early          a client that is there before its server
    console                commands that end; what they show is compared
    console cmd ...        the same for cmd, on Windows
    sh run                 a script that must succeed; zmqmsg serve --quiet runs, if nothing else
    sh watch               a script that goes on until Ctrl-C
    sh servers             servers, each below a comment; REPLIES has what each of them replies

Other blocks are not run: they install something, or belong to what may not be here.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import LIMIT, POSIX, address, free_endpoint, until, waits

pytestmark = pytest.mark.timeout(300)  # a section has many processes

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PORTS = ("5555", "5556", "6000")
TOOLS = ("jq", "timeout", "ts")  # not installed everywhere; lines that need them are left out then
LAUNCHER = ".venv/lib/*/site-packages/pip/_vendor/distlib/t64.exe"

REPLIES = {
    "shout": ("hello", "HELLO"),
    "tell the client that the command has failed": ("not JSON", r"error \d\\n"),
    "give a command five seconds": ("hello", "hello"),
    "say who asks": ("hello", r"hello, 127\.0\.0\.1.*\\n"),
    "a mock that looks at the request": ("ping", "pong"),
    "the same for JSON": ('{"id": 1}', '{"id":1,"ok":true}'),
    "a reply of two frames": ("hello", r"status\t\\x00\\xff"),
    "a service that is sometimes slow": ("hello", "hello"),
    "a service that crashes": ("hello", "nothing"),
    "each request with its time": ("hello", "hello"),
    "record requests": (r"\x00\xff", r"\\x00\\xff"),
    "a tap in front of the service": ("hello", "HELLO"),
    "replied.log as a mock": ("anything", "HELLO"),
}
"""How the comment begins; a request as a quoted line; its reply, too, as a regular expression."""

PASSING = re.compile(
    r"^zmqmsg: (waiting for .*|connected to .*|\d+ requests? served)\n", re.MULTILINE
)
"""What a busy machine may show, and what a server shows at its end."""


class Block(NamedTuple):
    kind: str
    text: str

    @property
    def is_run_here(self) -> bool:
        if self.kind.startswith("console cmd"):
            return sys.platform == "win32"
        kinds = ("console", "sh run", "sh watch", "sh servers", "python server")
        return self.kind.startswith(kinds) and sys.platform != "win32"


def read_sections() -> dict[str, list[Block]]:
    """Return the blocks below each heading of the README."""
    _, *parts = re.split(r"^##+ (.*)\n", README, flags=re.MULTILINE)
    block = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {
        title: [Block(*match) for match in block.findall(text)]
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


SECTIONS = read_sections()
PROGRAMS = {
    block.kind.split()[-1]: block.text
    for blocks in SECTIONS.values()
    for block in blocks
    if block.kind.startswith("python")
}


class Terminals:
    """A terminal for commands that end, and others for servers, all in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports = {port: str(address(free_endpoint())[1]) for port in PORTS}
        self._servers: list[tuple[subprocess.Popen[bytes], Path, str]] = []
        for name, text in PROGRAMS.items():
            (directory / name).write_text(self.with_our_ports(text), encoding="utf-8")
        default = self.with_our_ports("tcp://127.0.0.1:5555")
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("ZMQMSG_")
        } | {"ZMQMSG_SEND_CONNECT": default, "ZMQMSG_SERVE_BIND": default}

    def with_our_ports(self, text: str) -> str:
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: self._ports[match[1]], text)

    def _shell(self, script: str, options: str) -> list[str]:
        """Return the command that runs ``script``."""
        script = self.with_our_ports(script)
        if sys.platform == "win32":
            batch = self._directory / "typed.bat"
            batch.write_text(f"@echo off\n{script}", encoding="oem")
            return ["cmd", "/d", "/c", str(batch)]
        return ["bash", *options.split(), "-c", script]

    def run(self, script: str, options: str = "") -> tuple[int, str]:
        """Run ``script`` to its end; return its exit status, and what it shows."""
        path = self._directory / ".shown"
        with path.open("wb") as shown:
            process = subprocess.Popen(
                self._shell(script, options),
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=shown,
                stderr=shown,
            )
        try:
            status = process.wait(2 * LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"{script} goes on, and has shown: {path.read_bytes()!r}")
        return status, path.read_text(encoding="utf-8", errors="backslashreplace")

    def start(self, command: str, ready: str, expected: str = "") -> Path:
        """Run ``command`` in a terminal of its own, and wait until ``ready`` is shown there.

        ``expected``: what it shows until it is stopped; nothing in particular if that is empty.
        Returns the file with what it shows.
        """
        command = self.with_our_ports(command.strip())
        environment = self._environment.copy()
        if "--connect" in command:
            del environment["ZMQMSG_SERVE_BIND"]
        path = self._directory / f".shown-{len(list(self._directory.glob('.shown-*')))}"
        with path.open("wb") as shown:
            process = subprocess.Popen(
                # Without cmd, which would not pass on that it is killed.
                command if sys.platform == "win32" else self._shell(command, ""),
                cwd=self._directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=shown,
                stderr=shown,
                start_new_session=True,
            )
        self._servers.append((process, path, self.with_our_ports(expected)))
        until(lambda: ready.encode() in path.read_bytes(), path.read_bytes)
        return path

    def stop(self) -> None:
        """Press Ctrl-C in the terminals of the servers, and compare what was shown there."""
        for process, path, expected in self._servers:
            interrupt(process)
            process.wait(LIMIT)
            if expected:
                assert_shows(path.read_text(encoding="utf-8"), expected)
        self.close()

    def serve_if_none(self) -> None:
        if not self._servers:
            self.start("zmqmsg serve --quiet", "listening on")

    def close(self) -> None:
        for process, _path, _expected in self._servers:
            assert process.stdin
            process.stdin.close()
            if process.poll() is None:
                kill(process)
                process.wait(LIMIT)
        self._servers.clear()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Do what Ctrl-C in its terminal does: all that was typed there gets the signal."""
    if sys.platform == "win32":
        kill(process)
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)


def kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def assert_shows(shown: str, expected: str) -> None:
    """Check what is shown against what is ``expected``: there, ... is anything, and times vary."""
    shown, expected = (PASSING.sub("", text) for text in (shown, expected))
    pattern = re.escape(expected).replace(r"\.\.\.", ".*")
    pattern = re.sub(r"[0-9]+\\\.[0-9]\\ s\\\)", r"[0-9.]+ s\)", pattern)
    assert re.fullmatch(pattern, shown), f"{shown!r} is not {expected!r}"


def commands_and_output(text: str) -> tuple[str, str]:
    """Return the commands in a session, which stand behind ``$`` or ``>``, and what it shows."""
    lines = text.splitlines(keepends=True)
    commands = [line[2:] for line in lines if line.startswith(("$ ", "> "))]
    return "".join(commands), "".join(line for line in lines if line[:2] not in ("$ ", "> "))


def lacks_a_tool(text: str) -> bool:
    return any(re.search(rf"\b{tool}\b", text) and not shutil.which(tool) for tool in TOOLS)


@pytest.fixture
def terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminals]:
    here = [str(tmp_path), str(Path(sys.executable).parent)]
    monkeypatch.setenv("PATH", os.pathsep.join([*here, os.environ["PATH"]]))
    if sys.platform == "win32" and not shutil.which("zmqmsg"):
        install_launchers(tmp_path)
    terminals = Terminals(tmp_path)
    yield terminals
    terminals.close()


def install_launchers(directory: Path) -> None:
    """Make zmqmsg.exe, as pip does where it installs zmqmsg, and py for this Python."""
    launcher = next(PROJECT.glob(LAUNCHER), None)
    if not launcher:
        pytest.skip("pip has no launcher for Windows here")
    archive = directory / "zmqmsg.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__main__.py", "from zmqmsg.__main__ import main\nmain()\n")
    (directory / "zmqmsg.exe").write_bytes(
        launcher.read_bytes() + f'#!"{sys.executable}"\r\n'.encode() + archive.read_bytes()
    )
    (directory / "py.bat").write_text(f'@"{sys.executable}" %*\n')


@waits
@pytest.mark.parametrize(
    "section", [title for title, blocks in SECTIONS.items() if any(b.is_run_here for b in blocks)]
)
def test_what_the_readme_shows_is_what_happens(terminals: Terminals, section: str) -> None:
    for block in SECTIONS[section]:
        if block.is_run_here:
            type_block(terminals, block)
    terminals.stop()


def type_block(terminals: Terminals, block: Block) -> None:
    match block.kind.split():
        case ["python", "server", name]:
            terminals.stop()
            terminals.start(f"exec python3 {name}", ready="")
        case ["console", *_, "server"]:
            command, output = commands_and_output(block.text)
            terminals.stop()
            terminals.start(command, "listening on", output)
        case ["console", "worker"]:
            command, output = commands_and_output(block.text)
            for _ in range(3):
                terminals.start(command, "connected to", output)
        case ["console", "early"]:
            command, output = commands_and_output(block.text)
            terminals.stop()
            client = terminals.start(command, "connection refused", output)
            terminals.start("zmqmsg serve --quiet", "listening on")
            until(lambda: "hello" in client.read_text(), client.read_text)
        case ["console", *_]:
            commands, output = commands_and_output(block.text)
            _, shown = terminals.run(commands if "cmd" in block.kind else f"exec 2>&1\n{commands}")
            assert_shows(shown, terminals.with_our_ports(output))
        case ["sh", "run"]:
            terminals.serve_if_none()
            lines = [line for line in block.text.splitlines() if not lacks_a_tool(line)]
            status, shown = terminals.run("\n".join(lines), "-e -u -o pipefail")
            assert status == 0, shown
        case ["sh", "watch"] if not lacks_a_tool(block.text):
            terminals.serve_if_none()
            terminals.start(block.text, ready="ping")
        case ["sh", "servers"]:
            ask_servers(terminals, block.text)


def ask_servers(terminals: Terminals, text: str) -> None:
    """Start each server, and ask it. A service that shouts is at port 6000."""
    for comment, command in re.findall(r"^# (.*)\n(.*)", text, re.MULTILINE):
        [(request, reply)] = [REPLIES[start] for start in REPLIES if comment.startswith(start)]
        if lacks_a_tool(command):
            continue
        terminals.stop()
        terminals.run("printf '#!/bin/sh\nexec cat\n' > command; chmod +x command")
        if "6000" in command:
            shout = "zmqmsg serve -b tcp://127.0.0.1:6000 --exec 'tr a-z A-Z'"
            terminals.start(shout, "listening on")
        terminals.start(command, "listening on")
        ask = f"zmqmsg send --quoted --timeout 10 --retries 0 '{request}'"
        _, shown = terminals.run(f"{ask} 2> /dev/null || echo nothing")
        assert re.fullmatch(reply, shown.removesuffix("\n")), (command, shown)
    terminals.stop()


@POSIX
def test_each_server_of_the_readme_is_asked() -> None:
    texts = [b.text for blocks in SECTIONS.values() for b in blocks if b.kind == "sh servers"]
    comments = re.findall(r"^# (.*)", "\n".join(texts), re.MULTILINE)
    assert len(comments) == len(REPLIES)
