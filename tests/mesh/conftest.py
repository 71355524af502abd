"""Tests on real meshes: real SGLang on the CPU, real etcd, each process a process."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from direct import DirectEngine
from hf_reference import END, Comparison, Reference
from mesh_process import RunningMesh, running
from otlp_collector import Collector

from kvmesh.client import AsyncClient

NOTES = pytest.StashKey[list[str]]()
# Starting a mesh is part of the first test that uses it.
TIMEOUT_S = 420
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if notes := config.stash[NOTES]:
        terminalreporter.section("mesh")
        for note in notes:
            terminalreporter.line(note)


@pytest.fixture(scope="session")
def note(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Adds a line to the summary."""
    return pytestconfig.stash[NOTES].append


@pytest.fixture(scope="session")
def mesh_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="session")
def model(mesh_home: Path) -> Path:
    """The tiny model; END ends its sequences too, so that some answers end by themselves."""
    from kvmesh.local.tiny_model import tiny_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMESH_HOME", str(mesh_home))
        made = tiny_model()
    folder = mesh_home / "models" / "tiny"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = [config["eos_token_id"], END]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Gets the spans of `mesh`."""
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="session")
def mesh(mesh_home: Path, model: Path, collector: Collector) -> Iterator[RunningMesh]:
    """Two engines for all tests that kill nothing."""
    arguments = ["--engines", "2", "--kv-tokens", "12288", "--otlp-endpoint", collector.endpoint]
    yield from running(RunningMesh(mesh_home, "shared", model, arguments))


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="session")
def comparison(reference: Reference, note: Callable[[str], None]) -> Iterator[Comparison]:
    """All answers of this run against the reference; counts them in the summary."""
    compared = Comparison(reference)
    yield compared
    for line in compared.lines():
        note(f"tokens: {line}")
    compared.check_rare()


@pytest.fixture
async def client(mesh: RunningMesh) -> AsyncIterator[AsyncClient]:
    """A client of the shared mesh's router."""
    async with AsyncClient(mesh.address("router")) as connected:
        yield connected


@pytest.fixture
async def engines(mesh: RunningMesh) -> AsyncIterator[list[DirectEngine]]:
    """Both engines of the shared mesh, with empty caches; they must come to rest again after the test."""
    async with AsyncExitStack() as stack:
        names = ["engine-0", "engine-1"]
        both = [await stack.enter_async_context(DirectEngine(name, mesh.address(name))) for name in names]
        for engine in both:
            await engine.flush()
        yield both
        for engine in both:
            await engine.at_rest()
