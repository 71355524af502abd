"""Random and mutated requests on every route of the HTTP door: no crash, no 5xx, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import ssl
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fuzz_http import HttpMaker
from secure_harness import SecureMesh
from test_fuzz_grpc import at_rest

# The test's own client leaves a connection to the garbage collector when it gives up in the middle of a handshake.
unclosed = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
AT_ONCE = 6
PATIENCE = (0.02, 0.3, 1.0)


class HttpFuzzer:
    """Asks `http`; `seen` counts (path, verb, status), `bad` holds what must not be."""

    def __init__(self, http: httpx.AsyncClient, maker: HttpMaker) -> None:
        self.seen: Counter[tuple[str, str, str]] = Counter()
        self.bad: list[str] = []
        self._http = http
        self._tickets: list[tuple[str, dict]] = []
        self._maker = maker

    async def run(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds

        async def caller() -> None:
            while asyncio.get_running_loop().time() < until:
                await self._one(*self._maker.rng.choice(self._maker.operations))

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))

    async def tidy(self) -> None:
        """Gives all tickets back."""
        for path, body in self._tickets:
            assert (await self._http.post(path, json=body)).status_code == 200

    async def _one(self, path: str, verb: str, operation: dict) -> None:
        request = self._maker.request(path, verb, operation)
        # A ticket whose answer was never read stays for its time: here all are given back.
        patience = 30.0 if path.endswith("/prep_recv") else self._maker.rng.choice(PATIENCE)
        try:
            async with asyncio.timeout(patience):
                reply = await self._http.request(**request)
        except TimeoutError:
            self.seen[path, verb, "left"] += 1
            return
        except httpx.HTTPError as error:
            self.bad.append(f"{request}: {error!r}")
            return
        self.seen[path, verb, str(reply.status_code)] += 1
        if path.endswith("/prep_recv") and reply.status_code == 200:
            self._tickets.append((reply.url.path.replace("prep_recv", "release"), reply.json()))
        wrong = ""
        if reply.status_code >= 500:
            wrong = reply.text
        elif "text/event-stream" in reply.headers.get("content-type", ""):
            # A stream that fails says so in an event.
            events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: {")]
            codes = [json.loads(e)["error"]["code"] for e in events if "error" in json.loads(e)]
            wrong = str(codes) if {"internal", "unknown"} & set(codes) or not reply.text.endswith("[DONE]\n\n") else ""
        elif reply.status_code >= 400 and "error" not in reply.json():
            wrong = f"no error object: {reply.text[:200]}"
        if wrong:
            self.bad.append(f"{reply.status_code} {request}: {wrong[:500]}")

    def report(self) -> str:
        lines = [f"  {verb} {path} {status} {count}" for (path, verb, status), count in sorted(self.seen.items())]
        return "\n".join([f"{sum(self.seen.values())} requests", *lines])

    def check(self, caplog: pytest.LogCaptureFixture) -> None:
        assert not self.bad, "\n".join(self.bad[:8])
        failed = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert not failed, [(r.name, r.getMessage(), r.exc_text) for r in failed[:5]]
        paths = {path for path, _, _ in self.seen}
        assert paths == {path for path, _, _ in self._maker.operations}
        print(self.report())


def authorized(mesh: SecureMesh) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"https://{mesh.addresses['http']}",
        verify=ssl.create_default_context(cafile=mesh.certs / "ca.pem"),
        headers={"authorization": f"Bearer {mesh.keys['admin']}"},
        timeout=30,
    )


@pytest.mark.timeout(0)
@unclosed
async def test_random_requests_to_simulated_engines(tmp_path, pytestconfig, caplog):
    caplog.set_level(logging.WARNING)
    seconds, seed = pytestconfig.getoption("--fuzz-seconds"), pytestconfig.getoption("--fuzz-seed")
    async with asyncio.timeout(seconds + 60), SecureMesh(tmp_path) as mesh, authorized(mesh) as http:
        maker = HttpMaker(random.Random(seed), (await http.get("/openapi.json")).json(), ["engine", "engine-1"])
        fuzzer = HttpFuzzer(http, maker)
        await fuzzer.run(seconds)
        await fuzzer.tidy()
        await at_rest(mesh)
    fuzzer.check(caplog)


@pytest.mark.timeout(0)
@unclosed
async def test_random_requests_to_a_model_with_a_tokenizer(door, pytestconfig, caplog):
    caplog.set_level(logging.WARNING)
    seconds, seed = pytestconfig.getoption("--fuzz-seconds"), pytestconfig.getoption("--fuzz-seed")
    async with asyncio.timeout(seconds + 60):
        maker = HttpMaker(random.Random(seed), (await door.http.get("/openapi.json")).json(), ["e0", "e1"])
        maker.operations = [o for o in maker.operations if "microserving" not in o[0]]
        fuzzer = HttpFuzzer(door.http, maker)
        await fuzzer.run(seconds)
        await door.mesh.idle()
    fuzzer.check(caplog)


# Where `make fuzz` puts it: kvmesh itself does without.
SCHEMATHESIS = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmesh" / "fuzz" / "bin" / "schemathesis"
)


@pytest.mark.timeout(0)
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not there: make fuzz")
async def test_schemathesis_finds_no_server_error(tmp_path, pytestconfig, caplog):
    seconds, seed = pytestconfig.getoption("--fuzz-seconds"), pytestconfig.getoption("--fuzz-seed")
    caplog.set_level(logging.WARNING)
    async with asyncio.timeout(seconds + 120), SecureMesh(tmp_path) as mesh:
        url = f"https://{mesh.addresses['http']}"
        command = [str(SCHEMATHESIS), "run", "--url", url, f"{url}/openapi.json", "--checks", "not_a_server_error"]
        command += [
            "--header",
            f"authorization: Bearer {mesh.keys['admin']}",
            "--tls-verify",
            str(mesh.certs / "ca.pem"),
        ]
        command += ["--seed", str(seed), "--max-time", str(int(seconds)), "--workers", "4", "--request-timeout", "20"]
        command += ["--max-failures", "5", "--no-color", "--phases", "examples,fuzzing"]
        run = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
        )
        try:
            out, _ = await run.communicate()
        finally:
            if run.returncode is None:
                run.kill()
                await run.wait()
        print(out.decode()[-3000:])
        assert run.returncode == 0, out.decode()[-3000:]
        async with mesh.client() as client:
            answer = client.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True, timeout=10)
            assert len((await answer.wait()).token_ids) == 2
    failed = [r for r in caplog.records if r.levelno >= logging.ERROR and r.name.startswith(("kvmesh", "services"))]
    assert not failed, [(r.name, r.getMessage(), r.exc_text) for r in failed[:5]]
