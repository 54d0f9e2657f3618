"""What needs a world of its own: process 1 of a container, name servers that hang, networks that go nowhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import LINUX, Process, Send, Serve, Start, soak, until

pytestmark = [
    LINUX,
    pytest.mark.skipif(
        sys.platform != "linux"
        or subprocess.run(
            ["unshare", "-fpnm", "--mount-proc", "true"], capture_output=True
        ).returncode
        != 0,
        reason="needs the right to make namespaces",
    ),
]


@pytest.fixture
def inside(start: Start, tmp_path: Path) -> Callable[..., Process]:
    """Start zmqmsg in namespaces of its own, by a shell script in which "$@" stands for it."""

    def inside(script: str, *arguments: str) -> Process:
        path = tmp_path / "script"
        path.write_text(
            f'#!/bin/sh\nset -e\ncd {tmp_path}\nset -- {sys.executable} "$@"\n{script}\n'
        )
        path.chmod(0o755)
        return start(*arguments, executable=path)

    return inside


AS_PROCESS_1 = 'exec unshare -fp --kill-child --mount-proc "$@"'


def process_1(process: Process) -> int:
    """Return the id, outside, of the process that is number 1 inside."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: children.read_text().split())
    return int(children.read_text().split()[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_process_1_is_ended_by_a_signal_as_any_other(
    inside: Callable[..., Process], number: int
) -> None:
    """Without a handler, the kernel drops the signal."""
    sender = inside(AS_PROCESS_1, "send", "--connect", "tcp://127.0.0.1:1", "x")
    sender.wait_for_notice("waiting for")
    os.kill(process_1(sender), number)
    assert sender.wait() == 128 + number


def test_process_1_serves_until_the_first_signal_and_ends_at_the_second(
    inside: Callable[..., Process], start: Start, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    server = inside(
        AS_PROCESS_1, "serve", "--bind", endpoint, "--exec", "echo begun >&2; sleep 600"
    )
    server.wait_for_notice("listening")
    start("send", "--connect", endpoint, "x")
    server.wait_for_notice("begun")
    os.kill(process_1(server), signal.SIGTERM)
    server.wait_for_notice("stopping after the current request")
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
def test_process_1_reaps_what_its_commands_have_left_running_and_stops_in_order(
    inside: Callable[..., Process], send: Send, tmp_path: Path, command: list[str]
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    server = inside(AS_PROCESS_1, "serve", "--bind", endpoint, *command)
    server.wait_for_notice("listening")
    assert send("--connect", endpoint, *"abc").stdout == b"a\nb\nc\n"
    time.sleep(0.5)
    assert send("--connect", endpoint, "d").stdout == b"d\n"
    children = Path(f"/proc/{process_1(server)}/task/{process_1(server)}/children")
    until(lambda: len(children.read_text().split()) <= 1)
    os.kill(process_1(server), signal.SIGTERM)
    assert server.wait() == 0
    assert not (tmp_path / "socket").exists()


# A name server that takes questions and never answers
HUNG_NAME_SERVER = """
exec unshare -nm sh -c '
ip link set lo up
"$1" -c "
import os, socket, time
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind((\\"127.0.0.1\\", 53))
open(\\"up\\", \\"w\\").close()
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(0.1)
" < /dev/null > /dev/null 2>&1 &
while [ ! -e up ]; do sleep 0.05; done
echo nameserver 127.0.0.1 > resolv.conf
mount --bind resolv.conf /etc/resolv.conf
exec "$@"' sh "$@"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bind_that_waits_for_a_name_server_is_ended_by_a_signal(
    inside: Callable[..., Process], number: int
) -> None:
    server = inside(HUNG_NAME_SERVER, "serve", "--bind", "tcp://some.name.example:5555")
    until(lambda: b"zmqmsg" in Path(f"/proc/{server.pid}/cmdline").read_bytes())
    time.sleep(1)  # until it has asked; nothing tells of that
    server.signal(number)
    assert server.wait(5) == -number


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=soak)])
def test_a_name_server_that_hangs_holds_up_no_other_endpoint(
    inside: Callable[..., Process], serve: Serve, tmp_path: Path, count: int
) -> None:
    _, endpoint = serve("--bind", f"ipc://{tmp_path}/socket")
    names = [
        option
        for number in range(count)
        for option in ("--connect", f"tcp://n{number}.example:5555")
    ]
    sender = inside(
        HUNG_NAME_SERVER, "send", *names, "--connect", endpoint, "--timeout", "5", "one", "two"
    )
    assert sender.finish()[:2] == (0, b"one\ntwo\n")
    alone = inside(HUNG_NAME_SERVER, "send", *names, "x")
    alone.wait_for_notice("waiting for tcp://n0.example:5555: resolving the name takes long")
    alone.signal(signal.SIGINT)
    assert alone.wait(5) == -signal.SIGINT


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("true", "network is unreachable"),
        ("ip link set lo up; ip route add unreachable 192.0.2.0/24", "no route to host"),
        ("ip link set lo up; ip route add prohibit 192.0.2.0/24", "permission denied"),
        ("ip link set lo up; ip route add blackhole 192.0.2.0/24", "invalid argument"),
    ],
)
def test_a_network_that_goes_nowhere_is_told_in_the_words_of_the_system(
    inside: Callable[..., Process], network: str, reason: str
) -> None:
    script = f"""exec unshare -n sh -c '{network}; exec "$@"' sh "$@" """
    sender = inside(script, "send", "--connect", "tcp://192.0.2.1:5555", "x")
    assert (
        sender.wait_for_notice("zmqmsg: (.*)")[1] == f"waiting for tcp://192.0.2.1:5555: {reason}"
    )


@pytest.mark.parametrize("bound", ["[fd00::1]", "six.example", "127.0.0.3"])
def test_each_address_of_a_name_is_tried_and_ipv6_needs_no_brackets(
    inside: Callable[..., Process], bound: str
) -> None:
    name = "three.example" if bound == "127.0.0.3" else "six.example"
    script = f"""exec unshare -nm sh -c 'ip link set lo up; ip addr add fd00::1/64 dev lo nodad
    printf "%s\\n" "fd00::1 six.example" "127.0.0.1 three.example" "127.0.0.3 three.example" > hosts
    mount --bind hosts /etc/hosts
    "$1" -m zmqmsg serve --bind tcp://{bound}:5555 --count 1 & exec "$@"' sh "$@" """
    sender = inside(script, "send", "--connect", f"tcp://{name}:5555", "x")
    assert b"x\n" in sender.finish()[1]
    assert sender.popen.returncode == 0
