"""The command line. What the commands do is in ``send`` and ``serve``."""

import math
from collections.abc import Callable

import click

from zmqmsg import DEFAULT_ENDPOINT
from zmqmsg.keys import Keys
from zmqmsg.messages import Form
from zmqmsg.notices import notify
from zmqmsg.options import (
    BIND_ENDPOINT,
    CONNECT_ENDPOINT,
    INPUT_FILE,
    KEY_FILE,
    KEY_FILES,
    SECONDS,
    SIZE,
    flag,
    option,
    usage_of,
)
from zmqmsg.source import Source

DEFAULT = f"[default: {DEFAULT_ENDPOINT}]"


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


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that both have."""
    decorators = [
        flag("-0", "--null", help="End messages with NUL instead of newline."),
        flag("-Q", "--quoted", help="Read and print messages as quoted lines (see above)."),
        flag("--raw", help="Print nothing after a message."),
        option(
            "--max-size", type=SIZE, default="64M", show_default=True, help="Refuse larger frames."
        ),
        option("--key", type=KEY_FILE, help="Your CURVE secret key; created if missing."),
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
    from zmqmsg.answers import AnswerOptions
    from zmqmsg.serve import run

    with usage_of(ctx):
        run(
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
@flag("-v", "--verbose", help="Report each reply: from where, its size and time.")
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
    may be served --retries + 1 times; with --retries 0, once at most. If there is
    no server at the start, there is one attempt.

    In quoted lines, TAB separates frames, and \\\\ \\t \\n \\r \\xHH stand for
    special bytes.

    \b
    Exit status:
      0  all replies came
      1  failed; the current message was not served, or its reply not printed
      2  wrong usage
      3  no reply; the current message was sent, or may have been
    """
    from zmqmsg.send import run  # not for --help and completion: it imports zmq

    with usage_of(ctx):
        form = Form.choose(null=null, quoted=quoted, raw=raw)
        arguments = [form.decode_argument(message) for message in messages]
        if not connect:
            warn_of_endpoints(messages)
        run(
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
            option = f"--connect {endpoint}" if endpoint else "--connect"
            notify(f"'{message}' is sent as a message; to connect there, use {option}", "yellow")
