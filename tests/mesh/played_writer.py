"""A sender that only says what senders say, and writes nothing: in this process, or run as a script in another one.

As a script, with the arguments of `script`: prints "granted" once it may write, breaks its stream off when a line comes
on standard input, prints "broken", and lives on.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

import grpc

from kvmesh.host import host_id
from kvmesh.process import ProcessRef
from kvmesh.v1 import kv_pb2 as pb
from kvmesh.v1.common_pb2 import Endpoint, KvLayout, Ticket
from kvmesh.v1.kv_pb2_grpc import KvPeerStub


def begin_of(ticket: Ticket, layout: KvLayout, begin: int, end: int, incarnation: str, write_id: int) -> Any:
    """The first word of a write by this process."""
    me = ProcessRef.current()
    return pb.WriteRequest(
        begin=pb.WriteBegin(
            ticket=ticket,
            begin=begin,
            end=end,
            sender=Endpoint(name="played", address="127.0.0.1:1", incarnation=incarnation),
            location=pb.WriterLocation(
                host_id=host_id(), processes=[pb.Process(pid=me.pid, start_ticks=me.start_ticks)]
            ),
            layout=layout,
            transports=["shm"],
            write_id=write_id,
        )
    )


class PlayedWrite:
    """One KvPeer.Write over an asyncio stub. Used as `async with`: whatever happens, it has stopped afterwards."""

    def __init__(self, stub: Any, ticket: Ticket, layout: KvLayout) -> None:
        self._stub, self._ticket, self._layout = stub, ticket, layout
        self.incarnation, self.write_id = uuid.uuid4().hex, 7
        self.call: Any = stub.Write()

    async def __aenter__(self) -> PlayedWrite:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.call.cancel()
        await self.stopped()

    async def begin(self, begin: int | None = None, end: int | None = None) -> pb.WriteGrant:
        """Opens the write: by default of all that the ticket misses."""
        first = self._ticket.matched if begin is None else begin
        last = self._ticket.end if end is None else end
        await self.call.write(begin_of(self._ticket, self._layout, first, last, self.incarnation, self.write_id))
        return (await self.call.read()).grant

    async def done(self) -> pb.WriteCommitted:
        """Claims that everything is written."""
        await self.call.write(pb.WriteRequest(done=pb.WriteDone(bytes=1)))
        return (await self.call.read()).committed

    async def stopped(self) -> None:
        """Says that nothing is written any more."""
        request = pb.StoppedRequest(sender_incarnation=self.incarnation, write_id=self.write_id)
        await self._stub.Stopped(request, timeout=10)


def script(address: str, ticket: Ticket, layout: KvLayout) -> list[str]:
    """The command line of a sender in a process of its own."""
    messages = [m.SerializeToString().hex() for m in (ticket, layout)]
    return [sys.executable, "-P", __file__, address, *messages]


def main(address: str, ticket_hex: str, layout_hex: str) -> None:
    """The script."""
    ticket = Ticket.FromString(bytes.fromhex(ticket_hex))
    layout = KvLayout.FromString(bytes.fromhex(layout_hex))
    word = begin_of(ticket, layout, ticket.matched, ticket.end, uuid.uuid4().hex, 1)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        from queue import SimpleQueue

        words: SimpleQueue[Any] = SimpleQueue()
        words.put(word)
        call: Any = KvPeerStub(channel).Write(iter(words.get, None))
        assert next(call).WhichOneof("event") == "grant"
        print("granted", flush=True)
        sys.stdin.readline()
        call.cancel()
    print("broken", os.getpid(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
