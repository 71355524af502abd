"""The indexes over many engines give the answers that looking at each engine would give, whatever has happened."""

from __future__ import annotations

import asyncio
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan, NoOpTracer, SpanContext

from kvmesh.aio import Tasks
from kvmesh.blocks import block_hashes
from kvmesh.pool import Pool
from kvmesh.strategy import POLICIES, Engine, Mesh, Request
from kvmesh.v1.common_pb2 import Endpoint, SamplingParams
from kvmesh.v1.engine_pb2 import CacheChange, EngineInfo, EngineStatus, LoadReport, ModelInfo
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from services.router import link as links
from services.router import roster as rosters
from services.router.attempt import Attempt
from services.router.handles import Handles
from services.router.kvindex import BlockMap, CacheIndex
from services.router.ledger import Ledger
from services.router.link import EngineLink
from services.router.livepool import LivePool
from services.router.policies import all_policies
from services.router.view import MeshView

BLOCK = 16
# Prompts that begin alike, to different depths.
PROMPTS = [tuple([1] * shared + [n + 2] * (6 * BLOCK)) for n, shared in enumerate((0, BLOCK, BLOCK, 3 * BLOCK, 80))]


class Link(EngineLink):
    """Without a stream: the test delivers."""

    async def _follow(self) -> None:
        await asyncio.Event().wait()

    def says(self, **status: Any) -> None:
        self._deliver(EngineStatus(**status))


def member(name: str, life: int, role: str = "") -> Member:
    endpoint = Endpoint(name=name, address="127.0.0.1:9", incarnation=f"{name}.{life}")
    return Member(endpoint=endpoint, kind=MEMBER_KIND_ENGINE, labels={"role": role} if role else {})


class World:
    """A view over links to which things happen, at times of its own."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rosters, "LISTEN_S", -1.0)
        monkeypatch.setattr(links, "channel", lambda address: None)
        self.now = 1000.0
        monkeypatch.setattr(links, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.draw = random.Random(seed)
        self.view = MeshView(make_link=Link)  # type: ignore[arg-type]
        self.members: dict[str, Member] = {}
        self.charged: list[tuple[EngineLink, int]] = []
        self.background = Tasks()

    @property
    def links(self) -> list[Link]:
        return list(self.view.links.values())  # type: ignore[arg-type]

    def join(self, name: str, life: int, role: str = "") -> None:
        self.members[name] = member(name, life, role)
        self.view.update(self.members)
        info = EngineInfo(
            endpoint=self.members[name].endpoint,
            model=ModelInfo(name="m", vocab_size=100, context_length=1000),
            cache_block_tokens=BLOCK if self.draw.random() < 0.8 else 2 * BLOCK,
        )
        self.view.links[name]._deliver(EngineStatus(info=info))

    def happens(self) -> None:
        draw, link = self.draw, self.draw.choice(self.links)
        self.now += draw.random() * 0.1
        match draw.randrange(12):
            case 0 | 1 | 2:
                link.says(load=LoadReport(running_requests=draw.randrange(4), waiting_tokens=draw.randrange(3) * 50))
            case 3 | 4:
                self.charged.append((link, link.charge(1, draw.randrange(3) * 50)))
            case 5:
                if self.charged:
                    charged, number = self.charged.pop(draw.randrange(len(self.charged)))
                    charged.settle(number)
            case 6 | 7 | 8 | 9:
                hashes = block_hashes(draw.choice(PROMPTS), link.block_tokens)
                some = hashes[: draw.randrange(len(hashes) + 1)]
                if draw.random() < 0.3:
                    link.says(cache=CacheChange(removed=some[-2:]))
                else:
                    link.says(cache=CacheChange(stored=some, snapshot=draw.random() < 0.1))
            case 10:
                link.suspect = draw.random() < 0.5
                if draw.random() < 0.3:
                    for _ in range(3):
                        link.failed()
            case 11:
                life = draw.randrange(1000)
                if draw.random() < 0.3:
                    link._down()
                else:
                    self.join(link.name, life, dict(link.labels).get("role", ""))

    def pool(self, token_ids: tuple[int, ...]) -> LivePool:
        request = Request("r", token_ids, SamplingParams(), "m", time.monotonic() + 60)
        span = NonRecordingSpan(SpanContext(0, 0, False))
        attempt = Attempt(request, Ledger(1, 0.0), NoOpTracer(), span, self.background)
        return LivePool(self.view.candidates("m"), Handles(attempt))

    async def close(self) -> None:
        await self.view.close()
        await self.background.close()


def names(engines: Any) -> list[str]:
    return [e.name for e in engines]


def same_answers(live: Pool, token_ids: tuple[int, ...], draw: random.Random) -> None:
    naive, n = Pool(list(live)), draw.randrange(1, 5)
    assert names(live.calmest(n)) == names(naive.calmest(n))
    assert names(live.nearest(token_ids, n)) == names(naive.nearest(token_ids, n))
    assert live.fullest(token_ids).name == naive.fullest(token_ids).name
    gains = {e.name: draw.randrange(4) for e in live if draw.random() < 0.5}
    likely = sorted(((g + draw.randrange(2), name) for name, g in gains.items()), reverse=True)

    def gain(engine: Engine) -> int:
        return gains.get(engine.name, 0)

    assert names(live.cheapest(n, gain, likely, 100)) == names(naive.cheapest(n, gain, likely, 100))
    assert [names(part) for part in live.split(n)] == [names(part) for part in naive.split(n)]
    for engine in naive:
        assert (engine in live and engine in live.split(1)[0]) or engine in live.split(1)[1]


@pytest.mark.parametrize(("seed", "roles"), [(1, False), (2, False), (3, True)])
async def test_the_same_answers_as_by_looking_at_every_engine(seed, roles, monkeypatch):
    monkeypatch.setattr(rosters, "KEPT", 20)
    world = World(seed, monkeypatch)
    for i in range(23):
        world.join(f"engine-{i}", 0, ("prefill", "decode", "")[i % 3] if roles else "")
    for _ in range(600):
        for _ in range(world.draw.randrange(30)):
            world.happens()
        prompt = world.draw.choice(PROMPTS)
        live = world.pool(prompt)
        if not len(live):
            continue
        # By the state of every link, as it was before there were indexes.
        up = [k for k in world.links if k.connected]
        right = [k for k in up if not (k.suspect or k.suspended)] or up
        assert sorted(names(live)) == sorted(k.name for k in right)
        assert names(live) == names(Mesh(list(live)).engines)
        same_answers(live, prompt, world.draw)
        for part in live.split(world.draw.randrange(1, 4)):
            same_answers(part, prompt, world.draw)


async def test_policies_choose_the_same_over_an_index_as_over_a_list(monkeypatch):
    world = World(4, monkeypatch)
    for i in range(40):
        world.join(f"engine-{i}", 0)
    indexed, listed = all_policies(random.Random(1)), all_policies(random.Random(1))
    for step in range(400):
        for _ in range(world.draw.randrange(10)):
            world.happens()
        prompt, session = world.draw.choice(PROMPTS), world.draw.choice(("", "a", "b", "c"))
        live = world.pool(prompt)
        if not len(live):
            continue
        request = Request(f"r{step}", prompt, SamplingParams(), "m", 0.0, session=session)
        for policy in POLICIES:
            part = world.draw.choice((live, *live.split(2)))
            one = Mesh(live, indexed).pick(request, policy, part)
            other = Mesh(live, listed).pick(request, policy, list(part))
            assert one.name == other.name, policy


def test_who_has_how_many_blocks():
    draw, shared = random.Random(5), BlockMap()
    indexes = [CacheIndex(blocks=shared) for _ in range(12)]
    prompts = [block_hashes(p, BLOCK) for p in PROMPTS]
    for _ in range(400):
        i = draw.randrange(len(indexes))
        match draw.randrange(8):
            case 0:
                indexes[i].close()
                indexes[i] = CacheIndex(blocks=shared)
            case 1 | 2:
                hashes = draw.choice(prompts)
                indexes[i].apply(CacheChange(removed=draw.sample(hashes, 2)))
            case _:
                hashes = draw.choice(prompts)
                indexes[i].apply(CacheChange(stored=hashes[: draw.randrange(len(hashes) + 1)]))
        assert len({index.bit for index in indexes}) == len(indexes)
        hashes, some = draw.choice(prompts), draw.sample(indexes, 8)
        among = sum(index.bit for index in some)
        levels = shared.levels(hashes, among)
        assert [depth for depth, _ in levels] == sorted({depth for depth, _ in levels})
        for index in some:
            most = max((depth for depth, held in levels if held & index.bit), default=0)
            assert most == index.matched(hashes)
        assert all(not held & ~among for _, held in levels)
    for index in indexes:
        index.close()
    assert not shared._holders and not shared._used


@pytest.mark.parametrize("question", ["calmest", "nearest", "fullest", "policies"])
async def test_few_of_many_engines_are_looked_at(question, monkeypatch):
    world = World(6, monkeypatch)
    for i in range(400):
        world.join(f"engine-{i}", 0)
    prompt = PROMPTS[4]
    world.pool(prompt).nearest(prompt)
    for i, link in enumerate(world.links):
        link.says(load=LoadReport(waiting_tokens=i))
        # All have the beginning, a few have more of it.
        hashes = block_hashes(prompt, link.block_tokens)
        link.says(cache=CacheChange(stored=hashes[: 2 if i % 100 else 4]))
    policies = all_policies(random.Random(1))
    world.pool(prompt).nearest(prompt)
    for policy in POLICIES:
        Mesh(world.pool(prompt), policies).pick(Request("r", prompt, SamplingParams(), "m", 0.0, session="s"), policy)
    looked = 0
    plain = EngineLink.load.fget

    def load(link: EngineLink) -> Any:
        nonlocal looked
        looked += 1
        return plain(link)  # type: ignore[misc]

    monkeypatch.setattr(EngineLink, "load", property(load))
    world.links[0].says(load=LoadReport(waiting_tokens=5))
    live = world.pool(prompt)
    if question == "policies":
        for policy in POLICIES:
            Mesh(live, policies).pick(Request("r", prompt, SamplingParams(), "m", 0.0, session="s"), policy)
    elif question == "fullest":
        live.fullest(prompt)
    else:
        getattr(live, question)(*([prompt] if question == "nearest" else []))
    assert looked < 40 and len(live._handles._made) < 40
