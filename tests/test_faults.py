"""Delivery over damaged connections: nothing is lost, and nothing is served twice unasked."""

import random
import re
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import pytest

from conftest import POSIX, Send, Serve, relay, soak, waits

# Seconds: of an attempt, in which a busy machine connects and answers, too; and of a stall.
TIMEOUT = 1.0
STALL = 1.3


class Faults:
    """Passes data on, and now and then does one kind of damage. It counts what it did."""

    # Under NULL nobody could tell that bytes were damaged, lost or doubled.
    KINDS = ("cut", "reset", "truncate", "half-close", "stall", "split")
    KINDS_WITH_CURVE = (*KINDS, "flip a bit", "duplicate a byte", "drop a byte")

    def __init__(self, seed: int, rate: float, *, curve: bool) -> None:
        self.done: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._rate = rate
        self._kinds = self.KINDS_WITH_CURVE if curve else self.KINDS

    def forward(self, data: bytes, target: socket.socket, upstream: bool) -> None:
        if self._random.random() >= self._rate:
            target.sendall(data)
            return
        kind = self._random.choice(self._kinds)
        self.done[kind] += 1
        if kind in self.KINDS:
            self._disturb(kind, data, target)
        else:
            target.sendall(self._damage(kind, data))

    def _disturb(self, kind: str, data: bytes, target: socket.socket) -> None:
        """Disturb the connection; what is passed on of ``data`` is right."""
        match kind:
            case "cut":
                raise ConnectionAbortedError
            case "reset":
                target.shutdown(socket.SHUT_RD)  # wakes whoever reads from it
                target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                target.close()
                raise ConnectionResetError
            case "truncate":
                target.sendall(data[: self._random.randrange(len(data))])
                raise ConnectionAbortedError
            case "half-close":
                target.shutdown(socket.SHUT_WR)
            case "stall":
                time.sleep(STALL)  # nothing must be passed on
                target.sendall(data)
            case "split":
                for number in range(len(data)):
                    target.sendall(data[number : number + 1])

    def _damage(self, kind: str, data: bytes) -> bytes:
        """Return ``data`` with a byte changed, doubled or lost."""
        # In what is encrypted of the last frame: a damaged length may be too large a frame.
        place = self._random.randrange(max(0, len(data) - 16), max(1, len(data) - 1))
        before, damaged, after = data[:place], data[place], data[place + 1 :]
        match kind:
            case "flip a bit":
                return before + bytes([damaged ^ 1 << self._random.randrange(8)]) + after
            case "duplicate a byte":
                return before + bytes([damaged, damaged]) + after
            case _:
                return before + after


@pytest.fixture(params=["NULL", "CURVE"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Options of a server and of its client, with and without keys."""
    if request.param == "NULL":
        return [], []
    return ["--key", f"{tmp_path}/server.key_secret"], ["--server-key", f"{tmp_path}/server.key"]


def lines(messages: list[str]) -> bytes:
    return "".join(f"{message}\n" for message in messages).encode()


@waits
@POSIX
@pytest.mark.parametrize(
    ("count", "rate"), [(250, 1 / 50), pytest.param(60_000, 1 / 1000, id="full", marks=soak)]
)
def test_every_reply_comes_once_and_in_order_over_damaged_connections(
    serve: Serve, send: Send, keys: tuple[list[str], list[str]], count: int, rate: float
) -> None:
    _server, endpoint = serve("--quiet", *keys[0])
    faults = Faults(1, rate, curve=bool(keys[0]))
    messages = [f"message {number}" for number in range(count)]
    with relay(endpoint, faults.forward) as damaged:
        options = ["--connect", damaged, "--timeout", str(TIMEOUT), "--retries", "50", *keys[1]]
        done = send(*options, input=lines(messages), timeout=800)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout == lines(messages)
    assert faults.done.total() > 5


@waits
@POSIX
@pytest.mark.parametrize(
    ("count", "rate"), [(100, 1 / 30), pytest.param(60_000, 1 / 1000, id="full", marks=soak)]
)
def test_without_retries_nothing_is_served_twice_and_the_status_is_true(
    serve: Serve,
    send: Send,
    keys: tuple[list[str], list[str]],
    tmp_path: Path,
    count: int,
    rate: float,
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        server, endpoint = serve(*keys[0], stdout=file)
    faults = Faults(2, rate, curve=bool(keys[0]))
    replied: list[str] = []
    failed: dict[int, list[str]] = {1: [], 3: []}  # by exit status
    rest = [f"message {number}" for number in range(count)]
    with relay(endpoint, faults.forward) as damaged:
        once = ["--connect", damaged, "--timeout", str(TIMEOUT), "--retries", "0", *keys[1]]
        while rest:
            done = send(*once, input=lines(rest), timeout=800)
            replies = done.stdout.decode().splitlines()
            assert replies == rest[: len(replies)]
            replied += replies
            rest = rest[len(replies) :]
            if done.returncode:
                failed[done.returncode].append(rest.pop(0))
    server.popen.terminate()
    assert server.wait() == 0
    served = Counter(log.read_text().splitlines())
    assert set(served.values()) == {1}
    assert set(replied) <= set(served)
    assert not set(failed[1]) & set(served)
    assert failed[3]


@soak
@pytest.mark.parametrize(
    "options", [[], ["--timeout", "20", "--retries", "0"]], ids=["", "timeout"]
)
def test_a_slow_link_is_waited_for_and_nothing_false_is_said(
    serve: Serve, send: Send, keys: tuple[list[str], list[str]], options: list[str]
) -> None:
    round_trip = 1.5 if keys[0] else 3

    def forward(data: bytes, target: socket.socket, _upstream: bool) -> None:
        time.sleep(round_trip / 2)  # that makes the link slow
        target.sendall(data)

    _, endpoint = serve(*keys[0])
    with relay(endpoint, forward) as slow:
        done = send("--connect", slow, *keys[1], *options, "x", timeout=60)
    assert (done.returncode, done.stdout) == (0, b"x\n")
    true = "no ZeroMQ greeting yet|handshake is not finished yet|connected to|for a reply"
    assert not [line for line in done.stderr.decode().splitlines() if not re.search(true, line)]
