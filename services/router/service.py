"""The Router service: checks a request, runs it by its strategy, and streams text and tokens."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc.aio
from opentelemetry.trace import Span, SpanKind

from kvmesh.errors import DeadlineExceeded, InvalidArgument
from kvmesh.grpcx import rpc, time_left
from kvmesh.ranges import check_tokens
from kvmesh.sampling import check_sampling
from kvmesh.strategy import Request
from kvmesh.telemetry import Telemetry, extract, fail
from kvmesh.tokenizer import Tokenizer, Tokenizers
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1 import router_pb2_grpc
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.engine_pb2 import ModelInfo
from services.router.answer import Answer
from services.router.board import Choice, StrategyBoard, describe
from services.router.ledger import Ledger
from services.router.runtime import Job, Runtime
from services.router.view import MeshView

NAME = "kvmesh.v1.Router"
REQUEST_S = 300.0
# The calls' own deadlines come first; this one is for a strategy that waits for something else.
LATE_S = 0.5
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(slots=True)
class Prompt:
    """A prompt that has been checked."""

    model: ModelInfo
    token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None


class RouterService(router_pb2_grpc.RouterServicer):
    """kvmesh.v1.Router. What it is given stays its giver's; `registry_connected` tells whether the registry answers."""

    def __init__(
        self,
        endpoint: Endpoint,
        view: MeshView,
        board: StrategyBoard,
        runtime: Runtime,
        tokenizers: Tokenizers,
        telemetry: Telemetry,
        registry_connected: Callable[[], bool],
    ) -> None:
        self._endpoint = endpoint
        self._view = view
        self._board = board
        self._runtime = runtime
        self._tokenizers = tokenizers
        self._tracer = telemetry.tracer
        self._registry_connected = registry_connected
        self._running: set[str] = set()

    @rpc
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Runs one request. Answers by context.write: so a cancel is raised here, not in a forgotten iterator."""
        received = time.monotonic()
        request_id = self._admit(request.request_id)
        span = self._tracer.start_span(
            "router.generate", context=extract(context.invocation_metadata()), kind=SpanKind.SERVER
        )
        try:
            async with asyncio.timeout(time_left(context, REQUEST_S) + LATE_S):
                await self._generate(request, request_id, context, span, received)
        except TimeoutError:
            error = DeadlineExceeded("the request's deadline passed")
            fail(span, error)
            raise error from None
        except BaseException as error:
            fail(span, error)
            raise
        finally:
            self._running.discard(request_id)
            span.end()

    def _admit(self, request_id: str) -> str:
        if not request_id:
            request_id = uuid.uuid4().hex
        elif not _ID.fullmatch(request_id):
            raise InvalidArgument(f"request_id = {request_id[:200]!r} is not [A-Za-z0-9._:-], 1 to 128 characters")
        if request_id in self._running:
            raise InvalidArgument(f"request_id = {request_id!r} is running on this router")
        self._running.add(request_id)
        return request_id

    async def _generate(
        self, request: pb.GenerateRequest, request_id: str, context: Context, span: Span, received: float
    ) -> None:
        deadline = received + time_left(context, REQUEST_S)
        choice = self._board.choose(request.strategy, request.strategy_params)
        prompt = await self._prompt(request)
        if span.is_recording():
            span.set_attributes(_attributes(request_id, choice, prompt))
        ledger = Ledger(len(prompt.token_ids), received)
        job = Job(
            Request(request_id, prompt.token_ids, request.sampling, prompt.model.name, deadline),
            prompt.model,
            choice.strategy,
            choice.values,
            ledger,
            span,
        )
        started = pb.GenerateStarted(
            request_id=request_id,
            strategy=choice.strategy.name,
            strategy_revision=choice.revision,
            prompt_tokens=len(prompt.token_ids),
        )
        await context.write(pb.GenerateResponse(started=started))
        detokenizer = None if prompt.tokenizer is None else prompt.tokenizer.detokenizer(prompt.token_ids)
        answer = Answer(detokenizer, request.sampling.stop_strings)
        async with aclosing(self._runtime.run(job)) as chunks:
            async for chunk in chunks:
                delta = answer.add(chunk)
                if delta is not None:
                    ledger.token(len(delta.token_ids))
                    await context.write(pb.GenerateResponse(delta=delta))
                if answer.stopped:
                    await answer.hear_out(chunks)
                    break
        if (rest := answer.finish()) is not None:
            await context.write(pb.GenerateResponse(delta=rest))
        done = answer.done(ledger)
        done.jct_seconds = time.monotonic() - received
        if span.is_recording():
            done.trace_id = format(span.get_span_context().trace_id, "032x")
            span.set_attributes(
                {
                    "gen_ai.usage.output_tokens": done.usage.completion_tokens,
                    "kvmesh.attempts": done.attempts,
                    "kvmesh.ttft_s": done.ttft_seconds,
                    "kvmesh.tpot_s": done.tpot_seconds,
                    "kvmesh.jct_s": done.jct_seconds,
                }
            )
        await context.write(pb.GenerateResponse(done=done))

    async def _prompt(self, request: pb.GenerateRequest) -> Prompt:
        """Checks everything that needs the model. Raises MeshError."""
        model = self._view.model(request.model)
        tokenizer = await self._tokenizers.get(model.path)
        kind = request.WhichOneof("prompt")
        if kind == "text":
            if tokenizer is None:
                raise InvalidArgument(f"prompt is text, and model {model.name} has no tokenizer here; send token ids")
            token_ids = tuple(await tokenizer.encode(request.text))
        elif kind == "tokens":
            token_ids = tuple(request.tokens.ids)
        else:
            raise InvalidArgument("prompt is missing: give text or tokens")
        if tokenizer is None and request.sampling.stop_strings:
            raise InvalidArgument(f"sampling.stop_strings: model {model.name} has no tokenizer here to find them with")
        check_tokens(token_ids, model.vocab_size, model.context_length)
        check_sampling(request.sampling, model.vocab_size, model.context_length, len(token_ids))
        return Prompt(model, token_ids, tokenizer)

    @rpc
    async def ListStrategies(self, request: pb.ListStrategiesRequest, context: Context) -> pb.ListStrategiesResponse:
        """All strategies, by name."""
        strategies = sorted(self._board.strategies.values(), key=lambda s: s.name)
        return pb.ListStrategiesResponse(strategies=[describe(s) for s in strategies])

    @rpc
    async def GetStrategy(self, request: pb.GetStrategyRequest, context: Context) -> pb.GetStrategyResponse:
        """The one in force."""
        return pb.GetStrategyResponse(strategy=self._board.current.message())

    @rpc
    async def SetStrategy(self, request: pb.SetStrategyRequest, context: Context) -> pb.SetStrategyResponse:
        """Puts one in force, on all routers."""
        choice = await self._board.set(request.name, request.params)
        return pb.SetStrategyResponse(strategy=choice.message())

    @rpc
    async def GetMesh(self, request: pb.GetMeshRequest, context: Context) -> pb.GetMeshResponse:
        """The mesh as seen from here."""
        now = time.monotonic()
        engines = [
            pb.MeshEngine(
                member=link.member,
                info=link.info,
                load=link.report,
                connected=link.connected,
                load_age_seconds=now - link.reported,
            )
            for _, link in sorted(self._view.links.items())
        ]
        return pb.GetMeshResponse(
            engines=engines,
            strategy=self._board.current.message(),
            registry_connected=self._registry_connected(),
            running_requests=len(self._running),
            router=self._endpoint,
        )


def _attributes(request_id: str, choice: Choice, prompt: Prompt) -> dict[str, str | int]:
    return {
        "kvmesh.request_id": request_id,
        "kvmesh.strategy": choice.strategy.name,
        "kvmesh.strategy_revision": choice.revision,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": prompt.model.name,
        "gen_ai.usage.input_tokens": len(prompt.token_ids),
    }
