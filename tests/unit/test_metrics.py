"""Prometheus metrics: what is on the page, and that it goes with its service."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from router_harness import Harness

from kvmesh.errors import Unavailable
from kvmesh.metrics import new_registry, serving
from kvmesh.v1.engine_pb2 import LoadReport
from services.engine.metrics import Totals, register


async def scrape(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://{address}/metrics")).text
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


async def test_a_router_counts_requests_by_strategy_and_status(tmp_path: Path):
    async with Harness(2, tmp=tmp_path) as mesh:
        mesh.router = await mesh.start_router(metrics="127.0.0.1:0", announce=str(tmp_path / "router"))
        address = (tmp_path / "router.metrics").read_text().strip()
        await mesh.generate([1] * 50, strategy="prefill_decode")
        await mesh.generate([1] * 50, strategy="data_parallel")
        for engine in mesh.engines:
            engine.faults["StartGenerate"] = Unavailable("away")
        with pytest.raises(Exception, match="away"):
            await mesh.generate([1], strategy="data_parallel")
        found = await scrape(address)
    name = "kvmesh_router_requests_total"
    assert found[name, (("status", "done"), ("strategy", "prefill_decode"))] == 1
    assert found[name, (("status", "done"), ("strategy", "data_parallel"))] == 1
    assert found[name, (("status", "UNAVAILABLE"), ("strategy", "data_parallel"))] == 1
    assert found["kvmesh_router_tokens_total", (("kind", "generated"), ("strategy", "prefill_decode"))] == 8
    assert found["kvmesh_router_kv_sent_bytes_total", (("strategy", "prefill_decode"),)] > 0
    assert found["kvmesh_router_ttft_seconds_count", (("strategy", "prefill_decode"),)] == 1
    assert found["kvmesh_router_engines", (("state", "up"),)] == 2
    assert found["kvmesh_router_running_requests", ()] == 0
    with pytest.raises(httpx.ConnectError):
        await scrape(address)


async def test_an_engine_tells_its_slots_and_calls():
    registry, totals = new_registry("engine", "e0"), Totals()
    load = LoadReport(free_slots=5, cached_slots=3, quarantined_slots=2, running_requests=1)
    register(registry, SimpleNamespace(load=lambda: load), totals)
    totals.call("prep_recv", "OK")
    totals.call("prep_recv", "OK")
    totals.call("remote_send", "ABORTED")
    totals.sent_bytes = 4096
    async with serving("127.0.0.1:0", registry) as address:
        found = await scrape(address)
        with pytest.raises(Unavailable, match=address):
            async with serving(address, registry):
                pass
    slots = {labels[0][1]: v for (name, labels), v in found.items() if name == "kvmesh_engine_kv_slots"}
    assert slots == {"free": 5, "cached": 3, "running": 0, "reserved": 0, "quarantined": 2}
    assert found["kvmesh_engine_calls_total", (("call", "prep_recv"), ("status", "OK"))] == 2
    assert found["kvmesh_engine_calls_total", (("call", "remote_send"), ("status", "ABORTED"))] == 1
    assert found["kvmesh_engine_kv_sent_bytes_total", ()] == 4096 and found["kvmesh_engine_running_requests", ()] == 1
    assert any(name == "kvmesh_build_info" for name, _ in found)
