"""``zmqmsg send``: its replies, what it says while it waits, how it gives up, and how it ends."""

import ctypes
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import (
    COMMAND,
    IPV6,
    LIMIT,
    LINUX,
    POSIX,
    Process,
    Send,
    Serve,
    Start,
    address,
    await_end,
    free_endpoint,
    listening,
    open_server,
    relay,
    shell,
    until,
    waits,
)
from zmtp import OTHER_PROTOCOLS, Talk, command, echo_as_zmtp_1, echo_as_zmtp_2, greeting, say

NOWHERE = "tcp://a..b:5555"  # no name server is asked for such a name
MUTE = "connected, but no ZeroMQ greeting yet"


def first_notice(sender: Process) -> str:
    return sender.wait_for_notice("zmqmsg: (.*)")[1]


def connects(*endpoints: str) -> list[str]:
    """Return the options that connect to ``endpoints``."""
    return [argument for endpoint in endpoints for argument in ("--connect", endpoint)]


def exchange(sender: Process) -> list[str]:
    """Send a line and read its reply; return the notices by then."""
    sender.send_line(b"x")
    assert sender.read_line() == b"x", sender.notices
    return sender.notices


def retries_of(sender: Process) -> list[str]:
    """Return the notices of further attempts."""
    return [notice for notice in sender.notices if "retrying" in notice]


# Replies


@POSIX
@pytest.mark.parametrize(
    ("bound", "to_connect"),
    [
        ("tcp://127.0.0.1:*", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        ("tcp://localhost:0", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        pytest.param("tcp://lo:*", r"tcp://127\.0\.0\.1:[1-9]\d*", marks=LINUX),
        pytest.param("tcp://[::1]:*", r"tcp://\[::1\]:[1-9]\d*", marks=IPV6),
        ("ipc://{tmp_path}/a.sock", "ipc://{tmp_path}/a.sock"),
        pytest.param("ipc://@zmqmsg-test-{pid}", "ipc://@zmqmsg-test-{pid}", marks=LINUX),
    ],
)
def test_messages_are_printed_at_the_server_and_replies_at_the_client(
    serve: Serve, send: Send, tmp_path: Path, bound: str, to_connect: str
) -> None:
    names = {"tmp_path": tmp_path, "pid": os.getpid()}
    server, real = serve("--count", "3", "--bind", bound.format(**names))
    assert re.fullmatch(to_connect.format(**names), real)
    # With IPv6 switched on, libzmq would try localhost as ::1 alone.
    connect = real.replace("127.0.0.1", "localhost")
    done = send("--connect", connect, "first message", "second message", "third message")
    lines = b"first message\nsecond message\nthird message\n"
    assert (done.returncode, done.stdout) == (0, lines)
    assert server.finish() == (
        0,
        lines,
        [f"zmqmsg: listening on {real}", "zmqmsg: 3 requests served"],
    )


def test_a_rep_socket_of_pyomq_is_a_server(start: Start) -> None:
    pyomq = pytest.importorskip("pyomq")
    with pyomq.Context() as context, context.socket(pyomq.REP) as server:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        sender = start("send", "--connect", f"tcp://127.0.0.1:{port}", "ping")
        assert server.recv() == b"ping"
        server.send(b"pong")
        assert sender.finish()[:2] == (0, b"pong\n")


# Waiting


@POSIX
def test_send_before_serve_says_what_it_waits_for(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/a.sock"
    sender = start("send", "--connect", endpoint, "x")
    waiting = f"waiting for {endpoint}: no such file or directory"
    assert first_notice(sender) == waiting
    serve("--bind", endpoint)
    assert sender.finish() == (
        0,
        b"x\n",
        [f"zmqmsg: {waiting}", f"zmqmsg: connected to {endpoint}"],
    )


PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def respect_modes() -> None:
    """Let the modes of files count for root, too."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability)


@LINUX
def test_an_ipc_path_without_permission_is_told_as_that(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "directory").mkdir()
    paths = [tmp_path / "socket", tmp_path / "directory" / "socket"]
    endpoints = [f"ipc://{path}" for path in paths]
    serve(*(option for endpoint in endpoints for option in ("--bind", endpoint)))
    until(paths[1].exists)
    for forbidden in ("socket", "directory"):
        (tmp_path / forbidden).chmod(0)
    sender = start("send", *connects(*endpoints), "x", preexec_fn=respect_modes)
    for endpoint in endpoints:
        sender.wait_for_notice(f"waiting for {endpoint}: permission denied")
    (tmp_path / "directory").chmod(0o700)


@POSIX
def test_where_nobody_listens_the_system_says_why(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{tmp_path}/stale")
    (tmp_path / "file").touch()
    reasons = {
        free_endpoint(): "connection refused",
        free_endpoint().replace("127.0.0.1", "localhost"): "connection refused",
        NOWHERE: "cannot resolve a..b: not a valid name",
        f"ipc://{tmp_path}/stale": "connection refused",
        f"ipc://{tmp_path}/file/below": "not a directory",
    }
    sender = start("send", *connects(*reasons), "x")
    for endpoint, reason in reasons.items():
        sender.wait_for_notice(re.escape(f"waiting for {endpoint}: {reason}"))


CONNECT_TO_ITSELF = """
import socket
connect = socket.socket.connect
def connect_from_there(self, address):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    self.bind(address)
    connect(self, address)
socket.socket.connect = connect_from_there
"""


def test_a_socket_that_is_connected_to_itself_counts_as_refused(
    start: Start, tmp_path: Path
) -> None:
    """TCP can connect to a free port from that very port."""
    (tmp_path / "sitecustomize.py").write_text(CONNECT_TO_ITSELF)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    endpoint = free_endpoint()
    sender = start("send", "--connect", endpoint, "x", env=os.environ | {"PYTHONPATH": path})
    sender.wait_for_notice(f"waiting for {endpoint}: connection refused")


NO_CURVE = "it does not use CURVE: is it the right server?"
TOO_OLD = "which is too old for CURVE"
LONG_READY = b"\6" + (300).to_bytes(8) + b"\5READY\x0bSocket-Type\0\0\0\3SUB" + bytes(275)
ZMTP_2_PULL = greeting()[:10] + b"\1\7\0\0"

# Listeners that can never answer, and what is said of them
WRONG: list[tuple[Talk, str]] = [
    *((talk, f"it does not speak ZeroMQ; it says '{words}") for talk, words in OTHER_PROTOCOLS),
    (partial(say, greeting(b"PLAIN")), "it requires PLAIN, which zmqmsg does not speak"),
    (partial(say, greeting(b"CURVE")), "it requires CURVE; pass --server-key"),
    (partial(say, ZMTP_2_PULL), "it is a PULL socket, not a REP or ROUTER"),
    (partial(say, greeting() + LONG_READY), "it is a SUB socket, not a REP or ROUTER"),
]
WRONG_WITH_CURVE: list[tuple[Talk, str]] = [
    *((talk, f"it does not speak ZeroMQ; it says '{words}") for talk, words in OTHER_PROTOCOLS),
    (partial(say, greeting(b"PLAIN")), "it requires PLAIN, which zmqmsg does not speak"),
    (partial(say, greeting() + LONG_READY), NO_CURVE),
    (echo_as_zmtp_2, f"it speaks ZMTP 2, {TOO_OLD}"),
    (echo_as_zmtp_1, f"it speaks ZMTP 1, {TOO_OLD}"),
    (partial(say, b"\6\0alice"), f"it speaks ZMTP 1, {TOO_OLD}"),  # with an identity
]


def assert_hopeless(send: Send, wrong: list[tuple[Talk, str]], *options: str) -> None:
    """Connect to all ``wrong`` listeners at once; ``send`` ends by itself, and says why."""
    with ExitStack() as stack:
        reasons = {stack.enter_context(listening(talk)): reason for talk, reason in wrong}
        done = send(*connects(*reasons), *options, "x")
    assert (done.returncode, done.stdout) == (1, b"")
    last = done.stderr.decode().splitlines()[-1]
    expected = [f"{endpoint}: {reason}" for endpoint, reason in reasons.items()]
    assert [each for each in expected if each not in last] == []


def test_send_ends_when_all_its_endpoints_can_never_answer(send: Send) -> None:
    assert_hopeless(send, WRONG)


def test_send_with_curve_ends_when_all_its_endpoints_can_never_answer(
    send: Send, tmp_path: Path
) -> None:
    (tmp_path / "any.key").write_bytes(zmq.curve_keypair()[0])
    assert_hopeless(send, WRONG_WITH_CURVE, "--server-key", f"{tmp_path}/any.key")


@pytest.mark.parametrize("name", ["PUB", "REQ", "DEALER", "PAIR"])
def test_a_socket_that_can_never_answer_is_told_by_its_type(
    context: Context, send: Send, name: str
) -> None:
    _server, endpoint = open_server(context, zmq.SocketType[name])
    done = send("--connect", endpoint, "x")
    assert (done.returncode, done.stdout) == (1, b"")
    last = done.stderr.decode().splitlines()[-1]
    assert last == f"zmqmsg: {endpoint}: it is a {name} socket, not a REP or ROUTER"


@pytest.mark.parametrize(
    ("status", "notice"),
    [
        (b"400", "{}: it refused: the server does not let us in"),
        (b"500", "waiting for {}: it refused: the server failed to check who we are"),
    ],
)
def test_a_server_that_lets_nobody_in_without_keys_is_told_as_that(
    start: Start, status: bytes, notice: str
) -> None:
    """In ZAP, ZeroMQ's authentication protocol, status 400 is for good, and 500 is not."""
    refusal = greeting() + command(b"ERROR", b"\x03" + status)
    with listening(partial(say, refusal)) as endpoint:
        sender = start("send", "--connect", endpoint, "x")
        sender.wait_for_notice(f"zmqmsg: {notice.format(endpoint)}")


@waits
def test_a_mute_port_may_be_the_wrong_one_or_a_hung_server(start: Start) -> None:
    with listening(partial(say, b"")) as endpoint:
        sender = start("send", "--connect", endpoint, "x")
        sender.wait_for_notice(f"waiting for {endpoint}: {MUTE}$")
        sender.wait_for_notice(f"waiting for {endpoint}: {MUTE}; wrong port, or a hung server")


@waits
def test_a_server_that_becomes_mute_may_be_hung(start: Start) -> None:
    with listening(echo_as_zmtp_2) as endpoint:
        sender = start("send", "--connect", endpoint)
        exchange(sender)
    await_end(endpoint)
    with listening(partial(say, b""), endpoint):
        sender.send_line(b"x")
        sender.wait_for_notice(f"waiting for {endpoint}: {MUTE}; the server may be hung")


@pytest.mark.parametrize("talk", [echo_as_zmtp_1, echo_as_zmtp_2])
def test_an_old_peer_serves_without_delay_and_after_a_restart(start: Start, talk: Talk) -> None:
    """libzmq reports no handshake of ZMTP 1 and 2; a look after 5 s would come too late here."""
    with listening(talk) as endpoint:
        sender = start("send", "--connect", endpoint, "--timeout", "4")
        exchange(sender)
    await_end(endpoint)
    with listening(talk, endpoint):
        exchange(sender)
        sender.send_line(b"poison")
        status, output, _ = sender.finish()
    assert (status, output) == (3, b"")
    lost = f"zmqmsg: connection to {endpoint} lost; retrying"
    assert retries_of(sender)[-3:] == [f"{lost} ({number} of 3)" for number in (1, 2, 3)]


# Giving up


@waits
def test_a_message_is_given_up_if_no_server_was_there_since_the_start(send: Send) -> None:
    with listening(partial(say, b"")) as endpoint:
        done = send("--connect", endpoint, "--timeout", "4", "x", "never sent")
    assert (done.returncode, done.stdout) == (1, b"")
    reason = MUTE + r"; wrong port, or a hung server\?"
    expected = rf"zmqmsg: no server at {endpoint} within 4 s: {reason} \(1 attempt, .* s\)"
    assert re.fullmatch(expected, done.stderr.decode().splitlines()[-1])


def test_a_request_without_a_reply_is_sent_again_as_often_as_allowed(
    context: Context, start: Start
) -> None:
    mute, endpoint = open_server(context, zmq.ROUTER)
    long = "x" * 41
    options = ["--connect", endpoint, "--timeout", "1", "--retries", "2"]
    sender = start("send", *options, long, "never sent")
    assert [mute.recv_multipart()[2] for _ in range(3)] == [long.encode()] * 3
    status, output, (*notices, last) = sender.finish()
    late = f"no reply from {endpoint} within 1 s"
    assert (status, output) == (3, b"")
    assert notices == [f"zmqmsg: {late}; retrying ({attempt} of 2)" for attempt in (1, 2)]
    told = rf"no reply to '{'x' * 40}'\.\.\. \(3 attempts, (.*) s\): {late}; .*slow or hung"
    found = re.search(told, last)
    assert found
    assert float(found[1]) >= 3
    assert not mute.poll(200)  # nothing more has been sent


@POSIX
def test_a_timeout_ends_though_the_process_is_stopped_again_and_again(
    context: Context, start: Start
) -> None:
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--connect", endpoint, "--timeout", "1", "--retries", "0", "x")
    assert server.recv() == b"x"
    for _ in range(30):
        sender.signal(signal.SIGSTOP)
        time.sleep(0.3)  # during which the deadline may pass
        sender.signal(signal.SIGCONT)
        time.sleep(0.06)  # less than the last look takes
        if sender.popen.poll() is not None:
            break
    else:
        pytest.fail("it has not ended")
    assert sender.finish()[:2] == (3, b"")


# A check of 5 seconds at most that fails


@pytest.mark.parametrize(
    ("talk", "status", "line"),
    [
        (None, 1, "no server at .*: connection refused"),
        (partial(say, b""), 1, f"no server at .*: {MUTE}"),
        (partial(say, greeting(b"CURVE")), 1, "it requires CURVE"),
        (
            "no reply",
            3,
            "no reply to 'ping' .*: no reply from .* within 3 s; the server may be slow",
        ),
        ("lost", 3, "no reply to 'ping' .*: connection to .* lost; the request may have crashed"),
    ],
    ids=["refused", "mute", "needs keys", "no reply", "lost"],
)
def test_a_brief_check_that_fails_prints_one_line(
    context: Context, send: Send, talk: Talk | str | None, status: int, line: str
) -> None:
    options = ["--timeout", "3", "--retries", "0", "ping"]
    with ExitStack() as stack:
        if talk is None:
            endpoint = free_endpoint()
        elif talk == "no reply":
            _mute, endpoint = open_server(context, zmq.REP)
        elif talk == "lost":
            endpoint = stack.enter_context(loses_requests(context, after=1.5))
        else:
            assert callable(talk)
            endpoint = stack.enter_context(listening(talk))
        done = send("--connect", endpoint, *options)
    assert (done.returncode, done.stdout) == (status, b"")
    assert re.fullmatch(f"zmqmsg: .*{line}.*\n", done.stderr.decode())


def test_a_brief_check_that_succeeds_late_says_nothing(context: Context, start: Start) -> None:
    endpoint = free_endpoint()
    sender = start("send", "--connect", endpoint, "--timeout", "5", "ping")
    time.sleep(1.5)  # longer than any wait that is told otherwise
    server, _ = open_server(context, zmq.REP, endpoint)
    server.send(server.recv())
    assert sender.finish() == (0, b"ping\n", [])


# What it may mean that the connection is lost


@contextmanager
def loses_requests(context: Context, after: float) -> Iterator[str]:
    """Yield an endpoint whose connections end that many seconds after they have begun."""
    _server, endpoint = open_server(context, zmq.ROUTER)

    def talk(near: socket.socket) -> None:
        with socket.create_connection(address(endpoint), LIMIT) as far:
            end = time.monotonic() + after
            while (left := end - time.monotonic()) > 0:
                for ready in select.select([near, far], [], [], left)[0]:
                    (far if ready is near else near).sendall(ready.recv(65536))

    with listening(talk) as here:
        yield here


@pytest.mark.parametrize(
    "options",
    ["", "--retries 0", "--timeout 20", "--multipart small"],
    ids=lambda text: text or "-",
)
def test_a_message_above_the_servers_limit_is_told_with_its_size(
    serve: Serve, send: Send, tmp_path: Path, options: str
) -> None:
    (tmp_path / "large").write_bytes(b"x" * 5000)
    _, endpoint = serve("--max-size", "1000")
    done = send("--connect", endpoint, *options.split(), "--file", tmp_path / "large")
    assert done.returncode == 3
    last = done.stderr.decode().splitlines()[-1]
    assert "its frame of 5000 bytes exceeds the server's --max-size" in last


@waits
def test_connections_that_are_lost_after_the_same_time_point_to_a_proxy(
    context: Context, send: Send
) -> None:
    with loses_requests(context, after=3.0) as endpoint:
        done = send("--connect", endpoint, "--retries", "1", "x")
        once = send("--connect", endpoint, "--retries", "0", "x")
    assert (done.returncode, once.returncode) == (3, 3)
    last = done.stderr.decode().splitlines()[-1]
    assert "a proxy or tunnel on the way may end idle connections after" in last
    assert b"proxy" not in once.stderr  # once is no pattern


def test_connections_that_are_lost_at_once_point_to_no_proxy(context: Context, send: Send) -> None:
    with loses_requests(context, after=0.5) as endpoint:
        done = send("--connect", endpoint, "--retries", "2", "x")
    assert done.returncode in (1, 3)
    assert b"proxy" not in done.stderr


@waits
def test_one_clock_runs_for_connecting_and_replying(context: Context, start: Start) -> None:
    mute, endpoint = open_server(context, zmq.REP)
    delays = iter([2.5])

    def delay_the_first(data: bytes, target: socket.socket, _upstream: bool) -> None:
        time.sleep(next(delays, 0))  # that makes the link slow
        target.sendall(data)

    with relay(endpoint, delay_the_first) as late:
        sender = start("send", "--connect", late, "--timeout", "4", "--retries", "0", "x")
        assert mute.recv() == b"x"
        status, _, notices = sender.finish()
    found = re.search(r"no reply to 'x' \(1 attempt, (.*) s\)", notices[-1])
    assert found
    assert status == 3
    assert 4 <= float(found[1]) < 6.5


@pytest.fixture
def served(context: Context, start: Start) -> tuple[Process, zmq.Socket[bytes], str]:
    """A sender with two retries whose first request was served, the server, and its endpoint."""
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--connect", endpoint, "--timeout", "1", "--retries", "2")
    sender.send_line(b"before")
    server.send(server.recv())
    assert sender.read_line() == b"before"
    return sender, server, endpoint


def test_a_request_that_finds_no_server_any_more_was_certainly_not_served(
    served: tuple[Process, zmq.Socket[bytes], str],
) -> None:
    sender, server, endpoint = served
    server.close()
    await_end(endpoint)
    sender.send_line(b"x")
    status, _, notices = sender.finish()
    gone = f"no server at {endpoint} within 1 s: "
    assert (status, len(retries_of(sender))) == (1, 2)
    assert all(gone in retry for retry in retries_of(sender))
    assert re.search(rf"{gone}.*\(3 attempts, .* s\)", notices[-1])
    assert "crashed" not in notices[-1]


def test_a_request_whose_server_has_gone_with_it_may_have_been_served(
    served: tuple[Process, zmq.Socket[bytes], str],
) -> None:
    sender, server, endpoint = served
    sender.send_line(b"x")
    assert server.recv() == b"x"
    server.close()
    status, _, notices = sender.finish()
    lost, gone = retries_of(sender)
    assert status == 3
    assert f"connection to {endpoint} lost; retrying (1 of 2)" in lost
    assert f"no server at {endpoint} within 1 s: " in gone
    assert re.search(
        rf"no reply to 'x' \(3 attempts, .* s\): no server at {endpoint} .*may have crashed",
        notices[-1],
    )


# Several endpoints


def test_requests_go_round_robin_among_many_endpoints(serve: Serve, start: Start) -> None:
    count = 40
    server, _ = serve("--quiet", *["--bind", "tcp://127.0.0.1:*"] * count)
    until(lambda: len(server.notices) == count, lambda: server.notices)
    bound = [notice.rpartition(" ")[2] for notice in server.notices]
    sender = start("send", "--verbose", *connects(*bound))
    until(lambda: sum("connected to" in notice for notice in exchange(sender)) == count)
    for _ in range(2 * count):
        exchange(sender)
    assert sender.finish()[0] == 0
    order = replied(sender)[-2 * count :]
    assert sorted(order[:count]) == sorted(bound)
    assert order == order[:count] * 2


def replied(sender: Process) -> list[str]:
    """Return the endpoints that --verbose has named, in the order of their replies."""
    found = (re.search("reply from (.*): 1 frame", notice) for notice in sender.notices)
    return [match[1] for match in found if match]


@POSIX
def test_dead_and_frozen_servers_among_living_ones_hold_nobody_up(
    echo: str, serve: Serve, send: Send
) -> None:
    server, frozen = serve()
    server.signal(signal.SIGSTOP)
    messages = [str(number) for number in range(300)]
    done = send(*connects(free_endpoint(), frozen, echo, NOWHERE), "--timeout", "5", *messages)
    assert (done.returncode, done.stdout.decode().split()) == (0, messages)
    assert b"retrying" not in done.stderr


def assert_harmless(sender: Process, good: str, *reasons: str) -> None:
    """Send until all ``reasons`` are told; all replies are good ones, and nothing is sent twice."""
    replies_before = len(replied(sender))

    def all_are_told() -> bool:
        notices = [notice for notice in exchange(sender) if "waiting for" in notice]
        return all(any(reason in notice for notice in notices) for reason in reasons)

    until(all_are_told)
    assert sender.finish()[0] == 0
    assert set(replied(sender)[replies_before:]) == {good}
    assert retries_of(sender) == []


def test_bad_endpoints_harm_no_good_one(
    context: Context, serve: Serve, start: Start, tmp_path: Path
) -> None:
    _open_server, open_endpoint = open_server(context, zmq.REP)
    key = ["--key", f"{tmp_path}/server.key_secret"]
    _, good = serve("--quiet", *key)
    (tmp_path / "nobody").mkdir()
    _, refusing = serve(*key, "--client-keys", f"{tmp_path}/nobody")
    options = ["--verbose", "--server-key", f"{tmp_path}/server.key"]
    sender = start("send", *options, *connects(refusing, open_endpoint, good))
    assert_harmless(sender, good, "it refused: the server does not know this key", NO_CURVE)


def test_an_endpoint_that_becomes_bad_harms_no_good_one(
    context: Context, echo: str, serve: Serve, start: Start
) -> None:
    server, endpoint = serve("--quiet")
    sender = start("send", "--verbose", *connects(endpoint, echo))
    until(lambda: f"zmqmsg: connected to {endpoint}" in exchange(sender))
    server.close()
    await_end(endpoint)
    _publisher, _ = open_server(context, zmq.PUB, endpoint)
    assert_harmless(sender, echo, "it is a PUB socket")


@POSIX
@pytest.mark.parametrize(
    ("count", "soft_limit", "hard_limit"),
    [
        pytest.param(100, 200, 1024, id="than the usual limit of macOS has descriptors"),
        pytest.param(400, 1024, 2048, id="than libzmq has sockets"),
    ],
)
def test_there_may_be_more_endpoints(
    echo: str, send: Send, tmp_path: Path, count: int, soft_limit: int, hard_limit: int
) -> None:
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard_limit:
        pytest.skip(f"needs a hard limit of {hard_limit} file descriptors")
    nobody = connects(*(f"ipc://{tmp_path}/{number}" for number in range(count)))
    limited = shell(tmp_path, f'ulimit -S -n {soft_limit}; exec "$python" "$@"')
    done = send(*nobody, "--connect", echo, "hi", **limited)
    assert (done.returncode, done.stdout) == (0, b"hi\n")


@POSIX
def test_too_many_endpoints_are_refused_with_what_helps(send: Send, tmp_path: Path) -> None:
    nobody = connects(*(f"ipc://{tmp_path}/{number}" for number in range(400)))
    limited = shell(tmp_path, 'ulimit -n 256; exec "$python" "$@"')
    done = send(*nobody, "hi", **limited)
    assert (done.returncode, done.stdout) == (1, b"")
    reason = b"zmqmsg: cannot open a socket: Too many open files; raise the limit"
    assert done.stderr.startswith(reason)


# --verbose


@POSIX
def test_verbose_reports_each_reply_and_a_summary(serve: Serve, send: Send) -> None:
    _, endpoint = serve("--exec", "sleep 0.3; cat")
    done = send("--verbose", "--connect", endpoint, "a", "bc")
    connected, *replies, summary = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (0, b"a\nbc\n")
    assert connected == f"zmqmsg: connected to {endpoint}"
    for size, reply in zip(["1 byte", "2 bytes"], replies, strict=True):
        found = re.fullmatch(f"zmqmsg: reply from {endpoint}: 1 frame, {size}, (.*) ms", reply)
        assert found
        assert float(found[1]) >= 300
    times = re.fullmatch("zmqmsg: 2 replies, min/avg/max (.*)/(.*)/(.*) ms", summary)
    assert times
    assert 300 <= float(times[1]) <= float(times[2]) <= float(times[3])


def test_verbose_gives_the_time_of_the_attempt_that_brought_the_reply(
    context: Context, start: Start
) -> None:
    server, endpoint = open_server(context, zmq.ROUTER)
    sender = start("send", "--verbose", "--connect", endpoint, "--timeout", "2", "x")
    server.recv_multipart()
    server.send_multipart(server.recv_multipart())
    sender.finish()
    assert float(sender.wait_for_notice("1 frame, 1 byte, (.*) ms")[1]) < 2000
    assert not any("min/avg/max" in notice for notice in sender.notices)


def test_verbose_reports_connections_as_they_come_and_go(serve: Serve, start: Start) -> None:
    server, endpoint = serve()
    sender = start("send", "--verbose", "--connect", endpoint)
    exchange(sender)
    server.close()
    await_end(endpoint)
    serve("--bind", endpoint)
    exchange(sender)
    told = [notice for notice in sender.finish()[2] if re.search("connect(ed|ion) to", notice)]
    connected, lost = f"zmqmsg: connected to {endpoint}", f"zmqmsg: connection to {endpoint} lost"
    assert told == [connected, lost, connected]


# Ctrl-C


@POSIX
def test_every_wait_is_told_with_its_reason_and_ended_by_ctrl_c(
    context: Context, serve: Serve, start: Start
) -> None:
    server, frozen = serve()
    server.signal(signal.SIGSTOP)
    _mute, unanswering = open_server(context, zmq.REP)
    nobody = free_endpoint()
    reasons = {
        nobody: f"waiting for {nobody}: connection refused",
        NOWHERE: f"waiting for {NOWHERE}: cannot resolve a..b: ",
        unanswering: f"waiting for a reply from {unanswering}",
        frozen: f"waiting for {frozen}: {MUTE}",
    }
    senders = {endpoint: start("send", "--connect", endpoint, "x") for endpoint in reasons}
    for endpoint, sender in senders.items():
        sender.wait_for_notice(re.escape(reasons[endpoint]))
        interrupt(sender)


def interrupt(sender: Process) -> None:
    sender.signal(signal.SIGINT)
    assert sender.wait() == -signal.SIGINT


@POSIX
def test_ctrl_c_ends_a_wait_for_the_reader_of_the_replies(echo: str, start: Start) -> None:
    sender = start("send", "--connect", echo, *["x" * 100_000] * 3)
    assert sender.popen.stdout
    assert sender.popen.stdout.read(1) == b"x"
    interrupt(sender)


@POSIX
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_ctrl_c_stops_a_shell_loop_around_send() -> None:
    """It would go on if ``send`` met the signal and exited, even with status 130."""
    client = shlex.join([*COMMAND, "send", "--connect", free_endpoint(), "x"])
    with subprocess.Popen(
        ["bash", "-c", f"while :; do {client}; done"],
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as loop:
        try:
            assert loop.stderr
            assert b"waiting for" in loop.stderr.readline()
            os.killpg(loop.pid, signal.SIGINT)
            assert loop.wait(LIMIT) == -signal.SIGINT
        finally:
            with suppress(ProcessLookupError):
                os.killpg(loop.pid, signal.SIGKILL)


@POSIX
def test_where_ctrl_c_is_ignored_it_stays_so(echo: str, start: Start) -> None:
    """As in a background job of a shell."""
    sender = start(
        "send", "--connect", echo, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    for _ in range(2):
        exchange(sender)
        sender.signal(signal.SIGINT)
    assert sender.finish()[0] == 0
