"""Sampling parameters as common.proto has them, where stock SGLang differs.

Seeds for single requests: it takes them only in its deterministic mode, and not together with min_p. Stop tokens: with
ignore_eos it does not look for them either.
"""

from __future__ import annotations

from typing import Any

import torch


def register(hooks: Any, kind: Any) -> None:
    """Makes every request sample by its own seed (the front gives one to each), and end with its own stop tokens."""
    hooks.register("sglang.srt.managers.schedule_batch.Req._check_token_based_finish", _ended, kind.AROUND)
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


def _choose(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One index a row of `logprobs` [batch, vocab], drawn by seed and position; the stock one is a Triton kernel.

    Largest of log-probability plus Gumbel noise (the Gumbel-max trick).
    """
    chosen = torch.empty(len(logprobs), 1, dtype=torch.int64)
    generator = torch.Generator()
    for i, (number, at) in enumerate(zip(seed.tolist(), positions.tolist(), strict=True)):
        generator.manual_seed((number << 32) + at)
        noise = torch.empty(logprobs.shape[1], dtype=torch.float64).exponential_(generator=generator).log_().neg_()
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
    kept = ordered.masked_fill(dropped, 0.0)
    if sampling_seed is None:
        chosen = torch.multinomial(kept, num_samples=1)
    else:
        # Scaled to sum to one: the noise that decides is for log-probabilities.
        logs = kept.to(torch.float64)
        logs = (logs / logs.sum(dim=-1, keepdim=True)).log()
        chosen = multinomial_with_seed(logs, sampling_seed, positions)
    return torch.gather(ids.to(torch.int32), 1, chosen).view(-1)
