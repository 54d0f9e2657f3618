"""What the console script ``zmqmsg`` and ``python -m zmqmsg`` run."""

import os


def main() -> None:
    """Run the command line and end the process with its exit status."""
    try:
        # Imported here, so that Ctrl-C during the imports is met below.
        import signal

        from zmqmsg.cli import cli

        # Otherwise it is ignored, as in a background job of a shell.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        cli(prog_name="zmqmsg")
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    # All output is flushed by now. The interpreter's own ending would wait for libzmq, which resolves host
    # names on its I/O thread and cannot be stopped in the middle of one.
    os._exit(status)


def _interrupt(_number: int, _frame: object) -> None:
    """End at once. KeyboardInterrupt would get lost when it comes while pyzmq frees a frame."""
    from zmqmsg.console import clear_progress

    clear_progress()
    os._exit(130)


if __name__ == "__main__":
    main()
