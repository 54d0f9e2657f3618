"""The command line: options and their types. What the commands do is in ``send`` and ``serve``."""

import math
import re
from typing import Any

import click

from zmqmsg import DEFAULT_ENDPOINT

LEAST_SIZE = 512
"""Bytes that frames must be allowed to have: libzmq applies the limit to the handshake as well (300 with CURVE)."""


class Endpoint(click.ParamType[str]):
    """An endpoint that libzmq understands, to be bound or connected to."""

    name = "endpoint"

    def __init__(self, *, bind: bool) -> None:
        self._bind = bind

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from zmqmsg.sockets import check_endpoint  # not for --help and completion: it imports zmq

        try:
            return check_endpoint(value, bind=self._bind)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes, with K, M or G for 1024 of the last."""

    name = "bytes"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch("([0-9]{1,10})([KMG]?)", value.upper())
        size = int(match[1]) << 10 * " KMG".index(match[2] or " ") if match else 0
        if not LEAST_SIZE <= size < 1 << 63:
            self.fail(f"'{value}' is not a size such as 65536, 64M or 1G, and {LEAST_SIZE} at least", param, ctx)
        return size


class FilePath(click.Path):
    """A path. An empty one, as of a shell variable that is not set, must not turn an option off."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.ParamType[float]):
    """A time above 0, in seconds. click's FloatRange lets NaN through, and says "is not a valid float range"."""

    name = "seconds"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            self.fail(f"'{value}' is not a number of seconds above 0, such as 2 or 0.5", param, ctx)
        return seconds


def _print_versions(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # slow

        import zmq

        click.echo(f"zmqmsg {version('zmqmsg')}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}")
        ctx.exit()


@click.group(
    context_settings={"auto_envvar_prefix": "ZMQMSG", "help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="README.md has recipes, keys step by step, and completion for bash, zsh and fish.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=_print_versions,
    help="Show the versions and exit.",
)
def cli() -> None:
    """Send and answer ZeroMQ requests (REQ/REP) from the command line.

    \b
    In one terminal:
      zmqmsg serve
    In another:
      zmqmsg send "first message" "second message"

    Every option can also come from the environment: ZMQMSG_SEND_TIMEOUT=2.
    """


_KEY_FILE = FilePath(dir_okay=False)
_INPUT_FILE = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)

# Options that both commands have
_verbose = click.option("-v", "--verbose", is_flag=True, help="Report each message and connection on standard error.")
_null = click.option("-0", "--null", is_flag=True, help="End messages with NUL instead of newline.")
_quoted = click.option(
    "-Q", "--quoted", is_flag=True, help="One line per message: frames separated by TAB, special bytes escaped."
)
_max_size = click.option("--max-size", type=Size(), default="64M", show_default=True, help="Refuse larger frames.")
_key = click.option("--key", type=_KEY_FILE, help="Your CURVE secret key file; created if missing.")


@cli.command()
@click.option(
    "-b",
    "--bind",
    type=Endpoint(bind=True),
    multiple=True,
    help=f"Bind here; repeatable.  [default: {DEFAULT_ENDPOINT}]",
)
@click.option(
    "-c",
    "--connect",
    type=Endpoint(bind=False),
    multiple=True,
    help="Connect to a broker's DEALER as a worker; repeatable.",
)
@click.option("--reply", metavar="TEXT", help="Reply with TEXT instead of the request.")
@click.option(
    "-e",
    "--exec",
    "command",
    metavar="COMMAND",
    envvar="ZMQMSG_SERVE_EXEC",
    help="Reply with what the shell COMMAND prints; it reads the request on standard input.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="Stop after N requests.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print requests.")
@_verbose
@_null
@_quoted
@_max_size
@_key
@click.option(
    "--client-keys", type=FilePath(), help="Accept only clients whose public keys are in this file or directory."
)
@click.option("--server-key", type=_KEY_FILE, help="The broker's CURVE public key file (with --connect).")
def serve(**options: Any) -> None:
    """Answer requests on a REP socket.

    By default the reply is the request itself. Requests are printed on standard
    output, each after its reply.

    \b
    Examples:
      zmqmsg serve
      zmqmsg serve --reply '{"status": "ok"}'
      zmqmsg serve --exec 'tr a-z A-Z'
      zmqmsg serve --bind 'tcp://*:5555' --bind ipc:///tmp/echo.sock
      zmqmsg serve --connect tcp://127.0.0.1:5556

    Ctrl-C or SIGTERM stops it after the current request; a second signal ends it at
    once.

    \b
    Exit status:
      0  stopped by --count, Ctrl-C or SIGTERM
      1  something failed
      2  wrong usage
    """
    from zmqmsg.serve import run

    run(**options)


@cli.command()
@click.option(
    "-c",
    "--connect",
    type=Endpoint(bind=False),
    multiple=True,
    help=f"Connect here; repeatable.  [default: {DEFAULT_ENDPOINT}]",
)
@click.option(
    "-t", "--timeout", type=Seconds(), metavar="SECONDS", help="Seconds to wait in each attempt.  [default: no limit]"
)
@click.option(
    "-r",
    "--retries",
    type=click.IntRange(min=0),
    metavar="N",
    default=3,
    show_default=True,
    help="Send again up to N times after a timeout or a broken connection.",
)
@click.option(
    "-f", "--file", type=_INPUT_FILE, multiple=True, help="Send a whole file (- for standard input); repeatable."
)
@click.option("-m", "--multipart", is_flag=True, help="Send all messages as the frames of one request.")
@_verbose
@_null
@_quoted
@_max_size
@_key
@click.option("--server-key", type=_KEY_FILE, help="The server's CURVE public key file.")
@click.argument("message", nargs=-1)
def send(**options: Any) -> None:
    """Send each MESSAGE as a request, and print each reply.

    With neither MESSAGE nor --file, each line of standard input is a message. Put
    -- before a MESSAGE that begins with -.

    \b
    Examples:
      zmqmsg send hello "a second message"
      zmqmsg send --timeout 2 --retries 0 ping || echo "no reply"
      tail -f log | zmqmsg send --connect tcp://127.0.0.1:5556
      zmqmsg send --file question.json | jq .answer

    With --timeout T and --retries N, a message takes N + 1 attempts and (N + 1) x T
    seconds at most, and may be served N + 1 times. With --retries 0 it is sent at
    most once.

    \b
    Exit status:
      0  all replies came
      1  something failed; the current message was certainly not served,
         unless it was its reply that could not be written
      2  wrong usage
      3  no reply, but the current message may have been served
    """
    from zmqmsg.send import run

    run(**options)
