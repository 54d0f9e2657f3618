"""``zmqmsg send``: its replies, what it says while it waits, how it gives up, and how it ends."""

import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from zmqmsg.sockets import Context

from conftest import (
    COMMAND,
    LINUX,
    POSIX,
    Process,
    Send,
    Serve,
    Start,
    await_end,
    bind,
    free_endpoint,
    listening,
    open_server,
    relay,
    until,
)
from zmtp import OTHER_PROTOCOLS, Talk, command, echo_as_zmtp_1, echo_as_zmtp_2, greeting, say

NOWHERE = "tcp://no.such.name.invalid:5555"
MUTE = "connected, but no ZeroMQ greeting yet"


def first_notice(sender: Process) -> str:
    return sender.wait_for_notice("zmqmsg: (.*)")[1]


def connects(*endpoints: str) -> list[str]:
    """Return the options that connect to ``endpoints``."""
    return [argument for endpoint in endpoints for argument in ("--connect", endpoint)]


# Replies


@POSIX
@pytest.mark.parametrize(
    ("bound", "to_connect"),
    [
        ("tcp://127.0.0.1:*", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        ("tcp://localhost:0", r"tcp://127\.0\.0\.1:[1-9]\d*"),
        pytest.param("tcp://lo:*", r"tcp://127\.0\.0\.1:[1-9]\d*", marks=LINUX),
        ("tcp://[::1]:*", r"tcp://\[::1\]:[1-9]\d*"),
        ("ipc://{tmp_path}/a.sock", "ipc://{tmp_path}/a.sock"),
        pytest.param("ipc://@zmqmsg-test-{pid}", "ipc://@zmqmsg-test-{pid}", marks=LINUX),
    ],
)
def test_three_messages_are_printed_at_the_server_and_their_replies_at_the_client(
    serve: Serve, send: Send, tmp_path: Path, bound: str, to_connect: str
) -> None:
    names = {"tmp_path": tmp_path, "pid": os.getpid()}
    server, real = serve("--count", "3", "--bind", bound.format(**names))
    assert re.fullmatch(to_connect.format(**names), real)
    # With IPv6 switched on, libzmq would try localhost as ::1 alone.
    connect = real.replace("127.0.0.1", "localhost")
    done = send("--connect", connect, "first message", "second message", "third message")
    lines = b"first message\nsecond message\nthird message\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, lines, b"")
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


def drop_privilege() -> None:
    ctypes.CDLL(None).prctl(
        24, 1
    )  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: for root, modes count from now on, too
    ctypes.CDLL(None).prctl(24, 2)  # CAP_DAC_READ_SEARCH


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
    sender = start("send", *connects(*endpoints), "x", preexec_fn=drop_privilege)
    for endpoint in endpoints:
        sender.wait_for_notice(f"waiting for {endpoint}: permission denied")
    (tmp_path / "directory").chmod(0o700)


@POSIX
def test_where_nobody_listens_the_system_says_why(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{tmp_path}/stale")
    (tmp_path / "file").touch()
    reasons = {
        "tcp://127.0.0.1:1": "connection refused",
        "tcp://[::1]:1": "connection refused",
        "tcp://localhost:1": "connection refused",
        "tcp://a..b:5555": "cannot resolve a..b: not a valid name",
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
    assert first_notice(sender) == f"waiting for {endpoint}: connection refused"


NO_CURVE = "it does not use CURVE: is it the right server?"
TOO_OLD = "which is too old for CURVE"
LONG_READY = b"\6" + (300).to_bytes(8) + b"\5READY\x0bSocket-Type\0\0\0\3SUB" + bytes(275)

WRONG: list[tuple[Talk, str]] = [
    *((talk, f"it does not speak ZeroMQ; it says '{words}") for talk, words in OTHER_PROTOCOLS),
    (partial(say, greeting(b"PLAIN")), "it requires PLAIN, which zmqmsg does not speak"),
    (partial(say, greeting(b"CURVE")), "it requires CURVE; pass --server-key"),
    (
        partial(say, greeting()[:10] + b"\1\7\0\0"),
        "it is a PULL socket, not a REP or ROUTER",
    ),  # of ZMTP 2
    (partial(say, greeting() + LONG_READY), "it is a SUB socket, not a REP or ROUTER"),
]
WRONG_WITH_CURVE: list[tuple[Talk, str]] = [
    *((talk, f"it does not speak ZeroMQ; it says '{words}") for talk, words in OTHER_PROTOCOLS),
    (partial(say, greeting(b"PLAIN")), "it requires PLAIN, which zmqmsg does not speak"),
    (partial(say, greeting()), NO_CURVE),
    (echo_as_zmtp_2, f"it speaks ZMTP 2, {TOO_OLD}"),
    (echo_as_zmtp_1, f"it speaks ZMTP 1, {TOO_OLD}"),
    (partial(say, b"\6\0alice"), f"it speaks ZMTP 1, {TOO_OLD}"),  # with an identity
]
WRONG_TYPES = [
    zmq.PUB,
    zmq.PUSH,
    zmq.REQ,
    zmq.PAIR,
    zmq.PULL,
    zmq.SUB,
    zmq.DEALER,
    zmq.XPUB,
    zmq.XSUB,
]


@pytest.mark.parametrize(
    "options", [[], ["--timeout", "15"], ["--server-key", "any.key"]], ids=["", "timeout", "CURVE"]
)
def test_send_ends_at_once_when_all_its_endpoints_can_never_answer(
    context: Context, send: Send, tmp_path: Path, options: list[str]
) -> None:
    curve = "--server-key" in options
    (tmp_path / "any.key").write_bytes(zmq.curve_keypair()[0])
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        for talk, reason in WRONG_WITH_CURVE if curve else WRONG:
            reasons[stack.enter_context(listening(talk))] = reason
        for socket_type in WRONG_TYPES:
            server, endpoint = open_server(context, socket_type)
            stack.enter_context(server)
            reasons[endpoint] = (
                NO_CURVE if curve else f"it is a {socket_type.name} socket, not a REP or ROUTER"
            )
        done = send(*connects(*reasons), *options, "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    last = done.stderr.decode().splitlines()[-1]
    assert [
        endpoint for endpoint, reason in reasons.items() if f"{endpoint}: {reason}" not in last
    ] == []


def test_a_single_endpoint_that_can_never_answer_is_told_in_one_line(
    context: Context, send: Send
) -> None:
    _publisher, endpoint = open_server(context, zmq.PUB)
    done = send("--connect", endpoint, "x")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"zmqmsg: {endpoint}: it is a PUB socket, not a REP or ROUTER\n"


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
        assert first_notice(start("send", "--connect", endpoint, "x")) == notice.format(endpoint)


def test_a_mute_port_gets_nothing_and_is_told_as_that(start: Start) -> None:
    with listening(echo_as_zmtp_2) as endpoint:
        former = start("send", "--connect", endpoint, "--timeout", "8", "--retries", "0")
        exchange(former)
    with listening(partial(say, b""), endpoint):
        former.send_line(b"two")
        hasty = start("send", "--connect", endpoint, "--timeout", "0.4", "x")
        patient = start("send", "--connect", endpoint, "x")
        no_server = f"zmqmsg: no server at {endpoint} within"
        status, _, (only,) = hasty.finish()
        assert (status, only.startswith(f"{no_server} 0.4 s: {MUTE} (1 attempt, ")) == (1, True)
        patient.wait_for_notice("hung server")
        waiting = f"zmqmsg: waiting for {endpoint}: {MUTE}"
        assert patient.notices == [waiting, f"{waiting}; wrong port, or a hung server?"]
        status, _, notices = former.finish()
    assert (status, f"{no_server} 8 s: {MUTE}; the server may be hung" in notices[-1]) == (1, True)


@pytest.mark.parametrize("talk", [echo_as_zmtp_1, echo_as_zmtp_2])
def test_an_old_peer_serves_within_a_second_and_after_a_restart(start: Start, talk: Talk) -> None:
    """libzmq reports no handshake of ZMTP 1 and 2."""
    with listening(talk) as endpoint:
        started = time.monotonic()
        sender = start("send", "--connect", endpoint, "--timeout", "1")
        exchange(sender)
        assert time.monotonic() - started < 5  # on a busy machine; 0.6 s otherwise
        assert sender.notices == []
    with listening(talk, endpoint):
        exchange(sender)
        sender.send_line(b"poison")
        status, output, notices = sender.finish()
    assert (status, output) == (3, b"")
    lost = f"zmqmsg: connection to {endpoint} lost; retrying"
    retries = [notice for notice in notices if "retrying" in notice]
    assert retries[-3:] == [f"{lost} ({number} of 3)" for number in (1, 2, 3)]


# Giving up


def test_a_message_is_given_up_at_once_if_no_server_was_there_since_the_start(send: Send) -> None:
    done = send("--connect", NOWHERE, "--timeout", "0.4", "x", "never sent")
    assert (done.returncode, done.stdout) == (1, b"")
    expected = rf"zmqmsg: no server at {NOWHERE} within 0\.4 s: .+ \(1 attempt, .* s\)\n"
    assert re.fullmatch(expected, done.stderr.decode())


def test_a_request_whose_time_is_over_is_sent_again_until_the_retries_are_used_up(
    context: Context, start: Start
) -> None:
    mute, endpoint = open_server(context, zmq.ROUTER)
    long = "x" * 41
    sender = start(
        "send", "--connect", endpoint, "--timeout", "0.6", "--retries", "2", long, "never sent"
    )
    assert [mute.recv_multipart()[2] for _ in range(3)] == [long.encode()] * 3
    status, output, (*notices, last) = sender.finish()
    late = f"no reply from {endpoint} within 0.6 s"
    assert (status, output) == (3, b"")
    assert notices == [f"zmqmsg: {late}; retrying ({attempt} of 2)" for attempt in (1, 2)]
    found = re.search(
        rf"no reply to '{'x' * 40}'\.\.\. \(3 attempts, (.*) s\): {late}; .*slow or hung", last
    )
    assert found
    assert 1.8 <= float(found[1]) < 6
    assert not mute.poll(200)


def test_one_clock_runs_for_connecting_and_replying(context: Context, start: Start) -> None:
    mute, endpoint = open_server(context, zmq.REP)
    delays = iter([0.6])

    def delay_the_first(data: bytes, target: socket.socket, _upstream: bool) -> None:
        time.sleep(next(delays, 0))
        target.sendall(data)

    with relay(endpoint, delay_the_first) as late:
        sender = start("send", "--connect", late, "--timeout", "1.5", "--retries", "0", "x")
        assert mute.recv() == b"x"
        status, _, notices = sender.finish()
    found = re.search(r"no reply to 'x' \(1 attempt, (.*) s\)", notices[-1])
    assert found
    assert status == 3
    assert 1.5 <= float(found[1]) < 6


@pytest.mark.parametrize("sent", [True, False])
def test_an_attempt_that_finds_no_server_any_more_is_one_of_the_retries(
    context: Context, start: Start, sent: bool
) -> None:
    """The exit status tells whether the message may have been served."""
    server, endpoint = open_server(context, zmq.REP)
    sender = start("send", "--verbose", "--connect", endpoint, "--timeout", "0.6", "--retries", "2")
    sender.send_line(b"before")
    server.send(server.recv())
    assert sender.read_line() == b"before"
    if not sent:
        server.close()
        await_end(endpoint)
    sender.send_line(b"x")
    if sent:
        assert server.recv() == b"x"
        server.close()
    status, _, notices = sender.finish()
    retries = [notice for notice in notices if "retrying" in notice]
    gone = f"no server at {endpoint} within 0.6 s: "
    assert (status, len(retries)) == (3 if sent else 1, 2)
    assert (f"connection to {endpoint} lost; retrying (1 of 2)" if sent else gone) in retries[0]
    assert gone in retries[1]
    assert re.search(
        rf"no reply to 'x' \(3 attempts, .* s\): {gone}"
        if sent
        else rf"{gone}.*\(3 attempts, .* s\)",
        notices[-1],
    )
    assert ("the request may have crashed the server" in notices[-1]) is sent


# Several endpoints


def test_requests_go_round_robin_among_more_endpoints_than_there_are_io_threads(
    serve: Serve, start: Start
) -> None:
    count = 70
    server, _ = serve("--quiet", *["--bind", "tcp://127.0.0.1:*"] * count)
    until(lambda: len(server.notices) == count)
    endpoints = [notice.rpartition(" ")[2] for notice in server.notices]
    sender = start("send", "--verbose", *connects(*endpoints))

    def all_are_ready() -> bool:
        return sum("connected to" in notice for notice in exchange(sender)) == count

    until(all_are_ready)
    for _ in range(2 * count):
        exchange(sender)
    assert sender.finish()[0] == 0
    order = replied(sender)[-2 * count :]
    assert sorted(order[:count]) == sorted(endpoints)
    assert order == order[:count] * 2


def exchange(sender: Process) -> list[str]:
    """Send a line and read its reply; return the notices by then."""
    sender.send_line(b"x")
    assert sender.read_line() == b"x"
    return sender.notices


def replied(sender: Process) -> list[str]:
    """Return the endpoints that --verbose has named, in the order of their replies."""
    return [
        found[1]
        for notice in sender.notices
        if (found := re.search("reply from (.*): 1 frame", notice))
    ]


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


@pytest.mark.parametrize("replaced", [False, True], ids=["from the start", "in the middle"])
@pytest.mark.parametrize(
    "bad", ["refused: the server does not know this key", "it is a PUB socket"]
)
def test_one_bad_endpoint_among_several_harms_no_good_one(
    context: Context, serve: Serve, start: Start, tmp_path: Path, bad: str, replaced: bool
) -> None:
    curve = "key" in bad
    key = ["--key", f"{tmp_path}/server.key_secret"] * curve
    server_key = ["--server-key", f"{tmp_path}/server.key"] * curve
    good_server, good = serve("--quiet", *key)
    former_server, endpoint = serve("--quiet", *key) if replaced else (good_server, free_endpoint())

    publisher = context.socket(zmq.PUB)

    def bind_bad() -> None:
        if curve:
            (tmp_path / "nobody").mkdir()
            serve("--bind", endpoint, *key, "--client-keys", f"{tmp_path}/nobody")
        else:
            bind(publisher, endpoint)

    if not replaced:
        bind_bad()
    sender = start("send", "--verbose", *server_key, *connects(endpoint, good))
    exchange(sender)
    if replaced:
        until(lambda: f"zmqmsg: connected to {endpoint}" in exchange(sender))
        former_server.close()
        bind_bad()
        exchange(sender)
    replies_before = len(replied(sender))
    until(lambda: any(bad in notice for notice in exchange(sender)))
    assert sender.finish()[0] == 0
    assert set(replied(sender)[replies_before:]) == {good}
    assert sum(bad in notice for notice in sender.notices) == 1
    assert not any("retrying" in notice for notice in sender.notices)


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
    sender = start("send", "--verbose", "--connect", endpoint, "--timeout", "1", "x")
    server.recv_multipart()
    server.send_multipart(server.recv_multipart())
    sender.finish()
    assert float(sender.wait_for_notice("1 frame, 1 byte, (.*) ms")[1]) < 1000
    assert not any("min/avg/max" in notice for notice in sender.notices)


def test_verbose_reports_connections_as_they_come_and_go(serve: Serve, start: Start) -> None:
    server, endpoint = serve()
    sender = start("send", "--verbose", "--connect", endpoint)
    exchange(sender)
    server.close()
    serve("--bind", endpoint)
    exchange(sender)
    assert f"zmqmsg: connection to {endpoint} lost" in sender.notices
    assert sender.finish()[2].count(f"zmqmsg: connected to {endpoint}") == 2


# Ctrl-C


@POSIX
def test_every_wait_is_told_with_its_reason_and_ended_by_ctrl_c(
    context: Context, serve: Serve, start: Start
) -> None:
    server, frozen = serve()
    server.signal(signal.SIGSTOP)
    dying, lost = open_server(context, zmq.REP)
    _mute, unanswering = open_server(context, zmq.REP)
    nobody = free_endpoint()
    reasons = {
        nobody: f"waiting for {nobody}: connection refused",
        lost: f"waiting for {lost}: connection refused",
        NOWHERE: f"waiting for {NOWHERE}: cannot resolve no.such.name.invalid: ",
        unanswering: f"waiting for a reply from {unanswering}",
        frozen: f"waiting for {frozen}: {MUTE}",
    }
    senders = {endpoint: start("send", "--connect", endpoint, "x") for endpoint in reasons}
    dying.recv()
    dying.close()
    for endpoint, sender in senders.items():
        sender.wait_for_notice(re.escape(reasons[endpoint]))
        interrupt(sender)
        assert reasons[endpoint] in sender.notices[-2]


def interrupt(sender: Process) -> None:
    sender.signal(signal.SIGINT)
    assert sender.wait(5) == -signal.SIGINT


@POSIX
def test_ctrl_c_ends_a_wait_for_the_reader_of_the_replies(echo: str, start: Start) -> None:
    sender = start("send", "--connect", echo, *["x" * 100_000] * 3)
    assert sender.popen.stdout
    assert sender.popen.stdout.read(1) == b"x"
    interrupt(sender)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_ctrl_c_stops_a_shell_loop_around_send() -> None:
    """It would go on if ``send`` met the signal and exited, even with status 130."""
    command = (
        f"while :; do {shlex.join([*COMMAND, 'send', '--connect', free_endpoint(), 'x'])}; done"
    )
    with subprocess.Popen(
        ["bash", "-c", command], stderr=subprocess.PIPE, start_new_session=True
    ) as loop:
        try:
            assert loop.stderr
            assert b"waiting for" in loop.stderr.readline()
            os.killpg(loop.pid, signal.SIGINT)
            assert loop.wait(5) == -signal.SIGINT
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


# Beyond the usual


def test_an_endpoint_as_a_message_is_sent_with_a_notice(send: Send) -> None:
    done = send(
        "--timeout", "0.1", "tcp://127.0.0.1:1", "hi", env=os.environ | {"ZMQMSG_SEND_RETRIES": "0"}
    )
    assert (
        b"zmqmsg: 'tcp://127.0.0.1:1' is sent as a message; to connect there, use --connect\n"
        in done.stderr
    )


@POSIX
def test_there_may_be_more_endpoints_than_libzmq_has_sockets(echo: str, send: Send) -> None:
    nobody = connects(*(f"tcp://127.0.0.1:{port}" for port in range(1, 400)))
    done = send(*nobody, "--connect", echo, "hi")
    assert (done.returncode, done.stdout) == (0, b"hi\n")
