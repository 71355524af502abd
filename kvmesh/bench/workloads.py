"""What is asked: prompts and answer lengths, made up or out of traces, each with the time at which a trace has it."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvmesh.errors import InvalidArgument

# Between the seeds of a trace's times: no run has so many.
AGAIN = 1_000_003
# Tokens of one block of a Mooncake trace, each named by a hash id.
MOONCAKE_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `at`: seconds since the trace's begin. `blocks`: (id, tokens) whose content the ids decide."""

    prompt_tokens: int
    max_new_tokens: int
    blocks: tuple[tuple[int, int], ...]
    at: float = 0.0
    session: str = ""
    text: str = ""

    def tokens(self, vocab_size: int) -> list[int]:
        """The prompt, of ids 3 up to the vocabulary's end: the same for the same blocks."""
        return _tokens(self.blocks, vocab_size).tolist()  # type: ignore[no-any-return]


def _tokens(blocks: Sequence[tuple[int, int]], vocab_size: int) -> Any:
    """Pseudo-random tokens of blocks (number, size); a shorter one is the beginning of a longer one."""
    sizes = [size for _, size in blocks]
    starts = np.array([number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF for number, _ in blocks], np.uint64)
    within = np.arange(sum(sizes)) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    x = np.repeat(starts, sizes) + within.astype(np.uint64) + np.uint64(1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    low = min(3, vocab_size - 1)
    return low + ((x ^ (x >> np.uint64(31))) % np.uint64(vocab_size - low)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens: the mean, and the standard deviation relative to it."""

    mean: int
    spread: float = 0.0

    def draw(self, rng: np.random.Generator) -> int:
        """One, at least 1."""
        return max(1, round(rng.normal(self.mean, self.mean * self.spread))) if self.spread else self.mean


def synthetic(
    count: int, prompt: Length, answer: Length, *, seed: int = 0, prefix_tokens: int = 0, prefixes: int = 1
) -> list[Ask]:
    """Made-up requests; with `prefix_tokens`, the first so many tokens are one of `prefixes` shared beginnings."""
    if prefix_tokens >= prompt.mean:
        raise InvalidArgument(f"prefix_tokens = {prefix_tokens} is not below the prompt's {prompt.mean}")
    rng = np.random.default_rng(seed)
    asks = []
    for i in range(count):
        size, new = prompt.draw(rng), answer.draw(rng)
        shared = min(prefix_tokens, size - 1)
        group = int(rng.integers(prefixes))
        blocks = ((seed * 1_000_003 + 7_000_000 + group, shared),) if shared else ()
        own = (seed << 40) + (1 << 33) + i
        asks.append(Ask(size, new, (*blocks, (own, size - shared)), session=f"prefix-{group}" if shared else ""))
    return asks


def mooncake(path: Path, count: int = 0, seed: int = 0) -> list[Ask]:
    """A trace of jsonl with timestamp (ms), input_length, output_length, hash_ids. Raises InvalidArgument."""
    asks: list[Ask] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            size, ids = int(row["input_length"]), [int(i) for i in row["hash_ids"]]
            at, new = float(row["timestamp"]) / 1000, int(row["output_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"{path}, line {number}: no request of a Mooncake trace ({error!r})") from None
        whole = [MOONCAKE_BLOCK] * (size // MOONCAKE_BLOCK)
        sizes = [*whole, size % MOONCAKE_BLOCK] if size % MOONCAKE_BLOCK else whole
        if len(sizes) > len(ids):
            raise InvalidArgument(f"{path}, line {number}: {size} tokens, but {len(ids)} hash_ids of {MOONCAKE_BLOCK}")
        blocks = tuple(zip(((seed << 40) + i for i in ids), sizes, strict=False))
        asks.append(Ask(size, max(1, new), blocks, at))
        if len(asks) == count:
            break
    return _begin_at_zero(asks, path)


def azure(path: Path, count: int = 0, seed: int = 0) -> list[Ask]:
    """A trace of csv with TIMESTAMP, ContextTokens, GeneratedTokens. Raises InvalidArgument."""
    asks: list[Ask] = []
    for number, row in enumerate(csv.DictReader(_lines(path)), 2):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            size, new = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"{path}, line {number}: no request of an Azure trace ({error!r})") from None
        if size > 0:
            asks.append(Ask(size, max(1, new), (((seed << 40) + (1 << 33) + number, size),), at))
        if len(asks) == count:
            break
    return _begin_at_zero(asks, path)


def sharegpt(path: Path, count: int = 0, seed: int = 0) -> list[Ask]:
    """Conversations of a ShareGPT json file: one request a turn, of all before it. About 4 characters a token.

    Raises InvalidArgument.
    """
    try:
        conversations = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    asks: list[Ask] = []
    for number, conversation in enumerate(conversations if isinstance(conversations, list) else []):
        turns = conversation.get("conversations", []) if isinstance(conversation, dict) else []
        blocks: list[tuple[int, int]] = []
        text = ""
        for i, turn in enumerate(turns):
            said = str(turn.get("value", ""))
            size = max(1, len(said) // 4)
            if turn.get("from") in ("gpt", "assistant", "chatgpt") and blocks:
                asks.append(_turn(blocks, text, size, number))
                if len(asks) == count:
                    return asks
            blocks.append(((seed << 40) + (number << 16) + i, size))
            text += said + "\n"
    if not asks:
        raise InvalidArgument(f"{path} has no conversation in ShareGPT's form")
    return asks


def _turn(blocks: Sequence[tuple[int, int]], text: str, answer: int, number: int) -> Ask:
    return Ask(sum(s for _, s in blocks), answer, tuple(blocks), session=f"conversation-{number}", text=text)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from None


def _begin_at_zero(asks: list[Ask], path: Path) -> list[Ask]:
    if not asks:
        raise InvalidArgument(f"{path} has no requests")
    first = min(a.at for a in asks)
    moved = (Ask(a.prompt_tokens, a.max_new_tokens, a.blocks, a.at - first, a.session, a.text) for a in asks)
    return sorted(moved, key=lambda a: a.at)


def repeated(read: Callable[[int, int], list[Ask]], count: int) -> list[Ask]:
    """`count` requests (0: as many as there are) of a trace; at its end it begins again.

    `read(n, most)` gives at most so many (0: all), of its n-th time: with prompts of their own.
    """
    asks = read(0, count)
    period = max(a.at for a in asks) * (1 + 1 / len(asks))
    for again in itertools.count(1):
        if len(asks) >= count:
            return asks
        more = read(again, count - len(asks))
        asks += [dataclasses.replace(a, at=a.at + again * period) for a in more]
    raise AssertionError


def limited(asks: Sequence[Ask], context_length: int) -> list[Ask]:
    """Without those that a model of this context cannot take."""
    return [a for a in asks if a.prompt_tokens + a.max_new_tokens <= context_length]
