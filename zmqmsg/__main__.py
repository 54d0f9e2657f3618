"""What the console script ``zmqmsg`` and ``python -m zmqmsg`` run."""

import signal
import sys


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # Ctrl-C ends the process as it ends any other: a shell shows 130, and a loop around it stops. It stays ignored
    # where it is, as in a background job of a shell.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    import click  # only now, so that Ctrl-C during the imports is silent, too

    from zmqmsg.cli import cli
    from zmqmsg.console import show_error

    try:
        sys.exit(cli.main(prog_name="zmqmsg", standalone_mode=False))
    except click.ClickException as error:
        show_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
