"""Attention on processors: one layer's for the new tokens of a prompt, ours and SGLang's own torch_native in turns."""

from __future__ import annotations

import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table

# (tokens there, new tokens)
PASSES = ((0, 512), (0, 2048), (512, 512), (1536, 512), (7680, 512), (1023, 1), (2047, 1), (8191, 1))
HEADS, KV_HEADS, DIM = 4, 2, 32
TURNS = 9


def arguments(prefix: int, count: int) -> tuple[Any, ...]:
    """Of `_run_sdpa_forward_extend`, for one request."""
    import torch

    length = prefix + count
    keys, values = (torch.randn(length, KV_HEADS, DIM) for _ in range(2))
    query = torch.randn(count, HEADS, DIM)
    rows = torch.randperm(length).unsqueeze(0)
    numbers = [torch.tensor([n]) for n in (0, length, prefix, count)]
    return query, torch.empty_like(query), keys, values, rows, *numbers


def main() -> None:
    """Measures, in one thread."""
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from services.engine.sglang.attention import CpuAttention

    torch.set_num_threads(1)
    # What is measured needs nothing of a model runner.
    ways = [kind.__new__(kind) for kind in (TorchNativeAttnBackend, CpuAttention)]
    table = Table(title=f"ms of one layer's attention, {HEADS} heads of {DIM}, float32; medians of {TURNS}")
    for column in ("tokens there", "new tokens", "SGLang's", "ours", "ratio"):
        table.add_column(column, justify="right")
    for prefix, count in PASSES:
        given = arguments(prefix, count)
        times: list[list[float]] = [[], []]
        for turn in range(TURNS + 1):
            for way, found in zip(ways, times, strict=True):
                begin = time.perf_counter()
                way._run_sdpa_forward_extend(*given, scaling=DIM**-0.5, enable_gqa=True, causal=True)
                if turn:
                    found.append(1e3 * (time.perf_counter() - begin))
        theirs, ours = map(statistics.median, times)
        table.add_row(str(prefix), str(count), f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
