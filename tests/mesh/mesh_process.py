"""A real mesh for tests: `kvmesh up` in a home of its own, and the proof that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from kvmesh.local import cleanup, launch
from kvmesh.local.state import MeshDir, MeshState, ProcessId

MARK = "KVMESH_TEST_MARK"
START_S, STOP_S, SETTLE_S, GONE_S = 240.0, 60.0, 15.0, 60.0
SHM = Path("/dev/shm")


class RunningMesh:
    """The processes of one `kvmesh up`, and engines started beside it. Whoever starts it stops it."""

    def __init__(self, home: Path, name: str, model: Path, arguments: Sequence[str]) -> None:
        self.home, self.name, self.model = home, name, model
        self._arguments = arguments
        self._mark = uuid.uuid4().hex
        self._shm_before = set(os.listdir(SHM))
        self._processes: list[subprocess.Popen[bytes]] = []
        # What each process was started as, and its run folder.
        self._sessions: dict[ProcessId, Path] = {}
        self._beside: dict[str, tuple[str, int]] = {}
        self._run_dirs: list[tempfile.TemporaryDirectory[str]] = []

    @property
    def root(self) -> Path:
        """The mesh's folder."""
        return self.home / "run" / self.name

    @property
    def logs(self) -> dict[str, str]:
        """The log of each process, by file name."""
        files = [*self.root.glob("logs/*.log"), *self.home.glob("beside-*.log")]
        return {path.name: path.read_text(errors="replace") for path in files}

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """KVMESH_HOME is the mesh's, for as long as this lasts."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVMESH_HOME", str(self.home))
            yield

    @property
    def state(self) -> MeshState:
        """What mesh.json says now."""
        with self.at_home():
            state = MeshDir(self.name).load()
        assert state is not None, "the mesh has no mesh.json"
        return state

    def environment(self) -> dict[str, str]:
        """For processes of the mesh."""
        return {**os.environ, "KVMESH_HOME": str(self.home), MARK: self._mark}

    def command(self, *words: str) -> list[str]:
        """A kvmesh command line."""
        return [sys.executable, "-P", "-m", "kvmesh.cli", *words]

    async def run(self, *words: str, timeout: float = 60.0) -> tuple[int, str, str]:
        """Runs a kvmesh command: (exit status, output, errors)."""
        process = await asyncio.create_subprocess_exec(
            *self.command(*words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment(), "COLUMNS": "160"},
        )
        try:
            async with asyncio.timeout(timeout):
                out, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode(), errors.decode()

    def _spawn(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # Ended by the kernel should the test process die.
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [*launcher, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(environment),
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def start(self) -> None:
        """Returns when the mesh is ready."""
        log = self.home / f"{self.name}-up.log"
        given = ["up", "--name", self.name, "--model", str(self.model), *self._arguments]
        supervisor = self._spawn(self.command(*given), log, self.environment())
        deadline = time.monotonic() + START_S
        state = None
        while state is None or state.phase != "ready":
            if supervisor.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the mesh did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
            with self.at_home():
                state = MeshDir(self.name).load()
        self._sessions |= {p.id: Path(state.work) / p.name for p in state.processes}

    def address(self, name: str) -> str:
        """Where a process listens."""
        if name in self._beside:
            return self._beside[name][0]
        return next(p.address for p in self.state.processes if p.name == name)

    def pid(self, name: str) -> int:
        """The number of a process."""
        if name in self._beside:
            return self._beside[name][1]
        return next(p.id.pid for p in self.state.processes if p.name == name)

    @property
    def engines(self) -> list[str]:
        """Names of the engines that run."""
        names = {p.name for p in self.state.processes if p.role == "engine"} | set(self._beside)
        return sorted(name for name in names if self.alive(name))

    def alive(self, name: str) -> bool:
        """Whether a process runs."""
        found = ProcessId.of(self.pid(name))
        return found is not None and found.alive()

    def kill(self, name: str, part: str = "") -> None:
        """SIGKILL for a process, or for that one of its session whose command has `part` in it.

        Returns when all of the session has ended, by itself or by the supervisor's hand.
        """
        leader = ProcessId.of(self.pid(name))
        assert leader is not None, f"{name} is gone already"
        members = cleanup.session_members(leader)
        target = next(m for m in members if part in " ".join(psutil.Process(m.pid).cmdline())) if part else leader
        os.kill(target.pid, signal.SIGKILL)
        for process in self._processes:
            if process.pid == target.pid:
                process.wait(10)
        assert cleanup.wait_gone(members, GONE_S), f"of {name} there is left: {cleanup.session_members(leader)}"

    def freeze(self, name: str) -> None:
        """SIGSTOP for all processes of one that runs."""
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> None:
        leader = ProcessId.of(self.pid(name))
        assert leader is not None, f"{name} is gone already"
        for member in cleanup.session_members(leader):
            cleanup.send(member, number)

    def kill_whole(self, name: str) -> None:
        """SIGKILL for all processes of one, also when they are stopped, and away with what they leave."""
        leader = ProcessId.of(self.pid(name))
        assert leader is not None, f"{name} is gone already"
        cleanup.send(leader, signal.SIGKILL)
        cleanup.kill_session(leader)
        for process in self._processes:
            if process.pid == leader.pid:
                process.wait(10)
        assert cleanup.wait_gone([leader], 20) and not cleanup.session_members(leader)
        if (folder := self._sessions.get(leader)) is not None:
            cleanup.remove_shared_memory(folder)

    def start_beside(self, name: str) -> None:
        """Starts an engine under the name of one that is dead, with `kvmesh engine`; returns once it has announced."""
        announced, process, log = self._engine_beside(name)
        deadline = time.monotonic() + START_S
        while not announced.exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        self._beside[name] = (announced.read_text().strip(), process.pid)

    async def restart_beside(self, name: str) -> None:
        """As start_beside, while the event loop goes on."""
        announced, process, log = self._engine_beside(name)
        async with asyncio.timeout(2 * START_S):
            while not announced.exists():
                assert process.poll() is None, log.read_text()[-4000:]
                await asyncio.sleep(0.1)
        self._beside[name] = (announced.read_text().strip(), process.pid)

    def _engine_beside(self, name: str) -> tuple[Path, subprocess.Popen[bytes], Path]:
        """(where it announces, the process, its log)."""
        folder = self.home / f"beside-{name}-{len(self._processes)}"
        folder.mkdir()
        announced = folder / "address"
        # A socket's path has 107 bytes at most.
        made = tempfile.TemporaryDirectory(prefix="kvmesh-", dir="/tmp", ignore_cleanup_errors=True)
        self._run_dirs.append(made)
        command = self.command(
            *("engine", "--name", name, "--model", str(self.model), "--registry", self.address("registry")),
            *("--announce", str(announced), "--run-dir", made.name, "--kv-tokens", "12288"),
            *("--trace-ratio", "0"),
        )
        environment = {**self.environment(), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        log = self.home / f"{folder.name}.log"
        process = self._spawn(command, log, environment)
        me = ProcessId.of(process.pid)
        assert me is not None
        self._sessions[me] = Path(made.name)
        return announced, process, log

    def start_store_beside(self, name: str, *arguments: str) -> None:
        """Starts a KV store under the name of one that is dead; returns once it has announced."""
        folder = self.home / f"beside-{name}-{len(self._processes)}"
        folder.mkdir()
        announced = folder / "address"
        command = self.command("kvstore", "--name", name, "--registry", self.address("registry"), *arguments)
        command += ["--announce", str(announced), "--trace-dir", str(self.root / "traces")]
        process = self._spawn(command, self.home / f"{folder.name}.log", self.environment())
        deadline = time.monotonic() + START_S
        while not announced.exists():
            assert process.poll() is None and time.monotonic() < deadline, self.logs[f"{folder.name}.log"][-4000:]
            time.sleep(0.05)
        self._beside[name] = (announced.read_text().strip(), process.pid)

    def stop(self) -> None:
        """Ends everything as a user would, then kills what is left."""
        try:
            for process in reversed(self._processes):
                if process.poll() is None:
                    process.terminate()
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                    process.wait(10)

    def clean_beside(self) -> None:
        """Does for engines started beside the mesh what its supervisor does for the others."""
        folders = {made.name for made in self._run_dirs}
        for leader, folder in self._sessions.items():
            if str(folder) in folders:
                cleanup.kill_session(leader)
                cleanup.remove_shared_memory(folder)
        for made in self._run_dirs:
            made.cleanup()

    def left(self, patience: float = SETTLE_S) -> list[str]:
        """Processes and shared memory that are still there after `stop`, waiting `patience` seconds for them to go."""
        deadline = time.monotonic() + patience
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _left(self) -> list[str]:
        left = [
            f"process {m.pid} of session {leader.pid}"
            for leader in self._sessions
            for m in cleanup.session_members(leader)
        ]
        mark = f"{MARK}={self._mark}".encode()
        mapped: set[int] = set()
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (proc / "environ").read_bytes().split(b"\0"):
                    left.append(f"process {proc.name}: {(proc / 'cmdline').read_bytes().decode()}")
                lines = (proc / "maps").read_text().splitlines()
                # A semaphore is mapped under another name than it has: its number tells.
                mapped.update(int(line.split(maxsplit=5)[4]) for line in lines if str(SHM) in line)
        # What somebody else's process has mapped is in use, and not left by us: ours have all ended.
        for name in sorted(set(os.listdir(SHM)) - self._shm_before):
            with contextlib.suppress(FileNotFoundError):
                if (SHM / name).stat().st_ino not in mapped:
                    left.append(f"/dev/shm/{name}")
        return left


def running(mesh: RunningMesh) -> Iterator[RunningMesh]:
    """The mesh as a fixture's values: started, stopped whatever happens, and proven to have left nothing."""
    try:
        mesh.start()
        yield mesh
    finally:
        mesh.stop()
        mesh.clean_beside()
    logs = mesh.logs
    assert mesh.left() == []
    for name, text in logs.items():
        assert "Traceback" not in text, f"{name}:\n{text[-6000:]}"
