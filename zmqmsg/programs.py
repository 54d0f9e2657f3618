"""A shell command that runs for ``serve``: its input, its output, and its end."""

from contextlib import suppress
from queue import SimpleQueue
from typing import IO, cast

from zmqmsg.output import write_all
from zmqmsg.stopping import RunningPrograms
from zmqmsg.system import end_group, killing_signal, start_thread

CHUNK = 65536  # bytes of output that are read at a time

TOO_LONG = "printed more than --max-size allows, and was stopped"


class Program:
    """A shell command that runs. A thread reads its output, so that neither side blocks the other.

    The command may print a limited number of bytes beyond what was taken; more ends it.

    The reading thread sets ``_bytes_read``, and ``fault`` before it hands over the end of the
    output; the main thread sets ``_bytes_taken`` and ``_bytes_allowed``.
    """

    def __init__(
        self,
        command: str,
        environment: dict[str, str],
        output_limit: int,
        running: RunningPrograms,
    ) -> None:
        """Start ``command``; raise OSError if that is impossible now.

        ``output_limit``: bytes that it may print before ``allow`` is called.
        """
        self.fault = ""  # why the output is not complete
        self._chunks: SimpleQueue[bytes] = SimpleQueue()  # of output; b"" is its end
        self._bytes_read = 0
        self._bytes_taken = 0
        self._bytes_allowed = output_limit
        self._running = running
        self._process = running.start(command, environment)
        self._input = cast("IO[bytes]", self._process.stdin)
        self._output = cast("IO[bytes]", self._process.stdout)
        try:
            start_thread(self._read_output)
        except OSError:
            self._output.close()
            self.kill()
            raise

    def write(self, data: bytes) -> None:
        """Write to the command's input; raise OSError, BrokenPipeError if nobody reads it."""
        write_all(self._input, data)

    def close_input(self) -> None:
        """Let the command read the end of its input."""
        self._input.close()

    def allow(self, size: int) -> None:
        """Let the command print ``size`` bytes beyond what was taken."""
        self._bytes_allowed = self._bytes_taken + size

    def has_output(self) -> bool:
        """Return whether ``take`` would return at once."""
        return not self._chunks.empty()

    def take(self) -> bytes:
        """Wait for output and return some; return nothing at its end."""
        chunk = self._chunks.get()
        self._bytes_taken += len(chunk)
        if not chunk:
            self._chunks.put(chunk)  # later calls find the end as well
        return chunk

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit status, negative for a signal, or None after ``seconds``."""
        from subprocess import TimeoutExpired

        with suppress(TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def kill(self) -> None:
        """Kill the command, and all that it has started."""
        end_group(self._process)
        self.reap()

    def reap(self) -> None:
        """Wait until the command has ended, and give back what it has used."""
        self._input.close()
        self._process.wait()
        self._running.forget(self._process)

    def _read_output(self) -> None:
        with self._output as output:
            try:
                while chunk := output.read(CHUNK):
                    self._bytes_read += len(chunk)
                    if self._bytes_read > self._bytes_allowed:
                        self.fault = TOO_LONG
                        end_group(self._process)  # the main thread may wait for it to read
                        break
                    self._chunks.put(chunk)
            except OSError as error:
                self.fault = f"printed what cannot be read: {error.strerror}"
            except MemoryError:
                self.fault = "printed what cannot be read: out of memory"
        self._chunks.put(b"")


def describe_status(status: int) -> str:
    """Return in words how a command has ended; ``status`` is negative for a signal."""
    number = killing_signal(status)
    return f"was killed by signal {number}" if number else f"exited with status {status}"
