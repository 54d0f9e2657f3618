"""Which clients are let in: those whose public keys are in a file or directory (ZAP, RFC 27)."""

import math
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.utils import z85

from zmqmsg.keyfiles import KeyFileError, load_public_key
from zmqmsg.notices import ClientNotices, Notify, notify
from zmqmsg.sockets import Context, Socket, new_socket
from zmqmsg.system import SHORTAGES, start_thread

SCAN_SHARE = 5  # the next scan begins after so many times the duration of the last one
SETTLE_TIME = 1.0  # seconds for which keys that change, or cannot be read, are looked at again
LOOK_INTERVAL_MS = 50  # between looks for a client that is not known yet
KEY_SIZE = 32  # bytes

Fingerprint = tuple[int, ...]


class KeyFile(NamedTuple):
    """A file of client keys, as it was read."""

    fingerprint: Fingerprint
    public: bytes  # in Z85; empty if the file holds no public key
    fault: str  # why it holds none


class ClientKeys:
    """The public keys in a file, or in the files of a directory, as they are now.

    A known key counts while its file is unchanged, which takes one call of stat(). Any other key
    costs a scan of all files, and scans have a share of the time, so that strangers cannot keep
    clients waiting.
    """

    def __init__(self, path: str, notify_later: Notify) -> None:
        """Read the keys at ``path``; raise KeyFileError if nothing is there that can be read.

        ``notify_later``: gives notices from the thread that calls ``scan_if_due``.
        """
        self.error: OSError | None = None  # why the last scan failed
        self.scanned_at = -math.inf  # when the last scan began that did not fail
        self.changed_at = -math.inf  # when a scan has last found a change
        self._path = path
        self._is_directory = os.path.isdir(path)  # then it is an error if it disappears
        self._files: dict[str, KeyFile] = {}
        self._paths: dict[bytes, str] = {}  # of each key
        self._reported: set[KeyFile] = set()
        self._next_scan_at = -math.inf
        self._notify = notify_later
        check_path(path)
        self._scan()
        if self.error:
            raise KeyFileError(f"cannot read {path}: {self.error.strerror}") from self.error
        for file in self._files.values():
            if file.fault:
                notify(f"{file.fault}; it is ignored", "yellow")
                self._reported.add(file)
        if not self._paths:
            notify(f"no client can connect until there is a public key in {path}", "yellow")

    def find(self, public: bytes) -> str | None:
        """Return the name of the unchanged file that holds ``public`` (Z85), or None."""
        path = self._paths.get(public)
        if not path or fingerprint_of(path) != self._files[path].fingerprint:
            return None
        return os.path.basename(path)

    def scan_if_due(self) -> None:
        """Look at all files again, unless the last scan is too fresh; notify of what is wrong."""
        if time.monotonic() < self._next_scan_at:
            return
        last_error = self.error
        self._scan()
        if self.error and not last_error:
            self._notify(
                f"cannot read the client keys: {self.error.strerror};"
                " clients are not let in until that is over",
                "yellow",
            )
        elif last_error and not self.error:
            self._notify("the client keys can be read again", "cyan")

    def has_settled(self) -> bool:
        """Return whether the keys can be read, and have not changed for a second."""
        return not self.error and time.monotonic() - self.changed_at >= SETTLE_TIME

    def _scan(self) -> None:
        """Take over the keys as they are now: all of them or, with an error, none."""
        began_at = time.monotonic()
        try:
            files = {path: self._read(path) for path in self._list()}
        except OSError as error:
            self.error = error
            self.scanned_at = -math.inf
        else:
            self.error = None
            self.scanned_at = began_at
            self._report_faults(files)
            if files != self._files:
                self.changed_at = began_at
                self._files = files
                self._paths = {file.public: path for path, file in files.items() if file.public}
        ended_at = time.monotonic()
        self._next_scan_at = ended_at + SCAN_SHARE * (ended_at - began_at)

    def _list(self) -> list[str]:
        if not self._is_directory:
            return [self._path]
        with os.scandir(self._path) as entries:
            # Names that begin with a dot are those of drafts, and of the links by which
            # containers get their secrets.
            return [entry.path for entry in entries if not entry.name.startswith(".")]

    def _read(self, path: str) -> KeyFile:
        """Return what a file holds; raise OSError if that cannot be known just now."""
        fingerprint = fingerprint_of(path)
        known = self._files.get(path)
        if known and known.fingerprint == fingerprint:
            return known
        if not fingerprint:  # it has just been removed
            return KeyFile(fingerprint, b"", "")
        try:
            return KeyFile(fingerprint, load_public_key(path, fifo=False), "")
        except KeyFileError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in SHORTAGES:
                raise cause from None
            return KeyFile(fingerprint, b"", str(error))

    def _report_faults(self, files: dict[str, KeyFile]) -> None:
        """Notify of each file that held no key in the last scan either: it is not being written."""
        for path, file in files.items():
            if file.fault and file == self._files.get(path) and file not in self._reported:
                self._notify(f"{file.fault}; it is ignored", "yellow")
                self._reported.add(file)


def check_path(path: str) -> None:
    """Raise KeyFileError if client keys cannot be read from ``path`` again and again."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        raise KeyFileError(
            f"{path} does not exist; pass a public key file, or a directory of them"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise KeyFileError(
            f"{path} can be read only once, and client keys are read again for each client;"
            " pass a file or directory"
        )


def fingerprint_of(path: str) -> Fingerprint:
    """Return what changes whenever the contents of the file do; nothing if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    # On Windows, ctime is the time of creation; elsewhere, mtime can be set back.
    return status.st_ino, status.st_size, status.st_ctime_ns, status.st_mtime_ns


class ZapRequest(NamedTuple):
    """What libzmq asks of a client that wants to connect."""

    envelope: list[bytes]  # routing id and delimiter
    version: bytes
    request_id: bytes
    address: str
    public: bytes  # in Z85
    asked_at: float  # by time.monotonic()


class Admission:
    """Decides in a thread of its own which clients are let in, by their keys."""

    # pyzmq's own zmq.auth.thread takes 40 ms to import, because of asyncio.

    def __init__(self, keys: ClientKeys, notices: ClientNotices) -> None:
        self._keys = keys
        self._notices = notices
        self._undecided: list[ZapRequest] = []  # an answer may take a while, and holds up no other

    def start(self, context: Context) -> None:
        """Begin to answer; the thread ends with ``context``. Raises OSError."""
        socket = new_socket(context, zmq.ROUTER)
        socket.bind("inproc://zeromq.zap.01")
        start_thread(lambda: self._work(socket))

    def _work(self, socket: Socket) -> None:
        with socket, suppress(zmq.ContextTerminated):
            while True:
                if socket.poll(LOOK_INTERVAL_MS if self._undecided else None):
                    self._undecided += read_zap_request(socket.recv_multipart())
                for reply in self._decide():
                    socket.send_multipart(reply)

    def _decide(self) -> Iterator[list[bytes]]:
        """Yield the replies to all requests that can be decided now."""
        requests, self._undecided = self._undecided, []
        if self._keys.error or any(not self._keys.find(each.public) for each in requests):
            self._keys.scan_if_due()
        for request in requests:
            name = self._keys.find(request.public)
            notice = (
                f"refused a client from {request.address}:"
                f" its public key {request.public.decode()} is not known"
            )
            if name:
                self._notices.forget(notice)
                yield reply_to(request, b"200", b"OK", name)
            elif not self._is_final(request):
                self._undecided.append(request)
            elif self._keys.error:
                yield reply_to(request, b"300", b"client keys cannot be read just now")
            else:
                self._notices.report(request.address, notice)
                yield reply_to(request, b"400", b"unknown key")

    def _is_final(self, request: ZapRequest) -> bool:
        """Return whether a key that is not known will not be known any sooner."""
        if self._keys.has_settled():
            return self._keys.scanned_at >= request.asked_at
        return time.monotonic() >= request.asked_at + SETTLE_TIME


def read_zap_request(message: list[bytes]) -> list[ZapRequest]:
    """Return the request in ``message``; none if it is not about a CURVE client."""
    *envelope, version, request_id, _domain, address, _identity, mechanism, key = message
    if mechanism != b"CURVE" or len(key) != KEY_SIZE:
        return []
    return [
        ZapRequest(
            envelope,
            version,
            request_id,
            address.decode(errors="backslashreplace"),
            z85.encode(key),
            time.monotonic(),
        )
    ]


def reply_to(request: ZapRequest, status: bytes, text: bytes, user_id: str = "") -> list[bytes]:
    """Return the ZAP reply: 200 let it in, 300 come again later, 400 refused."""
    no_metadata = b""
    return [
        *request.envelope,
        request.version,
        request.request_id,
        status,
        text,
        user_id.encode(errors="backslashreplace"),  # pyzmq reads it as UTF-8
        no_metadata,
    ]
