"""What stands for KV and logits: running hashes, so that wrong KV gives wrong tokens.

The KV of a token is one 64-bit number made of the token and of the KV of the token before it, read from that one's
slot. The next token is drawn from a sum over the KV of the whole context, again as read from the slots. All of it is
affine modulo 2^64, so that whole prompts are numpy operations.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvmesh.sim.peers import Values

MASK = (1 << 64) - 1
_A, _B, _C = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xBF58476D1CE4E5B9
_INVERSE = pow(_A, -1, 1 << 64)
FIRST = 0x2545F4914F6CDD1D
# What a slot holds that was given out and not written since.
UNWRITTEN = 0xDEADDEADDEADDEAD

Ids: TypeAlias = npt.NDArray[np.uint32]


def scramble(x: int) -> int:
    """A 64-bit number whose bits depend on all bits of `x`."""
    x = (x ^ (x >> 30)) * _C & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


class Arithmetic:
    """The functions, for contexts of up to `context_length` tokens. Engines of one process may share one."""

    def __init__(self, context_length: int) -> None:
        ones = np.ones(context_length + 1, np.uint64)
        self._up = np.cumprod(ones * np.uint64(_A))
        self._down = np.cumprod(ones * np.uint64(_INVERSE))
        self._weights = np.cumprod(ones * np.uint64(_B))

    def prefill(self, ids: Ids, before: int) -> Values:
        """KV of `ids`, given that of the token before them (FIRST at the beginning)."""
        n = len(ids)
        terms = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_C)
        sums = np.cumsum(terms * self._down[:n]) + np.uint64(before)
        values: Values = sums * self._up[:n]
        return values

    def digest(self, values: Values) -> int:
        """The state that a context of this KV leaves."""
        return int((values * self._weights[: len(values)]).sum(dtype=np.uint64))

    def decode(
        self, digest: int, value: int, token: int, length: int, seeds: Sequence[int], vocab_size: int, stops: Set[int]
    ) -> tuple[int, int, list[int], list[int]]:
        """(state, KV, tokens, their KV) after a token for each of `seeds`, fewer where one of `stops` comes.

        `token` is the last before them; its own KV is the first that is computed.
        """
        tokens: list[int] = []
        written: list[int] = []
        for weight, seed in zip(self._weights[length : length + len(seeds)].tolist(), seeds, strict=True):
            value = (_A * value + (token + 1) * _C) & MASK
            digest = (digest + value * weight) & MASK
            written.append(value)
            token = next_token(digest, vocab_size, seed)
            tokens.append(token)
            if token in stops:
                break
        return digest, value, tokens, written


def next_token(digest: int, vocab_size: int, seed: int = 0) -> int:
    """The token after a context; greedy for seed 0."""
    return scramble(digest ^ seed) % vocab_size


def logprob(digest: int) -> float:
    """A number that can stand for the chosen token's log-probability: below 0, above -1."""
    return -1e-6 - (scramble(digest ^ MASK) >> 11) / (1 << 53) * 0.99
