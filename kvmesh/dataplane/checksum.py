"""Checksums of KV rows: the same on both sides of a transfer, whatever the transport."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from kvmesh.dataplane.base import Pool
from kvmesh.dataplane.slots import Slots

# Rows looked at together: bounds the memory for them.
ROWS = 1024


def checksum(pool: Pool, slots: Slots) -> int:
    """64 bits over K, then V, of each layer in turn, of rows `slots` in order."""
    import torch

    tensors = [tensor for pair in zip(pool.keys, pool.values, strict=True) for tensor in pair]
    digest = blake2b(digest_size=8)
    index = torch.tensor(slots, device=tensors[0].device)
    for tensor in tensors:
        for at in range(0, len(slots), ROWS):
            rows = tensor.index_select(0, index[at : at + ROWS]).cpu()
            digest.update(rows.view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "little")


def compare(pool: Pool, slots: Slots, sums: Iterable[tuple[int, int]]) -> str:
    """Holds rows `slots`, in pieces of (tokens, checksum), against these checksums: what is wrong, or nothing."""
    at = 0
    for tokens, wanted in sums:
        if checksum(pool, slots[at : at + tokens]) != wanted:
            return f"the KV of tokens {at} to {at + tokens} of the transfer is not what was sent"
        at += tokens
    return "" if at == len(slots) else f"checksums are of {at} tokens, not of {len(slots)}"
