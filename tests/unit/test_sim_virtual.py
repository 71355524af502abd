"""Virtual time: the clock, the network without a network, and whole meshes on them."""

import asyncio
import time

import grpc
import pytest
from sim_harness import SimHarness, fast, reference, slowed

from kvmesh.bench import arrivals
from kvmesh.bench.records import Record
from kvmesh.bench.report import summarise
from kvmesh.bench.run import Load
from kvmesh.bench.run import run as run_load
from kvmesh.bench.targets import RouterTarget
from kvmesh.bench.workloads import Ask, Length, synthetic
from kvmesh.errors import NotFound, from_rpc
from kvmesh.grpcx import rpc
from kvmesh.sim.peers import LocalPeers
from kvmesh.sim.profile import load_profile
from kvmesh.v1.common_pb2 import SamplingParams
from services.engine.sim.faults import Faults
from services.engine.sim.runtime import SimRuntime
from simulator.clock import Stuck, run
from simulator.mesh import Around, MeshTarget, SimMesh
from simulator.network import Network
from simulator.run import Choice, simulate

LLAMA = load_profile("llama-3.1-70b-fp8-tp4-h100")


def test_the_clock_jumps_and_comes_back():
    real = time.perf_counter()
    before = time.monotonic

    async def main():
        loop, seen = asyncio.get_running_loop(), []
        began = time.monotonic()

        async def nap(seconds):
            await asyncio.sleep(seconds)
            seen.append((seconds, round(time.monotonic() - began, 6), round(loop.time() - began, 6)))

        await asyncio.gather(*(nap(s) for s in (3600, 0.25, 86400 * 3)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(50):
                await asyncio.Event().wait()
        return seen

    assert run(main()) == [(s, s, s) for s in (0.25, 3600, 259200)]
    assert time.perf_counter() - real < 2 and time.monotonic is before
    with pytest.raises(Stuck):
        run(asyncio.Event().wait())
    assert time.monotonic is before


class Servicer:
    """Every kind of call, on demand in trouble."""

    async def One(self, request, context):
        assert context.invocation_metadata() == (("k", "v"),)
        return request + 1

    async def Many(self, request, context):
        for i in range(request):
            await asyncio.sleep(1)
            await context.write(i)

    async def Both(self, requests, context):
        async for request in requests:
            await context.write(2 * request)

    @rpc
    async def Fails(self, request, context):
        error = NotFound("nothing")
        error.retry_after = 2
        raise error


def test_calls_without_a_network():
    async def main():
        network = Network(0.5)
        network.serve("here", Servicer())
        here, began = network.channel("here"), time.monotonic()
        assert await here.unary_unary("/x/One")(1, metadata=(("k", "v"),)) == 2
        assert time.monotonic() - began == pytest.approx(1.0)
        assert [m async for m in here.unary_stream("/x/Many")(3)] == [0, 1, 2]
        call = here.stream_stream("/x/Both")()
        await call.write(4)
        assert await call.read() == 8
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK
        late = here.unary_stream("/x/Many")(5, timeout=2.7)
        assert [await late.read(), await late.read()] == [0, 1]
        codes = []
        for call, method in ((late, "read"), (here.unary_unary("/x/Fails")(0), "read")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(call, method)()
            codes.append(caught.value.code())
        # As services say it over a network.
        error = from_rpc(caught.value, "here")
        assert isinstance(error, NotFound) and error.told and error.retry_after == 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await network.channel("there").unary_unary("/x/One")(1)
        codes.append(caught.value.code())
        assert [c.name for c in codes] == ["DEADLINE_EXCEEDED", "NOT_FOUND", "UNAVAILABLE"]
        call = here.unary_stream("/x/Many")(5)
        await call.read()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            while True:
                await call.read()
        return True

    assert run(main())


def load_of(count=40, rate=3.0, tokens=3000, seed=0):
    return Load(synthetic(count, Length(tokens), Length(50, 0.2), seed=seed), arrivals.poisson(rate, count, seed))


def times(records):
    return [(r.ttft, r.tpot, r.jct, r.completion_tokens) for r in records]


@pytest.mark.parametrize("strategy", ["data_parallel", "prefill_decode", "balanced_prefill_decode"])
def test_the_same_seed_gives_the_same_run(strategy):
    choice = Choice.parse(strategy)
    first, second = (simulate(LLAMA, 2, choice, load_of(), seed=1) for _ in range(2))
    assert times(first.records) == times(second.records) and not any(r.error for r in first.records)
    other = simulate(LLAMA, 2, choice, load_of(), seed=2)
    assert times(other.records) != times(first.records)
    assert first.virtual > 10 and first.real < first.virtual / 5


def test_published_orderings():
    """At 4.8 requests a second disaggregation has the shorter TPOT, data parallel the shorter TTFT."""
    reports = {
        text.partition("_")[0]: summarise(text, simulate(LLAMA, 2, Choice.parse(text), load_of(80, 4.8)).records)
        for text in ("data_parallel", "prefill_decode", "balanced_prefill_decode,ratio=0.1")
    }
    tpot = {k: r.times["tpot"]["mean"] for k, r in reports.items()}
    ttft = {k: r.times["ttft"]["mean"] for k, r in reports.items()}
    assert tpot["prefill"] < tpot["balanced"] < tpot["data"] and tpot["prefill"] < 0.0155
    assert ttft["data"] < ttft["balanced"] < ttft["prefill"]


def test_tokens_are_the_models_in_virtual_time_too():
    async def main():
        profile = fast()
        async with SimMesh(profile, 3) as mesh:
            for strategy in ("data_parallel", "prefill_decode"):
                target = MeshTarget(mesh, strategy, {})
                for n in (1, 200, 700):
                    got = []
                    ask = Ask(n, 70, ((n, n),))
                    door = mesh.door.generate

                    async def spy(request, metadata, timeout, write, door=door, got=got):
                        async def take(message):
                            got.extend(message.delta.token_ids)
                            await write(message)

                        await door(request, metadata, timeout, take)

                    mesh.door.generate = spy
                    record = Record(0, n, 0.0)
                    await target.ask(ask, record, 60)
                    mesh.door.generate = door
                    assert got == reference(ask.tokens(384), 70)
                    # First the first token; what follows in few messages, as nothing else happens.
                    assert record.tokens[0][1] == 1 and len(record.tokens) <= 4
            for node in mesh.nodes:
                load = node.runtime.load
                assert load.free + load.cached == node.runtime.total_slots
        return True

    assert run(main())


def test_an_engine_that_dies_is_left_out():
    async def main():
        async with SimMesh(LLAMA, 3) as mesh:
            mesh.nodes[1].faults.die_after_requests = 3
            records = await run_load(MeshTarget(mesh, "data_parallel", {}), load_of(60, 6.0))
            assert not any(r.error for r in records) and [r.completion_tokens > 0 for r in records] == [True] * 60
            assert mesh.view.connected == 2
        return True

    assert run(main())


def test_many_engines_and_cache_events():
    load = Load(synthetic(120, Length(800), Length(20), prefix_tokens=512, prefixes=5), arrivals.poisson(60, 120))
    for text in ("data_parallel", "data_parallel,policy=kv_aware"):
        outcome = simulate(load_profile("tiny-cpu"), 40, Choice.parse(text), load)
        report = summarise(text, outcome.records)
        assert report.failed == 0
        hits = report.hit_rate
        assert hits is not None
    assert hits > 0.3


async def test_virtual_time_agrees_with_real_time(tmp_path):
    """The same load on services of their own, over gRPC and sockets, in real time, on a machine that may be busy."""
    profile = slowed(5)
    load = Load(synthetic(8, Length(600, 0.3), Length(12)), arrivals.poisson(4, 8, 3))
    async with SimHarness(2, tmp=tmp_path, profile=profile) as h:
        target = RouterTarget(h.servers[0].address, "prefill_decode")
        await target.prepare()
        records = await run_load(target, load)
        await target.close()
        real = [summarise("real", records).times[m]["p50"] for m in ("tpot", "jct")]
        virtual = await asyncio.to_thread(simulate_apart, h.profile)
    for a, b in zip(real, virtual, strict=True):
        assert 0.75 < a / b < 1.6, (real, virtual)


def simulate_apart(profile):
    """In a process of its own: this one's clocks are in use."""
    import json
    import subprocess
    import sys

    code = (
        "import json, sys\n"
        "from kvmesh.bench import arrivals\n"
        "from kvmesh.bench.report import summarise\n"
        "from kvmesh.bench.run import Load\n"
        "from kvmesh.bench.workloads import Length, synthetic\n"
        "from kvmesh.sim.profile import load_profile\n"
        "from simulator.run import Choice, simulate\n"
        "load = Load(synthetic(8, Length(600, 0.3), Length(12)), arrivals.poisson(4, 8, 3))\n"
        "records = simulate(load_profile(sys.argv[1]), 2, Choice.parse('prefill_decode'), load).records\n"
        "print(json.dumps([summarise('x', records).times[m]['p50'] for m in ('tpot', 'jct')]))\n"
    )
    command = [sys.executable, "-c", code, str(profile)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_steps_take_the_time_of_the_profile():
    """To the last digit: a prompt in two chunks, then steps; then with another request's prefill in between."""
    profile = load_profile("tiny-cpu")
    chunks = [profile.prefill_seconds([(0, 512)]), profile.prefill_seconds([(512, 600)])]

    async def timed(runtime, n, count):
        sampling = SamplingParams(temperature=0, ignore_eos=True)
        outputs = runtime.generate([n % 384, *range(n - 1)], sampling, count, None)
        at = []
        async for output in outputs:
            at += [time.monotonic()] * len(output.token_ids)
            if output.ending is not None:
                return at

    async def main(slow):
        runtime = SimRuntime(profile, LocalPeers(), faults=Faults(slow=slow), now=time.monotonic)
        await runtime.start()
        began = time.monotonic()
        at = await timed(runtime, 600, 4)
        steps = [profile.decode_seconds(1, 601 + i) for i in range(3)]
        expected = [sum(chunks) + sum(steps[:i]) for i in range(4)]
        assert [t - began for t in at] == pytest.approx([slow * e for e in expected])
        first, second = await asyncio.gather(timed(runtime, 300, 3), timed(runtime, 301, 3))
        # The second prompt's pass comes before the first one's next step, which both then share.
        step = profile.decode_seconds(2, 301 + 302)
        assert first[1] - first[0] == pytest.approx(slow * (profile.prefill_seconds([(0, 301)]) + step))
        assert second[1] - second[0] == pytest.approx(slow * step)
        await runtime.stop()
        return True

    assert run(main(1.0)) and run(main(3.0))


def test_the_command(tmp_path):
    """As a process of its own, as it takes the clocks."""
    import json
    import subprocess
    import sys

    command = [sys.executable, "-m", "kvmesh.cli", "sim", "--engines", "3", "--rate", "20", "--requests", "30"]
    command += ["--input-tokens", "200", "--output-tokens", "5", "--slo-ttft", "100", "--json", str(tmp_path)]
    command += ["--strategy", "data_parallel", "--strategy", "balanced_prefill_decode,ratio=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "30 requests" in done.stdout and "of 3 engines in" in done.stdout and "JCT ms p99" in done.stdout
    report = json.loads((tmp_path / "balanced_prefill_decode_ratio=0.5.json").read_text())
    assert report["failed"] == 0 and report["about"]["engines"] == "3"
    command[-1] = "balanced_prefill_decode,ratio"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "is not KEY=VALUE" in done.stderr


def with_stores(stores, strategy, memory=1 << 30, seed=3):
    """Many prompts with 16 beginnings of 1,280 tokens, on engines that can hold six of them each."""
    profile = load_profile("tiny-cpu").replace(kv_tokens=8192)
    asks = synthetic(300, Length(1400), Length(6), seed=seed, prefix_tokens=1280, prefixes=16)
    load = Load(asks, arrivals.poisson(20, 300, seed), timeout=60)
    return simulate(profile, 2, Choice.parse(strategy), load, seed, Around(stores=stores, store_memory=memory))


def test_stores_give_what_engines_have_evicted():
    alone, kept = with_stores(0, "data_parallel"), with_stores(2, "store_backed")
    assert not any(r.error for o in (alone, kept) for r in o.records)
    stats = kept.stores
    # Each beginning is saved once, and restored most of the times after that.
    assert stats.sent_tokens > 0.6 * stats.asked_tokens > 100_000 and stats.memory_used >= 16 * 20
    hits = [sum(r.cached_tokens for r in outcome.records) for outcome in (alone, kept)]
    assert hits[1] > 2 * hits[0]
    waits = [sum(r.ttft for r in outcome.records) for outcome in (alone, kept)]
    assert waits[1] < 0.6 * waits[0]
    # The same at the same seed, to the last digit; another at another.
    again, other = with_stores(2, "store_backed"), with_stores(2, "store_backed", seed=4)
    assert [r.tokens for r in again.records] == [r.tokens for r in kept.records] and again.stores == stats
    assert [r.tokens for r in other.records] != [r.tokens for r in kept.records]


def test_a_store_that_is_small_evicts():
    block = 64 * load_profile("tiny-cpu").bytes_per_token
    outcome = with_stores(1, "store_backed", memory=41 * block)
    stats = outcome.stores
    assert stats.memory_used + stats.memory_free + stats.memory_reserved == 40 and stats.evicted_blocks > 100
    assert not any(r.error for r in outcome.records)


def test_services_do_not_import_each_other_or_the_simulator():
    """Services know kvmesh only; the simulator knows all of them, and nobody knows it."""
    import ast
    from pathlib import Path

    root = Path(__file__).parents[2]
    for path in (*root.glob("services/**/*.py"), *root.glob("kvmesh/**/*.py")):
        own = ".".join(path.relative_to(root).parts[:2])
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith("simulator"), path
                if name.startswith("services."):
                    assert ".".join(name.split(".")[:2]) == own, (path, name)
