"""KV-aware: the least work, tokens to prefill included, by what the engines tell of their caches."""

from __future__ import annotations

from kvmesh.strategy import Engine, Policy, Pool, Request


class KvAware(Policy):
    """Exact up to what an engine did in the last moment; the first by name among equals."""

    def pick(self, request: Request, engines: Pool) -> Engine:
        """The one that would begin to decode first if all were equally fast."""
        return engines.nearest(request.token_ids)[0]
