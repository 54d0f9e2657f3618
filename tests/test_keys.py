"""CURVE keys: their files, the three steps of the README, and who is let in."""

import ctypes.util
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import zmq
import zmq.auth
from click.testing import CliRunner
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from zmqmsg.cli import cli
from zmqmsg.curve import ClientKeys, CurveKeys, load_key_pair, load_public_key, start_zap_handler
from zmqmsg.sockets import Context, Socket

from conftest import COMMAND, LIMIT, LINUX, POSIX, Send, Serve, Start, address, broker, memory, relay, soak, stop, until
from zmtp import command, greeting, ready, request

with suppress(ImportError):  # Windows has none
    import resource


def refusal(text: str) -> pytest.RaisesExc[click.UsageError]:
    """Return what expects a usage error with ``text``."""
    return pytest.raises(click.UsageError, match=re.escape(text))


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
        """The key itself."""
        return KeyPair(*map(bytes, filter(None, zmq.auth.load_certificate(self.secret))))


class Keys(NamedTuple):
    """The keys of a server, of a client that it knows, and of one that it does not."""

    server: Pair
    alice: Pair
    stranger: Pair


def new_pair(directory: Path, name: str) -> Pair:
    load_key_pair(str(directory / f"{name}.key_secret"))
    return Pair(directory / f"{name}.key_secret", directory / f"{name}.key")


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
    return lambda *arguments: serve("--key", str(keys.server.secret), "--client-keys", str(clients), *arguments)


def as_client(own: Pair, server: Pair) -> list[str]:
    """Return the options of a client with a key of its own."""
    return ["--key", str(own.secret), "--server-key", str(server.public)]


def let_in(context: Context, endpoint: str, server: Pair, *clients: KeyPair) -> list[bool]:
    """Return for each key whether ``server`` lets a plain REQ socket with it in; they all try at the same time."""
    with ExitStack() as stack:
        monitors = []
        for own in clients:
            client = stack.enter_context(context.socket(zmq.REQ))
            client.curve_publickey, client.curve_secretkey, client.curve_serverkey = *own, server.key.public
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


@pytest.mark.parametrize(
    ("name", "public"),
    [("me.key_secret", "me.key"), ("me", "me.pub"), ("me.key", "me.key.pub"), ("my.txt_secret", "my.txt")],
)
def test_a_missing_key_is_created_with_its_public_half_beside_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, public: str
) -> None:
    own = tmp_path / name
    key = KeyPair(*load_key_pair(str(own)))
    assert {path.name for path in tmp_path.iterdir()} == {name, public}
    assert zmq.auth.load_certificate(own) == (key.public, key.secret)
    assert zmq.auth.load_certificate(tmp_path / public) == (key.public, None)
    assert zmq.curve_public(key.secret) == key.public
    notice = capfd.readouterr().err
    assert f"created {own}; give its public half, {tmp_path / public}, to your peers" in notice
    assert load_key_pair(str(own)) == key
    assert capfd.readouterr().err == "", "nothing is created the second time"


@POSIX
def test_nobody_else_may_read_a_secret_key_that_is_created(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        own = new_pair(tmp_path, "me").secret
    finally:
        os.umask(umask)
    assert stat.S_IMODE(own.stat().st_mode) == 0o600


@POSIX
def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "me.key").write_text("precious")
    (tmp_path / "link.key_secret").symlink_to(tmp_path / "elsewhere")
    with refusal(f"cannot create key file {tmp_path / 'me.key'}: File exists"):
        load_key_pair(str(tmp_path / "me.key_secret"))
    with refusal(f"cannot read key file {tmp_path / 'link.key_secret'}: No such file"):
        load_key_pair(str(tmp_path / "link.key_secret"))
    assert (tmp_path / "me.key").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.key_secret", "me.key"]


@POSIX
@pytest.mark.parametrize("place", ["missing", "file", pytest.param("/proc", marks=LINUX)])
def test_a_key_that_cannot_be_created_is_an_error_that_names_the_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(click.UsageError, match=f"cannot create key file .*{place}/me.key_secret: "):
        load_key_pair(str(tmp_path / place / "me.key_secret"))


@POSIX
def test_a_full_disk_leaves_no_half_of_a_key_behind(tmp_path: Path, echo: str) -> None:
    """Otherwise the next start would fail as well, because nothing is overwritten."""
    limited = [
        "sh",
        "-c",
        'ulimit -f 0; exec "$@"',
        "sh",
        *COMMAND,
        "send",
        "--connect",
        echo,
        "--server-key",
        str(new_pair(tmp_path, "other").public),
    ]
    done = subprocess.run([*limited, "--key", f"{tmp_path / 'me.key'}_secret", "x"], capture_output=True, timeout=LIMIT)
    assert done.returncode == 2
    assert b"cannot create key file" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"other.key", "other.key_secret"}


@POSIX
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o602])
def test_a_secret_key_that_others_may_use_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    own = new_pair(tmp_path, "my own").secret
    own.chmod(mode)
    with refusal(f"others may read the secret key in {own}; run: ") as refused:
        load_key_pair(str(own))
    subprocess.run(["sh", "-c", refused.value.message.partition("run: ")[2]], check=True)
    assert load_key_pair(str(own))


NO_KEYS = {
    "empty": b"",
    "text": b"hello\n",
    "binary": bytes(range(256)),
    "no public key": b"metadata\ncurve\n",
    "long key": b'curve\n    public-key = "' + b"a" * 45 + b'"\n',
    "uneven key": b'curve\n    public-key = "' + b"a" * 39 + b'"\n',
    "above Z85": b'curve\n    public-key = "' + b"#" * 40 + b'"\n',
    "not ASCII": 'curve\n    public-key = "é"\n'.encode() * 40,
    "too large": b"#" * 65537,
}


@pytest.mark.parametrize("content", NO_KEYS.values(), ids=NO_KEYS)
@pytest.mark.parametrize("load", [load_key_pair, load_public_key])
def test_a_file_that_is_no_key_is_refused_by_name(
    tmp_path: Path, content: bytes, load: Callable[[str], object]
) -> None:
    (tmp_path / "wrong").write_bytes(content)
    (tmp_path / "wrong").chmod(0o600)
    with refusal(f"{tmp_path / 'wrong'} is not a CURVE key file"):
        load(str(tmp_path / "wrong"))


@POSIX
@pytest.mark.parametrize("load", [load_key_pair, load_public_key])
@pytest.mark.parametrize("kind", ["directory", "device"])
def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path, kind: str, load: Callable[[str], object]) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    with refusal(f"{tmp_path}/{kind} is not a CURVE key file: it is not a regular file"):
        load(str(tmp_path / kind))


def test_one_half_in_place_of_the_other_or_none_is_refused_by_name(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(
        click.UsageError,
        match=re.escape(f"{keys.alice.secret} is a secret key; pass its public half, {keys.alice.public}"),
    ):
        load_public_key(str(keys.alice.secret))
    with refusal(f"{keys.alice.public} is a public key"):
        load_key_pair(str(keys.alice.public))
    with refusal(f"cannot read key file {tmp_path / 'none'}: "):
        load_public_key(str(tmp_path / "none"))


@POSIX
@pytest.mark.parametrize("load", [load_key_pair, load_public_key])
def test_a_fifo_is_read_as_a_key_file(keys: Keys, tmp_path: Path, load: Callable[[str], object]) -> None:
    """As of ``--key <(pass show server)``, whose writer may be slow."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    pair = keys.alice
    source = pair.secret if load is load_key_pair else pair.public

    def write() -> None:
        time.sleep(0.2)
        fifo.write_bytes(source.read_bytes())

    writer = threading.Thread(target=write)
    writer.start()
    assert load(str(fifo)) in (tuple(pair.key), pair.key.public)
    writer.join(LIMIT)


def test_a_public_key_may_stand_alone_in_its_file(tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "bare").write_bytes(keys.alice.key.public + b"\n")
    assert load_public_key(str(tmp_path / "bare")) == keys.alice.key.public


def test_a_missing_public_half_is_written_again(keys: Keys) -> None:
    keys.alice.public.unlink()
    load_key_pair(str(keys.alice.secret))
    assert load_public_key(str(keys.alice.public)) == keys.alice.key.public


def test_processes_that_create_one_key_at_once_all_get_the_same(tmp_path: Path, start: Start) -> None:
    key = tmp_path / "server.key_secret"
    servers = [start("serve", "--bind", "tcp://127.0.0.1:*", "--key", str(key)) for _ in range(6)]
    for server in servers:
        server.wait_for_notice("listening")
    assert sum("created" in notice for server in servers for notice in server.notices) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"server.key_secret", "server.key"}
    assert KeyPair(*load_key_pair(str(key))).public == load_public_key(str(tmp_path / "server.key"))


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="needs root to give a file away")
def test_a_secret_key_that_root_has_mounted_for_our_group_is_accepted(keys: Keys, tmp_path: Path) -> None:
    """As a container's orchestrator does."""

    for directory in (keys.server.secret.parent, tmp_path, *tmp_path.parents[:-1]):
        directory.chmod(directory.stat().st_mode | 0o011)
    os.chown(keys.server.secret, 0, 65534)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        assert [accepts(keys.server.secret, mode) for mode in (0o640, 0o660, 0o644)] == [True, False, False]
    finally:
        os.seteuid(0)
        os.setegid(0)


def accepts(secret: Path, mode: int) -> bool:
    """Return whether ``secret`` is accepted with ``mode``, which root gives it."""
    nobody = os.geteuid()
    os.seteuid(0)
    secret.chmod(mode)
    os.seteuid(nobody)
    try:
        return bool(load_key_pair(str(secret)))
    except click.UsageError:
        return False


# Certificates of others

CZMQ_CERTIFICATE = """\
#   ****  Generated on 2024-05-06 07:08:09 by CZMQ  ****
#   ZeroMQ CURVE Public Certificate

metadata
    name = "alice"
curve
    public-key = "{}"
"""


def made_by_pyzmq(directory: Path) -> Pair:
    return Pair(*map(Path, reversed(zmq.auth.create_certificates(directory, "alice"))))


def made_by_czmq(directory: Path) -> Pair:
    public, secret = (half.decode() for half in zmq.curve_keypair())
    text = CZMQ_CERTIFICATE.format(public)
    (directory / "alice").write_text(text)
    (directory / "alice_secret").write_text(f'{text}    secret-key = "{secret}"\n')
    return Pair(directory / "alice_secret", directory / "alice")


@pytest.mark.parametrize("make", [made_by_pyzmq, made_by_czmq])
def test_certificates_of_others_serve_as_keys(
    keys: Keys, clients: Path, tmp_path: Path, serve: Serve, send: Send, make: Callable[[Path], Pair]
) -> None:
    theirs = make(tmp_path)
    theirs.secret.chmod(0o600)
    shutil.copy(theirs.public, clients)
    server, endpoint = serve("--key", str(keys.server.secret), "--client-keys", str(clients), "--count", "1")
    assert send("--connect", endpoint, *as_client(theirs, keys.server), "as a client").stdout == b"as a client\n"
    assert server.finish()[0] == 0
    _server, endpoint = serve("--key", str(theirs.secret), "--client-keys", str(theirs.public))
    assert send("--connect", endpoint, *as_client(theirs, theirs), "as a server").stdout == b"as a server\n"


def test_czmq_reads_the_keys_that_are_created_here(keys: Keys) -> None:
    if not (library := ctypes.util.find_library("czmq")):
        pytest.skip("needs CZMQ")
    code = f"""
import ctypes, sys
czmq = ctypes.CDLL({library!r})
czmq.zcert_load.restype = ctypes.c_void_p
for read in czmq.zcert_public_txt, czmq.zcert_secret_txt:
    read.restype, read.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    print(read(czmq.zcert_load(sys.argv[1].encode())).decode())
"""
    done = subprocess.run([sys.executable, "-c", code, str(keys.alice.secret)], capture_output=True, timeout=LIMIT)
    assert done.stdout.split() == [*keys.alice.key]


# Which options go together


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ("serve --client-keys P", "--client-keys needs --key"),
        ("serve --server-key P", "--server-key needs --connect"),
        ("serve --key K --server-key P", "--server-key needs --connect"),
        ("serve --connect E --key K", "--key with --connect needs --server-key"),
        ("serve --connect E --client-keys P", "--client-keys needs --key"),
        ("serve --connect E --key K --client-keys P --server-key P", "an endpoint that is bound"),
        ("serve --bind E --connect E --key K", "--key with --connect needs --server-key"),
        ("serve --bind E --connect E --server-key P", "--server-key with --bind needs --key"),
        ("serve --bind E --connect E --client-keys P --server-key P", "--client-keys needs --key"),
        ("send --key K hello", "--key needs --server-key"),
    ],
)
def test_a_wrong_combination_is_a_usage_error_that_says_what_is_missing(
    tmp_path: Path, arguments: str, missing: str
) -> None:
    words = {"K": f"{tmp_path / 'me.key'}_secret", "P": f"{tmp_path}/other.key", "E": "tcp://127.0.0.1:5555"}
    result = CliRunner().invoke(cli, [words.get(word, word) for word in arguments.split()])
    assert result.exit_code == 2
    assert missing in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == [], "wrong usage creates nothing"


def test_a_missing_path_of_client_keys_is_a_usage_error(keys: Keys, tmp_path: Path, start: Start) -> None:
    server = start("serve", "--key", str(keys.server.secret), "--client-keys", str(tmp_path / "none"))
    status, _, notices = server.finish()
    assert status == 2
    assert f"{tmp_path / 'none'} does not exist" in notices[-1]


# The three steps


def test_step_1_a_server_with_a_key_talks_to_anyone_who_has_its_public_half(
    tmp_path: Path, serve: Serve, send: Send
) -> None:
    secret, public = tmp_path / "server.key_secret", tmp_path / "server.key"
    server, endpoint = serve("--key", str(secret), "--count", "2")
    assert server.notices[0] == f"zmqmsg: created {secret}; give its public half, {public}, to your peers"
    done = send("--connect", endpoint, "--server-key", str(public), "hello", "again")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\nagain\n", b"")
    assert server.finish()[:2] == (0, b"hello\nagain\n")
    assert {path.name for path in tmp_path.iterdir()} == {"server.key_secret", "server.key"}


def test_step_2_a_client_has_a_key_of_its_own(keys: Keys, tmp_path: Path, serve: Serve, send: Send) -> None:
    _server, endpoint = serve("--key", str(keys.server.secret))
    own = tmp_path / "bob.key_secret"
    options = ["--connect", endpoint, "--key", str(own), "--server-key", str(keys.server.public)]
    first, second = send(*options, "hello"), send(*options, "hello")
    assert (first.stdout, second.stdout, second.stderr) == (b"hello\n", b"hello\n", b"")
    assert f"created {own}; give its public half, {tmp_path / 'bob.key'}, to your peers".encode() in first.stderr


def test_step_3_only_clients_whose_keys_are_in_the_directory_are_let_in(
    keys: Keys, clients: Path, guarded: Serve, send: Send
) -> None:
    server, endpoint = guarded("--verbose")
    server.wait_for_notice("no client can connect until there is a public key in ")
    alice = ["--connect", endpoint, *as_client(keys.alice, keys.server)]
    refused = send(*alice, "let me in")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert refused.stderr.decode() == f"zmqmsg: {endpoint}: it refused: the server does not know this key\n"
    public = keys.alice.key.public.decode()
    assert f"127.0.0.1: its public key {public} is not known" in server.wait_for_notice("refused a client from .*")[0]
    shutil.copy(keys.alice.public, clients)
    assert send(*alice, "it is me").stdout == b"it is me\n"
    server.wait_for_notice(r"request 1 from 127.0.0.1 \(alice.key\): 1 frame, 8 bytes")
    assert stop(server)[:2] == (0, b"it is me\n")


FAILING = "CURVE handshake failing; check --server-key, or the server cannot check clients just now"


def test_a_handshake_that_fails_says_what_to_check(keys: Keys, serve: Serve, start: Start) -> None:
    _plain, plain = serve()
    _curve, curve = serve("--key", str(keys.server.secret))
    for endpoint, options, notice in [
        (curve, [], "{}: it requires CURVE; pass --server-key"),
        (
            curve,
            ["--server-key", str(keys.stranger.public)],
            "waiting for {}: CURVE handshake failing; check --server-key, or the server cannot check clients just now",
        ),
        (plain, ["--server-key", str(keys.server.public)], "{}: it does not use CURVE: is it the right server?"),
    ]:
        sender = start("send", "--connect", endpoint, *options, "x")
        assert sender.wait_for_notice("zmqmsg: (.*)")[1] == notice.format(endpoint)


@LINUX
@pytest.mark.parametrize("step", [1, 3])
def test_only_a_server_that_lets_anyone_in_warns_beyond_loopback(
    keys: Keys, tmp_path: Path, start: Start, step: int
) -> None:
    # In a network of its own, so that really nobody can reach it.
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nexec unshare --user --net {sys.executable} "$@"\n')
    script.chmod(0o755)
    options = ["--client-keys", str(keys.alice.public)] * (step == 3)
    server = start("serve", "--key", str(keys.server.secret), "--bind", "tcp://*:5555", *options, executable=script)
    if "unshare" in server.wait_for_notice("listening on all IPv4 addresses|unshare failed")[0]:
        pytest.skip("needs the right to make a network namespace")
    assert any("anyone who can reach" in notice for notice in stop(server)[2]) is (step == 1)


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
def test_a_file_that_is_no_public_key_is_told_of_once_and_everything_else_goes_on(
    context: Context, keys: Keys, clients: Path, guarded: Serve
) -> None:
    (clients / "inner").mkdir()
    (clients / "text").write_text("hello")
    (clients / "device").symlink_to("/dev/zero")
    (clients / "dangling").symlink_to(clients / "nowhere")
    os.mkfifo(clients / "fifo")
    shutil.copy(keys.alice.public, clients)
    server, endpoint = guarded()
    shutil.copy2(keys.stranger.secret, clients)
    for _ in range(3):
        assert let_in(context, endpoint, keys.server, keys.alice.key, keys.stranger.key) == [True, False]
    notices = stop(server)[2]
    for name in ("inner", "text", "device", "fifo", "stranger.key_secret"):
        told = [notice for notice in notices if f"{clients / name} " in notice]
        assert len(told) == 1
        assert told[0].endswith("it lets nobody in")


def test_a_key_file_that_is_half_written_lets_nobody_in(keys: Keys, clients: Path) -> None:
    known = ClientKeys(str(clients))
    text, public = keys.alice.public.read_text(), keys.alice.key.public
    complete = text.index(public.decode()) + len(public) + len('"')
    for length in range(len(text) + 1):
        (clients / "alice.key").write_text(text[:length])
        assert known.find(public) == ("alice.key" if length >= complete else None)


def test_a_single_file_of_client_keys_may_change_and_go_as_well(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    shutil.copy(keys.alice.public, path)
    known = ClientKeys(str(path))
    assert known.find(keys.alice.key.public) == "client.key"
    os.replace(shutil.copy(keys.stranger.public, tmp_path / "new"), path)
    assert (known.find(keys.alice.key.public), known.find(keys.stranger.key.public)) == (None, "client.key")
    path.unlink()
    assert known.find(keys.stranger.key.public) is None


def find(known: ClientKeys, public: bytes) -> str | None:
    """Return what is found; None also if that cannot be known just now."""
    with suppress(OSError):
        return known.find(public)
    return None


@POSIX
def test_without_descriptors_nobody_is_let_in_who_was_known_before(keys: Keys, clients: Path) -> None:
    """What cannot be known just now is no reason to let somebody in, nor to refuse somebody for good."""
    for pair in (keys.alice, keys.server):
        shutil.copy(pair.public, clients)
    known = ClientKeys(str(clients))
    server, alice, stranger = (pair.key.public for pair in keys)
    (clients / "alice.key").unlink()
    shutil.copy(keys.stranger.public, clients)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for public in (alice, stranger) * 3:
            with pytest.raises(OSError, match=r"Too many open files|temporarily unavailable"):
                known.find(public)
        assert known.find(server) == "server.key", "its file is unchanged"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: find(known, stranger) == "stranger.key")
    assert known.find(alice) is None


@POSIX
def test_unknown_keys_take_a_small_share_of_the_time_however_many_are_known(clients: Path) -> None:
    for number in range(1000):
        (clients / f"{number}.key").write_bytes(zmq.curve_keypair()[0])
    known = ClientKeys(str(clients))
    started = time.monotonic()
    for _ in range(2000):
        assert known.find(b"?" * 40) is None
    assert time.monotonic() - started < 2, "milliseconds for each, if each were a scan"


def test_looking_a_key_up_among_1000_takes_at_most_5_ms_more_than_among_one(clients: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for number in range(1000):
        public = zmq.curve_keypair()[0].decode()
        (clients / f"{number}.key").write_text(f'curve\n    public-key = "{public}"\n')
    shutil.copy(clients / "999.key", tmp_path / "one")

    def fastest(path: Path) -> float:
        known = ClientKeys(str(path))
        times = []
        for _ in range(50):
            started = time.perf_counter()
            assert known.find(public.encode()) == "999.key"
            times.append(time.perf_counter() - started)
        return min(times)

    assert fastest(clients) - fastest(tmp_path / "one") < 0.005


@LINUX
def test_the_name_of_a_key_file_may_be_any_bytes(keys: Keys, clients: Path, guarded: Serve, send: Send) -> None:
    shutil.copy(keys.alice.public, clients / os.fsdecode(b"\xe9.key"))
    server, endpoint = guarded("--verbose", "--count", "1")
    assert send("--connect", endpoint, *as_client(keys.alice, keys.server), "hello").stdout == b"hello\n"
    server.wait_for_notice(r"request 1 from 127\.0\.0\.1 \(.*\.key\)")
    assert server.finish()[:2] == (0, b"hello\n")


# Strangers


@LINUX
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=soak)])
def test_however_many_strangers_are_refused_clients_are_let_in_and_memory_and_notices_stay_bounded(
    context: Context, keys: Keys, clients: Path, guarded: Serve, count: int
) -> None:
    shutil.copy(keys.alice.public, clients)
    server, endpoint = guarded()
    assert let_in(context, endpoint, keys.server, *[keys.stranger.key] * 3) == [False] * 3
    before = memory(server.pid)
    for _ in range(count // 100):
        strangers = [KeyPair(*zmq.curve_keypair()) for _ in range(100)]
        assert let_in(context, endpoint, keys.server, *strangers, keys.alice.key) == [False] * 100 + [True]
    assert memory(server.pid) - before < 8192, "KiB"
    notices = stop(server)[2]
    assert sum(keys.stranger.key.public.decode() in notice for notice in notices) == 1
    assert 10 < len(notices) < 30
    assert any("further refusals" in notice for notice in notices)


LET_ME_IN = b"let me in"
BY_HAND = {
    "NULL": (greeting() + ready(b"REQ"), b"READY", request(LET_ME_IN)),
    "PLAIN": (greeting(b"PLAIN") + command(b"HELLO", b"\x05admin\x05admin"), b"WELCOME", request(LET_ME_IN)),
    "ZMTP 2": (b"\xff" + bytes(8) + b"\x7f\x01\x03\0\0", b"\x7f", request(LET_ME_IN)),
    "ZMTP 1": (b"\x01\0", b"\x7f", b"\x01\x01" + bytes([len(LET_ME_IN) + 1, 0]) + LET_ME_IN),
}
"""How strangers begin, what they wait for, and how they go on."""


def answer(endpoint: str, opening: bytes, expected: bytes, rest: bytes) -> bytes:
    """Return what a server says, until it echoes or hangs up."""
    heard = b""
    with socket.create_connection(address(endpoint), LIMIT) as stranger, suppress(ConnectionError):
        stranger.sendall(opening)
        for awaited, said in ((expected, rest), (LET_ME_IN, b"")):
            while awaited not in heard:
                if not (data := stranger.recv(4096)):
                    return heard
                heard += data
            stranger.sendall(said)
    return heard


@pytest.mark.parametrize("with_client_keys", [False, True])
def test_nothing_that_a_stranger_says_reaches_the_server(
    keys: Keys, serve: Serve, send: Send, echo: str, with_client_keys: bool
) -> None:
    for mechanism, words in BY_HAND.items():
        if mechanism != "PLAIN":
            assert LET_ME_IN in answer(echo, *words), "a server without keys understands it"
    options = ["--client-keys", str(keys.alice.public)] if with_client_keys else []
    server, endpoint = serve("--key", str(keys.server.secret), *options)
    for words in BY_HAND.values():
        assert LET_ME_IN not in answer(endpoint, *words)
    for wrong in [
        [],
        ["--server-key", str(keys.stranger.public)],
        as_client(keys.alice, keys.stranger),
        *([["--server-key", str(keys.server.public)], as_client(keys.stranger, keys.server)] if options else []),
    ]:
        done = send("--connect", endpoint, "--timeout", "0.7", *wrong, LET_ME_IN)
        assert (done.returncode, done.stdout) == (1, b"")
    alice = send("--connect", endpoint, *as_client(keys.alice, keys.server), "it is me")
    assert alice.stdout == b"it is me\n"
    assert stop(server)[:2] == (0, b"it is me\n")


@pytest.fixture
def zap(keys: Keys) -> Iterator[Socket]:
    """A REQ socket that asks the handler for Alice's key alone as libzmq does, from inside the process."""
    context: Context = zmq.Context()
    start_zap_handler(context, ClientKeys(str(keys.alice.public)))
    with context.socket(zmq.REQ) as asking:
        asking.linger = 0
        asking.rcvtimeo = LIMIT * 1000
        asking.connect("inproc://zeromq.zap.01")
        yield asking
    context.term()  # which the handler's own socket does not keep from ending


def zap_request(credentials: bytes, mechanism: bytes = b"CURVE", source: bytes = b"127.0.0.1") -> list[bytes]:
    return [b"1.0", b"7", b"zmqmsg", source, b"", mechanism, credentials]


def test_a_malformed_zap_request_lets_nobody_in(keys: Keys, zap: Socket) -> None:
    known, unknown = z85.decode(keys.alice.key.public), bytes(32)
    for refused in [
        [b""],
        [b"1.0"],
        zap_request(known)[:6],
        zap_request(known[:31]),
        zap_request(known + b"\0"),
        zap_request(b""),
        zap_request(unknown, source=b"\xff"),
        zap_request(known, b"PLAIN"),
        [*zap_request(b"admin", b"PLAIN"), b"admin"],
        zap_request(b"", b"NULL"),
    ]:
        zap.send_multipart(refused)
        assert zap.recv_multipart()[2] == b"400"
    zap.send_multipart(zap_request(known))
    assert zap.recv_multipart() == [b"1.0", b"7", b"200", b"OK", b"alice.key", b""]


# Workers


def curve_server(key: KeyPair) -> Callable[[Socket], None]:
    def secure(bound: Socket) -> None:
        bound.curve_server = True
        bound.curve_secretkey = key.secret

    return secure


def test_a_worker_serves_an_encrypted_broker_without_a_key_of_its_own(keys: Keys, start: Start, send: Send) -> None:
    server_key = ["--server-key", str(keys.server.public)]
    with broker(secure=curve_server(keys.server.key)) as (front, back):
        worker = start("serve", "--connect", back, *server_key, "--count", "1")
        assert send("--connect", front, *server_key, "hello").stdout == b"hello\n"
        assert worker.finish()[:2] == (0, b"hello\n")


def test_a_worker_with_a_key_serves_a_broker_that_knows_it_alone(keys: Keys, start: Start, send: Send) -> None:
    def secure(bound: Socket) -> None:
        curve_server(keys.server.key)(bound)
        if bound.type == zmq.DEALER:
            start_zap_handler(bound.context, ClientKeys(str(keys.alice.public)))
            bound.zap_domain = b"workers"

    with broker(secure=secure) as (front, back):
        status, _, notices = start("serve", "--connect", back, "--server-key", str(keys.server.public)).finish()
        assert (status, notices) == (1, [f"zmqmsg: {back}: it refused: the server does not know this key"])
        worker = start("serve", "--connect", back, *as_client(keys.alice, keys.server), "--count", "1")
        assert send("--connect", front, *as_client(keys.alice, keys.server), "hello").stdout == b"hello\n"
        assert worker.finish()[:2] == (0, b"hello\n")


@POSIX
def test_one_server_has_clients_of_its_own_and_those_of_a_broker(
    keys: Keys, clients: Path, guarded: Serve, send: Send
) -> None:
    shutil.copy(keys.alice.public, clients)
    with broker(secure=curve_server(keys.stranger.key)) as (front, back):
        as_worker = ["--bind", "tcp://127.0.0.1:*", "--connect", back, "--server-key", str(keys.stranger.public)]
        server, endpoint = guarded(*as_worker, "--count", "2", "--exec", "tr a-z A-Z")
        assert send("--connect", endpoint, *as_client(keys.alice, keys.server), "direct").stdout == b"DIRECT\n"
        assert send("--connect", front, *as_client(keys.alice, keys.stranger), "indirect").stdout == b"INDIRECT\n"
        assert server.finish()[:2] == (0, b"direct\nindirect\n")


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
        (echo, ["--server-key", str(keys.server.public), "--timeout", "0.7"], 1, 0),
        (encrypted, ["--server-key", str(keys.server.public)], 0, 0),
    ]:
        recorded.clear()
        with relay(endpoint, record) as relayed:
            assert send("--connect", relayed, *options, "this is private").returncode == status
        assert recorded
        assert recorded.count(b"this is private") == seen


@POSIX
def test_no_output_shows_a_secret_key(keys: Keys, clients: Path, tmp_path: Path, guarded: Serve, send: Send) -> None:
    server_secret, secret = keys.server.key.secret, keys.alice.key.secret
    shutil.copy(keys.alice.public, clients)
    shutil.copy2(keys.stranger.secret, clients)
    server, endpoint = guarded("--verbose")
    connect = ["--verbose", "--connect", endpoint]
    broken = tmp_path / "broken"
    broken.write_bytes(keys.alice.secret.read_bytes().replace(secret, secret[:-1] + b"~"))
    broken.chmod(0o600)
    done = [
        send(*connect, *as_client(keys.alice, keys.server), "hello"),
        send(*connect, *as_client(keys.stranger, keys.server), "hello"),
        send(*connect, "--key", str(keys.alice.secret), "--server-key", str(keys.server.secret), "hello"),
        send(*connect, "--key", str(broken), "--server-key", str(keys.server.public), "hello"),
    ]
    assert [process.returncode for process in done] == [0, 1, 2, 2]
    output = b"".join(process.stdout + process.stderr for process in done) + "".join(stop(server)[2]).encode()
    output += repr(CurveKeys(*keys.alice.key)).encode()
    assert keys.stranger.key.public in output
    for half in (server_secret, secret, keys.stranger.key.secret):
        assert half[:10] not in output


# Keys of others, and keys that work with nobody


def write_key(path: Path, public: bytes | None, secret: bytes | None) -> str:
    """Write a key file with these halves, and return its path."""
    halves = {"public": public, "secret": secret}
    lines = [f'    {name}-key = "{half.decode()}"' for name, half in halves.items() if half]
    path.write_text("\n".join(["metadata", "curve", *lines, ""]))
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("kind", ["another pair", "twice the same", "zeros"])
def test_a_pair_that_works_with_nobody_is_refused(tmp_path: Path, kind: str) -> None:
    secret = zmq.curve_keypair()[1]
    halves = {"another pair": (zmq.curve_keypair()[0], secret), "twice the same": (secret, secret)}
    path = write_key(tmp_path / "my.key_secret", *halves.get(kind, (b"0" * 40, b"0" * 40)))
    with refusal(f"{path} is a key that works with nobody"):
        load_key_pair(path)


def test_a_secret_half_alone_and_a_bare_key_that_ends_with_nul_are_keys(tmp_path: Path) -> None:
    public, secret = zmq.curve_keypair()
    assert load_key_pair(write_key(tmp_path / "my.key_secret", None, secret)) == (public, secret)
    (tmp_path / "bare").write_bytes(public + b"\0")
    assert load_public_key(str(tmp_path / "bare")) == public


def test_where_there_are_no_hard_links_a_key_is_created_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    public, _ = load_key_pair(str(tmp_path / "my.key_secret"))
    assert load_public_key(str(tmp_path / "my.key")) == public
    assert len(list(tmp_path.iterdir())) == 2


@POSIX
def test_names_that_begin_with_a_dot_are_no_client_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A container's orchestrator mounts a directory by links to ``..data``."""
    public, _ = zmq.curve_keypair()
    (tmp_path / "..2026").mkdir()
    write_key(tmp_path / "..2026" / "alice.key", public, None)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "alice.key").symlink_to("..data/alice.key")
    assert ClientKeys(str(tmp_path)).find(public) == "alice.key"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "options", [["--client-keys", "none"], ["--connect", "tcp://127.0.0.1:1", "--server-key", "none"]]
)
def test_no_key_is_created_before_all_else_has_been_checked(tmp_path: Path, start: Start, options: list[str]) -> None:
    given = ["serve", "--bind", "tcp://127.0.0.1:*", "--key", "new.key_secret", *options]
    assert start(*given, cwd=tmp_path).finish()[0] == 2
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_a_key_from_a_fifo_serves_bound_and_connected_sockets(
    context: Context, keys: Keys, serve: Serve, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=[keys.server.secret.read_bytes()])
    writer.start()
    connected = ["--connect", "tcp://127.0.0.1:1", "--server-key", str(keys.server.public)]
    _server, endpoint = serve("--key", f"{tmp_path}/fifo", *connected)
    writer.join(LIMIT)
    assert let_in(context, endpoint, keys.server, keys.alice.key) == [True]


def test_a_client_that_was_let_in_meanwhile_is_told_of_again(
    keys: Keys, clients: Path, guarded: Serve, send: Send
) -> None:
    server, endpoint = guarded()
    alice = ["--connect", endpoint, *as_client(keys.alice, keys.server), "x"]
    for status in (1, 0, 1):
        assert send(*alice).returncode == status
        if status:
            shutil.copy(keys.alice.public, clients)
        else:
            (clients / keys.alice.public.name).unlink()
    assert sum("refused a client" in notice for notice in stop(server)[2]) == 2
