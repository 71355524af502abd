"""Who shares memory with whom."""

from __future__ import annotations

import re
import subprocess
import sys

from kvmesh.host import host_id


def test_it_is_the_same_in_every_process_here():
    program = "from kvmesh.host import host_id; print(host_id())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == host_id() and re.fullmatch("[0-9a-f]{16}", host_id())


def test_another_shared_memory_is_another_host(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert len({host_id(), host_id(one), host_id(two)}) == 3
    assert host_id(one) == host_id(one)


def test_without_shared_memory_nobody_is_on_this_host(tmp_path):
    program = "import sys; from pathlib import Path; from kvmesh.host import host_id; print(host_id(Path(sys.argv[1])))"
    command = [sys.executable, "-c", program, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() != host_id(tmp_path / "none")
