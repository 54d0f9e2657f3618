"""Options of the command line, and the types of their values."""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from zmqmsg.keys import is_key_for_path, looks_like_key

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
MIN_SIZE = 512  # bytes; libzmq applies the limit to the handshake as well (300 with CURVE)
MAX_SIZE = 1024 * UNITS["G"]


class Option(click.Option):
    """An option that can come from an environment variable, which errors name.

    click ignores a blank variable, so that a missing secret would turn authentication off. Here it
    is an empty value: an error for most types, and off for a flag.
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

    An address may consist of a key's characters, but is not a key.
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
    """A path of keys. An empty one, from an unset shell variable, must not turn an option off."""

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


BIND_ENDPOINT = Parsed("endpoint", partial(parse_endpoint, bind=True))
CONNECT_ENDPOINT = Parsed("endpoint", partial(parse_endpoint, bind=False))
SECONDS = Parsed("seconds", parse_seconds)
SIZE = Parsed("bytes", parse_size)
KEY_FILE = KeyPath(dir_okay=False)
KEY_FILES = KeyPath()
INPUT_FILE = InputPath(exists=True, dir_okay=False, readable=True, allow_dash=True)

option = partial(click.option, cls=Option)
flag = partial(option, is_flag=True)


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
    for param in ctx.command.params:
        if isinstance(param, Option) and is_from_environment(ctx, param):
            name = re.escape(param.opts[-1])
            text = re.sub(rf"{name}(?![\w-])", rf"\g<0> (from {param.variable(ctx)})", text)
    return text


def is_from_environment(ctx: click.Context, option: click.Option) -> bool:
    """Return whether the value of ``option`` comes from an environment variable."""
    return ctx.get_parameter_source(option.name or "") == ParameterSource.ENVIRONMENT
