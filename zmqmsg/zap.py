"""Decides which clients may connect: ZAP, ZeroMQ's authentication protocol (RFC 27).

pyzmq's own zmq.auth.thread takes 40 ms to import, because of asyncio.
"""

import time
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.utils import z85

from zmqmsg.clientkeys import SETTLE_TIME, ClientKeys
from zmqmsg.names import plain_address
from zmqmsg.quoting import escape_line
from zmqmsg.refusals import ClientNotices
from zmqmsg.sockets import Context, Socket, new_socket
from zmqmsg.system import start_thread

LOOK_INTERVAL_MS = 50  # between looks for the keys of clients that wait
KEY_SIZE = 32  # bytes


class Question(NamedTuple):
    """A question of libzmq's: may this client connect?"""

    envelope: list[bytes]  # routing id and delimiter
    version: bytes
    number: bytes
    address: str
    public: bytes  # key, in Z85
    asked_at: float  # by time.monotonic()


class Verdict(NamedTuple):
    """An answer to libzmq: a status of ZAP and its text."""

    status: bytes
    text: bytes
    user_id: str = ""  # what sockets say of the client: the name of its key file


UNKNOWN_KEY = Verdict(b"400", b"unknown key")
COME_AGAIN = Verdict(b"300", b"client keys cannot be read just now")


class Admission:
    """Lets in the clients whose keys are known, in a thread of its own.

    Keys that are being changed are waited for, without holding up any other client.
    """

    def __init__(self, keys: ClientKeys, notices: ClientNotices) -> None:
        self._keys = keys
        self._notices = notices
        self._open_questions: list[Question] = []

    def start(self, context: Context) -> None:
        """Begin to answer; the thread ends with ``context``. Raises OSError or Failure."""
        socket = new_socket(context, zmq.ROUTER)
        socket.bind("inproc://zeromq.zap.01")
        start_thread(lambda: self._answer_all(socket))

    def _answer_all(self, socket: Socket) -> None:
        with socket, suppress(zmq.ContextTerminated):
            while True:
                if socket.poll(LOOK_INTERVAL_MS if self._open_questions else None):
                    self._open_questions += read_question(socket.recv_multipart())
                self._scan_if_needed()
                self._open_questions = [
                    question
                    for question in self._open_questions
                    if not self._try_to_answer(question, socket)
                ]

    def _scan_if_needed(self) -> None:
        is_known = [bool(self._keys.find(question.public)) for question in self._open_questions]
        if self._keys.error or not all(is_known):
            self._keys.scan_if_due()

    def _try_to_answer(self, question: Question, socket: Socket) -> bool:
        """Answer ``question`` if that is possible now; return whether it was."""
        verdict = self._judge(question)
        if not verdict:
            return False
        refusal = (
            f"refused a client from {question.address}:"
            f" its public key {question.public.decode()} is not known"
        )
        if verdict == UNKNOWN_KEY:
            self._notices.report(question.address, refusal)
        elif verdict.user_id:
            self._notices.forget(refusal)
        socket.send_multipart(write_answer(question, verdict))
        return True

    def _judge(self, question: Question) -> Verdict | None:
        """Return the verdict, or None while a key that is not known may still come."""
        name = self._keys.find(question.public)
        if name:
            return Verdict(b"200", b"OK", name)
        if self._keys.has_settled():
            was_scanned_since = self._keys.scanned_at >= question.asked_at
            return UNKNOWN_KEY if was_scanned_since else None
        if time.monotonic() < question.asked_at + SETTLE_TIME:
            return None  # the keys are being changed
        return COME_AGAIN if self._keys.error else UNKNOWN_KEY


def read_question(message: list[bytes]) -> list[Question]:
    """Return the question in ``message``; none if it is not about a CURVE client."""
    *envelope, version, number, _domain, address, _identity, mechanism, key = message
    if mechanism != b"CURVE" or len(key) != KEY_SIZE:
        return []
    return [
        Question(
            envelope,
            version,
            number,
            plain_address(address.decode(errors="backslashreplace")),
            z85.encode(key),
            time.monotonic(),
        )
    ]


def write_answer(question: Question, verdict: Verdict) -> list[bytes]:
    """Return the frames of the answer."""
    no_metadata = b""
    return [
        *question.envelope,
        question.version,
        question.number,
        verdict.status,
        verdict.text,
        escape_line(verdict.user_id).encode(),  # pyzmq reads it as UTF-8
        no_metadata,
    ]
