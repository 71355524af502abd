"""`/v1/microserving`: the sub-request calls of single engines as REST, for those who like curl.

Bodies and answers are the messages of kv.proto and engine.proto in protobuf's JSON form, with the names of the fields.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from kvmesh.errors import InvalidArgument, MeshError, NotFound, from_rpc
from kvmesh.v1 import engine_pb2, kv_pb2
from services.router.http.errors import error_object
from services.router.http.stream import while_connected
from services.router.link import EngineLink
from services.router.view import MeshView

M = TypeVar("M", bound=Message)
CALL_S = 120.0
Fields = dict[str, Any]


class Microserving:
    """The routes, over the engines that the router sees."""

    def __init__(self, view: MeshView) -> None:
        self._view = view
        self.router = APIRouter(prefix="/v1/microserving", tags=["sub-requests"])
        self.router.get("/engines")(self.engines)
        self.router.post("/{engine}/prep_recv")(self.prep_recv)
        self.router.post("/{engine}/remote_send")(self.remote_send)
        self.router.post("/{engine}/start_generate")(self.start_generate)
        self.router.post("/{engine}/release")(self.release)

    async def engines(self) -> Fields:
        """Names of the engines that can be called."""
        return {"engines": sorted(name for name, link in self._view.links.items() if link.connected)}

    async def prep_recv(self, engine: str, http: Request, body: Fields = Body(...)) -> Response:  # noqa: B008
        """Reserves slots for token_ids[matched:end); the answer's `ticket` goes into the calls that follow."""
        return await self._call(engine, lambda link: link.kv.PrepRecv, kv_pb2.PrepRecvRequest(), body, http)

    async def remote_send(self, engine: str, http: Request, body: Fields = Body(...)) -> Response:  # noqa: B008
        """Has this engine prefill and send token_ids[begin:end) into a ticket of another one."""
        return await self._call(engine, lambda link: link.kv.RemoteSend, kv_pb2.RemoteSendRequest(), body, http)

    async def release(self, engine: str, http: Request, body: Fields = Body(...)) -> Response:  # noqa: B008
        """Gives a ticket back."""
        return await self._call(engine, lambda link: link.kv.Release, kv_pb2.ReleaseRequest(), body, http)

    async def start_generate(self, engine: str, http: Request, body: Fields = Body(...)) -> Response:  # noqa: B008
        """Generates; server-sent events, one a message."""
        link = self._link(engine)
        request = _parse(engine_pb2.StartGenerateRequest(), body)
        call = link.engine.StartGenerate(request, timeout=CALL_S)
        try:
            first = await while_connected(http, call.read())
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, link.name) from error
        except BaseException:
            call.cancel()
            raise
        return StreamingResponse(_lines(link, call, first), media_type="text/event-stream")

    def _link(self, engine: str) -> EngineLink:
        link = self._view.links.get(engine)
        if link is None:
            raise NotFound(f"engine = {engine!r} is unknown; there is: {', '.join(sorted(self._view.links)) or 'none'}")
        return link

    async def _call(
        self,
        engine: str,
        method: Callable[[EngineLink], Callable[..., Awaitable[Message]]],
        request: M,
        body: Fields,
        http: Request,
    ) -> Response:
        link = self._link(engine)
        message = _parse(request, body)
        try:
            answer = await while_connected(http, _awaited(method(link)(message, timeout=CALL_S)))
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, link.name) from error
        return JSONResponse(_fields(answer))


async def _awaited(call: Awaitable[Message]) -> Message:
    return await call


def _parse(message: M, body: Fields) -> M:
    # Raises UnicodeEncodeError for half of a surrogate pair, which protobuf stumbles over.
    json.dumps(body, ensure_ascii=False).encode()
    try:
        ParseDict(body, message)
    except (ParseError, ValueError, TypeError) as error:
        raise InvalidArgument(f"the body is no {message.DESCRIPTOR.name}: {error}") from None
    return message


def _fields(message: Message) -> Fields:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


async def _lines(link: EngineLink, call: Any, first: Any) -> AsyncGenerator[str, None]:
    try:
        message = first
        while isinstance(message, engine_pb2.StartGenerateResponse):
            yield f"data: {json.dumps(_fields(message))}\n\n"
            message = await call.read()
    except grpc.aio.AioRpcError as error:
        failure: MeshError = from_rpc(error, link.name)
        yield f"data: {json.dumps(error_object(failure))}\n\n"
    finally:
        call.cancel()
    yield "data: [DONE]\n\n"
