"""Power of two choices: the better of two drawn at random, so that many routers do not all run to the same engine."""

from __future__ import annotations

import random

from kvmesh.strategy import Engine, Policy, Pool, Request


class PowerOfTwo(Policy):
    """Draws from `draw`."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def pick(self, request: Request, engines: Pool) -> Engine:
        """The one of two with less work."""
        two = self._draw.sample(engines, min(2, len(engines)))
        return min(two, key=lambda e: e.load.work)
