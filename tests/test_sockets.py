"""Endpoints that are accepted, what binding them does, and the socket files of ipc endpoints."""

import re
import socket as system_socket
import sys
from pathlib import Path

import pytest
import zmq

from zmqmsg.console import Failure
from zmqmsg.listener import bound, is_local
from zmqmsg.sockets import Context, check_endpoint, connect, open_socket, receive, send

from conftest import LIMIT, LINUX, POSIX, WINDOWS

LONGEST = zmq.IPC_PATH_MAX_LEN
BOTH_WAYS = pytest.mark.parametrize("bind", [True, False], ids=["bind", "connect"])


@BOTH_WAYS
@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:5555",
        "tcp://localhost:1",
        "tcp://[::1]:65535",
        "tcp://[fe80::1%eth0]:5555",
        "tcp://[fe80::1%br-lan]:5555",
        "tcp://a-b.example:5555",
        pytest.param("ipc:///tmp/a.sock", marks=POSIX),
        pytest.param("ipc://@abstract", marks=POSIX),
        pytest.param("ipc://relative path", marks=POSIX),
        pytest.param("ipc:///" + "x" * (LONGEST - 1), marks=POSIX),
    ],
)
def test_an_endpoint_that_libzmq_understands_is_accepted(endpoint: str, bind: bool) -> None:
    assert check_endpoint(endpoint, bind=bind) == endpoint


@pytest.mark.parametrize("endpoint", ["tcp://*:5555", "tcp://127.0.0.1:*", "tcp://eth0:0", "tcp://*:*"])
def test_wildcards_can_be_bound_but_not_connected_to(endpoint: str) -> None:
    assert check_endpoint(endpoint, bind=True) == endpoint
    with pytest.raises(ValueError, match="wildcard"):
        check_endpoint(endpoint, bind=False)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("", "neither tcp"),
        ("localhost:5555", "neither tcp"),
        ("http://localhost:5555", "neither tcp"),
        ("tcp://localhost", "neither tcp"),
        ("tcp://:5555", "neither tcp"),
        ("tcp://::1:5555", "IPv6 in brackets"),
        ("tcp://[::1]", "neither tcp"),
        ("tcp://host name:5555", "neither tcp"),
        ("tcp://127.0.0.1:-1", "neither tcp"),
        ("tcp://127.0.0.1:5555\n", "cannot be printed"),
        ("ipc:///tmp/\udcff.sock", "cannot be printed"),
        pytest.param("ipc://*x", "path", marks=POSIX),
        pytest.param("ipc:///tmp/a.sock", "Unix sockets", marks=WINDOWS),
        ("tcp://127.0.0.1:65536", "port above 65535"),
        ("tcp://127.0.0.1:99999", "port above 65535"),
        pytest.param("ipc://", "path", marks=POSIX),
        pytest.param("ipc://*", "path", marks=POSIX),
        pytest.param("ipc:///" + "x" * LONGEST, f"path of 1 to {LONGEST} bytes", marks=POSIX),
        pytest.param("ipc:///" + "\N{SNOWMAN}" * 36, f"path of 1 to {LONGEST} bytes", marks=POSIX),
        ("inproc://here", "within one process"),
    ],
)
def test_any_other_endpoint_is_refused_with_the_reason_and_an_example(endpoint: str, reason: str, bind: bool) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        check_endpoint(endpoint, bind=bind)
    assert f"'{endpoint}'" in str(refusal.value)
    assert ("ipc:///tmp/" if endpoint.startswith("ipc") and sys.platform != "win32" else "tcp://127.0.0.1:5555") in str(
        refusal.value
    )


@pytest.mark.parametrize("frames", [[b"hello"], [b""], [b"one", b"", b"\xff\0"], [bytes(100_000), b"small"]])
def test_a_message_keeps_its_frames_over_inproc(context: Context, frames: list[bytes]) -> None:
    with open_socket(context, zmq.REP) as server, open_socket(context, zmq.REQ) as client:
        with bound(server, "inproc://here") as endpoint:
            connect(client, endpoint)
            assert receive(server) == []
            send(client, frames)
            request = receive(server)
            assert [frame.bytes for frame in request] == frames
            send(server, request)
            assert client.recv_multipart() == frames


@pytest.mark.parametrize(
    ("wildcard", "real"),
    [
        ("tcp://127.0.0.1:*", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        ("tcp://127.0.0.1:0", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        ("tcp://localhost:*", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        pytest.param("tcp://lo:*", r"tcp://127\.0\.0\.1:[1-9]\d*", marks=LINUX),
        ("tcp://[::1]:*", r"tcp://\[::1\]:[1-9]\d*"),
    ],
)
def test_the_endpoint_that_is_bound_can_be_connected_to(context: Context, wildcard: str, real: str) -> None:
    with open_socket(context, zmq.REP) as server, open_socket(context, zmq.REQ) as client:
        with bound(server, wildcard) as endpoint:
            assert re.fullmatch(real, endpoint)
            assert is_local(endpoint)
            # With IPv6 switched on, libzmq would try ::1 alone.
            connect(client, endpoint.replace("127.0.0.1", "localhost"))
            client.send(b"hello")
            assert server.poll(LIMIT * 1000)


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5555", "tcp://192.168.1.1:5555", "tcp://[::]:5555"])
def test_an_endpoint_that_other_machines_reach_is_not_local(endpoint: str) -> None:
    assert not is_local(endpoint)


def test_a_frame_larger_than_allowed_is_not_received(context: Context) -> None:
    with open_socket(context, zmq.REP, max_size=1000) as server, bound(server, "tcp://127.0.0.1:*") as endpoint:
        with open_socket(context, zmq.REQ) as large, open_socket(context, zmq.REQ) as small:
            connect(large, endpoint)
            large.send(bytes(1001))
            connect(small, endpoint)
            small.send(bytes(1000))
            assert server.poll(LIMIT * 1000)
            assert server.recv() == bytes(1000)
            server.send(b"")
            assert not server.poll(200)


@POSIX
class TestIpcPath:
    """libzmq unlinks whatever is at the path that it binds, and leaves its own socket file behind."""

    def test_its_socket_file_is_removed_at_the_end(self, context: Context, tmp_path: Path) -> None:
        path = tmp_path / "a.sock"
        with open_socket(context, zmq.REP) as socket:
            with bound(socket, f"ipc://{path}"):
                assert path.is_socket()
            assert not path.exists()

    def test_a_file_that_has_taken_its_place_is_left_alone(self, context: Context, tmp_path: Path) -> None:
        path = tmp_path / "a.sock"
        with open_socket(context, zmq.REP) as socket, bound(socket, f"ipc://{path}"):
            (tmp_path / "new").touch()
            (tmp_path / "new").rename(path)
        assert path.is_file()

    def test_a_file_that_is_there_is_not_replaced(self, context: Context, tmp_path: Path) -> None:
        path = tmp_path / "precious"
        path.write_text("data")
        with open_socket(context, zmq.REP) as socket, pytest.raises(Failure, match="a server or a file is there"):
            with bound(socket, f"ipc://{path}"):
                pass
        assert path.read_text() == "data"

    def test_the_path_of_a_live_server_is_not_taken_from_it(self, context: Context, tmp_path: Path) -> None:
        endpoint = f"ipc://{tmp_path}/a.sock"
        with open_socket(context, zmq.REP) as first, open_socket(context, zmq.REP) as second:
            with bound(first, endpoint):
                with pytest.raises(Failure, match="a server or a file is there"), bound(second, endpoint):
                    pass
                with open_socket(context, zmq.REQ) as client:
                    connect(client, endpoint)
                    client.send(b"still there?")
                    assert first.poll(LIMIT * 1000)

    def test_a_stale_socket_file_is_replaced(self, context: Context, tmp_path: Path) -> None:
        path = tmp_path / "a.sock"
        with system_socket.socket(system_socket.AF_UNIX) as stale:
            stale.bind(str(path))
        assert path.is_socket()
        with open_socket(context, zmq.REP) as socket, bound(socket, f"ipc://{path}"):
            with system_socket.socket(system_socket.AF_UNIX) as client:
                client.connect(str(path))

    def test_it_may_be_as_long_as_the_system_allows(
        self, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with open_socket(context, zmq.REP) as socket, bound(socket, "ipc://" + "x" * LONGEST):
            assert (tmp_path / ("x" * LONGEST)).is_socket()
