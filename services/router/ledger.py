"""What one request cost: tokens and bytes by engine, and times, over all its attempts."""

from __future__ import annotations

import time

from kvmesh.v1.common_pb2 import GenerateUsage
from kvmesh.v1.engine_pb2 import GenerateFinished
from kvmesh.v1.kv_pb2 import RemoteSendResponse
from kvmesh.v1.router_pb2 import EngineShare


class Ledger:
    """Filled in by the sub-requests, read at its end. `received`: when the router got it, monotonic."""

    def __init__(self, prompt_tokens: int, received: float) -> None:
        self.prompt_tokens = prompt_tokens
        self.received = received
        self.attempts = 0
        self.completion_tokens = 0
        self._first = self._last = 0.0
        self._shares: dict[str, EngineShare] = {}
        self._finished: GenerateUsage | None = None
        self._retractions = 0

    def share(self, engine: str) -> EngineShare:
        """The part of `engine`, made at its first use."""
        if (share := self._shares.get(engine)) is None:
            share = self._shares[engine] = EngineShare(engine=engine)
        return share

    @property
    def shares(self) -> list[EngineShare]:
        """In order of first use."""
        return list(self._shares.values())

    def sent(self, sender: str, receiver: str, reply: RemoteSendResponse) -> None:
        """A remote send succeeded."""
        s = self.share(sender)
        s.prefilled_tokens += reply.computed_tokens
        s.cached_tokens += reply.cached_tokens
        s.sent_bytes += reply.sent_bytes
        s.transport = reply.transport or s.transport
        self.share(receiver).received_tokens += reply.sent_tokens

    def generated(self, engine: str, tokens: int) -> None:
        """`engine` decoded tokens."""
        self.share(engine).decoded_tokens += tokens

    def finished(self, engine: str, end: GenerateFinished, received: int) -> None:
        """A generation ended on `engine`, of whose cached tokens `received` had come over the data plane."""
        u, s = end.usage, self.share(engine)
        s.prefilled_tokens += max(0, u.prompt_tokens - u.cached_tokens)
        s.cached_tokens += max(0, u.cached_tokens - received)
        self._retractions += u.retractions
        self._finished = u

    def broken(self, engine: str, prompt_tokens: int, begin: int, matched: int) -> None:
        """A generation that had begun to stream broke off; its engine can no longer say what it did."""
        s = self.share(engine)
        s.prefilled_tokens += prompt_tokens - begin
        s.cached_tokens += matched

    def token(self, count: int) -> None:
        """Tokens go out to the client now."""
        if count:
            self._last = time.monotonic()
            self._first = self._first or self._last
            self.completion_tokens += count

    @property
    def ttft(self) -> float:
        """Seconds from receipt to the first token; 0 before it."""
        return self._first - self.received if self._first else 0.0

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens after the first; 0 for fewer than two."""
        return (self._last - self._first) / (self.completion_tokens - 1) if self.completion_tokens > 1 else 0.0

    @property
    def usage(self) -> GenerateUsage:
        """For the request as a whole; queue, prefill and decode times are of the engine that ended it."""
        usage = GenerateUsage()
        if self._finished is not None:
            usage.CopyFrom(self._finished)
        usage.prompt_tokens = self.prompt_tokens
        usage.cached_tokens = min(usage.cached_tokens, self.prompt_tokens)
        usage.completion_tokens = self.completion_tokens
        usage.retractions = self._retractions
        return usage
