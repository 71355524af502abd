"""One request inside the simulated scheduler: a generation, or the prefill of a send."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvmesh.dataplane.slots import Slots
from kvmesh.v1.common_pb2 import SamplingParams
from services.engine.base import Ending, Output, Outputs
from services.engine.sim.content import FIRST, Arithmetic, Ids, logprob, next_token, scramble
from services.engine.sim.kv import KvCache, Node


@dataclass(eq=False, slots=True)
class Job:
    """KV of [0:done) is there, in `slots`; [0:shared) of it is in the tree, locked by `node`; [shared:taken) is ours.

    A generation has `outputs` and goes on to decode; a send has `on_ready`, called after each pass, while locked.
    """

    ids: Ids
    end: int
    outputs: Outputs | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new: int = 0
    on_ready: Callable[[], None] | None = None
    on_failed: Callable[[str], None] | None = None
    # Keeps what a reservation had filled until the job has begun.
    held: Node | None = None
    slots: Slots = field(default_factory=lambda: np.empty(0, np.int64))
    done: int = 0
    shared: int = 0
    taken: int = 0
    # When it first began, seconds, and what of [0:end) was there then.
    began: float = 0.0
    cached: int = 0
    node: Node | None = None
    # The tokens behind `ids`; and how many there were in all, also before a retraction.
    answer: list[int] = field(default_factory=list)
    produced: int = 0
    retractions: int = 0
    digest: int = 0
    value: int = FIRST
    seed: int = 0
    stops: frozenset[int] = frozenset()
    # A step under way still uses it.
    busy: bool = False
    over: bool = False

    @property
    def context(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.ids) + len(self.answer)

    def begin(self, cache: KvCache, node: Node, there: Slots, at: float) -> None:
        """Takes over `node`, locked, whose slots are `there`, and makes room for what is to come; `at` in seconds."""
        if self.held is not None:
            cache.unlock(self.held)
            self.held = None
        self.node, self.done = node, len(there)
        self.shared = self.taken = self.done
        self.slots = np.zeros(self.end + self.max_new - self.produced, np.int64)
        self.slots[: len(there)] = there
        if not self.began:
            self.began, self.cached = at, self.done
            if self.outputs is not None:
                self.outputs.began_ns, self.outputs.cached_tokens = int(at * 1e9), self.done

    def take(self, slots: Slots) -> None:
        """Slots for the tokens to be computed next."""
        self.slots[self.taken : self.taken + len(slots)] = slots
        self.taken += len(slots)

    def compute(self, cache: KvCache, arithmetic: Arithmetic) -> None:
        """The pass over [done:taken) is over: its KV is there, and in the tree."""
        before = int(cache.values[self.slots[self.done - 1]]) if self.done else FIRST
        cache.values[self.slots[self.done : self.taken]] = arithmetic.prefill(self.ids[self.done : self.taken], before)
        self.done = self.taken
        self.share(cache, self.ids[: self.done])

    def share(self, cache: KvCache, ids: Ids) -> None:
        """Puts [0:len(ids)) into the tree, and locks it there."""
        node, known = cache.insert(ids, self.slots[: len(ids)])
        cache.lock(node)
        if self.node is not None:
            cache.unlock(self.node)
        if known > self.shared:
            # Somebody else was faster with these: theirs take the place of ours.
            cache.release(self.slots[self.shared : known].copy())
            _, there = cache.match(ids[:known])
            self.slots[self.shared : known] = there[self.shared :]
        self.node, self.shared = node, len(ids)

    def first_token(self, cache: KvCache, arithmetic: Arithmetic, vocab_size: int) -> list[int]:
        """The token after the prefill."""
        values = cache.values[self.slots[: self.done]]
        self.digest, self.value = arithmetic.digest(values), int(values[-1])
        token = next_token(self.digest, vocab_size, self.seed and scramble(self.seed + self.done))
        self.answer.append(token)
        self.produced += 1
        return [token]

    def next_tokens(self, cache: KvCache, arithmetic: Arithmetic, vocab_size: int) -> list[int]:
        """One more for each slot of [done:taken), where the KV of those before goes; fewer if one of them ends it."""
        count, seed = self.taken - self.done, self.seed
        seeds = [scramble(seed + self.done + i) for i in range(1, count + 1)] if seed else [0] * count
        self.digest, self.value, tokens, written = arithmetic.decode(
            self.digest, self.value, self.answer[-1], self.done, seeds, vocab_size, self.stops
        )
        self.done += len(tokens)
        self.produced += len(tokens)
        self.answer += tokens
        cache.values[self.slots[self.done - len(written) : self.done]] = np.array(written, np.uint64)
        cache.release(self.slots[self.done : self.taken].copy())
        self.taken = self.done
        return tokens

    @property
    def ending(self) -> Ending | None:
        """Why the generation is over, if it is."""
        if self.answer and self.answer[-1] in self.stops:
            return Ending("stop", self.answer[-1], retractions=self.retractions)
        return Ending("length", retractions=self.retractions) if self.produced >= self.max_new else None

    def put(self, tokens: list[int]) -> None:
        """Hands tokens out."""
        if self.outputs is not None:
            logprobs = [logprob(self.digest)] * len(tokens) if self.sampling.logprobs else ()
            self.outputs.put(Output(tokens, logprobs))

    def finish(self, ending: Ending) -> None:
        """The last word."""
        self.over = True
        if self.outputs is not None:
            self.outputs.put(Output(ending=ending))
        elif self.on_failed is not None and ending.reason != "stop":
            self.on_failed(ending.message or ending.reason)

    def leave(self, cache: KvCache, keep: bool) -> None:
        """Gives everything back; with `keep`, what is computed stays as cache."""
        if keep and self.done > self.shared:
            self.share(cache, np.concatenate((self.ids, np.array(self.answer, np.uint32)))[: self.done])
        cache.release(self.slots[self.shared : self.taken].copy())
        for node in (self.node, self.held):
            if node is not None:
                cache.unlock(node)
        self.node = self.held = None
        self.done = self.shared = self.taken = 0

    def retract(self, cache: KvCache) -> None:
        """Gives everything back, to begin anew with the answer so far as prompt."""
        self.leave(cache, keep=False)
        self.ids = np.concatenate((self.ids, np.array(self.answer, np.uint32)))
        self.end = len(self.ids)
        self.answer = []
        self.retractions += 1


def seed_of(sampling: SamplingParams, rng: random.Random) -> int:
    """0 for greedy; else what makes the tokens differ."""
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if temperature == 0:
        return 0
    return scramble(sampling.seed + 1 if sampling.HasField("seed") else rng.getrandbits(63) + 1) or 1
