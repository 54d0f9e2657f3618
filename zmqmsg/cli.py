"""The command line: options and their types. What the commands do is in ``send`` and ``serve``."""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.keys import Keys, is_key_for_path, looks_like_key
from zmqmsg.messages import Form, Source
from zmqmsg.notices import notify

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
MIN_SIZE = 512  # bytes; libzmq applies the limit to the handshake as well (300 with CURVE)
MAX_SIZE = 1024 * UNITS["G"]
DEFAULT = f"[default: {DEFAULT_ENDPOINT}]"


# Options and their types


class Option(click.Option):
    """An option whose environment variable counts even if it is empty or blank.

    It is then the option with an empty value; for a flag, no. click ignores such a variable, so
    that a secret which is missing would turn authentication off. Errors name the variable.
    """

    def variable(self, ctx: click.Context) -> str:
        """Return the name of the environment variable."""
        long_name = self.opts[-1].lstrip("-").replace("-", "_")
        return f"{ctx.auto_envvar_prefix}_{long_name}".upper()

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = os.environ.get(self.variable(ctx))
        if value is None or value.strip():
            return value
        return ""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        value = super().value_from_envvar(ctx)
        if self.multiple and value == []:
            return [""]
        return value

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:
            text = error.message.removesuffix(".")
            if any(shows_key(text, each) for each in strings_of(value)):
                text = "the value is wrong; it is not shown, as it may be a key"
            if is_from_environment(ctx, self):
                text = f"{text} (from {self.variable(ctx)})"
            raise click.BadParameter(text, ctx, self) from None


def strings_of(value: Any) -> tuple[str, ...]:
    """Return the texts in the value of an option."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(each for each in values if isinstance(each, str))


def shows_key(text: str, value: str) -> bool:
    """Return whether ``text`` shows a ``value`` that may be a key.

    An address has some of a key's characters, and is none.
    """
    is_shown = value in text or repr(value)[1:-1] in text
    is_address = "://" in value or re.search(r":\d{1,5}\s*$", value)
    return is_shown and not is_address and looks_like_key(value)


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


class InputPath(click.Path):
    """A path that errors show as it was typed, and not with its backslashes doubled."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            shown = click.format_filename(value)
            self.fail(error.message.replace(repr(shown), f"'{value}'"), param, ctx)


class KeyPath(InputPath):
    """A path of keys. An empty one, as of an unset shell variable, must not turn an option off."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        if value == "-":
            self.fail(
                "'-' is no key file; to read a key from a command, pass <(command)", param, ctx
            )
        if is_key_for_path(value):
            self.fail(  # without showing it: it may be a secret
                "it takes a file, and this looks like a key itself; put the key into a file"
                " (if it is the name of a file, write ./ before it)",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def parse_endpoint(text: str, *, bind: bool) -> str:
    """Return ``text`` if it is an endpoint that can be bound, or else connected to."""
    from zmqmsg.endpoints import check_endpoint  # not for --help and completion: it imports zmq

    return check_endpoint(text, bind=bind)


def parse_size(text: str) -> int:
    """Return a number of bytes. K, M and G are powers of 1024."""
    match = re.fullmatch("([0-9]{1,20})([KMG]?)", text.upper())
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"'{text}' is not a size such as 65536, 64M or 1G, {MIN_SIZE} at least and"
            " 1024G at most"
        )
    return size


def parse_seconds(text: str) -> float:
    """Return a time above 0, in seconds."""
    # click's FloatRange accepts NaN, and says "is not a valid float range".
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"'{text}' is not a number of seconds above 0, such as 2 or 0.5")
    return seconds


# Errors of usage that are found when all options are known


@contextmanager
def usage_of(ctx: click.Context) -> Iterator[None]:
    """Let errors of usage refer to the help, and to the variables that they come from."""
    try:
        yield
    except click.UsageError as error:
        raise click.UsageError(name_variables(ctx, error.message), ctx) from None


def name_variables(ctx: click.Context, text: str) -> str:
    """Return ``text`` with the variable after each option that comes from the environment."""
    for option in ctx.command.params:
        if isinstance(option, Option) and is_from_environment(ctx, option):
            name = re.escape(option.opts[-1])
            text = re.sub(rf"{name}(?![\w-])", rf"\g<0> (from {option.variable(ctx)})", text)
    return text


def is_from_environment(ctx: click.Context, option: click.Option) -> bool:
    """Return whether the value of ``option`` comes from an environment variable."""
    return ctx.get_parameter_source(option.name or "") == ParameterSource.ENVIRONMENT


# The group


def print_versions(ctx: click.Context, _param: click.Parameter, is_given: bool) -> None:
    """Print the versions of what matters, and exit."""
    if is_given:
        from importlib.metadata import version  # slow

        import zmq

        versions = f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
        click.echo(f"zmqmsg {version('zmqmsg')}, {versions}")
        ctx.exit()


@click.group(
    context_settings={
        "auto_envvar_prefix": "ZMQMSG",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 80,
    },
    epilog="More: zmqmsg serve --help and zmqmsg send --help.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=print_versions,
    help="Show the versions and exit.",
)
def cli() -> None:
    """Send and answer ZeroMQ requests (REQ/REP) from the command line.

    \b
    In one terminal:
      zmqmsg serve
    In another:
      zmqmsg send "first message" "second message"

    Messages go to standard output, notices to standard error.

    Every option can also be an environment variable: ZMQMSG_SEND_TIMEOUT=2 is send
    --timeout 2. Spaces separate several endpoints; several files are separated as
    in PATH. For completion, put into ~/.bashrc (or zsh_source into ~/.zshrc):

    \b
      eval "$(_ZMQMSG_COMPLETE=bash_source zmqmsg)"
    """


BIND_ENDPOINT = Parsed("endpoint", partial(parse_endpoint, bind=True))
CONNECT_ENDPOINT = Parsed("endpoint", partial(parse_endpoint, bind=False))
SECONDS = Parsed("seconds", parse_seconds)
SIZE = Parsed("bytes", parse_size)
KEY_FILE = KeyPath(dir_okay=False)
KEY_FILES = KeyPath()
INPUT_FILE = InputPath(exists=True, dir_okay=False, readable=True, allow_dash=True)

option = partial(click.option, cls=Option)
flag = partial(option, is_flag=True)


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that both have."""
    decorators = [
        flag("-0", "--null", help="End messages with NUL instead of newline."),
        flag("-Q", "--quoted", help="Read and print messages as quoted lines (see above)."),
        flag("--raw", help="Print nothing after a message."),
        option(
            "--max-size", type=SIZE, default="64M", show_default=True, help="Refuse larger frames."
        ),
        option("--key", type=KEY_FILE, help="Your CURVE secret key file; created if missing."),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


# The commands


@cli.command()
@option(
    "-b", "--bind", type=BIND_ENDPOINT, multiple=True, help=f"Bind here; repeatable.  {DEFAULT}"
)
@option(
    "-c",
    "--connect",
    type=CONNECT_ENDPOINT,
    multiple=True,
    help="Be a worker of the broker here; repeatable.",
)
@option("--reply", metavar="TEXT", help="Reply with TEXT.")
@option(
    "-e",
    "--exec",
    "command",
    metavar="COMMAND",
    help="Reply with what COMMAND prints; run each time.",
)
@option(
    "--filter",
    "filter_command",
    metavar="COMMAND",
    help="Reply with a line of COMMAND, which is run once.",
)
@option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="Stop after N requests.")
@flag("-q", "--quiet", help="Do not print requests.")
@flag("-v", "--verbose", help="Report requests, and clients that fail to connect.")
@shared_options
@option("--client-keys", type=KEY_FILES, help="Let in only clients with a public key in PATH.")
@option("--server-key", type=KEY_FILE, help="With --connect: the broker's public key file.")
@click.pass_context
def serve(
    ctx: click.Context,
    *,
    bind: tuple[str, ...],
    connect: tuple[str, ...],
    reply: str | None,
    command: str | None,
    filter_command: str | None,
    count: int | None,
    quiet: bool,
    verbose: bool,
    null: bool,
    quoted: bool,
    raw: bool,
    max_size: int,
    key: str | None,
    client_keys: str | None,
    server_key: str | None,
) -> None:
    """Answer requests on a REP socket.

    By default the reply is the request itself. Requests are printed after it.

    \b
    Examples:
      zmqmsg serve --reply "it is up" --bind "tcp://*:5555"
      zmqmsg serve --exec hostname
      zmqmsg serve --filter "python3 -u filter.py"

    The shell runs COMMAND. With --exec, it reads a request up to the end of its
    input, and all that it prints is the reply, whatever its exit status; its
    variables ZMQMSG_PEER and ZMQMSG_PEER_KEY say who asks. With --filter, it reads
    requests as lines, and must flush the line that it prints for each.

    In quoted lines, TAB separates frames, and \\\\ \\t \\n \\r \\xHH stand for
    special bytes. A removed client key counts until its client reconnects.

    Ctrl-C or SIGTERM lets serve answer what it has received, within 8 seconds; a
    second one ends it at once.

    \b
    Exit status:
      0  stopped by --count or a signal
      1  failed, or stopped with requests unanswered
      2  wrong usage
    """
    # Not for --help and completion: they import zmq.
    from zmqmsg import serve
    from zmqmsg.answers import AnswerOptions

    with usage_of(ctx):
        serve.run(
            bind=bind,
            connect=connect,
            answer=AnswerOptions(reply, command, filter_command),
            keys=Keys(key, server_key, client_keys),
            form=Form.choose(null=null, quoted=quoted, raw=raw),
            max_size=max_size,
            count=count,
            quiet=quiet,
            verbose=verbose,
        )


@cli.command()
@option(
    "-c",
    "--connect",
    type=CONNECT_ENDPOINT,
    multiple=True,
    help=f"Connect here; repeatable.  {DEFAULT}",
)
@option(
    "-t",
    "--timeout",
    type=SECONDS,
    help="Seconds that an attempt may take.  [default: no limit]",
)
@option(
    "-r",
    "--retries",
    type=click.IntRange(min=0),
    metavar="N",
    default=3,
    show_default=True,
    help="How often to send a request again.",
)
@option(
    "-f",
    "--file",
    "files",
    type=INPUT_FILE,
    multiple=True,
    help="Send a whole file (- is standard input); repeatable.",
)
@flag("-m", "--multipart", help="Send all messages as the frames of one request.")
@flag("-v", "--verbose", help="Report who replied, how much, and how fast.")
@shared_options
@option("--server-key", type=KEY_FILE, help="The server's CURVE public key file.")
@click.argument("messages", metavar="[MESSAGE]...", nargs=-1)
@click.pass_context
def send(
    ctx: click.Context,
    *,
    connect: tuple[str, ...],
    timeout: float | None,
    retries: int,
    files: tuple[str, ...],
    multipart: bool,
    verbose: bool,
    null: bool,
    quoted: bool,
    raw: bool,
    max_size: int,
    key: str | None,
    server_key: str | None,
    messages: tuple[str, ...],
) -> None:
    """Send each MESSAGE as a request, and print each reply.

    With neither MESSAGE nor --file, send each line of standard input. Put -- before
    a MESSAGE that begins with -.

    \b
    Examples:
      zmqmsg send hello "a second message"
      zmqmsg send --timeout 2 --retries 0 ping
      git log --oneline | zmqmsg send --connect tcp://127.0.0.1:5556
      zmqmsg send --file question.json > answer.json

    A request is sent again when --timeout passes or the connection breaks, so it
    may be served --retries + 1 times; with --retries 0, once at most. If the first
    attempt reaches no server, it is the last one.

    In quoted lines, TAB separates frames, and \\\\ \\t \\n \\r \\xHH stand for
    special bytes.

    \b
    Exit status:
      0  all replies came
      1  failed; the current message was not served, or its reply not printed
      2  wrong usage
      3  no reply; the current message was sent, or may have been
    """
    from zmqmsg import send  # not for --help and completion: it imports zmq

    with usage_of(ctx):
        form = Form.choose(null=null, quoted=quoted, raw=raw)
        arguments = [form.decode_argument(message) for message in messages]
        if not connect:
            warn_of_endpoints(messages)
        send.run(
            connect=connect,
            source=Source(arguments, files, multipart, form),
            keys=Keys(key, server_key),
            form=form,
            max_size=max_size,
            timeout=timeout or math.inf,
            retries=retries,
            verbose=verbose,
        )


def warn_of_endpoints(messages: tuple[str, ...]) -> None:
    """Notify the user of messages that were likely meant as endpoints to connect to."""
    from zmqmsg.endpoints import looks_like_endpoint, suggest_endpoint

    for message in messages:
        if looks_like_endpoint(message):
            endpoint = suggest_endpoint(message, bind=False)
            notify(
                f"'{message}' is sent as a message; to connect there, use --connect {endpoint}".rstrip(),
                "yellow",
            )
