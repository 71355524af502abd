"""The router when things go wrong: engines that die, callers that leave, bad requests, a registry that is away."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, answer
from router_harness import Harness

from kvmesh.errors import FailedPrecondition, Internal, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from kvmesh.grpcx import channel
from kvmesh.strategy import Chunks, Mesh, Request, Strategy, strategy
from kvmesh.v1 import common_pb2, router_pb2
from services.router.board import catalog

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
ALL = ["data_parallel", "prefill_decode", "balanced_prefill_decode"]
SPLIT = ALL[1:]
CODES = grpc.StatusCode


def stages(*of_all: str, split: tuple[str, ...]) -> list[tuple[str, str]]:
    """(strategy, stage): those of all strategies, and those of the ones that split a prompt."""
    return [(name, stage) for name in ALL for stage in of_all] + [(name, stage) for name in SPLIT for stage in split]


@pytest.fixture
async def h(tmp_path) -> AsyncIterator[Harness]:
    async with Harness(2, tmp=tmp_path) as harness:
        yield harness


@pytest.fixture
async def h3(tmp_path) -> AsyncIterator[Harness]:
    async with Harness(3, tmp=tmp_path) as harness:
        yield harness


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status that a Generate ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(15):
            async for _ in call:
                pass
    return caught.value.code(), caught.value.details() or ""


async def running(h: Harness) -> int:
    return (await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)).running_requests


async def nothing_left(h: Harness) -> None:
    """No ticket, no call, no request: at the engines and at the router."""
    await h.idle()
    async with asyncio.timeout(5):
        while await running(h):
            await asyncio.sleep(0.01)


def generating(h: Harness, name: str) -> FakeEngine:
    """The engine that generates under a strategy on an idle mesh."""
    return h.engines[0] if name == "data_parallel" else h.engines[1]


# Engines that die


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("after", [0, 1, 5, 7])
async def test_an_engine_dies_while_it_generates(h, name, after):
    dying = generating(h, name)
    dying.die_after = after
    r = await h.generate(PROMPT, strategy=name)
    assert r.tokens == answer(PROMPT, 8)
    assert r.done.attempts == 2 and r.done.reason == common_pb2.FINISH_REASON_LENGTH
    assert (r.done.usage.prompt_tokens, r.done.usage.completion_tokens) == (100, 8)
    other = next(e for e in h.engines if e is not dying)
    assert (r.share(other.name).decoded_tokens, sum(s.decoded_tokens for s in r.done.shares)) == (8 - after, 8)
    # What was streamed is prompt now, and what is asked for is the rest.
    last = other.requests("StartGenerate")[-1]
    assert list(last.token_ids) == PROMPT + answer(PROMPT, after)
    assert (last.sampling.max_new_tokens, last.generated) == (8 - after, after)
    # An engine may still have the first under its id.
    first = dying.requests("StartGenerate")[0]
    assert first.request_id == r.started.request_id and last.request_id != first.request_id
    await nothing_left(h)


@pytest.mark.parametrize("name", ALL)
async def test_an_engine_dies_after_the_last_token(h, name):
    generating(h, name).die_after = 8
    r = await h.generate(PROMPT, strategy=name)
    assert r.tokens == answer(PROMPT, 8) and r.done.reason == common_pb2.FINISH_REASON_LENGTH
    # Nobody has to be asked for more.
    assert r.done.attempts == 1 and r.done.usage.completion_tokens == 8
    await nothing_left(h)


async def test_an_engine_dies_after_the_stop_token(h):
    h.engines[0].step = lambda seq: 99 if len(seq) == 103 else 65
    h.engines[0].die_after = 4
    r = await h.generate(PROMPT, strategy="data_parallel", sampling=common_pb2.SamplingParams(stop_token_ids=[99]))
    assert r.tokens == [65, 65, 65, 99]
    assert (r.done.reason, r.done.stop_token_id) == (common_pb2.FINISH_REASON_STOP_TOKEN, 99)
    assert h.engines[1].calls == []


@pytest.mark.parametrize("name", ALL)
async def test_one_engine_after_the_other_dies(h3, name):
    for engine, after in zip(h3.engines, (2, 3, None), strict=True):
        engine.die_after = after
    r = await h3.generate(PROMPT, 20, strategy=name)
    assert r.tokens == answer(PROMPT, 20)
    assert r.done.attempts == (3 if name == "data_parallel" else 2)
    await nothing_left(h3)


async def test_every_engine_dies(h3):
    for engine in h3.engines:
        engine.die_after = 2
    code, text = await refused(h3.call(PROMPT, strategy="data_parallel"))
    assert code is CODES.UNAVAILABLE and "the fake engine was told to die" in text
    assert [e.methods() for e in h3.engines] == [["StartGenerate"]] * 3
    await nothing_left(h3)


@pytest.mark.parametrize(("name", "stage"), stages("StartGenerate", split=("PrepRecv", "RemoteSend")))
async def test_an_engine_is_killed_at_a_stage(h, name, stage):
    victim = h.engines[0] if stage == "RemoteSend" else generating(h, name)
    victim.gates[stage] = asyncio.Event()
    task = asyncio.create_task(h.generate(PROMPT, strategy=name))
    await victim.until(lambda: stage in victim.methods())
    await victim.kill()
    r = await asyncio.wait_for(task, 10)
    assert r.tokens == answer(PROMPT, 8)
    # What could not be sent, the decode engine prefills itself.
    assert r.done.attempts == (1 if stage == "RemoteSend" else 2)
    await nothing_left(h)


@pytest.mark.parametrize("name", ALL)
async def test_an_engine_is_killed_mid_stream(h, name):
    victim = generating(h, name)
    victim.pause_after = (3, asyncio.Event())
    call = h.call(PROMPT, strategy=name)
    tokens: list[int] = []
    async for message in call:
        tokens += message.delta.token_ids
        if len(tokens) == 3 and victim.generating:
            await victim.kill()
    assert tokens == answer(PROMPT, 8)
    await nothing_left(h)


async def test_a_dead_engine_is_not_asked_again(h):
    await h.engines[0].kill()
    for _ in range(5):
        assert (await h.generate(PROMPT, strategy="data_parallel")).tokens == answer(PROMPT, 8)
    assert len(h.engines[1].requests("StartGenerate")) == 5
    async with asyncio.timeout(5):
        while [e.connected for e in (await mesh(h)).engines] != [False, True]:
            await asyncio.sleep(0.02)
    r = await h.generate(PROMPT, strategy="data_parallel")
    assert r.done.attempts == 1


async def test_no_engine_at_all(h):
    for engine in h.engines:
        await engine.kill()
    async with asyncio.timeout(5):
        while any(e.connected for e in (await mesh(h)).engines):
            await asyncio.sleep(0.02)
    began = time.monotonic()
    assert await refused(h.call(PROMPT)) == (CODES.UNAVAILABLE, "no engine that serves fake is alive")
    assert time.monotonic() - began < 2


async def test_an_engine_that_comes_back_has_a_new_life(h):
    old = h.engines[0]
    await old.stop()
    async with asyncio.timeout(5):
        while len((await mesh(h)).engines) != 1:
            await asyncio.sleep(0.02)
    again = FakeEngine("e0", h.mesh, {})
    await again.start(h.registry.address)
    try:
        async with asyncio.timeout(5):
            while [e.connected for e in (await mesh(h)).engines] != [True, True]:
                await asyncio.sleep(0.02)
        await h.generate(PROMPT, strategy="data_parallel")
        assert again.methods() == ["StartGenerate"] and old.calls == []
    finally:
        await again.stop()


async def mesh(h: Harness) -> router_pb2.GetMeshResponse:
    return await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)


# Sub-requests that fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ResourceExhausted("no room"), CODES.RESOURCE_EXHAUSTED),
        (Unavailable("stopping"), CODES.UNAVAILABLE),
        (Internal("a bug"), CODES.INTERNAL),
        (FailedPrecondition("other layout"), CODES.FAILED_PRECONDITION),
    ],
)
@pytest.mark.parametrize("method", ["PrepRecv", "StartGenerate"])
async def test_a_refusal_is_tried_elsewhere_and_at_last_told(h, error, code, method):
    name = "data_parallel" if method == "StartGenerate" else "prefill_decode"
    first = generating(h, name)
    first.faults[method] = error
    assert (await h.generate(PROMPT, strategy=name)).tokens == answer(PROMPT, 8)
    for engine in h.engines:
        engine.faults[method] = error
    got, text = await refused(h.call(PROMPT, strategy=name))
    assert got is code and str(error) in text and text.startswith("e")
    await nothing_left(h)


async def test_what_is_the_caller_s_fault_is_not_tried_again(h):
    for engine in h.engines:
        engine.faults["StartGenerate"] = InvalidArgument("sampling.seed = 7 is odd")
    code, text = await refused(h.call(PROMPT, strategy="data_parallel"))
    assert code is CODES.INVALID_ARGUMENT and "sampling.seed = 7 is odd" in text
    assert sum(len(e.calls) for e in h.engines) == 1


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("error", [Unavailable("gone"), Internal("a bug"), ResourceExhausted("full"), NotFound("no")])
async def test_without_the_transfer_the_decode_engine_prefills_itself(h, name, error):
    h.engines[0].faults["RemoteSend"] = error
    r = await h.generate(PROMPT, strategy=name)
    assert r.tokens == answer(PROMPT, 8) and r.done.attempts == 1
    assert r.share("e1").prefilled_tokens == 100 and r.share("e1").received_tokens == 0
    await nothing_left(h)


async def test_a_transfer_that_hangs_takes_half_of_the_time_at_most(h):
    h.engines[0].gates["RemoteSend"] = asyncio.Event()
    began = time.monotonic()
    r = await h.generate(PROMPT, strategy="prefill_decode", timeout=2.0)
    assert r.tokens == answer(PROMPT, 8) and 0.8 < time.monotonic() - began < 1.9
    await nothing_left(h)


@pytest.mark.parametrize("state", ["writing", "more than known", "gone"])
async def test_a_ticket_that_the_engine_refuses_is_gone_without(h, state):
    p, d = h.engines
    p.gates["RemoteSend"], p.faults["RemoteSend"] = asyncio.Event(), Unavailable("died half way")
    task = asyncio.create_task(h.generate(PROMPT, strategy="prefill_decode"))
    await p.until(lambda: p.sending == 1)
    (number,) = d.tickets
    match state:
        case "writing":
            d.tickets[number].writing = True
        case "more than known":
            d.tickets[number].filled = 50
        case "gone":
            del d.tickets[number]
    p.gates["RemoteSend"].set()
    r = await asyncio.wait_for(task, 10)
    assert r.tokens == answer(PROMPT, 8) and r.done.attempts == 1
    first, second = d.requests("StartGenerate")
    assert first.ticket.id == number and not second.HasField("ticket") and second.begin == 0
    await nothing_left(h)


# Callers that leave


@pytest.mark.parametrize(
    ("name", "stage"), stages("StartGenerate", "streaming", "last", split=("PrepRecv", "RemoteSend"))
)
@pytest.mark.parametrize("late", [False, True])
async def test_the_caller_cancels_at_a_stage(h, name, stage, late):
    """`late`: what the engine was doing goes on after all, once the caller is gone."""
    engine, gate = h.engines[0] if stage == "RemoteSend" else generating(h, name), asyncio.Event()
    if stage in ("streaming", "last"):
        engine.pause_after = (3 if stage == "streaming" else 7, gate)
        reached: Callable[[], bool] = lambda: engine.generating == 1  # noqa: E731
    else:
        engine.gates[stage] = gate
        reached = lambda: stage in engine.methods()  # noqa: E731
    call = h.call(PROMPT, strategy=name)
    assert (await call.read()).WhichOneof("event") == "started"
    await engine.until(reached)
    if stage in ("streaming", "last"):
        await call.read()
    assert await running(h) == 1
    call.cancel()
    if late:
        gate.set()
    await nothing_left(h)
    # And everything works as before.
    gate.set()
    engine.gates.clear()
    engine.pause_after = None
    assert (await h.generate(PROMPT, strategy=name)).tokens == answer(PROMPT, 8)
    await nothing_left(h)


async def test_callers_cancel_at_random_moments(h):
    draw = random.Random(11)

    async def one(i: int) -> None:
        prompt = [draw.randrange(1, 200) for _ in range(draw.randrange(1, 80))]
        call = h.call(prompt, 30, strategy=ALL[i % 3])
        if i % 3:
            asyncio.get_running_loop().call_later(draw.random() * 0.05, call.cancel)
        tokens: list[int] = []
        try:
            async for message in call:
                tokens += message.delta.token_ids
        except (asyncio.CancelledError, grpc.aio.AioRpcError):
            assert i % 3
        assert tokens == answer(prompt, len(tokens))

    async with asyncio.timeout(30):
        for batch in range(6):
            await asyncio.gather(*(one(batch * 20 + i) for i in range(20)))
    await nothing_left(h)


# Deadlines


@pytest.mark.parametrize(("name", "stage"), stages("StartGenerate", "streaming", split=("PrepRecv",)))
async def test_the_deadline_passes_at_a_stage(h, name, stage):
    for engine in h.engines:
        if stage == "streaming":
            engine.pause_after = (3, asyncio.Event())
        else:
            engine.gates[stage] = asyncio.Event()
    began = time.monotonic()
    code, _ = await refused(h.call(PROMPT, strategy=name, timeout=0.4))
    assert code is CODES.DEADLINE_EXCEEDED and time.monotonic() - began < 1.5
    await nothing_left(h)


# Requests that are wrong


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"strategy": "none"}, CODES.NOT_FOUND, "strategy = 'none' is unknown; there is: adaptive, balanced_"),
        ({"strategy": "prefill_decode", "strategy_params": {"x": "1"}}, CODES.INVALID_ARGUMENT, "no parameter 'x'"),
        (
            {"strategy": "prefill_decode", "strategy_params": {"prefill": "0"}},
            CODES.INVALID_ARGUMENT,
            "strategy prefill_decode: parameter prefill = 0 is not 1 to 1024",
        ),
        ({"strategy_params": {"ratio": "0.5"}}, CODES.INVALID_ARGUMENT, "data_parallel has no parameter 'ratio'"),
        ({"model": "none"}, CODES.NOT_FOUND, "model = 'none' is not served; there is: fake"),
        ({"request_id": "a b"}, CODES.INVALID_ARGUMENT, "request_id = 'a b'"),
        ({"request_id": "x" * 129}, CODES.INVALID_ARGUMENT, "1 to 128 characters"),
        ({"prompt": []}, CODES.INVALID_ARGUMENT, "token_ids is empty"),
        ({"prompt": [1, 320]}, CODES.INVALID_ARGUMENT, "token_ids[1] = 320 is not in the vocabulary of 320"),
        ({"prompt": [1] * 4097}, CODES.INVALID_ARGUMENT, "token_ids has 4097 tokens"),
        ({"prompt": [1] * 4096}, CODES.INVALID_ARGUMENT, "leaves no room"),
        ({"prompt": "text"}, CODES.INVALID_ARGUMENT, "has no tokenizer here"),
        ({"sampling": {"top_p": 0}}, CODES.INVALID_ARGUMENT, "sampling.top_p = 0"),
        ({"sampling": {"n": 2}}, CODES.INVALID_ARGUMENT, "sampling.n = 2"),
        ({"sampling": {"stop_strings": ["x"]}}, CODES.INVALID_ARGUMENT, "sampling.stop_strings"),
        ({"sampling": {"max_new_tokens": 4097}}, CODES.INVALID_ARGUMENT, "sampling.max_new_tokens = 4097"),
    ],
)
async def test_a_wrong_request_reaches_no_engine(h, fields, code, says):
    fields = dict(fields)
    if "sampling" in fields:
        fields["sampling"] = common_pb2.SamplingParams(**fields["sampling"])
    got, text = await refused(h.call(fields.pop("prompt", PROMPT), **fields))
    assert got is code and says in text
    assert [e.calls for e in h.engines] == [[], []]
    assert await running(h) == 0


async def test_no_prompt_at_all(h):
    code, text = await refused(h.router.Generate(router_pb2.GenerateRequest(), timeout=5))
    assert (code, text) == (CODES.INVALID_ARGUMENT, "prompt is missing: give text or tokens")


async def test_a_request_id_is_running_once(h):
    h.engines[0].gates["StartGenerate"] = asyncio.Event()
    first = asyncio.create_task(h.generate(PROMPT, request_id="mine"))
    await h.engines[0].until(lambda: h.engines[0].generating == 1)
    code, text = await refused(h.call(PROMPT, request_id="mine"))
    assert code is CODES.INVALID_ARGUMENT and "request_id = 'mine' is running" in text
    h.engines[0].gates["StartGenerate"].set()
    assert (await first).tokens == answer(PROMPT, 8)
    assert (await h.generate(PROMPT, request_id="mine")).started.request_id == "mine"


# Strategies that are wrong


@strategy
async def raises(request: Request, mesh: Mesh) -> Chunks:
    """Raises before the first token."""
    await mesh.engines[0].prep_recv(request.token_ids, end=-1)
    raise ValueError("secret 4711")
    yield


@strategy
async def stops_early(request: Request, mesh: Mesh) -> Chunks:
    """Ends before the answer does."""
    async for chunk in mesh.engines[0].start_generate(request.token_ids):
        yield chunk
        break


@strategy
async def forgets(request: Request, mesh: Mesh) -> Chunks:
    """Reserves, starts and leaves it all behind."""
    first, last = mesh.engines[0], mesh.engines[-1]
    await asyncio.gather(*(e.prep_recv(request.token_ids, end=-1) for e in mesh.engines for _ in range(3)))
    unread = first.start_generate(request.token_ids)
    async for chunk in last.start_generate(request.token_ids):
        yield chunk
    del unread


@strategy
async def reuses(request: Request, mesh: Mesh) -> Chunks:
    """Uses a ticket twice."""
    engine = mesh.engines[0]
    ticket = await engine.prep_recv(request.token_ids, end=-1)
    async for chunk in engine.start_generate(request.token_ids, ticket):
        yield chunk
        engine.start_generate(request.token_ids, ticket)


@strategy
async def in_a_group(request: Request, mesh: Mesh) -> Chunks:
    """Lets sub-requests fail in a task group."""
    async with asyncio.TaskGroup() as group:
        for engine in mesh.engines:
            group.create_task(engine.prep_recv(request.token_ids, end=-1))
    async for chunk in mesh.engines[0].start_generate(request.token_ids):
        yield chunk


@strategy
async def endless(request: Request, mesh: Mesh) -> Chunks:
    """Waits for something that never comes, and does not like to be ended."""
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.05)
    yield


@pytest.fixture
async def odd(tmp_path, monkeypatch) -> AsyncIterator[Harness]:
    wrong: list[Strategy] = [raises, stops_early, forgets, reuses, in_a_group, endless]
    monkeypatch.setattr("services.router.main.catalog", lambda: catalog() | {s.name: s for s in wrong})
    async with Harness(2, tmp=tmp_path) as harness:
        yield harness


async def test_a_strategy_with_a_bug_is_internal_and_its_text_is_for_the_log(odd, caplog):
    code, text = await refused(odd.call(PROMPT, strategy="raises"))
    assert code is CODES.INTERNAL
    assert text == "strategy raises failed with ValueError; see the router's log"
    assert any("secret 4711" in caplog.handler.format(r) for r in caplog.records)
    await nothing_left(odd)


async def test_a_strategy_that_ends_early(odd):
    code, text = await refused(odd.call(PROMPT, strategy="stops_early"))
    assert (code, text) == (CODES.INTERNAL, "strategy stops_early ended before the answer did")
    await nothing_left(odd)


async def test_a_strategy_that_forgets_what_it_holds(odd):
    assert (await odd.generate(PROMPT, strategy="forgets")).tokens == answer(PROMPT, 8)
    await nothing_left(odd)
    assert sum(len(e.requests("Release")) for e in odd.engines) == 6


async def test_a_ticket_is_used_once(odd):
    code, text = await refused(odd.call(PROMPT, strategy="reuses"))
    assert code is CODES.INVALID_ARGUMENT and "was used or released" in text
    await nothing_left(odd)


async def test_a_failure_out_of_a_task_group(odd):
    odd.engines[1].faults["PrepRecv"] = Unavailable("gone")
    r = await odd.generate(PROMPT, strategy="in_a_group")
    assert r.tokens == answer(PROMPT, 8) and r.done.attempts == 2
    await nothing_left(odd)


async def test_a_strategy_that_waits_for_ever_ends_at_the_deadline(odd):
    began = time.monotonic()
    code, _ = await refused(odd.call(PROMPT, strategy="endless", timeout=0.3))
    assert code is CODES.DEADLINE_EXCEEDED and time.monotonic() - began < 2
    await nothing_left(odd)


# The strategy in force


def set_strategy(router: Any, name: str, **params: str) -> Any:
    return router.SetStrategy(router_pb2.SetStrategyRequest(name=name, params=params), timeout=5)


async def test_the_strategy_changes_while_requests_run(h):
    gate = asyncio.Event()
    h.engines[0].pause_after = (3, gate)
    old = asyncio.create_task(h.generate(PROMPT))
    await h.engines[0].until(lambda: h.engines[0].generating == 1)
    reply = await set_strategy(h.router, "balanced_prefill_decode", ratio="0.5")
    new = await h.generate(PROMPT)
    gate.set()
    assert new.tokens == (await old).tokens == answer(PROMPT, 8)
    assert (await old).started.strategy == "data_parallel"
    assert new.started.strategy == "balanced_prefill_decode"
    assert new.started.strategy_revision == reply.strategy.revision > 0
    assert [(s.begin, s.end) for s in h.engines[0].requests("RemoteSend")] == [(0, 50)]
    # Parameters of one request go over those in force.
    once = await h.generate(PROMPT, strategy_params={"ratio": "0.25"})
    assert once.started.strategy_revision == reply.strategy.revision
    assert [s.end for s in h.engines[0].requests("RemoteSend")] == [50, 75]
    # A request that names its strategy is its own.
    assert (await h.generate(PROMPT, strategy="data_parallel")).started.strategy_revision == 0


async def test_many_requests_while_the_strategy_changes_back_and_forth(h):
    async def change() -> None:
        while True:
            for name in ALL:
                await set_strategy(h.router, name)
                await asyncio.sleep(0.01)

    changing = asyncio.create_task(change())
    try:
        results = []
        while len(results) < 50 or {r.started.strategy for r in results} != set(ALL):
            results += await asyncio.gather(*(h.generate(PROMPT[i:], 4) for i in range(10)))
    finally:
        changing.cancel()
        await asyncio.wait([changing])
    assert [r.tokens for r in results] == [answer(PROMPT[i % 10 :], 4) for i in range(len(results))]
    await nothing_left(h)


async def test_every_router_changes_and_one_that_comes_later_begins_with_it(h):
    second = await h.start_router()
    reply = await set_strategy(h.router, "prefill_decode", prefill="1")
    third = await h.start_router()
    for router in (second, third):
        async with asyncio.timeout(5):
            while (got := await router.GetStrategy(router_pb2.GetStrategyRequest(), timeout=5)).strategy.revision == 0:
                await asyncio.sleep(0.01)
        assert got.strategy == reply.strategy


@pytest.mark.parametrize(
    ("name", "params", "code"),
    [
        ("none", {}, CODES.NOT_FOUND),
        ("", {}, CODES.NOT_FOUND),
        ("prefill_decode", {"ratio": "1"}, CODES.INVALID_ARGUMENT),
        ("balanced_prefill_decode", {"ratio": "1.5"}, CODES.INVALID_ARGUMENT),
    ],
)
async def test_a_wrong_choice_changes_nothing(h, name, params, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_strategy(h.router, name, **params)
    assert caught.value.code() is code
    got = await h.router.GetStrategy(router_pb2.GetStrategyRequest(), timeout=5)
    assert (got.strategy.name, got.strategy.revision) == ("data_parallel", 0)


@pytest.mark.parametrize("value", ["junk", "{}", "[]", '{"name": "none"}', '{"name": "data_parallel", "params": 3}'])
async def test_a_setting_that_makes_no_sense_is_passed_over(h, value):
    reply = await set_strategy(h.router, "prefill_decode")
    await h._backend.put_setting("strategy", value, None)
    await h._backend.put_setting("strategy", json.dumps({"name": "data_parallel"}), None)
    async with asyncio.timeout(5):
        while True:
            got = await h.router.GetStrategy(router_pb2.GetStrategyRequest(), timeout=5)
            if got.strategy.revision > reply.strategy.revision:
                break
            await asyncio.sleep(0.01)
    assert (got.strategy.name, got.strategy.revision) == ("data_parallel", reply.strategy.revision + 2)


# Without the registry


async def test_the_mesh_goes_on_without_the_registry_and_comes_back_with_it(h):
    reply = await set_strategy(h.router, "prefill_decode")
    address = h.registry.address
    await h.stop_registry()
    async with asyncio.timeout(10):
        while (await mesh(h)).registry_connected:
            await asyncio.sleep(0.02)
    r = await h.generate(PROMPT)
    assert r.tokens == answer(PROMPT, 8)
    assert (r.started.strategy, r.started.strategy_revision) == ("prefill_decode", reply.strategy.revision)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.router.SetStrategy(router_pb2.SetStrategyRequest(name="data_parallel"), timeout=20)
    assert caught.value.code() is CODES.UNAVAILABLE
    assert (await h.generate(PROMPT)).started.strategy == "prefill_decode"
    # An engine that dies meanwhile is noticed all the same.
    await h.engines[1].kill()
    assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)

    await h.start_registry(address)
    async with asyncio.timeout(15):
        while not (await mesh(h)).registry_connected or [e.connected for e in (await mesh(h)).engines][:1] != [True]:
            await asyncio.sleep(0.05)
        assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)
        # The new store has forgotten the setting: what was in force stays until another is set.
        assert (await mesh(h)).strategy.name == "prefill_decode"
        await set_strategy(h.router, "data_parallel")
        assert (await h.generate(PROMPT)).started.strategy == "data_parallel"


# Traces


def written(h: Harness) -> dict[str, dict[str, Any]]:
    """Spans by name."""
    lines = [line for file in h.traces.glob("*.jsonl") for line in file.read_text().splitlines()]
    return {span["name"]: span for span in map(json.loads, lines)}


async def spans(h: Harness, *wanted: str) -> dict[str, dict[str, Any]]:
    async with asyncio.timeout(5):
        while not set(wanted) <= set(found := written(h)):
            await asyncio.sleep(0.02)
    return found


async def test_the_spans_of_one_request(h):
    r = await h.generate(PROMPT, strategy="prefill_decode", request_id="traced")
    names = ("router.generate", "strategy prefill_decode", "prep_recv", "remote_send", "start_generate")
    found = await spans(h, *names)
    root, attempt, *subs = (found[name] for name in names)
    assert {s["context"]["trace_id"] for s in found.values()} == {f"0x{r.done.trace_id}"}
    assert root["parent_id"] is None and root["kind"] == "SpanKind.SERVER"
    assert attempt["parent_id"] == root["context"]["span_id"]
    for sub in subs:
        assert sub["parent_id"] == attempt["context"]["span_id"] and sub["kind"] == "SpanKind.CLIENT"
        assert root["start_time"] <= sub["start_time"] <= sub["end_time"] <= root["end_time"]
        assert sub["status"]["status_code"] == "UNSET"
    ends = [sub["end_time"] for sub in subs]
    assert ends == sorted(ends)
    attributes = root["attributes"]
    assert attributes["kvmesh.request_id"] == "traced" and attributes["kvmesh.strategy"] == "prefill_decode"
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (100, 8)
    prep, send, start = (sub["attributes"] for sub in subs)
    assert (prep["kvmesh.engine"], prep["kvmesh.matched"], prep["kvmesh.end"]) == ("e1", 0, 99)
    assert (send["kvmesh.engine"], send["kvmesh.receiver"], send["kvmesh.transport"]) == ("e0", "e1", "fake")
    assert (send["kvmesh.tokens"], send["kvmesh.bytes"]) == (99, 99 * 64)
    assert start["kvmesh.engine"] == "e1" and start["kvmesh.begin"] == 99
    assert [e["name"] for e in subs[2]["events"]] == ["first_token"]
    # Each engine was handed its own sub-request as parent.
    sent = {m: meta["traceparent"] for e in h.engines for m, meta in e.metadata}
    for method, sub in zip(("PrepRecv", "RemoteSend", "StartGenerate"), subs, strict=True):
        version, trace_id, span_id, flags = sent[method].split("-")
        assert (version, trace_id, f"0x{span_id}") == ("00", r.done.trace_id, sub["context"]["span_id"])
        assert int(flags, 16) & 1


async def test_the_caller_s_trace_is_gone_on_with(h):
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    request = router_pb2.GenerateRequest(tokens=router_pb2.TokenIds(ids=PROMPT))
    messages = [m async for m in h.router.Generate(request, timeout=5, metadata=(("traceparent", parent),))]
    assert messages[-1].done.trace_id == "a" * 32
    assert (await spans(h, "router.generate"))["router.generate"]["parent_id"] == f"0x{'b' * 16}"


async def test_a_failure_shows_in_the_trace(h):
    h.engines[0].die_after = 3
    r = await h.generate(PROMPT, strategy="data_parallel")
    async with asyncio.timeout(5):
        while True:
            lines = [json.loads(line) for f in h.traces.glob("*.jsonl") for line in f.read_text().splitlines()]
            if any(s["name"] == "router.generate" for s in lines):
                break
            await asyncio.sleep(0.02)
    attempts = sorted((s for s in lines if s["name"] == "strategy data_parallel"), key=lambda s: s["start_time"])
    assert [a["attributes"]["kvmesh.attempt"] for a in attempts] == [1, 2]
    assert [a["status"]["status_code"] for a in attempts] == ["ERROR", "UNSET"]
    assert attempts[0]["attributes"]["error.type"] == "UNAVAILABLE"
    assert "told to die" in attempts[0]["status"]["description"]
    root = next(s for s in lines if s["name"] == "router.generate")
    assert root["status"]["status_code"] == "UNSET" and root["attributes"]["kvmesh.attempts"] == 2
    assert r.done.attempts == 2


async def test_a_cancel_shows_in_the_trace(h):
    h.engines[0].gates["StartGenerate"] = asyncio.Event()
    call = h.call(PROMPT, strategy="data_parallel")
    await h.engines[0].until(lambda: h.engines[0].generating == 1)
    call.cancel()
    found = await spans(h, "router.generate", "start_generate", "strategy data_parallel")
    assert all(s["attributes"]["kvmesh.cancelled"] is True for s in found.values())


async def test_without_tracing_nothing_is_sent_or_written(h):
    router = await h.start_router(trace_ratio=0.0, trace_dir=str(h.traces / "off"))
    request = router_pb2.GenerateRequest(tokens=router_pb2.TokenIds(ids=PROMPT), strategy="prefill_decode")
    messages = [m async for m in router.Generate(request, timeout=5)]
    assert messages[-1].done.trace_id == "" and messages[-1].done.attempts == 1
    assert not any("traceparent" in meta for e in h.engines for _, meta in e.metadata)
    assert not (h.traces / "off").exists()


async def test_reflection_and_health_are_on(h):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with channel(h.servers[0].address) as ch:
        request = health_pb2.HealthCheckRequest(service="kvmesh.v1.Router")
        reply = await health_pb2_grpc.HealthStub(ch).Check(request, timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvmesh.v1.Router")]
        answers = reflection_pb2_grpc.ServerReflectionStub(ch).ServerReflectionInfo(asked, timeout=5)
        assert (await answers.read()).HasField("file_descriptor_response")
