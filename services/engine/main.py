"""An engine, put together."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from kvmesh.blocks import BLOCK_TOKENS
from kvmesh.dataplane.setup import data_host
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender
from kvmesh.endpoint.tickets import TicketBook
from kvmesh.errors import FailedPrecondition, Unavailable
from kvmesh.grpcx import Server, announce, connector
from kvmesh.host import host_id
from kvmesh.membership import Membership
from kvmesh.metrics import page
from kvmesh.modelfolder import model_digest
from kvmesh.telemetry import Telemetry
from kvmesh.tokenizer import Tokenizers
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, kv_pb2_grpc
from kvmesh.v1.common_pb2 import Endpoint, SamplingParams
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from services.engine.base import Runtime
from services.engine.cli import DTYPES, EngineConfig
from services.engine.metrics import register as register_metrics
from services.engine.service import NAMES, EngineService
from services.engine.status import Status

log = logging.getLogger(__name__)

REGISTER_S = 60.0
# Between the answer to Leave and the end of the process.
LEAVE_S = 0.5
CPU_KV_TOKENS, CPU_CHUNK_TOKENS = 16384, 512
WARM_TOKENS, WARM_S = 64, 300.0


async def serve(config: EngineConfig) -> None:
    """Serves until cancelled. Raises Unavailable when the runtime does not start, or ends."""
    async with AsyncExitStack() as stack:
        runtime = await start(config, stack)
        raise Unavailable(await runtime.died())


async def start(config: EngineConfig, stack: AsyncExitStack) -> Runtime:
    """Starts an engine that `stack` stops; returns when it is ready. Raises MeshError."""
    access = config.access()
    incarnation = secrets.token_hex(16)
    name = config.name or f"engine-{incarnation[:8]}"
    runtime, model = await (_simulated(config, stack) if config.sim else _sglang(config, incarnation, stack))

    endpoint = Endpoint(name=name, incarnation=incarnation)
    telemetry = Telemetry("engine", name, config)
    stack.callback(telemetry.close)
    tokenizers = Tokenizers()
    stack.push_async_callback(tokenizers.close)
    book = TicketBook(endpoint, runtime.layout.fingerprint, runtime.free)
    stack.push_async_callback(book.close)
    receiver = Receiver(runtime, book, host_id(), config.checksum)
    stack.push_async_callback(receiver.close)
    sender = Sender(endpoint, runtime, host_id(), connector(access.tls), checksum=config.checksum)
    stack.push_async_callback(sender.close)
    info = describe(endpoint, runtime, *model)
    status = Status(info, runtime, book)
    service = EngineService(runtime, book, receiver, sender, status, tokenizers, telemetry)

    register_metrics(await stack.enter_async_context(page("engine", name, config)), status, service.totals)

    def register(server: object) -> None:
        kv_pb2_grpc.add_KvEndpointServicer_to_server(service, server)  # type: ignore[arg-type]
        kv_pb2_grpc.add_KvPeerServicer_to_server(service, server)  # type: ignore[arg-type]
        engine_pb2_grpc.add_EngineServicer_to_server(service, server)  # type: ignore[arg-type]

    server = Server(config.listen, register, NAMES, access)
    stack.push_async_callback(server.stop)
    stack.callback(status.close)
    endpoint.address = info.endpoint.address = config.advertise or server.address
    await server.start()
    log.info("serves %s (%s) on %s", info.model.name, runtime.version, server.address)
    announce(config.announce, server.address)
    if config.registry:
        service.leave = _leave(await _join(config, endpoint, stack))
    await server.ready()
    log.info("ready")
    return runtime


def _leave(membership: Membership) -> Callable[[bool], Awaitable[None]]:
    async def leave(stop: bool) -> None:
        log.info("leaves the mesh")
        await membership.stop()
        if stop:
            # As whoever runs it would; a moment later, so that the caller hears of it.
            asyncio.get_running_loop().call_later(LEAVE_S, os.kill, os.getpid(), signal.SIGTERM)

    return leave


async def _sglang(config: EngineConfig, incarnation: str, stack: AsyncExitStack) -> tuple[Runtime, tuple[str, str]]:
    """SGLang, loaded and warm, and the model's name and path."""
    folder = await asyncio.to_thread(lambda: Path(config.model).expanduser().resolve())
    digest = await asyncio.to_thread(model_digest, folder)
    run_dir = _run_dir(config, stack)
    # SGLang's scheduler sends SIGQUIT when it fails: its end is what is acted on.
    asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, lambda: log.error("SGLang failed; its log says why"))
    runtime = _runtime(config, folder, digest, run_dir, incarnation)
    stack.push_async_callback(runtime.stop)
    began = time.monotonic()
    await runtime.start()
    await warm_up(runtime)
    log.info("%s is loaded and warm after %.1f s", runtime.version, time.monotonic() - began)
    return runtime, (config.model_name or folder.name, str(folder))


async def _simulated(config: EngineConfig, stack: AsyncExitStack) -> tuple[Runtime, tuple[str, str]]:
    """A simulated engine: it has a model's name, and no path."""
    from services.engine.sim.launch import simulated

    runtime = simulated(config)
    stack.push_async_callback(runtime.stop)
    await runtime.start()
    log.warning("SIMULATED: %s on %s; times are made up, and so are tokens", runtime.version, runtime.device)
    return runtime, (config.model_name or runtime.profile.model.name, "")


def _dtype(config: EngineConfig, folder: Path) -> str:
    """For `auto`, what the model's configuration says: SGLang alone makes float16 of float32."""
    content = json.loads((folder / "config.json").read_text())
    said = content.get("dtype") or content.get("torch_dtype")
    return str(said) if config.dtype == "auto" and said in DTYPES else config.dtype


def _runtime(config: EngineConfig, folder: Path, digest: str, run_dir: Path, incarnation: str) -> Runtime:
    import torch

    from services.engine.sglang.frontend import SglangOptions
    from services.engine.sglang.runtime import SglangRuntime
    from services.engine.sglang.transports import data_settings

    cpu = not torch.cuda.is_available()
    options = SglangOptions(
        model=str(folder),
        dtype=_dtype(config, folder),
        kv_tokens=config.kv_tokens or (CPU_KV_TOKENS if cpu else 0),
        page_size=config.page_size,
        chunk_tokens=config.chunk_tokens or (CPU_CHUNK_TOKENS if cpu else 0),
        max_running=config.max_running,
        data=data_settings(config.transport, data_host(config.data_host, config.advertise, config.listen)),
        extra=dict(config.parsed_sglang()),
    )
    return SglangRuntime(options, digest, run_dir, incarnation)


async def warm_up(runtime: Runtime) -> None:
    """Lets first-time costs be over before the first request. Raises Unavailable when the model does not answer."""
    prompt = [i % runtime.model.vocab_size for i in range(min(WARM_TOKENS, runtime.model.context_length - WARM_TOKENS))]
    try:
        async with asyncio.timeout(WARM_S):
            for temperature in (0.0, 1.0):
                sampling = SamplingParams(temperature=temperature, top_k=8, ignore_eos=True)
                outputs = runtime.generate(prompt, sampling, 4, None)
                try:
                    async for output in outputs:
                        if output.ending is not None:
                            if output.ending.reason == "failed":
                                raise Unavailable(f"the warm-up failed: {output.ending.message}")
                            break
                finally:
                    outputs.close()
            await _flush(runtime)
    except TimeoutError:
        raise Unavailable(f"the model does not answer within {WARM_S:g} s") from None


async def _flush(runtime: Runtime) -> None:
    while True:
        try:
            return await runtime.flush()
        except FailedPrecondition:
            # The scheduler needs a moment to drop a request that has ended.
            await asyncio.sleep(0.02)


def _run_dir(config: EngineConfig, stack: AsyncExitStack) -> Path:
    if config.run_dir:
        return Path(config.run_dir).absolute()
    # mkdtemp gives an absolute path to a folder that only we know.
    made = tempfile.mkdtemp(prefix="kvmesh-engine-", dir="/tmp")
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


async def _join(config: EngineConfig, endpoint: Endpoint, stack: AsyncExitStack) -> Membership:
    member = Member(
        endpoint=endpoint,
        kind=MEMBER_KIND_ENGINE,
        labels=config.parsed_labels(),
        host_id=host_id(),
        started_unix_ms=int(time.time() * 1000),
        pid=os.getpid(),
    )
    membership = Membership(config.registry, member, connect=connector(config.tls()))
    await membership.start(REGISTER_S)
    stack.push_async_callback(membership.stop)
    return membership


def describe(endpoint: Endpoint, runtime: Runtime, name: str, path: str) -> engine_pb2.EngineInfo:
    """What the engine says of itself; `name` and `path` are the model's."""
    model = engine_pb2.ModelInfo(
        name=name,
        path=path,
        vocab_size=runtime.model.vocab_size,
        context_length=runtime.model.context_length,
        eos_token_ids=runtime.model.eos_token_ids,
    )
    return engine_pb2.EngineInfo(
        endpoint=endpoint,
        model=model,
        layout=runtime.layout.message(),
        total_slots=runtime.total_slots,
        device=runtime.device,
        runtime=runtime.version,
        transports=list(runtime.pools),
        cache_block_tokens=BLOCK_TOKENS,
    )
