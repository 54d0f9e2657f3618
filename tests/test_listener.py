"""What ``serve --verbose`` says of clients that do not get through."""

import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import LIMIT, POSIX, Send, Serve, address, ask, stop

FAILED = "zmqmsg: a client from (127.0.0.1|an unknown address) did not get through: "
HUNG_UP = "the handshake was broken off: its socket is no REQ or DEALER"


def failures(notices: list[str]) -> list[str]:
    return [notice for notice in notices if re.match(FAILED, notice)]


@pytest.mark.parametrize("server_has_keys", [False, True], ids=["NULL", "CURVE"])
def test_a_client_with_keys_where_there_are_none_or_the_reverse_is_told_of(
    context: Context, serve: Serve, tmp_path: Path, server_has_keys: bool
) -> None:
    server, endpoint = serve("--verbose", *["--key", str(tmp_path / "server.key_secret")] * server_has_keys)
    with context.socket(zmq.REQ) as client:
        client.linger = 0
        if not server_has_keys:
            client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
            client.curve_serverkey = zmq.curve_keypair()[0]
        client.connect(endpoint)
        client.send(b"x")
        server.wait_for_notice(f"{FAILED}.*one side has keys, and the other has none")


def test_a_client_with_another_server_key_is_told_of(context: Context, serve: Serve, tmp_path: Path) -> None:
    server, endpoint = serve("--verbose", "--key", str(tmp_path / "server.key_secret"))
    with context.socket(zmq.REQ) as client:
        client.linger = 0
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
        client.curve_serverkey = zmq.curve_keypair()[0]
        client.connect(endpoint)
        client.send(b"x")
        server.wait_for_notice(f"{FAILED}its --server-key is not the key of this server")


@pytest.mark.parametrize("kind", ["PUSH", "SUB", "HTTP"])
def test_what_cannot_be_a_client_is_told_of(context: Context, serve: Serve, kind: str) -> None:
    server, endpoint = serve("--verbose")
    with ExitStack() as stack:
        if kind == "HTTP":
            client = stack.enter_context(socket.create_connection(address(endpoint), LIMIT))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
        else:
            stack.enter_context(context.socket(zmq.SocketType[kind])).connect(endpoint)
        server.wait_for_notice(FAILED + HUNG_UP)


def test_clients_that_are_served_add_nothing(context: Context, serve: Serve, send: Send) -> None:
    server, endpoint = serve("--verbose")
    for _ in range(5):
        assert send("--connect", endpoint, "x").returncode == 0
        assert ask(context, endpoint, b"x") == [b"x"]
    status, _, notices = stop(server)
    assert (status, failures(notices)) == (0, [])


@POSIX
def test_many_connections_during_a_command_hold_nobody_up_and_few_are_told_of(context: Context, serve: Serve) -> None:
    server, endpoint = serve("--verbose", "--exec", "sleep 1; cat")
    with context.socket(zmq.REQ) as client:
        client.connect(endpoint)
        client.send(b"x")
        for _ in range(1500):
            socket.create_connection(address(endpoint), LIMIT).close()
        assert client.poll(LIMIT * 1000)
    assert ask(context, endpoint, b"y") == [b"y"]
    time.sleep(0.2)
    assert len(stop(server)[2]) < 40


def test_without_verbose_nothing_is_said_of_them(context: Context, serve: Serve) -> None:
    server, endpoint = serve()
    socket.create_connection(address(endpoint), LIMIT).close()
    assert ask(context, endpoint, b"x") == [b"x"]
    assert failures(stop(server)[2]) == []
