"""Placement policies: by themselves over engines that are only looked at, and in the router."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from fake_engine import answer
from router_harness import Harness

from kvmesh.blocks import block_hashes
from kvmesh.errors import InvalidArgument
from kvmesh.pace import Line
from kvmesh.strategy import POLICIES, Engine, Load, Mesh, Pool, Request
from kvmesh.v1.common_pb2 import GenerateUsage, SamplingParams
from kvmesh.v1.engine_pb2 import CacheChange, LoadReport
from kvmesh.v1.kv_pb2 import RemoteSendResponse
from services.router.kvindex import CacheIndex
from services.router.meter import FORGET_S, Fit, Meter, Paces
from services.router.policies import all_policies
from services.router.policies.prefix_affinity import BLOCK_TOKENS, PrefixAffinity

PROMPT = [(i * 37) % 200 + 1 for i in range(200)]


class Known(Engine):
    """An engine that is only looked at."""

    def __init__(self, name: str, work: int = 0, cached: int = 0) -> None:
        self.name, self.labels, self._work, self._cached = name, {}, work, cached

    @property
    def load(self) -> Load:
        return Load(waiting_tokens=self._work)

    def cached(self, token_ids: Sequence[int]) -> int:
        return self._cached

    prep_recv = remote_send = start_generate = release = None  # type: ignore[assignment]


def asks(token_ids: Sequence[int] = (1, 2, 3), session: str = "") -> Request:
    return Request("r", tuple(token_ids), SamplingParams(), "m", 0.0, session=session)


def mesh(*engines: Engine) -> Mesh:
    return Mesh(list(engines), all_policies(random.Random(1)))


def test_every_name_has_its_policy_and_others_are_refused():
    assert tuple(all_policies()) == POLICIES
    with pytest.raises(InvalidArgument, match="policy = 'best' is not one of least_load, round_robin"):
        mesh(Known("a")).pick(asks(), "best")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lone_engine_is_always_picked(policy):
    assert mesh(Known("a", 10)).pick(asks(PROMPT, "s"), policy).name == "a"


def test_least_load():
    assert mesh(Known("a", 2), Known("b", 1), Known("c", 1)).pick(asks(), "least_load").name == "b"


def test_round_robin_is_fair_within_every_subset_and_takes_in_who_joins():
    m = mesh(*(Known(n) for n in "abcd"))
    first, last = m.engines[:2], m.engines[2:]
    picked = [m.pick(asks(), "round_robin", pool).name for _ in range(4) for pool in (first, last)]
    assert picked == list("acbdacbd")
    joined = Known("e")
    assert [m.pick(asks(), "round_robin", [*m.engines, joined]).name for _ in range(5)] == list("eacbd")


def test_power_of_two_takes_the_better_of_two():
    m = mesh(*(Known(n, w) for n, w in zip("abcd", (0, 10, 20, 30), strict=True)))
    count = Counter(m.pick(asks(), "power_of_two").name for _ in range(600))
    # Of the six pairs three have a, two more b, one more c; d is never the better.
    assert count["d"] == 0
    assert abs(count["a"] - 300) < 60 and abs(count["b"] - 200) < 60 and abs(count["c"] - 100) < 60


def test_a_session_stays_and_an_engine_that_joins_takes_only_its_share():
    m = mesh(*(Known(f"e{i}", i) for i in range(4)))
    sessions = [f"s{i}" for i in range(400)]

    def homes(engines: list[Engine]) -> dict[str, str]:
        return {s: m.pick(asks(session=s), "session_sticky", engines).name for s in sessions}

    before = homes(m.engines)
    assert before == homes(list(reversed(m.engines)))
    assert all(60 < n < 140 for n in Counter(before.values()).values())
    after = homes([*m.engines, Known("e4")])
    moved = [s for s in sessions if before[s] != after[s]]
    assert {after[s] for s in moved} == {"e4"} and 50 < len(moved) < 110
    # One that leaves moves its own only.
    left = homes(m.engines[1:])
    assert all(left[s] == before[s] for s in sessions if before[s] != "e0")
    assert m.pick(asks(), "session_sticky").name == "e0"


def test_prefix_affinity_goes_where_the_beginning_went_unless_much_waits_there():
    m = mesh(a := Known("a"), b := Known("b"))
    assert m.pick(asks(PROMPT), "prefix_affinity") is a
    assert m.pick(asks(PROMPT[:150]), "prefix_affinity") is a
    assert m.pick(asks([9, *PROMPT]), "prefix_affinity") is a
    a._work = 100
    assert m.pick(asks([8, *PROMPT]), "prefix_affinity") is b
    assert m.pick(asks([*PROMPT, 1]), "prefix_affinity") is a
    a._work = 193
    assert m.pick(asks(PROMPT), "prefix_affinity") is b
    # An engine that was restarted has lost its cache.
    a._work, b.incarnation = 1, "new"
    assert m.pick(asks(PROMPT[:100]), "prefix_affinity") is a


def test_prefix_affinity_forgets_the_oldest_and_ends_before_beginnings():
    policy, engines = PrefixAffinity(remembered=8), Pool([Known("a"), Known("b")])
    for i in range(50):
        policy.pick(asks([i % 7 + 1] * (BLOCK_TOKENS * (i % 9 + 1))), engines)
        assert len(policy) <= 8
    policy = PrefixAffinity(remembered=2)
    policy.pick(asks(PROMPT), engines)
    engines[0]._work = 2 * BLOCK_TOKENS - 1
    assert policy.pick(asks(PROMPT), engines).name == "a"


def test_kv_aware_weighs_what_is_cached_against_what_waits():
    m = mesh(a := Known("a", 0, 0), b := Known("b", 100, 128))
    assert m.pick(asks(PROMPT), "kv_aware") is b
    b._work = 200
    assert m.pick(asks(PROMPT), "kv_aware") is a


def test_the_index_is_exact_and_bounded():
    hashes = block_hashes(PROMPT, 16)
    index = CacheIndex()
    index.apply(CacheChange(snapshot=True, stored=hashes[:5]))
    assert index.matched(hashes) == 5 and index.matched(block_hashes([5, *PROMPT], 16)) == 0
    index.apply(CacheChange(stored=hashes[5:8], removed=hashes[3:4]))
    assert index.matched(hashes) == 3 and len(index) == 7
    index.apply(CacheChange(snapshot=True))
    assert index.matched(hashes) == len(index) == 0
    small = CacheIndex(most_blocks=4)
    small.apply(CacheChange(stored=hashes))
    assert small.matched(hashes) == len(small) == 4
    small.apply(CacheChange(removed=hashes))
    assert len(small) == 0


def test_a_fit_finds_the_line_it_is_shown_and_follows_a_change():
    draw, fit = random.Random(3), Fit(Line(1, 1))
    assert fit.line == Line(1, 1)
    fit.add(100, 0.3)
    assert fit.line.at(100) == pytest.approx(0.3) and fit.line.each == pytest.approx(0.003)
    for each in (0.002, 0.01):
        for _ in range(400):
            x = draw.randrange(10, 2000)
            fit.add(x, 0.05 + each * x + draw.uniform(-0.01, 0.01))
        assert fit.line.each == pytest.approx(each, rel=0.05) and fit.line.fixed == pytest.approx(0.05, abs=0.02)
    fit.add(0, 5)
    fit.add(10, -1)
    assert fit.line.each == pytest.approx(0.01, rel=0.05)


def test_a_meter_takes_the_parts_apart():
    meter = Meter()
    assert meter.pace.measured == 0
    usage = GenerateUsage(
        prompt_tokens=300, cached_tokens=200, completion_tokens=11, prefill_seconds=0.5, decode_seconds=2
    )
    meter.generated(usage, running=4)
    meter.sent(
        RemoteSendResponse(
            computed_tokens=50, compute_seconds=0.25, sent_tokens=80, queue_seconds=0.1, cached_tokens=30
        ),
        0.75,
    )
    pace = meter.pace
    assert pace.measured == 2
    assert (pace.prefill.at(100), pace.step.at(4), pace.send.at(80)) == pytest.approx((0.5, 0.2, 0.4), rel=0.01)


def test_what_a_meter_has_not_measured_it_has_from_the_others_and_what_is_old_is_forgotten(monkeypatch):
    now = 100.0
    monkeypatch.setattr("services.router.meter.time.monotonic", lambda: now)
    together = Paces()
    slow, fresh = Meter(together), Meter(together)
    usage = GenerateUsage(prompt_tokens=100, prefill_seconds=1.0, completion_tokens=2, decode_seconds=0.5)
    for _ in range(30):
        slow.generated(usage, running=1)
    assert fresh.pace.prefill.at(100) == pytest.approx(1.0) and fresh.pace.prompt == pytest.approx(100)
    usage.prefill_seconds = 0.1
    for _ in range(200):
        fresh.generated(usage, running=1)
    assert fresh.pace.prefill.at(100) == pytest.approx(0.1)
    assert slow.pace.prefill.at(100) == pytest.approx(1.0)
    now += FORGET_S
    assert slow.pace.prefill.at(100) < 0.2


def test_a_meter_knows_how_much_of_the_time_goes_into_prefilling(monkeypatch):
    now = 100.0
    monkeypatch.setattr("services.router.meter.time.monotonic", lambda: now)
    meter = Meter()
    for _ in range(200):
        now += 0.5
        meter.prefilling(1000)
        meter.generated(GenerateUsage(prompt_tokens=1000, prefill_seconds=0.2), running=1)
    # 2,000 tokens a second at 0.2 ms each.
    assert meter.pace.busy == pytest.approx(0.4, abs=0.03)
    # A step was measured with that much of it lost to prefilling.
    for _ in range(200):
        meter.generated(GenerateUsage(completion_tokens=11, decode_seconds=0.2), running=4)
    assert meter.pace.step.at(4) == pytest.approx(0.02 * 0.6, rel=0.05)
    # What was cached was not prefilled, and what is long ago does not count.
    meter.prefilling(10_000)
    busy = meter.pace.busy
    meter.prefilling(-10_000)
    assert meter.pace.busy < busy
    now += 1000
    assert meter.pace.busy < 0.001
    meter.prefilling(10**9)
    assert meter.pace.busy == 0.9


def test_a_flat_fit_does_not_make_a_slope_of_nothing():
    fit = Fit(Line(1, 1), flat=True)
    for _ in range(20):
        fit.add(2, 0.3)
    assert fit.line == Line(pytest.approx(0.3), 0.0)


# In the router


@pytest.fixture
async def h(tmp_path):
    async with Harness(2, tmp=tmp_path) as harness:
        yield harness


async def picked(h: Harness, policy: str, **fields: str) -> str:
    r = await h.generate(PROMPT, 4, strategy="data_parallel", strategy_params={"policy": policy}, **fields)
    assert r.tokens == answer(PROMPT, 4)
    (share,) = r.done.shares
    return share.engine


async def test_round_robin_in_the_router(h):
    assert [await picked(h, "round_robin") for _ in range(4)] == ["e0", "e1", "e0", "e1"]


async def test_a_session_stays_in_the_router(h):
    homes = {s: await picked(h, "session_sticky", session=s) for s in map(str, range(8))}
    assert set(homes.values()) == {"e0", "e1"}
    assert {s: await picked(h, "session_sticky", session=s) for s in homes} == homes


async def test_kv_aware_listens_to_the_caches_only_when_it_is_asked(h):
    assert await picked(h, "least_load") == "e0"
    assert [e.watches for e in h.engines] == [[False], [False]]
    h.engines[1].blocks = block_hashes(PROMPT)
    assert await picked(h, "kv_aware") == "e0"
    for engine in h.engines:
        await engine.until(lambda e=engine: e.watches == [False, True])
    async with asyncio.timeout(5):
        while await picked(h, "kv_aware") != "e1":
            await asyncio.sleep(0.01)
    # What goes and comes is followed on the same stream.
    await h.engines[0].cache(block_hashes(PROMPT)[:2])
    await h.engines[1].cache([], removed=block_hashes(PROMPT)[1:])
    async with asyncio.timeout(5):
        while await picked(h, "kv_aware") != "e0":
            await asyncio.sleep(0.01)
    assert [e.watches for e in h.engines] == [[False, True]] * 2


async def test_the_cache_is_let_go_when_nobody_asks_any_more(h, monkeypatch):
    monkeypatch.setattr("services.router.link.CACHE_IDLE_S", 0.05)
    await picked(h, "kv_aware")
    for engine in h.engines:
        await engine.until(lambda e=engine: len(e.watches) >= 2)
    await asyncio.sleep(0.06)
    for engine in h.engines:
        await engine.report(LoadReport(free_slots=5))
        await engine.until(lambda e=engine: e.watches[-1] is False)
    assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)


async def test_prefill_decode_picks_both_engines_by_the_policy(tmp_path):
    async with Harness(4, tmp=tmp_path) as h:
        for _ in range(2):
            params = {"policy": "round_robin", "prefill": "2"}
            r = await h.generate(PROMPT, strategy="prefill_decode", strategy_params=params)
            assert r.tokens == answer(PROMPT, 8)
        assert [e.methods() for e in h.engines] == [["RemoteSend"]] * 2 + [["PrepRecv", "StartGenerate"]] * 2


async def test_a_session_of_too_many_characters_is_refused(h):
    import grpc

    with pytest.raises(grpc.aio.AioRpcError, match="has 257 characters, at most 256"):
        await h.generate(PROMPT, session="s" * 257)
