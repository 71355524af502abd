"""KV stores of a local mesh: their command lines, and what `kvmesh status` shows of them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console, Group
from store_harness import LAYOUT

from kvmesh.errors import InvalidArgument
from kvmesh.local.mesh import stages
from kvmesh.local.options import MeshOptions
from kvmesh.local.show_stores import stores_part
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import STOP_ORDER
from kvmesh.v1.router_pb2 import GetMeshResponse


def workers(options: MeshOptions, folder: Path) -> list[Any]:
    registry = SimpleNamespace(spec=SimpleNamespace(role="registry"), address="127.0.0.1:1")
    mesh = SimpleNamespace(children=[registry], work=folder, place=MeshDir("m"))
    return stages(options, Path("/m"), [])[2](cast(Any, mesh))


def test_up_starts_stores_between_engines_and_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    disk = f"{tmp_path / 'kv'}:1GiB"
    specs = workers(MeshOptions(name="m", engines=1, stores=2, store_memory="64MiB", store_disk=disk), tmp_path)
    assert [(s.name, s.role) for s in specs] == [
        ("engine-0", "engine"),
        ("kvstore-0", "kvstore"),
        ("kvstore-1", "kvstore"),
        ("router", "router"),
    ]
    line = specs[2].command
    assert line[4] == "kvstore" and line[line.index("--memory") + 1] == "64MiB"
    # Each has a folder of its own.
    assert line[line.index("--disk") + 1] == f"{tmp_path / 'kv' / 'kvstore-1'}:1073741824"
    assert line[line.index("--registry") + 1] == "127.0.0.1:1"
    assert STOP_ORDER.index("engine") < STOP_ORDER.index("kvstore") < STOP_ORDER.index("registry")
    specs = workers(MeshOptions(name="m", engines=1, stores=1), tmp_path)
    assert "--disk" not in specs[1].command


@pytest.mark.parametrize("field", [{"stores": -1}, {"store_memory": "much"}, {"store_disk": "/kv"}])
def test_bad_options_are_refused_by_name(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(InvalidArgument, match=name):
        MeshOptions(**field)


def test_the_page_shows_stores() -> None:
    page = GetMeshResponse()
    assert stores_part(page.stores) == []
    store = page.stores.add(connected=True)
    store.member.endpoint.name, store.member.endpoint.address = "kvstore-0", "127.0.0.1:7"
    store.info.block_tokens, store.info.memory_blocks = 64, 100
    store.info.layout.CopyFrom(LAYOUT.message())
    store.info.disk_bytes = 1000 * LAYOUT.bytes_per_token
    store.stats.memory_used, store.stats.disk_blocks, store.stats.pinned = 3, 5, 1
    store.stats.asked_tokens, store.stats.sent_tokens, store.stats.damaged_blocks = 900, 800, 2
    page.stores.add().member.endpoint.name = "kvstore-1"
    out = io.StringIO()
    Console(file=out, width=160, highlight=False).print(Group(*stores_part(page.stores)))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["kvstore-0", "127.0.0.1:7", "up", "192", "6400", "320", "1000", "64", "900", "800", "2"] in rows
    assert ["kvstore-1", "lost", *["0"] * 8] in rows
