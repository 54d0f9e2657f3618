import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest
import zmq

from zmqmsg.monitor import Connection
from zmqmsg.request import Requester
from zmqmsg.sockets import Context, Failure, open_socket

from conftest import LIMIT, bind, echoing


class Client:
    """A requester, and what it told."""

    def __init__(self, context: Context, endpoints: Sequence[str], **options: float) -> None:
        self.told: list[str] = []
        self.connections = [
            Connection(endpoint, lambda: open_socket(context, zmq.REQ, max_size=1000), self.told.append)
            for endpoint in endpoints
        ]
        self.requester = Requester(self.connections, self.told.append, **options)  # type: ignore[arg-type]

    def ask(self, *frames: bytes) -> list[bytes]:
        return [frame.bytes for frame in self.requester.ask(frames)]


@pytest.fixture
def client(context: Context) -> Iterator[Callable[..., Client]]:
    """Make a client of endpoints; its sockets are closed after the test."""
    with ExitStack() as stack:

        def client(*endpoints: str, **options: float) -> Client:
            made = Client(context, endpoints, **options)
            for connection in made.connections:
                stack.callback(connection.close)
            return made

        yield client


class Server:
    """A server that deals with its requests one after the other, in a thread."""

    def __init__(
        self,
        context: Context,
        *answers: Callable[[zmq.Socket[bytes], list[bytes]], None],
        endpoint: str = "tcp://127.0.0.1:*",
    ) -> None:
        self.requests: list[list[bytes]] = []
        self._socket = context.socket(zmq.ROUTER)
        self.endpoint = bind(self._socket, endpoint)
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            if not self._socket.poll(LIMIT * 1000):
                break
            identity, _empty, *frames = self._socket.recv_multipart()
            self.requests.append(frames)
            answer(self._socket, [identity, b"", *frames])
        self._socket.close(linger=1000)

    def join(self) -> list[list[bytes]]:
        """Wait until all answers are given, and return the requests."""
        self._thread.join(LIMIT)
        return self.requests


def echo(socket: zmq.Socket[bytes], message: list[bytes]) -> None:
    """Answer a request with itself."""
    socket.send_multipart(message)


def ignore(_socket: zmq.Socket[bytes], _message: list[bytes]) -> None:
    """Leave a request without a reply."""


def die(socket: zmq.Socket[bytes], _message: list[bytes]) -> None:
    """Close without a reply."""
    socket.close(linger=0)


@pytest.mark.parametrize("endpoint", ["inproc://server", "tcp://127.0.0.1:*"])
def test_replies_come_in_the_order_of_the_requests(
    context: Context, client: Callable[..., Client], endpoint: str
) -> None:
    with echoing(context, endpoint, count=100) as (real, taken):
        asker = client(real)
        assert [asker.ask(b"%d" % number) for number in range(100)] == [[b"%d" % number] for number in range(100)]
    assert taken == [[b"%d" % number] for number in range(100)]
    assert asker.told == []


def test_frames_come_back_as_they_went(context: Context, client: Callable[..., Client]) -> None:
    frames = [b"", b"a\nb", b"\0\xff", b"", b"x" * 100_000]
    with echoing(context, "inproc://server", count=1) as (endpoint, _taken):
        assert client(endpoint).ask(*frames) == frames


def test_the_client_may_come_before_the_server_over_inproc_as_well(
    context: Context, client: Callable[..., Client]
) -> None:
    replies: list[list[bytes]] = []
    asker = client("inproc://later")
    thread = threading.Thread(target=lambda: replies.append(asker.ask(b"early")))
    thread.start()
    with echoing(context, "inproc://later", count=1):
        thread.join(LIMIT)
    assert replies == [[b"early"]]


def test_a_slow_reply_is_waited_for_and_told_once(context: Context, client: Callable[..., Client]) -> None:
    def answer_late(socket: zmq.Socket[bytes], message: list[bytes]) -> None:
        time.sleep(2.2)
        echo(socket, message)

    server = Server(context, answer_late)
    asker = client(server.endpoint)
    assert asker.ask(b"slow") == [b"slow"]
    assert asker.told == [f"waiting for the reply of {server.endpoint}"]


def test_a_request_whose_time_is_over_is_sent_again(context: Context, client: Callable[..., Client]) -> None:
    server = Server(context, ignore, echo)
    asker = client(server.endpoint, timeout=0.3)
    assert asker.ask(b"again") == [b"again"]
    assert asker.told == [f"no reply within 0.3 s from {server.endpoint}, trying again (1 of 3)"]
    assert server.join() == [[b"again"], [b"again"]]


def test_it_is_sent_once_and_as_often_as_retries_say(context: Context, client: Callable[..., Client]) -> None:
    server = Server(context, ignore, ignore, ignore, echo)
    with pytest.raises(Failure, match=r"no reply to 'again', sent 3 times: no reply within 0\.2 s"):
        client(server.endpoint, timeout=0.2, retries=2).ask(b"again")
    client(server.endpoint).ask(b"another")
    assert server.join() == [[b"again"]] * 3 + [[b"another"]]


def test_without_retries_it_is_sent_at_most_once(context: Context, client: Callable[..., Client]) -> None:
    server = Server(context, ignore, echo)
    with pytest.raises(Failure, match="no reply to 'once', sent once"):
        client(server.endpoint, timeout=0.2, retries=0).ask(b"once")
    client(server.endpoint).ask(b"another")
    assert server.join() == [[b"once"], [b"another"]]


def test_a_late_reply_is_not_taken_for_that_of_a_later_request(context: Context, client: Callable[..., Client]) -> None:
    late: list[list[bytes]] = []

    def answer_both(socket: zmq.Socket[bytes], message: list[bytes]) -> None:
        socket.send_multipart(late[0])
        socket.send_multipart(message)

    server = Server(context, lambda _socket, message: late.append(message), answer_both)
    asker = client(server.endpoint, timeout=0.3, retries=0)
    with pytest.raises(Failure):
        asker.ask(b"first")
    assert asker.ask(b"second") == [b"second"]


def test_a_message_that_was_never_sent_is_given_up_at_once(client: Callable[..., Client]) -> None:
    asker = client("tcp://127.0.0.1:1", timeout=0.4)
    started = time.monotonic()
    with pytest.raises(Failure, match=r"no server at tcp://127.0.0.1:1 within 0\.4 s: nothing accepts connections"):
        asker.ask(b"hello")
    assert 0.4 <= time.monotonic() - started < 2
    assert asker.told == []


def test_a_later_attempt_that_finds_no_server_is_a_failed_attempt_like_any_other(
    context: Context, client: Callable[..., Client]
) -> None:
    server = Server(context, ignore)
    asker = client(server.endpoint, timeout=0.3, retries=2)
    with pytest.raises(Failure, match="no reply to 'hello', sent "):
        asker.ask(b"hello")
    assert [notice.partition(", trying")[2] for notice in asker.told if "trying" in notice] == [
        " again (1 of 2)",
        " again (2 of 2)",
    ]
    server.join()


def test_a_server_that_closes_right_behind_its_reply_has_answered(
    context: Context, client: Callable[..., Client]
) -> None:
    """With IMMEDIATE=1, libzmq throws away what lies unread in the pipe of a broken connection."""
    for _ in range(100):
        server = Server(context, echo)
        asker = client(server.endpoint, retries=0)
        assert asker.ask(b"last words") == [b"last words"]
        server.join()


def test_a_server_that_is_replaced_between_two_requests_costs_no_attempt(
    context: Context, client: Callable[..., Client]
) -> None:
    server = Server(context, echo)
    asker = client(server.endpoint, retries=0)
    assert asker.ask(b"one") == [b"one"]
    server.join()
    assert asker.connections[0].monitor.poll(LIMIT * 1000)
    time.sleep(0.01)  # no stream is that slow, and no reconnection that fast
    successor = Server(context, echo, endpoint=server.endpoint)
    assert asker.ask(b"two") == [b"two"]
    assert successor.join() == [[b"two"]]


def test_servers_take_turns(context: Context, client: Callable[..., Client]) -> None:
    with (
        echoing(context, "tcp://127.0.0.1:*", 3) as (one, first),
        echoing(context, "tcp://127.0.0.1:*", 3) as (two, second),
    ):
        asker = client(one, two)
        for number in range(6):
            asker.ask(b"%d" % number)
    assert sorted([first[0], second[0]]) == [[b"0"], [b"1"]]
    assert len(first) == len(second) == 3


def test_a_dead_server_among_living_ones_holds_nobody_up(context: Context, client: Callable[..., Client]) -> None:
    with echoing(context, "tcp://127.0.0.1:*", 10) as (living, _taken):
        asker = client("tcp://127.0.0.1:1", living, "tcp://no.such.name.invalid:5")
        started = time.monotonic()
        for _ in range(10):
            asker.ask(b"hello")
        assert time.monotonic() - started < 1
    assert asker.told == []


def test_a_request_goes_on_to_another_server_when_its_own_dies(context: Context, client: Callable[..., Client]) -> None:
    dying = Server(context, die)
    with echoing(context, "tcp://127.0.0.1:*", 2) as (living, _taken):
        asker = client(dying.endpoint, living)
        assert [asker.ask(b"one"), asker.ask(b"two")] == [[b"one"], [b"two"]]
    assert any("lost, trying again (1 of 3)" in notice for notice in asker.told)


def test_waiting_ends_when_the_reader_of_the_output_is_gone(context: Context, client: Callable[..., Client]) -> None:
    server = Server(context, ignore)
    reader, writer = os.pipe()
    asker = client(server.endpoint, output=writer)
    threading.Timer(0.3, os.close, [reader]).start()
    with pytest.raises(BrokenPipeError):
        asker.ask(b"hello")
    os.close(writer)
    server.join()


def test_an_error_quotes_the_start_of_what_was_unanswered(context: Context, client: Callable[..., Client]) -> None:
    server = Server(context, ignore)
    with pytest.raises(Failure, match="no reply to '" + "x" * 40 + r"'\.\.\., sent once"):
        client(server.endpoint, timeout=0.2, retries=0).ask(b"x" * 41, b"frame")
    server.join()
