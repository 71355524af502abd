"""KV-aware: the least work, tokens to prefill included, by what the engines tell of their caches."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.strategy import Engine, Policy, Request


class KvAware(Policy):
    """Exact up to what an engine did in the last moment; the first by name among equals."""

    def pick(self, request: Request, engines: Sequence[Engine]) -> Engine:
        """The one that would begin to decode first if all were equally fast."""
        return min(engines, key=lambda e: e.load.work - e.cached(request.token_ids))
