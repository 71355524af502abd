"""Arrivals for a holder whose transports are in the process of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from kvmesh.dataplane.base import Transport, TwoSidedTransport
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Arrival
from kvmesh.endpoint.pairs import Pairs
from kvmesh.errors import Unavailable


class LocalArrivals:
    """KvHolder.two_sided and KvHolder.accept over `transports`."""

    def __init__(self, transports: Mapping[str, Transport]) -> None:
        self._transports = {name: t for name, t in transports.items() if isinstance(t, TwoSidedTransport)}
        self._pairs = {name: Pairs([t.describe()]) for name, t in self._transports.items()}

    def two_sided(self, transport: str) -> bool:
        """As in KvHolder."""
        return transport in self._transports

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        """As in KvHolder."""
        pairs = self._pairs[transport]
        pair = pairs.take(sender, fresh)
        pools = pairs.grant(pair)
        loop = asyncio.get_running_loop()
        over: asyncio.Future[str] = loop.create_future()

        def settle(error: str) -> None:
            if not over.done():
                over.set_result(error)

        def done(error: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, error)

        reception = self._transports[transport].accept(pools[0].meeting, slots, seconds, done)

        async def arriving() -> None:
            try:
                error = await asyncio.shield(over)
            except asyncio.CancelledError:
                # Quick: it waits for the copy of a frame at most.
                reception.cancel()
                raise
            if error:
                raise Unavailable(f"the KV did not arrive: {error}")
            pairs.put(pair)

        return Arrival(pools, asyncio.create_task(arriving()))
