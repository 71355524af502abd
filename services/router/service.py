"""The Router service: gRPC's door to the mesh."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc.aio

from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import rpc, time_left
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1 import router_pb2_grpc
from kvmesh.v1.common_pb2 import Endpoint
from services.router.board import StrategyBoard, describe
from services.router.door import REQUEST_S, Door
from services.router.folder import StrategyFolder
from services.router.lineup import Guard
from services.router.tally import Tally
from services.router.view import MeshView

NAME = "kvmesh.v1.Router"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RouterService(router_pb2_grpc.RouterServicer):
    """kvmesh.v1.Router. What it is given stays its giver's; `registry_connected` tells whether the registry answers.

    With a `tally` it tells the numbers of all workers.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        view: MeshView,
        board: StrategyBoard,
        door: Door,
        registry_connected: Callable[[], bool],
        folder: StrategyFolder | None = None,
        tally: Tally | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._view = view
        self._board = board
        self._door = door
        self._registry_connected = registry_connected
        self._folder = folder
        self._tally = tally

    @rpc
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Runs one request. Answers by context.write: so a cancel is raised here, not in a forgotten iterator."""
        timeout = time_left(context, REQUEST_S)
        await self._door.generate(request, context.invocation_metadata(), timeout, context.write)

    @rpc
    async def ListStrategies(self, request: pb.ListStrategiesRequest, context: Context) -> pb.ListStrategiesResponse:
        """All strategies, by name."""
        strategies = sorted(self._board.strategies.values(), key=lambda s: s.name)
        infos = [describe(s) for s in strategies]
        return pb.ListStrategiesResponse(strategies=infos if self._folder is None else self._folder.annotate(infos))

    @rpc
    async def GetStrategy(self, request: pb.GetStrategyRequest, context: Context) -> pb.GetStrategyResponse:
        """The one in force, the one on trial, and those before."""
        now = self._board.lineup
        return pb.GetStrategyResponse(
            strategy=now.main.message(),
            trial=None if now.trial is None else now.trial.message(),
            history=[past.message() for past in now.history],
        )

    @rpc
    async def SetStrategy(self, request: pb.SetStrategyRequest, context: Context) -> pb.SetStrategyResponse:
        """Puts one in force or on trial, or goes back, on all routers."""
        if request.rollback:
            if request.name or request.params or request.share_percent or request.HasField("guard"):
                raise InvalidArgument("rollback = true goes with no other field")
            choice = await self._board.rollback("asked for")
        else:
            guard = Guard.of(request.guard) if request.HasField("guard") else None
            choice = await self._board.set(request.name, request.params, request.share_percent, guard)
        return pb.SetStrategyResponse(strategy=choice.message())

    @rpc
    async def GetMesh(self, request: pb.GetMeshRequest, context: Context) -> pb.GetMeshResponse:
        """The mesh as seen from here."""
        return self.mesh()

    def mesh(self) -> pb.GetMeshResponse:
        """What GetMesh answers."""
        now, now_serving = time.monotonic(), self._board.lineup
        running, waiting = (self._door.running, self._door.waiting) if self._tally is None else self._tally.sums
        engines = [
            pb.MeshEngine(
                member=link.member,
                info=link.info,
                load=link.report,
                connected=link.connected,
                load_age_seconds=now - link.reported,
                suspended=link.suspended,
            )
            for _, link in sorted(self._view.links.items())
        ]
        return pb.GetMeshResponse(
            engines=engines,
            strategy=now_serving.main.message(),
            trial=None if now_serving.trial is None else now_serving.trial.message(),
            registry_connected=self._registry_connected(),
            running_requests=running,
            waiting_requests=waiting,
            router=self._endpoint,
            stores=self._view.stores.describe(now),
        )
