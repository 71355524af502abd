"""Small real processes for tests of the local mesh: they announce an address, fail, hang, or leave things behind."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from kvmesh.local.child import Spec
from kvmesh.local.state import MeshDir, ProcessId
from kvmesh.local.supervisor import LocalMesh

# Announces, and goes on until SIGTERM.
OBEDIENT = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
pathlib.Path(sys.argv[1]).write_text("127.0.0.1:1")
signal.pause()
"""
# Announces, and lets no SIGTERM stop it.
STUBBORN = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text("127.0.0.1:1")
while True: signal.pause()
"""
# Has a child of its own that lets no SIGTERM stop it, writes the child's number, and announces.
PARENT = """
import pathlib, signal, subprocess, sys
code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)\\nwhile True: signal.pause()"
child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path(sys.argv[1] + ".child").write_text(str(child.pid))
pathlib.Path(sys.argv[1]).write_text("127.0.0.1:1")
signal.pause()
"""
# Has a child that holds a named semaphore, which Python's resource tracker removes after it; ends at SIGTERM at once.
TRACKED = """
import multiprocessing, pathlib, signal, sys, time
def hold(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lock = multiprocessing.get_context("spawn").Lock()
    pathlib.Path(path + ".semaphore").write_text(lock._semlock.name)
    pathlib.Path(path).write_text("127.0.0.1:1")
    while True: time.sleep(60)
if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=hold, args=(sys.argv[1],)).start()
    multiprocessing.resource_tracker.ensure_running()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pause()
"""
# Never announces.
SLOW = "import signal; signal.pause()"
FAILING = "import sys; print('about to fail'); sys.exit('no such model')"
# A gRPC server with the standard health service, which serves once it has announced itself.
SERVING = """
import concurrent.futures, pathlib, sys, grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
pathlib.Path(sys.argv[1]).write_text(f"127.0.0.1:{port}\\n")
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
server.wait_for_termination()
"""


async def until(holds: Callable[[], object], timeout: float = 20) -> None:
    """Waits until `holds()` is true: for what other processes do, which nothing here can announce."""
    async with asyncio.timeout(timeout):
        while not holds():
            await asyncio.sleep(0.01)


async def announced(path: Path) -> str:
    """Waits for the content of a file."""
    await until(lambda: content(path), 3600)
    return content(path)


def content(path: Path) -> str:
    """The content of a file; empty while there is none."""
    return path.read_text().strip() if path.exists() else ""


def script(
    mesh: LocalMesh,
    name: str,
    code: str = OBEDIENT,
    role: str = "engine",
    ready: Callable[[Path], Awaitable[str]] = announced,
    patience: float = 5,
) -> Spec:
    """A process that runs `code` with the path to announce itself at."""
    path = mesh.work / f"{name}.address"
    flags = [] if "import grpc" in code or ", grpc" in code else ["-S"]
    command = [sys.executable, *flags, "-c", code, str(path)]
    return Spec(name, role, command, lambda: ready(path), mesh.place.logs / f"{name}.log", patience=patience)


def one(name: str, code: str = OBEDIENT, **fields: object) -> list[Callable[[LocalMesh], list[Spec]]]:
    """Stages of one process."""
    return [lambda mesh: [script(mesh, name, code, **fields)]]  # type: ignore[arg-type]


def nothing_left(place: MeshDir, *processes: ProcessId) -> None:
    """Asserts that a mesh left no process and no file but its logs and traces."""
    assert not [p for p in processes if p.alive()]
    assert {p.name for p in place.root.iterdir()} <= {"lock", "logs", "traces", "up.log"}


async def gone(pid: int) -> None:
    """Waits until no process has this number, or only a zombie."""
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
