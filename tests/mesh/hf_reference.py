"""Greedy tokens of Hugging Face transformers, and how an answer is held against them."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A second end of sequence, of a kind that is chosen now and then.
END = ord("e")
# Two logits nearer than this may change places when a prefill has another shape.
NEAR = 1e-3
# One case in so many may be such a near tie.
RARE = 50


class Reference:
    """The model at `path` in float32 on one thread; what it was once asked it remembers."""

    def __init__(self, path: Path) -> None:
        import torch

        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM

            self._model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
        self._known: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """The `count` greedy tokens after `prompt`."""
        return self._answer(prompt, count)[0][:count]

    def logprobs(self, prompt: list[int], count: int) -> list[float]:
        """Their natural log-probabilities."""
        return self._answer(prompt, count)[1][:count]

    def _answer(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        import torch

        known = self._known.get(tuple(prompt))
        if known is not None and len(known[0]) >= count:
            return known
        tokens: list[int] = []
        logprobs: list[float] = []
        ids, past = list(prompt), None
        with torch.no_grad():
            for _ in range(count):
                out = self._model(torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
                past, scores = out.past_key_values, torch.log_softmax(out.logits[0, -1], -1)
                ids = [int(scores.argmax())]
                tokens += ids
                logprobs.append(float(scores[ids[0]]))
        self._known[tuple(prompt)] = (tokens, logprobs)
        return tokens, logprobs

    def logits(self, tokens: list[int]) -> Any:
        """The logits after `tokens`, shape [vocab], from one pass over all of them."""
        import torch

        with torch.no_grad():
            return self._model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits[0, -1]


@dataclass
class Comparison:
    """Answers held against the reference; `cases` and `near` count them by (way, state)."""

    reference: Reference
    cases: Counter[tuple[str, str]] = field(default_factory=Counter)
    near: Counter[tuple[str, str]] = field(default_factory=Counter)

    def check(self, way: str, state: str, prompt: list[int], answer: list[int], count: int) -> None:
        """Fails unless `answer` is the reference's `count` tokens, up to a near tie."""
        kind = f"{way}, {state}"
        self.cases[way, state] += 1
        expected = self.reference.tokens(prompt, count)
        assert len(answer) == count, f"{kind}: {len(answer)} tokens where {count} were due"
        if answer == expected:
            return
        at = next(i for i in range(count) if answer[i] != expected[i])
        # Teacher-forced: whatever came after this token is another story.
        best = self.reference.logits(prompt + expected[:at]).topk(2)
        gap = float(best.values[0] - best.values[1])
        assert {answer[at], expected[at]} == set(best.indices.tolist()) and gap <= NEAR, (
            f"{kind}: prompt of {len(prompt)} tokens, token {at} is {answer[at]}, the reference has {expected[at]} "
            f"(the two best logits are {gap:g} apart)"
        )
        self.near[way, state] += 1

    def check_rare(self) -> None:
        """Fails when near ties are more than one case in RARE."""
        assert self.near.total() * RARE <= self.cases.total(), (self.near, self.cases)

    def lines(self) -> list[str]:
        """The counts in words, a line for each way."""
        lines = []
        for way in dict.fromkeys(way for way, _ in self.cases):
            counts = [f"{state} {n}" for (w, state), n in self.cases.items() if w == way]
            lines.append(f"{way}: {'; '.join(counts)}")
        total = f"{self.cases.total()} cases compared with transformers, {self.near.total()} near ties"
        return [*lines, total]
