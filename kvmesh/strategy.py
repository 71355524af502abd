"""What the author of a strategy imports.

A strategy is one async generator over sub-request calls; its keyword-only arguments are its parameters:

    @strategy
    async def mine(request: Request, mesh: Mesh, *, prefill: Annotated[int, Range(1, 64)] = 1) -> Chunks:
        '''One line that says what it does.'''
        engine = mesh.least_loaded()
        async for chunk in engine.start_generate(request.token_ids):
            yield chunk

Deadlines, trace spans, cancellation, load accounting and the release of tickets happen by themselves.
"""

from __future__ import annotations

import inspect
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, overload

from kvmesh.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from kvmesh.pace import Pace
from kvmesh.params import Choices, Param, Range, Value, bind, declared
from kvmesh.pool import Pool, by_name
from kvmesh.stores import Store, WriteBack, rendezvous
from kvmesh.v1.common_pb2 import SamplingParams, Ticket
from kvmesh.v1.engine_pb2 import GenerateFinished

__all__ = [
    "ENGINE_FAILURES",
    "Choices",
    "Chunk",
    "Chunks",
    "Engine",
    "Generating",
    "Load",
    "Mesh",
    "Pace",
    "Param",
    "Placement",
    "Policy",
    "Pool",
    "Range",
    "Request",
    "SamplingParams",
    "Store",
    "Strategy",
    "TicketHandle",
    "WriteBack",
    "strategy",
]

# What a sub-request raises when an engine fails, and not the caller: `except ENGINE_FAILURES` and go another way.
ENGINE_FAILURES = (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
# What a running request weighs against prompt tokens that wait to be prefilled.
REQUEST_TOKENS = 256
# The placement policies, one file each in services/router/policies.
POLICIES = ("least_load", "round_robin", "power_of_two", "session_sticky", "prefix_affinity", "kv_aware")
# Of a parameter that names one: `policy: Placement = "least_load"`.
Placement = Annotated[str, Choices(*POLICIES)]
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as one attempt sees it: after a failure `token_ids` ends with what was streamed before."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    model: str
    # By time.monotonic().
    deadline: float
    attempt: int = 1
    # The conversation that it belongs to, and on whose account; empty when the caller has not said.
    session: str = ""
    tenant: str = ""
    # How many of the last token_ids were streamed before.
    generated: int = 0

    @property
    def prompt_tokens(self) -> int:
        """How many of the first token_ids are the caller's prompt."""
        return len(self.token_ids) - self.generated

    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()


@dataclass(slots=True)
class Chunk:
    """Tokens that appeared, or the end: the last chunk of an engine's stream has `finished` and no tokens."""

    token_ids: Sequence[int]
    engine: str
    logprobs: Sequence[float] = ()
    finished: GenerateFinished | None = None


Chunks = AsyncIterator[Chunk]


class Generating(AsyncIterator[Chunk], ABC):
    """A generation that runs: iterate for its chunks."""

    @abstractmethod
    def cancel(self) -> None:
        """Ends it; the engine frees what it held. Left over at the end, it is ended anyway."""


@dataclass(slots=True)
class TicketHandle:
    """Slots reserved on `engine`: the KV of [0:filled) is there, room for [filled:end)."""

    engine: str
    proto: Ticket
    matched: int
    end: int
    filled: int
    # False once a send into it failed: the receiver may have more than is known here.
    certain: bool = True

    @property
    def missing(self) -> int:
        """Tokens whose KV is still to be sent."""
        return self.end - self.filled


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine reported last, and what this router has sent since and not yet seen in a report."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    tickets: int = 0
    sending: int = 0
    free_slots: int = 0
    cached_slots: int = 0
    credit_requests: int = 0
    credit_tokens: int = 0
    # What this router has sent there to be prefilled and is not, whether it has been reported or not.
    assigned_tokens: int = 0

    @property
    def work(self) -> int:
        """All of it as one number, in prompt tokens."""
        requests = self.running + self.waiting + self.tickets + self.sending + self.credit_requests
        return requests * REQUEST_TOKENS + self.waiting_tokens + self.credit_tokens

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait there, or are being prefilled: what is in a report already is not counted again."""
        return max(self.waiting_tokens, min(self.waiting_tokens + self.credit_tokens, self.assigned_tokens))


class Engine(ABC):
    """One live engine. Every call raises a MeshError; those that are the engine's fault are ENGINE_FAILURES."""

    name: str
    labels: Mapping[str, str]
    # Another after every restart of the engine, which then holds nothing of what it held.
    incarnation: str = ""
    # KV slots in all, in tokens.
    total_slots: int = 0

    @property
    @abstractmethod
    def load(self) -> Load:
        """The load as this router knows it now."""

    @property
    def pace(self) -> Pace:
        """How fast it works, fitted to what this router measured."""
        return Pace()

    def cached(self, token_ids: Sequence[int]) -> int:
        """How many of the first tokens have their KV in its prefix cache, in whole blocks, by what it last told.

        Asking makes the router listen to its cache: 0 until it has told.
        """
        return 0

    def expect(self, tokens: int) -> None:
        """Counts so many tokens, to be prefilled there by this request, as load of the engine before they are sent."""
        return

    @abstractmethod
    async def prep_recv(self, token_ids: Sequence[int], end: int, *, wait: float = 10.0) -> TicketHandle:
        """Locks what is cached of token_ids[:end] and reserves slots for the rest; waits `wait` seconds for room."""

    @abstractmethod
    async def remote_send(
        self,
        token_ids: Sequence[int],
        ticket: TicketHandle,
        begin: int | None = None,
        end: int | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Writes the KV of token_ids[begin:end), prefilled here or cached, into the ticket: by default all it misses.

        Takes half of the request's remaining time at most, or `timeout` seconds, so that another way stays possible.
        """

    @abstractmethod
    def start_generate(
        self, token_ids: Sequence[int], ticket: TicketHandle | None = None, sampling: SamplingParams | None = None
    ) -> Generating:
        """Prefills what the ticket (else the cache) does not hold, then decodes. The call starts at once.

        A ticket that the engine refuses (expired, still written into) is released, and the engine does it all.
        """

    @abstractmethod
    async def release(self, ticket: TicketHandle) -> None:
        """Gives a ticket back early; tickets left over at the end are released anyway."""


class Policy(ABC):
    """Chooses engines. One object serves a router for ever, so that it may remember; what it keeps is bounded."""

    @abstractmethod
    def pick(self, request: Request, engines: Pool) -> Engine:
        """One of `engines`, of which there is at least one. Looking at each takes too long where there are many."""


class Mesh:
    """The live, healthy engines of the request's model, by name (engine-2 before engine-10). Never empty."""

    __slots__ = ("engines", "policies", "stores")

    def __init__(
        self,
        engines: Iterable[Engine] = (),
        policies: Mapping[str, Policy] | None = None,
        stores: Sequence[Store] = (),
    ) -> None:
        self.engines = engines if isinstance(engines, Pool) else Pool(sorted(engines, key=lambda e: by_name(e.name)))
        self.policies: Mapping[str, Policy] = policies or {}
        # The live KV stores of the request's model; may be none.
        self.stores = list(stores)

    def prefill(self, n: int = 1) -> Pool:
        """The prefill engines: labelled role=prefill if any has a role, else the first n, leaving one to decode."""
        return self.engines.split(n)[0]

    def decode(self, n: int = 1) -> Pool:
        """The decode engines: those that `prefill(n)` leaves. A lone engine, or what is left of a mesh, is both."""
        return self.engines.split(n)[1]

    def labelled(self, **labels: str) -> Pool:
        """The engines that have all these labels; may be none."""
        return self.engines.where(labels)

    def pick(self, request: Request, policy: str, engines: Sequence[Engine] | None = None) -> Engine:
        """The engine that the placement policy of that name (POLICIES) chooses; of all if `engines` is None.

        Raises InvalidArgument for an unknown policy.
        """
        if policy not in self.policies:
            raise InvalidArgument(f"policy = {policy!r} is not one of {', '.join(self.policies) or 'none'}")
        return self.policies[policy].pick(request, self._pool(engines))

    def least_loaded(self, engines: Sequence[Engine] | None = None) -> Engine:
        """The engine with the least work, the first by name among equals; of all if `engines` is None."""
        return self._pool(engines).calmest()[0]

    def _pool(self, engines: Sequence[Engine] | None) -> Pool:
        if engines is None:
            return self.engines
        return engines if isinstance(engines, Pool) else Pool(engines)

    def store_for(self, token_ids: Sequence[int]) -> Store | None:
        """The store that keeps prompts that begin so; None without stores, and for less than a block."""
        stores = {store.name: store for store in self.stores}
        name = rendezvous(stores, token_ids)
        return None if name is None else stores[name]


class Strategy:
    """A named strategy with typed parameters. Called, it runs: strategies may be made of strategies."""

    def __init__(self, function: Callable[..., Chunks], name: str) -> None:
        if not inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__} is not an async generator: a strategy yields chunks")
        if not _NAME.fullmatch(name):
            raise TypeError(f"strategy name {name!r} is not {_NAME.pattern}")
        self.name = name
        self.module = function.__module__
        self.summary = (inspect.getdoc(function) or "").partition("\n")[0]
        self.params: dict[str, Param] = declared(function, positional=2)
        self._function = function

    def bind(self, given: Mapping[str, str]) -> dict[str, Value]:
        """Values of all parameters, from text form. Raises InvalidArgument naming parameter, value and range."""
        return bind(f"strategy {self.name}", self.params, given)

    def __call__(self, request: Request, mesh: Mesh, **params: Any) -> Chunks:
        """Runs it; close the iterator when leaving it early."""
        return self._function(request, mesh, **params)


@overload
def strategy(given: Callable[..., Chunks]) -> Strategy: ...
@overload
def strategy(given: str) -> Callable[[Callable[..., Chunks]], Strategy]: ...
def strategy(
    given: Callable[..., Chunks] | str,
) -> Strategy | Callable[[Callable[..., Chunks]], Strategy]:
    """Makes a strategy of an async generator: `@strategy`, named as the function, or `@strategy("name")`.

    Raises TypeError for a wrong signature.
    """
    if isinstance(given, str):
        return lambda function: Strategy(function, given)
    return Strategy(given, given.__name__)
