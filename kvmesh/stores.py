"""KV stores as the author of a strategy sees them, and which store keeps which prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated

from kvmesh.blocks import BLOCK_TOKENS, block_hashes
from kvmesh.params import Choices

if TYPE_CHECKING:
    from kvmesh.strategy import Engine, TicketHandle

# When a finished prefix is saved. "second": as much of it as a former request had too.
WriteBack = Annotated[str, Choices("always", "second", "never")]


@dataclass(frozen=True, slots=True)
class Held:
    """What a store has of a prompt: the first `tokens`, of which `in_memory` are in memory, and the rest on disk."""

    tokens: int = 0
    in_memory: int = 0

    def worth(self, cached: int, memory: float, disk: float) -> int:
        """What it spares an engine to have the first `cached` tokens itself, in tokens that are prefilled.

        To restore a token takes `memory` or `disk` of what it takes to prefill one.
        """
        in_memory = min(cached, self.in_memory)
        on_disk = min(cached, self.tokens) - in_memory
        return round(memory * in_memory + disk * on_disk + (cached - in_memory - on_disk))


class Store(ABC):
    """One live KV store. Calls raise MeshErrors; those that are the store's fault are ENGINE_FAILURES.

    `salt` keeps the KV of tenants apart.
    """

    name: str

    @abstractmethod
    async def held(self, token_ids: Sequence[int], *, salt: str = "") -> Held:
        """How many of the first tokens have their KV here, in whole blocks, and in which tier."""

    async def match(self, token_ids: Sequence[int], *, salt: str = "") -> int:
        """How many of the first tokens have their KV here, in whole blocks."""
        return (await self.held(token_ids, salt=salt)).tokens

    @abstractmethod
    async def prep_recv(
        self, token_ids: Sequence[int], end: int, *, wait: float = 10.0, salt: str = ""
    ) -> TicketHandle:
        """Locks what is here of token_ids[:end], rounded down to whole blocks, and reserves room for the rest."""

    @abstractmethod
    async def remote_send(
        self, token_ids: Sequence[int], ticket: TicketHandle, *, timeout: float | None = None, salt: str = ""
    ) -> int:
        """Writes what is here beyond `ticket.filled` into an engine's ticket; how many tokens, which may be none.

        Takes half of the request's remaining time at most, or `timeout` seconds, so that another way stays possible.
        """

    @abstractmethod
    async def release(self, ticket: TicketHandle) -> None:
        """Gives a ticket of this store back; what has arrived stays."""

    @abstractmethod
    def save(
        self,
        engine: Engine,
        token_ids: Sequence[int],
        *,
        when: str = "always",
        timeout: float = 30.0,
        salt: str = "",
    ) -> None:
        """Has `engine` send the KV of `token_ids` here, in the background; what fails there is seen in the trace only.

        Does nothing where `when` (WriteBack) says so, or when too many saves wait already.
        """


def rendezvous(names: Collection[str], token_ids: Sequence[int]) -> str | None:
    """The store, of these, that keeps prompts that begin as `token_ids` does; None for less than a block, or no store.

    Everybody chooses the same one, and when one goes only its own prompts move.
    """
    if not names or len(token_ids) < BLOCK_TOKENS:
        return None
    first = block_hashes(token_ids[:BLOCK_TOKENS])[0].to_bytes(8, "little")
    return max(names, key=lambda name: (blake2b(name.encode(), digest_size=8, key=first).digest(), name))
