"""Sampling parameters: every limit, on both of its sides."""

from __future__ import annotations

import math

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.sampling import MAX_SEED, check_sampling, max_new_tokens
from kvmesh.v1.common_pb2 import SamplingParams

VOCAB, CONTEXT = 320, 100


def check(prompt_tokens: int = 10, **fields: object) -> None:
    check_sampling(SamplingParams(**fields), VOCAB, CONTEXT, prompt_tokens)  # type: ignore[arg-type]


GOOD = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": CONTEXT},
    {"temperature": 0},
    {"temperature": 100},
    {"top_p": 1e-6},
    {"top_p": 1},
    {"min_p": 0},
    {"min_p": 1},
    {"frequency_penalty": -2},
    {"frequency_penalty": 2},
    {"presence_penalty": -2},
    {"presence_penalty": 2},
    {"repetition_penalty": 0.1},
    {"repetition_penalty": 2},
    {"top_k": -1},
    {"top_k": 1},
    {"stop_token_ids": [0, VOCAB - 1]},
    {"stop_strings": ["a"] * 16},
    {"seed": 0},
    {"seed": MAX_SEED},
    {"n": 1},
    {"ignore_eos": True, "logprobs": True},
    {"json_schema": '{"type": "object"}'},
    {"json_schema": "true"},
    {"regex": "a" * 65536},
    {"ebnf": 'root ::= "a"'},
]


@pytest.mark.parametrize("fields", GOOD)
def test_what_is_allowed(fields):
    check(**fields)


BAD = [
    ({"max_new_tokens": 0}, "sampling.max_new_tokens = 0 is not between 1 and the context length 100"),
    ({"max_new_tokens": CONTEXT + 1}, "sampling.max_new_tokens = 101"),
    ({"temperature": -0.1}, r"sampling.temperature = -0.1 is not in \[0, 100\]"),
    ({"temperature": 100.1}, "sampling.temperature = 100.1"),
    ({"top_p": 0}, r"sampling.top_p = 0 is not in \(0, 1\]"),
    ({"top_p": 1.01}, "sampling.top_p = 1.01"),
    ({"min_p": -0.01}, "sampling.min_p"),
    ({"min_p": 1.01}, "sampling.min_p"),
    ({"frequency_penalty": -2.1}, "sampling.frequency_penalty"),
    ({"frequency_penalty": 2.1}, "sampling.frequency_penalty"),
    ({"presence_penalty": -2.1}, "sampling.presence_penalty"),
    ({"presence_penalty": 2.1}, "sampling.presence_penalty"),
    ({"repetition_penalty": 0}, "sampling.repetition_penalty"),
    ({"repetition_penalty": 2.1}, "sampling.repetition_penalty"),
    ({"top_k": 0}, r"sampling.top_k = 0 is not -1 \(off\) or at least 1"),
    ({"top_k": -2}, "sampling.top_k = -2"),
    ({"stop_token_ids": [5, VOCAB]}, r"sampling.stop_token_ids\[1\] = 320 is not below the vocabulary size 320"),
    ({"stop_strings": ["a"] * 17}, "sampling.stop_strings has 17 entries, at most 16"),
    ({"stop_strings": ["a", ""]}, r"sampling.stop_strings\[1\] is empty"),
    ({"seed": MAX_SEED + 1}, "sampling.seed = 2147483648"),
    ({"n": 0}, "sampling.n = 0 is not 1"),
    ({"n": 2}, "sampling.n = 2 is not 1"),
    ({"json_schema": "{"}, "sampling.json_schema is not JSON"),
    ({"json_schema": "[1]"}, "sampling.json_schema is not a JSON object"),
    ({"json_schema": ""}, "sampling.json_schema has 0 characters"),
    ({"regex": "a" * 65537}, "sampling.regex has 65537 characters, not 1 to 65536"),
    ({"ebnf": ""}, "sampling.ebnf has 0 characters"),
]


@pytest.mark.parametrize(("fields", "says"), BAD)
def test_what_is_refused(fields, says):
    with pytest.raises(InvalidArgument, match=says):
        check(**fields)


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_at_all(field, value):
    with pytest.raises(InvalidArgument, match=f"sampling.{field}"):
        check(**{field: value})


def test_every_field_has_a_test():
    tested = {name for fields in [*GOOD, *(bad for bad, _ in BAD)] for name in fields}
    assert tested == set(SamplingParams.DESCRIPTOR.fields_by_name)


def test_a_prompt_must_leave_room():
    check(prompt_tokens=CONTEXT - 1)
    for prompt in (CONTEXT, CONTEXT + 5):
        with pytest.raises(InvalidArgument, match=f"token_ids has {prompt} tokens, which leaves no room"):
            check(prompt_tokens=prompt)


def test_max_new_tokens_ends_with_the_context():
    assert max_new_tokens(SamplingParams(), 4096, 10) == 128
    assert max_new_tokens(SamplingParams(), 100, 10) == 90
    assert max_new_tokens(SamplingParams(max_new_tokens=7), 100, 10) == 7
    assert max_new_tokens(SamplingParams(max_new_tokens=100), 100, 99) == 1
