"""What it takes the router to decide where a request goes, by strategy and number of engines.

    python -m benchmarks decisions

A router's own view, links, indexes, policies and strategies, over engines that are never called: a decision begins
where the model is looked up, and ends with the strategy's first sub-request. Between two decisions what the last one
charged comes in, and some engines report.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from statistics import median
from typing import Any

from opentelemetry.trace import INVALID_SPAN, NoOpTracer

from kvmesh.aio import Tasks
from kvmesh.blocks import block_hashes
from kvmesh.strategy import POLICIES, Mesh, Request
from kvmesh.v1.common_pb2 import Endpoint, SamplingParams
from kvmesh.v1.engine_pb2 import CacheChange, EngineInfo, EngineStatus, LoadReport, ModelInfo
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from services.router.attempt import Attempt
from services.router.board import catalog
from services.router.handles import EngineHandle, Handles
from services.router.ledger import Ledger
from services.router.link import EngineLink
from services.router.livepool import LivePool
from services.router.policies import all_policies
from services.router.view import MeshView
from simulator.run import Choice

ENGINES = (10, 100, 1000)
CHOICES = (
    "data_parallel",
    *(f"data_parallel,policy={p}" for p in POLICIES[1:]),
    "prefill_decode",
    "prefill_decode,prefill=4",
    "balanced_prefill_decode",
    "adaptive",
    "context_migration",
    "store_backed",
)
PROMPT, SHARED, DECISIONS, REPORTS = 2048, 1024, 300, 5


class _Decided(Exception):
    """The strategy has made its first sub-request."""


class _Handle(EngineHandle):
    """Notes what a strategy calls first."""

    def _decided(self, *given: Any, **more: Any) -> Any:
        raise _Decided(self._link)

    prep_recv = remote_send = start_generate = _decided


class _Handles(Handles):
    def of(self, link: EngineLink) -> EngineHandle:
        if link not in self._made:
            self._made[link] = _Handle(self.attempt, link)
        return self._made[link]


class _Link(EngineLink):
    """Without a stream."""

    async def _follow(self) -> None:
        await asyncio.Event().wait()


class _World:
    """A view of `count` engines, some of them with some of the prompts' beginnings."""

    def __init__(self, count: int) -> None:
        self.draw = random.Random(count)
        self.view = MeshView(make_link=_Link)
        self.tasks = Tasks()
        endpoints = [
            Endpoint(name=f"engine-{i}", address=f"10.0.0.1:{i + 1}", incarnation=f"{i}") for i in range(count)
        ]
        members = {e.name: Member(endpoint=e, kind=MEMBER_KIND_ENGINE) for e in endpoints}
        self.view.update(members)
        model = ModelInfo(name="m", vocab_size=32000, context_length=8192)
        self.links = list(self.view.links.values())
        # Every prompt begins like all others; some engines have a whole one of before.
        shared = [self.draw.randrange(32000) for _ in range(SHARED)]
        self.prompts = [tuple(shared + [self.draw.randrange(32000) for _ in range(PROMPT - SHARED)]) for _ in range(64)]
        for link in self.links:
            link._deliver(
                EngineStatus(info=EngineInfo(endpoint=link.member.endpoint, model=model, total_slots=100_000))
            )
            link.listen()
            for prompt in self.draw.sample(self.prompts, 2):
                link._deliver(EngineStatus(cache=CacheChange(stored=block_hashes(prompt))))
            self.reports(link)

    def reports(self, link: EngineLink) -> None:
        draw = self.draw
        report = LoadReport(
            running_requests=draw.randrange(20), waiting_tokens=draw.randrange(4) * draw.randrange(2000)
        )
        link._deliver(EngineStatus(load=report))

    async def close(self) -> None:
        await self.view.close()
        await self.tasks.close()


async def _seconds(world: _World, text: str) -> list[float]:
    """Of each decision, the first ones left out."""
    choice = Choice.parse(text)
    strategy, policies = catalog()[choice.strategy], all_policies(random.Random(1))
    values = strategy.bind(choice.params)
    took: list[float] = []
    for number, prompt in zip(range(DECISIONS + 20), itertools.cycle(world.prompts), strict=False):
        for link in world.draw.choices(world.links, k=REPORTS):
            world.reports(link)
        sampling = SamplingParams(max_new_tokens=128)
        session = f"s{number % 50}"
        begin = time.perf_counter()
        model = world.view.model("")
        request = Request(f"r{number}", prompt, sampling, model.name, time.monotonic() + 60, session=session)
        attempt = Attempt(request, Ledger(len(prompt), begin), NoOpTracer(), INVALID_SPAN, world.tasks)
        mesh = Mesh(LivePool(world.view.candidates(model.name), _Handles(attempt)), policies)
        chunks = strategy(request, mesh, **values)
        try:
            await anext(chunks)
        except _Decided as decided:
            took.append(time.perf_counter() - begin)
            link = decided.args[0]
            world.links[world.links.index(link)].charge(1, len(prompt))
        attempt.close()
    return took[20:]


async def _table() -> list[tuple[str, list[float]]]:
    rows: dict[str, list[float]] = {}
    for count in ENGINES:
        world = _World(count)
        for text in CHOICES:
            rows.setdefault(text, []).append(median(await _seconds(world, text)))
        await world.close()
    return list(rows.items())


def main() -> None:
    """Prints the table."""
    rows = asyncio.run(_table())
    width = max(len(label) for label, _ in rows) + 2
    print(f"a decision, median, µs{'':<{width - 22}}" + "".join(f"{f'{n} engines':>14}" for n in ENGINES))
    for label, seconds in rows:
        print(f"{label:<{width}}" + "".join(f"{1e6 * s:>14.0f}" for s in seconds))
