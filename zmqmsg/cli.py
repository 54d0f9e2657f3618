"""The command line: options and their types. What the commands do is in ``send`` and ``serve``."""

import gc
import math
import os
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import click

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.console import Form

LEAST_SIZE = 512  # bytes; libzmq applies the limit to the handshake as well (300 with CURVE)
MOST_SIZE = 1 << 40  # bytes
DEFAULT = f"[default: {DEFAULT_ENDPOINT}]"


class Option(click.Option):
    """An option that a variable of the environment which is empty, or blank, sets to an empty value; no for a flag."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        # click ignores such a variable, so that an empty secret would turn authentication off.
        name = f"{ctx.auto_envvar_prefix}_{self.opts[-1].strip('-')}".upper().replace("-", "_")
        value = os.environ.get(name)
        return value if value is None or value.strip() else ""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        value = super().value_from_envvar(ctx)
        return [""] if self.multiple and value == [] else value


class Parsed(click.ParamType[Any]):
    """A value that ``parse`` understands; it raises ValueError with a message for the user."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_endpoint(text: str, *, bind: bool) -> str:
    """Return ``text`` if it is an endpoint that can be bound, or else connected to."""
    from zmqmsg.sockets import check_endpoint  # not for --help and completion: it imports zmq

    return check_endpoint(text, bind=bind)


def parse_size(text: str) -> int:
    """Return a number of bytes. K, M and G are powers of 1024."""
    match = re.fullmatch("([0-9]{1,10})([KMG]?)", text.upper())
    size = int(match[1]) << 10 * " KMG".index(match[2] or " ") if match else 0
    if not LEAST_SIZE <= size <= MOST_SIZE:
        raise ValueError(
            f"'{text}' is not a size such as 65536, 64M or 1G, {LEAST_SIZE} at least and 1024G at most"
        )
    return size


def parse_seconds(text: str) -> float:
    """Return a time above 0. click's FloatRange accepts NaN, and says "is not a valid float range"."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"'{text}' is not a number of seconds above 0, such as 2 or 0.5")
    return seconds


class KeyPath(click.Path):
    """A path of keys. An empty one, as of a shell variable that is not set, must not turn an option off."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        if value == "-":
            self.fail(
                "'-' is no key file; to read a key from a command, pass <(command)", param, ctx
            )
        return super().convert(value, param, ctx)


def _print_versions(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # slow

        import zmq

        click.echo(
            f"zmqmsg {version('zmqmsg')}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
        )
        ctx.exit()


def _run(module: str, /, *, null: bool, quoted: bool, raw: bool, **options: Any) -> None:
    """Do what the command of ``module`` does. It is imported only now: --help and completion need no zmq."""
    form = Form.choose(null=null, quoted=quoted, raw=raw)
    run = import_module(f"zmqmsg.{module}").run
    # main() has switched the garbage collector off: it would go through all that is imported, again and again.
    gc.freeze()
    gc.enable()
    run(form=form, **options)


@click.group(
    context_settings={
        "auto_envvar_prefix": "ZMQMSG",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 80,
    },
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


BIND_ENDPOINT = Parsed("endpoint", partial(parse_endpoint, bind=True))
CONNECT_ENDPOINT = Parsed("endpoint", partial(parse_endpoint, bind=False))
SECONDS = Parsed("seconds", parse_seconds)
SIZE = Parsed("bytes", parse_size)
KEY_FILE = KeyPath(dir_okay=False)
INPUT_FILE = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)

option = partial(click.option, cls=Option)
flag = partial(option, is_flag=True)
bind = partial(option, "-b", "--bind", type=BIND_ENDPOINT, multiple=True)
connect = partial(option, "-c", "--connect", type=CONNECT_ENDPOINT, multiple=True)
command = partial(option, metavar="COMMAND")
count = partial(option, "-n", "--count", type=click.IntRange(min=1), metavar="N")
retries = partial(
    option, "-r", "--retries", type=click.IntRange(min=0), metavar="N", default=3, show_default=True
)


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that both have."""
    for decorate in (  # from the last one in the help page to the first
        option("--key", type=KEY_FILE, help="Your CURVE secret key file; created if missing."),
        option(
            "--max-size", type=SIZE, default="64M", show_default=True, help="Refuse larger frames."
        ),
        flag("--raw", help="Print messages as they are, with nothing after them."),
        flag(
            "-Q",
            "--quoted",
            help="One line per message: frames separated by TAB, special bytes escaped.",
        ),
        flag("-0", "--null", help="End messages with NUL instead of newline."),
    ):
        function = decorate(function)
    return function


@cli.command()
@bind(help=f"Bind here; repeatable.  {DEFAULT}")
@connect(help="Connect to a broker's DEALER as a worker; repeatable.")
@option("--reply", metavar="TEXT", help="Reply with TEXT instead of the request.")
@command(
    "-e",
    "--exec",
    "command",
    help="Reply with what the shell COMMAND prints; its input is the request.",
)
@command(
    "--filter",
    "filter_command",
    help="Start COMMAND once: for each request, it reads a line and prints one.",
)
@count(help="Stop after N requests.")
@flag("-q", "--quiet", help="Do not print requests.")
@flag("-v", "--verbose", help="Report who asked, how much, and how long the answer took.")
@shared_options
@option(
    "--client-keys",
    type=KeyPath(),
    help="Accept only clients whose public keys are in this file or directory.",
)
@option("--server-key", type=KEY_FILE, help="The broker's CURVE public key file (with --connect).")
def serve(**options: Any) -> None:
    """Answer requests on a REP socket.

    By default the reply is the request itself. Requests are printed after it.

    \b
    Examples:
      zmqmsg serve --reply '{"status": "ok"}'
      zmqmsg serve --exec 'tr a-z A-Z'
      zmqmsg serve --filter 'sed -u s/a/b/'
      zmqmsg serve --bind 'tcp://*:5555' --bind ipc:///tmp/echo.sock

    What a command for --exec prints is the reply, whatever its exit status. Ctrl-C
    or SIGTERM stops serve after what it has received; a second one ends it at once.

    \b
    Exit status:
      0  stopped by --count, Ctrl-C or SIGTERM
      1  something failed
      2  wrong usage
    """
    _run("serve", **options)


@cli.command()
@connect(help=f"Connect here; repeatable.  {DEFAULT}")
@option(
    "-t", "--timeout", type=SECONDS, help="Seconds to wait in each attempt.  [default: no limit]"
)
@retries(help="Send again up to N times after a timeout or a broken connection.")
@option(
    "-f",
    "--file",
    type=INPUT_FILE,
    multiple=True,
    help="Send a whole file (- for standard input); repeatable.",
)
@flag("-m", "--multipart", help="Send all messages as the frames of one request.")
@flag("-v", "--verbose", help="Report connections, who replied, how much, and after how long.")
@shared_options
@option("--server-key", type=KEY_FILE, help="The server's CURVE public key file.")
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
      1  failed; the current message was certainly not served
         (or its reply came and could not be printed)
      2  wrong usage
      3  no reply; the current message was sent, or may have been
    """
    _run("send", **options)
