"""The dashboard: its JSON, and the page in a real browser."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import pytest
from kvmesh_http import TEXT, Http

from kvmesh.errors import Unavailable

CHROMIUM = shutil.which("chromium")


async def ask(door: Http, request_id: str, strategy: str) -> None:
    body = {"model": "fake", "prompt": TEXT * 5, "max_tokens": 4, "strategy": strategy}
    reply = await door.http.post("/v1/completions", json=body, headers={"x-request-id": request_id})
    assert reply.status_code == 200


async def test_requests_are_recorded_and_filtered(door):
    await ask(door, "one", "data_parallel")
    await ask(door, "two", "prefill_decode")
    for engine in door.mesh.engines:
        engine.faults["StartGenerate"] = Unavailable("away")
    failed = await door.http.post(
        "/v1/completions", json={"model": "fake", "prompt": TEXT}, headers={"x-request-id": "bad"}
    )
    assert failed.status_code == 503

    async def ids(**query: str) -> list[str]:
        return [r["request_id"] for r in (await door.http.get("/api/requests", params=query)).json()["requests"]]

    assert await ids() == ["bad", "two", "one"]
    assert await ids(strategy="prefill_decode") == ["two"]
    assert await ids(status="done") == ["two", "one"] and await ids(status="failed") == ["bad"]
    assert await ids(limit="1") == ["bad"]
    two = (await door.http.get("/api/requests", params={"status": "done"})).json()["requests"][0]
    assert two["engines"] == ["e0", "e1"] and two["sent_bytes"] > 0 and two["completion_tokens"] == 4
    assert 0 < two["ttft"] <= two["jct"] and TEXT not in str(two)


async def test_mesh_as_json(door):
    mesh = (await door.http.get("/api/mesh")).json()
    assert [e["member"]["endpoint"]["name"] for e in mesh["engines"]] == ["e0", "e1"]
    assert mesh["registry_connected"] and mesh["strategy"]["name"] == "data_parallel"


async def test_traces_as_json_and_for_perfetto(door):
    await ask(door, "traced", "prefill_decode")
    spans = (await door.http.get("/api/requests/traced/trace")).json()["spans"]
    names = {s["name"] for s in spans}
    assert {"router.generate", "strategy prefill_decode", "prep_recv", "remote_send", "start_generate"} <= names
    events = (await door.http.get("/api/requests/traced/perfetto")).json()["traceEvents"]
    assert len([e for e in events if e["ph"] == "X"]) == len(spans)
    missing = await door.http.get("/api/requests/nothing/trace")
    assert missing.status_code == 404 and "nothing" in missing.json()["error"]["message"]


async def test_nothing_is_loaded_from_elsewhere(door):
    pages = [(await door.http.get(path)).text for path in ("/", "/dashboard.js", "/dashboard.css")]
    assert all(pages)
    addresses = re.findall(r"""(?:src|href|url|import|fetch)\s*[=(]\s*["'`]?(https?:)?//""", "".join(pages))
    assert addresses == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
async def test_the_page_in_a_browser_shows_requests_strategies_and_a_waterfall(door, tmp_path: Path):
    await ask(door, "first", "data_parallel")
    await ask(door, "second", "prefill_decode")
    await door.http.get("/api/requests/second/trace")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = await asyncio.create_subprocess_exec(
        *(str(CHROMIUM), *flags, "--virtual-time-budget=8000", "--dump-dom", f"{door.base}/#second"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        out, _ = await asyncio.wait_for(browser.communicate(), 60)
    finally:
        if browser.returncode is None:
            browser.kill()
            await browser.wait()
    page = out.decode()
    assert 'aria-label="waterfall of first"' in page and 'aria-label="waterfall of second"' in page
    assert re.search(r"time to first token: data_parallel: p50 [\d.]+", page)
    assert re.search(r"request second: [\d.]+ ms, \d+ spans", page)
    assert page.count('class="span"') >= 5 and "remote_send" in page
