"""CURVE keys: load and create them, apply them to sockets, and decide which clients are let in (ZAP, RFC 27)."""

import errno
import math
import os
import re
import shlex
import stat
import struct
import time
from contextlib import suppress
from functools import partial
from itertools import islice

import click
import zmq
from zmq.utils import z85

from zmqmsg.console import ClientNotices, notify
from zmqmsg.sockets import ApplyKeys, Context, Socket, new_socket
from zmqmsg.system import SHORTAGES, others_may_read, start_thread

KEY_FILE_LIMIT = 65536  # bytes that a key file may have
SCAN_SHARE = 5  # for unknown keys, all files are scanned again after so many times the duration of the last scan
WATCHED_FILES = 16  # files without a key that are looked at for each unknown key: they may have been half written
NO_KEY = b"0" * 40  # 32 zero bytes: of a program that was never given a key
EXAMPLE = 'it has a line like this one: public-key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"'

Fingerprint = tuple[int, ...]

_HALF = re.compile(rb'^\s*(public|secret)-key\s*=\s*"([^"\n]*)"', re.MULTILINE)


def load_keys(
    key: str | None, server_key: str | None, client_keys: str | None = None
) -> tuple[ApplyKeys, ApplyKeys]:
    """Return two functions that give keys to a socket which is not bound or connected yet: a server's, and a client's.

    The server has ``key``, and lets in the holders of ``client_keys``, or else anybody. The client has ``key``, or else
    a key of this run only, and asks the server with ``server_key``. Raises UsageError, naming the file.
    """
    # Each file is read once, as it may be a FIFO, and all others before the key is created.
    server = load_public_key(server_key) if server_key else b""
    clients = ClientKeys(client_keys) if client_keys is not None else None
    public, secret = load_key_pair(key) if key else zmq.curve_keypair()

    def apply_to_server(socket: Socket) -> None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = public, secret, True
        if clients:
            start_zap_handler(socket.context, clients)
            socket.zap_domain = b"zmqmsg"
            # Without it, libzmq would let everybody in if there were no ZAP handler.
            socket.zap_enforce_domain = True

    def apply_to_client(socket: Socket) -> None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = (
            public,
            secret,
            server,
        )

    return apply_to_server, apply_to_client


# Key files, as pyzmq and CZMQ have them


def load_key_pair(path: str) -> tuple[bytes, bytes]:
    """Return the public and the secret key in a file; create it, or its public half, if missing. Raises UsageError."""
    public_file = public_path(path)
    # First: another process that creates both files now begins with the secret one.
    public_exists = os.path.lexists(public_file)
    created = False
    if not os.path.exists(path):
        if public_exists:
            raise click.UsageError(
                f"cannot create key file {public_file}: {os.strerror(errno.EEXIST)}"
            )
        created = _write(path, _certificate(*zmq.curve_keypair()), 0o600)
    public, secret, status = _load(path, fifo=True)
    if not secret:
        raise click.UsageError(f"{path} is a public key; pass the secret key file")
    if others_may_read(status):
        raise click.UsageError(
            f"others may read the secret key in {path}; run: chmod 600 {shlex.quote(path)}"
        )
    if stat.S_ISREG(status.st_mode) and not os.path.lexists(public_file):
        try:
            _write(public_file, _certificate(public), 0o644)
        except click.UsageError:
            if created:  # otherwise it is not needed here
                raise
    if created:
        notify(f"created {path}; give its public half, {public_file}, to your peers")
    return public, secret


def load_public_key(path: str, *, fifo: bool = True) -> bytes:
    """Return the public key in the file at ``path``; raise UsageError if it is none, or a secret one."""
    public, secret, _status = _load(path, fifo=fifo)
    if secret:
        raise click.UsageError(f"{path} is a secret key; pass its public half, {public_path(path)}")
    return public


def public_path(path: str) -> str:
    """Return where the public half of the secret key file at ``path`` is."""
    return path.removesuffix("_secret") if path.endswith("_secret") else f"{path}.pub"


def _load(path: str, *, fifo: bool) -> tuple[bytes, bytes, os.stat_result]:
    """Return both keys in a file, the secret one empty if there is none, and the status of the file.

    ``fifo``: whether it may be a FIFO, which is waited for. Raises UsageError, from an OSError if it cannot be read.
    """
    try:
        kind = os.stat(
            path
        ).st_mode  # before it is opened, which would wait for the writer of a FIFO
        if not (stat.S_ISREG(kind) or (fifo and stat.S_ISFIFO(kind))):
            raise click.UsageError(f"{path} is not a CURVE key file: it is not a regular file")
        with open(path, "rb") as file:
            status, data = os.fstat(file.fileno()), file.read(KEY_FILE_LIMIT + 1)
    except OSError as error:
        raise click.UsageError(f"cannot read key file {path}: {error.strerror}") from error
    if len(data) > KEY_FILE_LIMIT:
        raise click.UsageError(f"{path} is not a CURVE key file: it is too large")
    halves = dict(reversed(_HALF.findall(data))) or {b"public": data.rstrip(b"\0").strip()}
    public, secret = halves.get(b"public", b""), halves.get(b"secret", b"")
    try:
        valid = all(len(z85.decode(half)) == 32 for half in halves.values())
    except (ValueError, LookupError, struct.error):  # from pyzmq
        valid = False
    if not valid:
        raise click.UsageError(f"{path} is not a CURVE key file: {EXAMPLE}")
    derived = zmq.curve_public(secret) if secret else public
    if (public or derived) != derived or NO_KEY in (public, secret):
        problem = "its halves are no pair, or zeros; make a new one"
        raise click.UsageError(f"{path} is a key that works with nobody: {problem}")
    return derived, secret, status


def _certificate(public: bytes, secret: bytes = b"") -> str:
    text = f'metadata\ncurve\n    public-key = "{public.decode()}"\n'
    return text + f'    secret-key = "{secret.decode()}"\n' if secret else text


def _write(path: str, text: str, mode: int) -> bool:
    """Create the file at ``path``, whole or not at all; return False if there is one. Raises UsageError."""
    # pyzmq's own writer overwrites files, and lets others read the secret.
    draft = f"{path}.{os.urandom(8).hex()}"
    try:
        with open(draft, "x", opener=partial(os.open, mode=mode)) as file:
            file.write(text)
        try:
            os.link(draft, path)
        except OSError:  # it exists, or there are no hard links here, as on FAT
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise click.UsageError(f"cannot create key file {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.unlink(draft)
    return True


# Which clients are let in


class ClientKeys:
    """The public keys in a file, or in the files of a directory, as they are at each look-up.

    A known key counts as long as its file is unchanged, which takes one call of stat. For other keys, all files are
    scanned, and those that have changed are read; scans take a limited share of the time, so that strangers cannot keep
    clients waiting. A file that is not a public key lets nobody in; a notice names it.
    """

    def __init__(self, path: str) -> None:
        """Read the keys at ``path``; raise UsageError if there is nothing, or nothing that can be read."""
        if not os.path.exists(path):
            raise click.UsageError(
                f"{path} does not exist; --client-keys takes a public key file, or a directory"
            )
        self._path = path
        self._is_directory = os.path.isdir(path)  # then it is an error if it disappears
        self._files: dict[str, tuple[Fingerprint, bytes]] = {}  # a key is empty if its file is none
        self._paths: dict[bytes, str] = {}  # of the files of the keys
        self._watched: dict[
            str, Fingerprint
        ] = {}  # what is looked at for an unknown key before a scan
        self._readable = True  # at the last scan
        try:
            self._scan()
        except OSError as error:
            raise click.UsageError(f"cannot read {path}: {error.strerror}") from error
        if not self._paths:
            notify(f"no client can connect until there is a public key in {path}", "yellow")

    def find(self, public: bytes) -> str | None:
        """Return the name of the file that holds ``public`` (Z85), or None; raise OSError if that cannot be known."""
        path = self._paths.get(public)
        known = path is not None and _fingerprint_of(path) == self._files[path][0]
        if path and known and self._readable:
            return os.path.basename(path)
        changed = any(
            _fingerprint_of(each) != fingerprint for each, fingerprint in self._watched.items()
        )
        if path or changed or time.monotonic() >= self._next_scan:
            try:
                self._scan()
            except OSError as error:
                if self._readable:
                    reason = f"{error.strerror}; clients are not let in until that is over"
                    notify(f"cannot read the client keys: {reason}", "yellow")
                self._readable = False
                if not known:
                    raise
            else:
                if not self._readable:
                    notify("the client keys can be read again")
                self._readable = True
        path = self._paths.get(public)
        return os.path.basename(path) if path else None

    def _scan(self) -> None:
        """Take over the keys as they are now: all of them, or none, with an OSError."""
        started = time.monotonic()
        self._next_scan = -math.inf  # at once, if this one fails
        watched = {
            self._path: _fingerprint_of(self._path)
        }  # first: what changes from now on is seen the next time
        self._files = {path: self._read(path) for path in self._list()}
        self._paths = {key: path for path, (_, key) in self._files.items() if key}
        keyless = (
            (path, fingerprint) for path, (fingerprint, key) in self._files.items() if not key
        )
        self._watched = watched | dict(islice(keyless, WATCHED_FILES))
        now = time.monotonic()
        self._next_scan = now + SCAN_SHARE * (now - started)

    def _list(self) -> list[str]:
        if not self._is_directory:
            return [self._path]
        with os.scandir(self._path) as entries:
            # Names that begin with a dot are those of drafts, and of the links by which secrets are mounted.
            return [entry.path for entry in entries if not entry.name.startswith(".")]

    def _read(self, path: str) -> tuple[Fingerprint, bytes]:
        """Return the fingerprint of a file and the key in it; raise OSError if that cannot be known just now."""
        fingerprint = _fingerprint_of(path)
        if not fingerprint:  # it has just been removed
            return (), b""
        if path in self._files and self._files[path][0] == fingerprint:
            return self._files[path]
        try:
            return fingerprint, load_public_key(path, fifo=False)
        except click.UsageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in SHORTAGES:
                raise cause from None
            notify(f"{error.message}; it lets nobody in", "yellow")
            return fingerprint, b""


def _fingerprint_of(path: str) -> Fingerprint:
    """Return what changes whenever the contents of the file or directory do; nothing if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    # On Windows, ctime is the time of creation; elsewhere, mtime can be set back.
    return status.st_ino, status.st_size, status.st_ctime_ns, status.st_mtime_ns


def start_zap_handler(context: Context, clients: ClientKeys) -> None:
    """Start a thread that lets the holders of ``clients`` in, and nobody else; it ends with ``context``."""
    # pyzmq's own handler needs asyncio, which takes 40 ms to import.
    handler = new_socket(context, zmq.REP)
    handler.bind("inproc://zeromq.zap.01")
    refused = ClientNotices()

    def run() -> None:
        with handler, suppress(zmq.ContextTerminated):
            while True:
                handler.send_multipart(_answer(handler.recv_multipart(), clients, refused))

    start_thread(run)


def _answer(request: list[bytes], clients: ClientKeys, refused: ClientNotices) -> list[bytes]:
    """Return the ZAP reply: 200 with the name of the client's key file as its user id, 400, or 300: come again."""
    version, request_id, _domain, peer, _identity, mechanism, credentials = (*request, *[b""] * 7)[
        :7
    ]
    status, text, user_id = b"400", b"unknown key", b""
    if mechanism == b"CURVE" and len(credentials) == 32:
        public, address = z85.encode(credentials), peer.decode(errors="backslashreplace")
        notice = f"refused a client from {address}: its public key {public.decode()} is not known"
        try:
            name = clients.find(public)
        except OSError:
            status, text = b"300", b"client keys cannot be read just now"
        else:
            if name:
                refused.forget(notice)
                status, text = b"200", b"OK"
                user_id = name.encode(errors="backslashreplace")  # pyzmq reads it as UTF-8
            else:
                refused.report(notice)
    return [version, request_id, status, text, user_id, b""]
