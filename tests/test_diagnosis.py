"""What a look finds at an endpoint: peers that speak by hand, sockets of libzmq, and nobody."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from zmqmsg.diagnosis import Finding, diagnose, resolve
from zmqmsg.quoting import escape_line
from zmqmsg.sockets import Context

from conftest import POSIX, listening, open_server
from zmtp import OTHER_PROTOCOLS, Talk, command, echo_as_zmtp_1, echo_as_zmtp_2, greeting, say, say_and_hang_up
from zmtp import shake_hands as greet_as

with suppress(ImportError):  # Windows has none
    import resource

SIGNATURE = greeting()[:10]
WANTED = ("REP", "ROUTER")
CLOSED = Finding("connected, but the connection was closed during the ZeroMQ handshake")


def hopeless(reason: str) -> Finding:
    return Finding(reason, hopeless=True)


def findings(endpoint: str, *, curve: bool = False, was_ready: bool = False) -> Iterator[Finding]:
    return diagnose(endpoint, WANTED, curve=curve, was_ready=was_ready)


def last(endpoint: str, *, curve: bool = False) -> Finding:
    return list(findings(endpoint, curve=curve))[-1]


PEERS: dict[str, tuple[Talk, Finding, Finding]] = {
    "REP": (partial(greet_as, b"REP"), Finding(""), hopeless("it does not use CURVE: is it the right server?")),
    "PUB": (
        partial(greet_as, b"PUB"),
        hopeless("it is a PUB socket, not a REP or ROUTER"),
        hopeless("it does not use CURVE: is it the right server?"),
    ),
    "CURVE": (partial(say, greeting(b"CURVE")), hopeless("it requires CURVE; pass --server-key"), Finding("")),
    "PLAIN": (
        partial(say, greeting(b"PLAIN")),
        hopeless("it requires PLAIN, which zmqmsg does not speak"),
        hopeless("it requires PLAIN, which zmqmsg does not speak"),
    ),
    "GSSAPI": (
        partial(say, greeting(b"GSSAPI")),
        hopeless("it requires GSSAPI, which zmqmsg does not speak"),
        hopeless("it requires GSSAPI, which zmqmsg does not speak"),
    ),
    "ZMTP 2": (echo_as_zmtp_2, Finding("", old=True), hopeless("it speaks ZMTP 2, which is too old for CURVE")),
    "PULL of ZMTP 2": (
        partial(say, SIGNATURE + b"\1\7\0\0"),
        Finding("it is a PULL socket, not a REP or ROUTER", hopeless=True, old=True),
        hopeless("it speaks ZMTP 2, which is too old for CURVE"),
    ),
    "ZMTP 1": (echo_as_zmtp_1, Finding("", old=True), hopeless("it speaks ZMTP 1, which is too old for CURVE")),
    "ZMTP 1 with an identity": (
        partial(say, b"\6\0alice"),
        Finding("", old=True),
        hopeless("it speaks ZMTP 1, which is too old for CURVE"),
    ),
    "closes at once": (lambda connection: None, CLOSED, CLOSED),
    "closes in its signature": (partial(say_and_hang_up, SIGNATURE[:5]), CLOSED, CLOSED),
    "closes after its signature": (partial(say_and_hang_up, SIGNATURE), CLOSED, CLOSED),
    "error": (
        partial(say, greeting() + command(b"ERROR", b"\x03400")),
        Finding(""),
        hopeless("it does not use CURVE: is it the right server?"),
    ),
    "long READY": (
        partial(say, greeting() + b"\6" + (300).to_bytes(8) + b"\5READY\x0bSocket-Type\0\0\0\3SUB" + bytes(275)),
        hopeless("it is a SUB socket, not a REP or ROUTER"),
        hopeless("it does not use CURVE: is it the right server?"),
    ),
}


@pytest.mark.parametrize("curve", [False, True], ids=["NULL", "CURVE"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_is_what_it_says_it_is(peer: str, curve: bool) -> None:
    talk, *expected = PEERS[peer]
    with listening(talk) as endpoint:
        assert last(endpoint, curve=curve) == expected[curve]


@pytest.mark.parametrize("protocol", OTHER_PROTOCOLS)
def test_the_first_words_of_another_protocol_are_quoted(protocol: str) -> None:
    talk, words = OTHER_PROTOCOLS[protocol]
    with listening(talk) as endpoint:
        found = last(endpoint)
    assert found.hopeless
    assert found.reason.startswith("it does not speak ZeroMQ; it says '")
    assert words in escape_line(found.reason)


@pytest.mark.parametrize(
    "socket_type", ["PAIR", "PUB", "SUB", "REQ", "REP", "DEALER", "ROUTER", "PULL", "PUSH", "XPUB", "XSUB"]
)
def test_the_type_of_a_socket_of_libzmq_is_seen(context: Context, socket_type: str) -> None:
    _peer, endpoint = open_server(context, zmq.SocketType[socket_type])
    wrong = hopeless(f"it is a {socket_type} socket, not a REP or ROUTER")
    assert last(endpoint) == (Finding("") if socket_type in WANTED else wrong)


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_mute_port_is_told_as_that_and_looked_at_until_it_speaks(
    monkeypatch: pytest.MonkeyPatch, was_ready: bool
) -> None:
    monkeypatch.setattr("zmqmsg.diagnosis.GREETING_DELAY", 0.1)
    likely = "the server may be hung" if was_ready else "wrong port, or a hung server?"
    mute = "connected, but no ZeroMQ greeting yet"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        looking = findings(f"tcp://127.0.0.1:{listener.getsockname()[1]}", was_ready=was_ready)
        reasons = [next(looking).reason for _ in range(4)]
        assert reasons[2:] == [mute, f"{mute}; {likely}"]
        with listener.accept()[0] as connection:
            connection.sendall(b"SSH-2.0\n")
            assert next(looking).hopeless


def unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    return listener


@POSIX
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("tcp://127.0.0.1:1", "connection refused"),
        ("tcp://[::1]:1", "connection refused"),
        ("tcp://localhost:1", "connection refused"),
        ("tcp://no.such.name.invalid:5555", "cannot resolve no.such.name.invalid: "),
        ("tcp://a..b:5555", "cannot resolve a..b: not a valid name"),
        ("ipc://{}/missing", "no such file or directory"),
        ("ipc://{}/stale", "connection refused"),
        ("ipc://{}/file/below", "not a directory"),
        ("ipc://@zmqmsg-nobody", "connection refused"),
    ],
)
def test_where_nobody_is_the_system_says_why(tmp_path: Path, endpoint: str, reason: str) -> None:
    unix_listener(tmp_path / "stale").close()
    (tmp_path / "file").touch()
    found = last(endpoint.format(tmp_path))
    assert found.reason.startswith(reason)
    assert not found.hopeless


def test_a_socket_that_is_connected_to_itself_counts_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP can connect to a free port from that very port."""
    connect = socket.socket.connect

    def connect_to_itself(self: socket.socket, address: tuple[str, int]) -> None:
        self.bind(address)
        connect(self, address)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("socket.socket.connect", connect_to_itself)
    assert last(f"tcp://127.0.0.1:{port}") == Finding("connection refused")


def resolving_to(*addresses: str) -> Callable[..., object]:
    """Return what the system's resolver would be if a name had these addresses."""

    def getaddrinfo(_host: str, port: int, **_options: int) -> list[object]:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    return getaddrinfo


@POSIX
def test_each_address_of_a_name_is_tried_ipv4_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(partial(greet_as, b"PUSH")) as endpoint:
        monkeypatch.setattr("socket.getaddrinfo", resolving_to("::1", "127.0.0.2", "127.0.0.1"))
        port = endpoint.rpartition(":")[2]
        assert last(f"tcp://some.name:{port}") == hopeless("it is a PUSH socket, not a REP or ROUTER")
        families = [family for family, _address in resolve("tcp://some.name:1")]
        assert families == [socket.AF_INET, socket.AF_INET, socket.AF_INET6]


@POSIX
def test_too_few_descriptors_are_told_as_that() -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        assert last("tcp://127.0.0.1:1") == Finding("too many open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
