"""How ``serve`` gets its replies: echo, fixed text, a command per request, or one filter."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, NamedTuple, NoReturn, Self, cast

import click
import zmq

from zmqmsg.messages import CHUNK, Form, Frames, write_all
from zmqmsg.notices import NOTICE_DELAY, Failure, notify
from zmqmsg.quoting import abridge, quote, unquote
from zmqmsg.stopping import Guard
from zmqmsg.system import (
    BACKGROUND_EXAMPLE,
    SHORTAGES,
    STOP_SIGNALS,
    end_group,
    keep_exit_statuses,
    killing_signal,
    start_thread,
)

LONG_RUN = 5.0  # seconds after which the user is told that a command keeps other requests waiting
START_INTERVAL = 0.2  # seconds between attempts to start a command
FILTER_END_LIMIT = 5.0  # seconds that a filter has to end after the end of its input
FAILED_FILTER_LIMIT = 1.0  # the same for a filter that has failed
END_INTERVAL = 0.5  # seconds between looks at the time while a filter ends
SIGNAL_DELAY = 0.2  # seconds in which a signal to a group of processes reaches all of them
ESCAPE_SIZE = 4  # bytes of an escape, which stands for one byte

RUNS_LONG = (
    f"the command, or something that it has started, still goes on after {LONG_RUN:g} s, while"
    f" other requests wait; start what may run longer as in: {BACKGROUND_EXAMPLE}"
)
SILENT = "the filter has not answered for a second; it may not flush its output, or read ahead"
TOO_LONG = "printed more than --max-size allows, and was stopped"
LINES_IN_REQUEST = (
    "a request of several lines got an empty reply, since a filter reads one; use --exec,"
    " or --quoted if the filter reads quoted lines"
)
FRAMES_JOINED = (
    "frames are joined for the command; --quoted keeps them apart, if it reads quoted lines"
)
NOT_ANSWERED = "1 request was received and not answered"


class Unanswered(Exception):
    """A signal has ended the program that makes the reply, so the reply may be incomplete."""


class Request(NamedTuple):
    """A request, and who sent it."""

    frames: Sequence[zmq.Frame]
    is_authenticated: bool  # whether the client's key was checked

    def client_address(self) -> str:
        """Return the client's address; empty if libzmq keeps none, as for ZMTP 1 and 2."""
        try:
            address = str(self.frames[0].get("Peer-Address"))
        except zmq.ZMQError:
            return ""
        if address.startswith("localhost:"):  # ipc: user, group and process
            return f"process {address.rpartition(':')[2]}"
        return address

    def key_name(self) -> str:
        """Return the name of the client's key file; empty if keys are not checked."""
        # Then the client could choose its user id itself.
        if not self.is_authenticated:
            return ""
        try:
            return str(self.frames[0].get("User-Id"))
        except zmq.ZMQError:
            return ""


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

    def reply_to(self, request: Request) -> Frames:
        """Return the frames of the reply.

        Raises Unanswered, or Failure if there can be no more replies.
        """
        return request.frames if self._frames is None else self._frames

    def check(self) -> None:
        """Raise Failure, or Unanswered after a signal, if there can be no more replies."""


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
            return Answer(form.decode_argument(self.reply))
        if self.command is not None:
            return Command(self.command, form, max_size, guard, reads_lines=form.quoted)
        if self.filter_command is not None:
            return Filter(self.filter_command, form, max_size, guard, reads_lines=True)
        return Answer()


# Programs


class Process:
    """A shell command that runs. A thread reads its output, so that neither side blocks the other.

    The main thread says how much may be printed. The reading thread sets ``fault`` before it hands
    over the end of the output, so the main thread finds it there.
    """

    def __init__(
        self, command: str, environment: dict[str, str], output_limit: int, guard: Guard
    ) -> None:
        """Start ``command``; raise OSError if something for that is lacking.

        ``output_limit``: bytes that it may print before ``allow`` is called.
        """
        self.fault = ""  # why the output is not complete
        self._printed: SimpleQueue[bytes] = SimpleQueue()  # with b"" at the end
        self._read = 0  # bytes that were read from the command
        self._taken = 0  # those of them that the main thread has taken
        self._allowed = output_limit  # bytes that the command may print in all
        self._guard = guard
        self._popen = guard.commands.start(command, environment)
        self.input = cast("IO[bytes]", self._popen.stdin)
        try:
            self._reader = start_thread(self._read_output)
        except OSError:
            cast("IO[bytes]", self._popen.stdout).close()
            self.kill()
            raise

    def allow(self, size: int) -> None:
        """Let the command print ``size`` bytes beyond what was taken; more will end it."""
        self._allowed = self._taken + size

    def write(self, data: bytes) -> None:
        """Write to the command's input; raise OSError, BrokenPipeError if it is closed."""
        write_all(self.input, data)

    def has_output(self) -> bool:
        """Return whether ``take`` would return at once."""
        return not self._printed.empty()

    def take(self) -> bytes:
        """Return what the command has printed next, waiting for it; nothing at the end."""
        chunk = self._printed.get()
        self._taken += len(chunk)
        if not chunk:
            self._printed.put(chunk)  # the end stays the end
        return chunk

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit status, negative for a signal; None if it lasts beyond ``seconds``."""
        from subprocess import TimeoutExpired

        with suppress(TimeoutExpired):
            return self._popen.wait(seconds)
        return None

    def kill(self) -> None:
        """Kill what is left of its group, and close its input."""
        end_group(self._popen)
        self.close()

    def close(self) -> None:
        """Wait for its end, close its input, and forget it."""
        self.input.close()
        self._popen.wait()
        self._guard.commands.forget(self._popen)

    def _read_output(self) -> None:
        with cast("IO[bytes]", self._popen.stdout) as output:
            try:
                while chunk := output.read(CHUNK):
                    self._read += len(chunk)
                    if self._read > self._allowed:
                        self.fault = TOO_LONG
                        end_group(self._popen)  # the main thread may wait for it to read
                        break
                    self._printed.put(chunk)
            except OSError as error:
                self.fault = f"printed what cannot be read: {error.strerror}"
            except MemoryError:
                self.fault = "printed what cannot be read: out of memory"
        self._printed.put(b"")


class Program(Answer):
    """Answers with what a shell command prints, which reads the request on its standard input.

    The request is never a part of the command line or of the environment, so that it cannot inject
    anything. The command runs in a group of its own: what is typed at our terminal, and a signal to
    our process group, do not reach it.
    """

    def __init__(
        self, command: str, form: Form, max_size: int, guard: Guard, *, reads_lines: bool
    ) -> None:
        """Use the shell command ``command``.

        ``max_size``: bytes that a reply may have. ``reads_lines``: whether the command reads and
        prints lines, whose ends are not counted.
        """
        import subprocess  # noqa: F401  (now, while there are descriptors)

        self._command = command
        self._form = form
        self._guard = guard
        self._output_limit = max_size * ESCAPE_SIZE if form.quoted else max_size
        if reads_lines:
            self._output_limit += len(form.separator) + (1 if form.cr_lf else 0)
        keep_exit_statuses()

    def _start(self, environment: dict[str, str], unanswered: str) -> Process:
        """Start the command as soon as that is possible.

        Raises Failure, or Unanswered with the text ``unanswered`` after a signal.
        """
        while True:
            try:
                return Process(self._command, environment, self._output_limit, self._guard)
            except OSError as error:
                reason = f"cannot start the command: {error.strerror}"
                if error.errno not in SHORTAGES:
                    raise Failure(reason) from error
                self._guard.stalls.notify(f"{reason}; trying again until it can be started")
                if self._guard.stop.wait(START_INTERVAL):
                    raise Unanswered(unanswered) from None

    @contextmanager
    def _telling_if_slow(self, notice: str, seconds: float, unfinished: str) -> Iterator[None]:
        """Give ``notice`` after ``seconds``, and have ``unfinished`` told if serve must end."""
        self._guard.unfinished = unfinished
        self._guard.stalls.expect(notice, seconds)
        try:
            yield
        finally:
            self._guard.stalls.withdraw(notice)
            self._guard.unfinished = ""

    def _was_stopped(self, status: int) -> bool:
        """Return whether a program that ended with ``status`` was killed because we stop.

        A signal to a group of processes may reach us a moment later than the program. Other signals
        are the program's own: its reply is as good as before.
        """
        return killing_signal(status) in STOP_SIGNALS and self._guard.stop.wait(SIGNAL_DELAY)

    def _encode(self, request: Request) -> bytes:
        """Return a request as the program reads it, without its end."""
        frames = [frame.bytes for frame in request.frames]
        if self._form.quoted:
            return quote(frames)
        if len(frames) > 1:
            self._guard.stalls.notify(FRAMES_JOINED)
        return b"".join(frames)

    def _decode(self, line: bytes, printed: bytes) -> Frames:
        """Return the frames of the quoted ``line``, or all that was ``printed`` if it is none."""
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


class Command(Program):
    """Runs the command for each request; all that it prints is the reply.

    Its exit status does not matter.
    """

    def reply_to(self, request: Request) -> Frames:
        data = self._encode(request)
        if self._form.quoted:
            data += b"\n"
        process = self._start(
            describe_client(request),
            "the last request was not answered: its command could not be started",
        )
        unfinished = f"{NOT_ANSWERED}: its command had not finished"
        with self._telling_if_slow(RUNS_LONG, LONG_RUN, unfinished):
            printed, status = self._run(process, data)
        if process.fault == TOO_LONG:
            notify(f"the command {TOO_LONG}; its request got an empty reply", "red")
            return [b""]
        if process.fault:
            raise Failure(f"the command {process.fault}")
        if status:
            notify(f"the command {describe_status(status)}", "yellow")
        if self._was_stopped(status):
            raise Unanswered("the last request was not answered: its command was stopped, too")
        if not self._form.quoted:
            return [printed]
        line = self._form.strip_cr(printed.removesuffix(b"\n"))
        return self._decode(line, printed)

    def _run(self, process: Process, data: bytes) -> tuple[bytes, int]:
        """Let the command read ``data``; return all that it prints, and its exit status."""
        with suppress(BrokenPipeError):  # it does not want the rest
            process.write(data)
        process.input.close()
        printed = b"".join(iter(process.take, b""))
        status = process.wait() or 0
        process.close()
        return printed, status


class Filter(Program):
    """Starts the command once, writes each request to it as a line, and reads each reply as one.

    A line too many, or one that nobody asked for, is the end: replies can no longer be matched to
    requests.
    """

    def __enter__(self) -> Self:
        """Start the command."""
        environment = without_client(dict(os.environ))
        self._process = self._start(environment, "the filter could not be started")
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_error: object) -> None:
        """Close its input, wait for its end, and kill what is left of its group.

        Raises Failure if it had to be killed itself.
        """
        self._process.input.close()
        if error_type:
            self._process.wait(FAILED_FILTER_LIMIT)
            has_ended = True
        else:
            has_ended = self._wait_for_end()
        self._process.kill()
        if not has_ended:
            raise Failure(
                f"the filter was killed: it had not ended {FILTER_END_LIMIT:g} s after its input"
            )

    def _wait_for_end(self) -> bool:
        """Return whether the filter ends within its time, or while we stop.

        Then the guard ends it with everything else.
        """
        self._guard.unfinished = "the filter was killed: it had not ended"
        end = time.monotonic() + FILTER_END_LIMIT
        while self._process.wait(END_INTERVAL) is None:
            if time.monotonic() >= end and not self._guard.stop.is_requested():
                return False
        self._guard.unfinished = ""
        return True

    def reply_to(self, request: Request) -> Frames:
        self.check()
        end = self._form.separator
        line = self._encode(request).removesuffix(end)
        if end in line:
            notify(LINES_IN_REQUEST, "yellow")
            return [b""]
        self._process.allow(self._output_limit)
        unfinished = f"{NOT_ANSWERED}: the filter had not answered"
        with self._telling_if_slow(SILENT, NOTICE_DELAY, unfinished):
            answer = self._exchange(line + end, end)
        answer = self._form.strip_cr(answer)
        return self._decode(answer, answer) if self._form.quoted else [answer]

    def check(self) -> None:
        if self._process.has_output():
            self._fail_for_output(self._process.take())

    def _exchange(self, line: bytes, end: bytes) -> bytes:
        """Write ``line`` and read one; return it without its ``end``."""
        try:
            self._process.write(line)
        except OSError:
            self._fail_for_end()
        printed = bytearray()
        end_at = -1
        while end_at < 0:
            searched = len(printed)
            chunk = self._process.take()
            if not chunk:
                self._fail_for_end()
            printed += chunk
            end_at = printed.find(end, searched)
        beyond = bytes(printed[end_at + len(end) :])
        if beyond:
            self._fail_for_output(beyond)
        return bytes(printed[:end_at])

    def _fail_for_output(self, printed: bytes) -> NoReturn:
        """Raise what follows from output that no request asked for, or from its end."""
        if not printed:
            self._fail_for_end()
        raise Failure(
            f"the filter printed {abridge(printed)}, which no request asked for;"
            " replies cannot be told apart"
        )

    def _fail_for_end(self) -> NoReturn:
        """Raise what follows from the end of the filter."""
        if self._process.fault:
            raise Failure(f"the filter {self._process.fault}")
        status = self._process.wait(FAILED_FILTER_LIMIT)
        if status is None:
            raise Failure("the filter closed its input or output, so there can be no more replies")
        if self._was_stopped(status):
            raise Unanswered("the filter was stopped, too")
        raise Failure(f"the filter {describe_status(status)}, so there can be no more replies")


def describe_status(status: int) -> str:
    """Return in words how a child process has ended; ``status`` is negative for a signal."""
    number = killing_signal(status)
    return f"was killed by signal {number}" if number else f"exited with status {status}"


def describe_client(request: Request) -> dict[str, str]:
    """Return the environment of a command, with who sent the request.

    Nothing in it is chosen by the client: the address is the system's, and the name is that of a
    file of ours.
    """
    environment = without_client(dict(os.environ))
    if address := request.client_address():
        environment["ZMQMSG_PEER"] = address
    if name := request.key_name():
        environment["ZMQMSG_PEER_KEY"] = name
    return environment


def without_client(environment: dict[str, str]) -> dict[str, str]:
    """Return ``environment`` without the client of another server that has started us."""
    return {
        name: value
        for name, value in environment.items()
        if name not in ("ZMQMSG_PEER", "ZMQMSG_PEER_KEY")
    }
