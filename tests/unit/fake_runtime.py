"""A FAKE runtime for tests of the engine service: no model, but real pools in shared memory and copies between them.

The KV of a token is a function of all tokens up to it, and an answer is a function of the KV found in the pool, so that
KV which did not arrive, or arrived in the wrong rows, gives other tokens. Every page of the pool has one owner; a page
that is lost, given back twice, or given back while a peer may be writing into it is a violation, which `check` raises.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvmesh.blocks import BLOCK_TOKENS, block_hashes
from kvmesh.dataplane.base import Pool
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.shm import ShmConnection, ShmTransport, create_pool
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Destination
from kvmesh.errors import Aborted, FailedPrecondition, MeshError, NotFound, ResourceExhausted, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.kv_pb2 import KvPool
from services.engine.base import Ending, Model, Output, Outputs, Piece, Reservation, Runtime, RuntimeLoad, SendReport

VOCAB, CONTEXT, EOS = 320, 2048, 257
TINY = Layout("0" * 32, "float32", layers=2, heads=2, k_dim=4, v_dim=6, page_size=1)


def chain(token_ids: Sequence[int], upto: int) -> list[int]:
    """One number a token of token_ids[:upto], 0 to 240, over all tokens up to it."""
    last, numbers = 0, []
    for token in token_ids[:upto]:
        last = (last * 31 + token + 7) % 241
        numbers.append(last)
    return numbers


def kv(layout: Layout, token_ids: Sequence[int], begin: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(K, V) of each layer for token_ids[begin:end), shape [end - begin, heads, dim]; whole numbers below 251."""
    first = torch.tensor(chain(token_ids, end)[begin:], dtype=torch.int64).view(-1, 1, 1)
    parts = []
    for layer in range(layout.layers):
        heads = 3 * layer + 5 * torch.arange(layout.heads).view(1, -1, 1)
        both = [(first + heads + torch.arange(dim)) % 251 for dim in (layout.k_dim, layout.v_dim)]
        parts.append((both[0], (both[1] + 127) % 251))
    dtype = getattr(torch, layout.dtype)
    return [(k.to(dtype), v.to(dtype)) for k, v in parts]


def next_token(numbers: Sequence[int]) -> int:
    """A printable ASCII byte that depends on the KV of all tokens before; `numbers` as in `chain`."""
    return 32 + (7 * numbers[-1] + sum(numbers)) % 95


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What every fake runtime generates after `prompt`."""
    seq = list(prompt)
    for _ in range(count):
        seq.append(next_token(chain(seq, len(seq))))
    return seq[len(prompt) :]


class Gate:
    """A place where a runtime waits for the test's word: closed until `open` is called."""

    def __init__(self) -> None:
        self._reached, self._opened = asyncio.Event(), asyncio.Event()
        # How often it was come to, and how often it lets pass before it closes.
        self.times = self.free = 0

    @property
    def stopped(self) -> bool:
        """Whether it was reached."""
        return self._reached.is_set()

    def open(self) -> None:
        self._opened.set()

    async def reached(self, timeout: float = 15.0) -> None:
        """Waits until somebody waits here."""
        async with asyncio.timeout(timeout):
            await self._reached.wait()

    async def wait(self) -> None:
        self.times += 1
        if self.times > self.free:
            self._reached.set()
            await self._opened.wait()


class Writes:
    """Rows that a peer may be writing into, of all pools of one test."""

    def __init__(self) -> None:
        self._rows: Counter[tuple[int, int, int]] = Counter()

    def begin(self, pool: KvPool, slots: Iterable[int]) -> None:
        self._rows.update((pool.process.pid, pool.fd, int(s)) for s in slots)

    def end(self, pool: KvPool, slots: Iterable[int]) -> None:
        self._rows.subtract((pool.process.pid, pool.fd, int(s)) for s in slots)

    def into(self, pool: KvPool, slots: Iterable[int]) -> list[int]:
        """Those of `slots` that may be written into."""
        return [s for s in slots if self._rows[(pool.process.pid, pool.fd, s)] > 0]


@dataclass(eq=False)
class Node:
    """One page of the prefix cache."""

    key: int
    page: int
    above: Node | None
    block: int | None
    locks: int = 0
    below: int = 0
    used: int = 0


@dataclass
class Held:
    """A reservation: [0:filled) is cached and locked, `pages` are those of [filled:end)."""

    token_ids: list[int]
    matched: int
    filled: int
    end: int
    pages: list[int]
    path: list[Node]


@dataclass
class Job:
    """A generation: `path` is locked, `pages` follow it."""

    rid: str
    path: list[Node]
    pages: list[int] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        assert self.task is not None
        self.task.cancel()


@dataclass
class Waiting:
    token_ids: list[int]
    end: int
    answer: asyncio.Future[Reservation] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FakeRuntime(Runtime):
    """`total_slots` slots in pages of `layout.page_size`, given out in random order; prefills `chunk` tokens a pass.

    A gate named after a point makes it wait there, a fault makes it fail there: "reserve", "publish" (before),
    "published" (after), "free", "send", "piece" (before each copy), "copied" (after all), "stopping" (a cancelled send,
    which goes on writing until then), "prefill" and "token" (before each) of a generation, "flush".
    """

    def __init__(
        self, total_slots: int = 512, layout: Layout = TINY, *, writes: Writes | None = None, chunk: int = 32
    ) -> None:
        self.layout, self.total_slots, self.chunk = layout, total_slots, chunk
        self.model = Model(VOCAB, CONTEXT, (EOS,))
        self.device, self.version = "cpu", "fake 1"
        self.writes = writes or Writes()
        self.gates: dict[str, Gate] = {}
        self.faults: dict[str, Exception] = {}
        # Ends every generation after so many tokens.
        self.ending: tuple[int, Ending] | None = None
        self.violations: list[str] = []
        self.freed: list[int] = []
        self.calls: Counter[str] = Counter()
        self.load = RuntimeLoad()
        self.on_load = lambda: None
        self.on_cache = lambda stored, removed, snapshot: None
        self.reservations: dict[int, Held] = {}
        self.generating: dict[str, Job] = {}
        self.sending = 0
        self._waiting: deque[Waiting] = deque()
        self._last = self._clock = 0
        self._cache: dict[int, Node] = {}
        self._watched = False
        self._stopped = False
        self._connections: dict[bytes, ShmConnection] = {}
        self._users: Counter[bytes] = Counter()
        self._forgotten: set[bytes] = set()
        self._dead: asyncio.Future[str] | None = None

    # Gates

    def gate(self, point: str, free: int = 0) -> Gate:
        """Closes `point`, which lets `free` pass before."""
        gate = self.gates[point] = Gate()
        gate.free = free
        return gate

    async def _at(self, point: str) -> None:
        self.calls[point] += 1
        if (gate := self.gates.get(point)) is not None:
            await gate.wait()
        self._fault(point)

    def _fault(self, point: str) -> None:
        if self._stopped:
            raise Unavailable("the engine is stopping")
        if (fault := self.faults.get(point)) is not None:
            raise fault

    # Life

    async def start(self) -> None:
        size = self.layout.page_size
        count = self.total_slots // size
        self.memory, pool = create_pool(self.layout, (count + 1) * size, "kvmesh-test")
        self.pool: Pool | None = pool
        self.transport: ShmTransport | None = ShmTransport(self.memory, pool)
        self.pools = {"shm": [self.transport.describe()]}
        self.writers = [ProcessRef.current()]
        pages = list(range(1, count + 1))
        random.Random(count).shuffle(pages)
        self._free: deque[int] = deque(pages)
        self._owner: dict[int, str] = dict.fromkeys(pages, "free")
        self._dead = asyncio.get_running_loop().create_future()
        self._changed()

    async def stop(self) -> None:
        if self._stopped or self._dead is None:
            return
        self._stopped = True
        for waiting in self._waiting:
            if not waiting.answer.done():
                waiting.answer.set_exception(Unavailable("the engine is stopping"))
        tasks = [job.task for job in self.generating.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._dead.cancel()
        self.pool = self.transport = None
        self.memory.close()

    async def died(self) -> str:
        assert self._dead is not None
        return await self._dead

    def die(self, why: str) -> None:
        """As if it had ended by itself."""
        assert self._dead is not None
        self._dead.set_result(why)

    # Accounts

    def _move(self, pages: Sequence[int], source: str, target: str) -> None:
        for page in pages:
            if self._owner.get(page) != source:
                self.violations.append(f"page {page} goes from {source} to {target}, but is of {self._owner.get(page)}")
            self._owner[page] = target
            if target == "free":
                self._free.append(page)
        if target in ("free", "cache") and (rows := self.writes.into(self.pools["shm"][0], self._rows(pages))):
            self.violations.append(f"rows {rows} of {source} become {target} while they are being written into")

    def _rows(self, pages: Sequence[int]) -> list[int]:
        size = self.layout.page_size
        return [page * size + i for page in pages for i in range(size)]

    def slots(self, pages: Sequence[int]) -> Slots:
        return np.asarray(self._rows(pages), np.int64)

    def _take(self, count: int, owner: str) -> list[int] | None:
        """`count` free pages, cached ones evicted as needed; None when there are not so many."""
        while len(self._free) < count:
            leaves = [n for n in self._cache.values() if not n.locks and not n.below]
            if not leaves:
                return None
            self._evict(min(leaves, key=lambda n: n.used))
        pages = [self._free.popleft() for _ in range(count)]
        self._move(pages, "free", owner)
        return pages

    def check(self) -> None:
        """Raises AssertionError for a violation, or accounts that do not add up."""
        assert not self.violations, self.violations
        pages = range(1, self.total_slots // self.layout.page_size + 1)
        assert sorted(self._owner) == list(pages)
        owned = Counter(self._owner.values())
        assert sorted(self._free) == [p for p in pages if self._owner[p] == "free"]
        assert sorted(n.page for n in self._cache.values()) == [p for p in pages if self._owner[p] == "cache"]
        for number, held in self.reservations.items():
            assert sorted(held.pages) == [p for p in pages if self._owner[p] == f"r{number}"]
        alive = {"free", "cache", *(f"r{n}" for n in self.reservations)}
        assert not self.idle or not set(owned) - alive, f"lost pages: {owned}"

    @property
    def idle(self) -> bool:
        """Nothing generates and nothing is sent."""
        return not self.generating and not self.sending

    def check_all_free(self) -> None:
        """Raises AssertionError unless every slot is free or cached, and no cached one is locked."""
        self.check()
        assert self.idle and not self._waiting, (self.generating, self.sending, self._waiting)
        assert not self.reservations, f"reservations are left: {sorted(self.reservations)}"
        locked = [n.page for n in self._cache.values() if n.locks]
        assert not locked, f"locks are left on pages {locked}"

    def _changed(self) -> None:
        size = self.layout.page_size
        owned = Counter(self._owner.values())
        locked = sum(1 for n in self._cache.values() if n.locks)
        reserved = sum(len(h.pages) for h in self.reservations.values())
        free, cached = owned["free"], owned["cache"] - locked
        total = self.total_slots // size
        self.load = RuntimeLoad(
            running=len(self.generating),
            waiting_reservations=len(self._waiting),
            sending=self.sending,
            free=free * size,
            cached=cached * size,
            in_use=(total - free - cached - reserved) * size,
            reserved=reserved * size,
        )
        self.on_load()

    # Prefix cache

    def _keys(self, token_ids: Sequence[int], upto: int) -> list[int]:
        size, last, keys = self.layout.page_size, 0, []
        for at in range(0, upto // size * size, size):
            last = hash((last, *token_ids[at : at + size]))
            keys.append(last)
        return keys

    def match(self, token_ids: Sequence[int], upto: int) -> list[Node]:
        """The cached pages of token_ids[:upto]."""
        path: list[Node] = []
        for key in self._keys(token_ids, upto):
            if (node := self._cache.get(key)) is None:
                break
            path.append(node)
        self._clock += 1
        for node in path:
            node.used = self._clock
        return path

    def _lock(self, path: Iterable[Node], by: int) -> None:
        for node in path:
            node.locks += by
            if node.locks < 0:
                self.violations.append(f"page {node.page} is unlocked too often")

    def _evict(self, node: Node) -> None:
        assert not node.locks and not node.below
        del self._cache[node.key]
        if node.above is not None:
            node.above.below -= 1
        self._move([node.page], "cache", "free")
        if self._watched and node.block is not None:
            self.on_cache([], [node.block], False)

    def _insert(self, token_ids: Sequence[int], path: list[Node], pages: list[int], owner: str) -> list[Node]:
        """Puts `pages`, which follow `path`, into the cache, or frees those that are there already; the whole path."""
        size = self.layout.page_size
        keys = self._keys(token_ids, (len(path) + len(pages)) * size)
        hashes = block_hashes(token_ids[: len(keys) * size])
        stored: list[int] = []
        path = list(path)
        for key, page in zip(keys[len(path) :], pages, strict=True):
            node = self._cache.get(key)
            if node is not None:
                self._move([page], owner, "free")
            else:
                upto = (len(path) + 1) * size
                block = None if upto % BLOCK_TOKENS else hashes[upto // BLOCK_TOKENS - 1]
                node = Node(key, page, path[-1] if path else None, block)
                if node.above is not None:
                    node.above.below += 1
                self._cache[key] = node
                self._move([page], owner, "cache")
                if block is not None:
                    stored.append(block)
            self._clock += 1
            node.used = self._clock
            path.append(node)
        if stored and self._watched:
            self.on_cache(stored, [], False)
        return path

    def compute(self, token_ids: Sequence[int], begin: int, end: int, rows: Sequence[int]) -> None:
        """Writes the KV of token_ids[begin:end) into our own pool."""
        assert self.pool is not None
        for i, (k, v) in enumerate(kv(self.layout, token_ids, begin, end)):
            self.pool.keys[i][list(rows)] = k
            self.pool.values[i][list(rows)] = v

    def holds(self, token_ids: Sequence[int], upto: int) -> bool:
        """Whether token_ids[:upto] is cached, and the pool's bytes are its KV."""
        path = self.match(token_ids, upto)
        if len(path) * self.layout.page_size < upto:
            return False
        return self.has(token_ids, 0, upto, self._rows([n.page for n in path])[:upto])

    def has(self, token_ids: Sequence[int], begin: int, end: int, rows: Sequence[int]) -> bool:
        """Whether `rows` of the pool are the KV of token_ids[begin:end)."""
        assert self.pool is not None
        return all(
            torch.equal(self.pool.keys[i][list(rows)], k) and torch.equal(self.pool.values[i][list(rows)], v)
            for i, (k, v) in enumerate(kv(self.layout, token_ids, begin, end))
        )

    def read(self, rows: Sequence[int]) -> list[int]:
        """What `chain` gave for the tokens whose KV is in `rows`."""
        assert self.pool is not None
        return [int(n) for n in self.pool.keys[0][list(rows), 0, 0].tolist()]

    # Reservations

    async def reserve(self, token_ids: Sequence[int], end: int, wait: float) -> Reservation:
        assert end % self.layout.page_size == 0
        await self._at("reserve")
        waiting = Waiting(list(token_ids), end)
        self._waiting.append(waiting)
        self._retry()
        try:
            if not waiting.answer.done():
                await asyncio.wait([waiting.answer], timeout=max(0.0, wait))
            if not waiting.answer.done():
                raise ResourceExhausted(f"no room for up to {end} slots within the time given")
            return waiting.answer.result()
        except asyncio.CancelledError:
            if waiting.answer.done():
                self._release(waiting.answer.result().id)
            raise
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._retry()
            self._changed()

    def _retry(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            path = self.match(first.token_ids, first.end)
            self._lock(path, +1)
            self._last += 1
            need = first.end // self.layout.page_size - len(path)
            pages = self._take(need, f"r{self._last}")
            if pages is None:
                self._lock(path, -1)
                break
            matched = len(path) * self.layout.page_size
            self.reservations[self._last] = Held(first.token_ids, matched, matched, first.end, pages, path)
            self._waiting.popleft()
            first.answer.set_result(Reservation(self._last, matched, self.slots(pages)))
        self._changed()

    async def publish(self, reservation: int, upto: int) -> None:
        await self._at("publish")
        held = self.reservations.get(reservation)
        if held is None or not held.filled <= upto <= held.end or upto % self.layout.page_size:
            raise NotFound(f"reservation {reservation} is not there")
        count = (upto - held.filled) // self.layout.page_size
        arrived, held.pages = held.pages[:count], held.pages[count:]
        path = self._insert(held.token_ids, held.path, arrived, f"r{reservation}")
        self._lock(path[len(held.path) :], +1)
        held.path, held.filled = path, upto
        self._changed()
        await self._at("published")

    async def free(self, reservation: int) -> None:
        await self._at("free")
        self.freed.append(reservation)
        if reservation not in self.reservations:
            self.violations.append(f"reservation {reservation} was given back twice")
            return
        self._release(reservation)

    def _release(self, reservation: int) -> list[Node]:
        held = self.reservations.pop(reservation)
        self._move(held.pages, f"r{reservation}", "free")
        self._lock(held.path, -1)
        self._retry()
        return held.path

    # Generation

    def generate(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        max_new: int,
        reservation: int | None,
        generated: int = 0,
    ) -> Outputs:
        self._fault("generate")
        self.calls["generate"] += 1
        if reservation is None:
            path = self.match(token_ids, len(token_ids) - 1)
            self._lock(path, +1)
        else:
            path = self.reservations[reservation].path
            self._lock(path, +1)
            self._release(reservation)
        self._last += 1
        job = Job(f"g{self._last}", path)
        outputs = Outputs(job.cancel)
        job.task = asyncio.get_running_loop().create_task(
            self._run(job, list(token_ids), sampling, max_new, outputs), name=job.rid
        )
        self.generating[job.rid] = job
        # Also of one that is cancelled before it begins.
        job.task.add_done_callback(lambda _: self._ended(job, outputs))
        self._changed()
        return outputs

    def _ended(self, job: Job, outputs: Outputs) -> None:
        del self.generating[job.rid]
        self._move(job.pages, job.rid, "free")
        self._lock(job.path, -1)
        if self._stopped:
            outputs.put(Output(ending=Ending("failed", message="the engine is stopping")))
        else:
            self._retry()

    async def _run(self, job: Job, seq: list[int], sampling: SamplingParams, max_new: int, outputs: Outputs) -> None:
        try:
            ending = await self._tokens(job, seq, sampling, max_new, outputs)
        except Exception as error:
            ending = Ending("failed", message=str(error))
        outputs.put(Output(ending=ending))

    async def _tokens(
        self, job: Job, seq: list[int], sampling: SamplingParams, max_new: int, outputs: Outputs
    ) -> Ending:
        size = self.layout.page_size
        done = len(job.path) * size
        rows = self._rows([n.page for n in job.path])
        await self._at("prefill")
        outputs.began_ns, outputs.cached_tokens = time.monotonic_ns(), done
        ending: Ending | None = None
        for i in range(max_new + 1):
            taken = self._take(-(-len(seq) // size) - len(job.path) - len(job.pages), job.rid)
            if taken is None:
                raise MeshError("Out of memory: the prompt has no room")
            job.pages += taken
            rows += self._rows(taken)
            self.compute(seq, done, len(seq), rows[done : len(seq)])
            done = len(seq)
            self._changed()
            if self.ending is not None and i == self.ending[0]:
                ending = self.ending[1]
            if ending is not None or i == max_new:
                break
            await self._at("token")
            token = next_token(self.read(rows[: len(seq)]))
            seq.append(token)
            outputs.put(Output([token], [-0.5 * (i + 1)] if sampling.logprobs else ()))
            if token in sampling.stop_token_ids:
                ending = Ending("stop", token)
        whole = done // size - len(job.path)
        pages, job.pages = job.pages[:whole], job.pages[whole:]
        self._insert(seq[:done], job.path, pages, job.rid)
        return ending or Ending("length")

    # Sending

    async def send(self, token_ids: Sequence[int], begin: int, end: int, to: Destination) -> SendReport:
        assert to.transport == "shm" and len(to.pools) == 1 and len(to.slots) == end - begin
        (peer,), slots = to.pools, to.slots
        self.sending += 1
        self._last += 1
        owner = f"s{self._last}"
        key = peer.SerializeToString(deterministic=True)
        self.writes.begin(peer, slots)
        self._users[key] += 1
        path = self.match(token_ids, end)
        self._lock(path, +1)
        self._changed()
        try:
            await self._at("send")
            return await self._send(token_ids, begin, end, path, owner, key, slots)
        except asyncio.CancelledError:
            if (gate := self.gates.get("stopping")) is not None:
                await gate.wait()
                # Until now a copy was under way.
                self._scribble(key, slots)
            raise
        finally:
            self.sending -= 1
            self._lock(path, -1)
            self.writes.end(peer, slots)
            self._users[key] -= 1
            if key in self._forgotten:
                self._close(key)
            if not self._stopped:
                self._retry()

    async def _send(
        self, token_ids: Sequence[int], begin: int, end: int, path: list[Node], owner: str, key: bytes, slots: Slots
    ) -> SendReport:
        size = self.layout.page_size
        cached = len(path) * size
        report = SendReport(cached, end - cached, time.monotonic_ns(), 0)
        sent = begin
        locked: list[Node] = []
        try:
            for upto in [*range(min(end, max(cached, self.chunk)), end, self.chunk), end]:
                have = len(path) * size
                if upto > have:
                    pages = self._take((upto - have) // size, owner)
                    if pages is None:
                        raise Aborted("the send was ended: no room")
                    self.compute(token_ids, have, upto, self._rows(pages))
                    whole = self._insert(token_ids, path, pages, owner)
                    self._lock(whole[len(path) :], +1)
                    locked += whole[len(path) :]
                    path = whole
                if upto == end:
                    report.prefilled_ns = time.monotonic_ns()
                if upto > sent:
                    await self._at("piece")
                    began = time.monotonic_ns()
                    rows = np.asarray(self._rows([n.page for n in path])[sent:upto], np.int64)
                    count = self._connection(key).write(rows, slots[sent - begin : upto - begin])
                    report.pieces.append(Piece(began, time.monotonic_ns(), upto - sent, count))
                    sent = upto
            await self._at("copied")
            return report
        finally:
            self._lock(locked, -1)

    def _connection(self, key: bytes) -> ShmConnection:
        assert self.transport is not None
        if key not in self._connections:
            self._connections[key] = self.transport.connect(KvPool.FromString(key))
        return self._connections[key]

    def _scribble(self, key: bytes, slots: Slots) -> None:
        """Copies our padding into the peer's slots."""
        size = self.layout.page_size
        self._connection(key).write(np.arange(len(slots), dtype=np.int64) % size, slots)

    def forget(self, peers: Sequence[KvPool]) -> None:
        self.calls["forget"] += 1
        for peer in peers:
            key = peer.SerializeToString(deterministic=True)
            self._forgotten.add(key)
            self._close(key)

    def _close(self, key: bytes) -> None:
        if not self._users[key]:
            self._forgotten.discard(key)
            if (connection := self._connections.pop(key, None)) is not None:
                connection.close()

    @property
    def connections(self) -> int:
        """Pools of peers that are mapped."""
        return len(self._connections)

    # Cache

    async def flush(self) -> None:
        await self._at("flush")
        if self.reservations or not self.idle:
            raise FailedPrecondition("the cache is not emptied: requests run, or tickets are held")
        for node in sorted(self._cache.values(), key=lambda n: -n.used):
            self._drop(node)
        if self._watched:
            self.on_cache([], [], True)
        self._changed()

    def _drop(self, node: Node) -> None:
        del self._cache[node.key]
        self._move([node.page], "cache", "free")

    def watch_cache(self) -> None:
        self.calls["watch_cache"] += 1
        self._watched = True
        self.on_cache(self.blocks(), [], True)

    def blocks(self) -> list[int]:
        """Of all that is cached."""
        return [n.block for n in self._cache.values() if n.block is not None]


def until_changed(runtime: FakeRuntime, predicate: Callable[[], bool]) -> Coroutine[Any, Any, None]:
    """Waits until `predicate` holds; it is looked at after each change of the runtime's load."""

    async def wait() -> None:
        changed, before = asyncio.Event(), runtime.on_load

        def on_load() -> None:
            before()
            changed.set()

        runtime.on_load = on_load
        try:
            async with asyncio.timeout(15):
                while not predicate():
                    changed.clear()
                    await changed.wait()
        finally:
            runtime.on_load = before

    return wait()
