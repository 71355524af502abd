"""SGLang's own load generator against the HTTP door, unchanged."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from mesh_process import RunningMesh

PROMPTS = 6


@pytest.mark.parametrize("backend", ["sglang-oai"])
async def test_bench_serving_runs_unchanged(mesh: RunningMesh, model: Path, tmp_path: Path, backend: str) -> None:
    address = (Path(mesh.state.work) / "router.address.http").read_text().strip()
    report = tmp_path / "report.jsonl"
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", backend, "--base-url", f"http://{address}"]
    command += ["--model", model.name, "--tokenizer", str(model), "--dataset-name", "random-ids", "--seed", "1"]
    command += ["--num-prompts", str(PROMPTS), "--random-input-len", "64", "--random-output-len", "8"]
    command += ["--random-range-ratio", "1", "--disable-tqdm", "--output-file", str(report)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = asyncio.subprocess.PIPE
    run = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environment, cwd=tmp_path)
    try:
        async with asyncio.timeout(180):
            out, err = await run.communicate()
    finally:
        if run.returncode is None:
            run.kill()
            await run.wait()
    assert run.returncode == 0, (out.decode()[-2000:], err.decode()[-2000:])
    found = json.loads(report.read_text().splitlines()[-1])
    assert found["completed"] == PROMPTS and found["total_output_tokens"] == 8 * PROMPTS
    assert found["mean_ttft_ms"] > 0 and found["mean_tpot_ms"] > 0
