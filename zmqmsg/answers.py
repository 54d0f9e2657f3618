"""How ``serve`` gets its replies: an echo, a fixed text, a command for each request, or a filter that stays."""

from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any, NoReturn, Self, cast

import click

from zmqmsg.attendant import Attendant
from zmqmsg.console import CHUNK, NOTICE_DELAY, Failure, Form, notify, write_all
from zmqmsg.quoting import abridge, quote, unquote
from zmqmsg.system import (
    SHORTAGES,
    STOP_SIGNALS,
    end_group,
    keep_exit_statuses,
    killing_signal,
    start_thread,
)

LONG_RUN = 5.0  # seconds after which the user is told that a command keeps other requests waiting
START_INTERVAL = 0.2  # seconds between attempts to start a command
END_LIMIT = 1.0  # seconds that a filter has to end when its input has ended
SIGNAL_DELAY = (
    0.2  # seconds within which a signal to a whole group of processes reaches each of them
)

GOES_ON = (
    f"the command, or something that it has started, still goes on after {LONG_RUN:g} s, while other requests wait;"
    " redirect the output of what shall go on, as in: >/dev/null &"
)
SILENT = "the filter has not answered for a second; it may not flush its output, or read ahead"
TOO_MUCH = (
    "the command printed more than --max-size allows; it was stopped, and the request not answered"
)
LINES_IN_REQUEST = (
    "a request of several lines got an empty reply, since a filter reads one; use --exec,"
    " or --quoted if the filter reads quoted lines"
)

Frames = Sequence[Any]  # of bytes, or of zmq's Frames, which have them in a buffer


class Unanswered(Exception):
    """A signal has ended the program that makes the reply, so the reply may be incomplete."""


class Answer:
    """Replies with ``frames``, or else with the request: the echo. What it needs runs in its context."""

    def __init__(self, frames: Frames = ()) -> None:
        self._frames = frames

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def reply_to(self, request: Frames) -> Frames:
        """Return the frames of the reply; raise Unanswered, or Failure if there can be no more replies."""
        return self._frames or request

    def check(self) -> None:
        """Raise Failure, or Unanswered after a signal, if there can be no more replies."""


def choose_answer(
    reply: str | None,
    command: str | None,
    filter_command: str | None,
    form: Form,
    attendant: Attendant,
    max_size: int,
) -> Answer:
    """Return what makes the replies; raise UsageError if the options contradict each other."""
    options = {"--reply": reply, "--exec": command, "--filter": filter_command}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} cannot be used together")
    for name, value in given.items():
        if name != "--reply" and not value.strip():
            raise click.UsageError(f"{name} needs a command, for example {name} cat")
    if command is not None:
        return Command(command, form, attendant, max_size)
    if filter_command is not None:
        return Filter(filter_command, form, attendant, max_size)
    return Answer() if reply is None else Answer(form.decode_argument(reply))


# Programs


class Process:
    """A shell command that runs. A thread reads what it prints, so that neither side can block the other."""

    def __init__(self, command: str, attendant: Attendant, room: int) -> None:
        """Start ``command``; raise OSError if something for that is lacking."""
        self.room = room  # bytes that it may still print
        self.printed: SimpleQueue[bytes] = SimpleQueue()  # what it has printed, with b"" at the end
        self.failure = ""  # why that is not all, if it is not
        self._attendant = attendant
        self._popen = attendant.start_command(command)
        self.stdin, self._stdout = (
            cast("IO[bytes]", self._popen.stdin),
            cast("IO[bytes]", self._popen.stdout),
        )
        try:
            start_thread(self._read)
        except OSError:
            self.kill()
            raise

    def _read(self) -> None:
        try:
            while chunk := self._stdout.read(CHUNK):
                self.room -= len(chunk)
                if self.room < 0:
                    self.failure = TOO_MUCH
                    end_group(self._popen)  # here, since the main thread may wait for it to read
                    break
                self.printed.put(chunk)
        except (OSError, MemoryError) as error:
            self.failure = f"cannot read what the command prints: {getattr(error, 'strerror', 'out of memory')}"
        self.printed.put(b"")

    def wait(self, seconds: float | None = None) -> int | None:
        """Return its exit status, negative for a signal; None if it does not end within ``seconds``."""
        from subprocess import TimeoutExpired

        with suppress(TimeoutExpired):
            return self._popen.wait(seconds)
        return None

    def kill(self) -> None:
        """Kill what is left of its group, and close its input."""
        end_group(self._popen)
        self.stdin.close()
        self._popen.wait()
        self._attendant.forget(self._popen)

    def close(self) -> None:
        """Close what is left of a process that has ended by itself."""
        self._stdout.close()
        self._attendant.forget(self._popen)


class Program(Answer):
    """Answers with what a shell command prints, which reads the request on its standard input.

    The request is never a part of the command line or of the environment, so that it cannot inject anything. The
    command runs in a group of its own: what is typed at our terminal, and a signal to our process group, do not reach
    it, and the second signal ends all of it.
    """

    def __init__(self, command: str, form: Form, attendant: Attendant, max_size: int) -> None:
        """Use the shell command ``command``, for messages in ``form``; ``max_size``: bytes of a reply, unquoted."""
        self._command = command
        self._form = form
        self._attendant = attendant
        self._room = max_size * (4 if form.quoted else 1)  # an escape has four characters
        import subprocess  # noqa: F401  (now, while there are descriptors)

        keep_exit_statuses()

    def _start(self, otherwise: str) -> Process:
        """Start the command as soon as that is possible; raise Failure, or Unanswered(``otherwise``) after a signal."""
        while True:
            try:
                return Process(self._command, self._attendant, self._room + self._form.quoted)
            except OSError as error:
                reason = f"cannot start the command: {error.strerror}"
                if error.errno not in SHORTAGES:
                    raise Failure(reason) from error
                self._attendant.notices.notify_once(
                    f"{reason}; trying again until it can be started"
                )
                if self._attendant.stop.wait(START_INTERVAL):
                    raise Unanswered(otherwise) from None

    def _was_stopped(self, status: int) -> bool:
        """Return whether a program that ended with ``status`` was killed by a signal while we stop, or are about to."""
        number = killing_signal(status)
        # A signal to a group of processes may reach us after the others.
        return number > 0 and self._attendant.stop.wait(
            SIGNAL_DELAY if number in STOP_SIGNALS else 0
        )

    def _encode(self, request: Frames) -> bytes:
        """Return a request as the program reads it, without an end."""
        frames = [bytes(frame) for frame in request]
        if self._form.quoted:
            return quote(frames)
        if len(frames) > 1:
            self._attendant.notices.notify_once(
                "frames are joined for the command; --quoted keeps them apart, if it reads quoted lines"
            )
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
    """Runs the command for each request; all that it prints is the reply, whatever its exit status."""

    def reply_to(self, request: Frames) -> Frames:
        data = self._encode(request) + b"\n" * self._form.quoted
        process = self._start("the last request was not answered: its command could not be started")
        self._attendant.notices.expect(GOES_ON, LONG_RUN)
        with suppress(BrokenPipeError):  # it does not want the rest
            write_all(process.stdin, data)
        process.stdin.close()
        printed = b"".join(iter(process.printed.get, b""))
        status = process.wait() or 0
        self._attendant.notices.withdraw(GOES_ON)
        process.close()
        if process.failure:
            raise Failure(process.failure)
        if status:
            notify(f"the command {describe_status(status)}", "yellow")
        if self._was_stopped(status):
            raise Unanswered("the last request was not answered: its command was stopped, too")
        return (
            self._decode(printed.removesuffix(b"\n"), printed) if self._form.quoted else [printed]
        )


class Filter(Program):
    """Starts the command once, writes each request to it as a line, and reads each reply as one.

    A line too many, or one that nobody asked for, is the end: replies can no longer be matched to requests.
    """

    def __enter__(self) -> Self:
        """Start the command."""
        self._process = self._start("the filter could not be started")
        return self

    def __exit__(self, *_error: object) -> None:
        """Let the command end by the end of its input, and then kill what is left of its group."""
        self._process.stdin.close()
        self._process.wait(END_LIMIT)
        self._process.kill()

    def reply_to(self, request: Frames) -> Frames:
        self.check()
        end = self._form.separator
        line = self._encode(request).removesuffix(end)
        if end in line:
            notify(LINES_IN_REQUEST, "yellow")
            return [b""]
        self._process.room = self._room + 1 + self._form.cr_lf  # the end of the line
        self._attendant.notices.expect(SILENT, NOTICE_DELAY)
        answer = self._exchange(line + end, end)
        self._attendant.notices.withdraw(SILENT)
        return self._decode(answer, answer) if self._form.quoted else [self._form.strip_cr(answer)]

    def check(self) -> None:
        if not self._process.printed.empty():
            self._fail_for_line(self._process.printed.get())

    def _exchange(self, line: bytes, end: bytes) -> bytes:
        """Write ``line`` and read one; return it without its ``end``."""
        try:
            write_all(self._process.stdin, line)
        except OSError:
            self._fail_for_end()
        printed = bytearray()
        place = -1
        while place < 0:
            if not (chunk := self._process.printed.get()):
                self._fail_for_end()
            begin = len(printed)
            printed += chunk
            place = printed.find(end, begin)
        if len(printed) > place + 1:
            self._fail_for_line(bytes(printed[place + 1 :]))
        return bytes(printed[:place])

    def _fail_for_line(self, printed: bytes) -> NoReturn:
        self._attendant.notices.withdraw(SILENT)
        if not printed:
            self._fail_for_end()
        raise Failure(
            f"the filter printed {abridge(printed)}, which no request asked for; replies cannot be told apart"
        )

    def _fail_for_end(self) -> NoReturn:
        self._attendant.notices.withdraw(SILENT)
        if self._process.failure:
            raise Failure(self._process.failure)
        status = self._process.wait(END_LIMIT)
        if status is None:
            raise Failure("the filter closed its input or output, so there can be no more replies")
        if self._was_stopped(status):
            raise Unanswered("the filter was stopped, too")
        raise Failure(f"the filter {describe_status(status)}, so there can be no more replies")


def describe_status(status: int) -> str:
    """Return in words how a child process has ended; ``status`` is negative for a signal."""
    number = killing_signal(status)
    return f"was killed by signal {number}" if number else f"exited with status {status}"
