"""Answers of a form that was asked for, and answers that go on from tokens generated elsewhere.

SGLang constrains by a grammar (xgrammar), but only with a tokenizer of its own, and on GPUs. Its penalties and its
grammar count the tokens of the answer that one engine generates; here also those that the request brings along.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

# In a request's custom_params: how many of its last prompt tokens are of the answer.
GENERATED = "kvmesh_generated"
_MANAGER = "sglang.srt.constrained.grammar_manager.GrammarManager"
_XGRAMMAR = "sglang.srt.constrained.xgrammar_backend"


def register(hooks: Any, kind: Any) -> None:
    """Puts the hooks into a scheduler process."""
    hooks.register(f"{_MANAGER}.__init__", _open, kind.AFTER)
    hooks.register(f"{_MANAGER}.process_req_with_grammar", _at_once, kind.AFTER)
    hooks.register(f"{_MANAGER}.get_ready_grammar_requests", _compiled, kind.AFTER)
    hooks.register("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _count, kind.AFTER)
    if not torch.cuda.is_available():
        hooks.register(f"{_XGRAMMAR}._allocate_token_bitmask", _mask, kind.REPLACE)
        hooks.register(f"{_XGRAMMAR}.XGrammarGrammar.apply_vocab_mask", _apply, kind.REPLACE)


def _open(_result: Any, manager: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    args = manager.server_args
    if manager.grammar_backend is not None or args.grammar_backend in (None, "none"):
        return
    from sglang.srt.constrained.base_grammar_backend import create_grammar_backend
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    try:
        tokenizer = get_tokenizer(args.tokenizer_path, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        # A model of token ids only is served as well.
        log.warning("answers are of any form: the model's tokenizer is not to be had: %s", error)
        return
    config = scheduler.model_config
    manager.grammar_backend = create_grammar_backend(
        args, tokenizer, config.vocab_size, config.hf_eos_token_id, think_end_ids=config.think_end_ids
    )


def _at_once(waits: bool, _manager: Any, req: Any) -> bool:
    if not waits:
        _advance(req)
    return waits


def _compiled(ready: list[Any], _manager: Any) -> list[Any]:
    for req in ready:
        _advance(req)
    return ready


def generated(req: Any) -> list[int]:
    """The tokens of the answer that were generated before SGLang saw the request."""
    count = (req.sampling_params.custom_params or {}).get(GENERATED, 0)
    return list(req.origin_input_ids[-count:]) if count else []


def _advance(req: Any) -> None:
    """Takes the grammar over what was generated before."""
    if req.grammar is None or req.to_finish is not None:
        return
    try:
        for token in generated(req):
            req.grammar.accept_token(token)
    except ValueError:
        req.set_finish_with_abort("the form does not allow the tokens generated before")


def _count(info: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> Any:
    """Penalties for what was generated before: elsewhere, or here until the request was retracted."""
    if not info.penalizer_orchestrator.is_required:
        return info
    from sglang.srt.sampling import penaltylib as lib

    penalizers = info.penalizer_orchestrator.penalizers
    rows = ((i, [*generated(req), *req.output_ids]) for i, req in enumerate(batch.reqs))
    for i, ids in ((i, torch.tensor(tokens, device=batch.device)) for i, tokens in rows if tokens):
        p = penalizers[lib.BatchedFrequencyPenalizer]
        if p.is_prepared():
            p.cumulated_frequency_penalties[i].index_add_(0, ids, p.frequency_penalties[i].expand(len(ids)))
        p = penalizers[lib.BatchedPresencePenalizer]
        if p.is_prepared():
            p.cumulated_presence_penalties[i, ids] = p.presence_penalties[i]
        p = penalizers[lib.BatchedRepetitionPenalizer]
        if p.is_prepared():
            p.cumulated_repetition_penalties[i, ids] = p.repetition_penalties[i]
    return info


def _mask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """The stock one pins its memory, for a GPU."""
    from xgrammar import bitmask_dtype, get_bitmask_shape

    return torch.full(get_bitmask_shape(batch_size, vocab_size), -1, dtype=bitmask_dtype)


def _apply(_grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)
