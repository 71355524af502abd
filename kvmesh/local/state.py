"""Where a local mesh keeps its files, and mesh.json: what runs, and where it listens."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import psutil

from kvmesh.config import home
from kvmesh.errors import InvalidArgument
from kvmesh.local.scratch import NAME


@dataclasses.dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    # Seconds since the epoch.
    created: float

    @staticmethod
    def of(pid: int) -> ProcessId | None:
        """The process that has this number now; None when it is gone."""
        try:
            return ProcessId(pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            # The kernel counts in ticks since boot: a second of slack is for a clock that was set meanwhile.
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclasses.dataclass
class ProcessRecord:
    """One process of the mesh."""

    name: str
    role: str
    id: ProcessId
    address: str = ""
    # "starting", "ready" or how it ended.
    state: str = "starting"


@dataclasses.dataclass
class MeshState:
    """The content of mesh.json."""

    name: str
    supervisor: ProcessId
    model: str
    # Folder of everything that goes when the mesh stops (kvmesh.local.scratch): addresses, etcd's data, sockets.
    work: str
    # "starting", "ready" or "stopping".
    phase: str = "starting"
    processes: list[ProcessRecord] = dataclasses.field(default_factory=list)
    # Folder with what a secure mesh's commands show; empty: it is not secure.
    certs: str = ""

    def address(self, role: str) -> str:
        """Where the first process of `role` listens; empty when there is none."""
        return next((p.address for p in self.processes if p.role == role), "")


@dataclasses.dataclass(frozen=True)
class MeshDir:
    """The folder of one named mesh, `home()/run/<name>`. Raises InvalidArgument for a name that is no file name."""

    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InvalidArgument(f"name = {self.name!r} is not 1 to 63 of A-Z a-z 0-9 . _ - (the first no sign)")

    @property
    def root(self) -> Path:
        """The folder itself; absolute."""
        return home().absolute() / "run" / self.name

    @property
    def lock(self) -> Path:
        """Locked by the supervisor as long as it lives."""
        return self.root / "lock"

    @property
    def logs(self) -> Path:
        """One file a process; those of the last run are kept."""
        return self.root / "logs"

    @property
    def traces(self) -> Path:
        """Span files; kept from run to run."""
        return self.root / "traces"

    @property
    def file(self) -> Path:
        """mesh.json."""
        return self.root / "mesh.json"

    def load(self) -> MeshState | None:
        """What mesh.json says; None when there is none or it is not ours to read."""
        try:
            raw = json.loads(self.file.read_text())
            processes = [ProcessRecord(**{**p, "id": ProcessId(**p["id"])}) for p in raw.pop("processes")]
            return MeshState(**{**raw, "supervisor": ProcessId(**raw["supervisor"]), "processes": processes})
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, state: MeshState) -> None:
        """Replaces mesh.json in one step."""
        scratch = self.file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
        os.replace(scratch, self.file)


def meshes() -> list[MeshDir]:
    """Every mesh that has a folder, running or not."""
    root = home().absolute() / "run"
    return [MeshDir(p.name) for p in sorted(root.glob("*")) if p.is_dir() and NAME.fullmatch(p.name)]
