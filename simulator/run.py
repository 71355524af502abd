"""One simulated run of one strategy."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass

from kvmesh.bench.records import Record
from kvmesh.bench.run import Load
from kvmesh.bench.run import run as run_load
from kvmesh.sim.profile import Profile
from kvmesh.v1.kvstore_pb2 import StoreStats
from simulator.clock import run
from simulator.mesh import USUAL, Around, MeshTarget, SimMesh
from simulator.stores import total


@dataclass(frozen=True)
class Choice:
    """A strategy and its parameters; `text` is how it was written."""

    text: str
    strategy: str
    params: dict[str, str]

    @staticmethod
    def parse(text: str) -> Choice:
        """Of NAME or NAME,key=value,key=value. Raises InvalidArgument."""
        from kvmesh.errors import InvalidArgument

        name, *pairs = text.split(",")
        params: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise InvalidArgument(f"strategy {text!r}: {pair!r} is not KEY=VALUE")
            params[key] = value
        return Choice(text, name, params)


@dataclass
class Outcome:
    """What a run gave. `virtual` and `real`: how long it took there and here, in seconds; `stores`: all in sum."""

    records: list[Record]
    virtual: float
    real: float
    stores: StoreStats


def simulate(
    profile: Profile, engines: int, choice: Choice, load: Load, seed: int = 0, around: Around = USUAL
) -> Outcome:
    """Runs it; the same at the same seed."""
    random.seed(seed)
    gc.collect()
    began = time.perf_counter()

    async def whole() -> tuple[list[Record], float, StoreStats]:
        start = time.monotonic()
        async with SimMesh(profile, engines, seed, around) as mesh:
            # What has been made up to here stays: to look through it for garbage, again and again, is of no use.
            gc.freeze()
            records = await run_load(MeshTarget(mesh, choice.strategy, choice.params), load)
            return records, time.monotonic() - start, total(mesh.stores)

    try:
        records, virtual, kept = run(whole())
    finally:
        gc.unfreeze()
    return Outcome(records, virtual, time.perf_counter() - began, kept)
