"""KV stores, as `kvmesh status` shows them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvmesh.dataplane.choice import SIMULATED
from kvmesh.v1.router_pb2 import MeshStore


def stores_part(stores: Sequence[MeshStore]) -> list[RenderableType]:
    """A table of the stores, with a legend; nothing for none."""
    if not stores:
        return []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("store", "address", "state"):
        table.add_column(column, overflow="fold")
    for column in ("memory", "of", "disk", "of", "pinned", "asked", "sent", "lost"):
        table.add_column(column, justify="right")
    for store in stores:
        table.add_row(*_row(store))
    legend = "memory and disk: tokens kept; asked, sent: tokens that requests looked for and got; lost: damaged blocks"
    if any(SIMULATED in store.info.transports for store in stores):
        legend += "; sim: simulated, numbers in place of KV"
    return [Text(""), table, Text(legend, style="dim")]


def _row(store: MeshStore) -> list[str | Text]:
    info, stats = store.info, store.stats
    block = info.block_tokens
    disk_room = info.disk_bytes // (info.layout.bytes_per_token * info.layout.ranks or 1) if info.disk_bytes else 0
    numbers = [
        stats.memory_used * block,
        info.memory_blocks * block,
        stats.disk_blocks * block,
        disk_room,
        stats.pinned * block,
        stats.asked_tokens,
        stats.sent_tokens,
        stats.damaged_blocks,
    ]
    state = Text("up", "green") if store.connected else Text("lost", "red")
    if SIMULATED in info.transports:
        state.append(", sim", "yellow")
    return [store.member.endpoint.name, store.member.endpoint.address, state, *map(str, numbers)]
