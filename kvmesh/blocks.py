"""Chained hashes of token blocks: one number names a whole prefix, the same on every member of the mesh."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64


def block_hashes(token_ids: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> list[int]:
    """One 64-bit hash for each whole block of `token_ids`, over its tokens and the hash before it."""
    raw = memoryview(array("q", token_ids)).cast("B")
    size = 8 * block_tokens
    hashes: list[int] = []
    before = b""
    for start in range(0, len(raw) - size + 1, size):
        before = blake2b(raw[start : start + size], digest_size=8, key=before).digest()
        hashes.append(int.from_bytes(before, "little"))
    return hashes
