"""The state of a peer, fed with events and a clock; and the socket of a Connection with its monitor."""

import errno
import math
import time
from functools import partial

import pytest
import zmq

from zmqmsg.monitor import REOPEN_DELAY, RETRY_DELAY, Connection, PeerState, State, Trouble, Verdict
from zmqmsg.sockets import HANDSHAKE_LIMIT, Context, Socket, open_socket

from conftest import bind, free_endpoint, until

# Events, with their values where those matter
DELAYED = zmq.EVENT_CONNECT_DELAYED, 0
CLOSED = zmq.EVENT_CLOSED, 0
RETRIED = zmq.EVENT_CONNECT_RETRIED, 0
CONNECTED = zmq.EVENT_CONNECTED, 0
SUCCEEDED = zmq.EVENT_HANDSHAKE_SUCCEEDED, 0
DISCONNECTED = zmq.EVENT_DISCONNECTED, 0
TIMER = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EAGAIN
BREAK = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EPIPE
MALFORMED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.PROTOCOL_ERROR_ZMTP_UNSPECIFIED
MISMATCH = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
CRYPTOGRAPHIC = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
AUTH = zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400
ZMTP = Verdict.ZMTP, 0
NO_ZMTP = Verdict.NO_ZMTP, 0

REFUSED = (DELAYED, CLOSED, RETRIED)
READY = (CONNECTED, SUCCEEDED)
WRONG_TYPE = (CONNECTED, DISCONNECTED, ZMTP)


def peer_after(*events: tuple[int, int], curve: bool = False) -> PeerState:
    """Return the state of a peer after ``events``, all at the time 0."""
    return feed(PeerState(0, HANDSHAKE_LIMIT, curve=curve), *events)


def feed(peer: PeerState, *events: tuple[int, int], now: float = 0) -> PeerState:
    for event, value in events:
        peer.handle_event(event, value, now)
    return peer


@pytest.mark.parametrize(
    ("events", "state", "trouble"),
    [
        ([], State.CONNECTING, Trouble.UNKNOWN),
        (REFUSED, State.CONNECTING, Trouble.REFUSED),
        ([RETRIED], State.CONNECTING, Trouble.UNRESOLVED),
        ([*REFUSED, RETRIED], State.CONNECTING, Trouble.UNRESOLVED),
        ([CONNECTED], State.HANDSHAKING, Trouble.UNKNOWN),
        (READY, State.READY, Trouble.UNKNOWN),
        ([*REFUSED, *READY], State.READY, Trouble.UNKNOWN),
        ([CONNECTED, ZMTP], State.READY, Trouble.UNKNOWN),
        ([CONNECTED, TIMER], State.CONNECTING, Trouble.NOT_ZEROMQ),
        ([CONNECTED, BREAK], State.CONNECTING, Trouble.NOT_ZEROMQ),
        ([CONNECTED, MALFORMED], State.GIVEN_UP, Trouble.NOT_ZEROMQ),
        ([CONNECTED, MISMATCH], State.GIVEN_UP, Trouble.NEEDS_CURVE),
        ([CONNECTED, AUTH], State.HOPELESS, Trouble.KEY_REFUSED),
        ([CONNECTED, DISCONNECTED], State.HUNG_UP, Trouble.NOT_ZEROMQ),
        ([CONNECTED, DISCONNECTED, NO_ZMTP], State.GIVEN_UP, Trouble.NOT_ZEROMQ),
        ([*WRONG_TYPE], State.GIVEN_UP, Trouble.WRONG_TYPE),
        ([*WRONG_TYPE, RETRIED, *WRONG_TYPE], State.HOPELESS, Trouble.WRONG_TYPE),
        ([*WRONG_TYPE, RETRIED, *REFUSED, *WRONG_TYPE], State.GIVEN_UP, Trouble.WRONG_TYPE),
        ([CONNECTED, NO_ZMTP], State.GIVEN_UP, Trouble.NOT_ZEROMQ),
    ],
)
def test_events_lead_to_a_state_and_a_reason(events: list[tuple[int, int]], state: State, trouble: Trouble) -> None:
    peer = peer_after(*events)
    assert (peer.state, peer.trouble(0), peer.ready) == (state, trouble, state is State.READY)


@pytest.mark.parametrize(
    ("failure", "trouble"),
    [
        (BREAK, Trouble.CURVE_FAILING),
        (MISMATCH, Trouble.CURVE_FAILING),
        (CRYPTOGRAPHIC, Trouble.CURVE_FAILING),
        (TIMER, Trouble.NOT_ZEROMQ),
    ],
)
def test_with_curve_a_failed_handshake_is_one_of_curve_unless_the_peer_is_mute(
    failure: tuple[int, int], trouble: Trouble
) -> None:
    assert peer_after(CONNECTED, failure, curve=True).trouble(0) is trouble


def test_a_crash_during_the_handshake_is_no_wrong_socket_type() -> None:
    """libzmq connects again after a crash, and not after a wrong type: CONNECT_RETRIED tells them apart."""
    peer = peer_after(CONNECTED, DISCONNECTED, RETRIED)
    assert peer.state is State.CONNECTING
    assert feed(peer, ZMTP).state is State.CONNECTING


def test_a_wrong_type_where_a_good_peer_was_before_is_waited_for() -> None:
    peer = peer_after(*READY, DISCONNECTED, RETRIED, *WRONG_TYPE, RETRIED, *WRONG_TYPE)
    assert (peer.state, peer.trouble(0)) == (State.GIVEN_UP, Trouble.WRONG_TYPE)


def test_connecting_to_oneself_is_never_hopeless_however_often_it_happens() -> None:
    """TCP can connect to a free port from that very port; a probe then finds nobody there."""
    peer = peer_after(*REFUSED)
    for _ in range(3):
        feed(peer, CONNECTED, DISCONNECTED, NO_ZMTP)
        assert peer.state is State.GIVEN_UP
        peer.restart(0)
    assert feed(peer, *READY).ready


@pytest.mark.parametrize("end", [[DISCONNECTED], [MALFORMED, DISCONNECTED], [CRYPTOGRAPHIC], [BREAK, DISCONNECTED]])
def test_whatever_ends_a_ready_connection_is_one_loss(end: list[tuple[int, int]]) -> None:
    """One flipped bit raises a protocol error; losing a ZMTP 2 peer looks like a failed handshake."""
    peer = peer_after(*READY, *end)
    assert (peer.state, peer.losses) == (State.GIVEN_UP, 1)
    assert feed(peer, RETRIED, *READY, *end).losses == 2


@pytest.mark.parametrize("end", [TIMER, BREAK, MALFORMED, AUTH, DISCONNECTED])
def test_what_ends_a_connection_that_was_not_ready_is_no_loss(end: tuple[int, int]) -> None:
    peer = peer_after(CONNECTED, end)
    assert (peer.losses, peer.known) == (0, False)


def test_two_broken_handshakes_in_a_row_are_an_ordinary_restart_and_three_are_not() -> None:
    peer = peer_after(*REFUSED)
    for trouble in (Trouble.REFUSED, Trouble.REFUSED, Trouble.NOT_ZEROMQ):
        assert feed(peer, CONNECTED, BREAK).trouble(0) is trouble
    peer = peer_after(*REFUSED)
    for _ in range(3):
        assert feed(peer, CONNECTED, BREAK, *REFUSED).trouble(0) is Trouble.REFUSED


@pytest.mark.parametrize(
    ("events", "delay", "wanted"),
    [
        ([CONNECTED], 1.1 * HANDSHAKE_LIMIT, "probe"),
        ([CONNECTED, DISCONNECTED], RETRY_DELAY, "probe"),
        ([CONNECTED, MALFORMED], REOPEN_DELAY, "socket"),
        ([CONNECTED, NO_ZMTP], REOPEN_DELAY, "socket"),
        ([*READY, DISCONNECTED], REOPEN_DELAY, "socket"),
        ([], math.inf, ""),
        (REFUSED, math.inf, ""),
        (READY, math.inf, ""),
        ([CONNECTED, AUTH], math.inf, ""),
    ],
)
def test_after_a_while_silence_means_that_a_probe_or_a_new_socket_is_wanted(
    events: list[tuple[int, int]], delay: float, wanted: str
) -> None:
    peer = feed(PeerState(0, HANDSHAKE_LIMIT), *events, now=1)
    assert peer.due == 1 + delay
    assert not peer.wants_probe(peer.due - 0.01)
    assert not peer.wants_new_socket(peer.due - 0.01)
    assert (peer.wants_probe(peer.due), peer.wants_new_socket(peer.due)) == (wanted == "probe", wanted == "socket")


def test_a_new_socket_begins_with_what_was_known_of_the_peer() -> None:
    peer = peer_after(*READY, DISCONNECTED, RETRIED, CONNECTED, MALFORMED)
    peer.restart(2)
    assert (peer.state, peer.losses, peer.known) == (State.CONNECTING, 1, True)
    assert peer.trouble(2) is Trouble.NOT_ZEROMQ


def test_events_that_nobody_reads_do_not_stop_the_socket(context: Context) -> None:
    """At a monitor's high-water mark, libzmq's I/O thread would block (libzmq issue 3745)."""

    def open_hasty() -> Socket:
        socket = open_socket(context, zmq.REQ)
        socket.reconnect_ivl = socket.reconnect_ivl_max = 1
        return socket

    endpoint = free_endpoint()
    connection = Connection(endpoint, open_hasty)
    connection.socket.send(b"hello")
    # Three events for each of some hundred tries a second, and 2,000 of them are the default limit.
    time.sleep(3)
    server = context.socket(zmq.REP)
    bind(server, endpoint)
    until(partial(server.poll, 0))
    until(partial(is_ready, connection))


def is_ready(connection: Connection) -> bool:
    connection.update()
    return connection.peer.ready
