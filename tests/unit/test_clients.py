"""The clients in other languages, run against a mesh of simulated engines, plain and secure.

`make clients` builds them; what their toolchain is missing for is skipped.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from secure_harness import SecureMesh
from sim_harness import SimHarness, reference

REPO = Path(__file__).parents[2]
CLIENTS = REPO / "examples" / "clients"
# Where `make clients` puts what it makes.
BUILT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmesh" / "clients"
PROMPT = [(i * 37) % 300 + 1 for i in range(64)]


def javascript(tmp_path: Path) -> list[str]:
    node = shutil.which("node")
    if node is None or not (BUILT / "javascript" / "node_modules" / "@grpc" / "grpc-js").is_dir():
        pytest.skip("needs node, and grpc-js: make clients")
    # Modules are looked for beside the file.
    for name in ("client.js", "package.json"):
        shutil.copy(CLIENTS / "javascript" / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(BUILT / "javascript" / "node_modules")
    return [node, str(tmp_path / "client.js")]


def cpp(tmp_path: Path) -> list[str]:
    binary = BUILT / "cpp" / "client"
    if not binary.exists():
        pytest.skip("needs g++ and libgrpc++-dev: make clients")
    newest = max(
        path.stat().st_mtime for path in (CLIENTS / "cpp" / "client.cc", *REPO.glob("protos/kvmesh/v1/*.proto"))
    )
    if binary.stat().st_mtime < newest:
        pytest.skip("is older than its source: make clients")
    return [str(binary)]


async def run(command: list[str], *words: str, **environment: str) -> tuple[int, str, str]:
    variables = {**os.environ, "KVMESH_PROTOS": str(REPO / "protos"), **environment}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, *words, stdout=pipe, stderr=pipe, env=variables)
    try:
        async with asyncio.timeout(40):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("client", [javascript, cpp])
async def test_a_client_streams_the_tokens(client, tmp_path):
    command = client(tmp_path)
    async with SimHarness(2, tmp=tmp_path) as mesh:
        words = [",".join(map(str, PROMPT))]
        for strategy in ("data_parallel", "prefill_decode"):
            code, out, err = await run(command, mesh.servers[0].address, strategy, "12", *words)
            assert code == 0, err
            assert [int(line) for line in out.split()] == reference(PROMPT, 12)
            assert "first token after" in err
        code, out, err = await run(command, mesh.servers[0].address, "no_such", "12", *words)
        assert code == 1 and out == "" and "no_such" in err


@pytest.mark.parametrize("client", [javascript, cpp])
async def test_a_client_shows_its_certificate_and_key(client, tmp_path):
    command = client(tmp_path)
    async with SecureMesh(tmp_path) as mesh:
        words = [mesh.addresses["router"], "prefill_decode", "4", ",".join(map(str, PROMPT))]
        shown = {f"KVMESH_TLS_{k}": str(mesh.certs / f) for k, f in (("CA", "ca.pem"), ("CERT", "client.pem"))}
        shown["KVMESH_TLS_KEY"] = str(mesh.certs / "client.key")
        code, out, err = await run(command, *words, **shown, KVMESH_API_KEY=mesh.keys["generate"])
        assert code == 0, err
        assert [int(line) for line in out.split()] == reference(PROMPT, 4)
        code, out, err = await run(command, *words, **shown)
        assert code == 1 and out == "" and "API key is needed" in err
        code, out, _ = await run(command, *words)
        assert code == 1 and out == ""
