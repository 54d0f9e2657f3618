"""Standard output, for messages only, and complete writes to any unbuffered stream."""

import errno
import math
import os
import stat
import sys
import time
from typing import Any

from zmqmsg.messages import Form, Frames
from zmqmsg.notices import STALL_DELAY, Failure, unbuffered
from zmqmsg.quoting import escape, quote
from zmqmsg.system import CAN_POLL_OUTPUT, READER_GONE, watch_for_errors, write_parts

LARGE_FRAME = 65536  # bytes; a frame of this size is not copied just to append its end
RETRY_INTERVAL = 0.01  # seconds between attempts at a non-blocking stream that is not ready


class Output:
    """Standard output. Each message is written at once; on a terminal, as readable text."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._stream = unbuffered(sys.stdout)
        self._is_readable_text = form.quoted or sys.stdout.isatty()
        self._writing_since = math.inf  # by time.monotonic(); infinity: nothing is being written
        # What poll() watches to see that the reader has gone; empty where it cannot see that.
        self.descriptors = [self._stream.fileno()] if can_watch_reader(self._stream) else []
        self._has_error = watch_for_errors(self.descriptors)

    def write(self, frames: Frames) -> None:
        """Write a message; raise BrokenPipeError if its reader has gone, or Failure."""
        if self._is_readable_text:
            frames = [self._as_text([bytes(frame) for frame in frames])]
        terminator = self._form.terminator
        self._writing_since = time.monotonic()
        try:
            # One call for all of a message: other programs may append to the same file.
            if len(frames) == 1 and len(frames[0]) >= LARGE_FRAME:
                write_all(self._stream, frames[0], terminator)
            else:
                write_all(self._stream, terminator.join([*frames, b""]))  # it follows each frame
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failure(f"cannot write to standard output: {error.strerror}") from error
        finally:
            self._writing_since = math.inf

    def is_stalled(self) -> bool:
        """Return whether a write has lasted for a second."""
        return time.monotonic() - self._writing_since >= STALL_DELAY

    def is_abandoned(self) -> bool:
        """Return whether the reader has gone, as far as the system can say."""
        return self._has_error()

    def _as_text(self, frames: list[bytes]) -> bytes:
        if self._form.quoted or len(frames) > 1:
            return quote(frames)
        return escape(frames[0])


def can_watch_reader(stream: Any) -> bool:
    """Return whether poll() reports that the reader of ``stream``, a pipe or socket, has gone."""
    if not CAN_POLL_OUTPUT:
        return False
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except OSError:  # it has no descriptor
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def write_all(stream: Any, *parts: Any) -> None:
    """Write ``parts``, bytes or buffers, to an unbuffered stream, in one call if possible.

    Raises BrokenPipeError if its reader has gone, or OSError.
    """
    left = list(parts)
    try:
        while left:
            written = write_parts(stream, left)
            if written is None:
                time.sleep(RETRY_INTERVAL)
                continue
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = memoryview(left[0])[written:]
    except OSError as error:
        if error.errno in READER_GONE:
            raise reader_gone() from error
        raise


def reader_gone() -> BrokenPipeError:
    """Return the error of writing to a pipe that nobody reads."""
    return BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
