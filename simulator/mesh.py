"""Router and simulated engines in one process: the services' own classes, on an in-process network."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, cast

from kvmesh.aio import Tasks
from kvmesh.bench.records import Record
from kvmesh.bench.targets import not_prefilled
from kvmesh.bench.workloads import Ask
from kvmesh.config import TraceConfig
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender
from kvmesh.endpoint.tickets import TicketBook
from kvmesh.membership import SharedSettings
from kvmesh.sim.peers import LocalPeers
from kvmesh.sim.profile import Profile
from kvmesh.telemetry import Telemetry
from kvmesh.tokenizer import Tokenizers
from kvmesh.v1.common_pb2 import Endpoint, SamplingParams
from kvmesh.v1.engine_pb2 import CacheChange, EngineInfo, EngineStatus
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from kvmesh.v1.router_pb2 import GenerateRequest, GenerateResponse
from services.engine.main import describe
from services.engine.service import EngineService
from services.engine.sim.content import Arithmetic
from services.engine.sim.faults import Faults
from services.engine.sim.runtime import SimRuntime
from services.engine.sim.scheduler import Host
from services.engine.status import PERIOD_S, Status
from services.router.admission import Admission
from services.router.board import StrategyBoard, catalog
from services.router.door import Door
from services.router.link import EngineLink
from services.router.runtime import Runtime as RouterRuntime
from services.router.storelink import StoreLinks
from services.router.view import MeshView
from simulator.network import Network
from simulator.stores import StoreNode

HOST_ID = "simulated"
# Decode steps that are handed out together while nothing else happens.
SPAN = 64
STORE_MEMORY = 64 << 30


class NoTokenizers:
    """In place of kvmesh.tokenizer.Tokenizers: prompts are token ids."""

    async def get(self, path: str) -> None:
        """There is none."""


class Node:
    """One engine: all of the engine service, over a simulated runtime, without a server."""

    def __init__(
        self,
        name: str,
        profile: Profile,
        network: Network,
        peers: LocalPeers,
        arithmetic: Arithmetic,
        seed: int,
        host: Host,
    ) -> None:
        self.name = name
        self.faults = Faults()
        self.runtime = SimRuntime(
            profile,
            peers,
            faults=self.faults,
            seed=seed,
            now=time.monotonic,
            span=SPAN,
            arithmetic=arithmetic,
            host=host,
        )
        self._network = network
        self._profile = profile
        # At the same seed, the same.
        incarnation = f"{random.Random(f'{seed} {name}').getrandbits(128):032x}"
        self.endpoint = Endpoint(name=name, address=f"{name}:1", incarnation=incarnation)
        self.info = EngineInfo()

    async def start(self, stack: AsyncExitStack) -> None:
        """Serves, until `stack` ends it."""
        runtime = self.runtime
        await runtime.start()
        self.info = describe(self.endpoint, runtime, self._profile.model.name, "")
        self.book = TicketBook(self.endpoint, runtime.layout.fingerprint, runtime.free)
        receiver = Receiver(runtime, self.book, HOST_ID)
        sender = Sender(self.endpoint, runtime, HOST_ID, self._network.channel)
        self.status = Status(self.info, runtime, self.book)
        tokenizers = cast("Tokenizers", NoTokenizers())
        telemetry = Telemetry("engine", self.name, TraceConfig(trace_ratio=0))
        service = EngineService(runtime, self.book, receiver, sender, self.status, tokenizers, telemetry)
        self._network.serve(self.endpoint.address, service)
        stack.push_async_callback(runtime.stop)
        stack.push_async_callback(self.book.close)
        stack.push_async_callback(sender.close)
        stack.callback(self._network.leave, self.endpoint.address)

    def kill(self) -> None:
        """As a crash: whoever calls it is told so."""
        self._network.leave(self.endpoint.address)

    @property
    def member(self) -> Member:
        """As in the registry."""
        return Member(endpoint=self.endpoint, kind=MEMBER_KIND_ENGINE, host_id=HOST_ID)


class SimLink(EngineLink):
    """A link that is told of the engine's load by the engine itself, as often as a status stream would tell.

    A thousand streams of fifty messages a second would be most of the work of a simulation.
    """

    def __init__(
        self, node: Node, network: Network, member: Member, tasks: Tasks, on_change: Callable[[], None]
    ) -> None:
        self._node = node
        self._due = 0.0
        self._told = False
        super().__init__(member, tasks, on_change, network.channel)

    async def _follow(self) -> None:
        self._describe(self._node.info)
        self._look()
        self._node.runtime.on_load = self._node.book.on_change = self._tell
        await self._node.runtime.died()
        self._node.kill()
        self._down()

    def _tell(self) -> None:
        """The engine's load has changed: it is looked at now, or when a stream would send the next report."""
        if self._told:
            return
        loop = asyncio.get_running_loop()
        self._told = True
        if loop.time() >= self._due:
            loop.call_soon(self._look)
        else:
            loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._told = False
        self._due = asyncio.get_running_loop().time() + PERIOD_S
        self._deliver(EngineStatus(load=self._node.status.load()))

    def _reopen(self) -> None:
        """The engine tells of its cache from now on, directly."""
        index = self._cache
        if index is None:
            return

        def tell(stored: Sequence[int], removed: Sequence[int], snapshot: bool) -> None:
            index.apply(CacheChange(snapshot=snapshot, stored=stored, removed=removed))

        self._node.runtime.on_cache = tell
        self._node.runtime.watch_cache()


@dataclass(frozen=True)
class Around:
    """What a mesh has besides its engines: `stores` KV stores of `store_memory` bytes of KV each, and ways.

    In seconds, `latency`: of a call between services, one way; `front`: what a request spends outside of the engines
    besides, on its way from the client and back.
    """

    latency: float = 0.0005
    front: float = 0.0
    stores: int = 0
    store_memory: int = STORE_MEMORY


USUAL = Around()


class SimMesh:
    """A router over `count` engines of one profile."""

    def __init__(self, profile: Profile, count: int, seed: int = 0, around: Around = USUAL) -> None:
        self.profile = profile
        self.front = around.front
        self._network = Network(around.latency)
        peers = LocalPeers()
        arithmetic = Arithmetic(profile.model.context_length)
        host = Host()
        self.nodes = [
            Node(f"engine-{i}", profile, self._network, peers, arithmetic, seed * 100_003 + i, host)
            for i in range(count)
        ]
        self.stores = [
            StoreNode(f"store-{i}", profile, around.store_memory, self._network, peers, seed, HOST_ID)
            for i in range(around.stores)
        ]
        self._members: list[Node | StoreNode] = [*self.nodes, *self.stores]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> SimMesh:
        try:
            for member in self._members:
                await member.start(self._stack)
            await self._start_router()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start_router(self) -> None:
        nodes = {node.name: node for node in self.nodes}

        def make_link(member: Member, tasks: Tasks, on_change: Callable[[], None]) -> EngineLink:
            return SimLink(nodes[member.endpoint.name], self._network, member, tasks, on_change)

        self.view = MeshView(make_link=make_link, stores=StoreLinks(self._network.channel))
        self._stack.push_async_callback(self.view.close)
        telemetry = Telemetry("router", "router", TraceConfig(trace_ratio=0))
        # Settings are what a registry keeps: here each request names its strategy.
        board = StrategyBoard(catalog(), "data_parallel", cast("SharedSettings", None))
        runtime = RouterRuntime(self.view, telemetry.tracer)
        self._stack.push_async_callback(runtime.close)
        # No limits: what waits, waits at the engines.
        admission = Admission(0, 0, 0, time.monotonic)
        self.door = Door(self.view, board, runtime, cast("Tokenizers", NoTokenizers()), telemetry, admission)
        self.view.update({member.name: member.member for member in self._members})
        async with asyncio.timeout(10):
            await self.view.wait_connected(len(self.nodes))
            await self.view.stores.wait_connected(len(self.stores))

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()


class MeshTarget:
    """A load's target: the router of a SimMesh, by one strategy."""

    def __init__(self, mesh: SimMesh, strategy: str, params: dict[str, str]) -> None:
        self._mesh = mesh
        self._strategy = strategy
        self._params = params
        self._number = 0

    async def ask(self, ask: Ask, record: Record, timeout: float) -> None:
        """One request."""
        now = asyncio.get_running_loop().time
        self._number += 1
        request = GenerateRequest(
            request_id=f"sim-{self._number}",
            sampling=SamplingParams(max_new_tokens=ask.max_new_tokens, temperature=0, ignore_eos=True),
            strategy=self._strategy,
            strategy_params=self._params,
            session=ask.session,
        )
        request.tokens.ids.extend(ask.tokens(self._mesh.profile.model.vocab_size))

        async def take(message: GenerateResponse) -> None:
            if message.HasField("delta"):
                if message.delta.token_ids:
                    record.tokens.append((now(), len(message.delta.token_ids)))
            elif message.HasField("done"):
                record.cached_tokens = not_prefilled(ask.prompt_tokens, message.done.shares)

        if self._mesh.front:
            await asyncio.sleep(self._mesh.front)
        await self._mesh.door.generate(request, None, timeout, take)

    async def close(self) -> None:
        """Nothing is kept open."""
