"""Sampling parameters: the ranges and defaults of common.proto, checked in one place by router and engine alike."""

from __future__ import annotations

import json

from kvmesh.errors import InvalidArgument
from kvmesh.v1.common_pb2 import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 128
MAX_STOP_STRINGS = 16
MAX_FORM = 65536
MAX_SEED = 2**31 - 1
# field: (lowest, lowest allowed itself, highest), as common.proto states them; NaN is in no range.
_FLOATS: dict[str, tuple[float, bool, float]] = {
    "temperature": (0, True, 100),
    "top_p": (0, False, 1),
    "min_p": (0, True, 1),
    "frequency_penalty": (-2, True, 2),
    "presence_penalty": (-2, True, 2),
    "repetition_penalty": (0, False, 2),
}


def _bad(field: str, value: object, rule: str) -> InvalidArgument:
    return InvalidArgument(f"sampling.{field} = {value} is not {rule}")


def check_sampling(params: SamplingParams, vocab_size: int, context_length: int, prompt_tokens: int) -> None:
    """Raises InvalidArgument for a parameter out of range, or a prompt that leaves no room for one new token.

    max_new_tokens may be more than the room that is left: generation then ends where the context ends.
    """
    if prompt_tokens >= context_length:
        raise InvalidArgument(
            f"token_ids has {prompt_tokens} tokens, which leaves no room for a new one in a context of {context_length}"
        )
    if params.HasField("max_new_tokens") and not 1 <= params.max_new_tokens <= context_length:
        raise _bad("max_new_tokens", params.max_new_tokens, f"between 1 and the context length {context_length}")
    for field, (low, closed, high) in _FLOATS.items():
        value = getattr(params, field)
        if params.HasField(field) and not ((low <= value if closed else low < value) and value <= high):  # type: ignore[arg-type]
            raise _bad(field, f"{value:g}", f"in {'[' if closed else '('}{low:g}, {high:g}]")
    if params.HasField("top_k") and params.top_k != -1 and params.top_k < 1:
        raise _bad("top_k", params.top_k, "-1 (off) or at least 1")
    for i, token in enumerate(params.stop_token_ids):
        if token >= vocab_size:
            raise _bad(f"stop_token_ids[{i}]", token, f"below the vocabulary size {vocab_size}")
    if len(params.stop_strings) > MAX_STOP_STRINGS:
        count = len(params.stop_strings)
        raise InvalidArgument(f"sampling.stop_strings has {count} entries, at most {MAX_STOP_STRINGS}")
    if "" in params.stop_strings:
        raise InvalidArgument(f"sampling.stop_strings[{list(params.stop_strings).index('')}] is empty")
    if params.HasField("seed") and params.seed > MAX_SEED:
        raise _bad("seed", params.seed, f"between 0 and {MAX_SEED}")
    if form := params.WhichOneof("form"):
        _check_form(form, getattr(params, form))
    if params.HasField("n") and params.n != 1:
        raise _bad("n", params.n, "1: one completion a request")


def _check_form(field: str, value: str) -> None:
    if not 1 <= len(value) <= MAX_FORM:
        raise InvalidArgument(f"sampling.{field} has {len(value)} characters, not 1 to {MAX_FORM}")
    if field == "json_schema":
        try:
            schema = json.loads(value)
        except ValueError as error:
            raise InvalidArgument(f"sampling.json_schema is not JSON: {error}") from None
        if not isinstance(schema, dict | bool):
            raise InvalidArgument("sampling.json_schema is not a JSON object")


def max_new_tokens(params: SamplingParams, context_length: int, prompt_tokens: int) -> int:
    """How many tokens may be generated: what was asked for (default 128), cut where the context ends."""
    wanted = params.max_new_tokens if params.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS
    return min(wanted, context_length - prompt_tokens)
