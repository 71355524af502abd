"""SGLang's radix tree as kvmesh's prefix cache: locks, reserved slots, and what comes and goes."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang_parts import EvictParams, InsertParams, MeshRadixCache, RadixKey, allocator, factory, slots_of, tree

from kvmesh.blocks import BLOCK_TOKENS, block_hashes


class Blocks:
    """Somebody who keeps up with the cache by what it tells."""

    def __init__(self, cache: MeshRadixCache) -> None:
        self.cache, self.have, self.calls = cache, set(cache.blocks()), 0
        cache.on_change = self.changed

    def changed(self, stored: list[int], removed: list[int], cleared: bool) -> None:
        self.calls += 1
        if cleared:
            self.have.clear()
        self.have |= set(stored)
        self.have -= set(removed)


def insert(cache: MeshRadixCache, ids: list[int]) -> None:
    """As a request that has ended: slots for all of it, those of what was there already are given back."""
    alloc = cache.token_to_kv_pool_allocator
    if (short := len(ids) - alloc.available_size()) > 0:
        cache.evict(EvictParams(num_tokens=short))
    slots = alloc.alloc(len(ids))
    key = array("q", ids)
    known = cache.insert(InsertParams(key=RadixKey(key, None), value=slots)).prefix_len
    alloc.free(slots[:known])


@pytest.fixture(params=[1, 16])
def cache(request) -> MeshRadixCache:
    return tree(allocator(1024, request.param))


def test_the_longest_prefix_is_found_and_not_more_than_asked_for(cache):
    ids = list(range(96))
    insert(cache, ids)
    for end, found in ((96, 96), (48, 48), (0, 0), (50, 50 if cache.page_size == 1 else 48)):
        slots, node = cache.match(array("q", ids), end)
        assert len(slots) == found
        assert (node is cache.root_node) == (found == 0)
    slots, _ = cache.match(array("q", [*ids[:32], 999, *ids[33:]]), 96)
    assert len(slots) == 32


def test_what_is_locked_is_not_evicted(cache):
    insert(cache, list(range(64)))
    _, node = cache.match(array("q", range(64)), 32)
    cache.lock(node)
    cache.evict(EvictParams(num_tokens=1024))
    assert len(cache.match(array("q", range(64)), 64)[0]) == 32
    assert (cache.protected_size(), cache.evictable_size()) == (32, 0)
    cache.unlock(node)
    cache.evict(EvictParams(num_tokens=1024))
    assert cache.token_to_kv_pool_allocator.available_size() == 1024 and not slots_of(cache)


def test_the_root_can_be_locked(cache):
    _, node = cache.match(array("q", [1, 2, 3]), 3)
    cache.lock(node)
    cache.unlock(node)
    assert node is cache.root_node and cache.protected_size() == 0


def test_reserved_slots_are_told_to_the_leak_check(cache):
    assert cache.session_held_tokens() == 0
    cache.held = 48
    assert cache.session_held_tokens() == 48 and cache.session_held_tokens(set()) == 48
    cache.held = 0


def test_blocks_come_with_what_is_inserted(cache):
    blocks = Blocks(cache)
    ids = list(range(200))
    insert(cache, ids)
    assert blocks.have == set(block_hashes(ids[: 200 // cache.page_size * cache.page_size])) and len(blocks.have) == 3
    # Nothing new: nothing is told.
    calls = blocks.calls
    insert(cache, ids)
    insert(cache, ids[:100])
    assert blocks.calls == calls
    longer = [*ids[:160], *range(500, 600)]
    insert(cache, longer)
    assert blocks.have == set(block_hashes(ids)) | set(block_hashes(longer))


def test_requests_with_a_salt_are_nobodys_business(cache):
    blocks = Blocks(cache)
    slots = cache.token_to_kv_pool_allocator.alloc(128)
    cache.insert(InsertParams(key=RadixKey(array("q", range(128)), "salt"), value=slots))
    assert blocks.calls == 0 and not cache.blocks() and cache.hottest(5) == []
    cache.evict(EvictParams(num_tokens=128))
    assert blocks.calls == 0


def test_a_flush_forgets_everything(cache):
    blocks = Blocks(cache)
    insert(cache, list(range(128)))
    cache.reset()
    assert blocks.have == set() and cache.blocks() == []


@pytest.mark.parametrize("seed", range(5))
def test_who_keeps_up_has_what_is_in_the_tree(cache, seed):
    """Random prompts with shared prefixes, splits, evictions: what was told is always what is there."""
    rng, page = random.Random(seed), cache.page_size
    blocks = Blocks(cache)
    trunks = [[rng.randrange(1000) for _ in range(300)] for _ in range(3)]
    for _ in range(60):
        trunk = rng.choice(trunks)
        ids = [*trunk[: rng.randrange(300)], *(rng.randrange(1000) for _ in range(rng.randrange(150)))]
        ids = ids[: len(ids) // page * page]
        what = rng.random()
        if what < 0.7 and ids:
            insert(cache, ids)
        elif what < 0.85:
            cache.evict(EvictParams(num_tokens=rng.randrange(300)))
        else:
            cache.match(array("q", ids), rng.randrange(len(ids) + 1))
        assert blocks.have == set(cache.blocks())
    assert len(slots_of(cache)) + cache.token_to_kv_pool_allocator.available_size() == 1024


def test_blocks_end_inside_nodes_whatever_the_splits():
    cache = tree(allocator(1024))
    ids = list(range(300))
    insert(cache, ids)
    whole = set(cache.blocks())
    for end in (1, 63, 64, 65, 127, 129, 200, 256, 299):
        cache.match(array("q", ids), end)
        assert set(cache.blocks()) == whole and len(cache.blocks()) == 300 // BLOCK_TOKENS
    # Leaf by leaf.
    blocks = Blocks(cache)
    for left in (299, 256, 200, 129, 127, 65, 64, 63, 1):
        cache.evict(EvictParams(num_tokens=1))
        assert blocks.have == set(block_hashes(ids[:left]))


def test_the_hottest_contexts(cache):
    first, second = list(range(64)), [*range(32), *range(500, 564)]
    insert(cache, first)
    insert(cache, second)
    insert(cache, list(range(900, 932)))
    assert [ids for ids, _ in cache.hottest(10)] == [list(range(900, 932)), second, first]
    cache.match(array("q", first), 64)
    found = cache.hottest(2)
    assert [ids for ids, _ in found] == [first, list(range(900, 932))]
    assert found[0][1] > found[1][1]


@pytest.mark.parametrize(
    "fault", ["is_hybrid_swa", "is_hybrid_ssm", "enable_hierarchical_cache", "disable_radix_cache"]
)
def test_models_that_are_not_served(fault):
    good = dict.fromkeys(("is_hybrid_swa", "is_hybrid_ssm", "enable_hierarchical_cache", "disable_radix_cache"), False)
    with pytest.raises(ValueError, match="plain attention"):
        factory(SimpleNamespace(**{**good, fault: True}, params=None))
    params = SimpleNamespace(
        disable=False,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=allocator(16),
        page_size=1,
        is_eagle=False,
        disable_finished_insert=False,
        eviction_policy="lru",
        enable_kv_cache_events=False,
        enable_metrics=False,
    )
    made = factory(SimpleNamespace(**good, params=params))
    assert isinstance(made, MeshRadixCache) and made.held == 0


def test_values_are_not_shared_with_who_inserted_them(cache):
    slots = cache.token_to_kv_pool_allocator.alloc(32)
    cache.insert(InsertParams(key=RadixKey(array("q", range(32)), None), value=slots))
    before = slots.clone()
    slots.zero_()
    assert torch.equal(cache.match(array("q", range(32)), 32)[0], before)
