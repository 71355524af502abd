"""SGLang's pool in shared memory, and the allocator of pages without Triton."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang_parts import ENGINE_VARIABLE, allocator, layout_of, pool

from kvmesh.dataplane.layout import Layout

DIGEST = "d" * 32


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(ENGINE_VARIABLE, f"{DIGEST}:test")


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pool_is_what_peers_see(page, dtype):
    made = pool(64, page, getattr(torch, dtype))
    layout = layout_of(made)
    assert layout == Layout(DIGEST, dtype, layers=2, heads=2, k_dim=4, v_dim=6, page_size=page)
    # One page of padding in front.
    assert made.shared.rows == 64 + page
    assert made.memory.size == sum(layout.part_bytes(64 + page))
    for i in range(2):
        assert made.k_buffer[i].shape == (64 + page, 2, 4) and made.v_buffer[i].shape == (64 + page, 2, 6)
        assert made.k_buffer[i].data_ptr() == made.shared.keys[i].data_ptr()
        assert not made.k_buffer[i].any() and not made.v_buffer[i].any()
    # What SGLang stores is in the memory that peers map.
    layer = SimpleNamespace(layer_id=1)
    k, v = torch.full((2, 2, 4), 3.0), torch.full((2, 2, 6), 5.0)
    made.set_kv_buffer(layer, torch.tensor([7, 9]), k.to(made.dtype), v.to(made.dtype))
    keys, values = made.memory.tensors(layout, 64 + page)
    assert keys[1][7].eq(3).all() and values[1][9].eq(5).all() and not keys[1][8].any() and not keys[0].any()
    made.memory.close()


def test_kv_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="not of SimpleNamespace"):
        layout_of(SimpleNamespace())


# Pages


class Sequence:
    """A request that holds slots."""

    def __init__(self) -> None:
        self.slots: list[int] = []


def pages_of(slots: list[int], size: int) -> set[int]:
    return {s // size for s in slots}


def right(sequence: Sequence, size: int) -> None:
    """Its slots are whole pages in order, each page from its beginning."""
    for i, slot in enumerate(sequence.slots):
        assert slot % size == i % size
        if i % size:
            assert slot == sequence.slots[i - 1] + 1
    assert len({*sequence.slots}) == len(sequence.slots)


def extend(alloc, sequences: list[Sequence], counts: list[int]) -> bool:
    prefix = torch.tensor([len(s.slots) for s in sequences])
    whole = prefix + torch.tensor(counts)
    last = torch.tensor([s.slots[-1] if s.slots else -1 for s in sequences])
    out = alloc.alloc_extend(prefix, prefix, whole, whole, last, sum(counts))
    if out is None:
        return False
    at = 0
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.slots += out[at : at + count].tolist()
        at += count
    return True


def decode(alloc, sequences: list[Sequence]) -> bool:
    lens = torch.tensor([len(s.slots) + 1 for s in sequences])
    last = torch.tensor([s.slots[-1] for s in sequences])
    out = alloc.alloc_decode(lens, lens, last)
    if out is None:
        return False
    for sequence, slot in zip(sequences, out.tolist(), strict=True):
        sequence.slots.append(slot)
    return True


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("seed", range(4))
def test_pages_are_given_out_once(size, seed):
    """Random requests come, grow and go; at the end everything is free."""
    rng, total = random.Random(seed), 40 * size
    alloc = allocator(total, size)
    alive: list[Sequence] = []
    refused = 0
    for _ in range(150):
        what = rng.random()
        if what < 0.4:
            some = [Sequence() for _ in range(rng.randrange(1, 3))]
            counts = [rng.randrange(1, 3 * size) for _ in some]
            before = alloc.available_size()
            if extend(alloc, some, counts):
                alive += some
            else:
                refused += 1
                assert sum(-(-c // size) for c in counts) * size > before == alloc.available_size()
        elif what < 0.55 and alive:
            one = rng.choice(alive)
            extend(alloc, [one], [rng.randrange(1, 2 * size)])
        elif what < 0.85 and alive:
            some = rng.sample(alive, rng.randrange(1, len(alive) + 1))
            decode(alloc, some)
        elif alive:
            one = alive.pop(rng.randrange(len(alive)))
            alloc.free(torch.tensor(one.slots))
        used: set[int] = set()
        for sequence in alive:
            right(sequence, size)
            pages = pages_of(sequence.slots, size)
            assert not pages & used and 0 not in pages and max(pages) <= 40
            used |= pages
        assert alloc.available_size() == total - len(used) * size
    for sequence in alive:
        alloc.free(torch.tensor(sequence.slots))
    assert refused and alloc.available_size() == total
    assert sorted(alloc.free_pages.tolist() + alloc.release_pages.tolist()) == list(range(1, 41))


def test_too_many_pages_are_refused_and_nothing_is_taken():
    alloc = allocator(64, 16)
    one = Sequence()
    assert extend(alloc, [one], [60])
    assert not extend(alloc, [Sequence()], [1])
    assert extend(alloc, [one], [4]) and len(one.slots) == 64
    assert not decode(alloc, [one]) and alloc.available_size() == 0
    alloc.free(torch.tensor(one.slots))
    assert alloc.available_size() == 64
    assert array("q", alloc.alloc(64).tolist())
