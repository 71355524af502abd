"""Copy rate of transport `shm` beside a plain memcpy of the same bytes, in one run and one thread.

Both copy from one warm pool to another; memcpy is torch's `copy_` of one contiguous block.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.shm import ShmTransport, create_pool
from kvmesh.dataplane.slots import Slots

LAYOUTS = {
    "tiny (4 layers x 2 heads x 32, float32)": Layout("0" * 32, "float32", 4, 2, 32, 32, 1),
    "as Llama 8B (32 layers x 8 heads x 128, bfloat16)": Layout("0" * 32, "bfloat16", 32, 8, 128, 128, 1),
}
TOKENS = (1, 16, 256, 2048)
ROWS = 4097
REPEATS = 15


def rate(work: Callable[[], object], size: int) -> float:
    """GB/s, the median of REPEATS after one that does not count."""
    times: list[float] = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return size / statistics.median(times[1:]) / 1e9


def main() -> None:
    """Prints one table a layout."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    shuffled = np.random.default_rng(0).permutation(np.arange(1, ROWS))
    for name, layout in LAYOUTS.items():
        ours = create_pool(layout, ROWS, "kvmesh-bench")
        theirs = create_pool(layout, ROWS, "kvmesh-bench")
        connection = ShmTransport(*ours).connect(ShmTransport(*theirs).describe())
        table = Table(title=f"shm, {name}: {layout.bytes_per_token} bytes a token", title_justify="left")
        for column in ("tokens a piece", "MB", "memcpy GB/s", "shm GB/s", "ratio", "scattered GB/s", "ratio"):
            table.add_column(column, justify="right")
        for tokens in TOKENS:
            size = tokens * layout.bytes_per_token
            source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
            runs: Slots = np.arange(1, tokens + 1)
            scattered: Slots = shuffled[:tokens].copy()
            plain = rate(partial(target.copy_, source), size)
            straight = rate(partial(connection.write, runs, runs), size)
            mixed = rate(partial(connection.write, scattered, scattered[::-1].copy()), size)
            rates = [plain, straight, straight / plain, mixed, mixed / plain]
            table.add_row(str(tokens), f"{size / 1e6:.2f}", *(f"{value:.2f}" for value in rates))
        connection.close()
        for memory, _ in (ours, theirs):
            memory.close()
        console.print(table)


if __name__ == "__main__":
    main()
