"""What the user sees while a mesh starts: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmesh.local.child import Child
from kvmesh.local.supervisor import LocalMesh

# Seconds between plain lines about what is still waited for.
REMINDER = 10.0


@contextlib.asynccontextmanager
async def shown(mesh: LocalMesh, console: Console) -> AsyncIterator[None]:
    """Shows the start of `mesh` for as long as the block runs."""
    task = asyncio.create_task(_live(mesh, console) if console.is_terminal else _plain(mesh, console))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _live(mesh: LocalMesh, console: Console) -> None:
    with Live(_table(mesh), console=console, refresh_per_second=4, redirect_stdout=False) as live:
        try:
            while True:
                await asyncio.sleep(0.25)
                live.update(_table(mesh))
        finally:
            live.update(_table(mesh))


def _table(mesh: LocalMesh) -> Table:
    table = Table.grid(padding=(0, 2))
    for child in mesh.children:
        state, style = child.state, {"ready": "green", "starting": "yellow"}.get(child.state, "red")
        seconds = time.monotonic() - child.started if child.ready_after is None else child.ready_after
        detail = child.address or (child.last_lines(1) or [""])[0]
        line = Text(detail, no_wrap=True, overflow="ellipsis", style="dim")
        table.add_row(f"  {child.spec.name}", Text(state, style=style), f"{seconds:5.1f} s", line)
    return table


async def _plain(mesh: LocalMesh, console: Console) -> None:
    told: set[str] = set()
    reminded = time.monotonic()

    def tell() -> None:
        for child in mesh.children:
            if child.state == "ready" and child.spec.name not in told:
                told.add(child.spec.name)
                after = f"{child.ready_after:.1f}"
                console.print(f"  {child.spec.name} ready after {after} s at {child.address}", highlight=False)

    try:
        while True:
            await asyncio.sleep(0.25)
            tell()
            if time.monotonic() - reminded > REMINDER:
                reminded = time.monotonic()
                waiting = [_waiting(c) for c in mesh.children if c.state == "starting"]
                console.print(f"  waiting for {', '.join(waiting)}", highlight=False, markup=False)
    finally:
        tell()


def _waiting(child: Child) -> str:
    return f"{child.spec.name} ({time.monotonic() - child.started:.0f} s)"
