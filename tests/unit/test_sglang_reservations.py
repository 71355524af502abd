"""Reserved slots inside the scheduler, over SGLang's own tree and allocators; and what the agent adds to them."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang_parts import ENGINE_VARIABLE, EvictParams, MiniScheduler, RadixKey, _request, io_struct, m, slots_of
from sglang_parts import InsertParams as Insert

from kvmesh.v1.common_pb2 import SamplingParams

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(ENGINE_VARIABLE, f"{'0' * 32}:test")
    io_struct.hook_custom_types(*m.ALL)


@pytest.fixture
def s(request):
    made = MiniScheduler(**getattr(request, "param", {}))
    yield made
    made.close()


class Front:
    """The front's side of one scheduler."""

    def __init__(self, s: MiniScheduler) -> None:
        self.s, self.last = s, 0

    def ask(self, kind: Any, **fields: Any) -> str:
        self.last += 1
        rid = f"{self.last:016d}"
        self.s.receive(kind(rid=rid, **fields))
        return rid

    def reserve(self, ids: Sequence[int], end: int, wait: bool = False) -> Any:
        return self.s.answer(self.ask(m.MeshReserve, ids=array("q", ids).tobytes(), end=end, wait=wait))

    def publish(self, ticket: int, upto: int) -> str:
        return self.s.answer(self.ask(m.MeshPublish, ticket=ticket, upto=upto)).error

    def free(self, ticket: int) -> None:
        assert self.s.answer(self.ask(m.MeshFree, ticket=ticket)).error == ""

    def generate(self, ids: Sequence[int], ticket: int | None = None) -> str:
        self.last += 1
        rid = f"{self.last:016d}"
        request = _request(rid, ids, SamplingParams(), 4)
        if ticket is None:
            self.s.handle_generate_request(request)
        else:
            self.s.receive(m.MeshGenerate(rid=rid, ticket=ticket, request=request))
        return rid


def slots(reserved: Any) -> list[int]:
    return np.frombuffer(reserved.slots, np.int64).tolist()


def insert(s: MiniScheduler, ids: Sequence[int]) -> None:
    """A request that came and went."""
    front = Front(s)
    front.last = 10**6
    rid = front.generate([*ids, 0])
    s.until(lambda: rid not in [r.rid for r in s.waiting_queue] and s.chunked_req is None)


def room(s: MiniScheduler) -> tuple[int, int]:
    return s.token_to_kv_pool_allocator.available_size(), s.tree_cache.held


def balanced(s: MiniScheduler) -> bool:
    """SGLang's own idle check."""
    cache = s.tree_cache
    known = cache.evictable_size() + cache.protected_size() + cache.session_held_tokens()
    return s.token_to_kv_pool_allocator.available_size() + known == s.max_total_num_tokens


PAGES = pytest.mark.parametrize("s", [{"page": 1}, {"page": 16}], indirect=True, ids=["page 1", "page 16"])


@PAGES
def test_reserve_and_free(s):
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    assert (reserved.error, reserved.matched, len(slots(reserved))) == ("", 0, 96)
    assert room(s) == (256 - 96, 96) and balanced(s)
    # Not in anybody's way: the tree knows nothing of them.
    assert len(s.tree_cache.match(array("q", PROMPT), 96)[0]) == 0
    front.free(reserved.ticket)
    s.all_free()
    # Again, or never heard of: no error, no effect.
    front.free(reserved.ticket)
    front.free(99)
    s.all_free()


@PAGES
def test_what_is_cached_is_locked_and_not_reserved(s):
    insert(s, PROMPT[:48])
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    assert (reserved.matched, len(slots(reserved))) == (48, 48)
    s.tree_cache.evict(EvictParams(num_tokens=256))
    assert len(s.tree_cache.match(array("q", PROMPT), 96)[0]) == 48
    front.free(reserved.ticket)
    s.tree_cache.evict(EvictParams(num_tokens=256))
    s.all_free()
    assert s.token_to_kv_pool_allocator.available_size() == 256


@PAGES
def test_nothing_to_reserve(s):
    insert(s, PROMPT[:48])
    front = Front(s)
    for end in (0, 16, 48):
        reserved = front.reserve(PROMPT, end)
        assert (reserved.matched, slots(reserved)) == (end, [])
        assert front.publish(reserved.ticket, end) == ""
        front.free(reserved.ticket)
    s.all_free()


@PAGES
def test_published_slots_are_found_by_others(s):
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    assert front.publish(reserved.ticket, 32) == ""
    found, _ = s.tree_cache.match(array("q", PROMPT), 96)
    assert found.tolist() == slots(reserved)[:32] and room(s)[1] == 64 and balanced(s)
    # They stay for as long as the ticket does.
    s.tree_cache.evict(EvictParams(num_tokens=256))
    assert front.publish(reserved.ticket, 96) == ""
    found, _ = s.tree_cache.match(array("q", PROMPT), 96)
    assert found.tolist() == slots(reserved) and room(s)[1] == 0
    # A second time is no harm.
    assert front.publish(reserved.ticket, 96) == ""
    front.free(reserved.ticket)
    assert len(s.tree_cache.match(array("q", PROMPT), 96)[0]) == 96
    s.all_free()


@PAGES
def test_publishing_what_is_not_there(s):
    front = Front(s)
    reserved = front.reserve(PROMPT, 64)
    assert front.publish(reserved.ticket, 32) == ""
    for upto in (16, 0, 80):
        assert "is not there" in front.publish(reserved.ticket, upto)
    front.free(reserved.ticket)
    assert "is not there" in front.publish(reserved.ticket, 64)
    s.all_free()


@PAGES
@pytest.mark.parametrize("before", [0, 32, 64, 96])
def test_somebody_else_computed_the_same_meanwhile(s, before):
    """Ours are not needed then, and are free at once; whoever has them keeps his."""
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    assert front.publish(reserved.ticket, 16) == ""
    if before:
        insert(s, PROMPT[:before])
    theirs = s.tree_cache.match(array("q", PROMPT), 96)[0].tolist()
    assert front.publish(reserved.ticket, 64) == ""
    found = s.tree_cache.match(array("q", PROMPT), 96)[0].tolist()
    assert found[: len(theirs)] == theirs and len(found) == max(64, before) and balanced(s)
    assert room(s)[1] == 32
    assert front.publish(reserved.ticket, 96) == ""
    assert balanced(s) and room(s)[1] == 0
    front.free(reserved.ticket)
    s.all_free()


@PAGES
def test_two_tickets_for_one_prompt(s):
    front = Front(s)
    one, two = front.reserve(PROMPT, 96), front.reserve(PROMPT, 96)
    assert not set(slots(one)) & set(slots(two)) and room(s)[1] == 192
    for ticket, upto in ((one.ticket, 48), (two.ticket, 96), (one.ticket, 96)):
        assert front.publish(ticket, upto) == "" and balanced(s)
    assert room(s) == (256 - 96, 0)
    front.free(one.ticket)
    s.tree_cache.evict(EvictParams(num_tokens=256))
    # The other one still holds them.
    assert len(s.tree_cache.match(array("q", PROMPT), 96)[0]) == 96
    front.free(two.ticket)
    s.all_free()


# Room


@PAGES
def test_no_room(s):
    front = Front(s)
    first = front.reserve([1] * 240, 240)
    refused = front.reserve(PROMPT, 96)
    assert refused.error == "no room now: up to 96 slots needed, 16 free or cached" and refused.ticket == 0
    assert s.tree_cache.protected_size() == 0
    front.free(first.ticket)
    s.all_free()


@PAGES
def test_what_is_cached_gives_way_but_not_what_is_matched(s):
    insert(s, [7] * 96)
    insert(s, PROMPT[:48])
    front = Front(s)
    reserved = front.reserve([*PROMPT[:48], *[3] * 200], 240)
    assert (reserved.error, reserved.matched, len(slots(reserved))) == ("", 48, 192)
    assert len(s.tree_cache.match(array("q", [7] * 96), 96)[0]) < 96
    front.free(reserved.ticket)
    s.all_free()


@PAGES
def test_running_requests_keep_what_they_will_need(s):
    """Else one of them would be out of memory in the middle of its answer."""
    params = SimpleNamespace(max_new_tokens=200)
    s.running_batch.reqs = [SimpleNamespace(rid="x", sampling_params=params, output_ids=[], finished=lambda: False)]
    front = Front(s)
    assert "no room" in front.reserve([1] * 160, 160).error
    assert front.reserve([1] * 128, 128).error == ""
    s.running_batch.reqs = []
    front.free(1)
    s.all_free()


@PAGES
def test_a_prompt_in_chunks_keeps_what_it_will_need(s):
    """Its first chunks are in memory, the others not yet: were their room given away, SGLang would end."""
    front = Front(s)
    front.generate([3] * 160)
    for done in (32, 64, 96, 128):
        s.step()
        assert s.chunked_req is not None and s.chunked_req.filled == done
        assert "no room" in front.reserve(PROMPT, 96).error
        small = front.reserve(PROMPT, 48)
        assert small.error == ""
        front.free(small.ticket)
    s.step()
    assert s.chunked_req is None
    s.step()
    assert front.reserve(PROMPT, 96).error == ""
    front.free(5)
    s.all_free()


@PAGES
def test_a_prompt_in_chunks_keeps_the_cache_that_will_give_way_to_it(s):
    """What is cached may be locked only if that leaves enough to evict."""
    insert(s, PROMPT[:96])
    front = Front(s)
    front.generate([3] * 192)
    s.step()
    assert s.chunked_req is not None
    assert "no room" in front.reserve(PROMPT, 96).error and s.tree_cache.protected_size() < 96
    # A part of it, or nothing, is no harm.
    for end in (0, 16):
        reserved = front.reserve(PROMPT, end)
        assert reserved.error == ""
        front.free(reserved.ticket)
    s.until(lambda: s.chunked_req is None and not s.waiting_queue)
    s.step()
    s.all_free()


@PAGES
def test_a_prompt_that_was_just_prefilled_keeps_what_its_answer_will_need(s):
    """It is in no running batch yet."""
    front = Front(s)
    front.generate([3] * 16)
    plan = s.plan()
    plan.batch_to_run.reqs[0].sampling_params.max_new_tokens = 300
    s.agent.scheduled(plan)
    assert "no room" in front.reserve(PROMPT, 96).error
    s.run(plan.batch_to_run)
    s.process(plan.batch_to_run)
    assert front.reserve(PROMPT, 96).error == ""
    front.free(1)
    s.all_free()


@PAGES
def test_who_waits_is_served_in_order(s):
    front = Front(s)
    first = front.reserve([1] * 240, 240)
    big = front.ask(m.MeshReserve, ids=array("q", [2] * 160).tobytes(), end=160, wait=True)
    small = front.ask(m.MeshReserve, ids=array("q", [3] * 16).tobytes(), end=16, wait=True)
    s.step()
    # There is room for the small one, but the big one came first.
    assert [type(t).__name__ for t in s.told if getattr(t, "rid", None) in (big, small)] == []
    # Nor does anybody else go before them.
    assert "no room now" in front.reserve([4] * 16, 16).error
    front.free(first.ticket)
    assert len(slots(s.answer(big))) == 160 and len(slots(s.answer(small))) == 16
    front.free(2)
    front.free(3)
    s.all_free()


@PAGES
def test_who_waited_in_vain_makes_way(s):
    front = Front(s)
    first = front.reserve([1] * 160, 160)
    big = front.ask(m.MeshReserve, ids=array("q", [2] * 160).tobytes(), end=160, wait=True)
    small = front.ask(m.MeshReserve, ids=array("q", [3] * 16).tobytes(), end=16, wait=True)
    s.step()
    front.s.receive(m.MeshCancelReserve(rid=big))
    assert "no room within the time given" in s.answer(big).error
    # Without anything having become free.
    assert len(slots(s.answer(small))) == 16
    # One that has been answered, or was never there, cannot be cancelled.
    before = len(s.told)
    front.s.receive(m.MeshCancelReserve(rid=small))
    front.s.receive(m.MeshCancelReserve(rid="nobody"))
    assert len(s.told) == before
    front.free(first.ticket)
    front.free(2)
    s.all_free()


@PAGES
def test_who_waits_for_what_others_publish_is_served(s):
    """What is published is not free, but is needed no more."""
    front = Front(s)
    first = front.reserve(PROMPT[:96] + [1] * 64, 160)
    waiting = front.ask(m.MeshReserve, ids=array("q", PROMPT[:96] + [2] * 64).tobytes(), end=160, wait=True)
    s.step()
    assert front.publish(first.ticket, 96) == ""
    reserved = s.answer(waiting)
    assert (reserved.error, reserved.matched, len(slots(reserved))) == ("", 96, 64)
    for ticket in (first.ticket, reserved.ticket):
        front.free(ticket)
    s.all_free()


@PAGES
def test_memory_that_comes_free_is_told_to_the_scheduler(s):
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    for what in (lambda: front.publish(reserved.ticket, 16), lambda: front.free(reserved.ticket)):
        s.running_batch.batch_is_full = True
        what()
        assert s.running_batch.batch_is_full is False


# Generating from a ticket


@PAGES
@pytest.mark.parametrize("filled", [0, 48, 96])
def test_a_ticket_is_used_up_by_a_generation(s, filled):
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    if filled:
        assert front.publish(reserved.ticket, filled) == ""
    rid = front.generate(PROMPT, reserved.ticket)
    assert room(s)[1] == 0 and s.agent.busy == bool(1)
    # What was filled cannot go before the request has it.
    s.tree_cache.evict(EvictParams(num_tokens=256))
    assert len(s.tree_cache.match(array("q", PROMPT), 96)[0]) == filled
    s.until(lambda: not s.waiting_queue and s.chunked_req is None)
    began = [t for t in s.told if type(t) is m.MeshBegan]
    assert [t.rids for t in began] == [[rid]]
    s.step()
    assert not s.agent.busy
    assert front.publish(reserved.ticket, 96) != ""
    s.all_free()


@PAGES
def test_a_ticket_that_is_gone_is_no_matter_to_a_generation(s):
    front = Front(s)
    front.generate(PROMPT, 77)
    s.until(lambda: not s.waiting_queue and s.chunked_req is None)
    s.all_free()


def test_pins_of_those_behind_give_way_when_nothing_can_run(s):
    """Two waiting requests whose pinned prefixes leave no room for either: one must be able to run."""
    front = Front(s)
    ids = [[k] * 120 for k in (1, 2)]
    for one in ids:
        reserved = front.reserve(one, 112)
        assert reserved.error == "" and front.publish(reserved.ticket, 112) == ""
        front.generate([*one, *[9] * 60], reserved.ticket)
    assert s.tree_cache.protected_size() == 224
    s.until(lambda: not s.waiting_queue and s.chunked_req is None)
    s.step()
    assert not s.agent.busy
    s.all_free()


def test_a_request_that_is_aborted_while_it_waits_loses_its_pin(s):
    front = Front(s)
    reserved = front.reserve(PROMPT, 96)
    assert front.publish(reserved.ticket, 96) == ""
    rid = front.generate(PROMPT, reserved.ticket)
    assert s.tree_cache.protected_size() == 96
    s.abort_request(io_struct.AbortReq(rid=rid))
    s.step()
    assert not s.agent.busy
    s.all_free()


# Flush and load


@PAGES
def test_flush(s):
    front = Front(s)
    insert(s, PROMPT[:48])
    reserved = front.reserve(PROMPT, 64)
    assert "tickets are held" in s.answer(front.ask(m.MeshFlush)).error
    front.free(reserved.ticket)
    assert s.answer(front.ask(m.MeshFlush)).error == ""
    assert room(s) == (256, 0) and not slots_of(s.tree_cache)


@PAGES
def test_the_load_adds_up(s):
    front = Front(s)
    insert(s, PROMPT[:48])
    reserved = front.reserve(PROMPT, 96)
    front.ask(m.MeshReserve, ids=array("q", [2] * 256).tobytes(), end=256, wait=True)
    front.generate([5] * 80)
    loads = []
    for _ in range(6):
        s.agent._load._at = 0
        s.step()
        loads.append([t for t in s.told if type(t) is m.MeshLoad][-1])
    for load in loads:
        assert load.free + load.cached + load.in_use + load.reserved == 256
        assert load.reserved == 48 and load.waiting_reservations == 1
    assert {load.running for load in loads} == {0, 1}
    front.s.receive(m.MeshCancelReserve(rid=f"{2:016d}"))
    front.free(reserved.ticket)
    s.all_free()


def test_cache_changes_are_told_once_watched(s):
    front = Front(s)
    insert(s, [1] * 130)
    assert not [t for t in s.told if type(t) is m.MeshCacheChange]
    front.ask(m.MeshWatchCache)
    s.step()
    (change,) = [t for t in s.told if type(t) is m.MeshCacheChange]
    assert change.snapshot and len(change.stored) == 16 and not change.removed
    # Come and gone before it was told: gone is the last word.
    insert(s, [2] * 70)
    s.tree_cache.evict(EvictParams(num_tokens=256))
    s.step()
    changes = [t for t in s.told if type(t) is m.MeshCacheChange][1:]
    have: set[int] = set(np.frombuffer(change.stored, np.uint64).tolist())
    for one in changes:
        have |= set(np.frombuffer(one.stored, np.uint64).tolist())
        have -= set(np.frombuffer(one.removed, np.uint64).tolist())
        assert not one.snapshot
    assert have == set(s.tree_cache.blocks())


# Random walks


class Walk:
    """Random reservations, publications, generations and other people's requests, with all slots accounted for."""

    def __init__(self, s: MiniScheduler, seed: int) -> None:
        self.s, self.front, self.rng = s, Front(s), random.Random(seed)
        self.tickets: dict[int, tuple[list[int], int, int, list[int]]] = {}
        self.waiting: dict[str, tuple[list[int], int]] = {}
        self.done: Counter[str] = Counter()

    def prompt(self) -> list[int]:
        page = self.s.page_size
        parts = [[self.rng.randrange(3)] * page for _ in range(self.rng.randrange(1, 150 // page))]
        return [token for part in parts for token in part]

    def end(self, ids: list[int]) -> int:
        return self.rng.randrange(len(ids) // self.s.page_size + 1) * self.s.page_size

    def reserve(self) -> None:
        ids = self.prompt()
        end, wait = self.end(ids), self.rng.random() < 0.5
        rid = self.front.ask(m.MeshReserve, ids=array("q", ids).tobytes(), end=end, wait=wait)
        self.waiting[rid] = ids, end

    def hear(self) -> None:
        for told in self.s.told:
            if type(told) is m.MeshReserved and (asked := self.waiting.pop(told.rid, None)) is not None:
                self.done["refused" if told.error else "reserved"] += 1
                if not told.error:
                    assert len(slots(told)) == asked[1] - told.matched
                    self.tickets[told.ticket] = asked[0], asked[1], told.matched, slots(told)
        self.s.told.clear()

    def cancel(self) -> None:
        if self.waiting:
            self.s.receive(m.MeshCancelReserve(rid=self.rng.choice(list(self.waiting))))

    def publish(self) -> None:
        if self.tickets:
            ticket = self.rng.choice(list(self.tickets))
            ids, end, filled, rest = self.tickets[ticket]
            upto = self.rng.randrange(filled // self.s.page_size, end // self.s.page_size + 1) * self.s.page_size
            self.front.ask(m.MeshPublish, ticket=ticket, upto=upto)
            assert self.s.told[-1].error == ""
            self.tickets[ticket] = ids, end, upto, rest[upto - filled :]
            assert len(self.s.tree_cache.match(array("q", ids), upto)[0]) == upto

    def free(self) -> None:
        if self.tickets:
            ticket = self.rng.choice(list(self.tickets))
            del self.tickets[ticket]
            self.front.ask(m.MeshFree, ticket=ticket)

    def generate(self) -> None:
        ticket = self.rng.choice(list(self.tickets)) if self.tickets and self.rng.random() < 0.7 else None
        ids = self.prompt() if ticket is None else self.tickets.pop(ticket)[0]
        self.front.generate([*ids, 1], ticket)

    def other(self) -> None:
        """Somebody's KV goes into the tree behind the agent's back."""
        ids, alloc = self.prompt(), self.s.token_to_kv_pool_allocator
        if self.s.chunked_req is not None:
            return
        if (given := alloc.alloc(len(ids))) is None:
            return
        known = self.s.tree_cache.insert(Insert(key=RadixKey(array("q", ids), None), value=given)).prefix_len
        alloc.free(given[:known])

    def evict(self) -> None:
        self.s.tree_cache.evict(EvictParams(num_tokens=self.rng.randrange(100)))

    def turn(self) -> None:
        self.s.step()

    def check(self) -> None:
        self.hear()
        alloc, size = self.s.token_to_kv_pool_allocator, self.s.page_size
        pages = alloc.free_pages.tolist() + alloc.release_pages.tolist()
        free = [p * size + i for p in pages for i in range(size)]
        held = [slot for *_, rest in self.tickets.values() for slot in rest]
        counts = Counter(free + slots_of(self.s.tree_cache) + held)
        assert max(counts.values()) == 1, "a slot has two owners"
        assert 0 not in counts and self.s.tree_cache.held == len(held)
        running = self.s.max_total_num_tokens - sum(counts.values())
        assert running == 0 or self.s.chunked_req is not None, f"{running} slots are nobody's"

    def step(self) -> None:
        moves = [self.reserve, self.reserve, self.cancel, self.publish, self.publish, self.free, self.generate]
        move = self.rng.choice([*moves, self.other, self.evict, self.turn, self.turn, self.turn])
        move()
        self.done[move.__name__] += 1
        self.check()

    def finish(self) -> None:
        for rid in list(self.waiting):
            self.s.receive(m.MeshCancelReserve(rid=rid))
        self.check()
        for ticket in list(self.tickets):
            self.front.ask(m.MeshFree, ticket=ticket)
        self.tickets.clear()
        self.s.until(lambda: not self.s.waiting_queue and self.s.chunked_req is None)
        self.s.step()
        assert not self.s.agent.busy and not self.s.agent._reservations.waiting
        self.s.all_free()


@PAGES
@pytest.mark.parametrize("seed", range(5))
def test_random_walk(s, seed):
    walk = Walk(s, seed)
    for _ in range(200):
        walk.step()
    walk.finish()
    assert walk.done["reserved"] > 10 and walk.done["publish"] > 10 and walk.done["generate"] > 5


def test_the_checks_see_what_they_should(s):
    """A slot that is lost, and one that is free twice."""
    front = Front(s)
    reserved = front.reserve(PROMPT, 32)
    with pytest.raises(AssertionError):
        s.all_free()
    front.free(reserved.ticket)
    s.all_free()
    s.token_to_kv_pool_allocator.free(torch.tensor([5]))
    with pytest.raises(AssertionError):
        s.all_free()
