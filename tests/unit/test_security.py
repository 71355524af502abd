"""Every hop of a secure mesh refuses who may not call; nothing secret is in logs, traces and metrics."""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl

import grpc
import httpx
import pytest
from secure_harness import SERVICES, SecureMesh, methods

from kvmesh.apikeys import SCOPES
from kvmesh.client import AsyncClient
from kvmesh.errors import InvalidArgument, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable
from kvmesh.grpcx import channel, wait_serving
from kvmesh.v1 import common_pb2, kv_pb2, kv_pb2_grpc

CODES = grpc.StatusCode
# Token ids that appear nowhere else.
CANARY = [301, 317, 323, 307, 311, 331, 302, 299, 337, 303, 341, 313, 349, 305, 353, 309]
GENERATING = {"Generate", "ListStrategies", "GetStrategy"}


@pytest.fixture
async def mesh(tmp_path):
    async with SecureMesh(tmp_path) as running:
        yield running


def context(mesh: SecureMesh, client: str = "") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=mesh.certs / "ca.pem")
    if client:
        made.load_cert_chain(mesh.certs / f"{client}.pem", mesh.certs / f"{client}.key")
    return made


@pytest.mark.parametrize("server", SERVICES)
async def test_every_method_of_every_server_refuses_who_has_no_certificate_of_the_mesh(mesh, server):
    for service in SERVICES[server]:
        for method in methods(service):
            for tls in (None, mesh.tls(""), mesh.tls("foreign")):
                code, details = await mesh.refusal(server, method, tls, mesh.keys["admin"])
                assert code is CODES.UNAVAILABLE, (method.full_name, code, details)


@pytest.mark.parametrize("server", ["registry", "engine", "kvstore"])
async def test_inside_the_mesh_a_client_certificate_opens_nothing(mesh, server):
    for service in SERVICES[server]:
        for method in methods(service):
            code, details = await mesh.refusal(server, method, mesh.tls("client"), mesh.keys["admin"])
            assert code is CODES.PERMISSION_DENIED and "certificate" in details, method.full_name
    # Only health, for whoever looks after the process.
    await wait_serving(mesh.addresses[server], 5, tls=mesh.tls("client"))


async def test_the_router_wants_a_key_with_the_scope(mesh):
    for service in SERVICES["router"]:
        for method in methods(service):
            for key in ("", "kvmesh-wrong"):
                code, details = await mesh.refusal("router", method, mesh.tls(), key)
                assert code is CODES.UNAUTHENTICATED and "wrong" not in details, method.full_name
            code, _ = await mesh.refusal("router", method, mesh.tls(), mesh.keys["generate"])
            assert (code is CODES.PERMISSION_DENIED) == (method.name not in GENERATING), (method.full_name, code)
            code, _ = await mesh.refusal("router", method, mesh.tls(), mesh.keys["admin"])
            assert code not in (CODES.UNAUTHENTICATED, CODES.PERMISSION_DENIED), method.full_name
    await wait_serving(mesh.addresses["router"], 5, tls=mesh.tls())


async def test_http_wants_tls_and_a_key_with_the_scope(mesh):
    address = mesh.addresses["http"]
    async with httpx.AsyncClient(timeout=5) as plain:
        with pytest.raises(httpx.HTTPError):
            await plain.get(f"http://{address}/v1/models")
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(timeout=5) as stranger:
            await stranger.get(f"https://{address}/v1/models")
    async with httpx.AsyncClient(base_url=f"https://{address}", verify=context(mesh), timeout=5) as http:
        pages = [
            (path, verb) for path, verbs in (await http.get("/openapi.json")).json()["paths"].items() for verb in verbs
        ]
        assert len(pages) > 10
        for path, verb in pages:
            if path == "/health":
                continue
            for header in ({}, {"authorization": "Bearer kvmesh-wrong"}, {"authorization": mesh.keys["admin"]}):
                reply = await http.request(verb, path, headers=header)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", path
                assert reply.json()["error"]["type"] == "authentication_error"
            generate = {"authorization": f"Bearer {mesh.keys['generate']}"}
            code = (await http.request(verb, path, headers=generate)).status_code
            inside = path in ("/v1/models", "/v1/completions", "/v1/chat/completions")
            assert (code == 403) == (not inside), path
            admin = {"authorization": f"Bearer {mesh.keys['admin']}"}
            assert (await http.request(verb, path, headers=admin)).status_code not in (401, 403), path
        assert [(await http.get(path)).status_code for path in ("/", "/dashboard.js", "/health")] == [200] * 3
        assert (await http.get("/nowhere")).status_code == 401


async def test_metrics_want_a_certificate(mesh):
    url = f"https://{mesh.addresses['metrics']}/metrics"
    with pytest.raises((httpx.HTTPError, ssl.SSLError)):
        async with httpx.AsyncClient(verify=context(mesh), timeout=5) as stranger:
            await stranger.get(url)
    async with httpx.AsyncClient(verify=context(mesh, "client"), timeout=5) as known:
        assert "kvmesh_build_info" in (await known.get(url)).text


async def test_a_ticket_without_its_secret_moves_no_kv(mesh):
    async with (
        channel(mesh.addresses["engine"], mesh.tls("service")) as a,
        channel(mesh.addresses["engine-1"], mesh.tls("service")) as b,
    ):
        sender, receiver = kv_pb2_grpc.KvEndpointStub(a), kv_pb2_grpc.KvEndpointStub(b)
        ticket = (await receiver.PrepRecv(kv_pb2.PrepRecvRequest(token_ids=CANARY, end=-1), timeout=5)).ticket
        guessed = common_pb2.Ticket()
        guessed.CopyFrom(ticket)
        guessed.secret = bytes(16)
        request = kv_pb2.RemoteSendRequest(token_ids=CANARY, begin=0, end=-1, ticket=guessed)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sender.RemoteSend(request, timeout=5)
        assert caught.value.code() is CODES.PERMISSION_DENIED
        request.ticket.CopyFrom(ticket)
        assert (await sender.RemoteSend(request, timeout=5)).sent_tokens == len(CANARY) - 1
        assert (await receiver.Release(kv_pb2.ReleaseRequest(ticket=ticket), timeout=5)).released


async def test_it_serves_and_no_prompt_or_key_is_in_logs_traces_and_metrics(mesh, caplog):
    caplog.set_level(logging.DEBUG)
    async with mesh.client("generate") as client:
        for strategy in ("data_parallel", "prefill_decode", "balanced_prefill_decode"):
            prompt = [*CANARY, *CANARY[::-1], len(strategy)]
            answer = client.generate(prompt, strategy=strategy, max_new_tokens=4)
            assert len((await answer.wait()).token_ids) == 4
        for wrong in ({"seed": 1, "temperature": -1.0}, {"max_new_tokens": 0}):
            with pytest.raises(InvalidArgument):
                await client.generate(CANARY, **wrong).wait()
    headers = {"authorization": f"Bearer {mesh.keys['generate']}"}
    async with httpx.AsyncClient(base_url=f"https://{mesh.addresses['http']}", verify=context(mesh)) as http:
        body = {"prompt": CANARY * 2, "max_tokens": 4, "strategy": "prefill_decode"}
        assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json={**body, "n": "x"}, headers=headers)).status_code == 400
    async with httpx.AsyncClient(verify=context(mesh, "client")) as known:
        metrics = (await known.get(f"https://{mesh.addresses['metrics']}/metrics")).text
    await asyncio.sleep(0.5)
    traces = "".join(path.read_text() for path in (mesh.tmp / "traces").glob("*.jsonl"))
    assert "remote_send" in traces and "engine.prefill" in traces
    for place in (caplog.text, traces, metrics):
        said = place.replace(" ", "")
        assert not any(key in place for key in mesh.keys.values())
        assert not any(f"{a},{b}" in said for a, b in itertools.pairwise(CANARY))
    stored = mesh.key_file.read_text()
    assert not any(key in stored for key in mesh.keys.values()) and not (mesh.key_file.stat().st_mode & 0o077)


async def test_prompts_are_in_traces_where_that_is_asked_for(tmp_path):
    async with SecureMesh(tmp_path, trace_prompts=True) as mesh, mesh.client() as client:
        await client.generate(CANARY, max_new_tokens=1).wait()
    traces = "".join(path.read_text() for path in (tmp_path / "traces").glob("router*.jsonl"))
    assert ",".join(map(str, CANARY)) in traces


async def test_limits_on_prompts_messages_and_requests_of_one_key(tmp_path):
    async with SecureMesh(tmp_path, max_prompt_tokens=64, max_message="8KiB") as mesh:
        mesh.key_file.write_text(mesh.key_file.read_text().replace("max_running = 0", "max_running = 2"))
        await asyncio.sleep(1.1)
        async with mesh.client("generate") as client:
            assert len((await client.generate([1] * 64, max_new_tokens=1).wait()).token_ids) == 1
            with pytest.raises(InvalidArgument, match="65 tokens, and this router takes 64"):
                await client.generate([1] * 65, max_new_tokens=1).wait()
            with pytest.raises(ResourceExhausted, match="8192"):
                await client.generate("x" * 10000).wait()
            running = [client.generate([1, 2, i], max_new_tokens=4000, ignore_eos=True) for i in range(2)]
            held = [aiter(answer) for answer in running]
            for answer in held:
                await anext(answer)
            with pytest.raises(ResourceExhausted, match="may have 2") as caught:
                await client.generate([5, 6], max_new_tokens=1).wait()
            assert caught.value.retry_after
            headers = {"authorization": f"Bearer {mesh.keys['generate']}"}
            async with httpx.AsyncClient(base_url=f"https://{mesh.addresses['http']}", verify=context(mesh)) as http:
                body = {"prompt": [1, 2], "max_tokens": 1}
                for stream in (False, True):
                    reply = await http.post("/v1/completions", json={**body, "stream": stream}, headers=headers)
                    assert reply.status_code == 429 and reply.headers["retry-after"]
                for answer in running:
                    answer.cancel()
                async with asyncio.timeout(5):
                    while (await http.post("/v1/completions", json=body, headers=headers)).status_code == 429:
                        await asyncio.sleep(0.05)
                assert (await http.post("/v1/completions", json={**body, "n": 3}, headers=headers)).status_code == 429
                for text in ('{"prompt": "' + "x" * 9000 + '"}', " " * 9000):
                    reply = await http.post("/v1/completions", content=text, headers=headers)
                    assert reply.status_code == 413 and "8192" in reply.json()["error"]["message"]

                async def pieces():
                    for _ in range(20):
                        yield b" " * 1000

                reply = await http.post("/v1/completions", content=pieces(), headers=headers)
                assert reply.status_code == 413


async def test_keys_are_read_again_when_the_file_changes_and_a_bad_file_changes_nothing(mesh, caplog):
    async with mesh.client("generate") as client:
        assert await client.strategies()
        mesh.key_file.write_text("[broken\n")
        await asyncio.sleep(1.1)
        assert await client.strategies()
        assert "the API keys stay as they were" in caplog.text
        mesh.key_file.write_text("")
        await asyncio.sleep(1.1)
        with pytest.raises(Unauthenticated):
            await client.strategies()


async def test_clients_without_what_is_needed(mesh):
    address = mesh.addresses["router"]
    for tls, kind in ((None, Unavailable), (mesh.tls(""), Unavailable), (mesh.tls(), Unauthenticated)):
        async with AsyncClient(address, tls=tls) as client:
            with pytest.raises(kind):
                await client.strategies()
    async with mesh.client("generate") as client:
        with pytest.raises(PermissionDenied, match="scope 'admin'"):
            await client.set_strategy("prefill_decode")
    assert set(mesh.keys) == set(SCOPES)
