"""`/v1/completions`, `/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from kvmesh.errors import Internal, InvalidArgument, MeshError
from kvmesh.v1.common_pb2 import FINISH_REASON_LENGTH, GenerateUsage
from kvmesh.v1.router_pb2 import GenerateDelta, GenerateDone, GenerateRequest
from services.router.door import Door
from services.router.http.errors import error_object
from services.router.http.requests import ChatRequest, Common, CompletionRequest, Headers
from services.router.http.stream import Event, events, unless_disconnected, while_connected
from services.router.view import MeshView

RequestId = Annotated[str, Header(alias="x-request-id")]
Own = Annotated[Headers, Depends()]
Trace = Annotated[str, Header(alias="traceparent")]
DEFAULT_TOKENS = 16
# Of one HTTP request.
MOST_GENERATIONS = 256


class OpenAi:
    """The routes, over what both doors share."""

    def __init__(self, door: Door, view: MeshView) -> None:
        self._door = door
        self._view = view
        self.router = APIRouter(prefix="/v1", tags=["OpenAI"])
        self.router.get("/models")(self.models)
        self.router.post("/completions")(self.completions)
        self.router.post("/chat/completions")(self.chat)

    async def models(self) -> dict[str, Any]:
        """The models that are served now."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "kvmesh", "max_model_len": model.context_length}
            for name, model in sorted(self._view.models.items())
        ]
        return {"object": "list", "data": data}

    async def completions(
        self,
        body: CompletionRequest,
        http: Request,
        headers: Own,
        request_id: RequestId = "",
        trace: Trace = "",
    ) -> Response:
        """Text goes on. Several prompts, and `n`, make several choices."""
        body.refuse()
        limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        call = Call("cmpl", "text_completion", body, request_id)
        prompts = body.prompts()
        if (count := len(prompts) * (body.n or 1)) > MOST_GENERATIONS:
            raise InvalidArgument(f"prompt: {len(prompts)} prompts make {count} choices, at most {MOST_GENERATIONS}")
        for prompt in prompts:
            for choice in range(body.n or 1):
                request = call.add(body.sampling(limit, body.logprobs not in (None, False), choice), headers)
                if isinstance(prompt, str):
                    request.text = prompt
                else:
                    _set_tokens(request, prompt)
        return await self._answer(call, http, trace)

    async def chat(
        self, body: ChatRequest, http: Request, headers: Own, request_id: RequestId = "", trace: Trace = ""
    ) -> Response:
        """A conversation goes on, by the model's own chat template."""
        body.refuse()
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        prompt = await self._door.chat_prompt(body.model, body.texts())
        call = Call("chatcmpl", "chat.completion", body, request_id)
        for choice in range(body.n or 1):
            _set_tokens(call.add(body.sampling(limit, bool(body.logprobs), choice), headers), prompt)
        return await self._answer(call, http, trace)

    async def _answer(self, call: Call, http: Request, trace: str) -> Response:
        metadata = [("traceparent", trace)] if trace else []
        source = events(self._door, call.requests, metadata, getattr(http.state, "caller", None))
        if not call.body.stream:
            for event in await unless_disconnected(http, source):
                await self._take(call, event)
            return JSONResponse(call.whole(), headers=call.headers())
        # The first message is waited for: until then a failure can still have a status of its own.
        try:
            first = await while_connected(http, _first(source))
            await self._take(call, first)
        except BaseException:
            await source.aclose()
            raise
        return StreamingResponse(self._lines(call, source), headers=call.headers(), media_type="text/event-stream")

    async def _take(self, call: Call, event: Event) -> dict[str, Any] | None:
        match event.message.WhichOneof("event"):
            case "started":
                call.traceparent = call.traceparent or event.message.started.traceparent
                call.model = call.model or self._door.model_name(call.body.model)
            case "delta":
                delta = event.message.delta
                texts = await self._door.token_texts(call.model, delta.token_ids) if delta.logprobs else []
                return call.delta(event.choice, delta, texts)
            case "done":
                return call.end(event.choice, event.message.done)
        return None

    async def _lines(self, call: Call, source: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
        """Server-sent events, the last of them [DONE]; a failure is the last but that."""
        try:
            async with aclosing(source):
                for line in call.beginning():
                    yield _line(line)
                async for event in source:
                    if (chunk := await self._take(call, event)) is not None:
                        yield _line(chunk)
            if call.body.usage_wanted():
                yield _line({**call.head(), "choices": [], "usage": call.usage()})
        except MeshError as error:
            yield _line(error_object(error))
        yield "data: [DONE]\n\n"


async def _first(source: AsyncGenerator[Event, None]) -> Event:
    return await anext(source)


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _set_tokens(request: GenerateRequest, tokens: Sequence[int]) -> None:
    request.tokens.SetInParent()
    try:
        request.tokens.ids.extend(tokens)
    except ValueError:
        raise InvalidArgument("prompt has a token id that is not between 0 and 2^32 - 1") from None


class Call:
    """One HTTP request: its generations, and the answer as it grows."""

    def __init__(self, prefix: str, kind: str, body: Common, request_id: str) -> None:
        self.body = body
        self.requests: list[GenerateRequest] = []
        self.model = ""
        self.traceparent = ""
        self._kind = kind
        self._chat = prefix == "chatcmpl"
        self._request_id = request_id or uuid.uuid4().hex
        self._id = f"{prefix}-{self._request_id}"
        self._created = int(time.time())
        self._choices: dict[int, _Choice] = {}

    def add(self, sampling: Any, headers: Headers) -> GenerateRequest:
        """One more generation; the caller sets its prompt."""
        number = len(self.requests)
        own = self._request_id if not number else f"{self._request_id}.{number}"
        request = self.body.generate(sampling, own, headers)
        self.requests.append(request)
        self._choices[number] = _Choice()
        return request

    def headers(self) -> dict[str, str]:
        """Of the answer."""
        headers = {"x-request-id": self._request_id}
        if self.traceparent:
            headers["traceparent"] = self.traceparent
        return headers

    def head(self) -> dict[str, Any]:
        """What every chunk begins with."""
        kind = "chat.completion.chunk" if self._chat else self._kind
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def beginning(self) -> list[dict[str, Any]]:
        """Chunks before any text: in a chat, who speaks."""
        if not self._chat:
            return []
        said = {"role": "assistant", "content": ""}
        return [
            {**self.head(), "choices": [{"index": i, "delta": said, "logprobs": None, "finish_reason": None}]}
            for i in self._choices
        ]

    def delta(self, index: int, delta: GenerateDelta, texts: Sequence[str]) -> dict[str, Any] | None:
        """The chunk for what has come; None when there is nothing to see in it."""
        choice = self._choices[index]
        logprobs = choice.add(delta, texts, self._chat)
        if not delta.text and logprobs is None:
            return None
        return self._chunk(index, delta.text, logprobs, None)

    def end(self, index: int, done: GenerateDone) -> dict[str, Any]:
        """The last chunk of a choice."""
        choice = self._choices[index]
        choice.usage = done.usage
        choice.reason = "length" if done.reason == FINISH_REASON_LENGTH else "stop"
        return self._chunk(index, "", None, choice.reason)

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        if self._chat:
            choice["delta"] = {"content": text} if text or reason is None else {}
        else:
            choice["text"] = text
        return {**self.head(), "choices": [choice]}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices: list[dict[str, Any]] = []
        for index, choice in self._choices.items():
            if choice.usage is None:
                raise Internal("the answer ended before it was complete")
            made: dict[str, Any] = {
                "index": index,
                "logprobs": choice.logprobs(self._chat),
                "finish_reason": choice.reason,
            }
            if self._chat:
                made["message"] = {"role": "assistant", "content": choice.text}
            else:
                made["text"] = choice.text
            choices.append(made)
        return {**self.head(), "object": self._kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Of all choices; a prompt of several choices is counted once."""
        used = [c.usage for c in self._choices.values() if c.usage is not None]
        each = max(1, self.body.n or 1)
        prompt = sum(u.prompt_tokens for u in used[::each])
        completion = sum(u.completion_tokens for u in used)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in used[::each])},
        }


class _Choice:
    """What has come of one choice."""

    def __init__(self) -> None:
        self.text = ""
        self.reason = ""
        self.usage: GenerateUsage | None = None
        self._tokens: list[tuple[str, float]] = []

    def add(self, delta: GenerateDelta, texts: Sequence[str], chat: bool) -> Any:
        self.text += delta.text
        new = list(zip(texts, delta.logprobs, strict=True)) if delta.logprobs else []
        self._tokens += new
        return _logprobs(new, chat) if new else None

    def logprobs(self, chat: bool) -> Any:
        return _logprobs(self._tokens, chat) if self._tokens else None


def _logprobs(tokens: Sequence[tuple[str, float]], chat: bool) -> Any:
    if chat:
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in tokens
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [text for text, _ in tokens],
        "token_logprobs": [value for _, value in tokens],
        "top_logprobs": None,
        "text_offset": None,
    }
