"""How ``serve`` gets its replies: echo, fixed text, a command per request, or one filter."""

import time
from contextlib import suppress
from typing import NamedTuple, Self

import click

from zmqmsg.clients import environment_for, environment_for_all
from zmqmsg.messages import Form, Frames
from zmqmsg.notices import NOTICE_DELAY, Failure, notify
from zmqmsg.programs import TOO_LONG, Program, describe_status
from zmqmsg.quoting import abridge, quote, unquote
from zmqmsg.sockets import Socket
from zmqmsg.stopping import Guard
from zmqmsg.system import (
    BACKGROUND_EXAMPLE,
    SHORTAGES,
    STOP_SIGNALS,
    keep_exit_statuses,
    killing_signal,
)

# Times, in seconds
LONG_RUN = 5.0  # after which the user is told that a command keeps other requests waiting
START_INTERVAL = 0.2  # between attempts to start a command
FILTER_END_LIMIT = 5.0  # that a filter has to end after the end of its input
FAILED_FILTER_LIMIT = 1.0  # the same for a filter that has failed
END_INTERVAL = 0.5  # between looks at the time while a filter ends
SIGNAL_DELAY = 0.2  # in which a signal to a group of processes reaches all of them

ESCAPE_SIZE = 4  # bytes of an escape, which stands for one byte

RUNS_LONG = (
    f"the command, or something that it has started, still goes on after {LONG_RUN:g} s, and"
    f" other requests have to wait; what may outlive it can be started as in: {BACKGROUND_EXAMPLE}"
)
SILENT = "the filter has not answered for a second; it may not flush its output, or read ahead"
LINES_IN_REQUEST = (
    "a request of several lines got an empty reply, since a filter reads one; use --exec,"
    " or --quoted if the filter reads quoted lines"
)
FRAMES_JOINED = (
    "frames are joined for the command; --quoted keeps them apart, if it reads quoted lines"
)
NOT_ANSWERED = "1 request was received and not answered, nor any behind it"


class Unanswered(Exception):
    """A signal has ended the command that makes the reply, so the reply may be incomplete."""


class Answer:
    """Replies with ``frames``, or else with the request: the echo.

    Answers are contexts: what they need runs until the context ends.
    """

    def __init__(self, frames: Frames | None = None) -> None:
        self._frames = frames

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_error: object) -> None:
        pass

    def reply_to(self, request: Frames, socket: Socket) -> Frames:
        """Return the frames of the reply to ``request``, which came to ``socket``.

        Raises Unanswered, or Failure if there can be no more replies.
        """
        return request if self._frames is None else self._frames

    def check(self) -> None:
        """Raise Failure, or Unanswered after a signal, if there can be no more replies.

        A server without requests calls this at least once a second.
        """


class AnswerOptions(NamedTuple):
    """What the replies are made of; at most one is given."""

    reply: str | None
    command: str | None
    filter_command: str | None

    def check(self) -> None:
        """Raise UsageError if the options exclude each other."""
        options = {
            "--reply": self.reply,
            "--exec": self.command,
            "--filter": self.filter_command,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join(given)} cannot be used together")
        for name, value in given.items():
            if name != "--reply" and not value.strip():
                raise click.UsageError(f"{name} needs a command, for example {name} cat")

    def choose(self, form: Form, max_size: int, guard: Guard) -> Answer:
        """Return what makes the replies, which have ``max_size`` bytes at most."""
        if self.reply is not None:
            return Answer(form.decode_argument(self.reply, "--reply"))
        if self.command is not None:
            return ExecAnswer(self.command, form, max_size, guard)
        if self.filter_command is not None:
            return FilterAnswer(self.filter_command, form, max_size, guard)
        return Answer()


# Answers of commands


class CommandAnswer(Answer):
    """Replies with what a shell command prints, which reads the request on its standard input.

    The request is never a part of the command line or of the environment, so that it cannot inject
    anything. The command runs in a group of its own: what is typed at our terminal, and a signal to
    our process group, do not reach it.
    """

    def __init__(
        self, command: str, form: Form, max_size: int, guard: Guard, *, prints_lines: bool
    ) -> None:
        """Use the shell command ``command``.

        ``max_size``: bytes that a reply may have. ``prints_lines``: whether a reply is a line,
        whose end is not counted.
        """
        import subprocess  # noqa: F401  (now, while there are descriptors)

        self._command = command
        self._form = form
        self._guard = guard
        # Bytes that the command may print for a reply
        self._output_limit = max_size * ESCAPE_SIZE if form.quoted else max_size
        if prints_lines:
            self._output_limit += form.end_size
        keep_exit_statuses()

    def _start(self, environment: dict[str, str], unanswered: str) -> Program:
        """Start the command as soon as that is possible.

        Raises Failure, or Unanswered with the text ``unanswered`` after a signal.
        """
        has_told = False
        while True:
            try:
                running = self._guard.programs
                return Program(self._command, environment, self._output_limit, running)
            except OSError as error:
                reason = f"cannot start the command: {error.strerror}"
                if error.errno not in SHORTAGES:
                    raise Failure(reason) from error
                if not has_told:
                    self._guard.stalls.notify(f"{reason}; trying again until it can be started")
                    has_told = True
                if self._guard.stop.wait(START_INTERVAL):
                    raise Unanswered(unanswered) from None

    def _was_stopped_with_us(self, status: int) -> bool:
        """Return whether a command that ended with ``status`` was killed because we stop.

        Other signals are its own affair, as a crash is: what it printed is its reply.
        """
        if killing_signal(status) not in STOP_SIGNALS:
            return False
        # A service manager signals all processes of a service, the command perhaps before us.
        return self._guard.stop.wait(SIGNAL_DELAY)

    def _encode(self, request: Frames) -> bytes:
        """Return a request as the command reads it, without its end."""
        frames = [bytes(frame) for frame in request]
        if self._form.quoted:
            return quote(frames)
        if len(frames) > 1:
            self._guard.stalls.notify(FRAMES_JOINED)
        return b"".join(frames)

    def _decode(self, line: bytes, printed: bytes) -> Frames:
        """Return the frames of the quoted ``line``; if that is wrong, all that was ``printed``."""
        try:
            if b"\n" in line:
                raise ValueError("more than one line")
            return unquote(line)
        except ValueError as error:
            notify(
                f"the command did not print a quoted line: {error}; sending its output as it is",
                "yellow",
            )
            return [printed]


class ExecAnswer(CommandAnswer):
    """Runs the command for each request; all that it prints is the reply.

    Its exit status does not matter.
    """

    def __init__(self, command: str, form: Form, max_size: int, guard: Guard) -> None:
        super().__init__(command, form, max_size, guard, prints_lines=form.quoted)

    def reply_to(self, request: Frames, socket: Socket) -> Frames:
        data = self._encode(request)
        if self._form.quoted:
            data += b"\n"
        program = self._start(
            environment_for(request, socket),
            "the last request was not answered: its command could not be started",
        )
        with (
            self._guard.naming_loss(f"{NOT_ANSWERED}: its command had not finished"),
            self._guard.stalls.expecting(RUNS_LONG, LONG_RUN),
        ):
            printed, status = run_to_end(program, data)
        if program.fault == TOO_LONG:
            notify(f"the command {TOO_LONG}; its request got an empty reply", "red")
            return [b""]
        if program.fault:
            raise Failure(f"the command {program.fault}")
        if status:
            notify(f"the command {describe_status(status)}", "yellow")
        if self._was_stopped_with_us(status):
            raise Unanswered("the last request was not answered: its command was stopped, too")
        if not self._form.quoted:
            return [printed]
        line = self._form.strip_cr(printed.removesuffix(b"\n"))
        return self._decode(line, printed)


def run_to_end(program: Program, data: bytes) -> tuple[bytes, int]:
    """Let a program read ``data``; return all that it prints, and its exit status."""
    with suppress(BrokenPipeError):  # it does not want the rest
        program.write(data)
    program.close_input()
    printed = b"".join(iter(program.take, b""))
    status = program.wait() or 0
    program.reap()
    return printed, status


class FilterAnswer(CommandAnswer):
    """Starts the command once, writes each request to it as a line, and reads each reply as one.

    An extra line is fatal: replies can no longer be matched to requests.
    """

    def __init__(self, command: str, form: Form, max_size: int, guard: Guard) -> None:
        super().__init__(command, form, max_size, guard, prints_lines=True)

    def __enter__(self) -> Self:
        """Start the command."""
        self._program = self._start(environment_for_all(), "the filter could not be started")
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_error: object) -> None:
        """Close the command's input, so that it can exit, and kill what is left of it.

        Raises Failure if it had to be killed, unless another error is on its way.
        """
        self._program.close_input()
        if error_type:
            self._program.wait(FAILED_FILTER_LIMIT)
            self._program.kill()
            return
        with self._guard.naming_loss("the filter was killed: it had not ended"):
            has_ended = self._wait_for_end()
        self._program.kill()
        if not has_ended:
            raise Failure(
                f"the filter was killed: it had not ended {FILTER_END_LIMIT:g} s after its input"
            )

    def _wait_for_end(self) -> bool:
        """Wait until the filter has ended; return False if its time is over before.

        While we stop, the guard limits the time instead, and ends everything.
        """
        end = time.monotonic() + FILTER_END_LIMIT
        while self._program.wait(END_INTERVAL) is None:
            if time.monotonic() >= end and not self._guard.stop.is_requested:
                return False
        return True

    def reply_to(self, request: Frames, socket: Socket) -> Frames:
        self.check()
        separator = self._form.separator
        line = self._encode(request).removesuffix(separator)
        if separator in line:
            notify(LINES_IN_REQUEST, "yellow")
            return [b""]
        self._program.allow(self._output_limit)
        with (
            self._guard.naming_loss(f"{NOT_ANSWERED}: the filter had not answered"),
            self._guard.stalls.expecting(SILENT, NOTICE_DELAY),
        ):
            answer = self._exchange(line)
        answer = self._form.strip_cr(answer)
        return self._decode(answer, answer) if self._form.quoted else [answer]

    def check(self) -> None:
        if self._program.has_output():
            printed = self._program.take()
            raise self._error_of_output(printed) if printed else self._error_of_end()

    def _exchange(self, line: bytes) -> bytes:
        """Write ``line`` and read one; both are without their ends."""
        separator = self._form.separator
        try:
            self._program.write(line + separator)
        except OSError:
            raise self._error_of_end() from None
        printed: list[bytes] = []
        while chunk := self._program.take():
            rest_of_line, end, beyond = chunk.partition(separator)
            printed.append(rest_of_line)
            if beyond:
                raise self._error_of_output(beyond)
            if end:
                return b"".join(printed)
        raise self._error_of_end()

    def _error_of_output(self, printed: bytes) -> Failure:
        """Return the error of output that no request asked for."""
        return Failure(
            f"the filter printed {abridge(printed)}, which no request asked for;"
            " replies cannot be told apart"
        )

    def _error_of_end(self) -> Failure | Unanswered:
        """Return the error of a filter whose output has ended."""
        if self._program.fault:
            return Failure(f"the filter {self._program.fault}")
        status = self._program.wait(FAILED_FILTER_LIMIT)
        if status is None:
            return Failure("the filter closed its input or output, so there can be no more replies")
        if self._was_stopped_with_us(status):
            return Unanswered("the filter was stopped, too")
        return Failure(f"the filter {describe_status(status)}, so there can be no more replies")
