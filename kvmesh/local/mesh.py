"""Which processes make up a local mesh, and how each says that it is ready."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvmesh.local import secure
from kvmesh.local.child import Spec
from kvmesh.local.options import MeshOptions
from kvmesh.local.supervisor import LocalMesh
from kvmesh.tls import Tls

Stage = Callable[[LocalMesh], list[Spec]]


def stages(options: MeshOptions, model: Path | None, engine_args: list[str]) -> list[Stage]:
    """etcd; then the registry; then all engines, stores and the router together. `model`: None if it is simulated."""

    def etcd(mesh: LocalMesh) -> list[Spec]:
        from kvmesh.local.etcd import command, environment, free_ports

        certs = mesh.secure(hosts(options)) if options.secure else None
        client, peer = free_ports(2)
        line = command(mesh.work / "etcd" / "data", client, peer, secure=certs is not None)
        if certs is not None:
            line += secure.etcd_flags(certs)
        log = mesh.place.logs / "etcd.log"
        return [Spec("etcd", "etcd", line, lambda: etcd_ready(client, certs), log, environment())]

    def registry(mesh: LocalMesh) -> list[Spec]:
        etcd_address = next(c.address for c in mesh.children if c.spec.role == "etcd")
        return [_service(mesh, options, "registry", "registry", ["--etcd", etcd_address])]

    def workers(mesh: LocalMesh) -> list[Spec]:
        registry = ["--registry", next(c.address for c in mesh.children if c.spec.role == "registry")]
        names = [f"engine-{i}" for i in range(options.engines)]
        engines = [_engine(mesh, options, name, model, [*registry, *engine_args]) for name in names]
        waits = [*registry, "--wait-engines", str(options.engines), "--http", options.http]
        waits += ["--workers", str(options.workers)]
        if options.strategy_dir:
            waits += ["--strategy-dir", str(Path(options.strategy_dir).expanduser().resolve())]
        stores = [_store(mesh, options, f"kvstore-{i}", registry) for i in range(options.stores)]
        return [*engines, *stores, _service(mesh, options, "router", "router", waits, options.listen)]

    return [etcd, registry, workers]


def _engine(mesh: LocalMesh, options: MeshOptions, name: str, model: Path | None, arguments: list[str]) -> Spec:
    own = ["--name", name, "--dtype", options.dtype, "--run-dir", str(mesh.work / name)]
    own += ["--model", str(model)] if model is not None else ["--sim", options.sim]
    if options.kv_tokens:
        own += ["--kv-tokens", str(options.kv_tokens)]
    # Several engines share the cores: one thread each, unless the user says otherwise.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return _service(mesh, options, name, "engine", [*own, *arguments], environment=environment, patience=15)


def _store(mesh: LocalMesh, options: MeshOptions, name: str, registry: list[str]) -> Spec:
    own = ["--name", name, "--memory", options.store_memory]
    if options.sim:
        own += ["--sim", options.sim]
    if options.store_disk:
        from kvmesh.sizes import parse_place

        folder, size = parse_place(options.store_disk, "store_disk")
        own += ["--disk", f"{Path(folder).expanduser().resolve() / name}:{size}"]
    # What is still to be written reaches the disk at the end.
    return _service(mesh, options, name, "kvstore", [*own, *registry], patience=15)


def _service(
    mesh: LocalMesh,
    options: MeshOptions,
    name: str,
    role: str,
    arguments: list[str],
    listen: str = "127.0.0.1:0",
    environment: dict[str, str] | None = None,
    patience: float = 5,
) -> Spec:
    announced = mesh.work / f"{name}.address"
    common = {
        "--listen": listen,
        "--announce": str(announced),
        "--log-level": options.log_level,
        "--trace-ratio": str(options.trace_ratio),
        "--otlp-endpoint": options.otlp_endpoint,
        "--trace-dir": options.trace_dir or str(mesh.place.traces),
    }
    flags = [part for pair in common.items() for part in pair]
    certs = mesh.certs if options.secure else None
    if certs is not None:
        flags += secure.service_flags(certs, role)
    command = [sys.executable, "-P", "-m", "kvmesh.cli", role, *flags, *arguments]
    log = mesh.place.logs / f"{name}.log"
    ready = partial(service_ready, announced, certs)
    return Spec(name, role, command, ready, log, environment or dict(os.environ), patience)


def hosts(options: MeshOptions) -> list[str]:
    """What the router's certificate has to be good for, besides this machine's name and loopback."""
    from kvmesh.grpcx import split_address

    given = [split_address(address)[0] for address in (options.listen, options.http) if address]
    return [host for host in given if host not in ("0.0.0.0", "::")]


def _shown(certs: Path | None) -> Tls | None:
    """What a command of the mesh shows."""
    return None if certs is None else Tls.read(*(str(certs / n) for n in ("ca.pem", "client.pem", "client.key")))


def http_address(mesh: LocalMesh) -> str:
    """HOST:PORT of the router's HTTP door; empty when there is none."""
    return _content(mesh.work / "router.address.http")


async def service_ready(announced: Path, certs: Path | None = None) -> str:
    """Waits for the address that a service announces, and until its health says SERVING. The caller bounds the wait."""
    from kvmesh.grpcx import wait_serving

    address = _content(announced)
    while not address:
        await asyncio.sleep(0.05)
        address = _content(announced)
    await wait_serving(address, timeout=3600, tls=_shown(certs))
    return address


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


async def etcd_ready(port: int, certs: Path | None = None) -> str:
    """Waits until etcd has a leader. The caller bounds the wait."""
    from kvmesh.local.etcd import healthy

    serves = await healthy(port, certs=certs)
    while not serves:
        await asyncio.sleep(0.05)
        serves = await healthy(port, certs=certs)
    return f"127.0.0.1:{port}"


def resolve_model(path: str) -> tuple[Path, bool]:
    """(folder, whether it is the tiny one). Raises InvalidArgument for a folder without config.json."""
    from kvmesh.errors import InvalidArgument
    from kvmesh.local.tiny_model import tiny_model

    if not path:
        return tiny_model(), True
    folder = Path(path).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise InvalidArgument(f"model = {path!r} has no config.json: give the folder of a Hugging Face model")
    return folder, False
