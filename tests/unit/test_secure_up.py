"""`kvmesh up --secure` as a process, and the commands that make certificates and keys."""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from secure_harness import methods, refusal

from kvmesh import apikeys
from kvmesh.cli import cli
from kvmesh.errors import InvalidArgument, PermissionDenied, ResourceExhausted, Unauthenticated
from kvmesh.grpcx import channel
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import stop_mesh

CODES = grpc.StatusCode
IDS = "301,317,323,307,311,331,302,299"


def up(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kvmesh.cli", "up", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env={**os.environ, "COLUMNS": "160"})


async def kvmesh(*words: str, code: int = 0, **environment: str) -> str:
    """Output and errors of a command."""
    done = await asyncio.to_thread(CliRunner().invoke, cli, list(words), env=environment)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    for name in ("KVMESH_ROUTER", "KVMESH_NAME", "KVMESH_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(120)
async def test_a_secure_mesh_from_the_command_line(home: Path) -> None:
    try:
        options = ["--secure", "--sim", "tiny-cpu", "--stores", "1", "--workers", "2", "--log-level", "debug"]
        started = await asyncio.to_thread(up, *options, "--detach", "--name", "s")
        assert started.returncode == 0, started.stderr
        assert "OpenAI's API at https://" in started.stderr and "SIMULATED engines: tiny-cpu" in started.stderr
        await _look_at(MeshDir("s"))
    finally:
        said = await asyncio.to_thread(stop_mesh, MeshDir("s"))
    assert said.startswith("stopped"), said
    left = {path.name for path in MeshDir("s").root.iterdir()}
    assert left <= {"lock", "logs", "traces", "up.log"}


async def _look_at(place: MeshDir) -> None:
    state = place.load()
    assert state is not None and state.certs
    certs = Path(state.certs)
    assert not certs.stat().st_mode & 0o077 and not (certs / "ca.key").exists()
    # The commands find what they need in mesh.json; without it they are refused.
    ask = ["generate", "--tokens", IDS, "--strategy", "prefill_decode", "--param", "min_remote=1"]
    assert "sent" in await kvmesh(*ask, "--name", "s")
    await kvmesh("strategy", "set", "prefill_decode", "--name", "s")
    router = state.address("router")
    elsewhere = ["status", "--router", router]
    await kvmesh(*elsewhere, code=1)
    given = ["--tls-ca", f"{certs}/ca.pem", "--tls-cert", f"{certs}/client.pem", "--tls-key", f"{certs}/client.key"]
    assert "API key is needed" in await kvmesh(*elsewhere, *given, code=1)
    key = (certs / "admin.apikey").read_text().strip()
    shown = await kvmesh(*elsewhere, *given, KVMESH_API_KEY=key, COLUMNS="160")
    assert "engine-1" in shown and "kvstore-0" in shown
    assert await kvmesh("health", router, *given) == "serving\n"
    # Each process, by itself.
    for process in state.processes:
        if process.role in ("registry", "engine", "router"):
            service = {"registry": "Registry", "engine": "Engine", "router": "Router"}[process.role]
            async with channel(process.address) as plain:
                code, _ = await refusal(plain, next(methods(service)))
            assert code is CODES.UNAVAILABLE, process.name
    with pytest.raises((ssl.SSLError, OSError)):
        bare = ssl.create_default_context(cafile=certs / "ca.pem")
        reader, writer = await asyncio.open_connection(*state.address("etcd").split(":"), ssl=bare)
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        if not await reader.read(1):
            raise ssl.SSLError("closed")
    secrets = [(certs / f"{scope}.apikey").read_text().strip() for scope in apikeys.SCOPES]
    files = [*place.logs.iterdir(), *place.traces.iterdir(), place.root / "up.log", place.file]
    text = "".join(path.read_text(errors="replace") for path in files).replace(" ", "")
    assert "remote_send" in text and "ready" in text
    for secret in (*secrets, "PRIVATEKEY", IDS[:7], IDS[8:15]):
        assert secret not in text, text[max(0, text.index(secret) - 300) : text.index(secret) + 100]


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_certs_makes_a_ca_and_more_under_it(home: Path) -> None:
    assert "client.pem" in run("certs", "c", "--host", "gpu1", "--host", "10.0.0.7")
    folder = home / "c"
    assert {p.name for p in folder.iterdir()} == {
        f"{n}.{kind}" for n in ("ca", "service", "client") for kind in ("pem", "key")
    }
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.glob("*.key"))
    run("certs", "c", "--issue", "engine-7", "--host", "gpu7")
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    for name in ("service", "client", "engine-7"):
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    text = subprocess.run(
        ["openssl", "x509", "-in", str(folder / "service.pem"), "-noout", "-text"], capture_output=True, text=True
    ).stdout
    assert "DNS:gpu1" in text and "IP Address:10.0.0.7" in text and "URI:urn:kvmesh:service" in text
    former = {name: (folder / name).read_bytes() for name in ("service.pem", "service.key", "client.pem")}
    assert "a service, renewed" in run("certs", "c", "--renew", "service")
    assert "a client, renewed" in run("certs", "c", "--renew", "client")
    assert all((folder / name).read_bytes() != content for name, content in former.items())
    assert stat.S_IMODE((folder / "service.key").stat().st_mode) == 0o600 and len(list(folder.iterdir())) == 8
    context.load_cert_chain(folder / "service.pem", folder / "service.key")
    command = ["openssl", "x509", "-in", str(folder / "service.pem"), "-noout", "-ext", "subjectAltName"]
    san = subprocess.run(command, capture_output=True, text=True)
    assert "DNS:gpu1" in san.stdout and san.stdout.splitlines()[-1].strip() in text
    run("certs", "d")
    (folder / "foreign.pem").write_bytes((home / "d" / "service.pem").read_bytes())
    for again in (["--renew", "foreign"], ["--renew", "nobody"], ["--renew", "../d/service"], ["--renew", "ca"]):
        assert run("certs", "c", *again, code=1).startswith("Error: ")
    for again in (["c"], ["c", "--issue", "engine-7"], ["c", "--issue", "../x"], ["c", "--issue", "ca"]):
        assert run("certs", *again, code=1).startswith("Error: ")


def test_key_prints_a_key_that_the_file_does_not_hold(home: Path) -> None:
    key = run("key", "keys.toml", "alice", "--max-running", "1").strip()
    admin = run("key", "keys.toml", "root", "--scope", "admin").strip()
    file = home / "keys.toml"
    assert key not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = apikeys.ApiKeys(str(file))
    alice = keys.find(f"Bearer {key}")
    alice.check("generate", "this")
    with pytest.raises(PermissionDenied, match="'alice'"):
        alice.check("admin", "that")
    keys.find(f"bearer {admin}").check("generate", "this")
    with keys.running(alice, 1), pytest.raises(ResourceExhausted), keys.running(alice, 1):
        pass
    with keys.running(alice, 1):
        pass
    for header in ("", key, f"Basic {key}", "Bearer ", f"Bearer {key}x"):
        with pytest.raises(Unauthenticated):
            keys.find(header)
    with pytest.raises(InvalidArgument, match="'alice' is in"):
        apikeys.add(file, "alice", ["generate"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "x is no table"),
        ("[a]\nsha256 = 'ff'\nscopes = ['admin']", "64 hexadecimal"),
        (f"[a]\nsha256 = '{'0' * 64}'\nscopes = ['root']", "scopes"),
        (f"[a]\nsha256 = '{'0' * 64}'\nscopes = ['admin']\nmax_running = -1", "max_running = -1"),
        (f"[a]\nkey = 'secret'\nsha256 = '{'0' * 64}'\nscopes = ['admin']", "no setting 'key'"),
        ("[a", "keys.toml"),
    ],
)
def test_a_bad_key_file_is_told_with_its_place(home: Path, text: str, says: str) -> None:
    (home / "keys.toml").write_text(text)
    with pytest.raises(InvalidArgument, match=says) as caught:
        apikeys.ApiKeys(str(home / "keys.toml"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["router", "--tls-ca", "ca.pem"],
        ["registry", "--embedded", "--tls-cert", "x", "--tls-key", "y"],
        ["engine", "--sim", "tiny-cpu", "--max-message", "1KiB"],
        ["router", "--max-prompt-tokens", "-1"],
    ],
)
def test_settings_that_do_not_fit_are_refused(home: Path, arguments: list[str]) -> None:
    run(*arguments, code=2)
