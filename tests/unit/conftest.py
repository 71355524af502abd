"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[object]:
    """An HTTP door (kvmesh_http.Http) over two fake engines."""
    from kvmesh_http import Http
    from router_harness import Harness

    from kvmesh.local.tiny_model import tiny_model

    async with Harness(2, tmp=tmp_path, path=str(tiny_model())) as mesh:
        mesh.router = await mesh.start_router(http="127.0.0.1:0", announce=str(tmp_path / "router"))
        made = Http(mesh, f"http://{(tmp_path / 'router.http').read_text().strip()}")
        async with made.openai, made.http:
            yield made
