"""Cleaning up after a mesh: only what was its own, whatever mesh.json says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.local import cleanup, scratch
from kvmesh.local.scratch import Refused
from kvmesh.local.state import MeshDir, MeshState, ProcessId, ProcessRecord, meshes

DEAD = ProcessId(2**22 + 1, 1.0)


@pytest.fixture
def place(tmp_path, monkeypatch) -> MeshDir:
    """A mesh's folder, empty; the current folder holds something to lose."""
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    here = tmp_path / "here"
    here.mkdir()
    (here / "precious").write_text("x")
    monkeypatch.chdir(here)
    place = MeshDir("m")
    place.root.mkdir(parents=True)
    yield place
    assert (here / "precious").read_text() == "x"


@pytest.fixture
def bystander():
    """A process that leads its own session, and is nobody's business."""
    command = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    with subprocess.Popen(command, start_new_session=True) as process:
        yield ProcessId.of(process.pid)
        assert process.poll() is None, "it was killed"
        process.kill()


def left(place: MeshDir, work: str | Path, *processes: ProcessId) -> MeshState:
    """A mesh.json as a dead supervisor leaves it."""
    records = [ProcessRecord(f"engine-{i}", "engine", id) for i, id in enumerate(processes)]
    state = MeshState(place.name, DEAD, "", str(work), "ready", records)
    place.save(state)
    return state


def test_what_a_dead_mesh_left_is_removed_but_not_its_logs(place):
    work = scratch.make(place.root)
    (work / "engine-0" / "deep").mkdir(parents=True)
    place.logs.mkdir()
    (place.logs / "engine-0.log").touch()
    left(place, work, DEAD)
    assert cleanup.recover(place) == []
    assert not work.exists() and not place.file.exists() and (place.logs / "engine-0.log").exists()
    assert cleanup.recover(place) == []


@pytest.mark.parametrize("work", ["", ".", "..", "/", "/tmp", "here", "~", "../here", "/tmp/kvmesh-", "/etc/work"])
def test_a_work_folder_in_mesh_json_that_is_not_ours_is_refused_and_nothing_is_removed(place, work):
    left(place, work)
    before = sorted(place.root.rglob("*"))
    with pytest.raises(Refused, match="will not remove"):
        cleanup.recover(place)
    assert sorted(place.root.rglob("*")) == before


def test_a_work_folder_without_our_mark_is_refused(place, tmp_path):
    (place.root / "work" / "mine").mkdir(parents=True)
    left(place, place.root / "work")
    with pytest.raises(Refused, match="not marked"):
        cleanup.recover(place)
    assert (place.root / "work" / "mine").is_dir()


def test_a_recycled_pid_is_never_touched(place, bystander):
    work = scratch.make(place.root)
    recycled = dataclasses.replace(bystander, created=bystander.created - 100)
    left(place, work, recycled, ProcessId(bystander.pid, 0.0))
    assert cleanup.session_members(recycled) == []
    assert cleanup.recover(place) == []
    assert bystander.alive() and not work.exists()


def test_our_own_session_and_those_outside_of_a_container_are_never_touched(place):
    own = os.getsid(0)
    for pid in (0, 1, -1, own):
        created = created_of(own) if pid == own else 1.0
        assert cleanup.session_members(ProcessId(pid, created)) == []
    left(place, scratch.make(place.root), ProcessId(0, 0.0), ProcessId(own, created_of(own)))
    cleanup.recover(place, timeout=0.1)
    assert not place.file.exists()


def created_of(pid: int) -> float:
    found = ProcessId.of(pid)
    return found.created if found else 0.0


def test_only_shared_memory_that_the_engine_named_is_removed(place, tmp_path, monkeypatch):
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(cleanup, "SHM", shm)
    ours = ["sglang_loads_ab12cd34ef56_0a1b2c3d.shm", "sglang_loads_second-one_ffffffff.shm"]
    others = [
        "sglang_loads_ab12cd34ef567_0a1b2c3d.shm",
        "sglang_loads_ab12cd34ef56_more_0a1b2c3d.shm",
        "sglang_loads_ab12cd34ef56_0a1b2c3d.shm.more",
        "sglang_loads_other_0a1b2c3d.shm",
        "sglang_loads_0a1b2c3d.shm",
        "instance",
        "psm_1234",
    ]
    for name in ours + others:
        (shm / name).touch()
    run = tmp_path / "run"
    run.mkdir()
    lines = ["ab12cd34ef56", "  second-one  ", "", "gone-instance"]
    wrong = [
        "*",
        "?" * 5,
        "abc",
        ".*",
        "....",
        "../shm/psm_1234",
        "psm_1234",
        "other x",
        "../run/instance",
        "/etc/passwd",
    ]
    (run / "instance").write_text("\n".join(lines + wrong))
    cleanup.remove_shared_memory(run)
    assert sorted(p.name for p in shm.iterdir()) == sorted(others)
    assert (run / "instance").exists()
    cleanup.remove_shared_memory(run)


def test_a_run_folder_without_notes_or_with_bytes_that_are_no_text_means_nothing(tmp_path):
    cleanup.remove_shared_memory(tmp_path / "gone")
    (tmp_path / "instance").write_bytes(b"\xff\xfe\x00shm:\n\x00")
    cleanup.remove_shared_memory(tmp_path)
    (tmp_path / "instance").unlink()
    (tmp_path / "instance").mkdir()
    cleanup.remove_shared_memory(tmp_path)


def test_a_process_name_in_mesh_json_that_is_a_path_leads_nowhere(place, tmp_path, monkeypatch):
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(cleanup, "SHM", shm)
    name = "sglang_loads_ab12cd34ef56_0a1b2c3d.shm"
    (shm / name).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "instance").write_text("ab12cd34ef56\n")
    work = scratch.make(place.root)
    state = left(place, work, DEAD)
    state.processes[0].name = os.path.relpath(elsewhere, work)
    place.save(state)
    cleanup.recover(place)
    assert (shm / name).exists() and not work.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "m"}', '{"processes": 3}', "\x00"])
def test_a_mesh_json_that_is_no_such_thing_counts_as_none(place, text):
    place.file.write_text(text)
    assert place.load() is None
    assert cleanup.recover(place) == []
    assert not place.file.exists()


def test_mesh_json_round_trip(place):
    state = left(place, "/x", DEAD)
    assert place.load() == state
    assert json.loads(place.file.read_text())["processes"][0]["id"] == {"pid": DEAD.pid, "created": 1.0}
    assert [p.name for p in place.root.iterdir()] == ["mesh.json"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/x", "-x", "a b", "x" * 64, ".hidden", "a\n"])
def test_a_mesh_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(InvalidArgument, match="name = "):
        MeshDir(name)


def test_meshes_are_found_by_their_folders(place):
    MeshDir("a").root.mkdir()
    (place.root.parent / ".hidden").mkdir()
    (place.root.parent / "file").touch()
    assert [m.name for m in meshes()] == ["a", "m"]
