"""CURVE keys: their files, the three steps of the README, and who is let in."""

import base64
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import zmq
import zmq.auth
from click.testing import CliRunner
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from zmqmsg.cli import cli
from zmqmsg.sockets import Context, Socket

from conftest import (
    AS_NOBODY,
    COMMAND,
    IS_ROOT,
    LIMIT,
    LINUX,
    POSIX,
    Send,
    Serve,
    Start,
    broker,
    descriptors,
    free_endpoint,
    let_others_enter,
    memory,
    refusal,
    relay,
    shell,
    soak,
    stop,
    until,
    waits,
)

with suppress(ImportError):  # Windows has none
    import resource

SERVE_KEY = ["serve", "--bind", "tcp://192.0.2.1:1", "--key"]
SERVER_KEY = ["send", "x", "--server-key"]
EITHER_OPTION = pytest.mark.parametrize(
    "option", [SERVE_KEY, SERVER_KEY], ids=["--key", "--server-key"]
)


class KeyPair(NamedTuple):
    """A CURVE key, each half as 40 characters of Z85."""

    public: bytes
    secret: bytes


class Pair(NamedTuple):
    """The files of the two halves of a key."""

    secret: Path
    public: Path

    @property
    def key(self) -> KeyPair:
        public, secret = zmq.auth.load_certificate(self.secret)
        assert secret
        return KeyPair(public, secret)


class Keys(NamedTuple):
    """The keys of a server, of a client that it knows, and of one that it does not."""

    server: Pair
    alice: Pair
    stranger: Pair


def new_pair(directory: Path, name: str) -> Pair:
    """Create a key as pyzmq does."""
    public, secret = map(Path, zmq.auth.create_certificates(directory, name))
    secret.chmod(0o600)
    return Pair(secret, public)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").mkdir()
    return Keys(*(new_pair(tmp_path / "keys", name) for name in Keys._fields))


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """The directory for --client-keys, empty."""
    (tmp_path / "clients").mkdir()
    return tmp_path / "clients"


@pytest.fixture
def guarded(keys: Keys, clients: Path, serve: Serve) -> Serve:
    """Start ``zmqmsg serve`` for those whose keys are in ``clients``, with further arguments."""
    return lambda *arguments: serve(
        "--key", str(keys.server.secret), "--client-keys", str(clients), *arguments
    )


def of_server(server: Pair) -> list[str]:
    """Return the options of a client without a key of its own."""
    return ["--server-key", str(server.public)]


def as_client(own: Pair, server: Pair) -> list[str]:
    """Return the options of a client with a key of its own."""
    return ["--key", str(own.secret), *of_server(server)]


def let_in(context: Context, endpoint: str, server: Pair, *clients: KeyPair) -> list[bool]:
    """Return for each key whether ``server`` lets a plain REQ socket with it in, at once."""
    with ExitStack() as stack:
        monitors = []
        for own in clients:
            client = stack.enter_context(context.socket(zmq.REQ))
            client.curve_publickey, client.curve_secretkey = own
            client.curve_serverkey = server.key.public
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            monitors.append(stack.enter_context(client.get_monitor_socket(events)))
            stack.callback(client.disable_monitor)
            client.connect(endpoint)
        results = []
        for monitor in monitors:
            assert monitor.poll(LIMIT * 1000)
            results.append(recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        return results


# Key files


@POSIX
def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "me.key").write_text("precious")
    (tmp_path / "link.key_secret").symlink_to(tmp_path / "elsewhere")
    for name, reason in [
        ("me.key_secret", f"cannot create key file {tmp_path}/me.key: File exists"),
        ("link.key_secret", f"cannot read key file {tmp_path}/link.key_secret: No such file"),
    ]:
        assert reason in refusal(*SERVE_KEY, tmp_path / name)
    assert (tmp_path / "me.key").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.key_secret", "me.key"]


@POSIX
@pytest.mark.parametrize("place", ["missing", "file", pytest.param("/proc", marks=LINUX)])
def test_a_key_that_cannot_be_created_is_an_error_that_names_the_file(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / place / "me.key_secret"
    assert f"cannot create key file {path}: " in refusal(*SERVE_KEY, path)


@POSIX
def test_a_full_disk_leaves_no_half_of_a_key_behind(keys: Keys, tmp_path: Path, send: Send) -> None:
    """Otherwise the next start would fail as well, because nothing is overwritten."""
    directory = tmp_path / "full"
    directory.mkdir()
    full = shell(tmp_path, 'ulimit -f 0; exec "$python" "$@"')
    done = send("--key", f"{directory}/me.key_secret", *of_server(keys.server), "x", **full)
    assert done.returncode == 2
    assert b"cannot create key file" in done.stderr
    assert list(directory.iterdir()) == []


@POSIX
@pytest.mark.parametrize(
    "mode",
    [
        0o644,
        0o660,
        0o602,
        pytest.param(0o640, marks=pytest.mark.skipif(IS_ROOT, reason="root's group may read")),
    ],
)
def test_a_secret_key_that_others_may_use_is_refused_with_what_helps(
    tmp_path: Path, mode: int
) -> None:
    own = new_pair(tmp_path, "my own").secret
    own.chmod(mode)
    reason, _, advice = refusal(*SERVE_KEY, own).partition("; run: ")
    assert reason.endswith(f"others may read the secret key in {own}")
    subprocess.run(["sh", "-c", advice.partition("; see ")[0]], check=True)
    assert stat.S_IMODE(own.stat().st_mode) == 0o600


NO_KEYS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "no public key": b"metadata\ncurve\n",
    "long key": b'curve\n    public-key = "' + b"a" * 45 + b'"\n',
    "uneven key": b'curve\n    public-key = "' + b"a" * 39 + b'"\n',
    "above Z85": b'curve\n    public-key = "' + b"#" * 40 + b'"\n',
    "not ASCII": 'curve\n    public-key = "é"\n'.encode() * 40,
    "too large": b"#" * 65537,
}


@EITHER_OPTION
@pytest.mark.parametrize("content", NO_KEYS.values(), ids=NO_KEYS)
def test_a_file_that_is_no_key_is_refused_by_name(
    tmp_path: Path, content: bytes, option: list[str]
) -> None:
    (tmp_path / "wrong").write_bytes(content)
    (tmp_path / "wrong").chmod(0o600)
    assert f"{tmp_path / 'wrong'} is not a CURVE key file" in refusal(*option, tmp_path / "wrong")


@pytest.mark.parametrize("path", ["_secret", "inner/_secret"])
def test_a_secret_key_needs_a_name_for_its_public_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    assert "_secret" in refusal(*SERVE_KEY, path)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "inner"]


@POSIX
@EITHER_OPTION
def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path, option: list[str]) -> None:
    device = tmp_path / "device"
    device.symlink_to("/dev/zero")
    assert f"{device} is not a CURVE key file: it is not a regular file" in refusal(*option, device)
    assert f"'{tmp_path}' is a directory" in refusal(*option, tmp_path)


def test_one_half_in_place_of_the_other_is_refused_by_name(keys: Keys) -> None:
    secret, public = keys.alice
    advice = f"{secret} is a secret key; pass its public half, {public}"
    assert advice in refusal(*SERVER_KEY, secret)
    assert f"{public} is a public key" in refusal(*SERVE_KEY, public)


@pytest.mark.parametrize("kind", ["another pair", "twice the same", "zeros"])
def test_a_pair_that_works_with_nobody_is_refused(tmp_path: Path, kind: str) -> None:
    secret = zmq.curve_keypair()[1]
    halves = {"another pair": (zmq.curve_keypair()[0], secret), "twice the same": (secret, secret)}
    public, secret = halves.get(kind, (b"0" * 40, b"0" * 40))
    path = tmp_path / "my.key_secret"
    path.write_text((CERTIFICATE + SECRET_HALF).format(public.decode(), secret.decode()))
    path.chmod(0o600)
    assert f"{path} is a key that works with nobody" in refusal(*SERVE_KEY, path)


def test_where_there_are_no_hard_links_a_key_is_created_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    secret, public = tmp_path / "my.key_secret", tmp_path / "my.key"
    result = CliRunner().invoke(cli, [*SERVE_KEY, str(secret)])
    assert "created" in result.stderr
    assert zmq.auth.load_certificate(public) == (zmq.auth.load_certificate(secret)[0], None)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not IS_ROOT, reason="needs root to give a file away")
@pytest.mark.parametrize(("mode", "accepted"), [(0o640, True), (0o660, False), (0o644, False)])
def test_a_secret_key_that_root_has_mounted_for_our_group_is_accepted(
    keys: Keys, tmp_path: Path, mode: int, accepted: bool
) -> None:
    """As a container's orchestrator does."""
    let_others_enter(keys.server.secret.parent)
    os.chown(keys.server.secret, 0, 65534)
    keys.server.secret.chmod(mode)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, "send", *as_client(keys.server, keys.alice)],
        stdin=subprocess.DEVNULL,  # there is nothing to send
        capture_output=True,
        timeout=LIMIT,
    )
    assert done.returncode == (0 if accepted else 2)
    assert (b"others may read" in done.stderr) is not accepted


# Key files of others

CERTIFICATE = """\
#   ****  Generated on 2024-05-06 07:08:09 by CZMQ  ****
#   ZeroMQ CURVE Public Certificate

metadata
    name = "alice"
curve
    public-key = "{0}"
"""
SECRET_HALF = '    secret-key = "{1}"\n'


@pytest.mark.parametrize(
    ("public", "secret"),
    [
        (CERTIFICATE, CERTIFICATE + SECRET_HALF),
        ("{0}\n", "curve\n" + SECRET_HALF),
        ("{0}\0", "curve\n" + SECRET_HALF),
    ],
    ids=["CZMQ", "each half alone", "ends with NUL"],
)
def test_key_files_of_others_serve_as_keys(
    keys: Keys,
    clients: Path,
    tmp_path: Path,
    guarded: Serve,
    serve: Serve,
    send: Send,
    public: str,
    secret: str,
) -> None:
    """On Linux, the name of a key file may be any bytes."""
    halves = [half.decode() for half in zmq.curve_keypair()]
    theirs = Pair(tmp_path / "alice_secret", tmp_path / "alice")
    theirs.public.write_text(public.format(*halves))
    theirs.secret.write_text(secret.format(*halves))
    theirs.secret.chmod(0o600)
    name = os.fsdecode(b"\xe9.key") if sys.platform == "linux" else "alice.key"
    shutil.copy(theirs.public, clients / name)
    server, endpoint = guarded("--verbose")
    done = send("--connect", endpoint, *as_client(theirs, keys.server), "as a client")
    assert done.stdout == b"as a client\n"
    server.wait_for_notice(r"request 1 from 127\.0\.0\.1 \(.*\.key\)")
    _, endpoint = serve("--key", str(theirs.secret), "--client-keys", str(theirs.public))
    done = send("--connect", endpoint, *as_client(theirs, theirs), "as a server")
    assert done.stdout == b"as a server\n"


@POSIX
def test_a_bare_key_may_be_either_half(tmp_path: Path) -> None:
    public, secret = zmq.curve_keypair()
    path = tmp_path / "bare"
    path.write_bytes(secret + b"\n")
    refused = refusal(*SERVE_KEY, path)
    assert f"{path} holds a key without a name, which may be either half" in refused
    assert 'has a line such as secret-key = "' in refused
    assert secret.decode() not in refused
    assert [each.name for each in tmp_path.iterdir()] == ["bare"]
    path.write_bytes(public)
    assert "without a name" not in refusal(*SERVER_KEY, path, "--timeout", "wrong")


def other_encodings(key: bytes) -> dict[str, str]:
    """Return a key in encodings that are not ZeroMQ's."""
    raw = z85.decode(key)
    return {
        "hexadecimal": raw.hex(),
        "HEXADECIMAL": raw.hex().upper(),
        "base64": base64.b64encode(raw).decode(),
        "base64 for URLs": base64.urlsafe_b64encode(raw).decode().rstrip("="),
    }


@EITHER_OPTION
@pytest.mark.parametrize("form", ["{}\n", 'curve\n    public-key = "{}"\n'])
def test_a_key_in_another_encoding_is_called_that(
    tmp_path: Path, option: list[str], form: str
) -> None:
    for encoding, text in other_encodings(zmq.curve_keypair()[0]).items():
        path = tmp_path / "key"
        path.write_text(form.format(text))
        refused = refusal(*option, path)
        assert f"its key is in {encoding.split()[0].lower()}" in refused
        assert text not in refused


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_a_key_file_may_be_in_utf_16_and_begin_with_a_byte_order_mark(
    keys: Keys, tmp_path: Path, serve: Serve, send: Send, encoding: str
) -> None:
    """As PowerShell 5.1 writes it."""
    mark = "" if encoding == "utf-8-sig" else "\ufeff"

    def convert(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_bytes((mark + text.replace("\n", "\r\n")).encode(encoding))
        path.chmod(0o600)
        return str(path)

    secret = convert("secret", keys.server.secret.read_text())
    public = convert("public", keys.server.key.public.decode() + "\n")
    client = convert("client", keys.alice.public.read_text())
    _, endpoint = serve("--key", secret, "--client-keys", client)
    done = send("--connect", endpoint, "--key", str(keys.alice.secret), "--server-key", public, "x")
    assert (done.returncode, done.stdout) == (0, b"x\n")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_secret_key_beside_the_public_half_of_another_pair_is_refused(
    keys: Keys, tmp_path: Path, is_new: bool
) -> None:
    """Nobody could connect with it."""
    secret, public = tmp_path / "me.key_secret", tmp_path / "me.key"
    shutil.copy(keys.alice.public, public)
    if not is_new:
        shutil.copy(keys.stranger.secret, secret)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    refused = refusal(*SERVE_KEY, secret)
    assert str(public) in refused
    assert is_new or "is not the public half of" in refused
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before


@POSIX
@pytest.mark.parametrize("kind", ["fifo", "pipe", "device"])
def test_client_keys_that_can_be_read_only_once_are_refused(
    keys: Keys, tmp_path: Path, kind: str
) -> None:
    """They would let nobody in, for ever."""
    os.mkfifo(tmp_path / "fifo")
    reading, writing = os.pipe()
    places = {"fifo": f"{tmp_path}/fifo", "pipe": f"/dev/fd/{reading}", "device": os.devnull}
    os.write(writing, keys.alice.public.read_bytes())
    os.close(writing)
    refused = refusal(*SERVE_KEY, keys.server.secret, "--client-keys", places[kind])
    os.close(reading)
    assert f"--client-keys: {places[kind]} can be read only once" in refused
    assert "pass a file or directory" in refused


# A key itself in place of its file

KEY = "2g6Yr1gb7Wr<-Ok0#z[$J/&$l<h+!I-{JEa:PgqH"
KEY_IN_BYTES = z85.decode(KEY.encode())
KEY_TEXTS = {
    "Z85": KEY,
    "with a newline": f"{KEY}\n",
    "in quotes": f'"{KEY}"',
    "in typographic quotes": f"\u201c{KEY}\u201d",
    "with its name": f'secret-key = "{KEY}"',
    "a whole key file": CERTIFICATE.format(KEY) + SECRET_HALF.format("", KEY),
    "one character lost": KEY[:-1],
    "the first one lost": KEY[1:],
    "both halves": f"{KEY} {KEY}",
    "in JSON": f'{{"key": "{KEY}"}}',
    "below the directory": f"./{KEY}",
    **other_encodings(KEY.encode()),
    "0x": f"0x{KEY_IN_BYTES.hex()}",
}


def shows_key(text: str) -> bool:
    """Return whether ``text`` shows a part of the key, in any encoding."""
    shown = "".join(text.split()).lower()
    forms = [KEY, *other_encodings(KEY.encode()).values()]
    parts = [form[start : start + 8].lower() for form in forms for start in range(len(form) - 7)]
    return any(part in shown for part in parts)


@pytest.mark.parametrize("text", KEY_TEXTS.values(), ids=KEY_TEXTS)
@pytest.mark.parametrize("in_variable", [False, True], ids=["option", "variable"])
def test_a_key_in_place_of_its_file_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, in_variable: bool
) -> None:
    """In a CI job, it would be in the log, and be the name of two files."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for command, option in [
        ("serve", "--key"),
        ("serve", "--client-keys"),
        ("serve", "--server-key"),
        ("send", "--key"),
        ("send", "--server-key"),
    ]:
        variable = f"ZMQMSG_{command}_{option[2:].replace('-', '_')}".upper()
        if in_variable:
            monkeypatch.setenv(variable, text)
            refused = refusal(command)
            monkeypatch.delenv(variable)
            assert f"(from {variable})" in refused
        else:
            refused = refusal(command, f"{option}={text}")
        assert "it takes a file, and this looks like a key itself" in refused
        assert not shows_key(refused), (command, option)
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [
        ["serve", "--bind"],
        ["serve", "--connect"],
        ["serve", "--count"],
        ["send", "--connect"],
        ["send", "--file"],
        ["send", "--timeout"],
        ["send", "--max-size"],
    ],
    ids=" ".join,
)
def test_no_option_shows_a_wrong_value_that_may_be_a_key(option: list[str]) -> None:
    for text in KEY_TEXTS.values():
        refused = refusal(option[0], f"{option[1]}={text}")
        assert option[1] in refused
        assert not shows_key(refused), text


@POSIX
def test_a_key_that_is_the_name_of_a_file_is_used_as_that(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a long path in a directory that exists is none."""
    monkeypatch.chdir(tmp_path)
    name = KEY.replace("/", "-")
    shutil.copy(keys.server.public, name)
    assert "looks like" not in refusal(*SERVER_KEY, name, "--timeout", "wrong")
    long = (f"{tmp_path}/" + "production-server" * 3)[: len(f"{tmp_path}/") + 30]
    assert "cannot read key file" in refusal(*SERVER_KEY, long)


# Where modes cannot be set


@POSIX
@pytest.mark.parametrize("command", ["serve", "send"])
def test_a_new_key_that_others_could_read_is_removed_again(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Some file systems keep no modes, such as the Windows drives of WSL."""
    directory = tmp_path / "drive"
    directory.mkdir()
    opened = os.open

    def open_without_modes(path: str, *arguments: int, **options: int) -> int:
        descriptor = opened(path, *arguments, **options)
        if str(path).startswith(str(directory)):
            os.fchmod(descriptor, 0o777)
        return descriptor

    monkeypatch.setattr("os.open", open_without_modes)
    options = SERVE_KEY if command == "serve" else [*SERVER_KEY, str(keys.server.public), "--key"]
    refused = refusal(*options, directory / "me.key_secret")
    assert "put it on a file system that keeps modes" in refused
    assert "chmod" not in refused
    assert list(directory.iterdir()) == []
    # One that was there before stays.
    (directory / "old.key_secret").write_bytes(keys.alice.secret.read_bytes())
    (directory / "old.key_secret").chmod(0o777)
    assert "put it on a file system that keeps modes" in refusal(
        *options, directory / "old.key_secret"
    )
    assert (directory / "old.key_secret").exists()


UNSHARE = ["unshare", "-m"] if IS_ROOT else ["unshare", "-rm"]
MOUNT = """
mount -t tmpfs none mounted
cp -p "$1" mounted/key
chmod $2 mounted/key
mount -o remount,bind,ro none mounted
shift 2
exec "$@"
"""


def may_mount(directory: Path) -> bool:
    """Return whether the tests may mount file systems."""
    if not shutil.which("unshare"):
        return False
    mount = [*UNSHARE, "mount", "-t", "tmpfs", "none", str(directory)]
    return subprocess.run(mount, capture_output=True).returncode == 0


@LINUX
@pytest.mark.parametrize(("mode", "accepted"), [("644", False), ("640", True), ("440", True)])
def test_on_a_read_only_mount_the_advice_is_to_mount_it_otherwise(
    keys: Keys, tmp_path: Path, mode: str, accepted: bool
) -> None:
    """Of root's key, the mode 440 or 640 is accepted for root as well."""
    (tmp_path / "mounted").mkdir()
    if not may_mount(tmp_path / "mounted"):
        pytest.skip("needs unshare and the right to mount")
    own = keys.alice.secret
    script = [*UNSHARE, "sh", "-ec", MOUNT, "sh", str(own), mode]
    command = [*COMMAND, "send", "--key", "mounted/key", *of_server(keys.server)]
    done = subprocess.run(
        [*script, *command],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == (0 if accepted else 2), done.stderr
    assert ("set its mode where it is mounted" in done.stderr) is not accepted
    assert "chmod" not in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="needs root, whose key it is")
@pytest.mark.parametrize(
    ("mode", "accepted"), [(0o440, True), (0o640, True), (0o660, False), (0o644, False)]
)
def test_roots_key_may_be_readable_by_a_group_for_root_as_well(
    keys: Keys, mode: int, accepted: bool
) -> None:
    keys.alice.secret.chmod(mode)
    nothing_to_send = CliRunner().invoke(cli, ["send", *as_client(keys.alice, keys.server)])
    assert nothing_to_send.exit_code == (0 if accepted else 2)


# Which options go together


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ("serve --client-keys P", "--client-keys needs --key"),
        ("serve --server-key P", "--server-key needs --connect"),
        ("serve --key K --server-key P", "--server-key needs --connect"),
        ("serve --connect E --key K", "--key with --connect needs --server-key"),
        ("serve --connect E --key K --client-keys P --server-key P", "an endpoint that is bound"),
        ("serve --bind E --connect E --server-key P", "--server-key with --bind needs --key"),
        ("serve --bind E --connect E --client-keys P --server-key P", "--client-keys needs --key"),
        ("send --key K hello", "--key needs --server-key"),
        ("serve --bind E --key K --client-keys P", "other.key does not exist"),
        ("serve --connect E --key K --server-key P", "cannot read key file "),
    ],
)
def test_what_is_missing_is_a_usage_error_that_names_it(
    tmp_path: Path, arguments: str, missing: str
) -> None:
    words = {
        "K": f"{tmp_path / 'me.key'}_secret",
        "P": f"{tmp_path}/other.key",
        "E": "tcp://192.0.2.1:1",
    }
    assert missing in refusal(*(words.get(word, word) for word in arguments.split()))
    assert list(tmp_path.iterdir()) == [], "wrong usage creates nothing"


# The three steps


def test_step_1_servers_that_start_at_once_create_one_key(
    tmp_path: Path, start: Start, send: Send
) -> None:
    """They talk to anyone who has its public half."""
    secret, public = tmp_path / "server.key_secret", tmp_path / "server.key"
    options = ["--bind", "tcp://127.0.0.1:*", "--count", "1", "--key", str(secret)]
    servers = [start("serve", *options) for _ in range(4)]
    for server in servers:
        endpoint = server.wait_for_notice("listening on (.*)")[1]
        done = send("--connect", endpoint, "--server-key", str(public), "hello")
        assert (done.returncode, done.stdout) == (0, b"hello\n")
        assert server.finish()[:2] == (0, b"hello\n")
    created = f"zmqmsg: created {secret}; give its public half, {public}, to your peers"
    notices = [notice for server in servers for notice in server.notices]
    assert [notice for notice in notices if "created" in notice] == [created]
    assert {path.name for path in tmp_path.iterdir()} == {"server.key_secret", "server.key"}
    assert sys.platform == "win32" or stat.S_IMODE(secret.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "public"), [("me.key_secret", "me.key"), ("me", "me.pub"), ("my.txt_secret", "my.txt")]
)
def test_step_2_a_client_has_a_key_of_its_own(
    keys: Keys, tmp_path: Path, serve: Serve, send: Send, name: str, public: str
) -> None:
    """It is created once; a public half that is missing is written again."""
    _server, endpoint = serve("--key", str(keys.server.secret))
    own, half = tmp_path / name, tmp_path / public
    options = ["--connect", endpoint, "--key", str(own), *of_server(keys.server)]
    first = send(*options, "hello")
    half.unlink()
    second = send(*options, "hello")
    assert (first.stdout, second.stdout) == (b"hello\n", b"hello\n")
    assert f"created {own}; give its public half, {half}, to your peers".encode() in first.stderr
    assert b"created" not in second.stderr
    assert zmq.auth.load_certificate(half) == (zmq.auth.load_certificate(own)[0], None)
    assert {path.name for path in tmp_path.iterdir()} == {"keys", name, public}


def test_step_3_only_clients_whose_keys_are_in_the_directory_are_let_in(
    keys: Keys, clients: Path, guarded: Serve, send: Send
) -> None:
    """A client that is refused again after it was let in is told of again."""
    server, endpoint = guarded("--verbose")
    server.wait_for_notice("no client can connect until there is a public key in ")
    connect = ["--connect", endpoint, *as_client(keys.alice, keys.server)]
    refused = f"zmqmsg: {endpoint}: it refused: the server does not know this key\n".encode()
    for is_known in (False, True, False):
        if is_known:
            shutil.copy(keys.alice.public, clients)
        done = send(*connect, "it is me")
        expected = (0, b"it is me\n") if is_known else (1, b"")
        assert (done.returncode, done.stdout) == expected
        assert done.stderr.endswith(refused) is not is_known
        (clients / "alice.key").unlink(missing_ok=True)
    server.wait_for_notice(r"request 1 from 127.0.0.1 \(alice.key\): 1 frame, 8 bytes")
    status, output, notices = stop(server)
    assert (status, output) == (0, b"it is me\n")
    public = keys.alice.key.public.decode()
    refusal = f"refused a client from 127.0.0.1: its public key {public} is not known"
    assert sum(refusal in notice for notice in notices) == 2


@pytest.mark.parametrize(
    ("with_key", "trusted", "at_client", "at_server"),
    [
        (True, None, "it requires CURVE; pass --server-key", "it uses no keys, and this"),
        (False, "server", "it does not use CURVE", r"it uses keys \(or PLAIN\), and this"),
        (True, "stranger", "CURVE handshake failing; check --server-key", "its --server-key"),
    ],
    ids=["server alone has a key", "client alone has a key", "wrong key"],
)
def test_both_sides_say_why_a_handshake_fails(
    keys: Keys,
    serve: Serve,
    start: Start,
    with_key: bool,
    trusted: str | None,
    at_client: str,
    at_server: str,
) -> None:
    server, endpoint = serve("--verbose", *["--key", str(keys.server.secret)] * with_key)
    options = of_server(getattr(keys, trusted)) if trusted else []
    client = start("send", "--connect", endpoint, *options, "x")
    client.wait_for_notice(f"{endpoint}: {at_client}")
    server.wait_for_notice(f"a client from .* did not get through: .*{at_server}")


# What changes while the server runs


def test_a_key_counts_from_the_next_handshake_on(
    context: Context, keys: Keys, clients: Path, guarded: Serve, start: Start
) -> None:
    _server, endpoint = guarded()
    alice, bob = keys.alice.key, keys.stranger.key
    assert let_in(context, endpoint, keys.server, alice, bob) == [False, False]
    shutil.copy(keys.alice.public, clients)
    assert let_in(context, endpoint, keys.server, alice, bob) == [True, False]
    connected = start("send", "--connect", endpoint, *as_client(keys.alice, keys.server))
    connected.send_line(b"before")
    assert connected.read_line() == b"before"
    (clients / "alice.key").rename(clients / "renamed")
    shutil.copy(keys.stranger.public, clients)
    assert let_in(context, endpoint, keys.server, alice, bob) == [True, True]
    (clients / "renamed").unlink()
    assert let_in(context, endpoint, keys.server, alice, bob) == [False, True]
    connected.send_line(b"after")
    assert connected.read_line() == b"after", "a connection that is up stays up"


@POSIX
def test_files_that_are_no_public_keys_are_told_of_once_and_let_nobody_in(
    context: Context, keys: Keys, clients: Path, guarded: Serve
) -> None:
    """A container's orchestrator mounts a directory by links to ``..data``, which are no keys."""
    (clients / "inner").mkdir()
    (clients / "text").write_text("hello")
    (clients / "device").symlink_to("/dev/zero")
    (clients / "dangling").symlink_to(clients / "nowhere")
    os.mkfifo(clients / "fifo")
    (clients / "..2026").mkdir()
    shutil.copy(keys.alice.public, clients / "..2026")
    (clients / "..data").symlink_to("..2026")
    (clients / "alice.key").symlink_to("..data/alice.key")
    server, endpoint = guarded()
    shutil.copy(keys.stranger.secret, clients)
    both = keys.alice.key, keys.stranger.key
    for _ in range(3):
        assert let_in(context, endpoint, keys.server, *both) == [True, False]
    notices = "\n".join(stop(server)[2])
    told = re.findall(f"{clients}/(\\S+) .*it is ignored$", notices, re.MULTILINE)
    assert sorted(told) == ["device", "fifo", "inner", "stranger.key_secret", "text"]


def test_a_key_file_that_is_half_written_lets_nobody_in(
    context: Context, keys: Keys, clients: Path, guarded: Serve
) -> None:
    _server, endpoint = guarded()
    text, key = keys.alice.public.read_text(), keys.alice.key
    complete = text.index(key.public.decode()) + len(key.public) + len('"')
    for length in (0, complete - 20, complete - 1, complete):
        (clients / "alice.key").write_text(text[:length])
        assert let_in(context, endpoint, keys.server, key) == [length == complete]


def test_a_single_file_of_client_keys_may_change_as_well(
    context: Context, keys: Keys, serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "client.key"
    alice, bob = keys.alice.key, keys.stranger.key
    shutil.copy(keys.alice.public, path)
    _, endpoint = serve("--key", str(keys.server.secret), "--client-keys", str(path))
    assert let_in(context, endpoint, keys.server, alice, bob) == [True, False]
    os.replace(shutil.copy(keys.stranger.public, tmp_path / "new"), path)
    assert let_in(context, endpoint, keys.server, alice, bob) == [False, True]


@waits
@pytest.mark.parametrize("name", ["clients", "clients/alice.key"], ids=["directory", "file"])
def test_clients_whose_keys_cannot_be_read_are_let_in_when_they_can(
    keys: Keys, clients: Path, serve: Serve, start: Start, name: str
) -> None:
    shutil.copy(keys.alice.public, clients)
    path = clients.parent / name
    server, endpoint = serve("--key", str(keys.server.secret), "--client-keys", str(path))
    elsewhere = path.rename(clients.parent / "elsewhere")
    client = start("send", "--connect", endpoint, *as_client(keys.alice, keys.server), "x")
    server.wait_for_notice(f"cannot read the client keys in {re.escape(str(path))}: ")
    client.wait_for_notice("cannot check clients just now")
    elsewhere.rename(path)
    assert client.finish()[:2] == (0, b"x\n")
    server.wait_for_notice("the client keys can be read again")


@LINUX
def test_without_descriptors_nobody_is_let_in_who_was_known_before(
    keys: Keys, clients: Path, guarded: Serve, start: Start
) -> None:
    for pair in (keys.alice, keys.stranger):
        shutil.copy(pair.public, clients)
    server, endpoint = guarded()
    (clients / "alice.key").unlink()
    one_client = descriptors(server.pid) + 1
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (one_client, hard))
    client = start("send", "--connect", endpoint, *as_client(keys.alice, keys.server), "x")
    server.wait_for_notice("cannot read the client keys in .*: Too many open files")
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (256, hard))
    status, output, notices = client.finish()
    assert (status, output) == (1, b"")
    assert "the server does not know this key" in notices[-1]


@contextmanager
def changed_meanwhile(change: Callable[[], object]) -> Iterator[None]:
    """Call ``change`` while the context runs, when a client that is there may be waiting."""
    timer = threading.Timer(0.3, change)
    timer.start()
    yield
    timer.join()


def test_clients_wait_for_a_directory_of_keys_that_is_away_for_a_moment(
    keys: Keys, clients: Path, guarded: Serve, start: Start
) -> None:
    shutil.copy(keys.alice.public, clients)
    server, endpoint = guarded()
    elsewhere = clients.rename(clients.with_name("elsewhere"))
    # Less than the ten seconds that a client waits which was put off.
    options = ["--timeout", "8", "--retries", "0", *as_client(keys.alice, keys.server)]
    client = start("send", "--connect", endpoint, *options, "x")
    server.wait_for_notice("cannot read the client keys in ")
    elsewhere.rename(clients)
    assert client.finish()[:2] == (0, b"x\n")


def test_clients_wait_for_a_file_of_keys_that_is_away_for_a_moment(
    context: Context, keys: Keys, clients: Path, serve: Serve
) -> None:
    path = Path(shutil.copy(keys.alice.public, clients))
    _, endpoint = serve("--key", str(keys.server.secret), "--client-keys", str(path))
    elsewhere = path.rename(path.with_name("elsewhere"))
    with changed_meanwhile(lambda: elsewhere.rename(path)):
        both = keys.alice.key, keys.stranger.key
        assert let_in(context, endpoint, keys.server, *both) == [True, False]


@pytest.mark.parametrize("part", [0, 0.5], ids=["empty", "half"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_clients_wait_for_a_key_file_that_is_being_written(
    context: Context, keys: Keys, clients: Path, guarded: Serve, part: float, known: bool
) -> None:
    text = keys.alice.public.read_text()
    file = clients / "alice.key"
    if known:
        file.write_text(text)
    _, endpoint = guarded()
    file.write_text(text[: int(len(text) * part)])
    with changed_meanwhile(lambda: file.write_text(text)):
        both = keys.alice.key, keys.stranger.key
        assert let_in(context, endpoint, keys.server, *both) == [True, False]


# Strangers


@waits
@LINUX
def test_known_clients_are_served_though_nobody_reads_the_notices(
    context: Context, keys: Keys, clients: Path, start: Start, send: Send
) -> None:
    shutil.copy(keys.alice.public, clients)
    endpoint = free_endpoint()
    reading, writing = os.pipe()
    try:
        guard = ["--key", str(keys.server.secret), "--client-keys", str(clients)]
        arguments = ["--quiet", "--bind", endpoint, *guard, "--exec", "sleep 1; cat"]
        server = start("serve", *arguments, stderr=writing)
        until(lambda: b"listening on" in os.read(reading, 4096))
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        assert let_in(context, endpoint, keys.server, *[keys.stranger.key] * 2) == [False] * 2
        own = as_client(keys.alice, keys.server)
        done = send("--connect", endpoint, "--timeout", "20", "--retries", "0", *own, "x")
        assert (done.returncode, done.stdout) == (0, b"x\n")
        client = start("send", "--verbose", "--connect", endpoint, "--retries", "0", *own, "y")
        client.wait_for_notice("connected to")
        time.sleep(0.5)  # nothing tells when the request has come
        server.signal(signal.SIGTERM)
        assert client.finish()[:2] == (0, b"y\n")
        server.wait()
    finally:
        os.close(reading)
        os.close(writing)


@LINUX
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=soak)])
def test_refused_strangers_cost_little_memory_and_few_notices(
    context: Context, keys: Keys, clients: Path, guarded: Serve, count: int
) -> None:
    shutil.copy(keys.alice.public, clients)
    server, endpoint = guarded()
    assert let_in(context, endpoint, keys.server, *[keys.stranger.key] * 3) == [False] * 3
    before = memory(server.pid)
    for _ in range(count // 100):
        strangers = [KeyPair(*zmq.curve_keypair()) for _ in range(100)]
        results = let_in(context, endpoint, keys.server, *strangers, keys.alice.key)
        assert results == [False] * 100 + [True]
    assert memory(server.pid) - before < 8192, "KiB"
    notices = stop(server)[2]
    assert sum(keys.stranger.key.public.decode() in notice for notice in notices) == 1
    assert 10 < len(notices) < 60
    assert any("further refusals" in notice for notice in notices)


@pytest.mark.parametrize("with_client_keys", [False, True])
def test_nothing_that_a_stranger_says_reaches_the_server(
    keys: Keys, serve: Serve, start: Start, with_client_keys: bool
) -> None:
    options = ["--client-keys", str(keys.alice.public)] if with_client_keys else []
    server, endpoint = serve("--key", str(keys.server.secret), *options)
    strangers = [[], of_server(keys.stranger), as_client(keys.alice, keys.stranger)]
    if with_client_keys:
        strangers += [of_server(keys.server), as_client(keys.stranger, keys.server)]
    connect = ["send", "--connect", endpoint]
    for stranger in [start(*connect, "--timeout", "0.7", *wrong, "hello") for wrong in strangers]:
        assert stranger.finish()[:2] == (1, b"")
    client = start(*connect, *as_client(keys.alice, keys.server), "it is me")
    assert client.finish()[1] == b"it is me\n"
    assert stop(server)[:2] == (0, b"it is me\n")


# Workers


@contextmanager
def curve_broker(key: KeyPair, workers: Path | None = None) -> Iterator[tuple[str, str]]:
    """Run a broker with ``key``, which lets in all, or those in the directory ``workers`` alone."""
    with ExitStack() as stack:

        def secure(bound: Socket) -> None:
            bound.curve_server = True
            bound.curve_secretkey = key.secret
            if workers and bound.type == zmq.DEALER:  # once, for both sockets of the context
                authenticator = ThreadAuthenticator(bound.context)
                authenticator.start()
                stack.callback(authenticator.stop)
                authenticator.configure_curve(location=str(workers))

        with broker(secure=secure) as ends, closing(stack):
            yield ends


def test_a_worker_serves_an_encrypted_broker_without_a_key_of_its_own(
    keys: Keys, start: Start, send: Send
) -> None:
    with curve_broker(keys.server.key) as (front, back):
        worker = start("serve", "--connect", back, *of_server(keys.server), "--count", "1")
        assert send("--connect", front, *of_server(keys.server), "hello").stdout == b"hello\n"
        assert worker.finish()[:2] == (0, b"hello\n")


@POSIX
def test_one_server_has_clients_of_its_own_and_a_broker_that_knows_it(
    keys: Keys, clients: Path, tmp_path: Path, start: Start, send: Send
) -> None:
    """Its key comes from a pipe, as of ``--key <(pass show server)``: it can be read only once."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    shutil.copy(keys.server.public, clients)
    with curve_broker(keys.stranger.key, workers=clients) as (front, back):
        connect = ["serve", "--connect", back, *of_server(keys.stranger)]
        refused = f"zmqmsg: {back}: it refused: the server does not know this key"
        assert start(*connect).finish() == (1, b"", [refused])
        bind = ["--bind", "tcp://127.0.0.1:*", "--client-keys", str(keys.alice.public)]
        answer = ["--key", str(fifo), "--exec", "tr a-z A-Z", "--count", "2"]
        server = start(*connect, *bind, *answer)
        fifo.write_bytes(keys.server.secret.read_bytes())
        endpoint = server.wait_for_notice("listening on (.*)")[1]
        direct = send("--connect", endpoint, *as_client(keys.alice, keys.server), "direct")
        indirect = send("--connect", front, *as_client(keys.server, keys.stranger), "indirect")
        assert (direct.stdout, indirect.stdout) == (b"DIRECT\n", b"INDIRECT\n")
        assert server.finish()[:2] == (0, b"direct\nindirect\n")


# Who asks, for a command

SHOW_CLIENT = 'echo "${ZMQMSG_PEER-none} ${ZMQMSG_PEER_KEY-none}"'
SHOW_CLIENT_OF_EACH = f"while read -r _; do {SHOW_CLIENT}; done"
INHERITED = {"ZMQMSG_PEER": "inherited", "ZMQMSG_PEER_KEY": "inherited"}


@POSIX
def test_a_command_finds_the_clients_address_and_the_name_of_its_key(
    keys: Keys, clients: Path, guarded: Serve, send: Send
) -> None:
    """The name is that of our file, whatever is in it."""
    name = "a b;$(id)'.key"
    shutil.copy(keys.alice.public, clients / name)
    _, endpoint = guarded("--exec", SHOW_CLIENT)
    done = send("--connect", endpoint, *as_client(keys.alice, keys.server), "x")
    assert done.stdout.decode() == f"127.0.0.1 {name}\n\n"


@POSIX
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_command_finds_nothing_that_the_client_chose(
    context: Context, keys: Keys, serve: Serve, encrypted: bool
) -> None:
    options = ["--key", str(keys.server.secret)] if encrypted else []
    _, endpoint = serve("--exec", SHOW_CLIENT, *options, env=os.environ | INHERITED)
    with context.socket(zmq.REQ) as client:
        client.linger = 0
        client.routing_id = b"chosen"
        for name in ("User-Id", "Peer-Address", "X-User-Id"):
            with suppress(zmq.ZMQError):
                client.setsockopt(zmq.METADATA, f"{name}:chosen".encode())
        if encrypted:
            client.curve_publickey, client.curve_secretkey = keys.alice.key
            client.curve_serverkey = keys.server.key.public
        client.connect(endpoint)
        client.send(b"x")
        assert client.poll(LIMIT * 1000)
        assert client.recv() == b"127.0.0.1 none\n"


@POSIX
def test_over_a_unix_socket_a_command_finds_the_clients_process(
    serve: Serve, send: Send, tmp_path: Path
) -> None:
    _, endpoint = serve("--bind", f"ipc://{tmp_path}/socket", "--exec", SHOW_CLIENT)
    shown = send("--connect", endpoint, "x").stdout
    assert re.fullmatch(rb"(process \d+|none) none\n\n", shown)


@POSIX
def test_a_filter_finds_no_client_as_it_answers_many(serve: Serve, send: Send) -> None:
    _, endpoint = serve("--filter", SHOW_CLIENT_OF_EACH, env=os.environ | INHERITED)
    assert send("--connect", endpoint, "x").stdout == b"none none\n"


# Secrets stay secret


def test_nothing_that_is_said_under_curve_can_be_read_on_the_wire(
    keys: Keys, serve: Serve, send: Send, echo: str
) -> None:
    recorded = bytearray()

    def record(data: bytes, target: socket.socket, upstream: bool) -> None:
        recorded.extend(data)
        target.sendall(data)

    _server, encrypted = serve("--key", str(keys.server.secret))
    for endpoint, options, status, seen in [
        (echo, [], 0, 2),
        (echo, [*of_server(keys.server), "--timeout", "0.7"], 1, 0),
        (encrypted, of_server(keys.server), 0, 0),
    ]:
        recorded.clear()
        with relay(endpoint, record) as relayed:
            assert send("--connect", relayed, *options, "this is private").returncode == status
        assert recorded
        assert recorded.count(b"this is private") == seen


@POSIX
def test_no_output_shows_a_secret_key(
    keys: Keys, clients: Path, tmp_path: Path, guarded: Serve, start: Start
) -> None:
    secret = keys.alice.key.secret
    shutil.copy(keys.alice.public, clients)
    shutil.copy(keys.stranger.secret, clients)
    server, endpoint = guarded("--verbose")
    broken = tmp_path / "broken"
    broken.write_bytes(keys.alice.secret.read_bytes().replace(secret, secret[:-1] + b"~"))
    broken.chmod(0o600)
    senders = [
        start("send", "--verbose", "--connect", endpoint, *options, "hello")
        for options in (
            as_client(keys.alice, keys.server),
            as_client(keys.stranger, keys.server),
            ["--key", str(keys.alice.secret), "--server-key", str(keys.server.secret)],
            ["--key", str(broken), *of_server(keys.server)],
        )
    ]
    statuses, outputs, notices = zip(*(sender.finish() for sender in senders), strict=True)
    assert statuses == (0, 1, 2, 2)
    output = b"".join(outputs) + "\n".join(sum(notices, stop(server)[2])).encode()
    assert keys.stranger.key.public in output
    for pair in keys:
        assert pair.key.secret[:10] not in output
