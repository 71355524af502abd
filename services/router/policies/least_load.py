"""Least load: the engine with the least work, what was just sent to it included."""

from __future__ import annotations

from kvmesh.strategy import Engine, Policy, Pool, Request


class LeastLoad(Policy):
    """The first by name among equals."""

    def pick(self, request: Request, engines: Pool) -> Engine:
        """The one with the least work."""
        return engines.calmest()[0]
