"""The way of one request through the router, whichever door it came in by: checks, strategy, answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

from opentelemetry.trace import Span, SpanKind

from kvmesh.errors import DeadlineExceeded, InvalidArgument
from kvmesh.ranges import check_tokens
from kvmesh.sampling import check_sampling, max_new_tokens
from kvmesh.strategy import Request
from kvmesh.telemetry import Telemetry, extract, fail, inject
from kvmesh.tokenizer import Tokenizer, Tokenizers
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.engine_pb2 import ModelInfo
from services.router.admission import Admission
from services.router.answer import Answer
from services.router.board import StrategyBoard
from services.router.ledger import Ledger
from services.router.lineup import Choice
from services.router.recent import Recent, Record
from services.router.runtime import Job, Runtime
from services.router.view import MeshView

# What a request without a deadline may take.
REQUEST_S = 300.0
# The calls' own deadlines come first; this one is for a strategy that waits for something else.
LATE_S = 0.5
# Of a session or tenant.
ACCOUNT_CHARS = 256
# Of a prompt, in a trace that is to have it.
TRACED_CHARS = 4096
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Write: TypeAlias = Callable[[pb.GenerateResponse], Awaitable[object]]


@dataclass(slots=True)
class Prompt:
    """A prompt that has been checked."""

    model: ModelInfo
    token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None


class Door:
    """Runs requests. What it is given stays its giver's."""

    def __init__(
        self,
        view: MeshView,
        board: StrategyBoard,
        runtime: Runtime,
        tokenizers: Tokenizers,
        telemetry: Telemetry,
        admission: Admission | None = None,
    ) -> None:
        self._view = view
        self._board = board
        self._runtime = runtime
        self._tokenizers = tokenizers
        self._tracer = telemetry.tracer
        self._admission = admission or Admission(0, 0, 0)
        self._running: set[str] = set()
        self.recent = Recent()
        # Tokens of the longest prompt taken; 0: what the model takes.
        self.max_prompt_tokens = 0
        self.trace_prompts = False
        # Called with each request that is over.
        self.on_end: Callable[[Record], None] = lambda record: None
        # Called with the numbers of those running and waiting, soon after each change; for who shares them.
        self.on_change: Callable[[int, int], None] | None = None

    @property
    def running(self) -> int:
        """Requests under way that do not wait for admission."""
        return len(self._running) - self.waiting

    @property
    def waiting(self) -> int:
        """Requests that wait for admission."""
        return self._admission.waiting

    async def generate(
        self, request: pb.GenerateRequest, metadata: Iterable[tuple[str, Any]] | None, timeout: float, write: Write
    ) -> None:
        """Runs one request, and gives its messages to `write`. Cancelling ends all of it. Raises MeshError.

        `metadata` may hold a trace context (W3C); `timeout` is in seconds.
        """
        received = time.monotonic()
        request_id = self._admit(request.request_id)
        self._changed()
        record = self.recent.begin(request_id)
        span = self._tracer.start_span("router.generate", context=extract(metadata), kind=SpanKind.SERVER)
        try:
            async with asyncio.timeout(timeout + LATE_S):
                await self._generate(request, request_id, received + timeout, record.watching(write), span, received)
        except TimeoutError:
            error = DeadlineExceeded("the request's deadline passed")
            fail(span, error)
            record.failed(error)
            raise error from None
        except BaseException as error:
            fail(span, error)
            record.failed(error)
            raise
        finally:
            self._running.discard(request_id)
            self._changed()
            span.end()
            self.on_end(record)

    def _changed(self) -> None:
        if self.on_change is not None:
            # In a moment: a request that has come may be among those waiting by then.
            asyncio.get_running_loop().call_soon(lambda: self.on_change and self.on_change(self.running, self.waiting))

    def model_name(self, model: str) -> str:
        """The name of the model meant; empty means the only one. Raises MeshError."""
        return self._view.model(model).name

    async def chat_prompt(self, model: str, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation by the model's chat template. Raises MeshError."""
        info = self._view.model(model)
        tokenizer = await self._tokenizers.get(info.path)
        if tokenizer is None:
            raise InvalidArgument(f"messages: model {info.name} has no tokenizer here")
        return await tokenizer.chat(messages)

    async def text_prompt(self, model: str, text: str) -> tuple[int, ...]:
        """Token ids of a prompt given as text, checked. Raises MeshError."""
        return (await self._prompt(pb.GenerateRequest(text=text, model=model))).token_ids

    async def token_texts(self, model: str, token_ids: Iterable[int]) -> list[str]:
        """The text of each token by itself; empty texts without a tokenizer."""
        tokenizer = await self._tokenizers.get(self._view.model(model).path)
        return [tokenizer.decode([token]) if tokenizer is not None else "" for token in token_ids]

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
        self,
        request: pb.GenerateRequest,
        request_id: str,
        deadline: float,
        write: Write,
        span: Span,
        received: float,
    ) -> None:
        _check_account(request)
        choice = self._board.choose(request.strategy, request.strategy_params, request.session or request_id)
        prompt = await self._prompt(request)
        if span.is_recording():
            span.set_attributes(_attributes(request_id, choice, prompt))
            if self.trace_prompts:
                span.set_attribute("kvmesh.prompt", _beginning(request))
        ledger = Ledger(len(prompt.token_ids), received)
        job = Job(
            Request(
                request_id,
                prompt.token_ids,
                request.sampling,
                prompt.model.name,
                deadline,
                session=request.session,
                tenant=request.tenant,
            ),
            prompt.model,
            choice.strategy,
            choice.values,
            ledger,
            span,
        )
        asked = max_new_tokens(request.sampling, prompt.model.context_length, len(prompt.token_ids))
        cost = len(prompt.token_ids) + asked
        async with self._admission.entered(request.tenant, request.priority, cost, deadline):
            self._changed()
            await self._serve(job, choice, prompt, write)

    async def _serve(self, job: Job, choice: Choice, prompt: Prompt, write: Write) -> None:
        request, span, ledger = job.request, job.span, job.ledger
        received = ledger.received
        if span.is_recording():
            span.set_attribute("kvmesh.admission_s", time.monotonic() - received)
        started = pb.GenerateStarted(
            request_id=request.request_id,
            strategy=choice.strategy.name,
            strategy_revision=choice.revision,
            prompt_tokens=len(prompt.token_ids),
            traceparent=dict(inject(span) or ()).get("traceparent", ""),
        )
        await write(pb.GenerateResponse(started=started))
        detokenizer = None if prompt.tokenizer is None else prompt.tokenizer.detokenizer(prompt.token_ids)
        answer = Answer(detokenizer, request.sampling.stop_strings)
        with self._board.judging(choice, ledger, request.deadline):
            await self._stream(job, answer, write)
        if (rest := answer.finish()) is not None:
            await write(pb.GenerateResponse(delta=rest))
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
        await write(pb.GenerateResponse(done=done))

    async def _stream(self, job: Job, answer: Answer, write: Write) -> None:
        async with aclosing(self._runtime.run(job)) as chunks:
            async for chunk in chunks:
                delta = answer.add(chunk)
                if delta is not None:
                    job.ledger.token(len(delta.token_ids))
                    await write(pb.GenerateResponse(delta=delta))
                if answer.stopped:
                    await answer.hear_out(chunks)
                    break

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
        if self.max_prompt_tokens and len(token_ids) > self.max_prompt_tokens:
            raise InvalidArgument(
                f"the prompt has {len(token_ids)} tokens, and this router takes {self.max_prompt_tokens}"
            )
        check_tokens(token_ids, model.vocab_size, model.context_length)
        check_sampling(request.sampling, model.vocab_size, model.context_length, len(token_ids))
        return Prompt(model, token_ids, tokenizer)


def _beginning(request: pb.GenerateRequest) -> str:
    """What of a prompt goes into a trace, where that is asked for."""
    if request.WhichOneof("prompt") == "text":
        return request.text[:TRACED_CHARS]
    return ",".join(map(str, request.tokens.ids[:TRACED_CHARS]))[:TRACED_CHARS]


def _check_account(request: pb.GenerateRequest) -> None:
    for name in ("session", "tenant"):
        if len(given := getattr(request, name)) > ACCOUNT_CHARS:
            raise InvalidArgument(f"{name} = {given[:80]!r}… has {len(given)} characters, at most {ACCOUNT_CHARS}")


def _attributes(request_id: str, choice: Choice, prompt: Prompt) -> dict[str, str | int]:
    return {
        "kvmesh.request_id": request_id,
        "kvmesh.strategy": choice.strategy.name,
        "kvmesh.strategy_revision": choice.revision,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": prompt.model.name,
        "gen_ai.usage.input_tokens": len(prompt.token_ids),
    }
