"""What proves that nothing is left behind would notice it."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

from mesh_process import SHM, RunningMesh

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"


def test_what_is_left_behind_is_noticed(tmp_path: Path) -> None:
    mesh = RunningMesh(tmp_path, "never-started", tmp_path, [])
    assert mesh.left(patience=0) == []
    file = SHM / f"kvmesh-test-{uuid.uuid4().hex}"
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], env=mesh.environment(), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        file.touch()
        left = mesh.left(patience=0)
        assert any(f"process {process.pid}" in what for what in left)
        assert str(file) in left
    finally:
        file.unlink(missing_ok=True)
        process.kill()
        process.communicate()
    assert mesh.left(patience=0) == []
