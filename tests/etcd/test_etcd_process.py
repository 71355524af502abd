"""The etcd process of the local mesh: who it dies with, and what it does not trip over."""

from __future__ import annotations

import asyncio
import sys

import psutil
import pytest

from kvmesh.errors import Unavailable
from kvmesh.local import etcd as module
from kvmesh.local.etcd import EtcdProcess, free_ports, healthy


async def test_it_restarts_on_the_same_ports_and_stops_twice(tmp_path, monkeypatch):
    # etcd refuses to start when a variable contradicts a flag.
    monkeypatch.setenv("ETCD_NAME", "another")
    process = EtcdProcess(tmp_path)
    assert process.pid is None
    await process.start()
    try:
        address, pid = process.address, process.pid
        await process.restart()
        assert process.address == address and process.pid not in (pid, None)
        assert await healthy(process.client_port)
    finally:
        await process.stop()
    assert process.pid is None and not await healthy(process.client_port)
    await process.stop()


async def test_a_taken_port_is_tried_elsewhere(tmp_path, monkeypatch):
    taken = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    offered = [[taken.sockets[0].getsockname()[1], *free_ports(1)], free_ports(2)]
    monkeypatch.setattr(module, "free_ports", lambda count: offered.pop(0))
    process = EtcdProcess(tmp_path)
    try:
        await process.start()
        assert not offered and await healthy(process.client_port)
    finally:
        await process.stop()
        taken.close()


async def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    process = EtcdProcess(tmp_path)
    with pytest.raises(Unavailable, match="etcd ended with status"):
        await process.start()
    assert process.pid is None


async def test_it_dies_with_the_process_that_started_it(tmp_path):
    program = """
import asyncio, sys
from kvmesh.local.etcd import EtcdProcess
async def main():
    process = EtcdProcess(sys.argv[1])
    await process.start()
    print(process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    try:
        pid = int(await asyncio.wait_for(parent.stdout.readline(), 30))
        etcd = psutil.Process(pid)
        assert etcd.name() == "etcd"
    finally:
        parent.kill()
        await parent.wait()
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [etcd], 5)
    assert gone == [etcd]
