"""Endpoints: those that are accepted and refused, and the socket files of ipc endpoints."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from zmqmsg.quoting import escape_line

from conftest import (
    AS_NOBODY,
    COMMAND,
    IS_ROOT,
    LIMIT,
    POSIX,
    WINDOWS,
    Send,
    Serve,
    Start,
    let_others_enter,
    refusal,
    stop,
)

LONGEST = zmq.IPC_PATH_MAX_LEN
BIND_AND_CONNECT = pytest.mark.parametrize("option", ["--bind", "--connect"])


def usage_error(option: str, endpoint: str) -> str:
    """Return what is said of ``endpoint``; if it is accepted, of another option, which is wrong."""
    command = "serve" if option == "--bind" else "send"
    return refusal(command, option, endpoint, "--max-size", "wrong")


@BIND_AND_CONNECT
@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:5555",
        "tcp://localhost:1",
        "tcp://[::1]:65535",
        "tcp://[fe80::1%br-lan]:5555",
        "tcp://a-b.example:5555",
        pytest.param("ipc:///tmp/a.sock", marks=POSIX),
        pytest.param("ipc://relative path", marks=POSIX),
        pytest.param("ipc:///" + "x" * (LONGEST - 1), marks=POSIX),
    ],
)
def test_an_endpoint_that_libzmq_understands_is_accepted(option: str, endpoint: str) -> None:
    assert "'--max-size'" in usage_error(option, endpoint)


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:5555", "tcp://127.0.0.1:*", "tcp://eth0:0", "tcp://*:*"]
)
def test_wildcards_can_be_bound_but_not_connected_to(endpoint: str) -> None:
    assert "'--max-size'" in usage_error("--bind", endpoint)
    assert f"'{endpoint}' has a wildcard" in usage_error("--connect", endpoint)


EXAMPLE = "for example tcp://127.0.0.1:5555"


@BIND_AND_CONNECT
@pytest.mark.parametrize(
    ("endpoint", "reason", "advice"),
    [
        ("tcp://localhost", "neither tcp", EXAMPLE),
        ("tcp://[::1]", "neither tcp", EXAMPLE),
        ("tcp://host name:5555", "neither tcp", EXAMPLE),
        ("tcp://127.0.0.1:1,tcp://127.0.0.1:2", "has a comma; repeat the option", EXAMPLE),
        ("tcp://127.0.0.1:-1", "neither tcp", EXAMPLE),
        ("udp://127.0.0.1:5555", "neither tcp", EXAMPLE),
        ("tcp://127.0.0.1:65536", "port above 65535", EXAMPLE),
        ("inproc://here", "within one process", EXAMPLE),
        ("tcp://\udcff:5555", "cannot be printed", EXAMPLE),
        pytest.param("ipc:///tmp/a.sock", "Unix sockets", EXAMPLE, marks=WINDOWS),
        pytest.param("ipc://", "path", "for example ipc:///tmp/", marks=POSIX),
        pytest.param("ipc://*x", "path", "for example ipc:///tmp/", marks=POSIX),
        pytest.param(
            "ipc:///" + "\N{SNOWMAN}" * 36,
            f"path of 1 to {LONGEST} bytes",
            "for example ipc:///tmp/",
            marks=POSIX,
        ),
        ("localhost:5555", "neither tcp", "write tcp://localhost:5555"),
        ("127.0.0.1:5555", "neither tcp", "write tcp://127.0.0.1:5555"),
        ("5555", "neither tcp", "write tcp://127.0.0.1:5555"),
        ("tcp:5555", "neither tcp", "write tcp://127.0.0.1:5555"),
        ("tcp://:5555", "neither tcp", "write tcp://127.0.0.1:5555"),
        ("http://localhost:5555/", "neither tcp", "write tcp://localhost:5555"),
        ("TCP://localhost:5555", "neither tcp", "write tcp://localhost:5555"),
        ("tcp:/localhost:5555", "neither tcp", "write tcp://localhost:5555"),
        ("tcp://::1:5555", "IPv6 in brackets", "write tcp://[::1]:5555"),
        ("tcp:localhost:5555", "neither tcp", "write tcp://localhost:5555"),
        ("tcp://localhost:5555/", "neither tcp", "write tcp://localhost:5555"),
        ("::1:5555", "IPv6 in brackets", "write tcp://[::1]:5555"),
        ("::1", "IPv6 in brackets", EXAMPLE),
        ("tcp://fe80::77:5555", "IPv6 in brackets", "write tcp://[fe80::77%eth0]:5555"),
        ("tcp://[febf::1]:5555", "name of its interface", "write tcp://[febf::1%eth0]:5555"),
        ("tcp://日本.jp:5555", "characters in its name", "write tcp://xn--wgv71a.jp:5555"),
        ("tcp://127.0.0.1:5555\n", "cannot be printed", "write tcp://127.0.0.1:5555"),
        ("tcp://münchen.de:5555", "characters in its name", "write tcp://xn--mnchen-3ya.de:5555"),
        ("tcp://[fe80::77]:5555", "name of its interface", "write tcp://[fe80::77%eth0]:5555"),
        pytest.param("/tmp/a.sock", "neither tcp", "write ipc:///tmp/a.sock", marks=POSIX),
        pytest.param("ipc:a.sock", "neither tcp", "write ipc://a.sock", marks=POSIX),
    ],
)
def test_any_other_endpoint_is_refused_with_what_to_write_instead(
    option: str, endpoint: str, reason: str, advice: str
) -> None:
    said = usage_error(option, endpoint)
    assert f"'{escape_line(endpoint)}' " in said
    assert reason in said
    assert f"; {advice}" in said


# Socket files. libzmq would unlink whatever is there.


def assert_taken(start: Start, path: Path) -> None:
    """Start a server that cannot bind ``path``."""
    taken = "a server or a file is there already; choose another path"
    notices = [f"zmqmsg: cannot bind ipc://{path}: {taken}"]
    assert start("serve", "--bind", f"ipc://{path}").finish() == (1, b"", notices)


@POSIX
def test_the_path_of_a_file_is_not_taken(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("data")
    assert_taken(start, path)
    assert path.read_text() == "data"


@POSIX
def test_the_path_of_a_server_is_not_taken(
    serve: Serve, start: Start, send: Send, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    _, endpoint = serve("--bind", f"ipc://{path}")
    assert_taken(start, path)
    assert send("--connect", endpoint, "still there?").stdout == b"still there?\n"


@POSIX
def test_the_path_of_a_server_that_died_is_taken(serve: Serve, send: Send, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server, endpoint = serve("--bind", f"ipc://{path}")
    server.signal(signal.SIGKILL)
    server.wait()
    assert path.is_socket()
    serve("--bind", endpoint)
    assert send("--connect", endpoint, "and now?").stdout == b"and now?\n"


@pytest.mark.skipif(not IS_ROOT, reason="needs root to leave a socket to another user")
@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o777, "server has left its socket there"), (0o755, "server or file is there already")],
)
def test_a_stale_socket_of_another_user_is_called_that(
    tmp_path: Path, mode: int, words: str
) -> None:
    """In a directory such as /tmp, only its owner may remove it.

    Whether it is stale can be seen only by those who may use it.
    """
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    let_others_enter(shared)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{shared}/socket")
    (shared / "socket").chmod(mode)
    command = [sys.executable, "-c", AS_NOBODY, "serve", "--bind", f"ipc://{shared}/socket"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    assert f"another user's {words}" in done.stderr
    assert "in use" not in done.stderr


@POSIX
@pytest.mark.parametrize("limit", range(12, 30, 3))
def test_without_descriptors_nothing_is_taken_either(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "file"
    path.write_text("data")
    limited = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
    command = [*limited, *COMMAND, "serve", "--bind", f"ipc://{path}"]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT)
    assert (done.returncode, path.read_text()) == (1, "data")


@POSIX
def test_a_socket_file_may_have_the_longest_path_and_is_removed(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / ("x" * LONGEST)
    server, _ = serve("--bind", f"ipc://{path.name}", cwd=tmp_path)
    assert path.is_socket()
    assert stop(server)[0] == 0
    assert not path.exists()


@POSIX
def test_what_has_taken_the_place_of_a_socket_file_is_not_removed(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    server, _ = serve("--bind", f"ipc://{path}")
    (tmp_path / "new").touch()
    (tmp_path / "new").rename(path)
    assert stop(server)[0] == 0
    assert path.is_file()
