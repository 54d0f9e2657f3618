"""The CURVE keys of a command: which options go together, and what a socket gets of them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from zmqmsg.notices import Notify
    from zmqmsg.refusals import ClientNotices
    from zmqmsg.sockets import Socket
    from zmqmsg.zap import Admission

# What keys look like. A key of 32 bytes has 40 characters in Z85.
_Z85_CHARACTERS = r"0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-"
_Z85_KEY = re.compile(rf"[{_Z85_CHARACTERS}]{{40}}")
_HEXADECIMAL_KEY = re.compile("[0-9A-Fa-f]{60,}")
_BASE64_KEY = re.compile("[0-9A-Za-z+/_-]{43}=?")
_KEY_LINE = re.compile(r"(secret|public)-key\s*=")
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
# A key with something before or after it, or one that has lost some characters: a path rarely has
# as many that are not word characters.
_Z85_RUN = re.compile(rf"[{_Z85_CHARACTERS}]{{30,}}")
_UNUSUAL_IN_PATHS = re.compile(r"[:^!*?&<>()\[\]{}@%$#=+]")
UNUSUAL_LIMIT = 3
CAPITAL_LIMIT = 6  # a key in base64 has 17 capital letters on average
# A path that begins like one, and has no unusual character: very few keys are like that.
_CLEAR_PATH = re.compile(r"(/|\./|\.\./|~)[\w./-]*")


def looks_like_key(text: str) -> bool:
    """Return whether ``text``, which should be something else, may be a key, or has one in it."""
    bare = text.strip().strip(_QUOTES)
    if _Z85_KEY.fullmatch(bare) or _HEXADECIMAL_KEY.search(bare) or _KEY_LINE.search(bare):
        return True
    if _BASE64_KEY.fullmatch(bare):
        capitals = [character for character in bare if character.isupper()]
        return len(capitals) >= CAPITAL_LIMIT
    return any(
        len(_UNUSUAL_IN_PATHS.findall(run)) >= UNUSUAL_LIMIT for run in _Z85_RUN.findall(bare)
    )


def is_key_for_path(path: str) -> bool:
    """Return whether ``path``, which should be that of a key file, is likely a key itself.

    A path that exists is never a key. If its directory exists, only the file name is judged.
    """
    if os.path.exists(path):
        return False
    directory, name = os.path.split(path)
    if directory.strip("./") and os.path.isdir(directory):
        return looks_like_key(name)
    if _CLEAR_PATH.fullmatch(path):
        return False
    return "\n" in path or looks_like_key(path)


class Keys(NamedTuple):
    """The key files that a command was given, as paths."""

    key: str | None  # this end's secret key file
    server_key: str | None  # the public key file of the server that is connected to
    client_keys: str | None = None  # public key file, or directory of them, of the clients let in

    def are_given(self) -> bool:
        """Return whether there is any key, so that CURVE is used."""
        return bool(self.key or self.server_key)

    def check_for_send(self) -> None:
        """Raise UsageError if the options do not go together."""
        if self.key and not self.server_key:
            raise click.UsageError("--key needs --server-key: the public key file of the server")

    def check_for_serve(self, *, binds: bool, connects: bool) -> None:
        """Raise UsageError if the options do not go together, or with what is bound or connected.

        No combination may leave an endpoint open by mistake.
        """
        if self.client_keys and not (self.key and binds):
            raise click.UsageError("--client-keys needs --key, and an endpoint that is bound")
        if self.server_key and not connects:
            raise click.UsageError("--server-key needs --connect")
        if self.key and connects and not self.server_key:
            raise click.UsageError(
                "--key with --connect needs --server-key: the public key file of the broker"
            )
        if self.server_key and binds and not self.key:
            raise click.UsageError(
                "--server-key with --bind needs --key,"
                " otherwise the bound endpoint would not be encrypted"
            )

    def load(
        self, notify: "Notify | None" = None, client_notices: "ClientNotices | None" = None
    ) -> "CurveKeys":
        """Read all files, and create the key if it is missing; raise UsageError.

        ``notify`` and ``client_notices`` give the notices of a server; they are needed if
        ``client_keys`` are given.
        """
        # Only for CURVE: 5 ms.
        import zmq

        from zmqmsg.keyfiles import load_key_pair, load_public_key

        # Each file is read once, as it may be a FIFO, and all others before the key is created.
        server_public = b""
        if self.server_key:
            with naming("--server-key"):
                server_public = load_public_key(self.server_key)
        admission = None
        if self.client_keys:
            assert notify
            assert client_notices
            from zmqmsg.clientkeys import ClientKeys
            from zmqmsg.zap import Admission

            with naming("--client-keys"):
                client_keys = ClientKeys(self.client_keys, notify)
            admission = Admission(client_keys, client_notices)
        if self.key:
            with naming("--key"):
                public, secret = load_key_pair(self.key)
        else:
            public, secret = zmq.curve_keypair()  # for this run only
        return CurveKeys(public, secret, server_public, admission)


class CurveKeys(NamedTuple):
    """Keys that were loaded, in Z85."""

    public: bytes
    secret: bytes
    server_public: bytes  # empty if nothing is connected to
    admission: "Admission | None"  # decides which clients are let in; None: anybody

    def secure_server(self, socket: "Socket") -> None:
        """Let ``socket``, which is not bound yet, accept CURVE clients only; raise OSError."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_server = True
        if self.admission:
            self.admission.start(socket.context)
            socket.zap_domain = b"zmqmsg"
            # Without it, libzmq would let everybody in if there were no ZAP handler.
            socket.zap_enforce_domain = True

    def secure_client(self, socket: "Socket") -> None:
        """Let ``socket``, which is not connected yet, talk to the holder of the server key only."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_serverkey = self.server_public


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Turn what is wrong with a key file into an error of ``option``."""
    from zmqmsg.keyfiles import KeyFileError

    try:
        yield
    except KeyFileError as error:
        raise click.UsageError(f"{option}: {error}") from error
