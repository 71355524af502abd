"""Too many requests: who waits, who is let in, who is told to come again."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fake_engine import answer
from router_harness import Harness

from kvmesh.client import AsyncClient
from kvmesh.errors import InvalidArgument, ResourceExhausted, Unavailable
from kvmesh.v1 import router_pb2
from services.router.admission import TENANTS, Admission, Rate
from services.router.cli import RouterConfig

LOW, NORMAL, HIGH = router_pb2.PRIORITY_LOW, router_pb2.PRIORITY_NORMAL, router_pb2.PRIORITY_HIGH
PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
FAR = 1e9


class Crowd:
    """Requests at one admission; each runs until it is told to end."""

    def __init__(self, *limits: int, clock: Any = lambda: 0.0) -> None:
        self.admission = Admission(*limits, clock=clock)
        self.entered: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(
        self, name: str, tenant: str = "", priority: int = NORMAL, cost: float = 1, deadline: float = FAR
    ) -> None:
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, tenant, priority, cost, deadline))
        await asyncio.sleep(0)

    async def _run(self, name: str, tenant: str, priority: int, cost: float, deadline: float) -> None:
        async with self.admission.entered(tenant, priority, cost, deadline):
            self.entered.append(name)
            await self.ends[name].wait()

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
            await asyncio.wait([self.tasks[name]])
            await asyncio.sleep(0)

    async def drain(self) -> list[str]:
        """Ends one after the other, in order of entry; the order."""
        i = 0
        while i < len(self.entered):
            await self.end(self.entered[i])
            i += 1
        return self.entered


async def test_so_many_run_and_the_rest_come_in_order():
    crowd = Crowd(2, 0, 10)
    for name in "abcde":
        await crowd.come(name)
    assert crowd.entered == ["a", "b"] and crowd.admission.waiting == 3
    assert await crowd.drain() == list("abcde")
    assert crowd.admission.waiting == crowd.admission._running == crowd.admission._cost == 0


async def test_one_that_leaves_in_the_moment_of_its_turn_takes_no_room():
    crowd = Crowd(1, 0, 10)
    for name in "abc":
        await crowd.come(name)
    crowd.ends["a"].set()
    # Both come to run in the next round of the loop: a's end first.
    crowd.tasks["b"].cancel()
    await asyncio.wait([crowd.tasks["a"], crowd.tasks["b"]])
    assert crowd.tasks["a"].exception() is None and crowd.tasks["b"].cancelled()
    await asyncio.sleep(0)
    assert crowd.entered == ["a", "c"]
    await crowd.end("c")
    assert crowd.admission.waiting == crowd.admission._running == crowd.admission._cost == 0


async def test_one_that_leaves_as_a_more_important_one_comes():
    crowd = Crowd(1, 0, 1)
    await crowd.come("a")
    await crowd.come("b", priority=LOW)
    crowd.tasks["b"].cancel()
    await crowd.come("c", priority=HIGH)
    assert crowd.admission.waiting == 1
    await crowd.end("a")
    assert await crowd.drain() == ["a", "c"] and crowd.tasks["b"].cancelled()


async def test_cost_is_a_limit_too_and_what_is_larger_runs_alone():
    crowd = Crowd(0, 10, 10)
    for name, cost in (("a", 6), ("b", 4), ("c", 50), ("d", 1)):
        await crowd.come(name, cost=cost)
    # d would fit, and goes not around c for all that.
    assert crowd.entered == ["a", "b"]
    await crowd.end("a")
    assert crowd.entered == ["a", "b"]
    await crowd.end("b")
    assert crowd.entered == ["a", "b", "c"]
    assert await crowd.drain() == ["a", "b", "c", "d"]


async def test_the_more_important_come_first():
    crowd = Crowd(1, 0, 10)
    for name, priority in (("a", LOW), ("b", LOW), ("c", NORMAL), ("d", HIGH), ("e", 0), ("f", HIGH)):
        await crowd.come(name, priority=priority)
    assert await crowd.drain() == list("adfceb")


async def test_tenants_have_the_same_share_whatever_they_ask_for():
    crowd = Crowd(1, 0, 100)
    for i in range(12):
        await crowd.come(f"big{i}", tenant="big", cost=10)
    for i in range(12):
        await crowd.come(f"small{i}", tenant="small", cost=5)
    order = (await crowd.drain())[1:]
    # Up to where one of them has no more, each has had the same work done, within one request.
    for n in range(2, 17):
        work = {t: sum(c for name in order[:n] if name.startswith(t)) for t, c in (("big", 10), ("small", 5))}
        assert abs(work["big"] - work["small"]) <= 10, order[:n]


async def test_a_full_queue_refuses_at_once_but_makes_room_for_the_more_important():
    crowd = Crowd(1, 0, 2)
    for name in "abc":
        await crowd.come(name, priority=LOW)
    await crowd.come("d", priority=LOW)
    with pytest.raises(ResourceExhausted, match="the router runs 1 requests, and 2 wait") as caught:
        await crowd.tasks["d"]
    assert caught.value.retry_after == 1.0
    await crowd.come("e", priority=HIGH)
    with pytest.raises(ResourceExhausted, match="a more important request came"):
        await crowd.tasks["c"]
    await crowd.come("f", priority=NORMAL)
    await crowd.come("g", priority=NORMAL)
    with pytest.raises(ResourceExhausted):
        await crowd.tasks["g"]
    assert await crowd.drain() == ["a", "e", "f"]


async def test_who_leaves_while_waiting_makes_room():
    crowd = Crowd(1, 0, 2)
    for name in "abc":
        await crowd.come(name)
    crowd.tasks["b"].cancel()
    await asyncio.wait([crowd.tasks["b"]])
    assert crowd.admission.waiting == 1
    # One whose turn comes in the moment in which it leaves gives it on.
    crowd.ends["a"].set()
    while crowd.admission._running != 1 or crowd.admission.waiting:
        await asyncio.sleep(0)
    crowd.tasks["c"].cancel()
    await asyncio.wait([*crowd.tasks.values()])
    assert crowd.admission._running == crowd.admission._cost == 0
    await crowd.come("d")
    assert crowd.entered[-1] == "d"
    await crowd.end("d")


async def test_what_would_come_too_late_is_refused_early():
    now = 0.0
    crowd = Crowd(1, 0, 100, clock=lambda: now)
    for i in range(20):
        await crowd.come(str(i), cost=10)
    # Ten units take a second each.
    for i in range(10):
        now += 1.0
        await crowd.end(str(i))
    await crowd.come("late", cost=10, deadline=now + 5)
    with pytest.raises(ResourceExhausted, match=r"it would begin in 10\.0 s, and has 5\.0 s") as caught:
        await crowd.tasks["late"]
    assert caught.value.retry_after == pytest.approx(10.0)
    # The more important have fewer before them.
    await crowd.come("high", cost=10, deadline=now + 5, priority=HIGH)
    await crowd.come("patient", cost=10, deadline=now + 11)
    assert (await crowd.drain())[11] == "high" and crowd.entered[-1] == "patient"


def test_a_rate_counts_only_while_there_is_more_to_do():
    rate = Rate()
    rate.did(100, 1.0)
    assert rate.seconds(1) is None
    rate.busy(True, 10.0)
    rate.did(20, 11.0)
    assert rate.seconds(40) == pytest.approx(2.0)
    rate.busy(False, 11.0)
    rate.did(1000, 500.0)
    assert rate.seconds(40) == pytest.approx(2.0)


async def test_tenants_are_forgotten():
    crowd = Crowd(1, 0, 3 * TENANTS)
    await crowd.come("first")
    for i in range(TENANTS + 50):
        await crowd.come(f"t{i}", tenant=f"t{i}")
    assert len(crowd.admission._tags) == TENANTS + 50
    await crowd.drain()
    assert len(crowd.admission._tags) == 0
    # Also while there is always somebody who waits.
    await crowd.come("x")
    for i in range(3 * TENANTS):
        await crowd.come(f"u{i}", tenant=f"u{i}")
        await crowd.come(f"v{i}", tenant=f"v{i}")
        await crowd.end(crowd.entered[-1])
        await crowd.end(crowd.entered[-1])
        assert len(crowd.admission._tags) <= TENANTS + 2


@pytest.mark.parametrize("name", ["max_running", "max_running_tokens", "max_waiting"])
def test_a_negative_limit(name):
    with pytest.raises(InvalidArgument, match=f"{name} = -1 is negative"):
        RouterConfig(**{name: -1})


# In the router


@pytest.fixture
async def h(tmp_path):
    async with Harness(1, tmp=tmp_path) as harness:
        harness.router = await harness.start_router(max_running=1, max_waiting=2)
        yield harness


async def counts(h: Harness) -> tuple[int, int]:
    mesh = await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
    return mesh.running_requests, mesh.waiting_requests


async def until(h: Harness, running: int, waiting: int) -> None:
    async with asyncio.timeout(5):
        while await counts(h) != (running, waiting):
            await asyncio.sleep(0.01)


async def test_requests_wait_and_the_next_is_told_when_to_come_again(h):
    (engine,) = h.engines
    engine.gates["StartGenerate"] = asyncio.Event()
    first = asyncio.create_task(h.generate(PROMPT))
    await engine.until(lambda: engine.generating == 1)
    tasks = [asyncio.create_task(h.generate(PROMPT[i:], priority=p)) for i, p in ((1, LOW), (2, HIGH))]
    await until(h, 1, 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.generate(PROMPT, priority=LOW)
    # The low one that waits has to make room.
    tasks.append(asyncio.create_task(h.generate(PROMPT[3:])))
    with pytest.raises(grpc.aio.AioRpcError) as low:
        await tasks.pop(0)
    engine.gates["StartGenerate"].set()
    assert (await first).tokens == answer(PROMPT, 8)
    results = await asyncio.gather(*tasks)
    for error in (caught.value, low.value):
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "no room" in error.details()
        assert dict(error.trailing_metadata())["retry-after-ms"] == "1000"
    assert [r.tokens for r in results] == [answer(PROMPT[i:], 8) for i in (2, 3)]
    assert await counts(h) == (0, 0)


async def test_a_client_sees_the_hint_and_leaving_the_queue_frees_it(h):
    (engine,) = h.engines
    engine.gates["StartGenerate"] = asyncio.Event()
    calls = [h.call(PROMPT) for _ in range(3)]
    await until(h, 1, 2)
    async with AsyncClient(h.servers[-1].address) as client:
        with pytest.raises(ResourceExhausted) as caught:
            await client.generate(PROMPT, priority="low", tenant="t", session="s").wait()
        assert caught.value.retry_after == 1.0 and caught.value.told
        with pytest.raises(InvalidArgument, match="priority = 'urgent' is not low, normal or high"):
            client.generate(PROMPT, priority="urgent")
    for call in calls:
        call.cancel()
    await until(h, 0, 0)
    engine.gates.clear()
    assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)
    await h.idle()


async def test_a_deadline_passes_in_the_queue(h):
    (engine,) = h.engines
    engine.gates["StartGenerate"] = asyncio.Event()
    first = h.call(PROMPT)
    await until(h, 1, 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.generate(PROMPT, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(h, 1, 0)
    first.cancel()
    await until(h, 0, 0)


# Engines that keep failing


@pytest.fixture
async def h2(tmp_path):
    async with Harness(2, tmp=tmp_path) as harness:
        yield harness


async def suspended(h: Harness) -> list[bool]:
    mesh = await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
    return [engine.suspended for engine in mesh.engines]


async def test_an_engine_that_keeps_failing_is_passed_over_for_a_while(h2, monkeypatch):
    monkeypatch.setattr("services.router.breaker.PAUSE_S", (0.3, 0.3))
    bad = h2.engines[0]
    bad.die_after = 0
    for _ in range(3):
        r = await h2.generate(PROMPT)
        assert r.tokens == answer(PROMPT, 8)
    async with asyncio.timeout(5):
        while not (await suspended(h2))[0]:
            await h2.generate(PROMPT)
    asked = len(bad.calls)
    assert (await h2.generate(PROMPT)).done.attempts == 1 and len(bad.calls) == asked
    # Well again, it is asked again when the pause is over.
    bad.die_after = None
    async with asyncio.timeout(10):
        while len(bad.calls) == asked:
            await h2.generate(PROMPT)
            await asyncio.sleep(0.02)
    assert await suspended(h2) == [False, False]


@pytest.mark.parametrize(
    ("error", "charged"),
    [(Unavailable("receiver e1 is not reached"), [False, True]), (ResourceExhausted("full"), [False, False])],
)
async def test_a_send_that_fails_is_charged_to_the_side_at_fault(h2, error, charged):
    h2.engines[0].faults["RemoteSend"] = error
    for _ in range(3):
        # Each ends well on e1; while it is suspended only e0 is asked.
        h2.engines[1].gates["StartGenerate"] = asyncio.Event()
        call = h2.call(PROMPT, strategy="prefill_decode")
        await h2.engines[1].until(lambda: "StartGenerate" in h2.engines[1].methods())
        call.cancel()
        await h2.idle()
        h2.engines[1].calls.clear()
    assert await suspended(h2) == charged
