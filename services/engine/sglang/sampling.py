"""Sampling parameters as common.proto has them, where stock SGLang differs.

Seeds for single requests: it takes them only in its deterministic mode, and not together with min_p. Stop tokens: with
ignore_eos it does not look for them either. Log-probabilities: it gives them after penalties.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def register(hooks: Any, kind: Any) -> None:
    """Puts the hooks into a scheduler process. Every request samples by its own seed: the front gives one to each."""
    hooks.register("sglang.srt.managers.schedule_batch.Req._check_token_based_finish", _ended, kind.AROUND)
    hooks.register("sglang.srt.model_executor.model_runner.ModelRunner.sample", _with_logprobs, kind.AROUND)
    hooks.register("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _seed, kind.AFTER)
    if not torch.cuda.is_available():
        hooks.register("sglang.srt.layers.sampler.multinomial_with_seed", _choose, kind.REPLACE)
    hooks.register("sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch", _sample, kind.REPLACE)


def _seed(info: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> Any:
    from sglang.srt.runtime_context import get_exec

    if get_exec().kernel.sampling_backend == "pytorch":
        seeds = [r.sampling_params.sampling_seed or 0 for r in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
    return info


def _ended(original: Any, req: Any, tokens: list[int]) -> Any:
    params = req.sampling_params
    if not params.ignore_eos or not params.stop_token_ids:
        return original(req, tokens)
    eos, req.eos_token_ids, params.ignore_eos = req.eos_token_ids, None, False
    try:
        return original(req, tokens)
    finally:
        req.eos_token_ids, params.ignore_eos = eos, True


def _with_logprobs(original: Any, runner: Any, output: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    penalties = batch.sampling_info.penalizer_orchestrator
    if not batch.return_logprob or penalties is None or not penalties.is_required:
        return original(runner, output, batch, *args, **kwargs)
    # Penalties are applied in place.
    logprobs = torch.log_softmax(output.next_token_logits.float(), dim=-1)
    chosen = original(runner, output, batch, *args, **kwargs)
    output.next_token_logprobs = logprobs.gather(1, chosen.to(torch.int64).view(-1, 1)).view(-1)
    return chosen


def _choose(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One index a row of `logprobs` [batch, vocab], drawn by seed and position; the stock one is a Triton kernel.

    Largest of log-probability plus Gumbel noise (the Gumbel-max trick).
    """
    chosen = torch.empty(len(logprobs), 1, dtype=torch.int64)
    for i, key in enumerate(zip(seed.tolist(), positions.tolist(), strict=True)):
        # Not torch's generator: it looks at 32 bits of a seed, and here they must be both numbers.
        draws = np.random.Generator(np.random.Philox(key=key)).standard_exponential(logprobs.shape[1])
        noise = torch.from_numpy(draws).log_().neg_()
        chosen[i] = torch.argmax(logprobs[i].to(torch.float64) + noise)
    return chosen


def _sample(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Token ids of shape [batch], from `probs` of shape [batch, vocab] cut by top-k, then top-p, then min-p."""
    from sglang.srt.layers.sampler import multinomial_with_seed

    ordered, ids = probs.sort(dim=-1, descending=True)
    before = torch.cumsum(ordered, dim=-1) - ordered
    rank = torch.arange(probs.shape[-1], device=probs.device)
    dropped = (rank >= top_ks.view(-1, 1)) | (before > top_ps.view(-1, 1))
    if need_min_p_sampling:
        dropped |= ordered < ordered[:, :1] * min_ps.view(-1, 1)
    # In the order of the vocabulary again: a seed draws the same whether others in the batch have anything cut or not.
    kept = probs.masked_fill(torch.zeros_like(dropped).scatter_(1, ids, dropped), 0.0)
    if sampling_seed is None:
        return torch.multinomial(kept, num_samples=1).view(-1).to(torch.int32)
    return multinomial_with_seed(kept.to(torch.float64).log(), sampling_seed, positions).view(-1).to(torch.int32)
