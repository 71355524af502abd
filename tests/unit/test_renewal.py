"""Certificates that are renewed while a mesh runs."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import grpc.aio
import pytest
from secure_harness import SecureMesh, make_certificates

from kvmesh.certs import Authority
from kvmesh.grpcx import channel
from kvmesh.renewal import Files
from kvmesh.tls import Tls

CALL = "/test.Echo/Call"


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    with patch("kvmesh.renewal.LOOK_S", 0.02):
        yield


def paths(folder: Path, name: str = "service") -> tuple[str, str, str]:
    return str(folder / "ca.pem"), str(folder / f"{name}.pem"), str(folder / f"{name}.key")


def digest(pem: bytes) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest()


async def until(condition: Any, timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)


async def test_files_are_taken_when_they_are_whole_and_fit(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    make_certificates(folder)
    files = Files(paths(folder))
    first = files.now()
    await asyncio.sleep(0.05)
    assert files.now() is first
    Authority.read(folder).issue(folder, "next", "service")
    # The key is there, and its certificate is on its way; then it is half written.
    shutil.copy(folder / "next.key", folder / "service.key")
    for pem in (first.certificate, (folder / "next.pem").read_bytes()[:300], b"nothing"):
        (folder / "service.pem").write_bytes(pem)
        await asyncio.sleep(0.05)
        assert files.now() is first
    shutil.copy(folder / "next.pem", folder / "service.pem")
    await until(lambda: files.now() is not first)
    assert files.now().certificate == (folder / "next.pem").read_bytes()
    (folder / "service.key").unlink()
    await asyncio.sleep(0.05)
    assert files.now().key == (folder / "next.key").read_bytes()


class Echo:
    """A server that says which certificate the caller has shown; a stream says so once, and then what it is sent."""

    async def call(self, request: bytes, context: Any) -> bytes:
        (pem,) = context.auth_context()["x509_pem_cert"]
        return digest(pem).encode()

    async def stream(self, requests: Any, context: Any) -> Any:
        yield await self.call(b"", context)
        async for request in requests:
            yield request

    def add_to(self, server: grpc.aio.Server) -> None:
        methods = {
            "Call": grpc.unary_unary_rpc_method_handler(self.call),
            "Stream": grpc.stream_stream_rpc_method_handler(self.stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))


@asynccontextmanager
async def echoing(folder: Path) -> AsyncIterator[int]:
    """An Echo with the certificates of `folder`; its port."""
    server = grpc.aio.server()
    Echo().add_to(server)
    tls = Tls.read(*paths(folder))
    assert tls is not None
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(True))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def test_channels_show_what_the_files_hold_and_streams_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    make_certificates(folder)
    shown = Tls.read(*paths(folder, "client"))
    async with echoing(folder) as port:
        async with channel(f"127.0.0.1:{port}", shown) as ch:
            call = ch.unary_unary(CALL)
            first = digest((folder / "client.pem").read_bytes()).encode()
            stream = ch.stream_stream("/test.Echo/Stream")(timeout=30)
            assert await stream.read() == first and await call(b"", timeout=10) == first
            Authority.read(folder).renew(folder, "client")
            second = digest((folder / "client.pem").read_bytes()).encode()
            assert second != first
            async with asyncio.timeout(20):
                while await call(b"", timeout=10) != second:
                    await asyncio.sleep(0.02)
            await stream.write(b"still here")
            assert await stream.read() == b"still here"
            # Another renewal, and the end while a call runs over a former channel.
            Authority.read(folder).renew(folder, "client")
            async with asyncio.timeout(20):
                while await call(b"", timeout=10) == second:
                    await asyncio.sleep(0.02)
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await stream.read()


async def test_a_new_ca_comes_by_a_file_with_both(tmp_path: Path) -> None:
    for name in ("old", "new"):
        make_certificates(tmp_path / name)
    folder = tmp_path / "old"

    async def accepted(ca: Path, of: Path, port: int) -> bool:
        shown = Tls.of((str(ca), *paths(of, "client")[1:]))
        async with channel(f"127.0.0.1:{port}", shown) as ch:
            try:
                return bool(await ch.unary_unary(CALL)(b"", timeout=10))
            except grpc.aio.AioRpcError:
                return False

    async with echoing(folder) as port:
        old, new = folder / "ca.pem", tmp_path / "new" / "ca.pem"
        assert await accepted(old, folder, port) and not await accepted(old, tmp_path / "new", port)
        old.write_bytes(old.read_bytes() + new.read_bytes())
        async with asyncio.timeout(20):
            while not await accepted(old, tmp_path / "new", port):
                await asyncio.sleep(0.02)
        assert await accepted(old, folder, port)


async def test_every_door_shows_the_renewed_certificate_and_the_mesh_serves_on(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path) as mesh:
        held = ssl.create_default_context(cafile=mesh.certs / "ca.pem")
        # Whoever connects keeps its own for the test: only the servers' changes.
        for kind in ("pem", "key"):
            shutil.copy(mesh.certs / f"service.{kind}", tmp_path / f"mine.{kind}")
        held.load_cert_chain(tmp_path / "mine.pem", tmp_path / "mine.key")

        def shown(address: str) -> str:
            host, port = address.rsplit(":", 1)
            held.set_alpn_protocols(["h2"])
            raw = socket.create_connection((host, int(port)), 5)
            with raw, held.wrap_socket(raw, server_hostname="127.0.0.1") as made:
                return hashlib.sha256(made.getpeercert(True) or b"").hexdigest()

        async def served() -> None:
            async with mesh.client() as client:
                answer = client.generate(list(range(20, 60)), max_new_tokens=4, strategy="prefill_decode")
                assert len((await answer.wait()).token_ids) == 4

        doors = list(mesh.addresses.values())
        assert len(doors) == 7
        before = {await asyncio.to_thread(shown, address) for address in doors}
        assert before == {digest((mesh.certs / "service.pem").read_bytes())}
        await served()
        Authority.read(mesh.certs).renew(mesh.certs, "service")
        after = digest((mesh.certs / "service.pem").read_bytes())
        async with asyncio.timeout(30):
            for address in doors:
                while await asyncio.to_thread(shown, address) != after:
                    await asyncio.sleep(0.05)
        await served()
