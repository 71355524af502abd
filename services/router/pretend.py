"""Pretend engines: in memory, at once, without model or KV. What a strategy is rehearsed with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from kvmesh.errors import InvalidArgument
from kvmesh.ranges import check_range
from kvmesh.strategy import Chunk, Engine, Generating, Load, TicketHandle
from kvmesh.v1.common_pb2 import FINISH_REASON_LENGTH, GenerateUsage, SamplingParams, Ticket
from kvmesh.v1.engine_pb2 import GenerateFinished


class Books:
    """What strategies hold at the pretend engines of one mesh."""

    def __init__(self) -> None:
        self.tickets: dict[int, TicketHandle] = {}
        self.generations: set[PretendGeneration] = set()
        self._last = 0

    def reserve(self, engine: str, end: int) -> TicketHandle:
        """A ticket for [0:end) with nothing matched."""
        self._last += 1
        proto = Ticket(id=self._last, end=end)
        ticket = self.tickets[self._last] = TicketHandle(engine, proto, 0, end, 0)
        return ticket

    def take(self, ticket: TicketHandle) -> None:
        """Uses a ticket up. Raises InvalidArgument."""
        if self.tickets.pop(ticket.proto.id, None) is not ticket:
            raise InvalidArgument(f"ticket {ticket.proto.id} of {ticket.engine} was used or released")


class PretendGeneration(Generating):
    """Yields what is asked for, a token a chunk."""

    def __init__(self, books: Books, engine: str, token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._books, self._engine, self._prompt = books, engine, len(token_ids)
        self._asked = sampling.max_new_tokens
        self._logprobs = sampling.logprobs
        self._left = self._asked
        self._over = False
        books.generations.add(self)

    async def __anext__(self) -> Chunk:
        """The next token, then the end."""
        await asyncio.sleep(0)
        if self._over:
            raise StopAsyncIteration
        if not self._left:
            self.cancel()
            usage = GenerateUsage(prompt_tokens=self._prompt, completion_tokens=self._asked)
            return Chunk((), self._engine, finished=GenerateFinished(reason=FINISH_REASON_LENGTH, usage=usage))
        self._left -= 1
        return Chunk([self._left + 1], self._engine, [-0.5] if self._logprobs else [])

    def cancel(self) -> None:
        """Ends it."""
        self._over = True
        self._books.generations.discard(self)


class PretendEngine(Engine):
    """Checks what the real one checks."""

    def __init__(self, name: str, books: Books, labels: Mapping[str, str]) -> None:
        self.name, self.labels, self.incarnation = name, labels, "0" * 32
        self.total_slots = 1 << 20
        self._books = books

    @property
    def load(self) -> Load:
        """Idle."""
        return Load(free_slots=self.total_slots)

    async def prep_recv(self, token_ids: Sequence[int], end: int, *, wait: float = 10.0) -> TicketHandle:
        """A ticket."""
        _, end = check_range(0, end, len(token_ids))
        await asyncio.sleep(0)
        return self._books.reserve(self.name, end)

    async def remote_send(
        self,
        token_ids: Sequence[int],
        ticket: TicketHandle,
        begin: int | None = None,
        end: int | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Marks the range as filled."""
        begin = ticket.filled if begin is None else begin
        end = ticket.end if end is None else end
        begin, end = check_range(begin, end, len(token_ids))
        if ticket.proto.id not in self._books.tickets:
            raise InvalidArgument(f"ticket {ticket.proto.id} of {ticket.engine} was used or released")
        if begin != ticket.filled or end > ticket.end:
            raise InvalidArgument(f"begin = {begin}, end = {end}: the ticket holds {ticket.filled} of {ticket.end}")
        await asyncio.sleep(0)
        ticket.filled = end

    def start_generate(
        self, token_ids: Sequence[int], ticket: TicketHandle | None = None, sampling: SamplingParams | None = None
    ) -> Generating:
        """Generates."""
        if ticket is not None:
            if ticket.engine != self.name:
                raise InvalidArgument(f"ticket {ticket.proto.id} is of {ticket.engine}, not of {self.name}")
            self._books.take(ticket)
        asked = SamplingParams(max_new_tokens=8)
        if sampling is not None:
            asked.MergeFrom(sampling)
        return PretendGeneration(self._books, self.name, token_ids, asked)

    async def release(self, ticket: TicketHandle) -> None:
        """Gives the ticket back."""
        self._books.tickets.pop(ticket.proto.id, None)
