"""The Operator service: moves contexts, and takes engines out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from kvmesh.errors import Aborted, DeadlineExceeded, InvalidArgument, MeshError, NotFound, from_rpc
from kvmesh.grpcx import rpc, time_left
from kvmesh.ranges import check_tokens
from kvmesh.v1 import operator_pb2 as pb
from kvmesh.v1 import operator_pb2_grpc
from kvmesh.v1.engine_pb2 import LeaveRequest
from services.router.door import Door
from services.router.draining import Draining
from services.router.link import EngineLink
from services.router.move import MAX_HOTTEST, ContextMover
from services.router.storelink import StoreLink

if TYPE_CHECKING:
    Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

log = logging.getLogger(__name__)

NAME = "kvmesh.v1.Operator"
REQUEST_S = 300.0
LEAVE_S = 10.0
# How often it is looked whether an engine is idle, and for how long it must have been: a request that was on its way
# when the mark came is there by then.
LOOK_S, QUIET_S = 0.1, 1.0
# A mark outlives its drain by so much.
MARK_S = 15.0


class OperatorService(operator_pb2_grpc.OperatorServicer):
    """kvmesh.v1.Operator. What it is given stays its giver's."""

    def __init__(self, mover: ContextMover, draining: Draining, door: Door) -> None:
        self._mover = mover
        self._draining = draining
        self._door = door

    @rpc
    async def Migrate(self, request: pb.MigrateRequest, context: Context) -> pb.MigrateResponse:
        """Moves contexts, one after another."""
        deadline = time.monotonic() + time_left(context, REQUEST_S)
        source, target = self._mover.link("source", request.source), self._mover.link("target", request.target)
        self._mover.check_pair(source, target)
        moved = [
            await self._mover.move(source, target, tokens, request.salt, max(0.01, deadline - time.monotonic()))
            for tokens in await self._contexts(request, source)
        ]
        return pb.MigrateResponse(contexts=moved)

    async def _contexts(self, request: pb.MigrateRequest, source: EngineLink) -> list[tuple[int, ...]]:
        what = request.WhichOneof("what")
        if what is None:
            raise InvalidArgument("what is to be moved is missing: give text, tokens or hottest")
        if what == "hottest":
            return await self._mover.hottest(source, request.hottest)
        assert source.info is not None
        model = source.info.model
        if what == "text":
            return [await self._door.text_prompt(model.name, request.text)]
        tokens = tuple(request.tokens.ids)
        check_tokens(tokens, model.vocab_size, model.context_length)
        return [tokens]

    @rpc
    async def Drain(self, request: pb.DrainRequest, context: Context) -> AsyncIterator[pb.DrainResponse]:
        """Takes an engine out, and tells how it goes."""
        left = time_left(context, REQUEST_S)
        deadline = time.monotonic() + left
        if request.hottest > MAX_HOTTEST:
            raise InvalidArgument(f"hottest = {request.hottest} is more than {MAX_HOTTEST}")
        engine = self._mover.link("engine", request.engine)
        if isinstance(engine, StoreLink):
            raise NotFound(f"engine = {request.engine!r} is a KV store")
        target = self._mover.link("target", request.target) if request.target else None
        if target is not None:
            self._mover.check_pair(engine, target)
        incarnation = engine.member.endpoint.incarnation
        engine.acquire()
        gone = False
        try:
            await self._draining.mark(incarnation, left + MARK_S)
            async for running in self._idle(engine, deadline):
                yield pb.DrainResponse(running=running)
            if request.hottest:
                for tokens in await self._mover.hottest(engine, request.hottest):
                    yield pb.DrainResponse(moved=await self._moved(engine, target, tokens, deadline))
            try:
                await engine.engine.Leave(LeaveRequest(stop=request.stop), timeout=LEAVE_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error, engine.name) from error
            gone = True
            yield pb.DrainResponse(left=True)
        finally:
            if not gone:
                await asyncio.shield(self._unmark(incarnation))
            engine.release()

    async def _idle(self, engine: EngineLink, deadline: float) -> AsyncIterator[int]:
        """What runs on the engine, each time that changes; ends when nothing has for a while. Raises MeshError."""
        told, quiet = -1, time.monotonic()
        while True:
            if not engine.connected:
                raise Aborted(f"{engine.name} was lost while it was drained")
            report = engine.report
            running = report.running_requests + report.waiting_requests + report.tickets + report.sending
            now = time.monotonic()
            if running:
                quiet = now
            if running != told:
                told = running
                yield running
            # A report from after the mark, and then some.
            if now - quiet >= QUIET_S and engine.reported > quiet:
                return
            if now >= deadline:
                raise DeadlineExceeded(f"{running} requests still run on {engine.name}")
            await asyncio.sleep(LOOK_S)

    async def _moved(
        self, engine: EngineLink, target: EngineLink | None, tokens: tuple[int, ...], deadline: float
    ) -> pb.Migrated:
        try:
            chosen = target or self._mover.targets(engine, tokens)
        except MeshError as error:
            return pb.Migrated(tokens=len(tokens), error=str(error))
        return await self._mover.move(engine, chosen, tokens, "", max(0.01, deadline - time.monotonic()))

    async def _unmark(self, incarnation: str) -> None:
        try:
            await self._draining.unmark(incarnation)
        except MeshError as error:
            log.warning("the mark of a drain that failed stays until it runs out: %s", error)
