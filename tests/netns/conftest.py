"""Two real engines on two hosts: network namespaces of this machine."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "mesh"))

from hf_reference import Comparison, Reference  # noqa: E402
from namespaces import Wire, why_not  # noqa: E402
from sides import Side  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    why = why_not() if ours else ""
    for item in ours:
        item.add_marker(pytest.mark.timeout(420))
        if why:
            item.add_marker(pytest.mark.skip(reason=f"no network namespaces here: {why}"))


@pytest.fixture(scope="session")
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kvmesh.local.tiny_model import tiny_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMESH_HOME", str(tmp_path_factory.mktemp("home")))
        return tiny_model()


@pytest.fixture(scope="session")
def comparison(model: Path) -> Comparison:
    return Comparison(Reference(model))


@pytest.fixture(scope="session")
def engines(wire: Wire, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Side]]:
    """Both engines, running."""
    yield from _running([Side(wire, i, ["--model", str(model)], tmp_path_factory.mktemp(f"side{i}")) for i in range(2)])


@pytest.fixture(scope="session")
def simulated(wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Side]]:
    """Both engines, simulated, running."""
    yield from _running([Side(wire, i, ["--sim", "tiny-cpu"], tmp_path_factory.mktemp(f"sim{i}")) for i in range(2)])


def _running(both: list[Side]) -> Iterator[list[Side]]:
    try:
        for side in both:
            side.start()
        for side in both:
            side.ready()
        yield both
    finally:
        for side in both:
            side.terminate()
        for side in both:
            side.stop()
    for side in both:
        assert "Traceback" not in side.log, side.log[-6000:]


@pytest.fixture
async def sides(engines: list[Side]) -> AsyncIterator[list[Side]]:
    """Both engines with empty caches, and ways to call them; they must come to rest after the test."""
    async with _called(engines):
        yield engines


@pytest.fixture
async def sim_sides(simulated: list[Side]) -> AsyncIterator[list[Side]]:
    """As `sides`, of the simulated engines."""
    async with _called(simulated):
        yield simulated


@asynccontextmanager
async def _called(engines: list[Side]) -> AsyncIterator[None]:
    for side in engines:
        await side.speak()
    try:
        for side in engines:
            await side.ask("flush")
        yield
        for side in engines:
            await side.ask("rest", timeout=20)
    finally:
        for side in engines:
            await side.hush()
