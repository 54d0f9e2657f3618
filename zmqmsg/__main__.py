"""What the console script ``zmqmsg`` and ``python -m zmqmsg`` run."""

import gc
import sys

from zmqmsg.signals import end_at_once_by_default


def main() -> None:
    """Run the command line and end the process with its exit status."""
    end_at_once_by_default()
    gc.disable()  # until all is imported

    import click  # only now, so that Ctrl-C during the imports is silent, too

    from zmqmsg.cli import cli
    from zmqmsg.console import show_error

    try:
        sys.exit(cli.main(prog_name="zmqmsg", standalone_mode=False))
    except click.ClickException as error:
        show_error(error)
        sys.exit(error.exit_code)
    except MemoryError:
        show_error(click.ClickException("out of memory"))
        sys.exit(1)


if __name__ == "__main__":
    main()
