"""The command line: options, wiring, exit statuses."""

import math
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import click

from zmqmsg import console

# What needs ZeroMQ is imported where it is used: --help and completion do without it, and a command pays for its own
# needs alone.
if TYPE_CHECKING:
    from zmqmsg.curve import Keys
    from zmqmsg.monitor import Connection
    from zmqmsg.sockets import Context, Socket

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"

HANDSHAKE_SIZE = 64
"""Bytes that messages must be allowed to have, as libzmq applies the limit to the handshake, too."""


class Endpoint(click.ParamType[str]):
    """An endpoint that libzmq will understand, to be bound or connected to."""

    name = "endpoint"

    def __init__(self, *, bind: bool) -> None:
        self._bind = bind

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from zmqmsg.sockets import check_endpoint

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
        if not HANDSHAKE_SIZE <= size < 1 << 63:
            self.fail(f"'{value}' is not a size of {HANDSHAKE_SIZE} or more, such as 65536, 64M or 1G", param, ctx)
        return size


class Seconds(click.ParamType[float]):
    """A time above 0, in seconds."""

    name = "seconds"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            self.fail(f"'{value}' is not a number of seconds above 0, such as 0.5 or 30", param, ctx)
        return seconds


class Messenger(click.Group):
    """A group whose failures all end as one line on standard error and an exit status."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit: 0 for success, 1 something failed, 2 wrong usage."""
        try:
            status = super().main(*args, **extra | {"standalone_mode": False}) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            status = error.exit_code
        except click.ClickException as error:
            console.tell(error.format_message() + _way_out(error), "red")
            status = error.exit_code
        except BrokenPipeError:
            status = 1
        except Exception as error:
            console.tell(getattr(error, "strerror", None) or str(error) or type(error).__name__, "red")
            status = 1
        sys.exit(status)


def _way_out(error: click.ClickException) -> str:
    if not isinstance(error, click.UsageError) or not error.ctx:
        return ""
    dash = isinstance(error, click.NoSuchOption) and error.ctx.info_name == "send"
    return f" ({'a message that begins with - goes after --; ' * dash}see {error.ctx.command_path} --help)"


def _print_versions(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        import zmq

        click.echo(f"zmqmsg {version('zmqmsg')}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}")
        ctx.exit()


@click.group(cls=Messenger, context_settings={"auto_envvar_prefix": "ZMQMSG", "show_default": True})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=_print_versions,
    help="Show the versions.",
)
def cli() -> None:
    """Send messages over ZeroMQ's REQ/REP from the command line, and echo them.

    \b
    In one terminal:
      zmqmsg serve
    In another:
      zmqmsg send "first message" "second message"

    \b
    Every option can come from the environment: ZMQMSG_SEND_TIMEOUT=2.
    Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.
    """


_TO_BIND, _TO_CONNECT = Endpoint(bind=True), Endpoint(bind=False)
_KEY_FILE = click.Path(dir_okay=False)
_INPUT_FILE = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)
_key = click.option("--key", type=_KEY_FILE, help="This end's CURVE secret key file, created if missing.")


@cli.command()
@click.option(
    "-b", "--bind", type=_TO_BIND, multiple=True, help=f"Bind here; repeatable.  [default: {DEFAULT_ENDPOINT}]"
)
@click.option("-c", "--connect", type=_TO_CONNECT, multiple=True, help="Work for the queue (DEALER) here; repeatable.")
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="Stop after N requests.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print the requests.")
@click.option("-0", "--null", is_flag=True, help="End what is printed with NUL, not newline.")
@click.option("--max-size", type=Size(), default="64M", help="Refuse larger messages.")
@_key
@click.option("--client-keys", type=click.Path(), help="For --bind: file or folder of public keys to let in.")
@click.option("--server-key", type=_KEY_FILE, help="For --connect: the queue's CURVE public key file.")
def serve(
    bind: tuple[str, ...],
    connect: tuple[str, ...],
    count: int | None,
    quiet: bool,
    null: bool,
    max_size: int,
    key: str | None,
    client_keys: str | None,
    server_key: str | None,
) -> None:
    """Bind a REP socket and echo every request, printing it.

    \b
    Examples:
      zmqmsg serve
      zmqmsg serve --bind 'tcp://*:5555' --bind ipc:///tmp/echo.sock
      zmqmsg serve --count 1 --quiet
      zmqmsg serve --connect tcp://127.0.0.1:5556

    Ctrl-C or SIGTERM ends it after the request in hand. Exit status: 0 ended so or by --count, 1 something failed,
    2 wrong usage.
    """
    import zmq

    from zmqmsg.reply import FLUSH_LIMIT, Echo, Stuck, flush
    from zmqmsg.sockets import bound, is_local, open_socket

    bind = bind or (() if connect else (DEFAULT_ENDPOINT,))
    keys = _load_keys(key, client_keys, server_key, binds=bool(bind), connects=bool(connect))
    output = console.Output(b"\0" if null else b"\n")

    with ExitStack() as stack:
        echo = Echo(None if quiet else output.write, count, lambda: output.written)
        stack.enter_context(echo.stopped_by_signals())
        context: Context = zmq.Context(1 + len(connect))
        stack.callback(flush, context)
        open_rep = partial(open_socket, context, zmq.REP, max_size=max_size, linger=FLUSH_LIMIT)
        listener = stack.enter_context(open_rep())
        if keys and bind:
            keys.secure_server(listener)
        workers = _open_connections(stack, connect, keys, open_rep)
        for endpoint in bind:
            real = stack.enter_context(bound(listener, endpoint))
            console.tell(f"listening on {real}")
            if not keys and not is_local(real):
                console.tell(
                    f"warning: anyone who can reach {real} can use it; close it by --key and --client-keys", "yellow"
                )
        with suppress(Stuck):
            try:
                echo.run(listener if bind else None, workers)
            except Stuck:
                echo.hand_over("standard output blocks: the last request is not wholly printed", console.tell)
            echo.hand_over(f"{echo.served} request{'s' * (echo.served != 1)} served", console.tell)


@cli.command()
@click.option(
    "-c", "--connect", type=_TO_CONNECT, multiple=True, default=[DEFAULT_ENDPOINT], help="Connect here; repeatable."
)
@click.option("-t", "--timeout", type=Seconds(), help="How long one attempt waits.  [default: for ever]")
@click.option(
    "-r", "--retries", type=click.IntRange(min=0), default=3, metavar="N", help="Attempts after a lost reply."
)
@click.option(
    "-f", "--file", type=_INPUT_FILE, multiple=True, help="Send a whole file, - is standard input; repeatable."
)
@click.option("-m", "--multipart", is_flag=True, help="Send all messages as the frames of one request.")
@click.option("-0", "--null", is_flag=True, help="End messages with NUL, not newline, on standard input and output.")
@click.option("--max-size", type=Size(), default="64M", help="Refuse larger replies.")
@_key
@click.option("--server-key", type=_KEY_FILE, help="The server's CURVE public key file.")
@click.argument("message", nargs=-1)
def send(
    connect: tuple[str, ...],
    timeout: float | None,
    retries: int,
    file: tuple[str, ...],
    multipart: bool,
    null: bool,
    max_size: int,
    key: str | None,
    server_key: str | None,
    message: tuple[str, ...],
) -> None:
    """Send each MESSAGE as a request and print each reply.

    With neither MESSAGE nor --file, each line of standard input is one.

    \b
    Examples:
      zmqmsg send hello "a second message"
      zmqmsg send --timeout 2 --retries 0 ping || echo "no answer"
      tail -f log | zmqmsg send --connect tcp://127.0.0.1:5556
      zmqmsg send --file question.json | jq .answer

    Exit status: 0 all replies came, 1 something failed, 2 wrong usage, 130 interrupted.
    """
    import zmq

    from zmqmsg.request import Requester
    from zmqmsg.sockets import open_socket

    keys = _load_keys(key, None, server_key, binds=False, connects=True)
    end = b"\0" if null else b"\n"
    output = console.Output(end)
    # Never terminated: that would wait for an I/O thread that resolves a name.
    context: Context = zmq.Context.instance(1 + len(connect))

    with ExitStack() as stack:
        open_req = partial(open_socket, context, zmq.REQ, max_size=max_size)
        connections = _open_connections(stack, connect, keys, open_req)
        requester = Requester(
            connections, console.tell, timeout=timeout or math.inf, retries=retries, output=output.descriptor
        )
        messages = console.read_messages(message, file, end, output.descriptor, requester.update)
        if multipart:
            frames = list(messages)
            if not frames:
                raise click.UsageError("--multipart needs at least one message")
            output.write(requester.ask(frames))
            return
        for text in stack.enter_context(closing(console.show_progress(messages, message, file))):
            output.write(requester.ask([text]))


def _load_keys(
    key: str | None, clients: str | None, server: str | None, *, binds: bool, connects: bool
) -> "Keys | None":
    """Return the keys in the files that the options name; raise UsageError unless they are what is needed."""
    if bool(clients) != bool(key and binds) or bool(server) != bool(key and connects):
        raise click.UsageError(
            "an end that binds needs --key and --client-keys, one that connects --key and --server-key"
        )
    if not key:
        return None

    from pathlib import Path

    from zmqmsg.curve import Keys

    try:
        return Keys.load(Path(key), Path(clients) if clients else None, Path(server) if server else None, console.tell)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _open_connections(
    stack: ExitStack, endpoints: tuple[str, ...], keys: "Keys | None", open_socket: "Callable[..., Socket]"
) -> "list[Connection]":
    """Connect a socket to each of ``endpoints``, to be closed with ``stack``.

    Each is served by its own thread of libzmq, since one that resolves a name, for seconds maybe, does nothing else.
    """
    from zmqmsg.monitor import Connection

    secure = keys.secure_client if keys else None
    return [
        stack.enter_context(
            closing(Connection(endpoint, partial(open_socket, thread=thread, secure=secure), console.tell))
        )
        for thread, endpoint in enumerate(endpoints, 1)
    ]
