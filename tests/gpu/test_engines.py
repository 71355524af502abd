"""Two real engines on one GPU, KV by cuda_ipc: the tokens are those of transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_reference import Comparison, Reference
from mesh_process import RunningMesh, running
from prompts import prompt

from kvmesh.client import AsyncClient

NEW = 16
LENGTHS = (2, 17, 65, 300, 513, 1000, 2000)
SGLANG = '{"mem_fraction_static": 0.3}'


@pytest.fixture(scope="module")
def gpu_mesh(tmp_path_factory: pytest.TempPathFactory, dry: bool) -> Iterator[RunningMesh]:
    """Float32, so that the comparison is a close one."""
    from kvmesh.local.tiny_model import tiny_model

    home = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMESH_HOME", str(home))
        model: Path = tiny_model()
    options = ["--transport", "shm" if dry else "cuda_ipc", "--kv-tokens", "12288", "--checksum"]
    if not dry:
        options += ["--sglang", SGLANG]
    yield from running(RunningMesh(home, "gpu", model, ["--engines", "2", "--dtype", "float32", "--", *options]))


async def test_tokens(gpu_mesh: RunningMesh, dry: bool) -> None:
    comparison = Comparison(Reference(gpu_mesh.model))
    async with AsyncClient(gpu_mesh.address("router")) as client:
        engines = (await client.mesh()).engines
        assert all(list(e.info.transports) == ["shm" if dry else "cuda_ipc"] for e in engines)

        async def ask(tokens: list[int]) -> None:
            answer = client.generate(
                tokens,
                strategy="prefill_decode",
                strategy_params={"min_remote": 1},
                temperature=0,
                ignore_eos=True,
                max_new_tokens=NEW,
                timeout=60,
            )
            result = await answer.wait()
            comparison.check("gpu", "cold", tokens, result.token_ids, NEW)
            assert sum(share.received_tokens for share in result.shares) == len(tokens) - 1

        for length in LENGTHS:
            await ask(prompt(length, "gpu"))
        await asyncio.gather(*(ask(prompt(100 + 50 * i, "gpu at once")) for i in range(8)))
