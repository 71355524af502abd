"""Runs inside one namespace: KV stores, and calls of them as it is told. Arguments: the side's address; its stores."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from google.protobuf.json_format import MessageToDict
from program import serve
from store_harness import KvNode, kv_node, until

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.pair import Patience
from kvmesh.v1.common_pb2 import Ticket

# 2 MiB a block.
LAYOUT = Layout("00" * 16, "float32", layers=8, heads=8, k_dim=64, v_dim=64, page_size=1)


class StoreSide:
    """Stores by name, and the sends of theirs that are under way."""

    def __init__(self, stores: dict[str, KvNode]) -> None:
        self._stores = stores
        self._sends: dict[str, asyncio.Task[Any]] = {}

    async def do(self, what: str, store: str, **fields: Any) -> Any:
        node = self._stores[store]
        if what == "info":
            return {"transports": list(node.status.info.transports), "address": node.address}
        if what == "fill":
            return await node.fill(fields["tokens"], fields["value"])
        if what == "content":
            return node.content(fields["tokens"])
        if what == "match":
            return await node.match(fields["tokens"])
        if what == "prepare":
            ticket = await node.prepare(fields["tokens"], ttl_ms=fields.get("ttl_ms", 30_000))
            return ticket.SerializeToString().hex()
        if what == "release":
            return await node.release(Ticket.FromString(bytes.fromhex(fields["ticket"])))
        if what == "send":
            ticket = Ticket.FromString(bytes.fromhex(fields["ticket"]))
            sending = self._sends[store] = asyncio.ensure_future(node.send(fields["tokens"], ticket, timeout=60))
            try:
                return MessageToDict(await sending, preserving_proto_field_name=True)
            finally:
                del self._sends[store]
        if what == "cancel":
            return self._sends[store].cancel()
        if what == "locked":
            await until(lambda: node.stats.locked == fields["count"], 10)
            return node.stats.sending
        if what == "idle":
            return await until(lambda: not node.stats.sending, 10)
        if what == "rest":
            await until(lambda: not (node.stats.locked or node.stats.memory_reserved or node.stats.tickets), 10)
            return MessageToDict(node.stats, preserving_proto_field_name=True)
        raise ValueError(what)


async def main() -> None:
    """Stores with the patience, in seconds for each frame, that the arguments give them."""
    address, stores = (json.loads(argument) for argument in sys.argv[1:])
    async with AsyncExitStack() as stack:
        made = {}
        for name, stall in stores.items():
            node = kv_node(name, blocks=12, layout=LAYOUT, address=address, patience=Patience(stall, stall))
            made[name] = await stack.enter_async_context(node)
        await serve(StoreSide(made).do)


asyncio.run(main())
