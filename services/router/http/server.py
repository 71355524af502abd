"""The HTTP server, in the router's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from kvmesh import __version__
from kvmesh.aio import Tasks
from kvmesh.apikeys import ApiKeys
from kvmesh.errors import Internal, InvalidArgument, MeshError, NotFound, Unavailable
from kvmesh.grpcx import join_address, loopback, split_address
from kvmesh.renewal import keep
from kvmesh.sizes import MESSAGE_BYTES
from services.router.door import Door
from services.router.http.dashboard import Dashboard
from services.router.http.errors import error_response
from services.router.http.gate import Gate
from services.router.http.microserving import Microserving
from services.router.http.openai import OpenAi
from services.router.service import RouterService
from services.router.view import MeshView

log = logging.getLogger(__name__)

STOP_S = 3.0


def make_app(
    door: Door,
    view: MeshView,
    service: RouterService,
    traces: list[Path],
    keys: ApiKeys | None = None,
    body_bytes: int = MESSAGE_BYTES,
) -> FastAPI:
    """All routes; /docs and /openapi.json describe them. `traces`: folders of span files, for the dashboard.

    With `keys` callers need one of them.
    """
    app = FastAPI(
        title="kvmesh router",
        version=__version__,
        description="OpenAI's API, and kvmesh's sub-request calls.",
        # Only so that /docs has a place to enter the key: the gate looks at it.
        dependencies=[] if keys is None else [Depends(HTTPBearer(auto_error=False))],
    )
    app.add_middleware(Gate, keys=keys, body_bytes=body_bytes)
    app.include_router(OpenAi(door, view).router)
    app.include_router(Microserving(view).router)
    app.include_router(Dashboard(service, door.recent, traces).router)

    @app.get("/health", tags=["health"])
    async def health() -> Response:
        """200 when a request can be served, else 503."""
        if not view.connected:
            return error_response(Unavailable("no engine is connected"))
        return Response(status_code=200)

    async def failed(_request: Request, error: Exception) -> Response:
        assert isinstance(error, MeshError)
        return error_response(error)

    async def malformed(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_response(InvalidArgument(f"{where or 'body'}: {first['msg']}"))

    async def refused(request: Request, error: Exception) -> Response:
        """What the framework refuses by itself."""
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):
            return error_response(NotFound(f"there is no {request.method} {request.url.path}; see /docs"))
        response = error_response(InvalidArgument(f"body: {error.detail}"))
        response.status_code = error.status_code
        return response

    async def no_text(_request: Request, _error: Exception) -> Response:
        return error_response(InvalidArgument("a text of the body has half of a surrogate pair: it is no Unicode"))

    async def unexpected(_request: Request, _error: Exception) -> Response:
        """The server logs the error itself."""
        return error_response(Internal("the request failed unexpectedly; see the log of the service"))

    app.add_exception_handler(MeshError, failed)
    app.add_exception_handler(UnicodeEncodeError, no_text)
    app.add_exception_handler(Exception, unexpected)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, refused)
    return app


class _Server(uvicorn.Server):
    """Signals are the service's own matter."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(
    listen: str, app: Any, certificate: str = "", key: str = "", shared: bool = False
) -> AsyncIterator[str]:
    """Serves `app`, over TLS with the PEM files given; the address. Others may share it if `shared`.

    Raises Unavailable when it cannot be bound.
    """
    host, port = split_address(listen)
    if not certificate and not loopback(host):
        log.warning("%s is not loopback, and there is no TLS: what is sent there can be read on the way", listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise Unavailable(f"cannot listen on {listen}: {error.strerror}") from error
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(STOP_S),
        loop="none",
        ssl_certfile=certificate or None,
        ssl_keyfile=key or None,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([bound]), name="http")
    keeping = Tasks()
    if certificate:
        keeping.start(keep(lambda: config.ssl, certificate, key), "renew certificates")
    try:
        up = asyncio.ensure_future(server.up.wait())
        await asyncio.wait({up, task}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if task.done():
            task.result()
            raise Unavailable(f"the HTTP server on {listen} ended at once")
        yield join_address(host, bound.getsockname()[1])
    finally:
        await keeping.close()
        server.should_exit = True
        await asyncio.wait({task}, timeout=STOP_S + 1)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        bound.close()
