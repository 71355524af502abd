"""Ranges are Python slices that refuse instead of cutting."""

from __future__ import annotations

import random
import time

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.ranges import check_range, check_tokens
from kvmesh.v1 import kv_pb2


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_every_range_near_a_short_length(length):
    tokens = list(range(length))
    for begin in range(-length - 2, length + 3):
        for end in range(-length - 2, length + 3):
            valid = -length <= begin <= length and -length <= end <= length
            valid &= (begin + length * (begin < 0)) <= (end + length * (end < 0))
            if valid:
                first, last = check_range(begin, end, length)
                assert 0 <= first <= last <= length and tokens[first:last] == tokens[begin:end]
            else:
                with pytest.raises(InvalidArgument, match=f"begin = {begin}, end = {end} is no range of {length} tok"):
                    check_range(begin, end, length)


def test_examples():
    assert check_range(0, -1, 100) == (0, 99)
    assert check_range(-10, -1, 100) == (90, 99)
    assert check_range(100, 100, 100) == (100, 100)


def test_good_prompts():
    check_tokens([0], 1, 1)
    check_tokens((0, 319) * 10, 320, 20)
    check_tokens(kv_pb2.PrepRecvRequest(token_ids=[5, 6]).token_ids, 320, 2)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "token_ids is empty"),
        ([1] * 21, "token_ids has 21 tokens, more than the context length 20"),
        ([1, 320], r"token_ids\[1\] = 320 is not in the vocabulary of 320"),
        ([1, 2, -1, -7], r"token_ids\[2\] = -1"),
        ([2**32 - 1], r"token_ids\[0\] = 4294967295"),
    ],
)
def test_bad_prompts(tokens, says):
    with pytest.raises(InvalidArgument, match=says):
        check_tokens(tokens, 320, 20)


def test_a_hundred_thousand_tokens_take_milliseconds():
    tokens = random.Random(1).choices(range(150_000), k=100_000)
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        check_tokens(tokens, 150_000, 131_072)
        best = min(best, time.perf_counter() - began)
    assert best < 0.05
