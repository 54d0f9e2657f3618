import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from zmqmsg.monitor import NO_TROUBLE, Connection, State
from zmqmsg.sockets import Context, Failure, Socket, open_socket

from conftest import LIMIT, bind


class Watched:
    """A connection, and what it told."""

    def __init__(self, context: Context, endpoint: str, opener: Callable[[], Socket] | None = None) -> None:
        self.told: list[str] = []
        self.connection = Connection(endpoint, opener or (lambda: open_socket(context, zmq.REQ)), self.told.append)

    def until(self, condition: Callable[[Connection], object], limit: float = LIMIT) -> Connection:
        """Keep the connection up to date until ``condition`` holds."""
        end = time.monotonic() + limit
        while not condition(self.connection):
            assert time.monotonic() < end, self.connection.__dict__
            self.connection.monitor.poll(int(self.connection.pause * 1000))
            self.connection.update()
            self.connection.report()
        return self.connection


@contextmanager
def listener(*answers: Callable[[socket.socket], None], port: int = 0) -> Iterator[str]:
    """Listen, let the nth of ``answers`` (or the last) deal with the nth connection, and give the endpoint."""
    with socket.create_server(("127.0.0.1", port)) as server, open_connections() as connections:

        def accept() -> None:
            for number in range(10_000):
                try:
                    connection, _address = server.accept()
                except OSError:
                    return
                connections.append(connection)
                answers[min(number, len(answers) - 1)](connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)


@contextmanager
def open_connections() -> Iterator[list[socket.socket]]:
    connections: list[socket.socket] = []
    yield connections
    for connection in connections:
        connection.close()


def mute(_connection: socket.socket) -> None:
    """Say nothing."""


def hang_up(connection: socket.socket) -> None:
    """Close at once."""
    connection.close()


@pytest.fixture
def hasty_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a peer one second for its handshake."""
    monkeypatch.setattr("zmqmsg.sockets.HANDSHAKE_LIMIT", 1.0)
    monkeypatch.setattr("zmqmsg.monitor.HANDSHAKE_LIMIT", 1.0)


@pytest.mark.parametrize("socket_type", [zmq.REP, zmq.ROUTER])
def test_a_server_that_is_there_is_ready_and_nothing_is_told(context: Context, socket_type: int) -> None:
    server = context.socket(socket_type)
    endpoint = bind(server)
    watched = Watched(context, endpoint)
    connection = watched.until(lambda c: c.ready)
    assert connection.greeted
    assert watched.told == []


def test_inproc_is_ready_without_any_event(context: Context) -> None:
    connection = Watched(context, "inproc://nobody-yet").connection
    connection.update()
    assert connection.ready


def test_a_wait_is_told_once_after_a_second_with_its_cause_and_so_is_its_end(context: Context) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    watched = Watched(context, endpoint)
    watched.until(lambda c: c.known)
    assert watched.told == []
    watched.until(lambda _c: watched.told)
    assert 1 <= time.monotonic() - started < 2
    watched.until(lambda _c: time.monotonic() - started > 2.5)
    assert len(watched.told) == 1
    assert f"waiting for {endpoint}: nothing accepts connections there" in watched.told[0]
    successor = context.socket(zmq.REP)
    bind(successor, endpoint)
    watched.until(lambda c: c.ready)
    assert watched.told[1:] == [f"connected to {endpoint}"]


def test_a_name_that_does_not_resolve_is_told(context: Context) -> None:
    connection = Watched(context, "tcp://no.such.name.invalid:5555").until(lambda c: c.known)
    assert "cannot resolve no.such.name.invalid" in connection.trouble


def test_an_ipc_path_where_nobody_listens_is_no_name_that_does_not_resolve(context: Context) -> None:
    connection = Watched(context, "ipc:///tmp/zmqmsg-nobody.sock").until(lambda c: c.known)
    assert "nothing accepts connections" in connection.trouble


def test_a_lost_connection_is_counted_and_found_again(context: Context) -> None:
    server = context.socket(zmq.REP)
    endpoint = bind(server)
    watched = Watched(context, endpoint)
    watched.until(lambda c: c.ready)
    server.close()
    assert watched.until(lambda c: not c.ready).losses == 1
    successor = context.socket(zmq.REP)
    bind(successor, endpoint)
    assert watched.until(lambda c: c.ready).losses == 1


@pytest.mark.parametrize("peer", [zmq.PUB, zmq.PUSH, zmq.REQ, zmq.PAIR, zmq.PULL, zmq.SUB, zmq.DEALER])
def test_a_peer_of_the_wrong_type_is_refused(context: Context, peer: int) -> None:
    """libzmq gives it up without a word: CONNECTED, DISCONNECTED, and no CONNECT_RETRIED."""
    server = context.socket(peer)
    endpoint = bind(server)
    with pytest.raises(Failure, match=f"{endpoint} is not a REP socket"):
        Watched(context, endpoint).until(lambda c: c.ready)


def test_a_worker_says_what_a_queue_should_be(context: Context) -> None:
    queue = context.socket(zmq.ROUTER)
    endpoint = bind(queue)
    with pytest.raises(Failure, match="is not a DEALER socket"):
        Watched(context, endpoint, lambda: open_socket(context, zmq.REP)).until(lambda c: c.ready)


def test_a_handshake_that_breaks_off_twice_is_an_ordinary_restart_and_thrice_is_not(context: Context) -> None:
    with listener(hang_up) as endpoint:
        watched = Watched(context, endpoint)
        assert watched.until(lambda c: c._failures == 2).trouble == NO_TROUBLE
        assert "handshake failing" in watched.until(lambda c: c._failures == 3).trouble
        assert watched.connection.losses == 0


def test_a_mute_peer_is_taken_for_zmtp_2_at_first_and_then_told_for_what_it_is(
    context: Context, hasty_handshakes: None
) -> None:
    with listener(mute) as endpoint:
        watched = Watched(context, endpoint)
        connection = watched.until(lambda c: c.ready)
        assert not connection.greeted
        connection = watched.until(lambda c: not c.ready)
        assert connection.losses == 0, "what was sent meanwhile is still here"
        assert "does not answer as ZeroMQ" in connection.trouble
        with pytest.raises(AssertionError):
            watched.until(lambda c: c.ready, limit=1)


def test_a_peer_that_is_mute_once_and_then_well_is_found(context: Context, hasty_handshakes: None) -> None:
    server = context.socket(zmq.REP)
    real = bind(server)
    relays: list[threading.Thread] = []

    def relay(connection: socket.socket) -> None:
        onward = socket.create_connection(("127.0.0.1", int(real.rpartition(":")[2])))
        for source, target in ((connection, onward), (onward, connection)):
            relays.append(threading.Thread(target=copy, args=(source, target), daemon=True))
            relays[-1].start()

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        with target:
            pass

    with listener(mute, relay) as endpoint:
        assert Watched(context, endpoint).until(lambda c: c.greeted)
        server.close()


def test_a_breach_of_protocol_which_libzmq_does_not_try_again_is_tried_again(context: Context) -> None:
    server = context.socket(zmq.REP)
    endpoint = bind(server)
    public, secret = zmq.curve_keypair()

    def keyed() -> zmq.Socket[bytes]:
        opened = open_socket(context, zmq.REQ)
        opened.curve_publickey, opened.curve_secretkey, opened.curve_serverkey = public, secret, public
        return opened

    watched = Watched(context, endpoint, keyed)
    watched.until(lambda c: c._state is State.ABANDONED)
    assert "does the server use --key?" in watched.connection.trouble
    server.close()
    keyed_server = context.socket(zmq.REP)
    keyed_server.curve_server = True
    keyed_server.curve_secretkey = secret
    bind(keyed_server, endpoint)
    watched.until(lambda c: c.ready)


def test_a_connection_that_cannot_be_opened_leaves_nothing_open(context: Context) -> None:
    with pytest.raises(Failure, match="cannot connect to tcp://_host:5555: Invalid argument"):
        Watched(context, "tcp://_host:5555")
    context.term()  # would wait for ever for an open socket


def test_events_that_nobody_reads_do_not_stop_the_socket(context: Context) -> None:
    """At a monitor's high-water mark libzmq's I/O thread blocks (libzmq issue 3745)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def hasty() -> zmq.Socket[bytes]:
        opened = open_socket(context, zmq.REQ)
        opened.reconnect_ivl = 1
        opened.reconnect_ivl_max = 1
        return opened

    watched = Watched(context, endpoint, hasty)
    watched.connection.socket.send(b"hello")
    # Three events a try, and 2000 are the default limit: without the cure, the socket is stuck by then.
    threading.Event().wait(3)
    successor = context.socket(zmq.REP)
    bind(successor, endpoint)
    assert successor.poll(LIMIT * 1000)
    watched.until(lambda c: c.ready)
