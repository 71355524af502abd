"""Seeds for single requests: stock SGLang takes them only in its deterministic mode, and not together with min_p."""

from __future__ import annotations

from typing import Any

import torch


def register(hooks: Any, kind: Any) -> None:
    """Makes every request sample by its own seed; the front gives one to each."""
    hooks.register("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _seed, kind.AFTER)
    hooks.register("sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch", _sample, kind.REPLACE)


def _seed(info: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> Any:
    from sglang.srt.runtime_context import get_exec

    if get_exec().kernel.sampling_backend == "pytorch":
        seeds = [r.sampling_params.sampling_seed or 0 for r in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
    return info


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
