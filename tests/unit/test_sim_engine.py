"""Simulated engines in a real mesh: registry, router, tickets, transfers, faults."""

import asyncio
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import grpc
import pytest
from sim_harness import SimHarness, fast, reference

from kvmesh.v1 import common_pb2, engine_pb2, kv_pb2

STRATEGIES = ["data_parallel", "prefill_decode", "balanced_prefill_decode"]


def prompt(seed, n):
    rng = random.Random(seed)
    return [rng.randrange(384) for _ in range(n)]


GREEDY = common_pb2.SamplingParams(ignore_eos=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_tokens_are_those_of_the_model_whatever_the_strategy(tmp_path, strategy):
    async with SimHarness(2, tmp=tmp_path) as h:
        for n in (1, 2, 65, 700, 1500):
            for _warm in (False, True):
                got = await h.generate(prompt(n, n), 12, strategy=strategy, sampling=GREEDY)
                assert got.tokens == reference(prompt(n, n), 12), (n, _warm)
        prompts = [prompt(50 + i, 40 * i + 30) for i in range(8)]
        answers = await asyncio.gather(*(h.generate(p, 20, strategy=strategy, sampling=GREEDY) for p in prompts))
        assert [a.tokens for a in answers] == [reference(p, 20) for p in prompts]
        moved = sum(s.sent_bytes for a in answers for s in a.done.shares)
        assert (moved > 0) is (strategy != "data_parallel")
        if moved:
            assert moved % h.runtimes[0].profile.bytes_per_token == 0
        await h.settled()


async def test_kv_that_never_came_gives_other_tokens(tmp_path):
    """The negative control of all of the above."""
    async with SimHarness(2, tmp=tmp_path, faults=("drop_transfers=1",)) as h:
        p = prompt(7, 300)
        wrong = await h.generate(p, 10, strategy="prefill_decode", sampling=GREEDY)
        assert wrong.tokens != reference(p, 10)
        await h.stubs[1][1].Flush(engine_pb2.FlushRequest())
        assert (await h.generate(p, 10, strategy="prefill_decode", sampling=GREEDY)).tokens == reference(p, 10)


async def test_published_slots_that_nobody_wrote(tmp_path):
    async with SimHarness(1, tmp=tmp_path) as h:
        runtime, p = h.runtimes[0], prompt(8, 100)
        held = await runtime.reserve(p, 99, 0)
        await runtime.publish(held.id, 99)
        await runtime.free(held.id)
        got = await h.generate(p, 8, sampling=GREEDY)
        assert got.done.usage.cached_tokens == 99
        assert got.tokens != reference(p, 8)


async def test_cancelling_at_random_leaks_nothing(tmp_path):
    rng = random.Random(3)
    async with SimHarness(2, tmp=tmp_path, profile=fast(kv_tokens=4000)) as h:

        async def one(i):
            call = h.call(prompt(i, rng.randrange(1, 900)), 30, strategy=STRATEGIES[i % 3], sampling=GREEDY)
            if i % 3 == 0:
                await asyncio.sleep(rng.random() * 0.1)
                call.cancel()
            else:
                async for _ in call:
                    pass

        for lot in range(4):
            await asyncio.gather(*(one(15 * lot + i) for i in range(15)))
        await h.settled()
        stub = h.stubs[0][0]
        request = kv_pb2.PrepRecvRequest(token_ids=prompt(99, 500), end=-1, ttl_ms=100)
        for _ in range(5):
            await stub.PrepRecv(request)
        await h.settled()


async def test_requests_are_retracted_when_slots_run_out_and_still_right(tmp_path):
    async with SimHarness(1, tmp=tmp_path, profile=fast(kv_tokens=700)) as h:
        prompts = [prompt(i, 120) for i in range(4)]
        answers = await asyncio.gather(*(h.generate(p, 200, sampling=GREEDY) for p in prompts))
        assert [a.tokens for a in answers] == [reference(p, 200) for p in prompts]
        assert sum(a.done.usage.retractions for a in answers) > 0
        await h.settled()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await h.generate(prompt(9, 800), 4, sampling=GREEDY)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_reservations_wait_for_room_in_order(tmp_path):
    async with SimHarness(1, tmp=tmp_path, profile=fast(kv_tokens=1000)) as h:
        runtime = h.runtimes[0]
        first = await runtime.reserve(prompt(1, 700), 700, 0)
        waiting = [asyncio.create_task(runtime.reserve(prompt(i, 600), 600, 2.0)) for i in (2, 3)]
        await asyncio.sleep(0.02)
        assert runtime.load.waiting_reservations == 2 and runtime.load.reserved == 700
        await runtime.free(first.id)
        second = await waiting[0]
        assert not waiting[1].done()
        await runtime.free(second.id)
        await runtime.free((await waiting[1]).id)
        await h.settled()


async def test_it_says_that_it_is_simulated_and_sends_cache_events(tmp_path):
    async with SimHarness(1, tmp=tmp_path) as h:
        info = await h.status(0)
        assert (
            info.runtime == "sim tiny-cpu"
            and "simulated" in info.device
            and list(info.transports) == ["sim", "sim_tcp"]
        )
        await h.generate(prompt(1, 200), 2, sampling=GREEDY)
        call = h.stubs[0][1].WatchStatus(engine_pb2.WatchStatusRequest(cache=True))
        async for message in call:
            if message.WhichOneof("event") == "cache":
                assert message.cache.snapshot and len(message.cache.stored) == 3
                break
        call.cancel()


async def test_another_layout_is_refused(tmp_path):
    async with SimHarness(2, tmp=tmp_path) as h:
        ticket = (await h.stubs[1][0].PrepRecv(kv_pb2.PrepRecvRequest(token_ids=prompt(1, 50), end=49))).ticket
        ticket.layout_fingerprint = "0" * 32
        with pytest.raises(grpc.aio.AioRpcError, match="another layout") as caught:
            await h.stubs[0][0].RemoteSend(
                kv_pb2.RemoteSendRequest(token_ids=prompt(1, 50), begin=0, end=49, ticket=ticket)
            )
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_an_engine_that_dies_is_replaced_midstream(tmp_path):
    async with SimHarness(2, tmp=tmp_path, faults=("die_after_tokens=20",)) as h:
        p = prompt(4, 100)
        got = await h.generate(p, 40, strategy="data_parallel", sampling=GREEDY)
        assert got.tokens == reference(p, 40) and got.done.attempts == 2
        assert "died after 20 tokens" in await h.runtimes[0].died()


async def test_failing_transfers_and_hangs(tmp_path):
    async with SimHarness(2, tmp=tmp_path, faults=("fail_transfers=1",)) as h:
        p = prompt(5, 200)
        got = await h.generate(p, 5, strategy="prefill_decode", sampling=GREEDY)
        assert got.tokens == reference(p, 5) and got.share("s1").prefilled_tokens == 200
        for runtime in h.runtimes:
            runtime.faults.hang = True
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await h.generate(p, 5, strategy="data_parallel", sampling=GREEDY, timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for runtime in h.runtimes:
            runtime.faults.hang = False
            runtime.faults_changed()
        got = await h.generate(p, 5, strategy="data_parallel", sampling=GREEDY)
        assert got.tokens == reference(p, 5)
        await h.settled()


async def test_seeds_and_stops(tmp_path):
    async with SimHarness(1, tmp=tmp_path) as h:
        p = prompt(1, 30)
        greedy = reference(p, 8)

        async def sampled(seed):
            params = common_pb2.SamplingParams(temperature=1.0, seed=seed, ignore_eos=True)
            return (await h.generate(p, 8, sampling=params)).tokens

        assert await sampled(1) == await sampled(1) != greedy
        assert await sampled(2) != await sampled(1)
        stop = common_pb2.SamplingParams(stop_token_ids=[greedy[3]], logprobs=True)
        got = await h.generate(p, 8, sampling=stop)
        assert got.tokens == greedy[: greedy.index(greedy[3]) + 1] and got.done.stop_token_id == greedy[3]
        assert len(got.logprobs) == len(got.tokens) and max(got.logprobs) < 0


async def test_a_form_is_refused(tmp_path):
    async with SimHarness(1, tmp=tmp_path) as h:
        for form in ({"regex": "a"}, {"ebnf": "b"}, {"json_schema": "{}"}):
            with pytest.raises(grpc.aio.AioRpcError, match="no grammar back end") as refused:
                await h.generate(prompt(1, 30), 8, sampling=common_pb2.SamplingParams(**form))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        await h.settled()


def test_it_starts_quickly_and_small_without_torch(tmp_path):
    """As a process: ready within 1.5 s of a free machine, no torch, and a clean end."""
    code = (
        "import asyncio, sys\n"
        "from contextlib import AsyncExitStack\n"
        "from services.engine.cli import EngineConfig\n"
        "from services.engine.main import start\n"
        "async def main():\n"
        "    async with AsyncExitStack() as stack:\n"
        "        await start(EngineConfig(sim='llama-3.1-70b-fp8-tp4-h100', trace_ratio=0), stack)\n"
        "        heavy = {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "        rss = next(line for line in open('/proc/self/status') if line.startswith('VmRSS'))\n"
        "        print(sorted(heavy), int(rss.split()[1]) // 1024)\n"
        "asyncio.run(main())\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    heavy, megabytes = done.stdout.rsplit(" ", 1)
    assert heavy == "[]" and int(megabytes) < 150
    assert time.monotonic() - began < 10


async def test_a_send_that_is_cancelled_writes_nothing_later(tmp_path):
    """The chunk on its way arrives or is dropped before the sender says that it has stopped."""
    async with SimHarness(2, tmp=tmp_path) as h:
        sender, receiver = h.stubs[0][0], h.stubs[1][0]
        p = prompt(11, 600)
        ticket = (await receiver.PrepRecv(kv_pb2.PrepRecvRequest(token_ids=p, end=600))).ticket
        request = kv_pb2.RemoteSendRequest(token_ids=p, begin=0, end=600, ticket=ticket)
        call = sender.RemoteSend(request)
        while not h.runtimes[0].load.sending:
            await asyncio.sleep(0.001)
        call.cancel()
        await h.settled()
        again = kv_pb2.PrepRecvRequest(token_ids=prompt(12, 600), end=600)
        other = (await receiver.PrepRecv(again)).ticket
        await receiver.Release(kv_pb2.ReleaseRequest(ticket=other))
        got = await h.generate(prompt(12, 600), 5, strategy="data_parallel", sampling=GREEDY)
        assert got.tokens == reference(prompt(12, 600), 5)
        await h.settled()


async def test_faults_are_read_again_on_a_signal(tmp_path):
    path = tmp_path / "faults"
    path.write_text("slow=1\n")
    async with SimHarness(1, tmp=tmp_path, faults=(f"@{path}",)) as h:
        faults = h.runtimes[0].faults
        path.write_text("slow=3\ndrop_transfers=2\n")
        os.kill(os.getpid(), signal.SIGUSR1)
        async with asyncio.timeout(5):
            while faults.slow != 3:
                await asyncio.sleep(0.005)
        assert faults.drop_transfers == 2
        path.write_text("melt=1")
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(0.05)
        assert faults.slow == 3


def test_either_a_model_or_a_simulation():
    from kvmesh.errors import InvalidArgument
    from services.engine.cli import EngineConfig

    for fields in ({}, {"model": "m", "sim": "tiny-cpu"}, {"sim": "tiny-cpu", "page_size": 16}):
        with pytest.raises(InvalidArgument):
            EngineConfig(**fields)


async def test_tickets_that_fill_the_pool_do_not_lock_it_up(tmp_path):
    """Generations that hold KV wait behind one that needs it, and all of them end."""
    async with SimHarness(2, tmp=tmp_path, profile=fast(kv_tokens=1000)) as h:
        first = asyncio.create_task(h.generate(prompt(90, 400), 150, strategy="prefill_decode", sampling=GREEDY))
        await asyncio.sleep(0.05)
        whole = [h.generate(prompt(i, 700), 20, strategy="data_parallel", sampling=GREEDY) for i in range(4)]
        sent = [h.generate(prompt(10 + i, 450), 60, strategy="prefill_decode", sampling=GREEDY) for i in range(6)]
        async with asyncio.timeout(8):
            answers = await asyncio.gather(first, *whole, *sent)
        assert [len(a.tokens) for a in answers] == [150, *[20] * 4, *[60] * 6]
        assert answers[-1].tokens == reference(prompt(15, 450), 60)
        await h.settled()


async def test_an_engine_is_measured(tmp_path):
    """`kvmesh profile`: what it asks of an engine, and that the result is a profile."""
    from sim_harness import profile_of

    from kvmesh.sim.profile import load_profile
    from services.engine.sim.measure import Plan, Probe, fit, measure

    given = load_profile("tiny-cpu")
    async with SimHarness(2, tmp=tmp_path, profile=given):
        probes = [Probe((tmp_path / f"s{i}").read_text().strip(), 1) for i in range(2)]
        plan = Plan((64, 512, 1024), (1, 4), 1, given.batching.chunk_tokens)
        for probe in probes:
            await probe.open()
        said = []
        measured = await measure(probes[0], probes[1], plan, said.append)
        found = fit("found", probes[0].info, measured, plan)
        for probe in probes:
            await probe.close()
    assert [part[:2] for part in measured.prefill] == [span for n in (64, 512, 1024) for span in ((0, n), (n, n + 1))]
    assert len(measured.calls) == 3 and len(measured.together) == 4 and len(said) == 9
    assert [(b, round(kv)) for b, kv, _ in measured.decode] == [(1, 80), (1, 528), (4, 322), (4, 2114)]
    assert [size for size, _ in measured.sends] == [n * given.bytes_per_token for n in (64, 512, 1024)]
    assert all(t > 0.003 for *_, t in (*measured.prefill, *measured.decode))
    assert found.model == given.model or found.model.layers == given.model.layers
    assert found.batching.kv_tokens == given.batching.kv_tokens and found.device.startswith("simulated")
    assert profile_of(found.dump()) == found


def test_a_fit_finds_what_was_given():
    from kvmesh.sim.profile import load_profile
    from services.engine.sim.measure import Measured, Plan, fit

    given = load_profile("tiny-cpu")
    given = dataclasses.replace(given, prefill=dataclasses.replace(given.prefill, per_end_squared=3e-9))
    plan = Plan((64, 300, 1024, 4096), (1, 2, 8), 1, 512)

    def prefill(n):
        return sum(given.prefill_seconds([(b, min(b + 512, n))]) for b in range(0, n, 512))

    measured = Measured(
        [(0, n, prefill(n)) for n in plan.lengths]
        + [(n, n + 1, given.prefill_seconds([(n, n + 1)])) for n in plan.lengths],
        [(b, b * kv, given.decode_seconds(b, b * kv)) for b in plan.batches for kv in (100, 2000)],
        [(n, 0.002 + n / 3e9) for n in (1000, 10**6, 10**8)],
        together=[1.3, 1.1, 1.2],
    )
    info = engine_pb2.EngineInfo(layout=given.layout.message(), total_slots=1000, device="cpu", runtime="r")
    info.model.name, info.model.vocab_size, info.model.context_length = "m", 384, 8192
    found = fit("f", info, measured, plan)
    for part in ("prefill", "decode"):
        was, now = getattr(given, part), getattr(found, part)
        for name in was.__dataclass_fields__:
            assert getattr(now, name) == pytest.approx(getattr(was, name), rel=1e-4), (part, name)
    assert found.transfer.bytes_per_second == pytest.approx(3e9, rel=1e-4) and found.fitted["prefill_error"] < 1e-6
    assert found.contention == pytest.approx(0.2)
    # Nothing is below 0, whatever was measured.
    odd = Measured([(0, 64, 0.02), (0, 128, 0.01), (0, 512, 0.01)], measured.decode, [])
    assert min(fit("f", info, odd, plan).prefill.__dict__.values()) >= 0
