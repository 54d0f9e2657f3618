"""What the console script ``zmqmsg`` and ``python -m zmqmsg`` run."""

import os
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process with its exit status."""
    try:
        # Imported here, so that Ctrl-C during the imports is met below as well.
        from zmqmsg.cli import cli

        cli(prog_name="zmqmsg")
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    # All output is flushed by now. The interpreter's own ending would wait for libzmq, which resolves host
    # names on its I/O thread and cannot be stopped in the middle of one.
    os._exit(status)


if __name__ == "__main__":
    main()
