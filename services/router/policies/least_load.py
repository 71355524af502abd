"""Least load: the engine with the least work, what was just sent to it included."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.strategy import Engine, Policy, Request


class LeastLoad(Policy):
    """The first by name among equals."""

    def pick(self, request: Request, engines: Sequence[Engine]) -> Engine:
        """The one with the least work."""
        return min(engines, key=lambda e: e.load.work)
