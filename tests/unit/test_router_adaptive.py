"""The strategies that weigh: adaptive and context_migration."""

from __future__ import annotations

import asyncio
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
from services.router.strategies.adaptive import best_plan
from services.router.strategies.context_migration import holder_of
from services.router.strategies.outlook import MOST_BUSY, SPLITS, Outlook, Plan, foresee, plans

PROMPT = tuple((i * 37) % 200 + 1 for i in range(1000))


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
    return best_plan(request, Mesh(list(engines)))


def way(plan: Plan) -> tuple[str, str | None]:
    return plan.decoder.name, plan.prefiller and plan.prefiller.name


def test_an_idle_mesh_splits_nothing():
    assert way(best(Known("a"), Known("b"))) == ("a", None)


def test_where_the_prefix_is():
    assert way(best(Known("a"), Known("b", cached=900))) == ("b", None)


def test_those_who_decode_are_spared_a_prefill():
    # Eight who wait 200 ms for a prompt lose more than it costs to send it over.
    plan = best(Known("a", running=8), Known("b", pace=Pace(step=Line(0.2, 0.01))))
    assert way(plan) == ("a", "b") and plan.end == 999
    # Of one token they hardly notice anything.
    assert way(best(Known("a", running=8), Known("b", pace=Pace(step=Line(0.2, 0.01))), prompt=PROMPT[:1]))[1] is None


def test_sends_that_run_decode_nothing():
    # All that a does is prefill for others: nobody there loses by one more.
    slow = Pace(step=Line(0.2, 0.01))
    assert way(best(Known("a", running=1, sending=1, pace=slow), Known("b", running=6))) == ("b", "a")


def test_a_slow_wire_keeps_it_in_one_place():
    slow = Pace(step=Line(0.2, 0.01), send=Line(0.1, 0.05))
    assert best(Known("a", running=8), Known("b", pace=slow)).prefiller is None


def test_roles_come_of_themselves_and_stay():
    # Each prefills a third of its time. Who has more to decode is to be spared from now on, and so gets this one too.
    pace = Pace(busy=0.33, send=Line(0.001, 0.000001))
    plan = best(Known("a", pace=pace, running=2), Known("b", pace=pace, running=4), new=200)
    assert way(plan) == ("b", "a") and plan.end == 999


def test_what_is_to_be_expected():
    engines = [Known(f"e{i}", pace=Pace(busy=0.5), running=r) for i, r in enumerate((5, 0, 9, 3))]
    outlooks = [Outlook(e, 0) for e in engines]
    foresee(outlooks)
    assert [o.busy for o in outlooks] == pytest.approx([0.2, MOST_BUSY, 0.0, MOST_BUSY])


def test_a_queue_is_gone_around():
    assert best(Known("a", waiting_tokens=20_000), Known("b")).decoder.name == "b"
    assert best(Known("a", credit_tokens=20_000, assigned_tokens=20_000), Known("b")).decoder.name == "b"


def test_what_has_been_reported_is_not_counted_twice():
    assert Load(waiting_tokens=3000, credit_tokens=3000, assigned_tokens=3000).queued_tokens == 3000
    assert Load(waiting_tokens=1000, credit_tokens=3000, assigned_tokens=6000).queued_tokens == 4000
    # What other routers sent is known by the report only.
    assert Load(waiting_tokens=5000, credit_tokens=0, assigned_tokens=0).queued_tokens == 5000


def test_measured_speeds_decide():
    fast = Pace(prefill=Line(0.001, 0.00002), step=Line(0.005, 0.001), measured=9)
    assert best(Known("a"), Known("b", pace=fast)).decoder.name == "b"


def test_a_prompt_of_one_token_and_a_lone_engine():
    assert best(Known("a"), Known("b"), prompt=(7,)).prefiller is None
    assert best(Known("a", running=50)).prefiller is None


def test_a_part_is_prefilled_elsewhere_and_the_rest_where_it_is_decoded():
    """Every plan that is thought of can be carried out, and costs what its parts cost."""
    engines = [Outlook(Known(f"e{i}", cached=c), c) for i, c in enumerate((0, 300, 999))]
    found = list(plans(engines, 1000, 10))
    assert {way(p) for p in found} >= {(f"e{i}", None) for i in range(3)} | {("e0", "e1"), ("e1", "e0"), ("e0", "e2")}
    assert all(p.end <= 999 and p.own > 0 and p.others >= 0 and p.cost == p.own + p.others for p in found)
    assert len({p.end for p in found if way(p) == ("e0", "e1")}) == len(SPLITS)
    # What is cached is never sent.
    assert all(p.end > 300 for p in found if way(p) == ("e1", "e0"))


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


async def test_a_burst_does_not_run_to_one_engine(h, monkeypatch):
    """What is to be sent counts as load of the sender at once, not when the receiver has made room."""
    from services.router.strategies import adaptive

    seen = []

    def split(request: Request, mesh: Mesh) -> Plan:
        first, second, third = mesh.engines
        seen.append((second.load.credit_tokens, third.load.credit_tokens))
        helper = min((second, third), key=lambda e: e.load.credit_tokens)
        return Plan(first, helper, len(request.token_ids) - 1, 0.0, 0.0)

    monkeypatch.setattr(adaptive, "best_plan", split)
    prompts = [PROMPT[i:] for i in range(4)]
    results = await asyncio.gather(*(h.generate(p, strategy="adaptive") for p in prompts))
    assert [r.tokens for r in results] == [answer(list(p), 8) for p in prompts]
    assert len(set(seen)) == 4 and seen[-1][0] > 900 and seen[-1][1] > 900
    await h.idle()
