"""The simulated engine's parts: content, tree, links, profiles, faults."""

import asyncio
import random
import time

import numpy as np
import pytest
from sim_harness import profile_of

from kvmesh.blocks import block_hashes
from kvmesh.errors import InvalidArgument
from kvmesh.sim.links import Link
from kvmesh.sim.profile import load_profile, shipped
from services.engine.sim.content import FIRST, Arithmetic, next_token
from services.engine.sim.faults import Faults
from services.engine.sim.kv import KvCache

MATH = Arithmetic(1000)


def ids_of(seed, n):
    return np.random.default_rng(seed).integers(0, 300, n).astype(np.uint32)


def test_content_is_the_same_however_it_is_cut():
    ids = ids_of(1, 700)
    whole = MATH.prefill(ids, FIRST)
    parts, before = [], FIRST
    for cut in np.split(ids, [1, 64, 65, 300]):
        parts.append(MATH.prefill(cut, before))
        before = int(parts[-1][-1])
    assert np.array_equal(whole, np.concatenate(parts))
    digest, value = MATH.digest(whole[:500]), int(whole[499])
    last = next_token(digest, 300)
    digest, value, tokens, written = MATH.decode(digest, value, last, 500, [0] * 200, 300, frozenset())
    answered = MATH.prefill(np.array([*ids[:500], last, *tokens[:-1]], np.uint32), FIRST)
    assert written == answered[500:].tolist() and value == written[-1]
    assert digest == MATH.digest(answered) and tokens[-1] == next_token(digest, 300)
    # It ends where a stop token comes, and where it goes on it goes on alike.
    at = tokens.index(tokens[50])
    first = MATH.decode(MATH.digest(whole[:500]), int(whole[499]), last, 500, [0] * 200, 300, {tokens[50]})
    assert first[2] == tokens[: at + 1] and first[3] == written[: at + 1]
    rest = MATH.decode(first[0], first[1], tokens[at], 501 + at, [0] * (199 - at), 300, frozenset())
    assert rest[2] == tokens[at + 1 :] and rest[0] == digest


def test_any_other_token_or_kv_gives_another_digest():
    ids = ids_of(2, 200)
    values = MATH.prefill(ids, FIRST)
    digests = {MATH.digest(values)}
    for at in (0, 1, 100, 199):
        wrong = ids.copy()
        wrong[at] += 1
        digests.add(MATH.digest(MATH.prefill(wrong, FIRST)))
        missing = values.copy()
        missing[at] = 7
        digests.add(MATH.digest(missing))
    assert len(digests) == 9
    tokens = [next_token(MATH.digest(MATH.prefill(ids_of(s, 50), FIRST)), 16) for s in range(400)]
    assert len(set(tokens)) == 16


def put(cache, ids):
    node, there = cache.match(ids)
    cache.lock(node)
    slots = cache.alloc(len(ids) - len(there))
    assert slots is not None
    leaf, known = cache.insert(ids, np.concatenate((there, slots)))
    assert known == len(there)
    cache.unlock(node)
    return leaf


def test_tree_shares_prefixes_and_evicts_the_least_recently_used():
    cache = KvCache(100)
    a, b = ids_of(3, 40), ids_of(4, 30)
    put(cache, a)
    put(cache, np.concatenate((a[:20], b)))
    assert (cache.free, cache.cached) == (30, 70)
    _, there = cache.match(a)
    assert len(there) == 40 and len(set(there.tolist())) == 40
    node, _ = cache.match(a)
    cache.lock(node)
    slots = cache.alloc(60)
    assert slots is not None and cache.cached == 0 and cache.locked == 40
    assert len(cache.match(np.concatenate((a[:20], b)))[1]) == 20
    assert cache.alloc(1) is None
    cache.unlock(node)
    cache.release(slots)
    assert cache.flush() and cache.free == 100


def test_tree_against_a_plain_model():
    """Random prompts over a small alphabet: the tree finds what it kept, and no slot is handed out twice."""
    rng, cache = random.Random(5), KvCache(400)
    stored = set()

    def change(new, old):
        assert stored.isdisjoint(new) and stored.issuperset(old)
        stored.update(new)
        stored.difference_update(old)

    cache.watch(change)
    for _ in range(300):
        ids = np.array([rng.randrange(2) for _ in range(3)] + [1] * rng.randrange(1, 130), np.uint32)
        node = put(cache, ids)
        found, there = cache.match(ids)
        assert len(there) == len(ids) == found.end == node.end
        cache.values[there] = MATH.prefill(ids, FIRST)
        if rng.random() < 0.3:
            cache.lock(found)
            got = cache.alloc(rng.randrange(1, cache.room + 1)) if cache.room else None
            assert np.array_equal(cache.values[cache.match(ids)[1]], MATH.prefill(ids, FIRST))
            if got is not None:
                assert not set(got.tolist()) & set(there.tolist())
                cache.release(got)
            cache.unlock(found)
        assert cache.free + cache.cached == cache.total and not cache.locked
    last = cache.watch(change)
    assert set(last) == stored and len(last) == len(set(last))
    assert set(block_hashes(ids.tolist())) <= stored
    assert cache.flush() and not stored


async def test_transfers_share_a_link():
    loop = asyncio.get_running_loop()
    link = Link(1e6, loop.time)
    began, ends = loop.time(), {}

    async def carry(name, size):
        await link.carry(size)
        ends[name] = loop.time() - began

    lost = asyncio.create_task(carry("lost", 1e9))
    await asyncio.gather(carry("short", 20_000), carry("long", 60_000), asyncio.sleep(0))
    # 3 share until the short one has 20 kB: 60 ms; then 2 until the long one has 60 kB: 80 ms more.
    assert 0.055 < ends["short"] < 0.09 and 0.13 < ends["long"] < 0.18
    lost.cancel()
    await asyncio.gather(lost, return_exceptions=True)
    assert not link.busy
    t = time.monotonic()
    await link.carry(10_000)
    assert time.monotonic() - t < 0.05


def test_profiles_are_read_written_and_checked():
    assert {"tiny-cpu", "llama-3.1-70b-fp8-tp4-h100"} <= set(shipped())
    for name in shipped():
        profile = load_profile(name)
        assert profile_of(profile.dump()) == profile
    text = load_profile("tiny-cpu").dump()
    for old, new, said in (
        ("vocab_size = 384", "vocab_size = 0", "model.vocab_size = 0"),
        ("jitter = 0.0", "jitter = -1.0", "jitter = -1.0"),
        ("mixed = false", "mixd = false", "no entry 'mixd'"),
        ("layers = 2", "layers = 'two'", "layers = 'two' is not of type int"),
        ("layers = 2\n", "", "missing: layers"),
        ('dtype = "float32"', 'dtype = "fp4"', "model.dtype = 'fp4'"),
    ):
        assert old in text
        with pytest.raises(InvalidArgument, match=said):
            profile_of(text.replace(old, new))
    with pytest.raises(InvalidArgument, match="is no file"):
        load_profile("nothing")
    llama = load_profile("llama-3.1-70b-fp8-tp4-h100")
    assert llama.bytes_per_token == 80 * 8 * 128 * 2 * 2
    assert llama.layout.fingerprint != load_profile("tiny-cpu").layout.fingerprint


def test_prefill_is_quadratic_and_decode_affine():
    p = load_profile("llama-3.1-70b-fp8-tp4-h100")
    one = p.prefill_seconds([(0, 6000)])
    two = p.prefill_seconds([(0, 2000)]) + p.prefill_seconds([(2000, 6000)])
    assert two == pytest.approx(one + p.prefill.base)
    assert p.prefill_seconds([(0, 12000)]) > 2 * one - p.prefill.base
    assert p.decode_seconds(8, 1000) - p.decode_seconds(4, 1000) == pytest.approx(4 * p.decode.per_request)


def test_faults_are_parsed_and_counted():
    faults = Faults.parse("slow=2, hang=true,drop_transfers=1")
    assert (faults.slow, faults.hang) == (2.0, True)
    assert [faults.take("drop_transfers") for _ in range(2)] == [True, False]
    faults.update(Faults())
    assert faults == Faults.parse("")
    for text in ("slow=0", "slow=x", "hang=maybe", "melt=1", "die_after_tokens=-1"):
        with pytest.raises(InvalidArgument, match=text.partition("=")[0]):
            Faults.parse(text)
