"""What differs between Linux, macOS and Windows. The rest of the program never asks where it runs.

The meaning of each name is documented once; how a system provides it stands below that.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subprocess import Popen  # otherwise for commands only: it takes 4 ms
    from threading import Thread

WINDOWS = sys.platform == "win32"
SHORTAGES = (
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
    errno.ENOMEM,
)  # of descriptors, threads, memory: over soon
READER_GONE = (
    (errno.EPIPE, errno.EINVAL) if WINDOWS else (errno.EPIPE,)
)  # errors of writing to a pipe nobody reads
LINES_END_WITH_CR_LF = WINDOWS
END_OF_INPUT = (
    "Ctrl-Z and Enter" if WINDOWS else "Ctrl-D"
)  # what ends the input that is typed at a terminal
COLOURS = not WINDOWS  # the old console of Windows shows the usual sequences as text
HAS_ABSTRACT_NAMES = (
    sys.platform == "linux"
)  # Unix sockets with an @ before their name, and no file
HAS_CONNECTION_TIMEOUT = (
    not WINDOWS
)  # TCP_MAXRT: Windows gives up after 21 s by itself, and Wine hangs with it
ENDED_BY_CTRL_C = (
    0xC000013A  # exit status of a process that Ctrl-C or Ctrl-Break has ended on Windows
)
MOST_DESCRIPTORS = (
    65536,
    10240,
)  # limits to try; some versions of macOS accept the second one alone
UNIX_FAMILY = 1  # AF_UNIX on all systems; nobody asks for it where Python has none
WRITEV_LIMIT = 1 << 30  # bytes that one writev may have; macOS refuses 2 GiB

# STOP_SIGNALS ask a server to stop; END_SIGNALS end it at once. yield_processor() lets another thread or process run.
if sys.platform == "win32":
    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
    END_SIGNALS: tuple[signal.Signals, ...] = ()
    yield_processor: Callable[[], None] = partial(time.sleep, 0)
else:
    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    END_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGQUIT,)
    yield_processor: Callable[[], None] = os.sched_yield


def raise_descriptor_limit() -> None:
    """Let the process open as many files and sockets as it may, 65,536 at most."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in MOST_DESCRIPTORS:
            wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            if soft == resource.RLIM_INFINITY or soft >= wanted:
                return
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return


def others_may_read(status: os.stat_result) -> bool:
    """Return whether others than its owner may read the file with ``status``. Windows has no such modes."""
    # A container's orchestrator mounts secrets of root's for our group; PostgreSQL accepts that as well.
    if sys.platform == "win32":
        return False
    return bool(status.st_mode & (0o037 if status.st_uid == 0 != os.geteuid() else 0o077))


def write_parts(stream: Any, parts: Sequence[Any]) -> int | None:
    """Write ``parts``, by one call where there is one, and return how many bytes; None if that would block."""
    if len(parts) > 1 and sys.platform != "win32" and len(parts[0]) < WRITEV_LIMIT:
        with suppress(BlockingIOError):
            return os.writev(stream.fileno(), parts)
        return None
    written: int | None = stream.write(parts[0])
    return written


# Threads and processes


def start_thread(run: Callable[[], object]) -> "Thread":
    """Start a daemon thread; raise OSError, as for anything else that is short, where Python raises RuntimeError."""
    from threading import Thread

    thread = Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no more threads can be started") from None
    return thread


def leave_signals_to_other_threads() -> None:
    """Let signals not interrupt what the calling thread does from now on."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def start_command(command: str) -> "Popen[bytes]":
    """Start ``command`` with the system's shell, in a group of its own, with unbuffered pipes; raise OSError."""
    import subprocess
    from subprocess import PIPE

    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    return subprocess.Popen(
        command,
        shell=True,
        bufsize=0,
        stdin=PIPE,
        stdout=PIPE,
        start_new_session=not WINDOWS,
        creationflags=flags,
    )


def end_group(process: "Popen[bytes]") -> None:
    """Kill what ``start_command`` has started, with all that it has started."""
    if sys.platform == "win32":
        from subprocess import DEVNULL, run

        with suppress(OSError):
            run(
                ["taskkill", "/F", "/T", "/PID", str(process.pid)],
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=DEVNULL,
            )
        with suppress(OSError):
            process.kill()  # Wine 8 has no /T
        return
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(OSError):  # on Linux, groups of their own as well: GNU timeout makes one
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if os.getsid(int(name)) == process.pid:
                    os.kill(int(name), signal.SIGKILL)


def keep_exit_statuses() -> None:
    """Let the exit statuses of child processes be known, where our parent ignores those of its own."""
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def killing_signal(status: int) -> int:
    """Return the number of the signal that has ended a process with this exit ``status``; 0 if none has."""
    if WINDOWS:
        return signal.SIGINT if status == ENDED_BY_CTRL_C else 0
    return max(-status, 0)


def reap_orphans(children: Collection[int]) -> None:
    """Reap what commands have left running, not ``children``, which are waited for: for process 1, nobody else does."""
    if sys.platform == "linux":
        with suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in children:
                    return
                os.waitpid(ended.si_pid, 0)
