"""The clients that a program imports, against a router over fake engines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fake_engine import answer
from router_harness import Harness

from kvmesh.client import AsyncClient, Client, Result
from kvmesh.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MeshError,
    NotFound,
    Unavailable,
)
from kvmesh.local.tiny_model import tiny_model

T = TypeVar("T")
PROMPT = [(i * 37) % 200 + 1 for i in range(50)]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The tiny model: its tokenizer has the bytes as its first 256 ids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMESH_HOME", str(tmp_path_factory.mktemp("home")))
        return tiny_model()


@pytest.fixture
async def h(tmp_path, model) -> AsyncIterator[Harness]:
    async with Harness(2, tmp=tmp_path, path=str(model)) as harness:
        yield harness


@pytest.fixture
async def client(h) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(h.servers[0].address) as made:
        yield made


async def blocking(h: Harness, work: Callable[[Client], T]) -> T:
    """What `work` does with a blocking client, in a thread."""

    def run() -> T:
        with Client(h.servers[0].address) as made:
            return work(made)

    async with asyncio.timeout(20):
        return await asyncio.to_thread(run)


def check(result: Result, tokens: list[int]) -> None:
    assert result.token_ids == tokens == answer(PROMPT, len(tokens))
    assert result.text == bytes(tokens).decode()
    assert (result.reason, result.matched, result.attempts) == ("length", None, 1)
    assert (result.strategy, result.strategy_revision, len(result.request_id)) == ("prefill_decode", 0, 32)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(PROMPT), len(tokens))
    assert 0 < result.ttft_seconds <= result.jct_seconds and result.tpot_seconds > 0
    assert len(result.trace_id) == 32
    assert [s.engine for s in result.shares] == ["e1", "e0"] or [s.engine for s in result.shares] == ["e0", "e1"]


async def test_an_answer_of_the_asyncio_client(client):
    answering = client.generate(
        PROMPT, strategy="prefill_decode", strategy_params={"prefill": 1}, max_new_tokens=8, logprobs=True, timeout=10
    )
    deltas = [delta async for delta in answering]
    assert answering.started.prompt_tokens == len(PROMPT)
    check(answering.result, [t for d in deltas for t in d.token_ids])
    assert answering.result.logprobs == [p for d in deltas for p in d.logprobs] == [-0.5] * 8
    again = await client.generate(PROMPT, strategy="prefill_decode", max_new_tokens=8).wait()
    assert again.text == answering.result.text and again.logprobs == []


async def test_an_answer_of_the_blocking_client(h):
    def work(made: Client) -> tuple[list[int], Result]:
        answering = made.generate(PROMPT, strategy="prefill_decode", max_new_tokens=8, timeout=10)
        return [t for delta in answering for t in delta.token_ids], answering.result

    tokens, result = await blocking(h, work)
    check(result, tokens)
    again = await blocking(h, lambda made: made.generate(PROMPT, max_new_tokens=8).wait())
    assert again.token_ids == tokens and again.strategy == "data_parallel"


async def test_text_in_text_out(client, h):
    result = await client.generate("Grüße, 🥊!", max_new_tokens=5, request_id="mine").wait()
    prompt = list("Grüße, 🥊!".encode())
    assert list(h.engines[0].requests("StartGenerate")[0].token_ids) == prompt
    assert result.request_id == "mine" and result.token_ids == answer(prompt, 5)
    assert result.text == bytes(result.token_ids).decode()


async def test_a_stop_string_ends_the_answer_before_it(client, h):
    wanted = bytes(answer(PROMPT, 20)).decode()
    stop = wanted[6:8]
    result = await client.generate(PROMPT, max_new_tokens=20, stop_strings=[stop, "never"]).wait()
    assert (result.reason, result.matched, result.text) == ("stop_string", stop, wanted[: wanted.index(stop)])
    await h.idle()


async def test_characters_are_whole_however_they_are_generated(client, h):
    text = "日本語🥊"
    for engine in h.engines:
        engine.step = lambda seq: text.encode()[len(seq) - len(PROMPT)]
    deltas = [d async for d in client.generate(PROMPT, max_new_tokens=len(text.encode()))]
    assert "".join(d.text for d in deltas) == text
    assert all("\ufffd" not in d.text for d in deltas)
    # The last character stays unfinished.
    result = await client.generate(PROMPT, max_new_tokens=len(text.encode()) - 1).wait()
    assert result.text == "日本語\ufffd"


async def test_a_stop_token_is_told(client, h):
    for engine in h.engines:
        engine.step = lambda seq: 257 if len(seq) == len(PROMPT) + 3 else 65
    result = await client.generate(PROMPT, max_new_tokens=20).wait()
    assert (result.reason, result.matched, result.text) == ("stop_token", 257, "AAA")


async def test_the_result_is_there_at_the_end_and_not_before(client):
    answering = client.generate(PROMPT, max_new_tokens=8)
    with pytest.raises(FailedPrecondition, match="iterate to its end"):
        _ = answering.result
    assert answering.started.request_id == ""
    await answering.wait()
    assert answering.result.token_ids
    answering.cancel()
    assert answering.result.token_ids


async def test_cancelling_ends_the_work_on_the_engines(client, h):
    h.engines[0].pause_after = (3, asyncio.Event())
    answering = client.generate(PROMPT, strategy="data_parallel", max_new_tokens=8)
    seen = []
    with pytest.raises((Cancelled, asyncio.CancelledError)):
        async for delta in answering:
            seen += delta.token_ids
            if len(seen) == 3:
                answering.cancel()
    assert seen == answer(PROMPT, 3)
    await h.idle()


async def test_cancelling_the_task_ends_the_work_on_the_engines(client, h):
    h.engines[0].pause_after = (3, asyncio.Event())
    task = asyncio.create_task(client.generate(PROMPT, strategy="data_parallel", max_new_tokens=8).wait())
    await h.engines[0].until(lambda: h.engines[0].generating == 1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await h.idle()


async def test_leaving_a_blocking_answer_early_ends_the_work_on_the_engines(h):
    h.engines[0].pause_after = (3, asyncio.Event())

    def work(made: Client) -> None:
        for _ in made.generate(PROMPT, strategy="data_parallel", max_new_tokens=8):
            break

    await blocking(h, work)
    await h.idle()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 1}, "sampling has no field 'temprature'; it has .*temperature"),
        ({"temperature": "hot"}, "sampling.temperature = 'hot' cannot be sent"),
        ({"max_new_tokens": -1}, "sampling.max_new_tokens = -1 cannot be sent"),
        ({"max_new_tokens": 2**32}, "sampling.max_new_tokens = 4294967296 cannot be sent"),
        ({"stop_strings": [1]}, "sampling.stop_strings"),
    ],
)
async def test_sampling_that_cannot_be_sent(client, fields, says):
    with pytest.raises(InvalidArgument, match=says):
        client.generate(PROMPT, **fields)


@pytest.mark.parametrize("token", [-1, 2**32, "a", 1.5, None])
async def test_tokens_that_cannot_be_sent(client, token):
    with pytest.raises(InvalidArgument, match=r"token_ids\[1\] = "):
        client.generate([1, token])


async def test_none_leaves_the_default(client, h):
    await client.generate(PROMPT, temperature=None, seed=7, ignore_eos=True, max_new_tokens=1).wait()
    (request,) = h.engines[0].requests("StartGenerate")
    assert not request.sampling.HasField("temperature")
    assert request.sampling.seed == 7 and request.sampling.ignore_eos


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"prompt": []}, InvalidArgument, "token_ids is empty"),
        ({"prompt": ""}, InvalidArgument, "token_ids is empty"),
        ({"prompt": [320]}, InvalidArgument, r"token_ids\[0\] = 320"),
        ({"prompt": [1] * 5000}, InvalidArgument, "5000 tokens"),
        ({"strategy": "none"}, NotFound, "strategy = 'none' is unknown; there is: adaptive, balanced_prefill_decode, "),
        ({"strategy_params": {"x": 1}}, InvalidArgument, "has no parameter 'x'"),
        ({"model": "none"}, NotFound, "model = 'none' is not served; there is: fake"),
        ({"temperature": -1}, InvalidArgument, "sampling.temperature = -1"),
        ({"request_id": "a b"}, InvalidArgument, "request_id = 'a b'"),
    ],
)
async def test_what_the_router_refuses(client, h, fields, kind, says):
    fields = {"prompt": PROMPT, **fields}
    with pytest.raises(kind, match=says):
        await client.generate(fields.pop("prompt"), **fields).wait()
    assert not h.engines[0].calls and not h.engines[1].calls


async def test_the_timeout_is_the_deadline_of_everything(client, h):
    h.engines[0].gates["StartGenerate"] = asyncio.Event()
    with pytest.raises(DeadlineExceeded):
        await client.generate(PROMPT, strategy="data_parallel", timeout=0.3).wait()
    await h.idle()


async def test_strategies_and_the_one_in_force(client, h):
    infos = {info.name: info for info in await client.strategies()}
    assert list(infos) == sorted(infos) and {"balanced_prefill_decode", "data_parallel", "prefill_decode"} < set(infos)
    ratio = next(p for p in infos["balanced_prefill_decode"].params if p.name == "ratio")
    assert (ratio.type, ratio.default_value, ratio.constraint) == ("float", "0.2", "0 to 1")
    before = await client.strategy()
    assert (before.name, before.revision) == ("data_parallel", 0)
    chosen = await client.set_strategy("balanced_prefill_decode", {"ratio": 0.5, "prefill": 1})
    assert dict(chosen.params) == {"ratio": "0.5", "prefill": "1"} and chosen.revision > 0
    assert await client.strategy() == chosen
    result = await client.generate(PROMPT, max_new_tokens=2).wait()
    assert (result.strategy, result.strategy_revision) == ("balanced_prefill_decode", chosen.revision)
    with pytest.raises(NotFound, match="'none'"):
        await client.set_strategy("none")
    with pytest.raises(InvalidArgument, match=r"ratio = 2\.0 is not 0 to 1"):
        await client.set_strategy("balanced_prefill_decode", {"ratio": 2})
    assert await client.strategy() == chosen
    seen = await blocking(h, lambda made: (made.strategy(), [s.name for s in made.strategies()], made.mesh()))
    assert seen[0] == chosen and seen[1] == list(infos)
    back = await blocking(h, lambda made: made.set_strategy("data_parallel"))
    assert back.revision > chosen.revision


async def test_the_mesh(client, h):
    mesh = await client.mesh()
    assert [e.member.endpoint.name for e in mesh.engines] == ["e0", "e1"]
    assert all(e.connected and e.info.model.name == "fake" for e in mesh.engines)
    assert mesh.registry_connected and mesh.running_requests == 0
    assert mesh.router.address == h.servers[0].address


async def test_nobody_there():
    async with AsyncClient("127.0.0.1:1") as made:
        with pytest.raises(Unavailable, match=r"no kvmesh router answers at 127\.0\.0\.1:1"):
            await made.mesh()
        with pytest.raises(Unavailable, match=r"no kvmesh router answers at 127\.0\.0\.1:1"):
            await made.generate([1]).wait()
    with pytest.raises(InvalidArgument, match="'nowhere' is not HOST:PORT"):
        AsyncClient("nowhere")
    with pytest.raises(InvalidArgument, match="'nowhere' is not HOST:PORT"):
        Client("nowhere")


async def test_somebody_else_there(h):
    async with AsyncClient(h.registry.address) as made:
        with pytest.raises(Unavailable, match="is no kvmesh router"):
            await made.mesh()
        with pytest.raises(Unavailable, match="is no kvmesh router"):
            await made.generate([1]).wait()


async def test_a_router_that_goes_in_the_middle(client, h):
    h.engines[0].pause_after = (3, asyncio.Event())
    seen: list[int] = []

    async def work() -> None:
        async for delta in client.generate(PROMPT, strategy="data_parallel", max_new_tokens=8):
            seen.extend(delta.token_ids)
            if len(seen) == 3:
                stopping.append(asyncio.create_task(h.servers[0].stop(0)))

    stopping: list[asyncio.Task[Any]] = []
    with pytest.raises(MeshError) as caught:
        async with asyncio.timeout(10):
            await work()
    assert isinstance(caught.value, Unavailable | Cancelled)
    assert seen == answer(PROMPT, 3)
    await asyncio.gather(*stopping)
    await h.idle()


async def test_many_threads_share_one_client(h):
    def work(made: Client) -> list[list[int]]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda i: made.generate([i + 1, 2], max_new_tokens=4).wait().token_ids, range(24))
            return list(answers)

    assert await blocking(h, work) == [answer([i + 1, 2], 4) for i in range(24)]


def test_importing_it_is_quick_and_light():
    import subprocess
    import sys

    program = "import kvmesh.client, sys; print(sorted({'torch','transformers','sglang','numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ)
    )
    assert done.stdout == "[]\n"
