"""Starts the processes of a mesh, watches them, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from kvmesh.errors import AlreadyExists, DeadlineExceeded, Unavailable
from kvmesh.local import cleanup, scratch
from kvmesh.local.child import KILL_PATIENCE, Child, Spec
from kvmesh.local.state import MeshDir, MeshState, ProcessId, ProcessRecord

# Order of stopping: who depends on others goes first.
STOP_ORDER = ("router", "engine", "kvstore", "registry", "etcd")


class StartFailed(Unavailable):
    """A process ended, or the time was up, before the mesh was ready."""


class LocalMesh:
    """One named mesh, from the lock on its folder to the last file removed.

    Used as `async with`: leaving it stops everything. `deaths` gets each child that ends by itself.
    Raises AlreadyExists when a mesh of that name runs, StartFailed from `start`.
    """

    def __init__(self, place: MeshDir, model: str) -> None:
        self.place = place
        self.children: list[Child] = []
        self.deaths: asyncio.Queue[Child] = asyncio.Queue()
        self._model = model
        self._state: MeshState | None = None
        self._lock: TextIO | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> LocalMesh:
        await asyncio.to_thread(self._take_place)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def _take_place(self) -> None:
        self.place.root.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.place)
        try:
            cleanup.recover(self.place)
            for folder in (self.place.logs, self.place.traces):
                folder.mkdir(exist_ok=True)
            for log in self.place.logs.glob("*.log"):
                log.unlink(missing_ok=True)
            me = ProcessId.of(os.getpid())
            assert me is not None
            self._state = MeshState(self.place.name, me, self._model, str(scratch.make(self.place.root)))
            self.place.save(self._state)
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    @property
    def state(self) -> MeshState:
        """What mesh.json holds."""
        assert self._state is not None, "the mesh is used outside its `async with`"
        return self._state

    @property
    def work(self) -> Path:
        """Folder of everything that goes when the mesh stops; a process of the mesh has `work / name` to itself."""
        return Path(self.state.work)

    @property
    def certs(self) -> Path | None:
        """Folder of the certificates of a secure mesh."""
        return Path(self.state.certs) if self.state.certs else None

    def secure(self, hosts: Sequence[str]) -> Path:
        """Makes the certificates and keys of a secure mesh; their folder."""
        from kvmesh.local import secure

        folder = secure.prepare(self.work, hosts)
        self.state.certs = str(folder)
        self._save()
        return folder

    def _save(self) -> None:
        self.state.processes = [
            ProcessRecord(c.spec.name, c.spec.role, c.id, c.address, c.state) for c in self.children
        ]
        self.place.save(self.state)

    async def start(self, stages: Sequence[Callable[[LocalMesh], list[Spec]]], timeout: float) -> None:
        """Starts the stages one after another, the specs of one together, and waits until all is ready.

        Raises StartFailed; the caller then leaves the mesh.
        """
        begun = time.monotonic()
        starting = asyncio.create_task(self._run_stages(stages))
        death = asyncio.create_task(self.deaths.get())
        try:
            await asyncio.wait({starting, death}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise StartFailed(self._obituary(death.result()))
            if not starting.done():
                late = ", ".join(c.spec.name for c in self.children if c.ready_after is None)
                took = time.monotonic() - begun
                raise StartFailed(f"{late} not ready after {took:.0f} s; logs: {self.place.logs}")
            starting.result()
        finally:
            for task in (starting, death):
                task.cancel()
            await asyncio.gather(starting, death, return_exceptions=True)
        self.state.phase = "ready"
        self._save()

    def _obituary(self, child: Child) -> str:
        lines = "\n".join(f"    {line}" for line in child.last_lines(15)) or "    (its log is empty)"
        return f"{child.spec.name} {child.state} while the mesh was starting; the end of {child.spec.log}:\n{lines}"

    async def _run_stages(self, stages: Sequence[Callable[[LocalMesh], list[Spec]]]) -> None:
        for stage in stages:
            children = [await self._spawn(spec) for spec in stage(self)]
            try:
                async with asyncio.TaskGroup() as group:
                    for child in children:
                        group.create_task(self._wait_ready(child))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _spawn(self, spec: Spec) -> Child:
        folder = self.work / spec.name
        folder.mkdir(exist_ok=True)
        environment = {**spec.environment, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        child = await Child.start(dataclasses.replace(spec, environment=environment))
        self.children.append(child)
        self._save()
        self._watchers.append(asyncio.create_task(self._watch(child)))
        return child

    async def _wait_ready(self, child: Child) -> None:
        await child.wait_ready()
        self._save()

    async def _watch(self, child: Child) -> None:
        await child.wait()
        if self._stopping:
            return
        try:
            await self._bury(child)
        finally:
            self._save()
            self.deaths.put_nowait(child)

    async def _bury(self, child: Child) -> None:
        """Ends what the child's processes left: the rest of its session, shared memory, temporary files."""
        await child.kill()
        await asyncio.to_thread(cleanup.remove_shared_memory, self.work / child.spec.name)
        await asyncio.to_thread(scratch.remove_inside, self.work, self.place.root, child.spec.name)

    async def stop(self) -> None:
        """Stops every process in reverse order and removes all but logs and traces. May be called twice."""
        if self._lock is None:
            return
        self._stopping = True
        self.state.phase = "stopping"
        try:
            self._save()
            with contextlib.suppress(asyncio.CancelledError):
                await self._stop_children()
        finally:
            # A second interrupt ends up here with processes left.
            for child in self.children:
                cleanup.kill_session(child.id)
            try:
                if self._watchers:
                    await asyncio.wait(self._watchers, timeout=KILL_PATIENCE)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """Gives back files and lock; the last step, whatever happened before."""
        for watcher in self._watchers:
            watcher.cancel()
        try:
            cleanup.remove_files(self.place, self.state)
        finally:
            assert self._lock is not None
            self._lock.close()
            self._lock = None

    async def _stop_children(self) -> None:
        for role in STOP_ORDER:
            await asyncio.gather(*(c.stop() for c in self.children if c.spec.role == role))


def take_lock(place: MeshDir, timeout: float = 0) -> TextIO:
    """The mesh's lock, held until the file is closed. Raises AlreadyExists while somebody else has it."""
    deadline = time.monotonic() + timeout
    file = open(place.lock, "a")  # noqa: SIM115
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise AlreadyExists(
                    f"a mesh named {place.name!r} is running; stop it with `kvmesh down --name {place.name}`, "
                    "or start this one under another --name"
                ) from None
        time.sleep(0.05)


def stop_mesh(place: MeshDir, timeout: float = 60) -> str:
    """Stops the mesh from outside, also one whose supervisor is dead; returns in words what was done.

    Raises DeadlineExceeded when something holds on to the mesh all the same.
    """
    if not place.root.is_dir():
        return f"no mesh named {place.name!r} is running"
    state = place.load()
    running = state is not None and state.supervisor.alive()
    if state is not None and running:
        cleanup.send(state.supervisor, signal.SIGTERM)
        if not cleanup.wait_gone([state.supervisor], timeout):
            cleanup.send(state.supervisor, signal.SIGKILL)
            cleanup.wait_gone([state.supervisor], 5)
    try:
        lock = take_lock(place, 5)
    except AlreadyExists:
        raise DeadlineExceeded(f"the mesh {place.name!r} did not stop; logs: {place.logs}") from None
    with lock:
        left = cleanup.recover(place)
    if running:
        return f"stopped the mesh {place.name!r}" + (f"; had to end {', '.join(left)}" if left else "")
    if state is None:
        return f"no mesh named {place.name!r} is running"
    rest = f", which had left {', '.join(left)} running" if left else ""
    return f"cleaned up after the mesh {place.name!r}, whose supervisor was dead{rest}"
