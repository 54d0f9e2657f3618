import threading

import pytest
import zmq

from zmqmsg.monitor import Connection
from zmqmsg.reply import Echo
from zmqmsg.sockets import Context, bound, open_socket

from conftest import LIMIT, bind, echoing


def ask(context: Context, endpoint: str, *frames: bytes) -> list[bytes]:
    with context.socket(zmq.REQ) as client:
        client.linger = 0
        client.connect(endpoint)
        client.send_multipart(frames)
        assert client.poll(LIMIT * 1000)
        return client.recv_multipart()


def test_a_request_is_echoed_with_all_its_frames_and_taken(context: Context) -> None:
    with echoing(context, "inproc://server", count=2) as (endpoint, taken):
        assert ask(context, endpoint, b"one", b"", b"\xff\0") == [b"one", b"", b"\xff\0"]
        assert ask(context, endpoint, b"") == [b""]
    assert taken == [[b"one", b"", b"\xff\0"], [b""]]


def test_it_stops_after_as_many_requests_as_it_was_told(context: Context) -> None:
    with open_socket(context, zmq.REP) as socket, bound(socket, "inproc://server") as endpoint:
        echo = Echo(count=3)
        thread = threading.Thread(target=echo.run, args=(socket, []))
        thread.start()
        for _ in range(3):
            ask(context, endpoint, b"hello")
        thread.join(LIMIT)
        assert echo.served == 3
        with context.socket(zmq.REQ) as client:
            client.linger = 0
            client.connect(endpoint)
            client.send(b"one more")
            assert not client.poll(200)


def test_a_reply_is_sent_before_its_request_is_taken(context: Context) -> None:
    answered = threading.Event()

    def take(_frames: list[zmq.Frame]) -> None:
        assert answered.wait(LIMIT)

    with open_socket(context, zmq.REP) as socket, bound(socket, "inproc://server") as endpoint:
        thread = threading.Thread(target=Echo(take, 1).run, args=(socket, []))
        thread.start()
        assert ask(context, endpoint, b"hello") == [b"hello"]
        answered.set()
        thread.join(LIMIT)


def test_what_taking_raises_ends_it_when_the_reply_is_on_its_way(context: Context) -> None:
    def take(_frames: list[zmq.Frame]) -> None:
        raise BrokenPipeError

    with open_socket(context, zmq.REP) as socket, bound(socket, "inproc://server") as endpoint:
        echo = Echo(take)
        with context.socket(zmq.REQ) as client:
            client.connect(endpoint)
            client.send(b"hello")
            with pytest.raises(BrokenPipeError):
                echo.run(socket, [])
            assert client.recv() == b"hello"
        assert echo.served == 1


def test_it_serves_what_it_binds_and_what_it_connects_to(context: Context) -> None:
    queue = context.socket(zmq.DEALER)
    back_end = bind(queue)
    worker = Connection(back_end, lambda: open_socket(context, zmq.REP), print)
    with open_socket(context, zmq.REP) as socket, bound(socket, "inproc://server") as endpoint:
        thread = threading.Thread(target=Echo(count=2).run, args=(socket, [worker]))
        thread.start()
        assert ask(context, endpoint, b"direct") == [b"direct"]
        queue.send_multipart([b"", b"queued"])
        assert queue.poll(LIMIT * 1000)
        assert queue.recv_multipart() == [b"", b"queued"]
        thread.join(LIMIT)
        worker.close()


def test_a_request_without_the_empty_delimiter_is_passed_over(context: Context) -> None:
    with echoing(context, "tcp://127.0.0.1:*", count=1) as (endpoint, taken), context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        dealer.send_multipart([b"no", b"delimiter"])
        dealer.send_multipart([b"", b"proper"])
        assert dealer.poll(LIMIT * 1000)
        assert dealer.recv_multipart() == [b"", b"proper"]
    assert taken == [[b"proper"]]
