"""What ``serve --verbose`` says of clients that do not get through."""

import re
import socket
import time
from contextlib import ExitStack

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import LIMIT, POSIX, Send, Serve, address, ask, stop

FAILED = "zmqmsg: a client from (127.0.0.1|an unknown address) did not get through: "
HUNG_UP = "the handshake was broken off: its socket is no REQ or DEALER"


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


@pytest.mark.parametrize("options", [["--verbose"], []], ids=["verbose", ""])
def test_nothing_is_said_of_clients_that_are_served_nor_without_verbose_of_others(
    context: Context, serve: Serve, send: Send, options: list[str]
) -> None:
    server, endpoint = serve(*options)
    if not options:
        socket.create_connection(address(endpoint), LIMIT).close()
    assert send("--connect", endpoint, "x").returncode == 0
    assert ask(context, endpoint, b"x") == [b"x"]
    status, _, notices = stop(server)
    assert (status, [notice for notice in notices if re.match(FAILED, notice)]) == (0, [])


@POSIX
def test_many_connections_during_a_command_hold_nobody_up_and_few_are_told_of(
    context: Context, serve: Serve
) -> None:
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
