"""What differs between Linux, macOS and Windows. The rest of the program never asks where it runs.

Each name is documented once, by its meaning, whatever the system.
"""

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from subprocess import Popen  # imported below only for commands: it takes 4 ms
    from threading import Thread

# For values. Where a function has other code on Windows, it tests sys.platform itself: only that
# tells mypy what exists.
WINDOWS = sys.platform == "win32"

# Terminals, pipes and files

# Errors of writing to a pipe or socket without a reader.
READER_GONE = (errno.EPIPE, errno.EINVAL) if WINDOWS else (errno.EPIPE,)
# Whether poll() says of a pipe or socket, before it is written to, that its reader has gone.
CAN_POLL_OUTPUT = not WINDOWS
LINES_END_WITH_CR_LF = WINDOWS
# What ends the input that is typed at a terminal.
END_OF_INPUT = "Ctrl-Z and Enter" if WINDOWS else "Ctrl-D"
# Whether the terminal shows colours; the old console of Windows shows the sequences as text.
HAS_COLOURS = not WINDOWS
# Bytes that a terminal passes on of a line; it drops the rest. 0: no limit is known.
TERMINAL_LINE_LIMIT = {"linux": 4095, "darwin": 1023}.get(sys.platform, 0)
# Bytes that one writev() may have; macOS refuses 2 GiB.
WRITEV_LIMIT = 1 << 30

# Sockets

UNIX_FAMILY = 1  # AF_UNIX on all systems; Python on Windows has no name for it
# Whether there are Unix sockets with an @ before their name, and no file.
HAS_ABSTRACT_NAMES = sys.platform == "linux"
# Whether TCP_MAXRT can be set: Windows gives up after 21 s by itself, and Wine hangs with it.
HAS_CONNECTION_TIMEOUT = not WINDOWS

# Limits

# Errors when file descriptors, threads or memory run short, which may be over soon.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
# Limits of file descriptors to ask for; some versions of macOS accept only the second.
DESCRIPTOR_LIMITS = (65536, 10240)
# Seconds to wait for libzmq's threads at the end of the process. They end at once, unless a thread
# of ours that has a socket hangs, for example in reading the client keys.
CONTEXT_END_LIMIT = 1.0

# Bits of a file's mode
OTHERS_MAY_ANYTHING = 0o007
GROUP_MAY_ANYTHING = 0o070
GROUP_MAY_WRITE_OR_EXECUTE = 0o030

# The exit status of a process that Ctrl-C or Ctrl-Break has ended on Windows.
ENDED_BY_CTRL_C = 0xC000013A

# STOP_SIGNALS ask a server to stop, END_SIGNALS end it at once. yield_processor() lets another
# thread or process run. BACKGROUND_EXAMPLE shows how a command leaves a program running.
if sys.platform == "win32":
    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
    END_SIGNALS: tuple[signal.Signals, ...] = ()
    yield_processor: Callable[[], None] = partial(time.sleep, 0)
    BACKGROUND_EXAMPLE = "start /b program >nul"
else:
    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    END_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGQUIT,)
    yield_processor: Callable[[], None] = os.sched_yield
    BACKGROUND_EXAMPLE = "program >/dev/null &"


def raise_descriptor_limit() -> None:
    """Let the process open as many files and sockets as it may, 65,536 at most."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in DESCRIPTOR_LIMITS:
            wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            if soft == resource.RLIM_INFINITY or soft >= wanted:
                return
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return


def exact_arguments() -> list[str]:
    """Return the arguments of the program so that os.fsencode() gives the bytes that were typed.

    Raises ValueError for one that this locale cannot express.
    """
    arguments = sys.argv[1:]
    if sys.platform == "win32" or sys.getfilesystemencoding() == "utf-8":
        return arguments
    # Python decodes arguments with the C library's codec and encodes them with its own, and the
    # two differ for encodings such as EUC-JP. Linux still has the bytes.
    with suppress(OSError), open("/proc/self/cmdline", "rb") as file:
        typed = file.read().split(b"\0")[:-1]
        arguments = [os.fsdecode(each) for each in typed[len(typed) - len(arguments) :]]
    for argument in arguments:
        try:
            os.fsencode(argument)
        except UnicodeEncodeError:
            raise ValueError(
                f"the encoding {sys.getfilesystemencoding()} of this locale cannot express"
                f" '{argument}'; use a UTF-8 locale, or set PYTHONUTF8=1"
            ) from None
    return arguments


# Files


def others_may_read(status: os.stat_result) -> bool:
    """Return whether others than its owner may use the secret file with ``status``.

    Windows has no such modes. A group may read a file of root's: that is how containers get their
    secrets, and PostgreSQL accepts it as well.
    """
    if sys.platform == "win32":
        return False
    owned_by_root = status.st_uid == 0
    group_may_not = GROUP_MAY_WRITE_OR_EXECUTE if owned_by_root else GROUP_MAY_ANYTHING
    return bool(status.st_mode & (OTHERS_MAY_ANYTHING | group_may_not))


def is_read_only(path: str) -> bool:
    """Return whether the file system of ``path`` is mounted read-only."""
    if sys.platform == "win32":
        return False
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def is_owned_by_another(path: str) -> bool:
    """Return whether the file at ``path`` belongs to another user; raise OSError if it is gone."""
    return sys.platform != "win32" and os.lstat(path).st_uid != os.geteuid()


def write_parts(stream: Any, parts: Sequence[Any]) -> int | None:
    """Write ``parts`` to an unbuffered ``stream``, in one call where the system has one.

    Return how many bytes were written, None if the stream would block.
    """
    if len(parts) > 1 and sys.platform != "win32" and len(parts[0]) < WRITEV_LIMIT:
        with suppress(BlockingIOError):
            return os.writev(stream.fileno(), parts)
        return None
    written: int | None = stream.write(parts[0])
    return written


def watch_for_errors(descriptors: Sequence[int]) -> Callable[[], bool]:
    """Return a function that returns whether poll() reports an error of one of ``descriptors``."""
    if sys.platform == "win32" or not descriptors:
        return lambda: False
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, 0)  # no event but errors
    return lambda: bool(poll.poll(0))


# Threads and processes


def start_thread(function: Callable[[], object]) -> "Thread":
    """Start a daemon thread; raise OSError, as for other shortages, if there are too many.

    Python itself raises RuntimeError.
    """
    from threading import Thread

    thread = Thread(target=function, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no more threads can be started") from None
    return thread


def end_process(status: int) -> NoReturn:
    """End the process, in the main thread, after all that matters is closed and flushed."""
    if sys.platform == "win32":
        # Under Wine, 1 of 100 processes never ends if libzmq's threads still do something then.
        if zmq := sys.modules.get("zmq"):
            with suppress(OSError):
                start_thread(zmq.Context.instance().term).join(CONTEXT_END_LIMIT)
        sys.exit(status)
    # Before sys.exit() ends the process, Python gives signals their default action again, and one
    # that comes then would change the status.
    os._exit(status)


def leave_signals_to_other_threads() -> None:
    """Let signals not interrupt what the calling thread does from now on."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def start_command(command: str, environment: dict[str, str]) -> "Popen[bytes]":
    """Start ``command`` with the system's shell, in a group of its own, with unbuffered pipes.

    ``environment``: its environment variables. Raises OSError.
    """
    import subprocess
    from subprocess import PIPE

    if WINDOWS:
        # Python would read and write its pipes in an old encoding there.
        environment = {"PYTHONUTF8": "1"} | environment
    return subprocess.Popen(
        command,
        shell=True,
        bufsize=0,
        stdin=PIPE,
        stdout=PIPE,
        env=environment,
        start_new_session=not WINDOWS,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def end_group(process: "Popen[bytes]") -> None:
    """Kill what ``start_command`` has started, with all that it has started."""
    if sys.platform == "win32":
        from subprocess import DEVNULL, run

        taskkill = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        with suppress(OSError):
            run(taskkill, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
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
    """Let the exit statuses of child processes be known, even if our parent ignores SIGCHLD."""
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def killing_signal(status: int) -> int:
    """Return the number of the signal that ended a process with this ``status``; 0 if none did."""
    if WINDOWS:
        return signal.SIGINT if status == ENDED_BY_CTRL_C else 0
    return max(-status, 0)


def reap_orphans(children: Collection[int]) -> None:
    """Reap ended processes that commands have left to process 1, which we are.

    ``children``: the ids of our own processes, which are waited for elsewhere.
    """
    if sys.platform == "linux":
        with suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in children:
                    return  # it would be found again; orphans behind it are reaped after it
                os.waitpid(ended.si_pid, 0)
