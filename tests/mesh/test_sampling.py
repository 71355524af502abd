"""Sampling parameters mean what common.proto says, held against the logits of transformers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from direct import DirectEngine
from hf_reference import END, Reference
from prompts import prompt

from kvmesh.client import AsyncClient
from kvmesh.v1.common_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP_STRING, FINISH_REASON_STOP_TOKEN

PROMPT = prompt(60, "sampling")
# Rounding may move a token over the border of what is allowed.
SLACK = 1e-3


async def tokens(engine: DirectEngine, **sampling: Any) -> list[int]:
    return (await engine.generate(PROMPT, max_new_tokens=24, **sampling)).token_ids


async def test_a_seed_makes_sampling_repeatable(engines: list[DirectEngine]) -> None:
    engine = engines[0]
    hot = {"temperature": 1.5}
    first = await tokens(engine, seed=7, **hot)
    assert await tokens(engine, seed=7, **hot) == first
    others = [tokens(engine, seed=seed, **hot) for seed in range(100, 105)]
    again, *rest = await asyncio.gather(tokens(engine, seed=7, **hot), *others, tokens(engine, temperature=0))
    assert again == first
    drawn = {tuple(t) for t in (first, *rest)}
    assert len(drawn) == 7
    # Without a seed it is another one each time.
    assert await tokens(engine, **hot) != await tokens(engine, **hot)


async def test_a_seed_with_every_other_parameter(engines: list[DirectEngine]) -> None:
    engine = engines[0]
    everything = {
        "temperature": 1.2,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.05,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logprobs": True,
    }
    one, two, plain = await asyncio.gather(
        tokens(engine, seed=11, **everything), tokens(engine, seed=11, **everything), tokens(engine, seed=11, min_p=0.2)
    )
    assert one == two and len(one) == len(plain) == 24


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 0.0}])
async def test_one_candidate_is_the_greedy_one(
    only_one: dict[str, float], engines: list[DirectEngine], reference: Reference
) -> None:
    assert await tokens(engines[0], **{"temperature": 1.0, **only_one}) == reference.tokens(PROMPT, 24)


@pytest.mark.parametrize("cut", ["top_k", "top_p", "min_p"])
async def test_candidates_that_are_cut_are_never_chosen(
    cut: str, engines: list[DirectEngine], reference: Reference
) -> None:
    """And those that are left are chosen: not the best one only."""
    import torch

    values: dict[str, float] = {"top_k": 4, "top_p": 0.6, "min_p": 0.2}
    hot = 3.0
    others = 0
    for seed in range(4):
        chosen = await tokens(engines[0], temperature=hot, seed=seed, **{cut: values[cut]})
        for i, token in enumerate(chosen):
            odds = torch.softmax(reference.logits(PROMPT + chosen[:i]) / hot, -1)
            ordered = odds.sort(descending=True).values
            others += token != int(odds.argmax())
            if cut == "top_k":
                assert odds[token] >= ordered[3] - SLACK
            elif cut == "min_p":
                assert odds[token] >= 0.2 * ordered[0] - SLACK
            else:
                assert odds[odds > odds[token]].sum() <= 0.6 + SLACK
    assert others >= 10


Penalty = Callable[[Any, Counter[int]], Any]


def frequency(logits: Any, seen: Counter[int]) -> Any:
    for token, count in seen.items():
        logits[token] -= 1.5 * count
    return logits


def presence(logits: Any, seen: Counter[int]) -> Any:
    for token in seen:
        logits[token] -= 1.5
    return logits


def repetition(logits: Any, seen: Counter[int]) -> Any:
    for token in seen:
        logits[token] *= 1.8 if logits[token] < 0 else 1 / 1.8
    return logits


@pytest.mark.parametrize(
    ("field", "value", "penalty"),
    [
        ("frequency_penalty", 1.5, frequency),
        ("presence_penalty", 1.5, presence),
        ("repetition_penalty", 1.8, repetition),
    ],
)
async def test_penalties(
    field: str, value: float, penalty: Penalty, engines: list[DirectEngine], reference: Reference
) -> None:
    """Over the tokens of the answer, not those of the prompt."""
    expected: list[int] = []
    for _ in range(24):
        logits = penalty(reference.logits(PROMPT + expected).clone(), Counter(expected))
        expected.append(int(logits.argmax()))
    assert expected != reference.tokens(PROMPT, 24), "the penalty changes nothing here: take another prompt"
    assert await tokens(engines[0], **{field: value}) == expected


async def test_log_probabilities(engines: list[DirectEngine], client: AsyncClient, reference: Reference) -> None:
    answer = await engines[0].generate(PROMPT, max_new_tokens=24, logprobs=True)
    assert answer.token_ids == reference.tokens(PROMPT, 24)
    assert answer.logprobs == pytest.approx(reference.logprobs(PROMPT, 24), abs=1e-3)
    # Of any token, as the model has them: before temperature and penalties.
    sampled = await client.generate(
        PROMPT,
        strategy="prefill_decode",
        max_new_tokens=24,
        temperature=2,
        frequency_penalty=1,
        seed=5,
        ignore_eos=True,
        logprobs=True,
    ).wait()
    expected = []
    for i, token in enumerate(sampled.token_ids):
        expected.append(float(reference.logits(PROMPT + sampled.token_ids[:i]).log_softmax(-1)[token]))
    assert sampled.logprobs == pytest.approx(expected, abs=1e-3)
    assert sampled.token_ids != answer.token_ids
    without = await engines[0].generate(PROMPT, max_new_tokens=4)
    assert without.logprobs == []


async def test_stop_tokens(engines: list[DirectEngine], client: AsyncClient, reference: Reference) -> None:
    greedy = reference.tokens(PROMPT, 24)
    at = next(i for i in range(4, 24) if greedy.index(greedy[i]) == i and greedy[i] != END)
    stop = greedy[at]
    for ignore_eos in (True, False):
        answer = await engines[0].generate(PROMPT, max_new_tokens=24, stop_token_ids=[stop, 300], ignore_eos=ignore_eos)
        expected = greedy[: at + 1]
        reason, token = FINISH_REASON_STOP_TOKEN, stop
        if not ignore_eos and END in expected:
            expected, token = expected[: expected.index(END) + 1], END
        assert answer.token_ids == expected
        assert (answer.finished.reason, answer.finished.stop_token_id) == (reason, token)
        assert answer.finished.usage.completion_tokens == len(expected)
    for strategy in ("data_parallel", "prefill_decode"):
        result = await client.generate(
            PROMPT, strategy=strategy, max_new_tokens=24, temperature=0, ignore_eos=True, stop_token_ids=[stop]
        ).wait()
        assert (result.token_ids, result.reason, result.matched) == (greedy[: at + 1], "stop_token", stop)


async def test_the_end_of_the_sequence(engines: list[DirectEngine], client: AsyncClient, reference: Reference) -> None:
    key = next(i for i in range(100) if END in reference.tokens(prompt(20, "end", i), 24)[2:])
    token_ids = prompt(20, "end", key)
    greedy = reference.tokens(token_ids, 24)
    expected = greedy[: greedy.index(END) + 1]
    answer = await engines[0].generate(token_ids, max_new_tokens=24, ignore_eos=False)
    assert (answer.token_ids, answer.finished.stop_token_id) == (expected, END)
    result = await client.generate(token_ids, strategy="prefill_decode", max_new_tokens=24, temperature=0).wait()
    assert (result.token_ids, result.reason, result.matched) == (expected, "stop_token", END)
    # Another stop token does not take its place, and ignoring goes past it.
    answer = await engines[0].generate(token_ids, max_new_tokens=24, ignore_eos=False, stop_token_ids=[300])
    assert answer.token_ids == expected
    answer = await engines[0].generate(token_ids, max_new_tokens=24, ignore_eos=True, stop_token_ids=[300])
    assert answer.token_ids == greedy and answer.finished.reason == FINISH_REASON_LENGTH


async def test_stop_strings(engines: list[DirectEngine], client: AsyncClient, reference: Reference) -> None:
    greedy = reference.tokens(PROMPT, 24)
    text = bytes(greedy).decode("ascii")
    at = next(i for i in range(5, 20) if text.find(text[i : i + 3]) == i)
    stop = text[at : at + 3]
    others = ["never to be found", "\u00e9"]
    answer = await engines[0].generate(PROMPT, max_new_tokens=24, stop_strings=[*others, stop])
    assert answer.token_ids == greedy[: at + 3]
    assert (answer.finished.reason, answer.finished.stop_string) == (FINISH_REASON_STOP_STRING, stop)
    await engines[0].at_rest()
    for strategy in ("data_parallel", "prefill_decode", "balanced_prefill_decode"):
        result = await client.generate(
            PROMPT,
            strategy=strategy,
            max_new_tokens=24,
            temperature=0,
            ignore_eos=True,
            stop_strings=[*others, stop],
        ).wait()
        assert (result.text, result.token_ids) == (text[:at], greedy[: at + 3])
        assert (result.reason, result.matched) == ("stop_string", stop)


async def test_text_is_that_of_the_tokens(client: AsyncClient, reference: Reference) -> None:
    given = "Once upon a time, in \u00fc\u4f60\U0001f600"
    token_ids = list(given.encode())
    for strategy in ("data_parallel", "prefill_decode"):
        result = await client.generate(
            given, strategy=strategy, strategy_params={}, max_new_tokens=24, temperature=0, ignore_eos=True
        ).wait()
        assert result.usage.prompt_tokens == len(token_ids)
        assert result.token_ids == reference.tokens(token_ids, 24)
        assert result.text == bytes(result.token_ids).decode("ascii")


async def test_how_many_tokens(engines: list[DirectEngine], client: AsyncClient) -> None:
    engine, context = engines[0], engines[0].info.model.context_length
    answer = await engine.generate(PROMPT)
    assert (len(answer.token_ids), answer.finished.reason) == (128, FINISH_REASON_LENGTH)
    # The context ends before the number asked for is reached.
    long = prompt(context - 3, "to the end")
    answer = await engine.generate(long, max_new_tokens=10)
    assert (len(answer.token_ids), answer.finished.reason) == (3, FINISH_REASON_LENGTH)
    result = await client.generate(
        long, strategy="balanced_prefill_decode", temperature=0, ignore_eos=True, max_new_tokens=10
    ).wait()
    assert (result.token_ids, result.reason) == (answer.token_ids, "length")
    answer = await engine.generate(PROMPT, max_new_tokens=1)
    assert len(answer.token_ids) == 1
