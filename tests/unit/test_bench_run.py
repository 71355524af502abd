"""Loads against a router over simulated engines, and against an OpenAI-compatible server."""

import asyncio
import json

import pytest
from click.testing import CliRunner
from fake_openai import FakeOpenAI
from sim_harness import SimHarness

from kvmesh.bench import arrivals
from kvmesh.bench.cli import bench
from kvmesh.bench.report import Report, summarise
from kvmesh.bench.run import Load, run
from kvmesh.bench.targets import OpenAITarget, RouterTarget
from kvmesh.bench.workloads import Length, synthetic
from kvmesh.errors import InvalidArgument


async def test_open_loop_against_a_router(tmp_path):
    async with SimHarness(2, tmp=tmp_path) as h:
        target = RouterTarget(h.servers[0].address, "prefill_decode", {"min_remote": "8"})
        assert await target.prepare() == 8192
        asks = synthetic(20, Length(100), Length(6), prefix_tokens=64)
        seen = []
        load = Load(asks, arrivals.poisson(100, 20), on_progress=lambda p: seen.append((p.ended, p.running)))
        records = await run(target, load)
        await target.close()
        assert [r.error for r in records] == [""] * 20 and [r.completion_tokens for r in records] == [6] * 20
        assert [n for n, _ in seen] == list(range(1, 21)) and all(r.sent >= r.due for r in records)
        report = summarise("router", records, warmup=4)
        # All but the first find the shared beginning, or the whole but one token after the transfer.
        assert report.hit_rate is not None and report.hit_rate > 0.5
        assert 0 < report.times["ttft"]["p50"] < report.times["jct"]["p50"] < 1


async def test_closed_loop_against_openai():
    async with FakeOpenAI() as server:
        target = OpenAITarget(server.url, "m", vocab_size=500, key="secret")
        records = await run(target, Load(synthetic(12, Length(30), Length(5)), None, 3))
        assert server.most == 3 and [r.error for r in records] == [""] * 12
        assert all(r.completion_tokens == 5 and r.cached_tokens == 5 for r in records)
        body = server.bodies[0]
        assert body["path"] == "/v1/completions" and body["stream"] and body["max_tokens"] == 5
        assert len(body["prompt"]) == 30 and max(body["prompt"]) < 500
        assert all(r.tpot >= 0.002 and r.ttft > 0 for r in records)


@pytest.mark.parametrize(("fault", "said"), [("refuse", "429.*no room"), ("break", "breaks off")])
async def test_what_fails_is_counted_and_does_not_end_the_run(fault, said):
    async with FakeOpenAI(fault=fault) as server:
        records = await run(OpenAITarget(server.url, "m"), Load(synthetic(3, Length(5), Length(4)), None, 2))
    assert len(records) == 3
    for r in records:
        with pytest.raises(AssertionError, match=said):
            assert not r.error, r.error
    report = summarise("x", records)
    assert (report.failed, report.goodput) == (3, 0)


async def test_a_server_that_is_not_there_and_a_request_that_takes_too_long():
    async with FakeOpenAI(gap=0.2) as server:
        target = OpenAITarget(server.url, "m")
        records = await run(target, Load(synthetic(2, Length(5), Length(20)), None, 2, timeout=0.1))
        assert [r.error for r in records] == ["TimeoutError"] * 2
    records = await run(target, Load(synthetic(1, Length(5), Length(2)), None))
    assert "Connect" in records[0].error or "111" in records[0].error
    with pytest.raises(InvalidArgument, match="url"):
        OpenAITarget("localhost:8000", "m")


async def test_cancelling_a_run_cancels_its_requests():
    async with FakeOpenAI(gap=0.05) as server:
        load = Load(synthetic(4, Length(5), Length(100)), arrivals.constant(1000, 4))
        task = asyncio.create_task(run(OpenAITarget(server.url, "m"), load))
        while len(server.bodies) < 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def invoke(*arguments):
    return await asyncio.to_thread(CliRunner().invoke, bench, list(arguments))


async def test_the_command(tmp_path):
    async with SimHarness(2, tmp=tmp_path) as h:
        common = ["run", "--router", h.servers[0].address, "--requests", "10", "--input-tokens", "60:0.2"]
        common += ["--output-tokens", "4", "--quiet", "--slo-ttft", "500"]
        files = [str(tmp_path / f"{s}.json") for s in ("data_parallel", "prefill_decode")]
        for path, strategy in zip(files, ("data_parallel", "prefill_decode"), strict=True):
            done = await invoke(*common, "--rate", "100", "--strategy", strategy, "--json", path, "--warmup", "2")
            assert done.exit_code == 0, done.output
            assert f"{strategy}: 8 requests" in done.output and "TTFT ≤ 500 ms" in done.output
        assert json.loads((tmp_path / "data_parallel.json").read_text())["about"]["rate"] == "100.0"
        assert Report.read(tmp_path / "prefill_decode.json").failed == 0
        done = await invoke("compare", *files)
        assert done.exit_code == 0 and "data_parallel" in done.output and "JCT ms p99" in done.output
        done = await invoke(*common, "--concurrency", "2", "--strategy", "nonsense")
        assert done.exit_code == 1 and "nonsense" in done.output and "10 failed" in done.output
        for wrong in (
            ["--concurrency", "2", "--rate", "3"],
            ["--workload", "mooncake"],
            ["--arrivals", "trace"],
            ["--arrivals", "constant"],
        ):
            done = await invoke(*common, *wrong)
            assert done.exit_code == 1 and isinstance(done.exception, InvalidArgument), (wrong, done.output)
