"""When requests come: seconds since the begin of a run, one for each; or as many at once as the closed loop allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvmesh.bench.workloads import Ask
from kvmesh.errors import InvalidArgument


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Independent arrivals, `rate` a second on average."""
    gaps = np.random.default_rng([seed, 1]).exponential(1 / _positive("rate", rate), count)
    return np.cumsum(gaps).tolist()  # type: ignore[no-any-return]


def constant(rate: float, count: int) -> list[float]:
    """One every 1/rate seconds."""
    return [i / _positive("rate", rate) for i in range(count)]


def traced(asks: Sequence[Ask], speed: float = 1.0) -> list[float]:
    """As the trace has them, `speed` times as fast."""
    return [a.at / _positive("speed", speed) for a in asks]


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise InvalidArgument(f"{name} = {value} is not above 0")
    return value
