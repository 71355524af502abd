"""KV stores as the author of a strategy sees them, and which store keeps which prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated

from kvmesh.blocks import BLOCK_TOKENS, block_hashes
from kvmesh.params import Choices

if TYPE_CHECKING:
    from kvmesh.strategy import Engine, TicketHandle

# When a finished prefix is saved. "second": as much of it as a former request had too.
WriteBack = Annotated[str, Choices("always", "second", "never")]


class Store(ABC):
    """One live KV store. Calls raise MeshErrors; those that are the store's fault are ENGINE_FAILURES.

    `salt` keeps the KV of tenants apart.
    """

    name: str

    @abstractmethod
    async def match(self, token_ids: Sequence[int], *, salt: str = "") -> int:
        """How many of the first tokens have their KV here, in whole blocks."""

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
