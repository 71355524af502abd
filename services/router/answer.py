"""The answer as the client gets it: deltas of whole characters, cut at a stop string, and the closing account."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from kvmesh.detokenize import Detokenizer, TextStream
from kvmesh.errors import MeshError
from kvmesh.strategy import Chunk
from kvmesh.v1.common_pb2 import FINISH_REASON_STOP_STRING
from kvmesh.v1.engine_pb2 import GenerateFinished
from kvmesh.v1.router_pb2 import GenerateDelta, GenerateDone
from services.router.ledger import Ledger

LAST_WORD_S = 0.5


class Answer:
    """Made of chunks, until they end or `stopped`."""

    def __init__(self, detokenizer: Detokenizer | None, stops: Sequence[str]) -> None:
        self._text = TextStream(detokenizer, stops)
        self._stop: str | None = None
        self._finished: GenerateFinished | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop is not None

    def add(self, chunk: Chunk) -> GenerateDelta | None:
        """What to send of `chunk`; None for nothing. Tokens after the one that completes a stop string are dropped."""
        if chunk.finished is not None:
            self._finished = chunk.finished
        if not chunk.token_ids or self.stopped:
            return None
        text, used = "", 0
        for token in chunk.token_ids:
            piece, self._stop = self._text.add(token)
            text += piece
            used += 1
            if self._stop is not None:
                break
        return GenerateDelta(text=text, token_ids=chunk.token_ids[:used], logprobs=chunk.logprobs[:used])

    async def hear_out(self, chunks: AsyncIterator[Chunk]) -> None:
        """After a stop string: the engine looks for them too, and its next word should be the end, with its account."""
        with suppress(TimeoutError, MeshError):
            async with asyncio.timeout(LAST_WORD_S):
                async for chunk in chunks:
                    self.add(chunk)
                    if chunk.token_ids:
                        return

    def finish(self) -> GenerateDelta | None:
        """The text held back, at the end; None if there is none."""
        if self._stop is not None:
            return None
        text, self._stop = self._text.finish()
        return GenerateDelta(text=text) if text else None

    def done(self, ledger: Ledger) -> GenerateDone:
        """The last message, but for jct_seconds and trace_id."""
        done = GenerateDone(
            usage=ledger.usage,
            ttft_seconds=ledger.ttft,
            tpot_seconds=ledger.tpot,
            shares=ledger.shares,
            attempts=ledger.attempts,
        )
        if self._stop is not None:
            done.reason = FINISH_REASON_STOP_STRING
            done.stop_string = self._stop
        elif self._finished is not None:
            done.reason = self._finished.reason
            matched = self._finished.WhichOneof("matched")
            if matched == "stop_token_id":
                done.stop_token_id = self._finished.stop_token_id
            elif matched == "stop_string":
                done.stop_string = self._finished.stop_string
        return done
