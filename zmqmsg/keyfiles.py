"""CURVE key files, in the format of pyzmq and CZMQ: load, create, and what is wrong with one."""

import codecs
import errno
import os
import re
import shlex
import stat
import struct
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import zmq
from zmq.utils import z85

from zmqmsg.notices import notify
from zmqmsg.system import is_read_only, others_may_read

SIZE_LIMIT = 65536  # bytes of a key file
NO_KEY = b"0" * 40  # 32 zero bytes: from a program that never set its key
SECRET_MODE, PUBLIC_MODE = 0o600, 0o644
PUBLIC_LINE = 'public-key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"'
SECRET_LINE = 'secret-key = "..." (with 40 characters)'

_HALF = re.compile(rb'^\s*(public|secret)-key\s*=\s*"([^"\n]*)"', re.MULTILINE)
_OTHER_ENCODINGS = {
    "hexadecimal": re.compile(rb"[0-9A-Fa-f]{64}"),
    "base64": re.compile(rb"[0-9A-Za-z+/_-]{43}=?"),
}


class KeyFileError(Exception):
    """A key file cannot be used. The message says why, and what to do; it never shows a key.

    If the file could not be read, the OSError is the cause.
    """


class Content(NamedTuple):
    """What a key file holds. Keys are in Z85, and empty if the file has none."""

    public: bytes
    secret: bytes
    is_bare: bool  # whether it is 40 characters and nothing else, which may be either half
    status: os.stat_result


def load_key_pair(path: str) -> tuple[bytes, bytes]:
    """Return the public and the secret key in the file at ``path``.

    Creates the file if it is missing, and its public half. Raises KeyFileError.
    """
    public_file = public_path(path)
    # First: another process that creates both files now begins with the secret one.
    public_exists = os.path.lexists(public_file)
    is_new = False
    if not os.path.exists(path):
        is_new = create_secret_file(path, public_exists)
    content = read_key_file(path)
    if content.is_bare:
        raise KeyFileError(
            f"{path} holds a key without a name, which may be either half;"
            f" a secret key file has a line such as {SECRET_LINE}"
        )
    if not content.secret:
        raise KeyFileError(f"{path} is a public key; pass the secret key file")
    check_secrecy(path, content.status, is_new=is_new)
    if public_exists:
        check_public_half(public_file, path, content.public)
    elif stat.S_ISREG(content.status.st_mode):
        create_public_file(public_file, content.public, is_needed=is_new)
    if is_new:
        notify(f"created {path}; give its public half, {public_file}, to your peers")
    return content.public, content.secret


def load_public_key(path: str, *, fifo: bool = True) -> bytes:
    """Return the public key in the file at ``path``; raise KeyFileError if it is not a public key.

    ``fifo``: whether the file may be a FIFO, which is waited for.
    """
    content = read_key_file(path, fifo=fifo)
    if content.secret:
        raise KeyFileError(f"{path} is a secret key; pass its public half, {public_path(path)}")
    return content.public


def public_path(path: str) -> str:
    """Return where the public half of the secret key file at ``path`` is.

    Raises KeyFileError if no name is left for it.
    """
    directory, name = os.path.split(path)
    if name == "_secret":
        raise KeyFileError(f"{path} leaves no name for its public half; for example key_secret")
    if not name.endswith("_secret"):
        return f"{path}.pub"
    return os.path.join(directory, name.removesuffix("_secret"))


# Read


def read_key_file(path: str, *, fifo: bool = True) -> Content:
    """Return what is in the key file at ``path``; raise KeyFileError if it is not one."""
    status, data = read_file(path, fifo=fifo)
    if len(data) > SIZE_LIMIT:
        raise KeyFileError(f"{path} is not a CURVE key file: it is too large")
    text = without_byte_order_mark(data)
    halves: dict[bytes, bytes] = {}
    for name, half in _HALF.findall(text):
        halves.setdefault(name, half)
    is_bare = not halves
    if is_bare:
        halves = {b"public": text.rstrip(b"\0").strip()}
    for half in halves.values():
        if not is_z85_key(half):
            raise KeyFileError(f"{path} is not a CURVE key file: {describe_fault(half)}")

    public, secret = halves.get(b"public", b""), halves.get(b"secret", b"")
    if secret:
        derived = zmq.curve_public(secret)
        public = public or derived
        if public != derived:
            raise KeyFileError(
                f"{path} is a key that works with nobody: its halves are no pair; make a new one"
            )
    if NO_KEY in (public, secret):
        raise KeyFileError(f"{path} is a key that works with nobody: it is zeros; make a new one")
    return Content(public, secret, is_bare, status)


def read_file(path: str, *, fifo: bool) -> tuple[os.stat_result, bytes]:
    """Return the status of a key file, and up to one byte more than it may have."""
    try:
        kind = os.stat(path).st_mode  # before it is opened, which would wait for a FIFO's writer
        is_allowed = stat.S_ISREG(kind) or (fifo and stat.S_ISFIFO(kind))
        if not is_allowed:
            raise KeyFileError(f"{path} is not a CURVE key file: it is not a regular file")
        with open(path, "rb") as file:
            return os.fstat(file.fileno()), file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read key file {path}: {error.strerror}") from error


def without_byte_order_mark(data: bytes) -> bytes:
    """Return ``data`` in UTF-8 if it is in UTF-16, as PowerShell 5.1 writes, and without a mark."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def is_z85_key(half: bytes) -> bool:
    """Return whether ``half`` is 32 bytes in Z85."""
    try:
        return len(half) == len(NO_KEY) and len(z85.decode(half)) == 32
    except (ValueError, LookupError, struct.error):  # from pyzmq
        return False


def describe_fault(half: bytes) -> str:
    """Return in words why ``half`` is not a key, without showing it."""
    for name, pattern in _OTHER_ENCODINGS.items():
        if pattern.fullmatch(half):
            return f"its key is in {name}, and ZeroMQ has keys in Z85, of 40 characters"
    return f"a key file has a line such as {PUBLIC_LINE}"


# Check


def check_secrecy(path: str, status: os.stat_result, *, is_new: bool) -> None:
    """Raise KeyFileError if others may read the secret key in the file at ``path``.

    ``is_new``: whether we have just made the file, which is removed then.
    """
    if not others_may_read(status):
        return
    if is_new:
        with suppress(OSError):
            os.unlink(path)
        raise KeyFileError(
            f"cannot keep a secret key in {path}: others could read it;"
            " put it on a file system that keeps modes"
        )
    advice = f"run: chmod 600 {shlex.quote(path)}"
    if is_read_only(path):
        advice = "set its mode where it is mounted, to 0400 or, for a group, to 0440"
    elif status.st_mode & stat.S_IXOTH:  # file systems without modes show all files like that
        advice = f"put it on a file system that keeps modes, or {advice}"
    raise KeyFileError(f"others may read the secret key in {path}; {advice}")


def check_public_half(public_file: str, path: str, public: bytes) -> None:
    """Raise KeyFileError if ``public_file`` is the public half of another key than ``path``."""
    try:
        found = load_public_key(public_file, fifo=False)
    except KeyFileError:
        return  # it is something else, which is nobody's key
    if found != public:
        raise KeyFileError(
            f"{public_file} is not the public half of {path}, so nobody could connect with it;"
            " move one of them away"
        )


# Create


def create_secret_file(path: str, public_exists: bool) -> bool:
    """Create a key pair in the file at ``path``; return False if another process was faster.

    Raises KeyFileError.
    """
    if public_exists:  # nobody could connect with it
        reason = os.strerror(errno.EEXIST)
        raise KeyFileError(f"cannot create key file {public_path(path)}: {reason}")
    return write_new_file(path, format_key(*zmq.curve_keypair()), SECRET_MODE)


def create_public_file(path: str, public: bytes, *, is_needed: bool) -> None:
    """Create the public half of a secret key file; raise KeyFileError if that ``is_needed``."""
    try:
        write_new_file(path, format_key(public), PUBLIC_MODE)
    except KeyFileError:
        if is_needed:
            raise


def format_key(public: bytes, secret: bytes = b"") -> str:
    """Return the text of a key file."""
    text = f'metadata\ncurve\n    public-key = "{public.decode()}"\n'
    if secret:
        text += f'    secret-key = "{secret.decode()}"\n'
    return text


def write_new_file(path: str, text: str, mode: int) -> bool:
    """Create the file at ``path``, whole or not at all; return False if there is one.

    Raises KeyFileError.
    """
    # pyzmq's own zmq.auth.create_certificates overwrites files, and lets others read the secret.
    directory, name = os.path.split(path)
    draft = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")
    try:
        with open(draft, "x", opener=partial(os.open, mode=mode)) as file:
            file.write(text)
        try:
            os.link(draft, path)
        except OSError:  # it exists, or there are no hard links here, as on FAT
            replace_nothing(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise KeyFileError(f"cannot create key file {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.unlink(draft)
    return True


def replace_nothing(draft: str, path: str) -> None:
    """Rename ``draft`` to ``path``; raise FileExistsError if that exists, or OSError."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # reserves the name
    try:
        os.replace(draft, path)
    except OSError:
        os.unlink(path)
        raise
