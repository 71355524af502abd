"""Prefix affinity: where this router has sent the same beginning before, unless much more work waits there."""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvmesh.blocks import block_hashes
from kvmesh.strategy import Engine, Policy, Pool, Request

BLOCK_TOKENS = 32
# Blocks remembered, over all engines: 2 million tokens.
REMEMBERED = 1 << 16


class PrefixAffinity(Policy):
    """Approximate: it does not know what engines have dropped, nor what other routers sent."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        # (engine's name and life, block), longest unused first.
        self._sent: OrderedDict[tuple[str, str, int], None] = OrderedDict()
        # Names of those that a block was sent to, and how many of their lives.
        self._names: dict[int, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def pick(self, request: Request, engines: Pool) -> Engine:
        """The one with the least work, tokens to prefill included."""
        blocks = block_hashes(request.token_ids, BLOCK_TOKENS)
        [engine] = engines.cheapest(1, lambda e: self._matched(e, blocks), self._likely(blocks), BLOCK_TOKENS)
        # From the end, so that what goes first is the end of a prompt: without its beginning it is worth nothing.
        for block in reversed(blocks):
            self._remember(engine, block)
        while len(self._sent) > self._remembered:
            self._forget()
        return engine

    def _remember(self, engine: Engine, block: int) -> None:
        key = (engine.name, engine.incarnation, block)
        if key not in self._sent:
            self._sent[key] = None
            names = self._names.setdefault(block, {})
            names[engine.name] = names.get(engine.name, 0) + 1
        self._sent.move_to_end(key)

    def _forget(self) -> None:
        (name, _, block), _ = self._sent.popitem(last=False)
        names = self._names[block]
        names[name] -= 1
        if not names[name]:
            del names[name]
        if not names:
            del self._names[block]

    def _matched(self, engine: Engine, blocks: Sequence[int]) -> int:
        sent, name, life = self._sent, engine.name, engine.incarnation
        # Whoever has a block has those before it: they were used as lately.
        return bisect(blocks, False, key=lambda block: (name, life, block) not in sent)

    def _likely(self, blocks: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(blocks, name), falling: who was sent so many of the first ones, or fewer."""
        depth = next((i for i, block in enumerate(blocks) if block not in self._names), len(blocks))
        told: set[str] = set()
        for i in range(depth, 0, -1):
            for name in self._names[blocks[i - 1]]:
                if name not in told:
                    told.add(name)
                    yield i, name
