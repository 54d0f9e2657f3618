"""How ``serve`` gets its replies: an echo, a fixed text, a command for each request, or a filter that stays."""

import os
import resource
import select
import signal
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import IO, TYPE_CHECKING, Any, NoReturn, Self, cast

import click

from zmqmsg.console import CHUNK, NOTICE_DELAY, SHORTAGES, Failure, Form, notify
from zmqmsg.quoting import abridge, quote, unquote
from zmqmsg.signals import STOP_SIGNALS, StopSignals, kill_session, reap_orphans

if TYPE_CHECKING:
    from subprocess import Popen  # otherwise only for programs: it takes 4 ms

LONG = 5.0
"""Seconds after which the user is told that a command keeps other requests waiting."""

START_INTERVAL = 0.2
"""Seconds between attempts to start a command."""

END_LIMIT = 1.0
"""Seconds that a filter has to end when its input has ended."""

SIGNAL_DELAY = 0.2
"""Seconds within which a signal to a whole group of processes reaches each of them."""

Frames = Sequence[Any]  # of bytes, or of zmq's Frames, which have them in a buffer


class Unanswered(Exception):
    """A signal has ended the program that makes the reply, so the reply may be incomplete."""


class Answer:
    """Replies with the request itself: the echo. The others reply otherwise.

    An answer is a context: what it needs runs from its start to its end. ``descriptors``: they are readable when there
    is something to ``check()`` between requests.
    """

    descriptors: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def reply_to(self, request: Frames) -> Frames:
        """Return the frames of the reply; raise Unanswered, or Failure if there can be no more replies."""
        return request

    def check(self) -> None:
        """Raise Failure if there can be no more replies."""


class Text(Answer):
    """Replies with the same ``frames`` to all requests."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    def reply_to(self, request: Frames) -> Frames:
        return self._frames


def choose_answer(
    reply: str | None, command: str | None, filter_command: str | None, form: Form, stop: StopSignals
) -> Answer:
    """Return what makes the replies; raise UsageError if the options contradict each other."""
    options = {"--reply": reply, "--exec": command, "--filter": filter_command}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} cannot be used together")
    for name in given:
        if name != "--reply" and not (options[name] or "").strip():
            raise click.UsageError(f"{name} needs a command, for example {name} cat")
    if command is not None:
        return Command(command, form, stop)
    if filter_command is not None:
        return Filter(filter_command, form, stop)
    return Answer() if reply is None else Text(form.decode_argument(reply))


# Programs


class Program(Answer):
    """Answers with what a shell command prints, which reads the request on its standard input.

    The request is never a part of the command line or of the environment, so that it cannot inject anything. The
    command runs in a session of its own: what is typed at our terminal, and a signal to our process group, do not reach
    it, and the second signal ends all of it.
    """

    def __init__(self, command: str, form: Form, stop: StopSignals) -> None:
        """Use the shell command ``command``, for messages in ``form``, until ``stop`` is requested."""
        # serve raises its own limit of descriptors, and a program may rely on the usual one.
        usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._command = f"ulimit -S -n {'unlimited' if usual == resource.RLIM_INFINITY else usual}; {command}"
        self._form = form
        self._stop = stop
        self._told: set[str] = set()
        import subprocess  # noqa: F401  (now, while there are descriptors)

        # Where the parent ignores it, so do we, and the exit statuses of all children would be lost.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _start(self) -> "Popen[bytes]":
        """Start the command, trying again while something for it is lacking; raise Failure or Unanswered if not."""
        from subprocess import PIPE, Popen

        while True:
            try:
                with self._stop.held():
                    process = Popen(["/bin/sh", "-c", self._command], stdin=PIPE, stdout=PIPE, start_new_session=True)
                    self._stop.sessions.add(process.pid)
            except OSError as error:
                reason = f"cannot start the command: {error.strerror}"
                if error.errno not in SHORTAGES:
                    raise Failure(reason) from error
                self._tell_once(f"{reason}; trying again until it can be started")
                if self._stop.wait(START_INTERVAL):
                    raise Unanswered("the last request was not answered: its command could not be started") from None
            else:
                return process

    def _tell_once(self, notice: str) -> None:
        if notice not in self._told:
            self._told.add(notice)
            notify(notice, "yellow")

    def _tell_of_stop(self) -> None:
        if self._stop.requested:
            self._tell_once("stopping after the current request; a second signal ends it at once")

    def _was_stopped(self, status: int) -> bool:
        """Return whether a program that ended with ``status`` was killed by a signal that also stops us.

        A signal to a group of processes may reach us after the others.
        """
        return status < 0 and (self._stop.requested or (-status in STOP_SIGNALS and self._stop.wait(SIGNAL_DELAY)))

    def _join(self, request: Frames) -> bytes:
        """Return a request as the program reads it, without an end."""
        frames = [bytes(frame) for frame in request]
        if self._form.quoted:
            return quote(frames)
        if len(frames) > 1:
            self._tell_once("frames are joined for the command; use --quoted to keep them apart")
        return b"".join(frames)

    def _split(self, line: bytes, printed: bytes) -> Frames:
        """Return the frames of the quoted ``line``, or all that was ``printed`` if it is none."""
        try:
            if b"\n" in line:
                raise ValueError("more than one line")
            return unquote(line)
        except ValueError as error:
            notify(f"the command did not print a quoted line: {error}; sending its output as it is", "yellow")
            return [printed]


class Command(Program):
    """Runs the command for each request; all that it prints is the reply."""

    def reply_to(self, request: Frames) -> Frames:
        """Run the command and return what it printed, whatever its exit status."""
        data = self._join(request) + b"\n" * self._form.quoted
        process = self._start()
        try:
            printed = self._run(process, data)
        finally:
            self._stop.sessions.discard(process.pid)
        reap_orphans()
        status = process.returncode
        if status:
            notify(f"the command {describe_status(status)}", "yellow")
        if self._was_stopped(status):
            raise Unanswered("the last request was not answered: its command was stopped, too")
        return self._split(printed.removesuffix(b"\n"), printed) if self._form.quoted else [printed]

    def _run(self, process: "Popen[bytes]", data: bytes) -> bytes:
        """Return all that ``process``, which gets ``data``, has printed when it ends."""
        from subprocess import TimeoutExpired

        started = time.monotonic()
        printed: list[bytes | None] = [None]
        with closing(Pipes(process, data)) as pipes:
            while printed[-1] != b"":
                if not pipes.unwritten:
                    pipes.close_input()
                try:
                    printed.append(pipes.read(NOTICE_DELAY))
                except BrokenPipeError:  # it does not want the rest
                    pipes.unwritten = memoryview(b"")
                if printed[-1] is None and time.monotonic() - started >= NOTICE_DELAY and has_ended(process):
                    self._tell_once(
                        "the command has ended, but something that it left running keeps its output open, and so the"
                        " reply back; redirect the output of what goes on, as in: >/dev/null &"
                    )
                self._tell_of_wait(started)
        while process.returncode is None:
            with suppress(TimeoutExpired):
                process.wait(NOTICE_DELAY)
            self._tell_of_wait(started)
        return b"".join(filter(None, printed))

    def _tell_of_wait(self, started: float) -> None:
        if time.monotonic() - started >= NOTICE_DELAY:
            self._tell_of_stop()
        if time.monotonic() - started >= LONG:
            self._tell_once(f"the command still runs after {LONG:g} s; meanwhile, other requests wait")


class Filter(Program):
    """Starts the command once, writes each request to it as a line, and reads each reply as one.

    As soon as there is a line too many, or one that nobody asked for, it is not known any more which reply belongs to
    which request; that is the end.
    """

    def __enter__(self) -> Self:
        """Start the command."""
        self._process = self._start()
        self._pipes = Pipes(self._process)
        self.descriptors = (self._pipes.output,)
        return self

    def __exit__(self, *_error: object) -> None:
        """Let the command end by the end of its input, and then kill what is left of its session."""
        self._pipes.close_input()
        self._await_end()
        kill_session(self._process.pid)
        self._process.wait()
        self._pipes.close()
        self._stop.sessions.discard(self._process.pid)

    def _await_end(self) -> bool:
        """Return whether the command has ended, or does within END_LIMIT seconds."""
        end = time.monotonic() + END_LIMIT
        while not has_ended(self._process) and time.monotonic() < end:
            time.sleep(0.01)
        return has_ended(self._process)

    def reply_to(self, request: Frames) -> Frames:
        """Return the line that the filter answers with."""
        self.check()
        line = self._join(request)
        end = self._form.separator
        if end in line:
            self._tell_once("a request with the end of a line in it got an empty reply; use --quoted to pass it on")
            return [b""]
        answer = self._exchange(line + end, end)
        return self._split(answer, answer) if self._form.quoted else [answer]

    def check(self) -> None:
        """Raise Failure, or Unanswered after a signal, if the filter has ended or printed what nobody asked for."""
        if (data := self._pipes.read(0)) is not None:
            self._fail_for_line(data)

    def _exchange(self, line: bytes, end: bytes) -> bytes:
        """Write ``line`` and read one, at the same time; return it without its ``end``."""
        pipes = self._pipes
        pipes.unwritten = memoryview(line)
        heard = bytearray()
        since = time.monotonic()
        while True:
            try:
                data = pipes.read(NOTICE_DELAY)
            except BrokenPipeError:
                self._fail_for_end()
            if data == b"":
                self._fail_for_end()
            if data:
                begin = len(heard)
                heard += data
                if (place := heard.find(end, begin)) >= 0:
                    if pipes.unwritten:  # it has not read the whole request
                        self._fail_for_line(bytes(heard))
                    if len(heard) > place + 1:
                        self._fail_for_line(bytes(heard[place + 1 :]))
                    return bytes(heard[:place])
            if time.monotonic() - since >= NOTICE_DELAY:
                self._tell_once("the filter has not answered for a second; it may not flush its output, or read ahead")
                self._tell_of_stop()

    def _fail_for_line(self, data: bytes) -> NoReturn:
        if not data:
            self._fail_for_end()
        raise Failure(f"the filter printed {abridge(data)}, which no request asked for; replies cannot be told apart")

    def _fail_for_end(self) -> NoReturn:
        if not self._await_end():
            raise Failure("the filter closed its input or output, so there can be no more replies")
        status = self._process.wait()
        if self._was_stopped(status):
            raise Unanswered("the filter was stopped, too")
        raise Failure(f"the filter {describe_status(status)}, so there can be no more replies")


class Pipes:
    """The standard input and output of a process, written and read at the same time, so that neither side can block.

    ``output``: its descriptor. ``unwritten``: what the input has not taken yet.
    """

    def __init__(self, process: "Popen[bytes]", data: bytes = b"") -> None:
        """Prepare to write ``data``. (subprocess's ``communicate`` forgets the rest of it after a timeout.)"""
        self.unwritten = memoryview(data)
        self._stdin, self._stdout = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
        self.output = self._stdout.fileno()
        os.set_blocking(self._stdin.fileno(), False)

    def close_input(self) -> None:
        """Let the process see the end of its input."""
        self._stdin.close()

    def close(self) -> None:
        """Close both pipes."""
        self._stdin.close()
        self._stdout.close()

    def read(self, seconds: float) -> bytes | None:
        """Write what the input takes and return what was printed, b"" at its end, or None, within ``seconds``.

        Raises BrokenPipeError if the process has closed its input.
        """
        poll = select.poll()
        poll.register(self.output, select.POLLIN)
        if self.unwritten:
            poll.register(self._stdin.fileno(), select.POLLOUT)
        ready = [descriptor for descriptor, _event in poll.poll(seconds * 1000)]
        if ready and ready != [self.output]:
            self.unwritten = self.unwritten[os.write(self._stdin.fileno(), self.unwritten) :]
        return os.read(self.output, CHUNK) if self.output in ready else None


def has_ended(process: "Popen[bytes]") -> bool:
    """Return whether ``process`` has ended, without reaping it: nobody else can have its id yet."""
    return process.returncode is not None or bool(
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    )


def describe_status(status: int) -> str:
    """Return in words how a child process has ended; ``status`` is negative for a signal."""
    return f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
