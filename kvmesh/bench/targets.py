"""Whom to ask: a kvmesh router, or any server with OpenAI's streaming completions."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

from kvmesh.bench.records import Record
from kvmesh.bench.workloads import Ask
from kvmesh.client import AsyncClient
from kvmesh.errors import InvalidArgument, MeshError, Unavailable
from kvmesh.tls import Tls
from kvmesh.v1.router_pb2 import EngineShare


class Target(Protocol):
    """Asks, and writes down what came when."""

    async def ask(self, ask: Ask, record: Record, timeout: float) -> None:
        """Fills in `record.tokens`, `cached_tokens`; raises MeshError, TimeoutError or OSError when it fails."""

    async def close(self) -> None:
        """Ends its connections."""


class RouterTarget:
    """A kvmesh router, asked by token ids and greedily, past every end; without `strategy`, by the one in force."""

    def __init__(
        self,
        address: str,
        strategy: str = "",
        params: Mapping[str, str] | None = None,
        *,
        tls: Tls | None = None,
        api_key: str = "",
    ) -> None:
        self._client = AsyncClient(address, tls=tls, api_key=api_key)
        self._strategy = strategy
        self._params = dict(params or {})
        self._vocab = 0

    async def prepare(self) -> int:
        """Asks what is served; the context length. Raises MeshError."""
        mesh = await self._client.mesh()
        models = [e.info.model for e in mesh.engines if e.info.model.vocab_size]
        if not models:
            raise Unavailable("no engine is connected")
        self._vocab = models[0].vocab_size
        return models[0].context_length

    async def ask(self, ask: Ask, record: Record, timeout: float) -> None:
        """One request."""
        now = asyncio.get_running_loop().time
        answer = self._client.generate(
            ask.tokens(self._vocab),
            strategy=self._strategy,
            strategy_params=self._params,
            timeout=timeout,
            max_new_tokens=ask.max_new_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        async for delta in answer:
            if delta.token_ids:
                record.tokens.append((now(), len(delta.token_ids)))
        record.cached_tokens = not_prefilled(ask.prompt_tokens, answer.result.shares)

    async def close(self) -> None:
        """Hangs up."""
        await self._client.close()


class OpenAITarget:
    """POST `url`/completions with "stream": true. Prompts are token ids, or the workload's text if it has one.

    Each event with text counts as one token, unless the last says in `usage` how many there were.
    """

    def __init__(self, url: str, model: str, vocab_size: int = 32000, key: str = "", send_text: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgument(f"url = {url!r} is not http://HOST:PORT/v1 or https://…")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/") + "/completions"
        self._netloc = parts.netloc
        self._model, self._vocab, self._key, self._text = model, vocab_size, key, send_text

    async def ask(self, ask: Ask, record: Record, timeout: float) -> None:
        """One request on a connection of its own."""
        now = asyncio.get_running_loop().time
        body = {
            "model": self._model,
            "prompt": self._prompt(ask),
            "max_tokens": ask.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with asyncio.timeout(timeout), aclosing(self._events(json.dumps(body).encode())) as events:
            async for event in events:
                if "error" in event:
                    raise Unavailable(str(event["error"])[:300])
                if any(choice.get("text") for choice in event.get("choices", [])):
                    record.tokens.append((now(), 1))
                if usage := event.get("usage"):
                    _count(record, usage)

    def _prompt(self, ask: Ask) -> str | list[int]:
        return ask.text if self._text and ask.text else ask.tokens(self._vocab)

    async def _events(self, body: bytes) -> AsyncGenerator[dict[str, Any], None]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            head = [f"POST {self._path} HTTP/1.1", f"Host: {self._netloc}", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "Accept: text/event-stream", "Connection: close"]
            head += [f"Authorization: Bearer {self._key}"] if self._key else []
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            await writer.drain()
            status, headers = await _response(reader)
            lines = _chunked(reader) if headers.get("transfer-encoding") == "chunked" else _plain(reader)
            if status != 200:
                text = "".join([line async for line in lines])
                raise Unavailable(f"the server answers {status}: {text[:300]}")
            async for line in lines:
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                yield json.loads(data)
            raise Unavailable("the server ended the stream without [DONE]")
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise Unavailable(f"the server's answer breaks off: {error!r}") from None
        finally:
            writer.close()
            with suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def close(self) -> None:
        """Nothing is kept open."""


def not_prefilled(prompt_tokens: int, shares: Iterable[EngineShare]) -> int:
    """What of a prompt no engine had to prefill."""
    return max(0, prompt_tokens - sum(share.prefilled_tokens for share in shares))


def _count(record: Record, usage: Mapping[str, Any]) -> None:
    """Takes the server's word for how many tokens there were: the events' tokens are put right at the last one."""
    missing = int(usage.get("completion_tokens") or 0) - record.completion_tokens
    if missing > 0 and record.tokens:
        at, count = record.tokens[-1]
        record.tokens[-1] = (at, count + missing)
    details = usage.get("prompt_tokens_details") or {}
    if "cached_tokens" in details:
        record.cached_tokens = int(details["cached_tokens"] or 0)


async def _response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case."""
    first = (await reader.readuntil(b"\n")).split(maxsplit=2)
    if len(first) < 2 or not first[0].startswith(b"HTTP/1."):
        raise Unavailable("what listens there does not speak HTTP/1.1")
    headers: dict[str, str] = {}
    while (line := (await reader.readuntil(b"\n")).strip()) != b"":
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(first[1]), headers


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    while line := await reader.readline():
        yield line.decode("utf-8", "replace").rstrip("\r\n")


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    rest = b""
    while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
        rest += await reader.readexactly(size)
        await reader.readexactly(2)
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")


FAILURES = (MeshError, TimeoutError, OSError)
