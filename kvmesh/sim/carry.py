"""One chunk of simulated KV on its way: it takes its time on both links, and is in the other's slots at the end."""

from __future__ import annotations

import asyncio

from kvmesh.dataplane.slots import Slots
from kvmesh.sim.links import Link
from kvmesh.sim.peers import Peers, Values
from kvmesh.v1.kv_pb2 import KvPool

# How long one that is cancelled waits for the chunk on its way; then it hangs up.
STOP_S = 5.0


async def carry(
    link: Link,
    peers: Peers,
    pool: KvPool,
    slots: Slots,
    values: Values,
    size: int,
    *,
    latency: float = 0.0,
    dropped: bool = False,
) -> None:
    """Sends `values`, which stand for `size` bytes, over our `link`. `dropped`: into nothing. Raises as Peers.write.

    However it ends, nothing is being written any more.
    """
    if latency:
        await asyncio.sleep(latency)
    ours = asyncio.ensure_future(link.carry(size))
    theirs = ours if dropped else asyncio.ensure_future(peers.write(pool, slots, values, size))
    try:
        await asyncio.wait({ours, theirs}, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        if not theirs.done():
            # What is on its way must have arrived, or be known not to, before the slots are anybody else's.
            await asyncio.wait({theirs}, timeout=STOP_S)
        for future in (ours, theirs):
            future.cancel()
        await asyncio.wait({ours, theirs})
    for future in (theirs, ours):
        future.result()
