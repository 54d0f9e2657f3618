"""How ``serve`` gets its replies: an echo, a fixed text, a command for each request, or a filter that stays."""

import errno
import os
import signal
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from zmqmsg.console import Failure, Form, notify
from zmqmsg.quoting import quote, unquote
from zmqmsg.signals import STOP_SIGNALS, StopSignals

if TYPE_CHECKING:
    from subprocess import Popen  # otherwise only for programs: it takes 4 ms

NOTICE_DELAY = 1.0
"""Seconds without an answer before the user is told what it waits for."""

LONG = 5.0
"""Seconds after which the user is told that a command keeps other requests waiting."""

START_INTERVAL = 0.2
"""Seconds between attempts to start a command."""

SIGNAL_DELAY = 0.2
"""Seconds within which a signal to a whole group of processes reaches each of them."""

LACKING = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
"""Why a process cannot be started just now: no descriptors, processes or memory."""

Frames = Sequence[Any]  # of bytes, or of zmq's Frames, which have them in a buffer


class Unanswered(Exception):
    """A signal has ended what makes the reply, so that what there is of it may be a half of it."""


class Answer:
    """Replies with the request itself: the echo. The others reply otherwise.

    An answer is used as a context: what it needs runs from its start to its end. ``descriptors``: those which are
    readable when there is something to ``check()`` between requests.
    """

    descriptors: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        """Start what makes the replies."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what makes the replies."""

    def reply_to(self, request: Frames) -> Frames:
        """Return the frames of the reply; raise Unanswered, or Failure if there can be no more replies."""
        return request

    def check(self) -> None:
        """Raise Failure if there can be no more replies."""


class Text(Answer):
    """Replies with the same frames to all requests."""

    def __init__(self, frames: Frames) -> None:
        """Reply with ``frames``."""
        self._frames = frames

    def reply_to(self, request: Frames) -> Frames:
        """Return the fixed frames."""
        return self._frames


def choose_answer(reply: str | None, command: str | None, form: Form, stop: StopSignals) -> Answer:
    """Return what makes the replies; raise UsageError if the options contradict each other."""
    if reply is not None and command is not None:
        raise click.UsageError("--reply and --exec cannot be used together")
    if command is not None:
        if not command.strip():
            raise click.UsageError("--exec needs a command, for example --exec cat")
        return Command(command, form, stop)
    if reply is not None:
        return Text([os.fsencode(reply)])
    return Answer()


# Programs


class Program(Answer):
    """Answers with what a shell command prints, which reads the request on its standard input.

    The request is never a part of the command line or of the environment, so that it cannot inject anything. The
    command runs in a session of its own: what is typed at our terminal, and a signal to our process group, do not reach
    it, and the second signal ends all of it.
    """

    def __init__(self, command: str, form: Form, stop: StopSignals) -> None:
        """Use the shell command ``command``, for messages in ``form``, until ``stop`` is requested."""
        self._command = command
        self._form = form
        self._stop = stop
        self._told: set[str] = set()
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
                if error.errno not in LACKING:
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
        """Return whether a program ended with ``status`` because of a signal to stop us, too.

        Whoever stops a whole group of processes may reach us after it.
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
            printed = self._communicate(process, data)
        finally:
            self._stop.sessions.discard(process.pid)
        status = process.returncode
        if status:
            notify(f"the command {describe_status(status)}", "yellow")
        if self._was_stopped(status):
            raise Unanswered("the last request was not answered: its command was stopped, too")
        return self._split(printed.removesuffix(b"\n"), printed) if self._form.quoted else [printed]

    def _communicate(self, process: "Popen[bytes]", data: bytes | None) -> bytes:
        from subprocess import TimeoutExpired

        started = time.monotonic()
        while True:
            try:
                return process.communicate(data, timeout=NOTICE_DELAY)[0]
            except TimeoutExpired:
                data = None  # subprocess goes on with it
            self._tell_of_stop()
            if process.poll() is not None:
                self._tell_once(
                    "the command has ended, but something that it left running keeps its output open, and so the reply"
                    " back; redirect the output of what goes on, as in: >/dev/null &"
                )
            elif time.monotonic() - started >= LONG:
                self._tell_once(f"the command still runs after {LONG:g} s; meanwhile, other requests wait")


def describe_status(status: int) -> str:
    """Return in words how a child process has ended; ``status`` is negative for a signal."""
    return f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
