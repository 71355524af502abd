"""Checks that need a GPU: `make gpu`. NEVER RUN on one; KVMESH_GPU_DRY=1 runs them over shm and gloo on CPUs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "mesh"))

DRY = os.environ.get("KVMESH_GPU_DRY") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    if not ours:
        return
    import torch

    for item in ours:
        item.add_marker(pytest.mark.timeout(600))
        if not DRY and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def dry() -> bool:
    return DRY
