"""OpenAI's request bodies, and what they mean here.

What this server cannot do is refused by name, unless it is asked for in a form that asks for nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header
from pydantic import BaseModel, ConfigDict, Field

from kvmesh.errors import InvalidArgument
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.router_pb2 import PRIORITY_UNSPECIFIED, GenerateRequest, Priority

MOST_CHOICES = 32
# Asked for in OpenAI's API, not served; with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "echo": (None, False),
    "top_logprobs": (None, 0),
    "audio": (None,),
}


@dataclass(frozen=True)
class Headers:
    """kvmesh's own headers; the same can be said in the body."""

    strategy: Annotated[str, Header(alias="x-kvmesh-strategy")] = ""
    session: Annotated[str, Header(alias="x-kvmesh-session")] = ""
    tenant: Annotated[str, Header(alias="x-kvmesh-tenant")] = ""
    priority: Annotated[str, Header(alias="x-kvmesh-priority")] = ""


class Common(BaseModel):
    """What completions and chat completions share. Unknown fields are let through, as OpenAI's clients expect."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = Field(
        None, description='{"type": "json_schema", "json_schema": {"schema": ...}}, "json_object" or "text".'
    )
    # kvmesh's own, by `extra_body` in OpenAI's clients.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    strategy: str = Field("", description="Strategy for this request; empty: the one in force.")
    strategy_params: dict[str, Any] = Field(default_factory=dict)
    session: str = Field("", description="The conversation that this belongs to.")
    tenant: str = Field("", description="On whose account: tenants that wait have equal shares.")
    priority: str = Field("", description="low, normal or high.")

    def refuse(self) -> None:
        """Raises InvalidArgument for what is not served."""
        for field, nothing in _REFUSED.items():
            asked = (
                getattr(self, field, None) if field in type(self).model_fields else (self.model_extra or {}).get(field)
            )
            if asked not in nothing:
                raise InvalidArgument(f"{field} = {str(asked)[:100]} is not supported by this server")
        if self.n is not None and not 1 <= self.n <= MOST_CHOICES:
            raise InvalidArgument(f"n = {self.n} is not between 1 and {MOST_CHOICES}")

    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, max_new_tokens: int | None, logprobs: bool, choice: int) -> SamplingParams:
        """For one choice of several. Raises InvalidArgument for what cannot be sent."""
        params = SamplingParams(logprobs=logprobs)
        given: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "seed": None if self.seed is None else self.seed + choice,
            **{
                f: getattr(self, f)
                for f in (
                    "temperature",
                    "top_p",
                    "top_k",
                    "min_p",
                    "presence_penalty",
                    "frequency_penalty",
                    "repetition_penalty",
                    "ignore_eos",
                )
            },
        }
        for field, value in given.items():
            if value is None:
                continue
            try:
                setattr(params, field, value)
            except (TypeError, ValueError):
                raise InvalidArgument(f"{field} = {value} is out of range") from None
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        params.stop_strings.extend(stops)
        try:
            params.stop_token_ids.extend(self.stop_token_ids or [])
        except ValueError:
            raise InvalidArgument(f"stop_token_ids = {self.stop_token_ids} is out of range") from None
        for field, form in self._form().items():
            setattr(params, field, form)
        return params

    def _form(self) -> dict[str, str]:
        """What the answer must look like, as a field of SamplingParams; empty when it is free."""
        schema = self.json_schema
        asked = {
            "json_schema": json.dumps(schema) if isinstance(schema, dict) else schema,
            "regex": self.regex,
            "ebnf": self.ebnf,
            "response_format": _schema(self.response_format or {"type": "text"}),
        }
        given = {field: form for field, form in asked.items() if form}
        if len(given) > 1:
            raise InvalidArgument(f"only one of {', '.join(given)} can be asked for")
        return {"json_schema" if field == "response_format" else field: form for field, form in given.items()}

    def generate(self, sampling: SamplingParams, request_id: str, headers: Headers) -> GenerateRequest:
        """The router's request, without a prompt. What a header says goes before the body."""
        request = GenerateRequest(
            request_id=request_id,
            sampling=sampling,
            strategy=headers.strategy or self.strategy,
            model=self.model,
            session=headers.session or self.session,
            tenant=headers.tenant or self.tenant,
            priority=_priority(headers.priority or self.priority),
        )
        for name, value in self.strategy_params.items():
            request.strategy_params[name] = str(value).lower() if isinstance(value, bool) else str(value)
        return request


class CompletionRequest(Common):
    """`/v1/completions`. `prompt`: text or token ids, or several of them."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = None
    logprobs: int | bool | None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more. Raises InvalidArgument."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        if not given:
            raise InvalidArgument("prompt is empty")
        return list(given)  # type: ignore[arg-type]

    def refuse(self) -> None:
        """Also what only completions have."""
        super().refuse()
        if self.best_of not in (None, 1, self.n):
            raise InvalidArgument(f"best_of = {self.best_of} is not supported by this server")
        if self.logprobs is not None and self.logprobs is not True and self.logprobs > 1:
            raise InvalidArgument(
                f"logprobs = {self.logprobs}: only those of the chosen tokens are given, with logprobs = 1"
            )


class ChatRequest(Common):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def texts(self) -> list[dict[str, Any]]:
        """The messages, each with its content as one text. Raises InvalidArgument for images and the like."""
        if not self.messages:
            raise InvalidArgument("messages is empty")
        return [{**m, "content": _text(i, m.get("content"))} for i, m in enumerate(self.messages)]


def _priority(name: str) -> Priority.ValueType:
    try:
        return Priority.Value(f"PRIORITY_{name.upper()}") if name else PRIORITY_UNSPECIFIED
    except ValueError:
        raise InvalidArgument(f"priority = {name[:100]!r} is not low, normal or high") from None


def _schema(response_format: dict[str, Any]) -> str:
    """The JSON schema of OpenAI's `response_format`; empty for text."""
    kind = response_format.get("type")
    if kind == "text":
        return ""
    if kind == "json_object":
        return json.dumps({"type": "object"})
    named = response_format.get("json_schema")
    if kind != "json_schema" or not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise InvalidArgument(f"response_format = {str(response_format)[:100]} is not a known one")
    return json.dumps(named["schema"])


def _text(index: int, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(t, str) for t in texts):
        raise InvalidArgument(f"messages[{index}].content has parts that are not text")
    return "".join(map(str, texts))
