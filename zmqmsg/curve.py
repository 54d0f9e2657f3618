"""CURVE keys: load and create them, apply them to a socket, let in the clients that are known."""

import os
import struct
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from shlex import quote
from threading import Thread
from typing import NamedTuple

import zmq
from zmq.auth.certs import load_certificate
from zmq.utils import z85

from zmqmsg.sockets import Context, Socket

OTHERS = 0o077
"""What the mode of a secret key file must not allow: anything to group or others."""


class Keys(NamedTuple):
    """The CURVE keys of one end, each as 40 characters of Z85: its own, and those of its peers."""

    public: bytes
    secret: bytes
    clients: frozenset[bytes]
    server: bytes

    @classmethod
    def load(cls, own: Path, clients: Path | None, server: Path | None, tell: Callable[[str], None]) -> "Keys":
        """Load the secret key file ``own`` and the public keys of the clients or the server that are named.

        If there is no ``own``, it is created before all else, and ``tell`` hears which file to hand over: so two people
        can each start their end once. Raises ValueError, naming the file, if anything is wrong with one.
        """
        if not own.exists():
            _create(own)
            tell(f"created {own}; hand {public_path(own)} to the other side")
        public, secret = _load(own)
        if not secret:
            raise ValueError(f"{own} holds no secret key; give the file that does")
        if own.stat().st_mode & OTHERS:
            raise ValueError(f"others may read the secret in {own}; mend it with: chmod 600 {quote(str(own))}")
        return cls(public, secret, _load_clients(clients), _load_public(server) if server else b"")

    def __repr__(self) -> str:
        """Return nothing of the secret, wherever it may be printed."""
        return f"Keys({self.public!r})"

    def secure_server(self, socket: Socket) -> None:
        """Make ``socket`` a CURVE server for what it binds from now on, and let in ``clients`` alone."""
        _let_in(socket.context, self.clients)
        socket.curve_server = True
        socket.curve_secretkey = self.secret
        socket.zap_domain = b"zmqmsg"
        # Without it, libzmq would let everybody in if there were no ZAP handler.
        socket.zap_enforce_domain = True

    def secure_client(self, socket: Socket) -> None:
        """Make ``socket`` a CURVE client, which talks to the holder of ``server`` alone."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_serverkey = self.server


def public_path(own: Path) -> Path:
    """Return where the public half of the secret key file ``own`` is."""
    return own.with_name(own.name.removesuffix("_secret") if own.name.endswith(".key_secret") else f"{own.name}.pub")


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
        for key in (public, secret or public):
            if len(z85.decode(key)) != 32:
                raise ValueError
    except OSError as error:
        raise ValueError(f"cannot read key file {path}: {error.strerror or 'no such file'}") from error
    except (ValueError, IndexError, KeyError, struct.error) as error:  # the latter from pyzmq's readers
        raise ValueError(f"{path} is not a CURVE key file") from error
    return public, secret


def _load_public(path: Path) -> bytes:
    public, secret = _load(path)
    if secret:
        raise ValueError(f"{path} holds a secret key, which is its owner's alone; give its public half")
    return public


def _load_clients(path: Path | None) -> frozenset[bytes]:
    if not path:
        return frozenset()
    keys = frozenset(map(_load_public, path.iterdir() if path.is_dir() else [path]))
    if not keys:
        raise ValueError(f"{path} is an empty folder, which would let nobody in")
    return keys


def _create(own: Path) -> None:
    """Write both halves of a new key. pyzmq's own writer overwrites files, and lets others read the secret."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    text = f'metadata\ncurve\n    public-key = "{public}"\n'
    _write(public_path(own), text, 0o644)
    try:
        _write(own, f'{text}    secret-key = "{secret}"\n', 0o600)
    except ValueError:
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
        raise ValueError(f"cannot create key file {path}: {error.strerror}") from error


def _let_in(context: Context, clients: Collection[bytes]) -> None:
    """Start the ZAP handler (RFC 27) of ``context``, which ends with it.

    pyzmq's own needs asyncio, which takes longer to import than all the rest.
    """
    known = {z85.decode(key) for key in clients}
    handler = context.socket(zmq.REP)
    handler.linger = 0
    handler.bind("inproc://zeromq.zap.01")

    def answer() -> None:
        with handler, suppress(zmq.ContextTerminated):
            while True:
                version, request, _domain, _address, _identity, mechanism, *credentials = handler.recv_multipart()
                admitted = mechanism == b"CURVE" and credentials[0] in known
                verdict = [b"200", b"OK"] if admitted else [b"400", b"unknown key"]
                handler.send_multipart([version, request, *verdict, b"", b""])

    Thread(target=answer, name="ZAP", daemon=True).start()
