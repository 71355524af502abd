"""Strategies in force, on trial and before: shares, history, rolling back by hand and by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fake_engine import answer
from router_harness import Harness

from kvmesh.errors import FailedPrecondition, Internal, InvalidArgument, NotFound
from kvmesh.strategy import Chunks, Mesh, Request, strategy
from kvmesh.v1 import router_pb2
from kvmesh.v1.registry_pb2 import Setting
from services.router.board import catalog
from services.router.lineup import HISTORY, NEW, Choice, Guard, Lineup
from services.router.watchdog import Watchdog

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
CODES = grpc.StatusCode
STRATEGIES = catalog()


def make(name: str, given: Any = (), revision: int = NEW, share: float = 0.0, guard: Guard | None = None) -> Choice:
    if name not in STRATEGIES:
        raise NotFound(name)
    chosen = STRATEGIES[name]
    return Choice(chosen, dict(given), chosen.bind(dict(given)), revision, share, guard)


class Store:
    """A setting that lineups are put into."""

    def __init__(self) -> None:
        self.revision = 0
        self.lineup = Lineup(make("data_parallel", revision=0))

    def put(self, lineup: Lineup) -> Lineup:
        self.revision += 1
        setting = Setting(key="strategy", value=lineup.text(), revision=self.revision)
        self.lineup = Lineup.read(setting, make)
        return self.lineup


def told(lineup: Lineup) -> list[tuple[str, int, str]]:
    return [(p.name, p.revision, p.ended.partition(":")[0]) for p in lineup.history]


def test_choices_come_go_and_come_back():
    store = Store()
    store.put(store.lineup.put(make("prefill_decode", {"prefill": "2"})))
    store.put(store.lineup.put(make("balanced_prefill_decode")))
    assert told(store.lineup) == [("prefill_decode", 1, "replaced"), ("data_parallel", 0, "replaced")]
    back = store.put(store.lineup.back("asked for", make))
    assert (back.main.strategy.name, back.main.given, back.main.revision) == ("prefill_decode", {"prefill": "2"}, 3)
    assert told(back) == [("balanced_prefill_decode", 2, "rolled back"), ("data_parallel", 0, "replaced")]
    again = store.put(back.back("asked for", make))
    assert (again.main.strategy.name, again.main.revision) == ("data_parallel", 4)
    with pytest.raises(FailedPrecondition, match="no choice before data_parallel"):
        again.back("asked for", make)


def test_a_trial_leaves_the_one_in_force_as_it_is():
    store = Store()
    store.put(store.lineup.put(make("prefill_decode")))
    guard = Guard(0.5, 2.0, 30)
    on_trial = store.put(store.lineup.put(make("balanced_prefill_decode", {"ratio": "0.5"}, share=25, guard=guard)))
    assert (on_trial.main.revision, on_trial.history[0].name) == (1, "data_parallel")
    assert on_trial.trial == make("balanced_prefill_decode", {"ratio": "0.5"}, 2, 25, guard)
    more = store.put(on_trial.put(make("balanced_prefill_decode", {"ratio": "0.5"}, share=50)))
    assert more.trial.revision == 3 and more.main.revision == 1
    assert told(more)[0] == ("balanced_prefill_decode", 2, "trial replaced")
    ended = store.put(more.back("asked for", make))
    assert ended.trial is None and ended.main.revision == 1
    assert told(ended)[0] == ("balanced_prefill_decode", 3, "rolled back")
    # What was on trial and is put in force for all has not failed.
    promoted = store.put(more.put(make("balanced_prefill_decode", {"ratio": "0.5"})))
    assert promoted.trial is None and told(promoted)[0] == ("prefill_decode", 1, "replaced")


def test_the_history_is_bounded():
    store = Store()
    for i in range(25):
        store.put(store.lineup.put(make("prefill_decode", {"prefill": str(i + 1)})))
    assert [p.revision for p in store.lineup.history] == list(range(24, 24 - HISTORY, -1))


def test_sessions_have_their_side_and_keep_it_when_the_share_grows():
    lineup = Lineup(make("data_parallel", revision=1))
    sides = {}
    for share in (10, 40, 99):
        trial = lineup.put(make("prefill_decode", revision=2, share=share))
        sides[share] = {s for s in map(str, range(2000)) if trial.side(s) is trial.trial}
        assert abs(len(sides[share]) - 20 * share) < 80
    assert sides[10] < sides[40] < sides[99]
    other = lineup.put(make("balanced_prefill_decode", revision=2, share=10))
    assert {s for s in map(str, range(2000)) if other.side(s) is other.trial} != sides[10]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_error_rate": 1.5}, "max_error_rate = 1.5"),
        ({"max_ttft_seconds": -1}, "max_ttft_seconds = -1"),
        ({"max_ttft_seconds": float("nan")}, "max_ttft_seconds = nan"),
        ({"max_error_rate": 0.5, "min_requests": 201}, "min_requests = 201"),
        ({"min_requests": 20}, "neither max_error_rate nor max_ttft_seconds"),
    ],
)
def test_a_wrong_guard(fields, says):
    with pytest.raises(InvalidArgument, match=says):
        Guard.of(router_pb2.StrategyGuard(**fields))


def test_the_watchdog_judges_when_it_has_seen_enough():
    dog, choice = Watchdog(), make("data_parallel", revision=3, guard=Guard(0.2, 0, 10))
    assert [dog.see(choice, i < 2, 0.1) for i in range(10)] == [""] * 10
    assert dog.see(choice, True, 0.0).startswith("27.3% of 11 requests failed")
    dog.keep({4})
    assert dog.see(choice, True, 0.0) == ""
    slow = make("data_parallel", revision=4, guard=Guard(0, 1.0, 2))
    assert dog.see(slow, True, 0.0) == ""
    assert dog.see(slow, False, 0.5) == ""
    assert dog.see(slow, False, 1.7).startswith("mean TTFT 1.100 s of 2 requests")
    assert dog.see(make("data_parallel", revision=0), True, 9.0) == ""


# Over the router


@strategy
async def bad(request: Request, mesh: Mesh) -> Chunks:
    """Fails."""
    raise Internal("bad by nature")
    yield


@strategy
async def slow(request: Request, mesh: Mesh) -> Chunks:
    """Takes its time."""
    await asyncio.sleep(0.2)
    async for chunk in mesh.engines[0].start_generate(request.token_ids):
        yield chunk


@strategy
async def hangs(request: Request, mesh: Mesh) -> Chunks:
    """Never answers."""
    await asyncio.Event().wait()
    yield


@pytest.fixture
async def h(tmp_path, monkeypatch):
    more = {s.name: s for s in (bad, slow, hangs)}
    monkeypatch.setattr("services.router.main.catalog", lambda: catalog() | more)
    async with Harness(2, tmp=tmp_path) as harness:
        yield harness


async def change(router: Any, name: str = "", guard: dict[str, float] | None = None, **fields: Any) -> Any:
    request = router_pb2.SetStrategyRequest(name=name, guard=router_pb2.StrategyGuard(**guard) if guard else None)
    request.MergeFrom(router_pb2.SetStrategyRequest(**fields))
    return (await router.SetStrategy(request, timeout=5)).strategy


async def state(router: Any) -> router_pb2.GetStrategyResponse:
    return await router.GetStrategy(router_pb2.GetStrategyRequest(), timeout=5)


async def until(router: Any, predicate: Any) -> router_pb2.GetStrategyResponse:
    async with asyncio.timeout(5):
        while not predicate(now := await state(router)):
            await asyncio.sleep(0.01)
    return now


async def test_a_conversation_stays_on_its_side_on_every_router(h):
    second = await h.start_router()
    trial = await change(h.router, "prefill_decode", share_percent=30)
    assert (trial.name, trial.share_percent, trial.revision) == ("prefill_decode", 30, 1)
    await until(second, lambda now: now.HasField("trial"))
    assert (await second.GetMesh(router_pb2.GetMeshRequest(), timeout=5)).trial == trial
    sides = {}
    for session in map(str, range(30)):
        r = await h.generate(PROMPT, 2, session=session)
        assert r.started.strategy_revision == (1 if r.started.strategy == "prefill_decode" else 0)
        sides[session] = r.started.strategy
    assert set(sides.values()) == {"data_parallel", "prefill_decode"}
    h.router = second
    assert {s: (await h.generate(PROMPT, 2, session=s)).started.strategy for s in sides} == sides
    # Without session each request draws its side.
    drawn = [(await h.generate(PROMPT, 2)).started.strategy for _ in range(30)]
    assert set(drawn) == set(sides.values())


async def test_going_back_at_once_on_every_router(h):
    second = await h.start_router()
    await change(h.router, "prefill_decode", params={"prefill": "1"})
    await change(second, "balanced_prefill_decode")
    await change(second, "data_parallel", share_percent=50)
    assert (await change(h.router, rollback=True)).name == "balanced_prefill_decode"
    back = await change(h.router, rollback=True)
    assert (back.name, back.revision) == ("prefill_decode", 5)
    assert (await h.generate(PROMPT)).started.strategy_revision == 5
    now = await until(second, lambda now: now.strategy == back)
    assert [p.ended for p in now.history] == [
        "rolled back: asked for",
        "rolled back: asked for",
        "replaced",
    ]
    assert (await change(second, rollback=True)).name == "data_parallel"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await change(second, rollback=True)
    assert caught.value.code() is CODES.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "prefill_decode", "share_percent": 101}, "share_percent = 101"),
        ({"name": "prefill_decode", "share_percent": -1}, "share_percent = -1"),
        ({"name": "prefill_decode", "guard": {"min_requests": 5}}, "guard has neither"),
        ({"name": "prefill_decode", "rollback": True}, "rollback = true goes with no other field"),
    ],
)
async def test_a_wrong_change_changes_nothing(h, fields, says):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await change(h.router, **fields)
    assert caught.value.code() is CODES.INVALID_ARGUMENT and says in caught.value.details()
    assert (await state(h.router)).strategy.revision == 0


async def test_a_change_that_fails_is_taken_back_by_itself_on_every_router(h):
    second = await h.start_router()
    await change(h.router, "prefill_decode")
    await change(h.router, "bad", guard={"max_error_rate": 0.1, "min_requests": 5})
    await until(second, lambda now: now.strategy.name == "bad")
    failed = 0
    async with asyncio.timeout(10):
        while (await state(h.router)).strategy.name == "bad":
            with pytest.raises(grpc.aio.AioRpcError, match="bad by nature"):
                await h.generate(PROMPT)
            failed += 1
            if failed >= 5:
                break
        now = await until(second, lambda now: now.strategy.name == "prefill_decode")
    assert failed == 5
    assert now.history[0].name == "bad"
    assert now.history[0].ended == "rolled back: 100.0% of 5 requests failed, over the bound of 10.0%"
    assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)


async def test_a_slow_trial_is_ended_and_the_rest_goes_on(h):
    await change(h.router, "prefill_decode")
    await change(h.router, "slow", share_percent=60, guard={"max_ttft_seconds": 0.1, "min_requests": 3})
    names = [(await h.generate(PROMPT, 2, session=str(i))).started.strategy for i in range(12)]
    assert names.count("slow") >= 3 and "prefill_decode" in names
    now = await until(h.router, lambda now: not now.HasField("trial"))
    assert (now.strategy.name, now.strategy.revision) == ("prefill_decode", 1)
    assert "mean TTFT" in now.history[0].ended


async def test_a_deadline_that_passes_counts_and_a_caller_who_leaves_does_not(h):
    await change(h.router, "hangs", guard={"max_error_rate": 0.5, "min_requests": 2})
    for _ in range(4):
        call = h.call(PROMPT)
        await call.read()
        call.cancel()
    for _ in range(2):
        assert (await state(h.router)).strategy.name == "hangs"
        with pytest.raises(grpc.aio.AioRpcError):
            await h.generate(PROMPT, timeout=0.2)
    await until(h.router, lambda now: now.strategy.name == "data_parallel")


async def test_requests_that_name_their_strategy_do_not_count(h):
    await change(h.router, "bad", guard={"max_error_rate": 0.1, "min_requests": 1})
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await h.generate(PROMPT, strategy="bad")
    await asyncio.sleep(0.05)
    assert (await state(h.router)).strategy.name == "bad"


async def test_changes_at_the_same_time_all_count(h):
    routers = [h.router, await h.start_router(), await h.start_router()]
    await asyncio.gather(*(change(r, "prefill_decode", params={"prefill": str(i + 1)}) for i, r in enumerate(routers)))
    now = await state(h.router)
    assert len(now.history) == 3 and now.history[-1].name == "data_parallel"
    assert {p.params["prefill"] for p in (now.strategy, *now.history[:2])} == {"1", "2", "3"}
