"""Block hashes: the names of prefixes."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array

import pytest

from kvmesh.blocks import BLOCK_TOKENS, block_hashes


def test_there_is_one_for_each_whole_block():
    for count in (0, 1, 63, 64, 65, 127, 128, 1000):
        assert len(block_hashes(range(count))) == count // BLOCK_TOKENS


def test_a_hash_names_the_whole_prefix():
    tokens = list(range(256))
    hashes = block_hashes(tokens)
    assert len(set(hashes)) == 4
    assert block_hashes(tokens[:128]) == hashes[:2]
    # The same block behind another prefix has another name; so has each block behind a change.
    for at in (0, 63, 64, 200):
        other = tokens.copy()
        other[at] += 1
        changed = block_hashes(other)
        assert changed[: at // 64] == hashes[: at // 64]
        assert not set(changed[at // 64 :]) & set(hashes)
    assert block_hashes(tokens[64:128])[0] not in hashes


def test_it_does_not_matter_what_holds_the_tokens():
    tokens = [random.Random(1).randrange(2**31) for _ in range(300)]
    assert block_hashes(tuple(tokens)) == block_hashes(array("q", tokens)) == block_hashes(tokens)
    assert all(0 <= h < 2**64 for h in block_hashes(tokens))


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_blocks_of_other_sizes(size):
    tokens = list(range(100))
    assert len(block_hashes(tokens, size)) == 100 // size
    assert block_hashes(tokens, size)[:1] == block_hashes(tokens[:size], size)


def test_another_process_gives_the_same_names():
    code = "from kvmesh.blocks import block_hashes; print(block_hashes(range(130)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert told.stdout.strip() == str(block_hashes(range(130)))
    # Written down: members of different versions must agree.
    assert block_hashes(range(64)) == [7321087271375666958]
