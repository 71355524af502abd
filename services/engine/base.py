"""What the engine service asks of the runtime below it."""

from __future__ import annotations

import abc
import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from kvmesh.endpoint.base import KvHolder, Piece, Reservation, SendReport
from kvmesh.errors import Unimplemented
from kvmesh.v1.common_pb2 import SamplingParams

__all__ = [
    "Ending",
    "HotContext",
    "Model",
    "Output",
    "Outputs",
    "Piece",
    "Reservation",
    "Runtime",
    "RuntimeLoad",
    "SendReport",
]


@dataclass(frozen=True, slots=True)
class Model:
    """The model as the runtime loaded it. `context_length`: prompt and answer together, in tokens."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """Why and how a generation ended. `token`: the stop token.

    `reason`: "stop", "length", "abort" when somebody asked for it, or "failed", then `message` says why, and `refused`
    whether it is the request that is at fault.
    """

    reason: str
    token: int | None = None
    message: str = ""
    retractions: int = 0
    refused: bool = False


@dataclass(slots=True)
class Output:
    """Tokens that appeared, or the ending, which is the last."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    ending: Ending | None = None


class Outputs(AsyncIterator[Output]):
    """The outputs of one generation, filled by the runtime. `abandon` is called if it is closed before its ending."""

    def __init__(self, abandon: Callable[[], None]) -> None:
        # Monotonic: when the model first saw the request; and how many tokens it did not have to prefill.
        self.began_ns = 0
        self.cached_tokens = 0
        self._abandon = abandon
        self._waiting: deque[Output] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    def put(self, output: Output) -> None:
        """One more."""
        self._waiting.append(output)
        self._ended = self._ended or output.ending is not None
        self._wake.set()

    def abort(self) -> None:
        """Ends it with reason "abort", after what has come already."""
        if not self._ended:
            self._abandon()
            self.put(Output(ending=Ending("abort")))

    def close(self) -> None:
        """Nobody wants the rest."""
        if not self._ended:
            self._ended = True
            self._abandon()

    async def __anext__(self) -> Output:
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.popleft()


@dataclass(frozen=True, slots=True)
class HotContext:
    """A context in the prefix cache, and how long ago it was used, in seconds."""

    token_ids: Sequence[int]
    idle: float


@dataclass(frozen=True, slots=True)
class RuntimeLoad:
    """As LoadReport, without what only the service knows."""

    running: int = 0
    waiting: int = 0
    waiting_reservations: int = 0
    waiting_tokens: int = 0
    sending: int = 0
    free: int = 0
    cached: int = 0
    in_use: int = 0
    reserved: int = 0


class Runtime(KvHolder):
    """Model, KV pool and prefix cache behind one engine service.

    Token ids, ranges and sampling parameters are checked before they get here. Every call raises Unavailable when the
    runtime is stopping or dead.
    """

    model: Model
    total_slots: int
    # "cpu" or the GPU's name, and such as "sglang 0.5.17".
    device: str
    version: str
    load: RuntimeLoad
    # Called after each change of `load`, and with (stored, removed, snapshot) for the prefix cache once `watch_cache`.
    on_load: Callable[[], None]
    on_cache: Callable[[Sequence[int], Sequence[int], bool], None]

    @abc.abstractmethod
    async def start(self) -> None:
        """Returns when requests can be served; the attributes above are set then. Raises MeshError."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Ends everything, within a few seconds. May be called twice, and without `start`."""

    @abc.abstractmethod
    async def died(self) -> str:
        """Returns when the runtime has ended by itself, with what is known of why."""

    @abc.abstractmethod
    def generate(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        max_new: int,
        reservation: int | None,
        generated: int = 0,
    ) -> Outputs:
        """Tokens as they come, then one output with `ending`. The caller closes it.

        The last `generated` of token_ids are of the answer already, generated for this request before. Uses the
        reservation up, unless it raises.
        """

    @abc.abstractmethod
    async def flush(self) -> None:
        """Empties the prefix cache. Raises FailedPrecondition while anything uses it."""

    async def hottest(self, count: int) -> list[HotContext]:
        """The `count` contexts in the prefix cache that were used last. Raises Unimplemented."""
        raise Unimplemented("this kind of engine does not tell which contexts are hot")

    @abc.abstractmethod
    def watch_cache(self) -> None:
        """Begins to call `on_cache`, first with a snapshot. May be called again."""
