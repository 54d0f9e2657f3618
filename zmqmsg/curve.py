"""CURVE keys: load and create them, apply them to sockets, and decide which clients are let in (ZAP, RFC 27)."""

import errno
import os
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote
from threading import Thread
from typing import NamedTuple

import click
import zmq
from zmq.auth.certs import load_certificate
from zmq.utils import z85

from zmqmsg.console import notify
from zmqmsg.sockets import Context, Secure, Socket, new_socket

OTHERS = 0o077
"""Mode bits that a secret key file must not have."""

KEY_FILE_LIMIT = 65536
"""Bytes that a key file may have."""

REFUSAL_INTERVAL = 60.0
"""Seconds in which the same refused client is told of once."""

REFUSAL_LIMIT = 20
"""Refused clients that are told of at most within REFUSAL_INTERVAL."""


class KeyPair(NamedTuple):
    """A CURVE key, each half as 40 characters of Z85."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        """Return nothing of the secret, wherever it may be printed."""
        return f"KeyPair({self.public!r})"


# What the options ask for


def client_security(key: str | None, server_key: str | None) -> Secure:
    """Return what makes a socket a CURVE client that talks to the holder of ``server_key`` alone.

    Without ``key`` it has a key pair of this run only. Raises UsageError, naming the file, if anything is wrong.
    """
    if not server_key:
        raise click.UsageError("--key needs --server-key: the public key file of the server")
    own = load_key_pair(Path(key)) if key else KeyPair(*zmq.curve_keypair())
    server = load_public_key(Path(server_key))

    def secure(socket: Socket) -> None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = own.public, own.secret, server

    return secure


def server_security(
    key: str | None, client_keys: str | None, server_key: str | None, *, binds: bool, connects: bool
) -> tuple[Secure | None, Secure | None]:
    """Return what makes the bound socket of ``serve`` a CURVE server, and the connected ones CURVE clients.

    Raises UsageError if an option is missing, or naming the file if anything is wrong with it.
    """
    if client_keys and not (key and binds):
        raise click.UsageError("--client-keys needs --key, and an endpoint that is bound")
    if server_key and not connects:
        raise click.UsageError("--server-key needs --connect")
    if key and connects and not server_key:
        raise click.UsageError("--key with --connect needs --server-key: the public key file of the broker")
    if server_key and binds and not key:
        raise click.UsageError("--server-key with --bind needs --key, otherwise the bound endpoint is not encrypted")
    own = load_key_pair(Path(key)) if key and binds else None
    clients = ClientKeys(Path(client_keys)) if client_keys else None

    def secure(socket: Socket) -> None:
        assert own
        if clients:
            start_zap_handler(socket.context, clients)
            socket.zap_domain = b"zmqmsg"
            # Without it, libzmq would let everybody in if there were no ZAP handler.
            socket.zap_enforce_domain = True
        socket.curve_server = True
        socket.curve_secretkey = own.secret

    return secure if own else None, client_security(key, server_key) if server_key else None


# Key files, as pyzmq and CZMQ have them


def load_key_pair(path: Path) -> KeyPair:
    """Load the secret key file at ``path``, created if it is missing; raise UsageError if it cannot be used."""
    if not os.path.exists(path):
        _create(path)
        notify(f"created {path}; give its public half, {public_path(path)}, to your peers")
    public, secret = _load(path)
    if not secret:
        raise click.UsageError(f"{path} is a public key; pass the secret key file")
    if path.stat().st_mode & OTHERS:
        raise click.UsageError(f"others may read the secret key in {path}; run: chmod 600 {quote(str(path))}")
    return KeyPair(public, secret)


def load_public_key(path: Path) -> bytes:
    """Return the public key in the file at ``path``; raise UsageError if it is none, or a secret one."""
    public, secret = _load(path)
    if secret:
        raise click.UsageError(f"{path} is a secret key; pass its public half")
    return public


def public_path(own: Path) -> Path:
    """Return where the public half of the secret key file ``own`` is."""
    return own.with_name(own.name.removesuffix("_secret") if own.name.endswith(".key_secret") else f"{own.name}.pub")


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > KEY_FILE_LIMIT:
            raise click.UsageError(f"{path} is not a CURVE key file: not a regular file, or too large")
        public, secret = load_certificate(path)
        for half in (public, secret or public):
            if len(z85.decode(half)) != 32:
                raise ValueError
    except OSError as error:
        raise click.UsageError(f"cannot read key file {path}: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, struct.error) as error:  # the latter from pyzmq's readers
        raise click.UsageError(f"{path} is not a CURVE key file") from error
    return public, secret


def _create(own: Path) -> None:
    """Write both halves of a new key. pyzmq's own writer overwrites files, and lets others read the secret."""
    public, secret = (half.decode() for half in zmq.curve_keypair())
    text = f'metadata\ncurve\n    public-key = "{public}"\n'
    _write(public_path(own), text, 0o644)
    try:
        _write(own, f'{text}    secret-key = "{secret}"\n', 0o600)
    except click.UsageError:
        public_path(own).unlink()
        raise


def _write(path: Path, text: str, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(descriptor, "w") as file:
                file.write(text)
        except OSError:
            path.unlink()
            raise
    except OSError as error:
        raise click.UsageError(f"cannot create key file {path}: {error.strerror}") from error


# Which clients are let in


class ClientKeys:
    """The public keys in a file, or in the files of a directory, as they are at each look-up.

    A file is read again only when it has changed. One that is not a public key lets nobody in; a notice names it.
    """

    def __init__(self, path: Path) -> None:
        """Read the keys at ``path``; raise UsageError if there is nothing."""
        if not os.path.exists(path):
            raise click.UsageError(f"{path} does not exist; --client-keys takes a public key file, or a directory")
        self._path = str(path)
        self._signatures: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, bytes | None] = {}
        self._files: dict[bytes, str] = {}
        self._refresh()
        if not self._files:
            notify(f"no client can connect until there is a public key in {path}", "yellow")

    def find(self, public: bytes) -> str | None:
        """Return the name of the file that holds ``public`` (Z85), or None."""
        # To look at a thousand files takes milliseconds, so that is done only if the key may be new or gone.
        if public not in self._files or any(
            _signature(path) != self._signatures[path] for path in (self._path, self._files[public])
        ):
            self._refresh()
        return os.path.basename(self._files[public]) if public in self._files else None

    def _refresh(self) -> None:
        try:
            files = [entry.path for entry in os.scandir(self._path)]
        except NotADirectoryError:
            files = [self._path]
        except OSError as error:  # a path that is gone lets nobody in; but we may lack a descriptor for a moment
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return
            files = []
        before, self._signatures = self._signatures, {path: _signature(path) for path in (self._path, *files)}
        self._keys = {
            path: self._keys[path] if before.get(path) == self._signatures[path] else _read_client_key(path)
            for path in files
            if self._signatures[path]  # otherwise it has just been removed
        }
        self._files = {key: path for path, key in self._keys.items() if key}


def _signature(path: str) -> tuple[int, ...]:
    """Return what changes whenever the contents of the file or directory do; nothing if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_ctime_ns


def _read_client_key(path: str) -> bytes | None:
    try:
        return load_public_key(Path(path))
    except click.UsageError as error:
        notify(f"{error.message}; it lets nobody in", "yellow")
        return None


class _Refusals:
    """Tells of clients that are refused: of each once in a while, and not of too many."""

    def __init__(self) -> None:
        self._told: dict[tuple[bytes, bytes], float] = {}

    def notify(self, address: bytes, public: bytes) -> None:
        now = time.monotonic()
        self._told = {client: since for client, since in self._told.items() if now - since < REFUSAL_INTERVAL}
        if (address, public) in self._told or len(self._told) >= REFUSAL_LIMIT:
            return
        self._told[address, public] = now
        where = address.decode(errors="backslashreplace")
        notify(f"refused a client from {where}: its public key {public.decode()} is not known", "yellow")
        if len(self._told) == REFUSAL_LIMIT:
            notify("further refusals are not shown for a while", "yellow")


def start_zap_handler(context: Context, clients: ClientKeys) -> None:
    """Start a thread that lets the holders of ``clients`` in, and nobody else; it ends with ``context``.

    pyzmq's own handler needs asyncio, which takes 40 ms to import.
    """
    handler = new_socket(context, zmq.REP)
    handler.linger = 0
    handler.bind("inproc://zeromq.zap.01")
    refusals = _Refusals()

    def answer() -> None:
        with handler, suppress(zmq.ContextTerminated):
            while True:
                handler.send_multipart(_judge(handler.recv_multipart(), clients, refusals))

    Thread(target=answer, name="ZAP", daemon=True).start()


def _judge(request: list[bytes], clients: ClientKeys, refusals: _Refusals) -> list[bytes]:
    """Return the ZAP reply: status 200 and the name of the client's key file as its user id, or 400."""
    version, request_id, _domain, address, _identity, mechanism, credentials = (*request[:7], *[b""] * 7)[:7]
    name = None
    if mechanism == b"CURVE" and len(credentials) == 32:
        public = z85.encode(credentials)
        name = clients.find(public)
        if name is None:
            refusals.notify(address, public)
    if name is None:
        return [version, request_id, b"400", b"unknown key", b"", b""]
    user_id = name.encode(errors="backslashreplace")  # pyzmq reads it as UTF-8
    return [version, request_id, b"200", b"OK", user_id, b""]
