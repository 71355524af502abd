"""The built-in strategies over fake engines: which sub-requests they make, with which ranges."""

import pytest
from fake_engine import BYTES_PER_TOKEN, answer
from router_harness import Harness

from kvmesh.v1 import common_pb2

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
ALL = ["data_parallel", "prefill_decode", "balanced_prefill_decode"]


@pytest.fixture
async def h(tmp_path):
    async with Harness(2, tmp=tmp_path) as harness:
        yield harness


async def test_data_parallel_is_one_call(h):
    r = await h.generate(PROMPT, strategy="data_parallel")
    assert r.tokens == answer(PROMPT, 8)
    e0, e1 = h.engines
    assert e0.methods() == ["StartGenerate"] and e1.methods() == []
    (call,) = e0.requests("StartGenerate")
    assert call.begin == 0 and not call.HasField("ticket") and list(call.token_ids) == PROMPT
    assert call.request_id == r.started.request_id
    assert (r.started.strategy, r.started.strategy_revision, r.started.prompt_tokens) == ("data_parallel", 0, 100)
    assert r.done.reason == common_pb2.FINISH_REASON_LENGTH and r.done.attempts == 1
    assert (r.done.usage.prompt_tokens, r.done.usage.completion_tokens) == (100, 8)
    share = r.share("e0")
    assert (share.prefilled_tokens, share.decoded_tokens, share.sent_bytes) == (100, 8, 0)
    assert 0 < r.done.ttft_seconds <= r.done.jct_seconds and 0 < r.done.tpot_seconds < r.done.jct_seconds


async def test_prefill_decode_sends_all_but_the_last_token(h):
    r = await h.generate(PROMPT, strategy="prefill_decode")
    assert r.tokens == answer(PROMPT, 8)
    p, d = h.engines
    assert p.methods() == ["RemoteSend"] and d.methods() == ["PrepRecv", "StartGenerate"]
    assert d.requests("PrepRecv")[0].end == -1
    (send,) = p.requests("RemoteSend")
    assert (send.begin, send.end) == (0, 99) and send.ticket.receiver.name == "e1"
    (start,) = d.requests("StartGenerate")
    assert start.begin == 99 and start.ticket.id == send.ticket.id
    assert r.share("e0").prefilled_tokens == 99 and r.share("e0").sent_bytes == 99 * BYTES_PER_TOKEN
    assert r.share("e0").transport == "fake"
    one = r.share("e1")
    assert (one.received_tokens, one.cached_tokens, one.prefilled_tokens, one.decoded_tokens) == (99, 0, 1, 8)
    await h.idle()


async def test_prefill_decode_sends_only_what_is_missing(h):
    h.engines[1].cached = PROMPT[:60]
    r = await h.generate(PROMPT, strategy="prefill_decode")
    (send,) = h.engines[0].requests("RemoteSend")
    assert (send.begin, send.end) == (60, 99)
    assert r.share("e1").cached_tokens == 60 and r.share("e1").received_tokens == 39


@pytest.mark.parametrize(("cached", "sends"), [(99, 0), (84, 0), (83, 1)])
async def test_prefill_decode_skips_a_small_transfer(h, cached, sends):
    h.engines[1].cached = PROMPT[:cached]
    r = await h.generate(PROMPT, strategy="prefill_decode")
    assert r.tokens == answer(PROMPT, 8)
    assert len(h.engines[0].requests("RemoteSend")) == sends
    (start,) = h.engines[1].requests("StartGenerate")
    assert start.begin == (99 if sends else cached) and start.HasField("ticket")
    await h.idle()


@pytest.mark.parametrize(("ratio", "end"), [("0.2", 80), ("0", 99), ("1", 0), ("0.001", 99)])
async def test_balanced_splits_the_prompt(h, ratio, end):
    r = await h.generate(PROMPT, strategy="balanced_prefill_decode", strategy_params={"ratio": ratio})
    assert r.tokens == answer(PROMPT, 8)
    p, d = h.engines
    assert d.requests("PrepRecv")[0].end == end
    assert [(s.begin, s.end) for s in p.requests("RemoteSend")] == ([(0, end)] if end else [])
    assert d.requests("StartGenerate")[0].begin == end
    await h.idle()


@pytest.mark.parametrize("strategy", ALL)
async def test_one_token_prompt(h, strategy):
    assert (await h.generate([7], strategy=strategy)).tokens == answer([7], 8)
    assert h.engines[0].requests("RemoteSend") == []
    await h.idle()


@pytest.mark.parametrize("strategy", ALL)
async def test_one_engine_serves_every_strategy(tmp_path, strategy):
    async with Harness(1, tmp=tmp_path) as h:
        assert (await h.generate(PROMPT, strategy=strategy)).tokens == answer(PROMPT, 8)
        assert h.engines[0].requests("RemoteSend") == []
        await h.idle()


async def test_labels_decide_the_roles(tmp_path):
    async with Harness(3, tmp=tmp_path, labels=[{"role": "decode"}, {"role": "prefill"}, {"role": "decode"}]) as h:
        await h.generate(PROMPT, strategy="prefill_decode", strategy_params={"prefill": "2"})
        assert h.engines[1].methods() == ["RemoteSend"]
        assert h.engines[0].methods() == ["PrepRecv", "StartGenerate"] and h.engines[2].methods() == []


async def test_logprobs_pass_through(h):
    r = await h.generate(PROMPT, sampling=common_pb2.SamplingParams(logprobs=True))
    assert r.logprobs == [-0.5] * 8
