"""What the console script ``zmqmsg`` and ``python -m zmqmsg`` run."""

import errno
import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and end the process with its exit status."""
    end_at_once_by_default()
    gc.disable()  # until all is imported

    import click  # only now, so that Ctrl-C during the imports is silent, too

    from zmqmsg.cli import cli
    from zmqmsg.console import show_error
    from zmqmsg.system import READER_GONE

    try:
        # On Windows, click would expand *, ?, ~ and %VAR% in all arguments.
        sys.exit(cli.main(prog_name="zmqmsg", standalone_mode=False, windows_expand_args=False))
    except click.ClickException as error:
        show_error(error)
        sys.exit(error.exit_code)
    except MemoryError:
        show_error(click.ClickException("out of memory"))
        sys.exit(1)
    except OSError as error:
        few = error.errno in (errno.EMFILE, errno.ENFILE)
        advice = ": raise the limit, for example with: ulimit -n 256" if few else ""
        if error.errno not in READER_GONE:
            show_error(click.ClickException(f"{error.strerror or error}{advice}"))
        sys.stdout = None  # what is left in its buffer would fail once more, with a traceback
        sys.exit(1)


def end_at_once_by_default() -> None:
    """Let signals end the process as any other: a shell shows 130 after Ctrl-C. Those that are ignored stay so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:
        # In a container without an init. The kernel drops what has the default action.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, _frame: os._exit(128 + number))


if __name__ == "__main__":
    main()
