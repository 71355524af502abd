"""Prompts of token ids: the same ones in every run, each different from its first tokens on."""

from __future__ import annotations

import random

# Around chunks of 512 tokens, and blocks of cache changes.
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 64, 65, 100, 128, 200, 255, 300, 400, 511, 512, 513, 700, 1000, 1500, 2000)
BYTES = 256


def prompt(length: int, *key: object) -> list[int]:
    """`length` tokens drawn from `key`."""
    draw = random.Random(repr((length, key)))
    return [draw.randrange(BYTES) for _ in range(length)]


def sharing(base: list[int], *key: object) -> list[int]:
    """A prompt that begins as `base` does, and goes on otherwise for the last third and three tokens more."""
    kept = max(1, len(base) * 2 // 3)
    tail = prompt(len(base) - kept + 3, "tail", *key)
    if kept < len(base):
        tail[0] = (base[kept] + 1) % BYTES
    return base[:kept] + tail
