"""What the tests share: a context, an echo in a thread, and zmqmsg as a real process."""

import compileall
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from ipaddress import IPv4Network
from pathlib import Path
from random import randrange
from typing import Any, cast
from zlib import crc32

import pytest
import zmq

import zmqmsg
import zmqmsg.__main__
from zmqmsg.answers import Answer
from zmqmsg.listener import bound
from zmqmsg.messages import Form
from zmqmsg.serve import Server
from zmqmsg.sockets import Context, Socket, open_socket
from zmqmsg.stopping import Guard

COMMAND = [sys.executable, "-m", "zmqmsg"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
WINDOWS = pytest.mark.skipif(sys.platform != "win32", reason="needs Windows")
POSIX = pytest.mark.skipif(
    sys.platform == "win32", reason="needs POSIX: its shell, signals, pipes or Unix sockets"
)


def has_ipv6() -> bool:
    """Return whether this machine has the IPv6 address of itself."""
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
soak = pytest.mark.soak
waits = pytest.mark.waits
LIMIT = 60  # seconds after which something that should have happened will not


# What a user may have set that changes what zmqmsg, Python or a shell does or says.
FOREIGN = ("LANG", "LC_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "ZMQMSG_", "_ZMQMSG_")
FOREIGN_TO_PYTHON = (
    "PYTHONIOENCODING",
    "PYTHONWARNINGS",
    "PYTHONDEVMODE",
    "PYTHONOPTIMIZE",
    "PYTHONDONTWRITEBYTECODE",
)


# Last, as pytest itself heeds some of the variables.
@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give all processes the same environment, whatever the user's is."""
    if not hasattr(config, "workerinput"):  # once, and not in each process that a test starts
        compileall.compile_dir(Path(zmqmsg.__file__).parent, quiet=2)
    # A shell lets its background jobs ignore Ctrl-C and Ctrl-\, and nohup hangups.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.umask(0o022)
    for name in list(os.environ):
        if name.startswith(FOREIGN) or name in FOREIGN_TO_PYTHON:
            del os.environ[name]
    sys.dont_write_bytecode = False  # or each process would compile all tests
    os.environ["LC_ALL"] = "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"
    os.environ["TERM"] = "xterm"
    os.environ.setdefault("HOME", tempfile.gettempdir())
    # A shell says 126, not 127, of an unknown command if it may not look into one of these.
    folders = [folder for folder in os.get_exec_path() if os.access(folder, os.X_OK)]
    os.environ["PATH"] = os.pathsep.join(folders)
    # The path of a socket has room for about a hundred bytes.
    if sys.platform != "win32" and len(tempfile.gettempdir()) > 30:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = "/tmp"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run at the same time, mix those that wait with those that compute.

    None that waits for long is among the last, or all others would have ended by then.
    """

    def place(item: pytest.Item) -> float:
        return crc32(item.nodeid.encode()) * (0.7 if "waits" in item.keywords else 1)

    if hasattr(config, "workerinput"):
        items.sort(key=place)


def refusal(*arguments: str | Path, **environment: str) -> str:
    """Return the line that zmqmsg, run in this process, says of wrong usage."""
    nothing, shown = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(shown):
        patch.setattr(sys, "stdin", nothing)
        for name, value in environment.items():
            patch.setenv(name, value)
        status = zmqmsg.__main__.run([str(argument) for argument in arguments])
    line = shown.buffer.getvalue().decode()
    assert status == 2, line
    assert line.startswith("zmqmsg: ")
    assert line.count("\n") == 1
    return line


Start = Callable[..., "Process"]
Serve = Callable[..., tuple["Process", str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]


def press_ctrl_c(popen: "subprocess.Popen[bytes]") -> None:
    """Start the thread in a process of Windows that Ctrl-C starts; there may be no console."""
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    pointer = ctypes.c_void_p
    kernel.GetModuleHandleW.restype = kernel.GetProcAddress.restype = (
        kernel.CreateRemoteThread.restype
    ) = pointer
    kernel.GetProcAddress.argtypes = [pointer, ctypes.c_char_p]
    kernel.CreateRemoteThread.argtypes = [
        pointer,
        pointer,
        ctypes.c_size_t,
        pointer,
        pointer,
        ctypes.c_uint,
        pointer,
    ]
    routine = kernel.GetProcAddress(kernel.GetModuleHandleW("kernelbase"), b"CtrlRoutine")
    process = int(popen._handle)  # type: ignore[attr-defined]
    kernel.CreateRemoteThread(process, None, 0, routine, 0, 0, None)


class Process:
    """A zmqmsg that runs, with its standard error read line by line as it comes."""

    def __init__(self, *arguments: str | bytes, **options: Any) -> None:
        streams: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        self.popen: subprocess.Popen[bytes] = subprocess.Popen(
            [*COMMAND, *arguments], **streams | options
        )
        self.notices: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read_notices)
        if self.popen.stderr:
            self._reader.start()

    def _read_notices(self) -> None:
        assert self.popen.stderr
        for line in self.popen.stderr:
            with self._more:
                self.notices.append(line.decode(errors="replace").removesuffix("\n"))
                self._more.notify_all()
        with self._more:
            self.notices.append("(end)")
            self._more.notify_all()

    @property
    def pid(self) -> int:
        return self.popen.pid

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

    @contextmanager
    def _killed_after(self, limit: float) -> Iterator[None]:
        """Kill the process if the context lasts ``limit`` seconds: its pipes then end."""
        end = threading.Timer(limit, self.popen.kill)
        end.start()
        try:
            yield
        finally:
            end.cancel()

    def read_line(self) -> bytes:
        """Return the next line of standard output, without its end; nothing at the end of all."""
        assert self.popen.stdout
        with self._killed_after(LIMIT):
            return self.popen.stdout.readline().removesuffix(b"\n")

    def signal(self, number: int) -> None:
        """Send the process a signal. On Windows, what asks it to stop is Ctrl-C."""
        if sys.platform == "win32" and number in (signal.SIGINT, signal.SIGTERM):
            press_ctrl_c(self.popen)
        else:
            self.popen.send_signal(number)

    def wait(self, limit: float = LIMIT) -> int:
        """Return the exit status when the process has ended and all its notices are read."""
        status = self.popen.wait(limit)
        if self.popen.stderr:
            self._reader.join(limit)
        return status

    def finish(self, limit: float = LIMIT) -> tuple[int, bytes, list[str]]:
        """Close standard input; return exit status, standard output and lines of standard error.

        A process that has not ended within ``limit`` seconds is killed.
        """
        if self.popen.stdin:
            self.popen.stdin.close()
        with self._killed_after(limit):
            output = self.popen.stdout.read() if self.popen.stdout else b""
            status = self.wait(limit)
        return status, output, self.notices[:-1]

    def close(self) -> None:
        """End the process, whatever it does."""
        self.popen.kill()
        self.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start zmqmsg with arguments; it is ended after the test."""
    with ExitStack() as stack:

        def start(*arguments: str | bytes, **options: Any) -> Process:
            process = Process(*arguments, **options)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture
def serve(start: Start) -> Serve:
    """Start ``zmqmsg serve`` with further arguments; return it and its endpoint.

    It binds a free port unless the arguments say otherwise.
    """

    def serve(*arguments: str | bytes, **options: Any) -> tuple[Process, str]:
        bind = [] if "--bind" in arguments else ["--bind", free_endpoint()]
        process = start("serve", *bind, *arguments, **options)
        return process, process.wait_for_notice("listening on (tcp:.*|ipc:.*|all IPv4 .*)")[1]

    return serve


@pytest.fixture(scope="session")
def echo() -> Iterator[str]:
    """Return the endpoint of a server that echoes for all tests which want no more of it."""
    server = Process("serve", "--quiet", "--bind", "tcp://127.0.0.1:*")
    yield server.wait_for_notice("listening on (tcp:.*|ipc:.*|all IPv4 .*)")[1]
    server.close()


@pytest.fixture
def send() -> Send:
    """Run ``zmqmsg send`` to its end with further arguments, and return how it ended."""

    def send(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
        given: dict[str, Any] = {
            "capture_output": True,
            "timeout": LIMIT,
            "stdin": subprocess.DEVNULL,
        }
        if "input" in options:
            del given["stdin"]
        try:
            done: subprocess.CompletedProcess[bytes] = subprocess.run(
                [*COMMAND, "send", *arguments], **given | options
            )
        except subprocess.TimeoutExpired as expired:
            pytest.fail(f"{expired}; it has said {expired.stdout!r} and {expired.stderr!r}")
        return done

    return send


@pytest.fixture
def context() -> Iterator[Context]:
    """A context, with all its sockets closed after the test."""
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


def bind(socket: Socket, endpoint: str = "") -> str:
    """Bind a plain socket of pyzmq to ``endpoint`` as soon as it is free; return the real one."""
    socket.linger = 0
    endpoint = endpoint or free_endpoint()
    end = time.monotonic() + LIMIT
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:  # libzmq closes the one that was there before in the background
            assert time.monotonic() < end
            time.sleep(0.005)
        else:
            return cast(bytes, socket.last_endpoint).rstrip(b"\0").decode()


def until(condition: Callable[[], object], explain: Callable[[], object] = str) -> None:
    """Wait for ``condition`` where nothing tells of it."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.01)


LOOPBACK = IPv4Network("127.0.0.0/8")
_holders: list[socket.socket] = []


def free_endpoint() -> str:
    """Return an endpoint where nobody listens, and which is the test's own until it ends.

    On Linux, a socket that is bound and does not listen keeps the port from whoever asks the system
    for any; sockets with SO_REUSEADDR, such as libzmq's, may still be bound to it. Windows has no
    such sockets: there, the address is one of the 16 million of this machine that nobody uses.
    macOS has neither, so chance may give the port to another process.
    """
    host = str(LOOPBACK[randrange(2**16, 2**24 - 1)]) if sys.platform == "win32" else "127.0.0.1"
    holder = socket.socket()
    if sys.platform == "linux":
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _holders.append(holder)
    holder.bind((host, 0))
    endpoint = f"tcp://{host}:{holder.getsockname()[1]}"
    if sys.platform != "linux":
        holder.close()
    return endpoint


@pytest.fixture(autouse=True)
def release_ports() -> Iterator[None]:
    """Let other tests have the ports of ``free_endpoint()``, once all that used them has ended."""
    yield
    while _holders:
        _holders.pop().close()


def address(endpoint: str) -> tuple[str, int]:
    """Return the host and the port of an endpoint."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


TIME_WAIT = "06"


def await_end(endpoint: str) -> None:
    """Wait until nobody listens at ``endpoint``, and both ends have closed their connections."""
    if sys.platform != "linux":
        until(lambda: is_refused(endpoint))
        time.sleep(0.5)  # there, nothing tells of the other end
        return
    port = f":{address(endpoint)[1]:04X}"

    def has_ended() -> bool:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return all(
            state == TIME_WAIT
            for _, local, remote, state, *_ in rows
            if local.endswith(port) or remote.endswith(port)
        )

    until(has_ended)


def is_refused(endpoint: str) -> bool:
    """Return whether nobody listens at ``endpoint``."""
    with socket.socket() as client:
        return client.connect_ex(address(endpoint)) != 0


@contextmanager
def listening(talk: Callable[[socket.socket], object], endpoint: str = "") -> Iterator[str]:
    """Listen at ``endpoint``, or at a free one, which the context gets.

    ``talk`` deals with each connection, which is then closed, in a thread.
    """
    endpoint = endpoint or free_endpoint()
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def deal(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            talk(connection)

    def accept() -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            connection.settimeout(LIMIT)
            connections.append(connection)
            threads.append(threading.Thread(target=deal, args=(connection,)))
            threads[-1].start()

    with socket.create_server(address(endpoint)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield endpoint
        finally:
            with suppress(OSError):  # Windows, where closing is enough
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            acceptor.join(LIMIT)
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(LIMIT)
                assert not thread.is_alive()


Forward = Callable[[bytes, socket.socket, bool], object]
"""Passes on data that a relay has read: ``(data, target, upstream)``; upstream: to the server."""


@contextmanager
def relay(
    endpoint: str,
    forward: Forward = lambda data, target, upstream: target.sendall(data),
    chunk: int = 65536,
) -> Iterator[str]:
    """Relay TCP connections to ``endpoint`` through ``forward``.

    The context gets the endpoint to connect to instead. An OSError of ``forward``, or the end of
    either side, ends the connection.
    """

    def pump(source: socket.socket, target: socket.socket, upstream: bool) -> None:
        with suppress(OSError):
            while data := source.recv(chunk):
                forward(data, target, upstream)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def talk(near: socket.socket) -> None:
        with socket.create_connection(address(endpoint), LIMIT) as far:
            back = threading.Thread(target=pump, args=(far, near, False))
            back.start()
            pump(near, far, True)
            back.join(LIMIT)

    with listening(talk) as here:
        yield here


@contextmanager
def broker(
    front_endpoint: str = "",
    back_endpoint: str = "",
    secure: Callable[[Socket], object] = lambda socket: None,
) -> Iterator[tuple[str, str]]:
    """Run a ROUTER/DEALER broker; the context gets its endpoints, for clients and for workers."""
    context: Context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    secure(front)
    secure(back)
    endpoints = bind(front, front_endpoint), bind(back, back_endpoint)

    def run() -> None:
        with front, back, suppress(zmq.ContextTerminated):
            zmq.proxy(front, back)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield endpoints
    finally:
        context.term()
        thread.join(LIMIT)


def open_server(context: Context, socket_type: int, endpoint: str = "") -> tuple[Socket, str]:
    """Bind a plain socket of pyzmq that does not wait for ever; return it and its real endpoint."""
    server = context.socket(socket_type)
    server.rcvtimeo = server.sndtimeo = LIMIT * 1000
    return server, bind(server, endpoint)


PLAIN = Form.choose(null=False, quoted=False, raw=False)
QUOTED = Form.choose(null=False, quoted=True, raw=False)


@contextmanager
def answering(
    context: Context, answer: Answer, count: int, endpoint: str = "inproc://server"
) -> Iterator[str]:
    """Let a Server answer ``count`` requests in a thread; the context gets the real endpoint."""
    guard = Guard(None)
    with (
        open_socket(context, zmq.REP, linger=1000) as socket,
        bound(socket, endpoint, guard.stop) as real,
    ):
        server = Server(answer, guard, count=count)
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        yield real
        thread.join(LIMIT)
        assert not thread.is_alive(), f"{count} requests were expected, {server.served} came"


def ask(context: Context, endpoint: str, *frames: bytes) -> list[bytes]:
    """Send ``frames`` over a plain REQ socket, and return the reply."""
    with context.socket(zmq.REQ) as client:
        client.linger = 0
        client.ipv6 = "[" in endpoint
        client.connect(endpoint)
        client.send_multipart(frames)
        assert client.poll(LIMIT * 1000)
        return client.recv_multipart()


def stop(process: Process, number: int = signal.SIGTERM) -> tuple[int, bytes, list[str]]:
    """Send the process a signal, and return how it ended."""
    process.signal(number)
    return process.finish()


def shell(tmp_path: Path, text: str) -> dict[str, Any]:
    """Return options that start a process by the shell script ``text``.

    In the script, $python and "$@" stand for the process.
    """
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\npython='{sys.executable}'\n{text}\n")
    script.chmod(0o755)
    return {"executable": script}


# Another user

IS_ROOT = sys.platform != "win32" and os.geteuid() == 0

# Runs zmqmsg as a user who owns nothing: python -c AS_NOBODY.
AS_NOBODY = """\
import importlib, os, pkgutil, queue, resource, socket, subprocess, threading
import zmqmsg
for module in pkgutil.iter_modules(zmqmsg.__path__):
    importlib.import_module(f"zmqmsg.{module.name}")  # which somebody else may not be able to read
os.setegid(65534)
os.seteuid(65534)
zmqmsg.__main__.main()
"""


def let_others_enter(directory: Path) -> None:
    """Let other users find what is in ``directory``."""
    for each in (directory, *directory.parents[:-1]):
        each.chmod(each.stat().st_mode | 0o011)


# What Linux tells of a process


def memory(pid: int, field: str = "VmRSS") -> int:
    """Return a field of the process's status, in KiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{field}:")[2].split()[0])


def descriptors(pid: int) -> int:
    """Return how many file descriptors the process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_running(pid: int) -> bool:
    """Return whether there is such a process, and it has not ended."""
    with suppress(OSError):
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False
