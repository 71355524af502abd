"""The sending side: asks the receiver for its slots, has the holder fill them, and says when it has stopped."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from kvmesh.aio import Tasks
from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.slots import Slots, from_runs
from kvmesh.endpoint.base import Destination, KvHolder, SendReport
from kvmesh.errors import Aborted, Internal, MeshError, Unavailable, from_rpc
from kvmesh.grpcx import channel
from kvmesh.process import ProcessRef
from kvmesh.v1 import kv_pb2 as pb
from kvmesh.v1.common_pb2 import Endpoint, Ticket
from kvmesh.v1.kv_pb2_grpc import KvPeerStub

log = logging.getLogger(__name__)

# How long a grant, and the receiver's last word, may take.
WORD_S = 15.0
STOPPED_S = 2.0
STOPPED_TRIES = 10
# Between tries, the first and the longest.
BACKOFF_S = (0.1, 2.0)
# Channels to peers that are kept open while nothing runs on them.
IDLE_PEERS = 32
# How often it is looked whether receivers live whose pools are kept open.
LOOK_S = 2.0
# For so long a transport that could not be set up is the last that is offered to the same peer.
AVOID_S = 60.0


@dataclass(slots=True)
class Sent:
    """A send that arrived."""

    report: SendReport
    transport: str
    bytes: int

    def response(self, tokens: int, arrived: int) -> pb.RemoteSendResponse:
        """For a call that came at monotonic nanosecond `arrived` and sent so many tokens."""
        report = self.report
        ends = [piece.end_ns for piece in report.pieces]
        return pb.RemoteSendResponse(
            cached_tokens=report.cached,
            computed_tokens=report.computed,
            sent_tokens=tokens,
            sent_bytes=self.bytes,
            transport=self.transport,
            queue_seconds=max(0, report.began_ns - arrived) / 1e9,
            compute_seconds=max(0, report.prefilled_ns - report.began_ns) / 1e9,
            send_seconds=sum(p.end_ns - p.begin_ns for p in report.pieces) / 1e9,
            tail_seconds=max(0, max(ends, default=0) - report.prefilled_ns) / 1e9,
            chunks=len(report.pieces),
        )


class _Peer:
    """A channel to one life of one receiver."""

    def __init__(self, endpoint: Endpoint, connect: Callable[[str], grpc.aio.Channel]) -> None:
        self.endpoint = endpoint
        self.channel = connect(endpoint.address)
        self.stub = KvPeerStub(self.channel)
        # Without an iterator of requests: they are written one by one.
        self.write: Any = self.stub.Write
        self.users = 0
        self.pools: list[pb.KvPool] = []
        # Those that have the pools.
        self.processes: list[ProcessRef] = []
        # Transports that cannot be used, until when.
        self.avoid: dict[str, float] = {}

    def granted(self, pools: Sequence[pb.KvPool]) -> None:
        """Keeps in mind where the receiver's pools are."""
        # The others are nothing that could be held on to.
        self.pools = [p for p in pools if p.HasField("process")]
        self.processes = [ProcessRef(p.process.pid, p.process.start_ticks) for p in self.pools]

    def alive(self) -> bool:
        """Whether one of the processes that have the pools is known to live."""
        return any(p.alive() for p in self.processes)


class Sender:
    """RemoteSend over one holder of KV. Owns the channels to peers, and each write until the receiver knows its end."""

    def __init__(
        self,
        endpoint: Endpoint,
        holder: KvHolder,
        host_id: str,
        connect: Callable[[str], grpc.aio.Channel] = channel,
        checksum: bool = False,
    ) -> None:
        self._checksum = checksum
        self._connect = connect
        self._endpoint = endpoint
        self._holder = holder
        processes = [pb.Process(pid=p.pid, start_ticks=p.start_ticks) for p in holder.writers]
        self._location = pb.WriterLocation(host_id=host_id, processes=processes)
        self._writes = itertools.count(1)
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._tasks = Tasks()
        self._looking: asyncio.Task[None] | None = None

    async def send(self, token_ids: Sequence[int], begin: int, end: int, ticket: Ticket) -> Sent:
        """Has the KV of token_ids[begin:end) written into `ticket`. Raises MeshError; cancelling stops the write."""
        # A task of its own: its clean-up goes on when the caller is cancelled, or does not wait.
        work = self._tasks.start(self._outcome(token_ids, begin, end, ticket), f"send to {ticket.receiver.name}")
        try:
            outcome = await asyncio.shield(work)
        except asyncio.CancelledError:
            if work.cancelled():
                raise Unavailable("the sender is stopping") from None
            work.cancel()
            raise
        if isinstance(outcome, MeshError):
            raise outcome
        return outcome

    async def _outcome(self, token_ids: Sequence[int], begin: int, end: int, ticket: Ticket) -> Sent | MeshError:
        """As `_write`, but returns failures, which are the caller's business, not the log's."""
        try:
            return await self._write(token_ids, begin, end, ticket)
        except MeshError as error:
            return error

    async def _write(self, token_ids: Sequence[int], begin: int, end: int, ticket: Ticket) -> Sent:
        peer = self._acquire(ticket.receiver)
        write_id = next(self._writes)
        committed = False
        word: asyncio.Future[Any] | None = None
        call: Any = peer.write()
        try:
            await call.write(self._begin(peer, write_id, begin, end, ticket))
            word = _read(call)
            while True:
                grant = (await _word(word, "grant")).grant
                peer.granted(grant.pools)
                slots = from_runs(grant.slots, min((p.rows for p in grant.pools), default=1))
                if len(slots) != end - begin:
                    raise Internal(f"{ticket.receiver.name} granted {len(slots)} slots for {end - begin} tokens")
                # Nothing is due from the receiver before we are done: what comes earlier means that it has given up.
                word = _read(call)
                try:
                    report = await self._copy(word, token_ids, begin, end, grant, slots)
                    break
                except Unavailable as error:
                    if word.done() or not self._want_another(peer, grant, error):
                        raise
                    another = pb.WriteAnother(transport=grant.transport, reason=str(error))
                    await call.write(pb.WriteRequest(another=another))
            count = sum(piece.bytes for piece in report.pieces)
            sums = [pb.PieceSum(tokens=p.tokens, ranks=p.sums) for p in report.pieces if p.sums]
            await call.write(pb.WriteRequest(done=pb.WriteDone(bytes=count, sums=sums)))
            await _word(word, "committed")
            committed = True
            await call.done_writing()
            return Sent(report, grant.transport, count)
        except grpc.aio.AioRpcError as error:
            raise self._failure(peer, error) from error
        except asyncio.InvalidStateError:
            # The call ended while something was being written to it: its status says why.
            raise await self._ended(peer, call) from None
        finally:
            if word is not None:
                word.cancel()
            call.cancel()
            if not committed:
                self._tasks.start(self._say_stopped(peer, write_id), f"stopped writing to {peer.endpoint.name}")
            self._release(peer)

    def _want_another(self, peer: _Peer, grant: pb.WriteGrant, error: Unavailable) -> bool:
        """Whether a failed copy may be tried in another way."""
        name, pools = peer.endpoint.name, grant.pools
        if pools and pools[0].HasField("meeting") and not all(p.meeting.fresh for p in pools):
            # The connection of an earlier write, which may have gone stale since.
            log.info("the connection to %s is made anew: %s", name, error)
            return True
        if not isinstance(error, CannotConnect):
            return False
        log.warning("%s is not reached through %s: %s; asking for another way", name, grant.transport, error)
        peer.avoid[grant.transport] = time.monotonic() + AVOID_S
        return True

    def _offer(self, peer: _Peer) -> list[str]:
        """All of our transports, those to avoid last."""
        now = time.monotonic()
        return sorted(self._holder.pools, key=lambda name: peer.avoid.get(name, 0.0) > now)

    def _begin(self, peer: _Peer, write_id: int, begin: int, end: int, ticket: Ticket) -> pb.WriteRequest:
        return pb.WriteRequest(
            begin=pb.WriteBegin(
                ticket=ticket,
                begin=begin,
                end=end,
                sender=self._endpoint,
                location=self._location,
                layout=self._holder.layout.message(),
                transports=self._offer(peer),
                write_id=write_id,
            )
        )

    async def _copy(
        self,
        word: asyncio.Future[Any],
        token_ids: Sequence[int],
        begin: int,
        end: int,
        grant: pb.WriteGrant,
        slots: Slots,
    ) -> SendReport:
        """Runs the send for as long as the stream to the receiver lives."""
        checksum = self._checksum or grant.checksum
        to = Destination(grant.transport, list(grant.pools), slots, checksum)
        work = asyncio.ensure_future(self._holder.send(token_ids, begin, end, to))
        limit = grant.max_ms / 1000
        try:
            await asyncio.wait({work, word}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if word.done():
                word.result()
                raise Aborted("the receiver ended the write")
            if work.done():
                return work.result()
            raise Aborted(f"the ticket's life of {limit:.1f} s ended during the write")
        finally:
            if not work.done():
                work.cancel()
                # Until the holder says that nothing is written any more.
                await asyncio.wait({work})
            if not work.cancelled():
                # Looked at: a failure that comes second is of no interest.
                work.exception()

    def _failure(self, peer: _Peer, error: grpc.aio.AioRpcError) -> MeshError:
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            self._forget(peer)
        return from_rpc(error, f"receiver {peer.endpoint.name}")

    async def _ended(self, peer: _Peer, call: Any) -> MeshError:
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return self._failure(peer, error)
        return Aborted("the receiver ended the write")

    def _forget(self, peer: _Peer) -> None:
        if peer.pools:
            self._holder.forget(peer.pools)
            peer.pools = []

    async def _say_stopped(self, peer: _Peer, write_id: int) -> None:
        """Tells the receiver, again and again until it hears; a dead one does not need to know."""
        peer.users += 1
        request = pb.StoppedRequest(sender_incarnation=self._endpoint.incarnation, write_id=write_id)
        try:
            for attempt in itertools.count():
                try:
                    await peer.stub.Stopped(request, timeout=STOPPED_S)
                    return
                except grpc.aio.AioRpcError as error:
                    log.debug("%s does not hear that a write has stopped: %s", peer.endpoint.name, error.code())
                if attempt >= STOPPED_TRIES and not peer.alive():
                    return
                await asyncio.sleep(min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(attempt, 10)))
        finally:
            self._release(peer)

    def _acquire(self, endpoint: Endpoint) -> _Peer:
        key = endpoint.incarnation, endpoint.address
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = _Peer(endpoint, self._connect)
            self._trim(endpoint)
        if self._looking is None or self._looking.done():
            self._looking = self._tasks.start(self._look(), "look after receivers")
        peer.users += 1
        return peer

    def _trim(self, newest: Endpoint) -> None:
        """Lets go of former lives of the same receiver, and of the peers least lately met."""
        idle = [p for p in self._peers.values() if not p.users and p.endpoint.incarnation != newest.incarnation]
        former = [p for p in idle if p.endpoint.name == newest.name]
        for peer in {id(p): p for p in (*former, *idle[: max(0, len(idle) - IDLE_PEERS)])}.values():
            del self._peers[peer.endpoint.incarnation, peer.endpoint.address]
            self._tasks.start(peer.channel.close(None), f"close channel to {peer.endpoint.name}")
            self._forget(peer)

    async def _look(self) -> None:
        """Lets go of the pools of receivers that have died: their memory would stay for as long as it is mapped."""
        while True:
            await asyncio.sleep(LOOK_S)
            for peer in self._peers.values():
                if peer.pools and not peer.alive():
                    log.info("receiver %s is dead: its pool is let go of", peer.endpoint.name)
                    self._forget(peer)

    def _release(self, peer: _Peer) -> None:
        peer.users -= 1

    async def close(self) -> None:
        """Stops every write and closes the channels."""
        await self._tasks.close()
        for peer in self._peers.values():
            await peer.channel.close(None)
        self._peers.clear()


def _read(call: Any) -> asyncio.Future[Any]:
    """The next message. Its failure may be nobody's business any more: then it must not be reported as forgotten."""
    read: asyncio.Future[Any] = asyncio.ensure_future(call.read())
    read.add_done_callback(lambda done: done.cancelled() or done.exception())
    return read


async def _word(read: asyncio.Future[Any], event: str) -> pb.WriteResponse:
    """The receiver's next message. Raises Unavailable when it does not come in time, Internal when it is another."""
    done, _ = await asyncio.wait({read}, timeout=WORD_S)
    if not done:
        raise Unavailable(f"the receiver said nothing for {WORD_S:g} s where {event} was due")
    message = read.result()
    if not isinstance(message, pb.WriteResponse) or message.WhichOneof("event") != event:
        raise Internal(f"the receiver's message is not {event}")
    return message
