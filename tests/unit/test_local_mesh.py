"""What a local mesh is made of: command lines, readiness, and a start with the real etcd, registry and router."""

import asyncio
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from local_processes import nothing_left, until

from kvmesh.client import AsyncClient
from kvmesh.errors import InvalidArgument
from kvmesh.local.mesh import resolve_model, service_ready, stages
from kvmesh.local.options import MeshOptions
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh


@pytest.fixture
def place(tmp_path, monkeypatch) -> MeshDir:
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return MeshDir("m")


def flags(command: list[str]) -> dict[str, str]:
    """--key value pairs of a command line."""
    pairs = command[5:]
    return {k: v for k, v in zip(pairs[::2], pairs[1::2], strict=False) if k.startswith("--")}


async def test_a_mesh_of_real_services_becomes_ready_and_serves(place):
    """Only the engine is a fake one, which joins from here."""
    options = MeshOptions(name="m", engines=1, log_level="warning")
    first, second, third = stages(options, Path("/no/model"), ["--page-size", "16"])
    engine = FakeEngine("engine-0", {}, {})

    def router(mesh):
        return [spec for spec in third(mesh) if spec.role == "router"]

    async def join(mesh):
        await until(lambda: any(c.spec.role == "registry" and c.address for c in mesh.children))
        await engine.start(next(c.address for c in mesh.children if c.spec.role == "registry"))

    async with LocalMesh(place, "") as mesh:
        joining = asyncio.create_task(join(mesh))
        await mesh.start([first, second, router], 30)
        await joining
        async with AsyncClient(mesh.state.address("router")) as client:
            result = await client.generate([1, 2, 3], temperature=0, max_new_tokens=4, timeout=10).wait()
            assert len(result.token_ids) == 4
        assert [c.spec.name for c in mesh.children] == ["etcd", "registry", "router"]
        assert list(place.traces.glob("router-*.jsonl")) or result.trace_id
        await engine.stop()
        (spec, _router) = third(mesh)
        registry = mesh.children[1].address
    nothing_left(place, *(c.id for c in mesh.children))

    assert (spec.name, spec.role) == ("engine-0", "engine")
    assert spec.command[:5] == [sys.executable, "-P", "-m", "kvmesh.cli", "engine"]
    given = flags(list(spec.command))
    assert given["--name"] == "engine-0" and given["--model"] == "/no/model" and given["--registry"] == registry
    assert given["--listen"] == "127.0.0.1:0" and given["--announce"] == str(mesh.work / "engine-0.address")
    assert given["--run-dir"] == str(mesh.work / "engine-0") and given["--trace-dir"] == str(place.traces)
    assert given["--dtype"] == "auto" and given["--page-size"] == "16" and "--kv-tokens" not in given
    assert spec.environment["OMP_NUM_THREADS"] == "1" and spec.patience > 10


def engine_specs(place, monkeypatch, options: MeshOptions, arguments=()):
    """The engines' specs of a mesh whose registry is said to listen at 127.0.0.1:1."""
    mesh = LocalMesh(place, "")
    monkeypatch.setattr(LocalMesh, "work", Path("/w"))
    registry = type("C", (), {"spec": type("S", (), {"role": "registry"}), "address": "127.0.0.1:1"})
    mesh.children = [registry]  # type: ignore[list-item]
    return stages(options, None if options.sim else Path("/m"), list(arguments))[2](mesh)


def test_options_reach_the_services(place, monkeypatch):
    options = MeshOptions(
        name="m", engines=3, dtype="bfloat16", kv_tokens=512, listen="127.0.0.1:8400", trace_ratio=0.5, trace_dir="/t"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    *engines, router = engine_specs(place, monkeypatch, options, ["--dtype", "float32"])
    assert [e.name for e in engines] == ["engine-0", "engine-1", "engine-2"]
    given = flags(list(engines[2].command))
    assert given["--kv-tokens"] == "512" and given["--trace-ratio"] == "0.5" and given["--trace-dir"] == "/t"
    # What the user says after -- comes last, and so it counts.
    assert given["--dtype"] == "float32" and list(engines[0].command)[-2:] == ["--dtype", "float32"]
    assert engines[0].environment["OMP_NUM_THREADS"] == "7"
    given = flags(list(router.command))
    assert given["--listen"] == "127.0.0.1:8400" and given["--wait-engines"] == "3"


def test_a_simulated_mesh_needs_no_model(place, monkeypatch):
    options = MeshOptions(name="m", sim="tiny-cpu", stores=1, workers=2)
    *engines, store, router = engine_specs(place, monkeypatch, options)
    for spec in (*engines, store):
        given = flags(list(spec.command))
        assert given["--sim"] == "tiny-cpu" and "--model" not in given
    assert flags(list(router.command))["--workers"] == "2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../x"}, "name = '../x'"),
        ({"engines": 0}, "engines = 0"),
        ({"engines": 65}, "engines = 65"),
        ({"workers": 0}, "workers = 0"),
        ({"sim": "tiny-cpu", "model": "/m"}, "either model or sim"),
        ({"kv_tokens": -1}, "kv_tokens = -1"),
        ({"start_timeout": 0}, "start_timeout = 0"),
        ({"trace_ratio": 2}, "trace_ratio = 2"),
    ],
)
def test_wrong_options_are_refused_by_name(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        MeshOptions(**fields)


def test_options_survive_the_way_over_a_command_line():
    import click
    from click.testing import CliRunner

    from kvmesh.config import options

    seen = []

    @click.command()
    @options(MeshOptions, "UP")
    def command(config):
        seen.append(config)

    given = MeshOptions(name="x", engines=3, model="/m o d", kv_tokens=7, start_timeout=1.5, trace_ratio=0.25)
    done = CliRunner().invoke(command, given.arguments(), catch_exceptions=False)
    assert done.exit_code == 0 and seen == [given]


def test_a_model_is_a_folder_with_a_configuration(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(".") == (tmp_path.resolve(), False)
    for path in ("gone", str(tmp_path / "config.json"), "someone/some-model"):
        with pytest.raises(InvalidArgument, match=r"has no config\.json: give the folder of a Hugging Face model"):
            resolve_model(path)


async def test_a_service_that_announced_but_does_not_serve_is_not_ready(tmp_path):
    (tmp_path / "address").write_text("127.0.0.1:1\n")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await service_ready(tmp_path / "address")
