"""The engine service as a whole: generations, tickets in use, bad input, aborts, cancels, and its own end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from engine_harness import CODES, EngineNode, collect, refused, two, until
from fake_runtime import CONTEXT, EOS, TINY, VOCAB, FakeRuntime, answer

from kvmesh.detokenize import Detokenizer
from kvmesh.errors import Unavailable
from kvmesh.grpcx import channel, wait_serving
from kvmesh.v1 import common_pb2, engine_pb2, engine_pb2_grpc, kv_pb2, registry_pb2, registry_pb2_grpc
from services.engine import main
from services.engine.base import Ending
from services.engine.cli import EngineConfig
from services.registry.memory import MemoryBackend
from services.registry.server import serving

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
REASONS = common_pb2.FinishReason


@pytest.fixture
async def node(request) -> AsyncIterator[EngineNode]:
    made = EngineNode("d", FakeRuntime(**getattr(request, "param", {})))
    await made.start()
    try:
        yield made
        await made.settled()
    finally:
        await made.stop()


async def abort(node: EngineNode, request_id: str) -> bool:
    request = engine_pb2.AbortRequest(request_id=request_id)
    return (await node.engine.Abort(request, timeout=10)).found


async def flush(node: EngineNode) -> None:
    await node.engine.Flush(engine_pb2.FlushRequest(), timeout=10)


def counted(node: EngineNode, call: str) -> dict[str, int]:
    """Sub-requests that ended, by status."""
    return {status: n for (name, status), n in node.service.totals.calls.items() if name == call}


# Generating


async def test_cold_and_warm(node):
    cold = await node.generate(PROMPT, 8)
    assert cold.tokens == answer(PROMPT, 8) and cold.finished.reason == REASONS.FINISH_REASON_LENGTH
    usage = cold.finished.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (100, 0, 8)
    warm = await node.generate(PROMPT, 8)
    assert warm.tokens == cold.tokens and warm.finished.usage.cached_tokens == 99
    longer = await node.generate(PROMPT + cold.tokens, 4)
    assert longer.tokens == answer(PROMPT + cold.tokens, 4) and longer.finished.usage.cached_tokens == 107
    assert node.service.totals.generated_tokens == 20 and counted(node, "start_generate") == {"OK": 3}


async def test_defaults(node):
    """128 tokens, no log-probabilities, an id drawn."""
    request = engine_pb2.StartGenerateRequest(token_ids=[1])
    result = await collect(node.engine.StartGenerate(request, timeout=20))
    assert len(result.tokens) == 128 and result.logprobs == []


async def test_log_probabilities_on_request(node):
    result = await node.generate(PROMPT, 3, sampling=common_pb2.SamplingParams(logprobs=True))
    assert result.logprobs == [-0.5, -1.0, -1.5]


async def test_the_context_is_the_limit(node):
    prompt = PROMPT[:1] * (CONTEXT - 3)
    node.runtime.total_slots = 512
    code, _ = await refused(collect(node.call(prompt, 1)))
    assert code is CODES.RESOURCE_EXHAUSTED
    # 4 more tokens than there is room for in the context are no error.
    async with two(FakeRuntime(4096)) as (p, _):
        result = await p.generate(prompt, 7)
        assert len(result.tokens) == 3 and result.finished.reason == REASONS.FINISH_REASON_LENGTH


async def test_stop_tokens(node):
    wanted = answer(PROMPT, 8)
    sampling = common_pb2.SamplingParams(stop_token_ids=[EOS, wanted[3]])
    result = await node.generate(PROMPT, 8, sampling=sampling)
    upto = wanted.index(wanted[3]) + 1
    assert result.tokens == wanted[:upto]
    assert result.finished.reason == REASONS.FINISH_REASON_STOP_TOKEN and result.finished.stop_token_id == wanted[3]


def with_tokenizer(node: EngineNode, gate: asyncio.Event | None = None) -> None:
    """Tokens are bytes."""

    class Bytes:
        def detokenizer(self, prompt: Any) -> Detokenizer:
            return Detokenizer(
                lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"), frozenset(), prompt
            )

    async def get(path: str) -> Bytes:
        assert path == node.model_path
        if gate is not None:
            await gate.wait()
        return Bytes()

    node.tokenizers.get = get  # type: ignore[method-assign, assignment]


async def test_stop_strings(node):
    with_tokenizer(node)
    wanted = answer(PROMPT, 12)
    stop = bytes(wanted[4:7]).decode()
    result = await node.generate(PROMPT, 12, sampling=common_pb2.SamplingParams(stop_strings=["\x00", stop]))
    assert result.tokens == wanted[:7]
    assert result.finished.reason == REASONS.FINISH_REASON_STOP_STRING and result.finished.stop_string == stop
    # The runtime does not go on.
    await until(lambda: node.runtime.idle)


async def test_a_stop_string_that_began_before_this_engine(node):
    with_tokenizer(node)
    wanted = answer(PROMPT, 12)
    sampling = common_pb2.SamplingParams(stop_strings=[bytes(wanted[4:7]).decode()])
    tokens = PROMPT + wanted[:6]
    result = await node.generate(tokens, 6, sampling=sampling, generated=6)
    assert result.tokens == wanted[6:7] and result.finished.reason == REASONS.FINISH_REASON_STOP_STRING
    alone = await node.generate(tokens, 6, sampling=sampling)
    assert alone.tokens == wanted[6:]
    code, details = await refused(collect(node.call(tokens, generated=len(tokens))))
    assert code is CODES.INVALID_ARGUMENT and "generated" in details


async def test_stop_strings_without_a_tokenizer(node):
    ticket = await node.prepare(PROMPT)
    sampling = common_pb2.SamplingParams(stop_strings=["x"])
    code, details = await refused(collect(node.call(PROMPT, ticket=ticket, sampling=sampling)))
    assert code is CODES.INVALID_ARGUMENT and "no tokenizer" in details
    assert await node.release(ticket) is True


# Refused, and nothing done


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokens": []}, "token_ids is empty"),
        ({"tokens": [VOCAB]}, f"token_ids[0] = {VOCAB}"),
        ({"tokens": [1] * (CONTEXT + 1)}, "more than the context length"),
        ({"tokens": [1] * CONTEXT}, "leaves no room"),
        ({"begin": 1}, "begin = 1 without a ticket"),
        ({"begin": 100}, "begin = 100 leaves no token of 100 to prefill"),
        ({"begin": 101}, "begin = 101"),
        ({"begin": -101}, "begin = -101"),
        ({"sampling": common_pb2.SamplingParams(temperature=-1)}, "sampling.temperature"),
        ({"sampling": common_pb2.SamplingParams(stop_token_ids=[VOCAB])}, "sampling.stop_token_ids[0]"),
        ({"sampling": common_pb2.SamplingParams(n=2)}, "sampling.n"),
        ({"max_new": CONTEXT + 1}, "sampling.max_new_tokens"),
        ({"request_id": "a b"}, "request_id = 'a b'"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "x\n"}, "request_id"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
async def test_bad_arguments(node, fields, says):
    code, details = await refused(collect(node.call(**{"tokens": PROMPT, **fields})))
    assert code is CODES.INVALID_ARGUMENT and says in details
    assert node.runtime.calls["generate"] == 0 and not node.service._running


async def test_an_unknown_model(node):
    code, details = await refused(collect(node.call(PROMPT, model="other")))
    assert code is CODES.NOT_FOUND and "'other'" in details
    assert (await node.generate(PROMPT, 1, model="tiny")).tokens == answer(PROMPT, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"begin": 0},
        {"begin": 98},
        {"begin": 99, "sampling": common_pb2.SamplingParams(top_p=0)},
        {"begin": 99, "model": "other"},
        {"begin": 99, "request_id": "a b"},
        {"begin": 100},
        {"begin": -2},
    ],
    ids=str,
)
async def test_a_refused_call_leaves_the_ticket(fields):
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        code, _ = await refused(collect(d.call(PROMPT, ticket=ticket, **fields)))
        assert code in (CODES.INVALID_ARGUMENT, CODES.NOT_FOUND)
        assert (await d.generate(PROMPT, 4, ticket=ticket, begin=-1)).tokens == answer(PROMPT, 4)


async def test_a_runtime_that_takes_no_request_leaves_the_ticket(node):
    ticket = await node.prepare(PROMPT)
    node.runtime.faults["generate"] = Unavailable("the scheduler takes no messages")
    code, details = await refused(collect(node.call(PROMPT, ticket=ticket)))
    assert (code, details) == (CODES.UNAVAILABLE, "the scheduler takes no messages")
    assert not node.service._running
    node.runtime.faults.clear()
    assert (await node.generate(PROMPT, 4, ticket=ticket)).tokens == answer(PROMPT, 4)


@pytest.mark.parametrize("how", ["unknown", "released", "expired", "used"])
async def test_tickets_that_are_not_there(node, how):
    ticket = await node.prepare(PROMPT, ttl_ms=100 if how == "expired" else 0)
    if how == "expired":
        await until(lambda: node.book.count == 0)
    elif how == "used":
        await node.generate(PROMPT, 1, ticket=ticket)
    else:
        await node.release(ticket)
    if how == "unknown":
        ticket.id = 5
    code, details = await refused(collect(node.call(PROMPT, ticket=ticket)))
    wanted = {"unknown": "is unknown", "expired": "has expired"}.get(how, f"was {how}")
    assert code is CODES.NOT_FOUND and details == f"ticket.id = {ticket.id} {wanted}"
    assert await node.release(ticket) is False


async def test_a_ticket_of_a_former_life(node):
    ticket = await node.prepare(PROMPT)
    other = common_pb2.Ticket.FromString(ticket.SerializeToString())
    other.receiver.incarnation = "f" * 32
    code, details = await refused(collect(node.call(PROMPT, ticket=other)))
    assert code is CODES.FAILED_PRECONDITION and "ffffffff" in details
    await node.release(ticket)


async def test_a_ticket_that_is_being_written_into():
    async with two() as (p, d):
        gate = p.runtime.gate("piece", 1)
        ticket = await d.prepare(PROMPT)
        call = p.send(PROMPT, ticket)
        await gate.reached()
        code, details = await refused(collect(d.call(PROMPT, ticket=ticket)))
        assert code is CODES.FAILED_PRECONDITION and "still being written into by p" in details
        gate.open()
        await call
        assert (await d.generate(PROMPT, 4, ticket=ticket, begin=99)).tokens == answer(PROMPT, 4)


async def test_a_ticket_that_was_filled_in_part(node):
    """What was reserved and not filled is free for the generation itself."""
    async with two(b=FakeRuntime(total_slots=110)) as (p, d):
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket, end=40)
        result = await d.generate(PROMPT, 8, ticket=ticket, begin=40)
        assert result.tokens == answer(PROMPT, 8) and result.finished.usage.cached_tokens == 40


async def test_a_ticket_for_another_prompt(node):
    """The KV is what it is: the caller's mistake shows in the tokens, and in nothing else."""
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        other = [7, *PROMPT[1:]]
        result = await d.generate(other, 4, ticket=ticket, begin=99)
        assert result.tokens != answer(other, 4)
        await d.settled()
        # Its tokens went into the cache under the prompt it named: only a flush helps.
        await flush(d)


async def test_ids_are_unique_among_those_that_run(node):
    gate = node.runtime.gate("token")
    first = asyncio.ensure_future(node.generate(PROMPT, 2, request_id="a#1"))
    await gate.reached()
    code, details = await refused(collect(node.call(PROMPT, request_id="a#1")))
    assert code is CODES.ALREADY_EXISTS and "'a#1'" in details
    gate.open()
    assert (await first).tokens == answer(PROMPT, 2)
    assert (await node.generate(PROMPT, 2, request_id="a#1")).tokens == answer(PROMPT, 2)


# Failures of the runtime


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Out of memory even after retracting all", CODES.RESOURCE_EXHAUSTED),
        ("CUDA error", CODES.INTERNAL),
        ("the engine is stopping", CODES.UNAVAILABLE),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
async def test_a_runtime_that_gives_up(node, message, code, after):
    node.runtime.ending = after, Ending("failed", message=message)
    ticket = await node.prepare(PROMPT)
    assert await refused(collect(node.call(PROMPT, ticket=ticket))) == (code, message)
    assert await node.release(ticket) is False


@pytest.mark.parametrize("node", [{"total_slots": 50}], indirect=True)
async def test_a_prompt_that_can_never_fit(node):
    code, details = await refused(collect(node.call(PROMPT, 4)))
    assert code is CODES.RESOURCE_EXHAUSTED and "ut of memory" in details
    assert (await node.generate(PROMPT[:20], 4)).tokens == answer(PROMPT[:20], 4)


async def test_the_runtime_stops(node):
    gate = node.runtime.gate("token", 2)
    call = asyncio.ensure_future(collect(node.call(PROMPT, 8)))
    await gate.reached()
    await node.runtime.stop()
    assert await refused(call) == (CODES.UNAVAILABLE, "the engine is stopping")
    for method in (node.generate(PROMPT, 1), node.prepare(PROMPT), flush(node)):
        assert await refused(method) == (CODES.UNAVAILABLE, "the engine is stopping")


# Aborts, cancels, deadlines


@pytest.mark.parametrize(("point", "free", "tokens"), [("prefill", 0, 0), ("token", 0, 0), ("token", 3, 3)])
async def test_abort_at_every_stage(node, point, free, tokens):
    gate = node.runtime.gate(point, free)
    ticket = await node.prepare(PROMPT, end=0)
    call = asyncio.ensure_future(node.generate(PROMPT, 8, ticket=ticket, request_id="r"))
    await gate.reached()
    assert await abort(node, "r") is True
    result = await call
    assert result.tokens == answer(PROMPT, tokens) and result.finished.reason == REASONS.FINISH_REASON_ABORT
    assert result.finished.usage.completion_tokens == tokens
    await until(lambda: node.runtime.idle)
    assert await abort(node, "r") is False


async def test_abort_of_the_unknown(node):
    assert await abort(node, "nobody") is False
    assert await abort(node, "") is False


async def test_abort_before_the_runtime_knows_of_it(node):
    """While the tokenizer loads, the request is running here all the same."""
    gate = asyncio.Event()
    with_tokenizer(node, gate)
    sampling = common_pb2.SamplingParams(stop_strings=["x"])
    call = asyncio.ensure_future(node.generate(PROMPT, 50, request_id="r", sampling=sampling))
    await until(lambda: "r" in node.service._running)
    assert await abort(node, "r") is True
    gate.set()
    result = await call
    assert result.finished.reason == REASONS.FINISH_REASON_ABORT and len(result.tokens) < 50


@pytest.mark.parametrize("how", ["cancelled", "late"])
@pytest.mark.parametrize(("point", "free"), [("prefill", 0), ("token", 0), ("token", 3)])
@pytest.mark.parametrize("ticketed", [False, True])
async def test_an_end_at_every_stage_of_a_generation(point, free, how, ticketed):
    async with two() as (p, d):
        gate = d.runtime.gate(point, free)
        ticket = None
        if ticketed:
            ticket = await d.prepare(PROMPT)
            await p.send(PROMPT, ticket)
        begin = 99 if ticketed else 0
        call = d.call(PROMPT, 8, ticket=ticket, begin=begin, timeout=0.2 if how == "late" else 20)
        await gate.reached()
        if how == "cancelled":
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await collect(call)
        else:
            code, _ = await refused(collect(call))
            assert code is CODES.DEADLINE_EXCEEDED
        await until(lambda: d.runtime.idle and not d.service._running)
        if ticket is not None:
            assert await d.release(ticket) is False
        d.runtime.gates.clear()
        assert (await d.generate(PROMPT, 4)).tokens == answer(PROMPT, 4)


async def test_a_caller_that_stops_reading(node):
    """It leaves in the middle of a stream."""
    call = node.call(PROMPT, 200)
    async for message in call:
        assert message.HasField("chunk")
        break
    call.cancel()
    await until(lambda: node.runtime.idle and not node.service._running)


# Flush, Hottest, Leave


async def test_flush(node):
    await node.generate(PROMPT, 2)
    assert node.runtime.load.cached > 0
    await flush(node)
    assert node.runtime.load.free == 512
    assert (await node.generate(PROMPT, 2)).finished.usage.cached_tokens == 0


@pytest.mark.parametrize("how", ["running", "held", "quarantined", "sending"])
async def test_flush_is_refused_while_anything_is_in_use(how):
    async with two() as (p, d):
        gates = [d.runtime.gate("token"), p.runtime.gate("piece"), p.runtime.gate("stopping")]
        ticket = await d.prepare(PROMPT)
        calls: list[Any] = []
        busy = d
        if how == "running":
            calls.append(asyncio.ensure_future(d.generate(PROMPT, 2)))
            await gates[0].reached()
        if how in ("quarantined", "sending"):
            calls.append(asyncio.ensure_future(refused(p.send(PROMPT, ticket))))
            await gates[1].reached()
            busy = p if how == "sending" else d
        if how != "held":
            await d.release(ticket)
        code, details = await refused(flush(busy))
        assert code is CODES.FAILED_PRECONDITION and "not emptied" in details
        for gate in gates:
            gate.open()
        await asyncio.gather(*calls)
        if how == "held":
            await d.release(ticket)
        await d.settled()
        await flush(d)


async def test_hottest(node):
    for count in (0, 1001):
        call = node.engine.Hottest(engine_pb2.HottestRequest(count=count), timeout=5)
        assert (await refused(call))[0] is CODES.INVALID_ARGUMENT
    # A runtime that does not tell.
    assert (await refused(node.engine.Hottest(engine_pb2.HottestRequest(count=1))))[0] is CODES.UNIMPLEMENTED


async def test_an_engine_in_no_registry_cannot_leave(node):
    assert (await refused(node.engine.Leave(engine_pb2.LeaveRequest())))[0] is CODES.FAILED_PRECONDITION


# Whole requests

STAGES = ["prepare", "send", "generate", "whole", "expire"]


async def one(rng: random.Random, p: EngineNode, d: EngineNode, number: int) -> str:
    """A request by way of both engines, which is given up somewhere; what became of it."""
    prompt = [rng.randrange(4) for _ in range(rng.randrange(2, 60))]
    stage = rng.choice(STAGES)
    try:
        ticket = await d.prepare(
            prompt, end=rng.choice([-1, len(prompt) // 2]), wait_ms=5000, ttl_ms=100 if stage == "expire" else 0
        )
    except grpc.aio.AioRpcError as error:
        return error.code().name
    if stage == "prepare":
        return str(await d.release(ticket))
    if stage == "expire":
        return "expires"
    send = p.send(prompt, ticket)
    if stage == "send":
        await asyncio.sleep(rng.random() * 0.004)
        send.cancel()
        await asyncio.gather(send, return_exceptions=True)
        return str(await d.release(ticket))
    await send
    call = d.call(prompt, rng.randrange(1, 12), ticket=ticket, begin=ticket.end, request_id=f"r{number}")
    if stage == "generate":
        await asyncio.sleep(rng.random() * 0.004)
        call.cancel()
        # Whether it got there or not.
        await d.release(ticket)
        return "cancelled"
    result = await collect(call)
    assert result.tokens == answer(prompt, len(result.tokens)) and result.tokens
    return "whole"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page", [1, 16])
async def test_many_requests_of_which_many_are_given_up(seed, page):
    """After all of it every slot is free or cached, in both engines; and every answer was right."""
    rng = random.Random(seed)
    layout = dataclasses.replace(TINY, page_size=page)
    async with two(FakeRuntime(512, layout, chunk=16), FakeRuntime(512, layout)) as (p, d):
        results: list[str] = []
        for batch in range(6):
            pairs = [(p, d) if rng.random() < 0.7 else (d, p) for _ in range(10)]
            results += await asyncio.gather(*(one(rng, *pair, 10 * batch + i) for i, pair in enumerate(pairs)))
        assert results.count("whole") >= 5
        assert set(results) <= {"whole", "cancelled", "expires", "True", "False", "RESOURCE_EXHAUSTED"}
        assert not p.sender._peers or all(peer.users >= 0 for peer in p.sender._peers.values())


# Put together


@pytest.fixture
def put_together(tmp_path, monkeypatch):
    """`services.engine.main` with a fake runtime in SGLang's place."""
    runtimes: list[FakeRuntime] = []
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))

    def made(*args: Any) -> FakeRuntime:
        runtimes.append(FakeRuntime())
        return runtimes[-1]

    monkeypatch.setattr(main, "_runtime", made)
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))

    def config(**fields: Any) -> EngineConfig:
        return EngineConfig(model=str(tmp_path), name="e0", trace_ratio=0, **fields)

    return config, runtimes


async def test_put_together(put_together, tmp_path):
    config, runtimes = put_together
    async with serving(MemoryBackend(), "127.0.0.1:0") as registry:
        settings = config(registry=registry.address, announce=str(tmp_path / "address"), labels="role=decode")
        async with AsyncExitStack() as stack:
            assert await main.start(settings, stack) is runtimes[0]
            address = (tmp_path / "address").read_text().strip()
            for service in ("", "kvmesh.v1.Engine", "kvmesh.v1.KvEndpoint", "kvmesh.v1.KvPeer"):
                await wait_serving(address, 5, service)
            # Warm, and nothing of it left.
            assert runtimes[0].calls["generate"] == 2 and runtimes[0].load.free == 512
            async with channel(address) as ch, channel(registry.address) as reg:
                stub = engine_pb2_grpc.EngineStub(ch)
                request = engine_pb2.StartGenerateRequest(token_ids=PROMPT)
                request.sampling.max_new_tokens = 3
                assert (await collect(stub.StartGenerate(request, timeout=5))).tokens == answer(PROMPT, 3)
                call = aiter(stub.WatchStatus(engine_pb2.WatchStatusRequest()))
                info = (await anext(call)).info
                assert info.endpoint.name == "e0" and info.endpoint.address == address
                assert info.model.name == tmp_path.name and info.runtime == "fake 1"
                members = registry_pb2_grpc.RegistryStub(reg).Watch(registry_pb2.WatchRequest())
                (member,) = (await members.read()).present
                assert member.endpoint == info.endpoint and dict(member.labels) == {"role": "decode"}
                await stub.Leave(engine_pb2.LeaveRequest(), timeout=5)
                assert [e.name for e in (await members.read()).left] == ["e0"]
                # What runs goes on.
                assert (await collect(stub.StartGenerate(request, timeout=5))).tokens == answer(PROMPT, 3)
                closing = asyncio.ensure_future(stack.aclose())
                assert (await refused(_to_the_end(call)))[0] is CODES.UNAVAILABLE
                await closing
            assert runtimes[0]._stopped
            runtimes[0].check_all_free()


async def _to_the_end(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_runtime_that_ends_by_itself_ends_the_service(put_together):
    config, runtimes = put_together
    task = asyncio.ensure_future(main.serve(config()))
    await until(lambda: bool(runtimes) and runtimes[0].calls["flush"] > 0)
    await asyncio.sleep(0.05)
    runtimes[0].die("the SGLang scheduler process ended with status -9")
    with pytest.raises(Unavailable, match="ended with status -9"):
        await asyncio.wait_for(task, 10)
    assert runtimes[0]._stopped


@pytest.mark.parametrize("ending", [Ending("failed", message="no kernel"), Ending("length")])
async def test_the_warm_up(ending):
    runtime = FakeRuntime()
    await runtime.start()
    runtime.ending = 0, ending
    if ending.reason == "failed":
        with pytest.raises(Unavailable, match="the warm-up failed: no kernel"):
            await main.warm_up(runtime)
    else:
        await main.warm_up(runtime)
    await until(lambda: runtime.idle)
    runtime.check_all_free()
    await runtime.stop()


async def test_a_warm_up_that_does_not_end(monkeypatch):
    monkeypatch.setattr(main, "WARM_S", 0.05)
    runtime = FakeRuntime()
    await runtime.start()
    runtime.gate("token")
    with pytest.raises(Unavailable, match="does not answer within"):
        await main.warm_up(runtime)
    # It is not left running.
    await until(lambda: runtime.idle)
    await runtime.stop()


async def test_tickets_of_one_prompt_by_many_at_once():
    """Ten requests for one prompt: each has its own ticket, the cache has it once."""
    async with two(b=FakeRuntime(1200)) as (p, d):

        async def go() -> list[int]:
            ticket = await d.prepare(PROMPT, wait_ms=5000)
            await p.send(PROMPT, ticket)
            return (await d.generate(PROMPT, 3, ticket=ticket, begin=99)).tokens

        results = await asyncio.gather(*(go() for _ in range(10)))
        assert results == [answer(PROMPT, 3)] * 10
        await d.settled()
        assert d.runtime.load.cached == 103


async def test_a_ticket_is_used_only_once_by_two_at_once(node):
    ticket = await node.prepare(PROMPT)
    results = await asyncio.gather(*(node.generate(PROMPT, 2, ticket=ticket) for _ in range(4)), return_exceptions=True)
    good = [r for r in results if not isinstance(r, BaseException)]
    bad = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
    assert len(good) == 1 and good[0].tokens == answer(PROMPT, 2)
    assert {e.code() for e in bad} == {CODES.NOT_FOUND} and len(bad) == 3


async def test_calls_are_counted_by_status(node):
    ticket = await node.prepare(PROMPT)
    await refused(node.send(PROMPT, ticket, begin=5, end=4))
    await node.release(ticket)
    await refused(node.send(PROMPT, ticket))
    assert counted(node, "prep_recv") == {"OK": 1}
    assert counted(node, "remote_send") == {"INVALID_ARGUMENT": 1, "NOT_FOUND": 1}
    await refused(node.kv.PrepRecv(kv_pb2.PrepRecvRequest(), timeout=5))
    assert counted(node, "prep_recv") == {"OK": 1, "INVALID_ARGUMENT": 1}
