"""Attention on processors, beside SGLang's own."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    # Of what is not on this machine.
    warnings.simplefilter("ignore")
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from services.engine.sglang import attention
    from services.engine.sglang.attention import CpuAttention

KV_HEADS, DIM = 2, 8


def attend(kind, requests, heads=4, dtype=torch.float32, **other):
    """Requests of (tokens there, new tokens), their KV scattered over a pool."""
    draw = torch.Generator().manual_seed(7)
    lengths = [prefix + count for prefix, count in requests]
    slots = torch.randperm(sum(lengths) + 9, generator=draw)
    rows = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
    for i, (part, length) in enumerate(zip(slots[: sum(lengths)].split(lengths), lengths, strict=True)):
        rows[i, :length] = part
    keys, values = (torch.randn(len(slots), KV_HEADS, DIM, generator=draw).to(dtype) for _ in range(2))
    query = torch.randn(sum(count for _, count in requests), heads, DIM, generator=draw).to(dtype)
    output = torch.full_like(query, torch.nan)
    # It needs nothing of what a model runner has.
    kind.__new__(kind)._run_sdpa_forward_extend(
        query,
        output,
        keys,
        values,
        rows,
        torch.arange(len(requests)),
        torch.tensor(lengths),
        torch.tensor([prefix for prefix, _ in requests]),
        torch.tensor([count for _, count in requests]),
        scaling=DIM**-0.5,
        enable_gqa=heads != KV_HEADS,
        **{"causal": True, **other},
    )
    return output


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "requests",
    [
        [(0, 1)],
        [(0, 40)],
        [(40, 1)],
        [(33, 17)],
        [(1, 50)],
        [(0, 30), (20, 1), (5, 23), (31, 16)],
    ],
)
def test_it_is_sglangs_result(requests, heads, monkeypatch):
    # Several blocks of queries behind a prefix.
    monkeypatch.setattr(attention, "ROWS", 16)
    ours, theirs = (attend(kind, requests, heads) for kind in (CpuAttention, TorchNativeAttnBackend))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_half_precision_is_as_near():
    ours, theirs = (attend(k, [(33, 17)], dtype=torch.bfloat16) for k in (CpuAttention, TorchNativeAttnBackend))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("other", [{"sliding_window_size": 5}, {"causal": False}])
def test_what_is_not_plain_goes_sglangs_way(other):
    ours, theirs = (attend(kind, [(8, 12), (0, 9)], **other) for kind in (CpuAttention, TorchNativeAttnBackend))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(ours, attend(CpuAttention, [(8, 12), (0, 9)]))


def test_sglang_takes_it_for_torch_native(monkeypatch):
    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", ATTENTION_BACKENDS["torch_native"])
    attention.register()
    assert ATTENTION_BACKENDS["torch_native"] is CpuAttention
