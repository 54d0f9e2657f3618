"""What ``serve --verbose`` says of clients that do not get through."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import LIMIT, POSIX, Send, Serve, Start, address, ask, stop, waits

FAILED = "zmqmsg: a client from 127.0.0.1 did not get through: "
HUNG_UP = "it hung up during the handshake"


@pytest.mark.parametrize("socket_type", [zmq.PUSH, zmq.SUB])
def test_a_socket_of_the_wrong_type_is_told_of(
    context: Context, serve: Serve, socket_type: zmq.SocketType
) -> None:
    server, endpoint = serve("--verbose")
    context.socket(socket_type).connect(endpoint)
    server.wait_for_notice(FAILED + HUNG_UP)


def test_a_client_of_another_protocol_is_told_of(serve: Serve) -> None:
    server, endpoint = serve("--verbose")
    with socket.create_connection(address(endpoint), LIMIT) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        server.wait_for_notice(FAILED + HUNG_UP)


def test_nothing_is_said_of_clients_that_are_served(
    context: Context, serve: Serve, send: Send
) -> None:
    server, endpoint = serve("--verbose")
    assert send("--connect", endpoint, "x").returncode == 0
    assert ask(context, endpoint, b"x") == [b"x"]
    status, _, notices = stop(server)
    assert (status, [notice for notice in notices if re.match(FAILED, notice)]) == (0, [])


def test_without_verbose_nothing_is_said_of_any_client(context: Context, serve: Serve) -> None:
    server, endpoint = serve()
    socket.create_connection(address(endpoint), LIMIT).close()
    assert ask(context, endpoint, b"x") == [b"x"]
    status, _, notices = stop(server)
    assert (status, [notice for notice in notices if re.match(FAILED, notice)]) == (0, [])


@POSIX
def test_many_connections_hold_nobody_up_and_few_are_told_of(
    context: Context, serve: Serve
) -> None:
    """A monitor of libzmq that nobody reads while a command runs would stop the server."""
    server, endpoint = serve("--verbose", "--exec", "sleep 1; cat")
    with context.socket(zmq.REQ) as client:
        client.connect(endpoint)
        client.send(b"x")
        for _ in range(1500):
            socket.create_connection(address(endpoint), LIMIT).close()
        assert client.poll(LIMIT * 1000)
    assert ask(context, endpoint, b"y") == [b"y"]
    time.sleep(0.2)  # no notices must come late
    assert len(stop(server)[2]) < 40


@waits
@POSIX
@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_nothing_is_said_of_clients_that_look_why_they_have_to_wait(
    serve: Serve, start: Start, tmp_path: Path, kind: str
) -> None:
    bind = "tcp://127.0.0.1:*" if kind == "tcp" else f"ipc://{tmp_path}/socket"
    server, endpoint = serve("--verbose", "--bind", bind)
    server.signal(signal.SIGSTOP)
    clients = [start("send", "--connect", endpoint, "x") for _ in range(3)]
    for client in clients:
        client.wait_for_notice("no ZeroMQ greeting yet")
    server.signal(signal.SIGCONT)
    for client in clients:
        assert client.finish()[:2] == (0, b"x\n")
    time.sleep(3)  # no notice must come within the time that a client has to come back
    assert [notice for notice in stop(server)[2] if "did not get through" in notice] == []


@pytest.mark.parametrize("with_key", [False, True])
def test_a_client_with_plain_passwords_is_told_of_by_what_is_known(
    context: Context, serve: Serve, tmp_path: Path, with_key: bool
) -> None:
    options = ["--key", f"{tmp_path}/server.key_secret"] * with_key
    server, endpoint = serve("--verbose", *options)
    client = context.socket(zmq.REQ)
    client.plain_username, client.plain_password = b"user", b"password"
    client.connect(endpoint)
    known = "it uses no keys, and" if with_key else r"it uses keys \(or PLAIN\), and"
    server.wait_for_notice(f"{FAILED}({known} this server.*|{HUNG_UP})$")
    assert not [notice for notice in server.notices if "ZMTP" in notice or " or it " in notice]


@waits
@POSIX
def test_a_local_client_that_hangs_up_at_once_has_an_address(serve: Serve, tmp_path: Path) -> None:
    server, endpoint = serve("--verbose")
    socket.create_connection(address(endpoint), LIMIT).close()
    server.wait_for_notice(FAILED + HUNG_UP)
    server, _ = serve("--verbose", "--bind", f"ipc://{tmp_path}/socket")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/socket")
    server.wait_for_notice(f"a client from a Unix socket did not get through: {HUNG_UP}")
