"""The strategies that weigh: adaptive and context_migration."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from fake_engine import answer
from router_harness import Harness

from kvmesh.blocks import block_hashes
from kvmesh.errors import Unavailable
from kvmesh.pace import Line, Pace
from kvmesh.strategy import Engine, Load, Mesh, Request
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.engine_pb2 import LoadReport
from services.router.policies import all_policies
from services.router.strategies.adaptive import Plan, best_plan
from services.router.strategies.context_migration import holder_of

PROMPT = tuple((i * 37) % 200 + 1 for i in range(1000))
TARGET = 0.05


class Known(Engine):
    """An engine that is only looked at."""

    def __init__(self, name: str, cached: int = 0, pace: Pace | None = None, **load: int) -> None:
        self.name, self.labels, self._cached, self._pace, self._load = name, {}, cached, pace or Pace(), Load(**load)

    @property
    def load(self) -> Load:
        return self._load

    @property
    def pace(self) -> Pace:
        return self._pace

    def cached(self, token_ids: Sequence[int]) -> int:
        return min(self._cached, len(token_ids))

    prep_recv = remote_send = start_generate = release = None  # type: ignore[assignment]


def best(*engines: Engine, prompt: Sequence[int] = PROMPT, new: int = 50) -> Plan:
    request = Request("r", tuple(prompt), SamplingParams(max_new_tokens=new), "m", 0.0)
    return best_plan(request, Mesh(list(engines)), TARGET, 0.0)


def test_an_idle_mesh_splits_nothing():
    plan = best(Known("a"), Known("b"))
    assert (plan.decoder.name, plan.prefiller) == ("a", None)


def test_where_the_prefix_is():
    plan = best(Known("a"), Known("b", cached=900))
    assert (plan.decoder.name, plan.prefiller) == ("b", None)


def test_an_engine_that_decodes_much_is_spared_a_long_prefill():
    # b is slow at decoding: the answer belongs to a, whose others must not wait 200 ms for one prompt.
    slow = Pace(step=Line(0.2, 0.01))
    plan = best(Known("a", running=8), Known("b", pace=slow))
    assert plan.decoder.name == "a" and plan.prefiller.name == "b" and plan.end == 999
    # A short one does not hurt them.
    plan = best(Known("a", running=8), Known("b", pace=slow), prompt=PROMPT[:50])
    assert (plan.decoder.name, plan.prefiller) == ("a", None)


def test_a_slow_wire_keeps_it_in_one_place():
    slow = Pace(step=Line(0.2, 0.01), send=Line(0.1, 0.05))
    plan = best(Known("a", running=8), Known("b", pace=slow))
    assert plan.prefiller is None


def test_a_queue_is_gone_around():
    assert best(Known("a", waiting_tokens=20_000), Known("b")).decoder.name == "b"
    assert best(Known("a", credit_tokens=20_000), Known("b")).decoder.name == "b"


def test_measured_speeds_decide():
    fast = Pace(prefill=Line(0.001, 0.00002), step=Line(0.005, 0.001), measured=9)
    assert best(Known("a"), Known("b", pace=fast)).decoder.name == "b"


def test_a_prompt_of_one_token_and_a_lone_engine():
    assert best(Known("a"), Known("b"), prompt=(7,)).prefiller is None
    assert best(Known("a", running=50)).prefiller is None


def test_choosing_stays_cheap_on_a_large_mesh_and_some_requests_explore():
    mesh = Mesh([Known(f"e{i}", running=i) for i in range(200)])
    picks = Counter(
        best_plan(Request(f"r{i}", PROMPT[:9], SamplingParams(), "m", 0.0), mesh, TARGET, 0.1).decoder.name
        for i in range(1000)
    )
    assert 880 < picks["e0"] < 920 and len(picks) > 50


def held_by(*cached: int, session: str = "") -> tuple[str, str, int]:
    """(home of the session, holder of the context, how much of it)."""
    mesh = Mesh([Known(f"e{i}", c) for i, c in enumerate(cached)], all_policies())
    request = Request("r", PROMPT, SamplingParams(), "m", 0.0, session=session)
    engine, amount = holder_of(request, mesh, 64)
    return mesh.pick(request, "session_sticky").name, engine.name, amount


def test_the_holder_of_a_context():
    assert held_by(0, 640, 0)[1:] == ("e1", 640)
    for session in map(str, range(10)):
        # What all have alike, or hardly anybody, says nothing: the session decides.
        home, holder, held = held_by(640, 640, 640, session=session)
        assert (holder, held) == (home, 640)
        home, holder, _ = held_by(0, 0, 32, session=session)
        assert holder == home


# Over the router


@pytest.fixture
async def h(tmp_path):
    async with Harness(3, tmp=tmp_path) as harness:
        yield harness


@pytest.mark.parametrize("name", ["adaptive", "context_migration"])
async def test_they_serve_and_go_on_when_an_engine_dies(h, name):
    for n in (1, 5, 1000):
        assert (await h.generate(PROMPT[:n], strategy=name, session="s")).tokens == answer(list(PROMPT[:n]), 8)
    for engine in h.engines[:2]:
        engine.die_after = 2
    assert (await h.generate(PROMPT, strategy=name, session="s")).tokens == answer(list(PROMPT), 8)
    await h.idle()


async def learnt(h: Harness) -> None:
    """Makes the router listen to the caches, and waits until it does."""
    await h.generate(PROMPT, 1, strategy="context_migration")
    for engine in h.engines:
        await engine.until(lambda e=engine: e.watches[-1])


async def test_a_context_stays_and_moves_when_the_load_shifts(h):
    await learnt(h)
    await h.engines[2].cache(block_hashes(PROMPT[:960]))
    async with asyncio.timeout(5):
        while (await h.generate(PROMPT, 1, strategy="context_migration")).done.shares[0].engine != "e2":
            await asyncio.sleep(0.01)
    for engine in h.engines:
        engine.calls.clear()
    await h.engines[2].report(LoadReport(running_requests=20, free_slots=10))
    await h.engines[0].report(LoadReport(running_requests=1, free_slots=10))
    async with asyncio.timeout(5):
        while not h.engines[1].calls:
            r = await h.generate(PROMPT, strategy="context_migration")
            assert r.tokens == answer(list(PROMPT), 8)
    assert h.engines[1].methods() == ["PrepRecv", "StartGenerate"] and "RemoteSend" in h.engines[2].methods()
    (send,) = h.engines[2].requests("RemoteSend")
    assert (send.begin, send.end) == (0, 960)
    assert r.share("e1").received_tokens == 960 and r.share("e1").prefilled_tokens == 40
    # A move that fails costs time, and nothing else.
    h.engines[2].faults["RemoteSend"] = Unavailable("gone")
    r = await h.generate(PROMPT, strategy="context_migration")
    assert r.tokens == answer(list(PROMPT), 8) and r.done.attempts == 1
    await h.idle()
