"""gRPC as all services use it: servers with health and reflection, channels, errors, addresses.

grpc itself is imported when it is used: command lines import this module for `split_address`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import ipaddress
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvmesh.errors import RETRY_AFTER, TOLD, DeadlineExceeded, Internal, InvalidArgument, MeshError, Unavailable
from kvmesh.sizes import MESSAGE_BYTES

if TYPE_CHECKING:
    import grpc
    import grpc.aio

    from kvmesh.guard import Access
    from kvmesh.tls import Tls

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

# gRPC refuses calls whose trailers have more than 8 KiB.
STATUS_CHARS = 1000
# Calls that end by themselves are given this long when a server stops.
GRACE_S = 1.0
_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", re.ASCII)

_COMMON: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # A peer that vanished without a word is noticed within 15 s, also between calls.
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER = [
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_ping_strikes", 0),
]
_CHANNEL = [
    *_COMMON,
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the time that one attempt to connect is given.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Else a new channel waits with an older one of this process that could not reach the port's former owner.
    ("grpc.use_local_subchannel_pool", 1),
]


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 host is in brackets. Raises InvalidArgument."""
    found = _HOST_PORT.fullmatch(address)
    if found is None or int(found[3]) > 65535:
        raise InvalidArgument(f"address {address!r} is not HOST:PORT")
    return found[1] or found[2], int(found[3])


def join_address(host: str, port: int) -> str:
    """HOST:PORT, the reverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announce(path: str | Path, address: str) -> None:
    """Writes `address` to the file in one step; an empty path means no file. Raises OSError."""
    if not path or not str(path):
        return
    target = Path(path)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{address}\n")
        os.replace(scratch, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise


def _keep_engine() -> None:
    """Keeps gRPC's asyncio engine for the life of the process.

    It ends with the last channel or server otherwise, which the garbage collector finds; and if a call was forgotten
    there, that waits for ever.
    """
    import grpc.aio

    grpc.aio.init_grpc_aio()  # type: ignore[attr-defined]


def loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, as far as its text tells."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """An asyncio channel that connects, and reconnects, by itself; its owner closes it.

    With `tls` of files it takes certificates that are renewed there.
    """
    import grpc.aio

    _keep_engine()
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL)

    def make(now: Tls) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, now.channel_credentials(), options=_CHANNEL)

    if tls.files is None:
        return make(tls)
    from kvmesh.renewal import RenewedChannel

    return RenewedChannel(make, tls.files)


def connector(tls: Tls | None) -> Callable[[str], grpc.aio.Channel]:
    """`channel` with what the caller holds."""
    return functools.partial(channel, tls=tls)


def blocking_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """A channel for threads; its owner closes it."""
    import grpc

    if tls is None:
        return grpc.insecure_channel(address, options=_CHANNEL)
    return grpc.secure_channel(address, tls.channel_credentials(), options=_CHANNEL)


async def wait_serving(address: str, timeout: float, service: str = "", tls: Tls | None = None) -> None:
    """Waits until the server there, or one service of it, says SERVING.

    Raises DeadlineExceeded after `timeout` seconds, Unimplemented when what listens there has no health service.
    """
    deadline, last = time.monotonic() + timeout, "nothing answers"
    async with channel(address, tls) as ch:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + timeout):
                while True:
                    last = await _watch_health(ch, service, deadline)
                    if last == "SERVING":
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            what = f"{service} at {address}" if service else address
            raise DeadlineExceeded(f"{what} does not serve after {timeout:g} s: {last}") from None


async def _watch_health(ch: grpc.aio.Channel, service: str, deadline: float) -> str:
    """Follows one health stream to SERVING, or says why it ended."""
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from kvmesh.errors import Unimplemented, from_rpc

    call = health_pb2_grpc.HealthStub(ch).Watch(
        health_pb2.HealthCheckRequest(service=service), timeout=max(0.01, deadline - time.monotonic())
    )
    try:
        async for answer in call:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return "SERVING"
        return "the server stopped"
    except grpc.aio.AioRpcError as error:
        if isinstance(failure := from_rpc(error), Unimplemented):
            raise failure from error
        return str(failure)
    finally:
        call.cancel()


def time_left(context: grpc.aio.ServicerContext[Any, Any], default: float) -> float:
    """Seconds until the caller's deadline; `default` if it has set none."""
    left = context.time_remaining()
    return default if left is None else float(left)


class Server:
    """A gRPC server with health checking and reflection, bound to `listen` when it is made.

    `register` adds the services, `names` are their full names; `access` says who may call. `address` is where it
    listens, also for port 0. Make it in a running event loop. Other processes may listen there too if all are
    `shared`. Raises InvalidArgument for a `listen` that is no HOST:PORT, Unavailable when it is taken.
    """

    def __init__(
        self,
        listen: str,
        register: Callable[[Any], object],
        names: Sequence[str],
        access: Access | None = None,
        *,
        shared: bool = False,
    ) -> None:
        import grpc.aio
        from grpc_health.v1 import health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        from kvmesh.guard import Access, Gate
        from kvmesh.health import Health
        from kvmesh.parsing import Careful

        access = access or Access()

        host, _ = split_address(listen)
        self._names = list(names)
        self._health = Health(["", *names])
        _keep_engine()
        gates = [] if access.guard is None else [Gate(access.guard, _refuse)]
        # Two servers on one port share its connections.
        own = [("grpc.max_receive_message_length", access.message_bytes), ("grpc.so_reuseport", int(shared))]
        self._server = grpc.aio.server(options=[*_SERVER, *own], interceptors=gates)
        self._started = False
        register(Careful(self._server, _refuse))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection([*names, health, reflection.SERVICE_NAME], self._server)
        try:
            if access.tls is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, access.tls.server_credentials(access.mutual))
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {listen}: is the address in use, or not one of this host?") from error
        if access.tls is None and not loopback(host):
            log.warning("%s is not loopback, and there is no TLS: whoever reaches it may call it", listen)
        self.address = join_address(host, port)

    async def start(self) -> None:
        """Answers calls from now on; health says NOT_SERVING until `ready`."""
        self._started = True
        await self._server.start()

    async def ready(self) -> None:
        """Health says SERVING from now on."""
        self._health.set_serving(True)

    async def stop(self, grace: float = GRACE_S) -> None:
        """Refuses new calls, gives running ones `grace` seconds, then cancels them. May be called without `start`."""
        self._health.close()
        if not self._started:
            # Only a server that was started lets go of its port.
            await self.start()
            grace = 0
        await self._server.stop(grace)


def rpc(method: F) -> F:
    """Decorator of a servicer's method: its MeshErrors become gRPC statuses, any other failure a logged INTERNAL.

    For methods that return a message, write to the context, or yield; the last are closed when the call ends.
    """
    if inspect.isasyncgenfunction(method):

        async def call(self: Any, request: Any, context: Any) -> Any:
            try:
                async with aclosing(method(self, request, context)) as answers:
                    async for answer in answers:
                        await context.write(answer)
            except Exception as error:
                failure = error
            else:
                return
            await _refuse(method, context, failure)

    else:

        async def call(self: Any, request: Any, context: Any) -> Any:
            try:
                return await method(self, request, context)
            except Exception as error:
                failure = error
            await _refuse(method, context, failure)

    return functools.wraps(method)(call)  # type: ignore[return-value]


async def _refuse(method: Callable[..., Any], context: Any, error: Exception) -> None:
    """Ends the call with the status of `error`; always raises."""
    import grpc.aio

    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, MeshError):
        if context.cancelled() or isinstance(error, grpc.aio.InternalError):
            # What writing to a caller that is gone raises is of no interest to anybody.
            log.debug("%s: the caller is gone (%r)", method.__qualname__, error)
            raise asyncio.CancelledError
        log.error("%s failed", method.__qualname__, exc_info=error)
        error = Internal(f"{method.__name__} failed unexpectedly; see the log of the service")
    text = str(error)
    if len(text) > STATUS_CHARS:
        text = f"{text[: STATUS_CHARS - 1]}…"
    trailing = [(TOLD, "1")]
    if error.retry_after is not None:
        trailing.append((RETRY_AFTER, str(math.ceil(error.retry_after * 1000))))
    await context.abort(error.code, text, tuple(trailing))
