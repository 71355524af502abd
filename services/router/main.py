"""A router, put together."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from kvmesh.aio import Tasks
from kvmesh.apikeys import ApiKeys
from kvmesh.config import home
from kvmesh.grpcx import Server, announce, connector
from kvmesh.guard import Access, KeyGuard
from kvmesh.host import host_id
from kvmesh.membership import Membership, MeshWatch, SharedSettings
from kvmesh.metrics import page
from kvmesh.sizes import parse_size
from kvmesh.telemetry import Telemetry
from kvmesh.tokenizer import Tokenizers
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.operator_pb2_grpc import add_OperatorServicer_to_server
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ROUTER, Member
from kvmesh.v1.router_pb2_grpc import add_RouterServicer_to_server
from services.router.admission import Admission
from services.router.board import StrategyBoard, catalog
from services.router.cli import RouterConfig
from services.router.door import Door
from services.router.draining import Draining
from services.router.folder import StrategyFolder
from services.router.link import EngineLink
from services.router.metrics import RouterMetrics
from services.router.move import ContextMover
from services.router.operator import NAME as OPERATOR
from services.router.operator import OperatorService
from services.router.runtime import Runtime
from services.router.service import NAME, RouterService
from services.router.storelink import StoreLinks
from services.router.tally import Tally
from services.router.view import MeshView

log = logging.getLogger(__name__)

# Tries to reach the registry go on for so long before the router gives up.
REGISTER_S = 60.0
# A registry that is back may know nobody; whoever lives has registered again by then.
PATIENCE_S = 10.0


async def serve(config: RouterConfig) -> None:
    """Serves until cancelled. Raises Unavailable when the address cannot be bound or the registry is not there."""
    async with AsyncExitStack() as stack:
        await start(config, stack)
        settle()
        await asyncio.Event().wait()


def settle() -> None:
    """What is there now stays: there is no use in looking through it for garbage again and again."""
    gc.collect()
    gc.freeze()


async def start(config: RouterConfig, stack: AsyncExitStack, tally: Tally | None = None) -> Server:
    """Starts a router that `stack` stops; returns when it is ready. Raises MeshError.

    With a `tally` it is one of several workers, which share its ports.
    """
    keys = ApiKeys(config.api_keys) if config.api_keys else None
    tls, limit = config.tls(), parse_size(config.max_message, "max_message")
    connect = connector(tls)
    incarnation = secrets.token_hex(16)
    endpoint = Endpoint(name=config.name or f"router-{incarnation[:8]}", incarnation=incarnation)
    telemetry = Telemetry("router", endpoint.name, config)
    stack.callback(telemetry.close)
    tokenizers = Tokenizers()
    tokenizers.import_library()
    stack.push_async_callback(tokenizers.close)
    make_link = partial(EngineLink, connect=connect)
    view = MeshView(lambda model: tokenizers.prepare(model.path), make_link, StoreLinks(connect))
    stack.push_async_callback(view.close)
    # One for all: once the watch has it back, so has everybody else.
    registry = connect(config.registry)
    stack.push_async_callback(registry.close, None)
    settings = SharedSettings(config.registry, channel=registry)
    stack.push_async_callback(settings.close)
    folder = await _folder(config, stack)
    strategies = catalog() if folder is None else folder.strategies
    board = StrategyBoard(strategies, config.default_strategy, settings)
    stack.push_async_callback(board.close)
    runtime = Runtime(view, telemetry.tracer)
    stack.push_async_callback(runtime.close)
    watch = MeshWatch(config.registry, view.update, patience=PATIENCE_S, channel=registry)
    stack.push_async_callback(watch.close)
    admission = Admission(config.max_running, config.max_running_tokens, config.max_waiting)
    door = Door(view, board, runtime, tokenizers, telemetry, admission)
    door.max_prompt_tokens, door.trace_prompts = config.max_prompt_tokens, config.trace_prompts
    view.draining = draining = Draining(settings)
    stack.push_async_callback(draining.close)
    background = Tasks()
    stack.push_async_callback(background.close)
    operator = OperatorService(ContextMover(view, telemetry.tracer, background), draining, door)
    if tally is not None:
        door.on_change = tally.put
    service = RouterService(endpoint, view, board, door, lambda: watch.connected, folder, tally)
    RouterMetrics(await stack.enter_async_context(page("router", endpoint.name, config)), door, view)

    def register(server: Any) -> None:
        add_RouterServicer_to_server(service, server)
        add_OperatorServicer_to_server(operator, server)

    access = Access(tls, config.client_certs, None if keys is None else KeyGuard(keys), limit)
    server = Server(config.listen, register, [NAME, OPERATOR], access, shared=tally is not None)
    stack.push_async_callback(server.stop)
    endpoint.address = config.advertise or server.address
    await server.start()
    log.info("router %s listens on %s", endpoint.name, server.address)
    announce(config.announce, server.address)
    watch.start()
    board.start()
    draining.start()
    if folder is not None:
        folder.follow(board.adopt)
    http = await _http(config, door, view, service, keys, stack)
    await _join(config, registry, endpoint, {"http": http} if http else {}, watch, stack)
    if config.wait_engines:
        log.info("waiting for %d engines", config.wait_engines)
        await view.wait_connected(config.wait_engines)
        # The first prompt does not have to wait for what takes seconds to load.
        await asyncio.gather(*(tokenizers.get(model.path) for model in view.models.values()))
    await server.ready()
    log.info("ready")
    return server


async def _folder(config: RouterConfig, stack: AsyncExitStack) -> StrategyFolder | None:
    """The folder of own strategies, read once, if there is to be one. Raises InvalidArgument."""
    if not config.strategy_dir:
        return None
    folder = StrategyFolder(config.strategy_dir, catalog())
    stack.push_async_callback(folder.close)
    await folder.scan()
    return folder


async def _http(
    config: RouterConfig,
    door: Door,
    view: MeshView,
    service: RouterService,
    keys: ApiKeys | None,
    stack: AsyncExitStack,
) -> str:
    """Opens the HTTP door, if there is to be one; its address."""
    if not config.http:
        return ""
    from services.router.http.server import make_app, serving

    traces = [Path(config.trace_dir) if config.trace_dir else home() / "traces"]
    app = make_app(door, view, service, traces, keys, parse_size(config.max_message, "max_message"))
    door_open = serving(config.http, app, config.tls_cert, config.tls_key, shared=config.workers > 1)
    address = await stack.enter_async_context(door_open)
    log.info("HTTP on %s://%s", "https" if config.tls_ca else "http", address)
    if config.announce:
        announce(f"{config.announce}.http", address)
    return address


async def _join(
    config: RouterConfig,
    registry: grpc.aio.Channel,
    endpoint: Endpoint,
    labels: dict[str, str],
    watch: MeshWatch,
    stack: AsyncExitStack,
) -> None:
    """Becomes a member, and waits until the watch has seen it: then the snapshot has come."""
    member = Member(
        endpoint=endpoint,
        kind=MEMBER_KIND_ROUTER,
        labels=labels,
        host_id=host_id(),
        started_unix_ms=int(time.time() * 1000),
        pid=os.getpid(),
    )
    membership = Membership(config.registry, member, channel=registry)
    await membership.start(REGISTER_S)
    stack.push_async_callback(membership.stop)
    await watch.wait_for(lambda members: endpoint.name in members, REGISTER_S)
