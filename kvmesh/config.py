"""Settings: frozen dataclasses whose fields are flags, environment variables and entries of a file, in that order.

    @dataclass(frozen=True)
    class ShopConfig(ServiceConfig):
        shelves: int = setting(3, "Shelves to put up.")

    @click.command()
    @options(ShopConfig, "SHOP")
    def shop(config: ShopConfig) -> None: ...

takes --shelves, else KVMESH_SHOP_SHELVES, else `shelves` in the table [shop] of the file named by --config, else 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import split_address
from kvmesh.sizes import parse_size

if TYPE_CHECKING:
    from kvmesh.guard import Access
    from kvmesh.tls import Tls

T = TypeVar("T")

LEVELS = ("debug", "info", "warning", "error")
# What a TOML file may say for a field of each kind.
_IN_FILE: dict[type, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), bool: (bool,)}


def home() -> Path:
    """Where files are kept that nobody gave another place: $KVMESH_HOME, else ~/.kvmesh."""
    given = os.environ.get("KVMESH_HOME", "")
    return Path(given).expanduser() if given else Path.home() / ".kvmesh"


def setting(default: T, help: str) -> T:
    """A field with a default and a help text; a default for --help to show in words goes into it as [default: …]."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TraceConfig:
    """Where spans go."""

    trace_ratio: float = setting(1.0, "Share of requests that are traced, 0 to 1; 0 turns tracing off.")
    otlp_endpoint: str = setting("", "http://HOST:PORT of an OTLP gRPC collector that gets the spans too.")
    trace_dir: str = setting("", "Folder of the span files. [default: traces in $KVMESH_HOME]")

    def __post_init__(self) -> None:
        if not 0 <= self.trace_ratio <= 1:
            raise InvalidArgument(f"trace_ratio = {self.trace_ratio} is not between 0 and 1")
        if self.otlp_endpoint:
            _check_endpoint(self.otlp_endpoint)


@dataclass(frozen=True)
class ServiceConfig(TraceConfig):
    """What every service can be told."""

    listen: str = setting("127.0.0.1:0", "HOST:PORT to serve on; port 0 takes a free one.")
    announce: str = setting("", "File to write the address to, once it is bound.")
    metrics: str = setting("", "HOST:PORT of a page with Prometheus metrics; port 0 takes a free one. [default: none]")
    log_level: str = setting("info", "debug, info, warning or error.")
    tls_ca: str = setting("", "PEM file of the CA whose certificates are believed; turns TLS on. See docs/security.md.")
    tls_cert: str = setting("", "PEM file of the service's own certificate.")
    tls_key: str = setting("", "PEM file of its key.")
    max_message: str = setting("64MiB", "Largest message that is taken from a caller.")

    def __post_init__(self) -> None:
        super().__post_init__()
        split_address(self.listen)
        if (self.tls_ca or self.tls_cert or self.tls_key) and not (self.tls_ca and self.tls_cert and self.tls_key):
            raise InvalidArgument("give all of --tls-ca, --tls-cert and --tls-key, or none")
        if not 4096 <= parse_size(self.max_message, "max_message") <= 1 << 30:
            raise InvalidArgument(f"max_message = {self.max_message} is not between 4KiB and 1GiB")
        if self.metrics:
            split_address(self.metrics)
        if self.log_level not in LEVELS:
            raise InvalidArgument(f"log_level = {self.log_level!r} is not {', '.join(LEVELS[:-1])} or {LEVELS[-1]}")

    def tls(self) -> Tls | None:
        """What the service shows and believes; None without TLS. Raises InvalidArgument."""
        from kvmesh.tls import Tls

        return Tls.read(self.tls_ca, self.tls_cert, self.tls_key)

    def access(self) -> Access:
        """How it may be called: with TLS, by services of the mesh. Raises InvalidArgument."""
        from kvmesh.guard import Access, ServicesOnly

        tls = self.tls()
        return Access(
            tls, guard=ServicesOnly() if tls else None, message_bytes=parse_size(self.max_message, "max_message")
        )


def _check_endpoint(endpoint: str) -> None:
    url = urlsplit(endpoint)
    try:
        split_address(url.netloc)
    except InvalidArgument:
        url = url._replace(scheme="")
    if url.scheme not in ("http", "https"):
        raise InvalidArgument(f"otlp_endpoint = {endpoint!r} is not http://HOST:PORT or https://HOST:PORT")


def options(kind: type[Any], prefix: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a click command: it gets `config`, a `kind` made of flags, environment, file and defaults.

    `kind` is a dataclass of str, int, float, bool and tuple[str, ...] fields. An InvalidArgument that it raises is a
    usage error: status 2.
    """
    fields = _fields(kind)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_config(**given: Any) -> Any:
            return command(config=_make(kind, {name: given.pop(name) for name in fields}), **given)

        wrapped: Callable[..., Any] = with_config
        for name, hint in reversed(fields.items()):
            wrapped = _option(kind, prefix, name, hint)(wrapped)
        return _config_option(fields, prefix)(wrapped)

    return decorate


def _fields(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for name, hint in fields.items():
        if hint not in _IN_FILE and hint != tuple[str, ...]:
            raise TypeError(f"{kind.__qualname__}.{name} is {hint}, not str, int, float, bool or tuple[str, ...]")
    return fields


def _make(kind: type[T], values: dict[str, Any]) -> T:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise click.UsageError(f"{name} = {value} is not finite")
    try:
        return kind(**values)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from error


def _option(kind: type[Any], prefix: str, name: str, hint: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    flag, text = "--" + name.replace("_", "-"), field.metadata.get("help", "")
    several = hint not in _IN_FILE
    return click.option(
        f"{flag}/--no-{flag[2:]}" if hint is bool else flag,
        name,
        default=field.default,
        type=str if several else hint,
        multiple=several,
        help=text,
        envvar=f"KVMESH_{prefix}_{name.upper()}",
        show_envvar=True,
        show_default="[default:" not in text and field.default not in ("", ()),
    )


def _config_option(fields: dict[str, Any], prefix: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def read(context: click.Context, param: click.Parameter, path: str | None) -> None:
        if path is not None:
            try:
                values = _read_file(Path(path), prefix.lower(), fields)
            except InvalidArgument as error:
                raise click.BadParameter(str(error), context, param) from error
            context.default_map = {**(context.default_map or {}), **values}

    return click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        expose_value=False,
        is_eager=True,
        callback=read,
        envvar=f"KVMESH_{prefix}_CONFIG",
        show_envvar=True,
        help=f"TOML file of settings: for all services at its top, for this one in [{prefix.lower()}].",
    )


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content. Raises InvalidArgument naming the file."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"{path}: {error}") from error


def _read_file(path: Path, table: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The entries for one service; other tables are for others. Raises InvalidArgument naming file and entry."""
    content = read_toml(path)
    own = content.get(table, {})
    if not isinstance(own, dict):
        raise InvalidArgument(f"{path}: {table} is no table")
    values = {key: value for key, value in content.items() if not isinstance(value, dict)} | own
    for key, value in values.items():
        if key not in fields:
            raise InvalidArgument(f"{path}: there is no setting {key!r}; there is: {', '.join(fields)}")
        if not _fits(value, fields[key]):
            raise InvalidArgument(f"{path}: {key} = {value!r} is not of type {_name(fields[key])}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    if hint in _IN_FILE:
        return type(value) in _IN_FILE[hint]
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _name(hint: Any) -> str:
    return hint.__name__ if hint in _IN_FILE else "list of strings"
