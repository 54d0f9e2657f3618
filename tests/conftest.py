"""What the tests share: a context, an echo in a thread, and zmqmsg as a real process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import pytest
import zmq

from zmqmsg.reply import Echo
from zmqmsg.sockets import Context, Socket, bound, open_socket

COMMAND = [sys.executable, "-m", "zmqmsg"]
LIMIT = 20
"""Seconds after which something that should have happened will not."""


def pytest_configure() -> None:
    # A shell has its background jobs ignore Ctrl-C, and all that they start would do so as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Process:
    """A zmqmsg that runs, with its standard error read line by line as it comes."""

    def __init__(self, *arguments: str | bytes, **options: Any) -> None:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.popen: subprocess.Popen[bytes] = subprocess.Popen([*COMMAND, *arguments], **streams | options)
        self.notices: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read_notices)
        if self.popen.stderr:
            self._reader.start()

    def _read_notices(self) -> None:
        assert self.popen.stderr
        for line in self.popen.stderr:
            with self._more:
                self.notices.append(line.decode().removesuffix("\n"))
                self._more.notify_all()
        with self._more:
            self.notices.append("(end)")
            self._more.notify_all()

    def wait_for_notice(self, pattern: str, limit: float = LIMIT) -> re.Match[str]:
        """Return the first match of ``pattern`` in standard error, now or later."""

        def find() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.notices)), None)

        with self._more:
            self._more.wait_for(lambda: find() or "(end)" in self.notices, limit)
            found = find()
        assert found, f"no {pattern!r} in {self.notices}"
        return found

    def send_line(self, line: bytes) -> None:
        """Write a line to standard input."""
        assert self.popen.stdin
        self.popen.stdin.write(line + b"\n")
        self.popen.stdin.flush()

    def read_line(self) -> bytes:
        """Return the next line of standard output, without its end."""
        assert self.popen.stdout
        return self.popen.stdout.readline().removesuffix(b"\n")

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        self.popen.send_signal(number)

    def wait(self, limit: float = LIMIT) -> int:
        """Return the exit status, once the process has ended and all its notices are read."""
        status = self.popen.wait(limit)
        if self.popen.stderr:
            self._reader.join(limit)
        return status

    def finish(self, limit: float = LIMIT) -> tuple[int, bytes, list[str]]:
        """Close standard input, and return exit status, standard output and the lines of standard error."""
        if self.popen.stdin:
            self.popen.stdin.close()
        output = self.popen.stdout.read() if self.popen.stdout else b""
        return self.wait(limit), output, self.notices[:-1]

    def close(self) -> None:
        """End the process, whatever it does."""
        self.popen.kill()
        self.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start zmqmsg with arguments; it is ended after the test."""
    with ExitStack() as stack:

        def start(*arguments: str | bytes, **options: Any) -> Process:
            process = Process(*arguments, **options)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture
def serve(start: Callable[..., Process]) -> Callable[..., tuple[Process, str]]:
    """Start ``zmqmsg serve`` with further arguments, on a free port unless they bind; return it and its endpoint."""

    def serve(*arguments: str | bytes, **options: Any) -> tuple[Process, str]:
        bind = [] if "--bind" in arguments else ["--bind", "tcp://127.0.0.1:*"]
        process = start("serve", *bind, *arguments, **options)
        return process, process.wait_for_notice("listening on (.*)")[1]

    return serve


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """Let one server, which prints nothing, run for all tests that want no more of it; return its endpoint."""
    server = Process("serve", "--quiet", "--bind", "tcp://127.0.0.1:*")
    yield server.wait_for_notice("listening on (.*)")[1]
    server.close()


@pytest.fixture
def send() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run ``zmqmsg send`` to its end with further arguments, and return how it ended."""

    def send(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
        given: dict[str, Any] = {"capture_output": True, "timeout": LIMIT, "stdin": subprocess.DEVNULL}
        if "input" in options:
            del given["stdin"]
        done: subprocess.CompletedProcess[bytes] = subprocess.run([*COMMAND, "send", *arguments], **given | options)
        return done

    return send


@pytest.fixture
def context() -> Iterator[Context]:
    """A context, with all its sockets closed after the test."""
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


def bind(socket: Socket, endpoint: str = "tcp://127.0.0.1:*") -> str:
    """Bind a plain socket of pyzmq as soon as ``endpoint`` is free, and return its real endpoint."""
    socket.linger = 0
    end = time.monotonic() + LIMIT
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:  # closing the one that was there before takes libzmq a moment
            assert time.monotonic() < end
        else:
            return cast(bytes, socket.last_endpoint).rstrip(b"\0").decode()


def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition`` where nothing tells of it."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def listening(talk: Callable[[socket.socket], object]) -> Iterator[str]:
    """Listen, let ``talk`` deal with one connection after the other and close it; the context gets the endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _address = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.settimeout(LIMIT)
                    talk(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(2 * LIMIT)
            assert not thread.is_alive()


def open_server(context: Context, socket_type: int, endpoint: str = "tcp://127.0.0.1:*") -> tuple[Socket, str]:
    """Bind a plain socket of pyzmq that does not wait for ever; return it and its real endpoint."""
    server = context.socket(socket_type)
    server.rcvtimeo = LIMIT * 1000
    return server, bind(server, endpoint)


@contextmanager
def echoing(context: Context, endpoint: str, count: int) -> Iterator[tuple[str, list[list[bytes]]]]:
    """Echo ``count`` requests in a thread; the context gets the real endpoint and the requests taken so far."""
    taken: list[list[bytes]] = []
    with open_socket(context, zmq.REP, linger=1000) as socket, bound(socket, endpoint) as real:
        echo = Echo(lambda frames: taken.append([bytes(frame) for frame in frames]), count)
        thread = threading.Thread(target=echo.run, args=(socket, []))
        thread.start()
        yield real, taken
        thread.join(LIMIT)
        assert not thread.is_alive(), f"{count} requests were expected, {echo.served} came"


def descriptors(pid: int) -> int:
    """Return how many file descriptors the process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
