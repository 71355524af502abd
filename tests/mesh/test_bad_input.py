"""What is wrong is refused with a status and a message that names the value, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
import pytest
from direct import DirectEngine, spare
from played_writer import PlayedWrite
from prompts import prompt

from kvmesh.client import AsyncClient
from kvmesh.errors import InvalidArgument, MeshError, NotFound
from kvmesh.v1 import engine_pb2
from kvmesh.v1.common_pb2 import Ticket

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
GOOD = prompt(20, "good")
VOCAB = 320


async def refused(call: Any, code: grpc.StatusCode, *words: str) -> None:
    """Fails unless the call ends with `code` and a message that has all `words`."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert error.code() is code, error
    for word in words:
        assert word in (error.details() or ""), (word, error.details())


async def unchanged(engines: list[DirectEngine]) -> None:
    """Fails unless all slots are free: nothing was reserved, and nothing cached."""
    for engine in engines:
        assert (await engine.at_rest()).free_slots == engine.info.total_slots


PROMPTS = {
    "empty": (lambda context: [], ["token_ids is empty"]),
    "vocabulary": (lambda context: [5, VOCAB, 6], [f"token_ids[1] = {VOCAB}", f"vocabulary of {VOCAB}"]),
    "context": (lambda context: [7] * (context + 1), ["token_ids has", "context length"]),
}


@pytest.mark.parametrize("wrong", PROMPTS)
async def test_prompts(wrong: str, client: AsyncClient, engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    make, words = PROMPTS[wrong]
    token_ids = make(receiver.info.model.context_length)
    words = [*words, str(len(token_ids))] if wrong == "context" else words
    ticket = await receiver.prepare(GOOD)
    await refused(receiver.prepare(token_ids, end=0), INVALID, *words)
    await refused(sender.send(token_ids, ticket, begin=0, end=0), INVALID, *words)
    await refused(receiver.generate(token_ids), INVALID, *words)
    for strategy in ("data_parallel", "prefill_decode", "balanced_prefill_decode"):
        with pytest.raises(InvalidArgument) as caught:
            await client.generate(token_ids, strategy=strategy).wait()
        assert all(word in str(caught.value) for word in words)
    assert await receiver.release(ticket)
    await unchanged(engines)


async def test_a_prompt_must_leave_room_for_one_token(client: AsyncClient, engines: list[DirectEngine]) -> None:
    context = engines[0].info.model.context_length
    full = prompt(context, "full")
    await refused(engines[0].generate(full), INVALID, str(context), "no room for a new one")
    with pytest.raises(InvalidArgument, match="no room for a new one"):
        await client.generate(full).wait()
    await unchanged(engines)


async def test_models(client: AsyncClient, engines: list[DirectEngine]) -> None:
    receiver = engines[1]
    ticket = await receiver.prepare(GOOD, model=receiver.info.model.name)
    await refused(receiver.prepare(GOOD, model="other"), NOT_FOUND, "model = 'other'", receiver.info.model.name)
    await refused(receiver.generate(GOOD, model="other"), NOT_FOUND, "model = 'other'")
    with pytest.raises(NotFound, match="model = 'other'"):
        await client.generate(GOOD, model="other").wait()
    assert await receiver.release(ticket)
    await unchanged(engines)


async def test_ranges_of_prep_recv(engines: list[DirectEngine]) -> None:
    receiver = engines[1]
    await refused(receiver.prepare(GOOD, end=21), INVALID, "end = 21", "20 tokens")
    await refused(receiver.prepare(GOOD, end=-21), INVALID, "end = -21", "20 tokens")
    for field, value in (("ttl_ms", 99), ("ttl_ms", 600_001), ("wait_ms", 600_001)):
        await refused(receiver.prepare(GOOD, **{field: value}), INVALID, f"{field} = {value}")
    await refused(receiver.prepare(GOOD, owner="o" * 129), INVALID, "owner", "129")
    await unchanged(engines)
    nothing = await receiver.prepare(GOOD, end=0)
    assert (nothing.matched, nothing.end) == (0, 0)
    assert await receiver.release(nothing)


async def test_ranges_of_remote_send(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    ticket = await receiver.prepare(GOOD, end=10)
    for begin, end, words in (
        (5, 3, ["begin = 5, end = 3", "20 tokens"]),
        (0, 21, ["end = 21", "20 tokens"]),
        (-21, 10, ["begin = -21"]),
        (0, 11, ["end = 11", "0 to 10"]),
        # Not where the ticket is filled to: only the receiver knows.
        (5, 10, ["begin = 5", "holds 0"]),
    ):
        await refused(sender.send(GOOD, ticket, begin=begin, end=end), INVALID, *words)
    first = await sender.send(GOOD, ticket, begin=0, end=4)
    assert first.sent_tokens == 4
    await refused(sender.send(GOOD, ticket, begin=0, end=10), INVALID, "begin = 0", "holds 4")
    # None of that cost the ticket anything.
    second = await sender.send(GOOD, ticket, begin=4, end=10)
    assert second.sent_tokens == 6
    answer = await receiver.generate(GOOD, ticket, max_new_tokens=2)
    assert answer.finished.usage.cached_tokens == 10


async def test_ranges_of_start_generate(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    ticket = await receiver.prepare(GOOD, end=10)
    for begin, words in (
        (5, ["begin = 5", "filled to 0"]),
        (10, ["begin = 10", "filled to 0"]),
        (20, ["begin = 20", "20"]),
        (21, ["begin = 21", "20 tokens"]),
        (-21, ["begin = -21", "20 tokens"]),
    ):
        await refused(receiver.generate(GOOD, ticket, begin=begin), INVALID, *words)
    await refused(receiver.generate(GOOD, begin=5), INVALID, "begin = 5", "without a ticket")
    await sender.send(GOOD, ticket)
    await refused(receiver.generate(GOOD, ticket, begin=0), INVALID, "begin = 0", "filled to 10")
    answer = await receiver.generate(GOOD, ticket, begin=-10, max_new_tokens=2)
    assert answer.finished.usage.cached_tokens == 10


def changed(ticket: Ticket, **fields: Any) -> Ticket:
    copy = Ticket()
    copy.CopyFrom(ticket)
    for name, value in fields.items():
        holder, _, field = name.rpartition("__")
        setattr(getattr(copy, holder) if holder else copy, field, value)
    return copy


Use = Callable[[DirectEngine, DirectEngine, Ticket], Coroutine[Any, Any, Any]]


async def send(sender: DirectEngine, receiver: DirectEngine, ticket: Ticket) -> Any:
    return await sender.send(GOOD, ticket)


async def generate(sender: DirectEngine, receiver: DirectEngine, ticket: Ticket) -> Any:
    return await receiver.generate(GOOD, ticket, begin=ticket.matched, max_new_tokens=2)


@pytest.mark.parametrize("use", [send, generate])
async def test_tickets(use: Use, engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    ticket = await receiver.prepare(GOOD)
    foreign = changed(ticket, receiver__incarnation="0" * 32)
    unknown = changed(ticket, id=10**6)
    await refused(use(sender, receiver, unknown), NOT_FOUND, "ticket.id = 1000000 is unknown")
    await refused(use(sender, receiver, foreign), PRECONDITION, "ticket.receiver", "engine-1", "0" * 8)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await receiver.release(foreign)
    assert caught.value.code() is PRECONDITION
    assert await receiver.release(unknown) is False

    await use(sender, receiver, ticket)
    if use is generate:
        await refused(use(sender, receiver, ticket), NOT_FOUND, f"ticket.id = {ticket.id} was used")
        assert await receiver.release(ticket) is False
    else:
        assert await receiver.release(ticket) is True
        await refused(use(sender, receiver, ticket), NOT_FOUND, f"ticket.id = {ticket.id} was released")

    await receiver.flush()
    expired = await receiver.prepare(GOOD, ttl_ms=100)
    await receiver.at_rest()
    await refused(use(sender, receiver, expired), NOT_FOUND, f"ticket.id = {expired.id} has expired")
    assert await receiver.release(expired) is False


async def test_a_ticket_that_is_being_written_into(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    ticket = await receiver.prepare(GOOD)
    async with PlayedWrite(receiver.peer, ticket, receiver.info.layout) as write:
        await write.begin()
        for use in (send, generate):
            await refused(use(sender, receiver, ticket), PRECONDITION, f"ticket {ticket.id}", "played")
    await unchanged(engines)


async def test_what_does_not_fit_the_sender(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    ticket = await receiver.prepare(GOOD)
    await refused(sender.send(GOOD, changed(ticket, layout_fingerprint="0" * 32)), PRECONDITION, "layout")
    await refused(sender.send(GOOD, changed(ticket, receiver__address="")), INVALID, "receiver.address")
    gone = changed(ticket, receiver__address="127.0.0.1:1", receiver__incarnation="1" * 32)
    await refused(sender.send(GOOD, gone), grpc.StatusCode.UNAVAILABLE, "engine-1")
    assert await receiver.release(ticket)
    await unchanged(engines)


SAMPLING = [
    ("max_new_tokens", 0, "= 0"),
    ("max_new_tokens", 100_000, "= 100000"),
    ("temperature", -0.5, "= -0.5"),
    ("temperature", float("nan"), "= nan"),
    ("top_p", 0.0, "= 0"),
    ("top_p", 1.5, "= 1.5"),
    ("top_k", 0, "= 0"),
    ("top_k", -2, "= -2"),
    ("min_p", 1.5, "= 1.5"),
    ("frequency_penalty", 2.5, "= 2.5"),
    ("presence_penalty", -3.0, "= -3"),
    ("repetition_penalty", 0.0, "= 0"),
    ("stop_token_ids", [1, VOCAB], f"[1] = {VOCAB}"),
    ("stop_strings", ["a", ""], "[1] is empty"),
    ("stop_strings", ["x"] * 17, "17"),
    ("seed", 2**31, f"= {2**31}"),
    ("n", 2, "= 2"),
    ("n", 0, "= 0"),
]


@pytest.mark.parametrize(("field", "value", "words"), SAMPLING, ids=[f"{f}-{v}"[:40] for f, v, _ in SAMPLING])
async def test_sampling(
    field: str, value: object, words: str, client: AsyncClient, engines: list[DirectEngine]
) -> None:
    named = f"sampling.{field}"
    ticket = await engines[1].prepare(GOOD, end=0)
    await refused(engines[1].generate(GOOD, ticket, **{field: value}), INVALID, named, words)
    with pytest.raises(InvalidArgument) as caught:
        await client.generate(GOOD, strategy="prefill_decode", **{field: value}).wait()
    assert named in str(caught.value) and words in str(caught.value)
    # A call that is refused leaves the ticket as it was.
    assert await engines[1].release(ticket)
    await unchanged(engines)


async def test_request_ids(client: AsyncClient, engines: list[DirectEngine]) -> None:
    engine = engines[0]
    await refused(engine.generate(GOOD, request_id="a b"), INVALID, "request_id = 'a b'")
    with pytest.raises(InvalidArgument, match="request_id = 'a b'"):
        await client.generate(GOOD, request_id="a b").wait()
    call = engine.start(GOOD, request_id="twice", max_new_tokens=2000)
    await call.read()
    await refused(engine.generate(GOOD, request_id="twice"), grpc.StatusCode.ALREADY_EXISTS, "'twice'")
    call.cancel()
    answer = client.generate(GOOD, request_id="twice", ignore_eos=True, max_new_tokens=2000)
    async for _ in answer:
        with pytest.raises(InvalidArgument, match="'twice'"):
            await client.generate(GOOD, request_id="twice").wait()
        break
    answer.cancel()


async def test_prompts_of_the_router(client: AsyncClient, engines: list[DirectEngine]) -> None:
    for empty in ("", []):
        with pytest.raises(InvalidArgument, match="token_ids is empty"):
            await client.generate(empty).wait()
    await unchanged(engines)


@pytest.mark.parametrize(
    ("name", "params", "kind", "words"),
    [
        ("none", {}, NotFound, ["strategy = 'none'", "data_parallel"]),
        ("prefill_decode", {"prefil": 1}, InvalidArgument, ["'prefil'", "min_remote"]),
        ("prefill_decode", {"prefill": "two"}, InvalidArgument, ["prefill = 'two'", "int"]),
        ("prefill_decode", {"prefill": 0}, InvalidArgument, ["prefill = 0", "1 to 1024"]),
        ("balanced_prefill_decode", {"ratio": 1.5}, InvalidArgument, ["ratio = 1.5", "0 to 1"]),
        ("balanced_prefill_decode", {"ratio": "nan"}, InvalidArgument, ["ratio = nan"]),
        ("data_parallel", {"ratio": 0.5}, InvalidArgument, ["'ratio'"]),
    ],
)
async def test_strategies(
    name: str,
    params: dict[str, object],
    kind: type[MeshError],
    words: list[str],
    client: AsyncClient,
    engines: list[DirectEngine],
) -> None:
    before = await client.strategy()
    with pytest.raises(kind) as asked:
        await client.generate(GOOD, strategy=name, strategy_params=params).wait()
    with pytest.raises(kind) as put:
        await client.set_strategy(name, params)
    for error in (asked, put):
        assert all(word in str(error.value) for word in words), str(error.value)
    assert await client.strategy() == before
    await unchanged(engines)


async def test_other_calls(engines: list[DirectEngine]) -> None:
    engine = engines[0]
    watch = engine.engine.WatchStatus(engine_pb2.WatchStatusRequest(interval_ms=5), timeout=10)
    await refused(watch.read(), INVALID, "interval_ms = 5")
    # The cache is not emptied while somebody holds parts of it.
    ticket = await engine.prepare(GOOD)
    await refused(engine.engine.Flush(engine_pb2.FlushRequest(), timeout=10), PRECONDITION, "tickets")
    assert await engine.release(ticket)
    aborted = await engine.engine.Abort(engine_pb2.AbortRequest(request_id="nobody"), timeout=10)
    assert not aborted.found


async def test_many_wrong_calls_at_once(client: AsyncClient, engines: list[DirectEngine]) -> None:
    wrong = [client.generate([VOCAB + i], strategy="prefill_decode").wait() for i in range(20)]
    good = [client.generate(prompt(30, i), strategy="prefill_decode", max_new_tokens=4).wait() for i in range(6)]
    results = await asyncio.gather(*wrong, *good, return_exceptions=True)
    assert all(isinstance(r, InvalidArgument) for r in results[:20])
    assert not any(isinstance(r, BaseException) for r in results[20:])
    for engine in engines:
        assert spare(await engine.at_rest()) == engine.info.total_slots
