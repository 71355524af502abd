"""Ends what is left of a mesh: processes of its sessions, shared memory of its engines, its work folder."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from kvmesh.local import scratch
from kvmesh.local.state import MeshDir, MeshState, ProcessId

SHM = Path("/dev/shm")
# Seconds for a resource tracker to clean up, once all that it tracks for have ended.
TRACKER_PATIENCE = 1.0
INSTANCE = re.compile(r"[A-Za-z0-9_-]{4,64}")


def session_members(leader: ProcessId) -> list[ProcessId]:
    """Live processes of the session that `leader` was started as, itself included.

    Empty when the leader's number belongs to somebody else by now, or cannot be one of a session that we started.
    """
    # 0 is the session of processes from outside of a container; our own is not one of a child.
    if leader.pid <= 1 or leader.pid == os.getsid(0):
        return []
    current = ProcessId.of(leader.pid)
    if current is not None and abs(current.created - leader.created) >= 1:
        return []
    members: list[ProcessId] = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader.pid and os.stat(f"/proc/{pid}").st_uid == os.getuid():
                found = ProcessId.of(pid)
                if found is not None and found.created >= leader.created - 1 and found.alive():
                    members.append(found)
    return members


def send(target: ProcessId, number: signal.Signals) -> None:
    """Signals the process, unless it is gone."""
    if target.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(target.pid, number)


def wait_gone(targets: Iterable[ProcessId], timeout: float) -> bool:
    """Whether all have ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    left = [t for t in targets if t.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [t for t in left if t.alive()]
    return not left


def kill_session(leader: ProcessId, timeout: float = 5) -> None:
    """SIGKILL for every process of the session, until there is none; `timeout` seconds at most.

    Python's resource trackers are last, and get a moment: they remove what the others left in shared memory, and end.
    """
    deadline = time.monotonic() + timeout
    while (members := session_members(leader)) and time.monotonic() < deadline:
        trackers = [m for m in members if _is_tracker(m)]
        for member in members:
            if member not in trackers:
                send(member, signal.SIGKILL)
        wait_gone([m for m in members if m not in trackers], 1)
        if not wait_gone(trackers, TRACKER_PATIENCE):
            for tracker in trackers:
                send(tracker, signal.SIGKILL)


def _is_tracker(process: ProcessId) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker import main" in word for word in psutil.Process(process.pid).cmdline())
    return False


def remove_shared_memory(folder: Path) -> None:
    """Removes what the process whose run folder this is left in shared memory.

    SGLang leaves sglang_loads_<instance>_<digest>.shm when killed; the engine notes its instances in the file
    `instance`, one a line. KV pools have no names, and are gone with their processes.
    """
    try:
        lines = (folder / "instance").read_text(errors="replace").splitlines()
    except OSError:
        return
    for instance in (line.strip() for line in lines):
        if INSTANCE.fullmatch(instance):
            exact = re.compile(rf"sglang_loads_{re.escape(instance)}_[0-9a-f]{{8}}\.shm")
            for name in filter(exact.fullmatch, os.listdir(SHM)):
                with contextlib.suppress(OSError):
                    (SHM / name).unlink()


def remove_files(place: MeshDir, state: MeshState) -> None:
    """Removes everything of a stopped mesh but its logs and traces.

    Raises scratch.Refused, and removes nothing, when `state.work` is no work folder of this mesh.
    """
    work = Path(state.work)
    scratch.check_place(work, place.root)
    if os.path.lexists(work):
        scratch.check(work, place.root)
        for process in state.processes:
            if scratch.NAME.fullmatch(process.name):
                remove_shared_memory(work / process.name)
    scratch.remove(work, place.root)
    place.file.unlink(missing_ok=True)


def recover(place: MeshDir, timeout: float = 15) -> list[str]:
    """Ends what a dead supervisor left behind; returns the names of the processes that still ran.

    The caller holds the mesh's lock. Children get SIGTERM by themselves when the supervisor dies; what does not end by
    it within `timeout` seconds is killed. Raises scratch.Refused when mesh.json names a folder that is not ours.
    """
    state = place.load()
    if state is None:
        place.file.unlink(missing_ok=True)
        return []
    running = [p for p in state.processes if session_members(p.id)]
    for process in running:
        send(process.id, signal.SIGTERM)
    wait_gone([p.id for p in running], timeout)
    for process in state.processes:
        kill_session(process.id)
    remove_files(place, state)
    return [p.name for p in running]
