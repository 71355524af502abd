"""Runs inside one namespace: calls an engine as it is told to."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "mesh"))

from direct import DirectEngine
from google.protobuf.json_format import MessageToDict
from program import serve

from kvmesh.v1.common_pb2 import Ticket


class Speaker:
    """All engines are reached from here."""

    def __init__(self, addresses: list[str]) -> None:
        self._engines = [DirectEngine(f"engine-{i}", address) for i, address in enumerate(addresses)]

    async def start(self) -> None:
        for engine in self._engines:
            await engine.__aenter__()

    async def do(self, what: str, at: int = 0, **fields: Any) -> Any:
        engine = self._engines[at]
        if what == "info":
            return MessageToDict(engine.info, preserving_proto_field_name=True)
        if what == "prepare":
            ticket = await engine.prepare(fields["tokens"], fields.get("end", -1), ttl_ms=fields.get("ttl_ms", 30_000))
            return [ticket.SerializeToString().hex(), ticket.matched, ticket.end]
        if what == "release":
            return await engine.release(Ticket.FromString(bytes.fromhex(fields["ticket"])))
        if what == "send":
            ticket = Ticket.FromString(bytes.fromhex(fields["ticket"]))
            self._sending = engine.send(fields["tokens"], ticket)
            return MessageToDict(await self._sending, preserving_proto_field_name=True)
        if what == "cancel":
            return self._sending.cancel()
        if what == "generate":
            ticket = Ticket.FromString(bytes.fromhex(fields["ticket"])) if "ticket" in fields else None
            result = await engine.generate(fields["tokens"], ticket, max_new_tokens=fields["max_new"])
            return [result.token_ids, result.finished.usage.cached_tokens]
        if what == "flush":
            return await engine.flush()
        if what == "rest":
            load = await engine.at_rest(fields["timeout"])
            return MessageToDict(load, preserving_proto_field_name=True)
        raise ValueError(what)


async def main() -> None:
    speaker = Speaker(json.loads(sys.argv[1]))
    await speaker.start()
    await serve(speaker.do)


asyncio.run(main())
