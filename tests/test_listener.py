"""What ``serve --verbose`` says of clients that do not get through."""

import re
import socket
import time

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import LIMIT, POSIX, Send, Serve, address, ask, stop

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
