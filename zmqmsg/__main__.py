"""What the console script ``zmqmsg`` and ``python -m zmqmsg`` run."""

import errno
import gc
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # With its usual threshold, the garbage collector rescans all that is imported again and again:
    # 12 % of the instructions of `zmqmsg send hi`.
    gc.set_threshold(100_000)
    end_at_once_by_default()
    occupy_closed_streams()
    status = run_command_line()
    from zmqmsg.system import end_process

    end_process(status)


def run_command_line() -> int:
    """Run what was typed, and return its exit status."""
    import click  # only now, so that Ctrl-C during the imports is silent, too

    from zmqmsg.notices import show_error
    from zmqmsg.system import exact_arguments

    try:
        arguments = exact_arguments()
    except ValueError as error:
        show_error(click.UsageError(str(error)))
        return 2
    return run(arguments)


def run(arguments: list[str]) -> int:
    """Run ``arguments`` and return the exit status; errors become one line."""
    import click

    from zmqmsg.cli import cli
    from zmqmsg.notices import Failure, show_error
    from zmqmsg.system import READER_GONE

    try:
        # On Windows, click would expand *, ?, ~ and %VAR% in all arguments.
        cli.main(
            arguments,
            prog_name="zmqmsg",
            standalone_mode=False,
            windows_expand_args=False,
        )
        sys.stdout.flush()
    except click.ClickException as error:
        show_error(hide_key(error, arguments))
        return error.exit_code
    except MemoryError:
        show_error(Failure("out of memory"))
        return 1
    except UnicodeEncodeError as error:
        shown = error.object.encode(errors="backslashreplace").decode()
        show_error(
            Failure(f"the encoding {error.encoding} of this locale cannot express '{shown}'")
        )
        return 1
    except OSError as error:
        if error.errno not in READER_GONE:
            show_error(Failure(describe(error)))
        return 1
    except SystemExit as end:  # of completion, or because a reader has gone
        return end.code if isinstance(end.code, int) else 1
    return 0


def hide_key(error: "click.ClickException", arguments: list[str]) -> "click.ClickException":
    """Return ``error``, or a neutral one if it shows a surplus argument that may be a key."""
    import click

    from zmqmsg.keys import looks_like_key

    shown = [each for each in arguments if each in error.format_message() and looks_like_key(each)]
    if not shown or not isinstance(error, click.UsageError) or not error.ctx:
        return error
    return click.UsageError("an argument is not shown, as it may be a key", error.ctx)


def describe(error: OSError) -> str:
    """Return in words what has failed, and what to do."""
    text = error.strerror or str(error)
    if error.filename:
        text = f"{error.filename}: {text}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{text}: raise the limit, for example with: ulimit -n 4096"
    return text


def end_at_once_by_default() -> None:
    """Let signals end the process like any other: a shell shows 130 after Ctrl-C.

    Signals that are ignored stay so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:
        # In a container without an init: there, the kernel ignores signals without a handler.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, _frame: os._exit(128 + number))


def occupy_closed_streams() -> None:
    """Open something in the place of standard streams that were closed from the start.

    Otherwise libzmq would get their descriptors. The null device is opened so that reading
    from it or writing to it fails, as it should; notices are dropped.
    """
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_WRONLY))  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.open(os.devnull, os.O_RDONLY), "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
