"""Ranges and prompts, checked alike everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.errors import InvalidArgument


def check_range(begin: int, end: int, length: int) -> tuple[int, int]:
    """(begin, end) of a Python slice over `length` tokens, with 0 <= begin <= end <= length.

    What is negative counts from the end, but nothing is cut to fit. Raises InvalidArgument with the values as given.
    """
    first = begin + length if begin < 0 else begin
    last = end + length if end < 0 else end
    if not 0 <= first <= last <= length:
        raise InvalidArgument(f"begin = {begin}, end = {end} is no range of {length} tokens")
    return first, last


def check_tokens(token_ids: Sequence[int], vocab_size: int, context_length: int) -> None:
    """Raises InvalidArgument for an empty prompt, one longer than the context, or an id outside the vocabulary."""
    if not token_ids:
        raise InvalidArgument("token_ids is empty")
    if len(token_ids) > context_length:
        raise InvalidArgument(f"token_ids has {len(token_ids)} tokens, more than the context length {context_length}")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        at = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        raise InvalidArgument(f"token_ids[{at}] = {token_ids[at]} is not in the vocabulary of {vocab_size}")
