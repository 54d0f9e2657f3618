import os
import resource
import select
import signal
import socket as tcp
import socketserver
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import zmq
import zmq.auth
from click.testing import CliRunner
from zmq.utils.monitor import recv_monitor_message

from zmqmsg.cli import Size, cli
from zmqmsg.curve import Keys, public_path
from zmqmsg.sockets import Context, Socket, open_socket

from conftest import COMMAND, LIMIT, Process, bind

Serve = Callable[..., tuple[Process, str]]
Send = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Process]

HANDSHAKE_FAILING = "handshake failing, is --server-key right, does the server use --key"


class Pair(NamedTuple):
    """The files of the two halves of a key."""

    secret: Path
    public: Path

    @property
    def secrets(self) -> bytes:
        """The secret itself."""
        return zmq.auth.load_certificate(self.secret)[1] or b""


class Ends(NamedTuple):
    """A server and a client that know each other, a stranger, and the options of all of them."""

    server: Pair
    client: Pair
    stranger: Pair

    @property
    def serve_options(self) -> list[str]:
        return options(self.server, "--client-keys", self.client)

    @property
    def send_options(self) -> list[str]:
        return options(self.client, "--server-key", self.server)


def ignore(_text: str) -> None:
    """Take a notice that does not matter."""


def new_pair(folder: Path, name: str) -> Pair:
    secret = folder / f"{name}.key_secret"
    Keys.load(secret, None, None, ignore)
    return Pair(secret, folder / f"{name}.key")


def options(own: Pair, name: str, other: Pair) -> list[str]:
    return ["--key", str(own.secret), name, str(other.public)]


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    """Keys for a server, its client and a stranger."""
    return Ends(*(new_pair(tmp_path, name) for name in Ends._fields))


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Let files have all the permissions that are asked for."""
    previous = os.umask(0)
    yield
    os.umask(previous)


@contextmanager
def recorder(endpoint: str) -> Iterator[tuple[str, bytearray]]:
    """Relay connections to ``endpoint``; the context gets where, and all the bytes that pass either way."""
    record = bytearray()

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with tcp.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as onward:
                other = {self.request: onward, onward: self.request}
                with suppress(OSError):
                    while True:
                        for source in select.select(list(other), [], [])[0]:
                            data = source.recv(65536)
                            if not data:
                                return
                            record.extend(data)
                            other[source].sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}", record
        server.shutdown()
        thread.join(LIMIT)


@contextmanager
def keyed_queue(key: Pair) -> Iterator[tuple[str, str]]:
    """Run a ROUTER/DEALER queue under CURVE; the context gets its endpoints for clients and for workers."""
    context: Context = zmq.Context()
    sockets = [context.socket(zmq.ROUTER), context.socket(zmq.DEALER)]
    for socket in sockets:
        socket.curve_server = True
        socket.curve_secretkey = key.secrets
    clients, workers = map(bind, sockets)

    def run() -> None:
        with sockets[0], sockets[1], suppress(zmq.ContextTerminated):
            zmq.proxy(*sockets)

    thread = threading.Thread(target=run)
    thread.start()
    yield clients, workers
    context.term()
    thread.join(LIMIT)


def complaint(*arguments: str | Path) -> tuple[int, str]:
    """Run the command line in this process, and return its exit status and standard error."""
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.stdout == ""
    return result.exit_code, result.stderr


# Creation


@pytest.mark.parametrize(
    ("name", "public"),
    [("me.key_secret", "me.key"), ("me", "me.pub"), ("me.key", "me.key.pub"), ("my_secret", "my_secret.pub")],
)
def test_a_missing_key_is_created_with_its_public_half_beside_it(tmp_path: Path, name: str, public: str) -> None:
    own = tmp_path / name
    told: list[str] = []
    keys = Keys.load(own, None, None, told.append)
    assert {path.name for path in tmp_path.iterdir()} == {name, public}
    assert public_path(own) == tmp_path / public
    assert zmq.auth.load_certificate(tmp_path / public) == (keys.public, None)
    assert keys.public == zmq.curve_public(keys.secret)
    assert told == [f"created {own}; hand {tmp_path / public} to the other side"]


@pytest.mark.usefixtures("no_umask")
def test_nobody_else_may_read_the_secret_from_its_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    born: dict[str, tuple[int, int]] = {}
    really_open = os.open

    def watched_open(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = really_open(path, flags, mode)
        status = os.fstat(descriptor)
        born[path.name] = stat.S_IMODE(status.st_mode), status.st_size
        return descriptor

    monkeypatch.setattr(os, "open", watched_open)
    new_pair(tmp_path, "me")
    assert born["me.key_secret"] == (0o600, 0)
    assert stat.S_IMODE((tmp_path / "me.key_secret").stat().st_mode) == 0o600


@pytest.mark.usefixtures("no_umask")
def test_the_process_writes_a_secret_that_nobody_else_may_read(tmp_path: Path, send: Send) -> None:
    send("--key", str(tmp_path / "me.key_secret"), "--server-key", str(tmp_path / "missing.key"), "hello")
    assert stat.S_IMODE((tmp_path / "me.key_secret").stat().st_mode) == 0o600


def test_a_key_that_is_there_is_loaded_and_stays_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "me.key_secret"
    first = Keys.load(own, None, None, ignore)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    told: list[str] = []
    assert Keys.load(own, None, None, told.append) == first
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert told == []


@pytest.mark.parametrize(("name", "public"), [("me.key_secret", "me.key"), ("me", "me.pub")])
def test_no_public_half_that_is_there_is_written_over(tmp_path: Path, name: str, public: str) -> None:
    (tmp_path / public).write_text("precious")
    with pytest.raises(ValueError, match=f"cannot create key file .*{public}: File exists"):
        Keys.load(tmp_path / name, None, None, ignore)
    assert (tmp_path / public).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [public]


def test_no_key_is_written_through_a_link_to_nothing(tmp_path: Path) -> None:
    own = tmp_path / "me.key_secret"
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"cannot create key file {own}: File exists"):
        Keys.load(own, None, None, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["me.key_secret"]


def test_two_people_can_start_with_a_key_of_their_own_before_they_have_the_other_ones(tmp_path: Path) -> None:
    for command, option in ("serve", "--client-keys"), ("send", "--server-key"):
        own, missing = tmp_path / f"{command}.key_secret", tmp_path / "missing.key"
        status, errors = complaint(command, "--key", own, option, missing)
        assert status == 2
        created, failure = errors.splitlines()
        assert created == f"zmqmsg: created {own}; hand {tmp_path / command}.key to the other side"
        assert f"cannot read key file {missing}: no such file" in failure
        assert own.exists()


@pytest.mark.parametrize("folder", ["missing", "file", "/proc", "/proc/missing"])
@pytest.mark.parametrize("command", ["serve --client-keys", "send --server-key"])
def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, folder: str, command: str) -> None:
    (tmp_path / "file").touch()
    own = tmp_path / folder / "me.key_secret"
    status, errors = complaint(*command.split(), tmp_path / "other.key", "--key", own)
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"zmqmsg: cannot create key file {own.with_suffix('.key')}: ")


def test_a_full_disk_leaves_no_half_of_a_key_behind(tmp_path: Path) -> None:
    """Else the next start would fail as well: over a file that is there, nothing is written."""
    own = tmp_path / "me.key_secret"
    command = [*COMMAND, "send", "--key", str(own), "--server-key", str(tmp_path / "other.key"), "hello"]

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    failed = subprocess.run(command, capture_output=True, timeout=LIMIT, preexec_fn=fill_disk, check=False)
    assert failed.returncode != 0
    assert b"cannot create key file" in failed.stderr
    assert list(tmp_path.iterdir()) == []


# What is refused


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o602])
def test_a_secret_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    own = new_pair(tmp_path, "me").secret
    own.chmod(mode)
    with pytest.raises(ValueError, match=f"others may read the secret in {own}; mend it with: chmod 600 {own}"):
        Keys.load(own, None, None, ignore)


@pytest.mark.parametrize("name", ["me", "my own"])
def test_what_mends_a_secret_that_others_may_read_is_a_command_for_the_shell(tmp_path: Path, name: str) -> None:
    own = new_pair(tmp_path, name).secret
    own.chmod(0o644)
    with pytest.raises(ValueError, match="mend it with") as caught:
        Keys.load(own, None, None, ignore)
    subprocess.run(["sh", "-c", str(caught.value).partition("mend it with: ")[2]], check=True)
    assert Keys.load(own, None, None, ignore).secret


def test_a_secret_is_refused_where_a_public_key_is_expected(ends: Ends, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = folder / "theirs.key"
    inside.write_bytes(ends.stranger.secret.read_bytes())
    secrets = [pair.secrets.decode() for pair in ends]
    for option, path, named in (
        ("serve --client-keys", ends.client.secret, ends.client.secret),
        ("serve --client-keys", folder, inside),
        ("send --server-key", ends.server.secret, ends.server.secret),
    ):
        status, errors = complaint(*option.split(), path, "--key", ends.client.secret)
        assert status == 2
        assert f"{named} holds a secret key" in errors
        assert not [secret for secret in secrets if secret in errors]


def test_a_public_key_is_refused_where_the_secret_one_is_expected(ends: Ends) -> None:
    with pytest.raises(ValueError, match=f"{ends.server.public} holds no secret key"):
        Keys.load(ends.server.public, None, None, ignore)


NO_KEYS = {
    "empty": b"",
    "text": b"hello\n",
    "binary": bytes(range(256)),
    "no public key": b"metadata\ncurve\n",
    "empty key": b'curve\n    public-key = ""\n',
    "short key": b'curve\n    public-key = "abcde"\n',
    "long key": b'curve\n    public-key = "' + b"a" * 45 + b'"\n',
    "uneven key": b'curve\n    public-key = "' + b"a" * 39 + b'"\n',
    "no Z85": b'curve\n    public-key = "' + b"~" * 40 + b'"\n',
    "beyond Z85": b'curve\n    public-key = "' + b"#" * 40 + b'"\n',
    "key in a foreign script": 'curve\n    public-key = "é"\n'.encode() * 40,
}


@pytest.mark.parametrize("content", NO_KEYS.values(), ids=NO_KEYS)
def test_what_is_no_key_is_refused_by_name_wherever_it_stands(ends: Ends, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    wrong = folder / "wrong"
    wrong.write_bytes(content)
    wrong.chmod(0o600)
    (folder / "right.key").write_bytes(ends.client.public.read_bytes())
    with pytest.raises(ValueError, match=f"{wrong} (is not a CURVE key file|holds no secret key)"):
        Keys.load(wrong, None, None, ignore)
    for own, clients, server in (
        (ends.server.secret, wrong, None),
        (ends.server.secret, folder, None),
        (ends.server.secret, None, wrong),
    ):
        with pytest.raises(ValueError, match=f"{wrong} is not a CURVE key file"):
            Keys.load(own, clients, server, ignore)


def test_a_broken_secret_is_refused_without_showing_it(tmp_path: Path) -> None:
    own = new_pair(tmp_path, "me")
    secret = own.secrets.decode()
    for broken in (secret[:-1], secret[:-1] + "~", secret + secret):
        own.secret.write_text(own.secret.read_text().replace(secret, broken))
        with pytest.raises(ValueError, match="is not a CURVE key file") as caught:
            Keys.load(own.secret, None, None, ignore)
        assert secret[:10] not in "".join(traceback.format_exception(caught.value))
        own.secret.write_text(own.secret.read_text().replace(broken, secret))


def test_an_empty_folder_of_clients_is_refused_by_name(ends: Ends, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"{folder} is an empty folder"):
        Keys.load(ends.server.secret, folder, None, ignore)


def test_a_folder_within_the_folder_of_clients_is_refused_by_name(ends: Ends, tmp_path: Path) -> None:
    inner = tmp_path / "folder" / "inner"
    inner.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"cannot read key file {inner}: Is a directory"):
        Keys.load(ends.server.secret, inner.parent, None, ignore)


def test_all_the_keys_of_a_folder_are_let_in(ends: Ends, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for pair in ends.client, ends.stranger:
        (folder / pair.public.name).write_bytes(pair.public.read_bytes())
    keys = Keys.load(ends.server.secret, folder, None, ignore)
    assert keys.clients == {zmq.auth.load_certificate(pair.public)[0] for pair in (ends.client, ends.stranger)}


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ("serve --key K", "--client-keys"),
        ("serve --client-keys P", "--key"),
        ("serve --key K --server-key P", "--client-keys"),
        ("serve --key K --client-keys P --server-key P", "connects --key and --server-key"),
        ("serve --connect tcp://127.0.0.1:5555 --key K", "--server-key"),
        ("serve --connect tcp://127.0.0.1:5555 --server-key P", "--key"),
        ("serve --connect tcp://127.0.0.1:5555 --key K --client-keys P", "--server-key"),
        (
            "serve --connect tcp://127.0.0.1:5555 --key K --client-keys P --server-key P",
            "binds needs --key and --client-keys",
        ),
        ("serve --bind tcp://127.0.0.1:* --connect tcp://127.0.0.1:5555 --key K --client-keys P", "--server-key"),
        ("serve --bind tcp://127.0.0.1:* --connect tcp://127.0.0.1:5555 --key K --server-key P", "--client-keys"),
        ("send --key K hello", "--server-key"),
        ("send --server-key P hello", "--key"),
    ],
)
def test_one_option_alone_or_one_too_many_is_a_usage_error_that_names_the_other(
    tmp_path: Path, arguments: str, missing: str
) -> None:
    files = {"K": str(tmp_path / "me.key_secret"), "P": str(tmp_path / "other.key")}
    status, errors = complaint(*(files.get(word, word) for word in arguments.split()))
    assert status == 2
    assert missing in errors
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "wrong usage creates nothing"


# Keys of others


def test_keys_that_pyzmq_made_work_here(tmp_path: Path, serve: Serve, send: Send) -> None:
    pairs = [Pair(*map(Path, reversed(zmq.auth.create_certificates(tmp_path, name)))) for name in ("server", "client")]
    server, client = pairs
    for pair in pairs:
        pair.secret.chmod(0o644)
        with pytest.raises(ValueError, match="chmod 600"):
            Keys.load(pair.secret, None, None, ignore)
        pair.secret.chmod(0o600)
    _process, endpoint = serve(*options(server, "--client-keys", client))
    done = send("-c", endpoint, *options(client, "--server-key", server), "hello")
    assert (done.returncode, done.stdout) == (0, b"hello\n")


def test_pyzmq_reads_the_keys_that_are_made_here(ends: Ends, tmp_path: Path) -> None:
    for pair in ends:
        public, secret = zmq.auth.load_certificate(pair.secret)
        assert secret is not None
        assert zmq.curve_public(secret) == public
        assert zmq.auth.load_certificate(pair.public) == (public, None)
    known: Any = zmq.auth.load_certificates(tmp_path)
    assert set(known) == {zmq.auth.load_certificate(pair.public)[0] for pair in ends}


# Who is let in


@pytest.fixture
def ending() -> Iterator[Context]:
    """A context that is terminated after the test, as zmqmsg does: the ZAP handler closes its own socket."""
    context: Context = zmq.Context()
    yield context
    context.term()


def keyed(context: Context, socket_type: int, keys: Keys) -> Socket:
    opened = open_socket(context, socket_type)
    keys.secure_client(opened)
    return opened


def guarded(context: Context, ends: Ends) -> Socket:
    opened = open_socket(context, zmq.REP)
    Keys.load(ends.server.secret, ends.client.public, None, ignore).secure_server(opened)
    return opened


def failure(socket: Socket, endpoint: str) -> tuple[int, int]:
    """Send over ``socket``, and return the event and the value of the first failure of its handshake."""
    with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL) as monitor:
        socket.connect(endpoint)
        socket.send_multipart([b"", b"let me in"])
        assert monitor.poll(LIMIT * 1000)
        event = recv_monitor_message(monitor)
        socket.disable_monitor()
        return event["event"], event["value"]


def test_nothing_of_a_client_that_is_not_let_in_reaches_the_server(ending: Context, ends: Ends) -> None:
    known = Keys.load(ends.client.secret, None, ends.server.public, ignore)
    unknown = Keys.load(ends.stranger.secret, None, ends.server.public, ignore)
    with guarded(ending, ends) as server, keyed(ending, zmq.REQ, known) as client:
        endpoint = bind(server)
        with keyed(ending, zmq.DEALER, unknown) as stranger:
            assert failure(stranger, endpoint) == (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
        with open_socket(ending, zmq.DEALER) as nobody:
            assert failure(nobody, endpoint)[0] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        client.connect(endpoint)
        client.send(b"it is me")
        assert server.poll(LIMIT * 1000)
        assert server.recv() == b"it is me"
        server.send(b"welcome")
        assert client.poll(LIMIT * 1000)
        assert not server.poll(300)


def test_without_anybody_who_could_let_clients_in_nobody_is(context: Context, ending: Context, ends: Ends) -> None:
    """By default libzmq lets everybody in when there is no ZAP handler."""
    unguarded = open_socket(context, zmq.REP)
    unguarded.curve_secretkey = ends.server.secrets
    with guarded(ending, ends) as server:
        for option in zmq.CURVE_SERVER, zmq.ZAP_DOMAIN, zmq.ZAP_ENFORCE_DOMAIN:
            unguarded.set(option, server.get(option))
    client = keyed(context, zmq.REQ, Keys.load(ends.client.secret, None, ends.server.public, ignore))
    client.connect(bind(unguarded))
    client.send(b"hello")
    assert not unguarded.poll(500)


def test_the_handler_that_lets_clients_in_ends_with_its_context(ends: Ends) -> None:
    before = set(threading.enumerate())
    context: Context = zmq.Context()
    with guarded(context, ends):
        (handler,) = set(threading.enumerate()) - before
    context.term()
    handler.join(LIMIT)
    assert not handler.is_alive()


# Real processes


def test_two_people_come_from_nothing_to_the_first_encrypted_message(tmp_path: Path, serve: Serve, send: Send) -> None:
    hers, his = tmp_path / "hers", tmp_path / "his"
    hers.mkdir()
    his.mkdir()
    serve_options = ["--key", f"{hers}/server.key_secret", "--client-keys", f"{hers}/client.key"]
    send_options = ["--key", f"{his}/client.key_secret", "--server-key", f"{his}/server.key"]
    command = [*COMMAND, "serve", "--bind", "tcp://127.0.0.1:*", *serve_options]
    first = subprocess.run(command, capture_output=True, timeout=LIMIT, check=False)
    second = send(*send_options, "hello")
    assert (first.returncode, second.returncode) == (2, 2)
    assert f"hand {hers}/server.key to the other side" in first.stderr.decode()
    assert f"hand {his}/client.key to the other side" in second.stderr.decode()
    (hers / "server.key").rename(his / "server.key")
    (his / "client.key").rename(hers / "client.key")

    process, endpoint = serve(*serve_options)
    done = send("-c", endpoint, *send_options, "hello", "again")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\nagain\n", b"")
    process.signal(signal.SIGTERM)
    status, output, notices = process.finish()
    assert (status, output) == (0, b"hello\nagain\n")
    said = b"".join([first.stdout, first.stderr, second.stdout, second.stderr, *map(str.encode, notices)])
    for file in (hers / "server.key_secret", his / "client.key_secret"):
        secret = zmq.auth.load_certificate(file)[1]
        assert secret
        assert secret not in said


def test_a_client_that_is_not_known_is_told_so_at_once_and_never_served(ends: Ends, serve: Serve, send: Send) -> None:
    process, endpoint = serve(*ends.serve_options)
    refused = send("-c", endpoint, *options(ends.stranger, "--server-key", ends.server), "let me in")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert refused.stderr.decode() == f"zmqmsg: {endpoint} refused: the server does not know this key\n"
    assert send("-c", endpoint, *ends.send_options, "it is me").stdout == b"it is me\n"
    process.signal(signal.SIGTERM)
    assert process.finish()[:2] == (0, b"it is me\n")


@pytest.fixture
def failing(ends: Ends, serve: Serve, start: Start) -> dict[str, tuple[Process, Process]]:
    """A server and a client each, for the three ways in which a handshake fails."""

    def meet(serve_options: list[str], send_options: list[str]) -> tuple[Process, Process]:
        server, endpoint = serve(*serve_options)
        return server, start("send", "-c", endpoint, *send_options, "hello")

    return {
        "no key at a keyed server": meet(ends.serve_options, []),
        "a key at an unkeyed server": meet([], ends.send_options),
        "wrong server key": meet(ends.serve_options, options(ends.client, "--server-key", ends.stranger)),
    }


def test_a_handshake_that_fails_is_told_and_tried_again(failing: dict[str, tuple[Process, Process]]) -> None:
    for what, (_server, client) in failing.items():
        hint = "does it ask for --key" if what.startswith("no key") else HANDSHAKE_FAILING
        client.wait_for_notice(f"waiting for .*handshake failing.*{hint.removeprefix('handshake failing')}")
        assert client.popen.poll() is None, f"{what}: goes on trying"
    for server, client in failing.values():
        client.signal(signal.SIGINT)
        assert client.finish()[:2] == (130, b"")
        server.signal(signal.SIGTERM)
        assert server.finish()[:2] == (0, b"")


def test_a_client_with_a_key_sends_nothing_in_clear(ends: Ends, serve: Serve, send: Send) -> None:
    marker = "this is private"
    _process, endpoint = serve()
    with recorder(endpoint) as (relayed, record):
        assert send("-c", relayed, marker).returncode == 0
        assert record.count(marker.encode()) == 2, "what is in clear is recorded, both ways"
    with recorder(endpoint) as (relayed, record):
        assert send("-c", relayed, *ends.send_options, "-t", "1.5", marker).returncode == 1
        assert record
        assert marker.encode() not in record
    _process, endpoint = serve(*ends.serve_options)
    with recorder(endpoint) as (relayed, record):
        assert send("-c", relayed, *ends.send_options, marker).stdout.decode() == f"{marker}\n"
        assert record
        assert marker.encode() not in record


def test_a_worker_serves_a_queue_that_has_keys(ends: Ends, start: Start, send: Send) -> None:
    with keyed_queue(ends.server) as (clients, workers):
        worker = start("serve", "--connect", workers, *ends.send_options, "--count", "1")
        assert send("-c", clients, *ends.send_options, "hello").stdout == b"hello\n"
        assert worker.finish()[:2] == (0, b"hello\n")


def test_a_worker_with_the_wrong_key_of_its_queue_is_told_so(ends: Ends, start: Start) -> None:
    with keyed_queue(ends.server) as (_clients, workers):
        worker = start("serve", "--connect", workers, *options(ends.client, "--server-key", ends.stranger))
        worker.wait_for_notice(f"waiting for {workers}: {HANDSHAKE_FAILING}")
        assert worker.popen.poll() is None
        worker.close()


def test_one_server_has_clients_of_its_own_and_those_of_a_queue(ends: Ends, serve: Serve, send: Send) -> None:
    with keyed_queue(ends.stranger) as (clients, workers):
        both = [*ends.serve_options, "--connect", workers, "--server-key", str(ends.stranger.public)]
        process, endpoint = serve("--bind", "tcp://127.0.0.1:*", *both, "--count", "2")
        assert send("-c", endpoint, *ends.send_options, "directly").stdout == b"directly\n"
        queued = send("-c", clients, *options(ends.client, "--server-key", ends.stranger), "through a queue")
        assert queued.stdout == b"through a queue\n"
        assert process.finish()[:2] == (0, b"directly\nthrough a queue\n")


# Defaults


def test_whoever_binds_past_loopback_without_a_key_is_warned_and_served(serve: Serve, send: Send) -> None:
    process, endpoint = serve("--bind", "tcp://0.0.0.0:*")
    warning = process.wait_for_notice("warning: .*")[0]
    for named in (endpoint, "--key", "--client-keys"):
        assert named in warning
    port = endpoint.rpartition(":")[2]
    assert send("-c", f"tcp://127.0.0.1:{port}", "hello").stdout == b"hello\n"


def test_nobody_is_warned_on_loopback_or_with_a_key(ends: Ends, tmp_path: Path, serve: Serve) -> None:
    local = ["--bind", "tcp://127.0.0.1:*", "--bind", "tcp://[::1]:*", "--bind", f"ipc://{tmp_path}/socket"]
    for arguments in local, ["--bind", "tcp://0.0.0.0:*", *ends.serve_options]:
        process, _endpoint = serve(*arguments)
        process.signal(signal.SIGTERM)
        status, _output, notices = process.finish()
        assert status == 0
        assert not [notice for notice in notices if "warning" in notice]


def test_the_default_is_loopback_alone() -> None:
    for command in "serve", "send":
        assert "[default: tcp://127.0.0.1:5555]" in " ".join(
            CliRunner().invoke(cli, [command, "--help"]).stdout.split()
        )


def test_a_server_refuses_requests_beyond_its_max_size_and_serves_on(serve: Serve, send: Send) -> None:
    process, endpoint = serve("--max-size", "1K")
    refused = send("-c", endpoint, "-t", str(LIMIT), "-r", "1", "x" * 1025)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert "sent twice" in refused.stderr.decode() or "sent 2 times" in refused.stderr.decode()
    assert "the request may break the server" in refused.stderr.decode()
    assert send("-c", endpoint, "y" * 1024).stdout == b"y" * 1024 + b"\n"
    process.signal(signal.SIGTERM)
    assert process.finish()[:2] == (0, b"y" * 1024 + b"\n")


def test_a_client_refuses_replies_beyond_its_max_size(serve: Serve, send: Send) -> None:
    _process, endpoint = serve()
    refused = send("-c", endpoint, "--max-size", "1K", "-t", str(LIMIT), "-r", "1", "x" * 1025)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert "its reply may be larger than --max-size" in refused.stderr.decode()
    assert send("-c", endpoint, "--max-size", "1K", "y" * 1024).stdout == b"y" * 1024 + b"\n"


@pytest.mark.parametrize("command", ["serve", "send"])
@pytest.mark.parametrize("size", ["0", "-1", "", "63", "M", "0K", "1.5M", "1T", "1KB", "0x400", "1 K", "١٠٢٤", "much"])
def test_a_size_that_makes_no_sense_is_a_usage_error(command: str, size: str) -> None:
    status, errors = complaint(command, f"--max-size={size}")
    assert status == 2
    assert "--max-size" in errors
    assert f"'{size}' is not a size" in errors


@pytest.mark.parametrize(
    ("size", "expected"), [("64", 64), ("65536", 65536), ("1k", 1024), ("64M", 64 << 20), ("1G", 1 << 30)]
)
def test_a_size_is_bytes_or_has_a_letter(size: str, expected: int) -> None:
    assert Size().convert(size, None, None) == expected


def test_a_size_that_libzmq_cannot_hold_is_a_usage_error() -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        Size().convert("9999999999G", None, None)


def test_only_a_server_with_keys_pays_for_them() -> None:
    """The authenticator of pyzmq imports asyncio, which takes longer than all the rest."""
    code = "import sys, zmqmsg.curve; sys.exit(any(name in sys.modules for name in ('asyncio', 'zmq.auth.thread')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=LIMIT, check=False).returncode == 0
    code = "import sys; from zmqmsg import cli, reply, request; sys.exit('zmqmsg.curve' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=LIMIT, check=False).returncode == 0
