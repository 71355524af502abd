"""Attention on processors: SGLang's torch_native, without the queries of tokens whose KV is there already.

Its own form computes the attention of a whole context again for each pass over a part of it: a prompt in chunks, or a
last token after a prefix from the cache, or from another engine, pays for all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

# Queries behind a prefix that are computed together: their mask has as many rows, and a column a token of the context.
ROWS = 1024


def register() -> None:
    """SGLang takes it for `torch_native` from now on."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend("torch_native")(CpuAttention)


class CpuAttention(TorchNativeAttnBackend):  # type: ignore[misc]
    """In place of `torch_native`. What is not plain causal attention goes the base's way."""

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        """Of the new tokens of each request; query and output have shape [new tokens, heads, dim]."""
        windowed = sliding_window_size is not None and sliding_window_size > -1
        if windowed or is_cross_attn or encoder_lens is not None or not causal:
            plain: Any = super()._run_sdpa_forward_extend
            return plain(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
        first = 0
        requests = zip(req_pool_indices.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True)
        for row, prefix, count in requests:
            slots = req_to_token[row, : prefix + count]
            # [1, heads, tokens, dim]
            key, value = (cache[slots].to(query.dtype).movedim(0, 1).unsqueeze(0) for cache in (k_cache, v_cache))
            # A whole prompt needs no mask.
            size = ROWS if prefix else count
            for at in range(0, count, size):
                rows = min(size, count - at)
                end = prefix + at + rows
                part = slice(first + at, first + at + rows)
                found = scaled_dot_product_attention(
                    query[part].movedim(0, 1).unsqueeze(0),
                    key[:, :, :end],
                    value[:, :, :end],
                    attn_mask=_mask(rows, end) if 1 < rows < end else None,
                    is_causal=rows == end,
                    scale=scaling,
                    enable_gqa=enable_gqa,
                )
                output[part] = found.squeeze(0).movedim(1, 0)
            first += count
        return output


def _mask(rows: int, columns: int) -> torch.Tensor:
    """True where the last `rows` tokens of `columns` may look."""
    return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
