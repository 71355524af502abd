"""Prompts as the store sees them: as the keys of their blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b

KEY_BYTES = 16


class Prompt(list[int]):
    """Token ids with the keys of their whole blocks: one key names the whole prefix that ends with its block.

    Keys are made under the layout's fingerprint, thus under the model, and the salt. They are long enough that two
    prefixes never share one.
    """

    def __init__(self, token_ids: Iterable[int], fingerprint: str, salt: str, block_tokens: int) -> None:
        super().__init__(token_ids)
        self._block_tokens = block_tokens
        self._seed = blake2b(f"{fingerprint}\0{salt}".encode(), digest_size=KEY_BYTES).digest()

    @cached_property
    def keys(self) -> list[bytes]:
        """One for each whole block, chained."""
        raw = memoryview(array("q", self)).cast("B")
        size = 8 * self._block_tokens
        keys: list[bytes] = []
        before = self._seed
        for start in range(0, len(raw) - size + 1, size):
            before = blake2b(raw[start : start + size], digest_size=KEY_BYTES, key=before).digest()
            keys.append(before)
        return keys
