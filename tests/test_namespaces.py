"""What needs a world of its own: process 1 of a container, a network that goes nowhere."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import IPV6, LINUX, Process, Send, Serve, Start, soak, until, waits

# Who is not root may be allowed to be root of a namespace.
UNSHARE = "unshare" if sys.platform == "linux" and os.geteuid() == 0 else "unshare -r"


def may_make_namespaces() -> bool:
    """Return whether the tests can make what they need."""
    if sys.platform != "linux" or not (shutil.which("unshare") and shutil.which("ip")):
        return False
    command = f"{UNSHARE} -fpnm --mount-proc ip link set lo up"
    return subprocess.run(command.split(), capture_output=True).returncode == 0


pytestmark = [
    LINUX,
    pytest.mark.skipif(
        not may_make_namespaces(), reason="needs unshare, ip and the right to make namespaces"
    ),
]

Inside = Callable[..., Process]


@pytest.fixture
def inside(start: Start, tmp_path: Path) -> Inside:
    """Start zmqmsg in namespaces of its own, by a shell script in which "$@" stands for it."""

    def inside(script: str, *arguments: str) -> Process:
        path = tmp_path / "script"
        path.write_text(
            f"#!/bin/sh\nset -e\ncd '{tmp_path}'\nset -- '{sys.executable}' \"$@\"\n{script}\n"
        )
        path.chmod(0o755)
        return start(*arguments, executable=path)

    return inside


# Process 1

AS_PROCESS_1 = f'exec {UNSHARE} -fp --kill-child --mount-proc "$@"'


def process_1(process: Process) -> int:
    """Return the id, outside, of the process that is number 1 inside."""
    until(lambda: children(process.pid))
    return children(process.pid)[0]


def children(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started and not waited for yet."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_process_1_is_ended_by_a_signal_as_any_other(inside: Inside, number: int) -> None:
    """Without a handler, the kernel drops the signal."""
    sender = inside(AS_PROCESS_1, "send", "--connect", "tcp://127.0.0.1:1", "x")
    sender.wait_for_notice("waiting for")
    os.kill(process_1(sender), number)
    assert sender.wait() == 128 + number


def test_process_1_serves_until_the_first_signal_and_ends_at_the_second(
    inside: Inside, start: Start, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    server = inside(
        AS_PROCESS_1, "serve", "--bind", endpoint, "--exec", "echo begun >&2; sleep 600"
    )
    server.wait_for_notice("listening")
    start("send", "--connect", endpoint, "x")
    server.wait_for_notice("begun")
    os.kill(process_1(server), signal.SIGTERM)
    server.wait_for_notice("stopping; what has been received is answered")
    os.kill(process_1(server), signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "command",
    [
        ["--exec", "sleep 0.1 >/dev/null 2>&1 & cat"],
        ["--filter", "while read -r line; do sleep 0.1 >/dev/null 2>&1 & echo $line; done"],
    ],
    ids=["exec", "filter"],
)
def test_process_1_reaps_what_its_commands_have_left_running_and_stops(
    inside: Inside, send: Send, tmp_path: Path, command: list[str]
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    server = inside(AS_PROCESS_1, "serve", "--bind", endpoint, *command)
    server.wait_for_notice("listening")
    for messages in ("abc", "d"):
        replies = "".join(f"{message}\n" for message in messages)
        assert send("--connect", endpoint, *messages).stdout.decode() == replies
        until(lambda: len(children(process_1(server))) <= 1)  # the filter, or none
    os.kill(process_1(server), signal.SIGTERM)
    assert server.wait() == 0
    assert not (tmp_path / "socket").exists()


# Name servers and networks

# A name server that takes questions and never answers. It says when it is up, and was asked.
HUNG_NAME_SERVER = f"""
exec {UNSHARE} -nm sh -c '
ip link set lo up
"$1" -c "
import os, socket
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.settimeout(0.1)
listener.bind((\\"127.0.0.1\\", 53))
open(\\"up\\", \\"w\\").close()
parent = os.getppid()
while os.getppid() == parent:
    try:
        listener.recv(512)
        open(\\"asked\\", \\"w\\").close()
    except TimeoutError:
        pass
" < /dev/null > /dev/null 2>&1 &
while [ ! -e up ]; do sleep 0.05; done
echo nameserver 127.0.0.1 > resolv.conf
mount --bind resolv.conf /etc/resolv.conf
exec "$@"' sh "$@"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bind_that_waits_for_a_name_server_is_ended_by_a_signal(
    inside: Inside, tmp_path: Path, number: int
) -> None:
    server = inside(HUNG_NAME_SERVER, "serve", "--bind", "tcp://some.name.example:5555")
    until((tmp_path / "asked").exists)
    server.signal(number)
    assert server.finish()[:2] == (0, b"")


HANGING = [f"--connect=tcp://n{number}.example:5555" for number in range(100)]


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=soak)])
def test_a_name_server_that_hangs_holds_up_no_other_endpoint(
    inside: Inside, serve: Serve, tmp_path: Path, count: int
) -> None:
    _, endpoint = serve("--bind", f"ipc://{tmp_path}/socket")
    options = [*HANGING[:count], "--connect", endpoint, "--timeout", "5"]
    sender = inside(HUNG_NAME_SERVER, "send", *options, "one", "two")
    assert sender.finish()[:2] == (0, b"one\ntwo\n")


@pytest.mark.parametrize("count", [1, pytest.param(100, marks=soak)])
def test_a_name_server_that_hangs_is_told_of_and_ctrl_c_ends_the_wait(
    inside: Inside, count: int
) -> None:
    sender = inside(HUNG_NAME_SERVER, "send", *HANGING[:count], "x")
    sender.wait_for_notice("waiting for tcp://n0.example:5555: resolving the name takes long")
    sender.signal(signal.SIGINT)
    assert sender.wait() == -signal.SIGINT


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("true", "network is unreachable"),
        ("ip link set lo up; ip route add unreachable 192.0.2.0/24", "no route to host"),
        ("ip link set lo up; ip route add prohibit 192.0.2.0/24", "permission denied"),
        ("ip link set lo up; ip route add blackhole 192.0.2.0/24", "invalid argument"),
    ],
    ids=["none", "unreachable", "prohibit", "blackhole"],
)
def test_a_network_that_goes_nowhere_is_told_in_the_words_of_the_system(
    inside: Inside, network: str, reason: str
) -> None:
    script = f"""exec {UNSHARE} -n sh -c '{network}; exec "$@"' sh "$@" """
    sender = inside(script, "send", "--connect", "tcp://192.0.2.1:5555", "x")
    sender.wait_for_notice(f"waiting for tcp://192.0.2.1:5555: {reason}")
    assert not re.search("resolv", str(sender.notices))  # an address in numbers is no name


def test_a_name_that_cannot_be_resolved_is_told_as_that(inside: Inside) -> None:
    script = f'exec {UNSHARE} -n "$@"'
    sender = inside(script, "send", "--connect", "tcp://no.such.name.invalid:5555", "x")
    sender.wait_for_notice(
        "waiting for tcp://no.such.name.invalid:5555: cannot resolve no.such.name.invalid: "
    )


@IPV6
@pytest.mark.parametrize(
    ("name", "bound"),
    [("six", "[fd00::1]"), ("six", "six.example"), ("three", "127.0.0.3")],
)
def test_each_address_of_a_name_is_tried_and_ipv6_needs_no_brackets(
    inside: Inside, name: str, bound: str
) -> None:
    script = f"""exec {UNSHARE} -nm sh -c 'ip link set lo up; ip addr add fd00::1/64 dev lo nodad
    printf "%s\\n" "fd00::1 six.example" "127.0.0.1 three.example" "127.0.0.3 three.example" > hosts
    mount --bind hosts /etc/hosts
    "$1" -m zmqmsg serve --bind tcp://{bound}:5555 --count 1 & exec "$@"' sh "$@" """
    sender = inside(script, "send", "--connect", f"tcp://{name}.example:5555", "x")
    assert b"x\n" in sender.finish()[1]
    assert sender.popen.returncode == 0


# Networks that drop packets

# What is sent to 192.0.2.1 and 192.0.2.2 vanishes.
SILENT_NETWORK = """
ip link set lo up
ip link add here type veth peer name there
ip link set there up
ip link set here up
ip addr add 192.0.2.10/24 dev here
for host in 1 2; do
    ip neigh add 192.0.2.$host lladdr 02:00:00:00:00:0$host dev here nud permanent
done
"""
SILENT = f"""exec {UNSHARE} -nm sh -ec '{SILENT_NETWORK}
[ ! -e hosts ] || mount --bind hosts /etc/hosts
[ ! -e prepare ] || . ./prepare
exec "$@"' sh "$@"
"""


@pytest.fixture
def silent(inside: Inside, tmp_path: Path) -> Inside:
    """Start zmqmsg in a network that drops packets, after the shell script ``prepare``."""

    def silent(prepare: str, *arguments: str) -> Process:
        (tmp_path / "prepare").write_text(prepare)
        return inside(SILENT, *arguments)

    return silent


def ports_that_connect(pid: int) -> set[str]:
    """Return the local ports from which a process's network connects, without an answer yet."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()]
    return {local for _, local, _, state, *_ in rows if state == "02"}


@waits
def test_after_an_outage_that_drops_packets_send_connects_by_a_new_attempt(
    silent: Inside, tmp_path: Path
) -> None:
    """The system repeats the first packet of an old one ever more rarely."""
    end_of_outage = """
    for _ in $(seq 1200); do
        [ -e over ] && break
        sleep 0.1
    done
    ip addr add 192.0.2.1/32 dev lo
    exec "$1" -m zmqmsg serve --quiet --count 1 --bind tcp://192.0.2.1:5555
    """
    endpoint = "tcp://192.0.2.1:5555"
    sender = silent(f"({end_of_outage}) &", "send", "--connect", endpoint, "x")
    sender.wait_for_notice(f"waiting for {endpoint}: ")
    seen: set[str] = set()
    # One of them is that of the probe.

    def were_four_tried() -> bool:
        seen.update(ports_that_connect(sender.pid))
        return len(seen) >= 4

    until(were_four_tried)
    (tmp_path / "over").touch()
    sender.wait_for_notice(f"connected to {endpoint}")
    assert sender.finish()[:2] == (0, b"x\n")
    told = [each for each in sender.notices if each.startswith("zmqmsg: waiting for tcp")]
    assert told == [f"zmqmsg: waiting for {endpoint}: connecting takes long"]


@IPV6
@pytest.mark.parametrize("silent_hosts", [["192.0.2.1"], ["192.0.2.1", "192.0.2.2"]])
def test_a_name_whose_first_addresses_drop_packets_is_reached_soon(
    silent: Inside, tmp_path: Path, silent_hosts: list[str]
) -> None:
    hosts = [*silent_hosts, "fd00::1"]  # IPv4 is tried first
    (tmp_path / "hosts").write_text("".join(f"{host} many.example\n" for host in hosts))
    prepare = """
        ip addr add fd00::1/64 dev lo nodad
        "$1" -m zmqmsg serve -qn 1 -b "tcp://[fd00::1]:5555" &
    """
    options = ["--timeout", "8", "--retries", "0"]
    sender = silent(prepare, "send", "--connect", "tcp://many.example:5555", *options, "x")
    sender.wait_for_notice("listening")
    assert sender.read_line() == b"x"
    assert sender.popen.wait() == 0


@waits
def test_the_reason_names_the_address_that_was_tried_and_each_is_told_once(
    silent: Inside, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("192.0.2.1 two.example\n192.0.2.2 two.example\n")
    endpoint = "tcp://two.example:5555"
    sender = silent("", "send", "--connect", endpoint, "--timeout", "12", "x")
    status, _, notices = sender.finish()
    assert status == 1
    for host in ("192.0.2.1", "192.0.2.2"):
        notice = f"zmqmsg: waiting for {endpoint}: connecting to {host} takes long"
        assert notices.count(notice) == 1, notices
    assert re.search(r"192\.0\.2\.[12]", notices[-1])


def test_an_interface_that_is_not_there_is_called_that(inside: Inside) -> None:
    script = f'exec {UNSHARE} -n "$@"'
    reason = "this machine has no network interface 'nosuch'"
    sender = inside(script, "send", "--connect", "tcp://[fe80::1%nosuch]:5555", "x")
    sender.wait_for_notice(f"waiting for .*: {reason}")
    server = inside(script, "serve", "--bind", "tcp://[fe80::1%nosuch]:5555")
    assert server.finish()[2] == [f"zmqmsg: cannot bind tcp://[fe80::1%nosuch]:5555: {reason}"]


# The default endpoint, in a network where its port is certainly free


def test_by_default_both_commands_use_the_same_endpoint(inside: Inside) -> None:
    script = f"""exec {UNSHARE} -n sh -c 'ip link set lo up
    "$1" -m zmqmsg serve --count 1 & exec "$@"' sh "$@" """
    sender = inside(script, "send", "--verbose", "tcp://127.0.0.1:6666")
    sender.wait_for_notice("listening on tcp://127.0.0.1:5555")
    sender.wait_for_notice("connected to tcp://127.0.0.1:5555")
    mistaken = "'tcp://127.0.0.1:6666' is sent as a message; to connect there, use --connect"
    sender.wait_for_notice(f"zmqmsg: {mistaken}")
    assert sender.wait() == 0
