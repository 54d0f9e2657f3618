"""CURVE keys: their files, the three steps of the README, and who is let in."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
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
from zmqmsg.curve import ClientKeys, load_key_pair, start_zap_handler
from zmqmsg.sockets import Context, Socket

from conftest import (
    LIMIT,
    LINUX,
    POSIX,
    Send,
    Serve,
    Start,
    address,
    broker,
    memory,
    relay,
    shell,
    soak,
    stop,
    until,
)
from zmtp import command, greeting, ready, request

with suppress(ImportError):  # Windows has none
    import resource

SERVE_KEY = ["serve", "--bind", "tcp://192.0.2.1:1", "--key"]
SERVER_KEY = ["send", "x", "--server-key"]
EITHER_OPTION = pytest.mark.parametrize(
    "option", [SERVE_KEY, SERVER_KEY], ids=["--key", "--server-key"]
)


def refuse(*arguments: str | Path) -> str:
    """Return what zmqmsg, run in this process, says of ``arguments`` that are wrong usage."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


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
        return KeyPair(*map(bytes, filter(None, zmq.auth.load_certificate(self.secret))))


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
    """Return for each key whether ``server`` lets a plain REQ socket with it in; they all try at the same time."""
    with ExitStack() as stack:
        monitors = []
        for own in clients:
            client = stack.enter_context(context.socket(zmq.REQ))
            client.curve_publickey, client.curve_secretkey, client.curve_serverkey = (
                *own,
                server.key.public,
            )
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
        assert reason in refuse(*SERVE_KEY, tmp_path / name)
    assert (tmp_path / "me.key").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.key_secret", "me.key"]


@POSIX
@pytest.mark.parametrize("place", ["missing", "file", pytest.param("/proc", marks=LINUX)])
def test_a_key_that_cannot_be_created_is_an_error_that_names_the_file(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / place / "me.key_secret"
    assert f"cannot create key file {path}: " in refuse(*SERVE_KEY, path)


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
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o602])
def test_a_secret_key_that_others_may_use_is_refused_with_the_command_that_helps(
    tmp_path: Path, mode: int
) -> None:
    own = new_pair(tmp_path, "my own").secret
    own.chmod(mode)
    refused = refuse(*SERVE_KEY, own)
    assert f"others may read the secret key in {own}; run: chmod" in refused
    subprocess.run(["sh", "-c", refused.partition("run: ")[2]], check=True)
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
    assert f"{tmp_path / 'wrong'} is not a CURVE key file" in refuse(*option, tmp_path / "wrong")


@POSIX
@EITHER_OPTION
def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path, option: list[str]) -> None:
    device = tmp_path / "device"
    device.symlink_to("/dev/zero")
    assert f"{device} is not a CURVE key file: it is not a regular file" in refuse(*option, device)
    assert f"'{tmp_path}' is a directory" in refuse(*option, tmp_path)


def test_one_half_in_place_of_the_other_is_refused_by_name(keys: Keys) -> None:
    secret, public = keys.alice
    assert f"{secret} is a secret key; pass its public half, {public}" in refuse(
        *SERVER_KEY, secret
    )
    assert f"{public} is a public key" in refuse(*SERVE_KEY, public)


@pytest.mark.parametrize("kind", ["another pair", "twice the same", "zeros"])
def test_a_pair_that_works_with_nobody_is_refused(tmp_path: Path, kind: str) -> None:
    secret = zmq.curve_keypair()[1]
    halves = {"another pair": (zmq.curve_keypair()[0], secret), "twice the same": (secret, secret)}
    public, secret = halves.get(kind, (b"0" * 40, b"0" * 40))
    path = tmp_path / "my.key_secret"
    path.write_text((CERTIFICATE + SECRET_HALF).format(public.decode(), secret.decode()))
    path.chmod(0o600)
    assert f"{path} is a key that works with nobody" in refuse(*SERVE_KEY, path)


def test_where_there_are_no_hard_links_a_key_is_created_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    public, _ = load_key_pair(str(tmp_path / "my.key_secret"))
    assert zmq.auth.load_certificate(tmp_path / "my.key") == (public, None)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="needs root to give a file away"
)
@pytest.mark.parametrize(("mode", "accepted"), [(0o640, True), (0o660, False), (0o644, False)])
def test_a_secret_key_that_root_has_mounted_for_our_group_is_accepted(
    keys: Keys, tmp_path: Path, mode: int, accepted: bool
) -> None:
    """As a container's orchestrator does."""
    for directory in (keys.server.secret.parent, tmp_path, *tmp_path.parents[:-1]):
        directory.chmod(directory.stat().st_mode | 0o011)
    os.chown(keys.server.secret, 0, 65534)
    keys.server.secret.chmod(mode)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with (
            nullcontext() if accepted else pytest.raises(click.UsageError, match="others may read")
        ):
            load_key_pair(str(keys.server.secret))
    finally:
        os.seteuid(0)
        os.setegid(0)


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
    shutil.copy(
        theirs.public,
        clients / (os.fsdecode(b"\xe9.key") if sys.platform == "linux" else "alice.key"),
    )
    server, endpoint = guarded("--verbose")
    assert (
        send("--connect", endpoint, *as_client(theirs, keys.server), "as a client").stdout
        == b"as a client\n"
    )
    server.wait_for_notice(r"request 1 from 127\.0\.0\.1 \(.*\.key\)")
    _server, endpoint = serve("--key", str(theirs.secret), "--client-keys", str(theirs.public))
    assert (
        send("--connect", endpoint, *as_client(theirs, theirs), "as a server").stdout
        == b"as a server\n"
    )


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
        "E": "tcp://127.0.0.1:5555",
    }
    assert missing in refuse(*(words.get(word, word) for word in arguments.split()))
    assert list(tmp_path.iterdir()) == [], "wrong usage creates nothing"


# The three steps


def test_step_1_servers_that_create_one_key_at_once_talk_to_anyone_who_has_its_public_half(
    tmp_path: Path, start: Start, send: Send
) -> None:
    secret, public = tmp_path / "server.key_secret", tmp_path / "server.key"
    servers = [
        start("serve", "--bind", "tcp://127.0.0.1:*", "--count", "1", "--key", str(secret))
        for _ in range(4)
    ]
    for server in servers:
        endpoint = server.wait_for_notice("listening on (.*)")[1]
        done = send("--connect", endpoint, "--server-key", str(public), "hello")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")
        assert server.finish()[:2] == (0, b"hello\n")
    created = f"zmqmsg: created {secret}; give its public half, {public}, to your peers"
    assert [notice for server in servers for notice in server.notices if "created" in notice] == [
        created
    ]
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
    assert (first.stdout, second.stdout, second.stderr) == (b"hello\n", b"hello\n", b"")
    assert f"created {own}; give its public half, {half}, to your peers".encode() in first.stderr
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
        assert (done.returncode, done.stdout, done.stderr) == (
            (0, b"it is me\n", b"") if is_known else (1, b"", refused)
        )
        (clients / "alice.key").unlink(missing_ok=True)
    server.wait_for_notice(r"request 1 from 127.0.0.1 \(alice.key\): 1 frame, 8 bytes")
    status, output, notices = stop(server)
    assert (status, output) == (0, b"it is me\n")
    refusal = f"refused a client from 127.0.0.1: its public key {keys.alice.key.public.decode()} is not known"
    assert sum(refusal in notice for notice in notices) == 2


ONE_SIDE = "one side has keys, and the other has none"


@pytest.mark.parametrize(
    ("with_key", "trusted", "at_client", "at_server"),
    [
        (True, None, "{}: it requires CURVE; pass --server-key", ONE_SIDE),
        (False, "server", "{}: it does not use CURVE: is it the right server?", ONE_SIDE),
        (
            True,
            "stranger",
            "waiting for {}: CURVE handshake failing; check --server-key, or the server cannot check clients just now",
            "its --server-key is not the key of this server",
        ),
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
    client = start(
        "send", "--connect", endpoint, *(of_server(getattr(keys, trusted)) if trusted else []), "x"
    )
    assert client.wait_for_notice("zmqmsg: (.*)")[1] == at_client.format(endpoint)
    server.wait_for_notice(
        f"a client from (127.0.0.1|an unknown address) did not get through: .*{at_server}"
    )


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
    shutil.copy2(keys.stranger.secret, clients)
    for _ in range(3):
        assert let_in(context, endpoint, keys.server, keys.alice.key, keys.stranger.key) == [
            True,
            False,
        ]
    told = re.findall(
        f"{clients}/(\\S+) .*it lets nobody in$", "\n".join(stop(server)[2]), re.MULTILINE
    )
    assert sorted(told) == ["device", "fifo", "inner", "stranger.key_secret", "text"]


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
    assert (known.find(keys.alice.key.public), known.find(keys.stranger.key.public)) == (
        None,
        "client.key",
    )
    path.unlink()
    assert known.find(keys.stranger.key.public) is None


def find(known: ClientKeys, public: bytes) -> str | None:
    """Return what is found; None also if that cannot be known just now."""
    with suppress(OSError):
        return known.find(public)
    return None


def test_clients_whose_keys_cannot_be_read_just_now_are_let_in_when_they_can(
    keys: Keys, clients: Path, guarded: Serve, start: Start
) -> None:
    shutil.copy(keys.alice.public, clients)
    server, endpoint = guarded()
    elsewhere = clients.rename(clients.with_name("elsewhere"))
    client = start("send", "--connect", endpoint, *as_client(keys.alice, keys.server), "x")
    server.wait_for_notice("cannot read the client keys: ")
    client.wait_for_notice("cannot check clients just now")
    elsewhere.rename(clients)
    assert client.finish(12)[:2] == (0, b"x\n")
    server.wait_for_notice("the client keys can be read again")


@POSIX
def test_without_descriptors_nobody_is_let_in_who_was_known_before(
    keys: Keys, clients: Path
) -> None:
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


@pytest.mark.parametrize(
    "name", ["999.key", pytest.param(None, marks=POSIX)], ids=["known", "unknown"]
)
def test_a_key_is_looked_up_among_1000_in_a_millisecond(clients: Path, name: str | None) -> None:
    for number in range(1000):
        public = zmq.curve_keypair()[0]
        (clients / f"{number}.key").write_bytes(public)
    known = ClientKeys(str(clients))
    started = time.monotonic()
    for _ in range(1000):
        assert known.find(public if name else b"?" * 40) == name
    assert time.monotonic() - started < 2, "it would be milliseconds for each, if each were a scan"


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
        assert let_in(context, endpoint, keys.server, *strangers, keys.alice.key) == [
            False
        ] * 100 + [True]
    assert memory(server.pid) - before < 8192, "KiB"
    notices = stop(server)[2]
    assert sum(keys.stranger.key.public.decode() in notice for notice in notices) == 1
    assert 10 < len(notices) < 30
    assert any("further refusals" in notice for notice in notices)


LET_ME_IN = b"let me in"
BY_HAND = {
    "NULL": (greeting() + ready(b"REQ"), b"READY", request(LET_ME_IN)),
    "PLAIN": (
        greeting(b"PLAIN") + command(b"HELLO", b"\x05admin\x05admin"),
        b"WELCOME",
        request(LET_ME_IN),
    ),
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
    keys: Keys, serve: Serve, start: Start, echo: str, with_client_keys: bool
) -> None:
    for mechanism, words in BY_HAND.items():
        if mechanism != "PLAIN":
            assert LET_ME_IN in answer(echo, *words), "a server without keys understands it"
    options = ["--client-keys", str(keys.alice.public)] if with_client_keys else []
    server, endpoint = serve("--key", str(keys.server.secret), *options)
    for words in BY_HAND.values():
        assert LET_ME_IN not in answer(endpoint, *words)
    strangers = [
        [],
        of_server(keys.stranger),
        as_client(keys.alice, keys.stranger),
        *[of_server(keys.server), as_client(keys.stranger, keys.server)] * with_client_keys,
    ]
    connect = ["send", "--connect", endpoint]
    for stranger in [start(*connect, "--timeout", "0.7", *wrong, LET_ME_IN) for wrong in strangers]:
        assert stranger.finish()[:2] == (1, b"")
    assert (
        start(*connect, *as_client(keys.alice, keys.server), "it is me").finish()[1]
        == b"it is me\n"
    )
    assert stop(server)[:2] == (0, b"it is me\n")


def zap_request(
    credentials: bytes, mechanism: bytes = b"CURVE", source: bytes = b"127.0.0.1"
) -> list[bytes]:
    return [b"1.0", b"7", b"zmqmsg", source, b"", mechanism, credentials]


def test_a_malformed_zap_request_lets_nobody_in(keys: Keys) -> None:
    context: Context = zmq.Context()
    start_zap_handler(context, ClientKeys(str(keys.alice.public)))
    zap = context.socket(zmq.REQ)
    zap.rcvtimeo = LIMIT * 1000
    zap.connect("inproc://zeromq.zap.01")
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
    zap.close()
    context.term()  # which the handler's own socket does not keep from ending


# Workers


def curve_server(key: KeyPair, workers: Path | None = None) -> Callable[[Socket], None]:
    """Return what lets a broker use ``key``, and know the public keys of its ``workers``."""

    def secure(bound: Socket) -> None:
        bound.curve_server = True
        bound.curve_secretkey = key.secret
        if workers and bound.type == zmq.DEALER:
            start_zap_handler(bound.context, ClientKeys(str(workers)))
            bound.zap_domain = b"workers"

    return secure


def test_a_worker_serves_an_encrypted_broker_without_a_key_of_its_own(
    keys: Keys, start: Start, send: Send
) -> None:
    with broker(secure=curve_server(keys.server.key)) as (front, back):
        worker = start("serve", "--connect", back, *of_server(keys.server), "--count", "1")
        assert send("--connect", front, *of_server(keys.server), "hello").stdout == b"hello\n"
        assert worker.finish()[:2] == (0, b"hello\n")


@POSIX
def test_one_server_with_a_key_from_a_pipe_has_clients_of_its_own_and_those_of_a_broker_that_knows_it(
    keys: Keys, tmp_path: Path, start: Start, send: Send
) -> None:
    """As of ``--key <(pass show server)``, which can be read once only."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with broker(secure=curve_server(keys.stranger.key, keys.server.public)) as (front, back):
        connect = ["serve", "--connect", back, *of_server(keys.stranger)]
        status, _, notices = start(*connect).finish()
        assert (status, notices) == (
            1,
            [f"zmqmsg: {back}: it refused: the server does not know this key"],
        )
        own = [
            "--bind",
            "tcp://127.0.0.1:*",
            "--key",
            str(fifo),
            "--client-keys",
            str(keys.alice.public),
        ]
        server = start(*connect, *own, "--count", "2", "--exec", "tr a-z A-Z")
        fifo.write_bytes(keys.server.secret.read_bytes())
        endpoint = server.wait_for_notice("listening on (.*)")[1]
        assert (
            send("--connect", endpoint, *as_client(keys.alice, keys.server), "direct").stdout
            == b"DIRECT\n"
        )
        assert (
            send("--connect", front, *as_client(keys.server, keys.stranger), "indirect").stdout
            == b"INDIRECT\n"
        )
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
    shutil.copy2(keys.stranger.secret, clients)
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
