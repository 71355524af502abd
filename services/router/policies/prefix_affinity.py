"""Prefix affinity: where this router has sent the same beginning before, unless much more work waits there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvmesh.blocks import block_hashes
from kvmesh.strategy import Engine, Policy, Request

BLOCK_TOKENS = 32
# Blocks remembered, over all engines: 2 million tokens.
REMEMBERED = 1 << 16


class PrefixAffinity(Policy):
    """Approximate: it does not know what engines have dropped, nor what other routers sent."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        # (engine, block), longest unused first.
        self._sent: OrderedDict[tuple[str, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def pick(self, request: Request, engines: Sequence[Engine]) -> Engine:
        """The one with the least work, tokens to prefill included."""
        blocks = block_hashes(request.token_ids, BLOCK_TOKENS)
        engine = min(engines, key=lambda e: e.load.work - BLOCK_TOKENS * self._matched(e, blocks))
        # From the end, so that what goes first is the end of a prompt: without its beginning it is worth nothing.
        for block in reversed(blocks):
            key = (_key(engine), block)
            self._sent[key] = None
            self._sent.move_to_end(key)
        while len(self._sent) > self._remembered:
            self._sent.popitem(last=False)
        return engine

    def _matched(self, engine: Engine, blocks: Sequence[int]) -> int:
        key = _key(engine)
        return next((i for i, block in enumerate(blocks) if (key, block) not in self._sent), len(blocks))


def _key(engine: Engine) -> str:
    return f"{engine.name}/{engine.incarnation}"
