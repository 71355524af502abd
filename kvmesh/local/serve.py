"""`kvmesh up`: the supervisor's main coroutine, and its start in the background."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console

from kvmesh.local.mesh import http_address, resolve_model, stages
from kvmesh.local.options import MeshOptions
from kvmesh.local.progress import shown
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh, StartFailed, take_lock

INTERRUPTED = 130


@contextlib.asynccontextmanager
async def interrupts() -> AsyncIterator[asyncio.Event]:
    """An event that the first SIGINT, SIGTERM or SIGHUP sets; the second cancels the current task."""
    stop, task, loop = asyncio.Event(), asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def interrupt() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, interrupt)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work`, and cancels it when `stop` is set; returns whether it ran to its end. Raises what it raises."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        for t in (task, stopped):
            t.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def start(
    mesh: LocalMesh, options: MeshOptions, model: Path | None, engine_args: list[str], console: Console
) -> None:
    """Starts the mesh and shows how it goes. Raises StartFailed."""
    async with shown(mesh, console):
        await mesh.start(stages(options, model, engine_args), options.start_timeout)


async def serve(options: MeshOptions, engine_args: list[str]) -> int:
    """Runs a mesh until it is told to stop, or nothing is left of it; returns the exit status."""
    console = Console(stderr=True, highlight=False)
    if options.sim:
        from kvmesh.sim.profile import load_profile

        model, profile = None, load_profile(options.sim)
        console.print(f"SIMULATED engines: {profile.name}, whose tokens mean nothing", soft_wrap=True)
    else:
        model, tiny = await asyncio.to_thread(resolve_model, options.model)
        if tiny:
            what = f"a tiny random Llama with a byte-level tokenizer ({model})"
            console.print(f"no --model given: {what}", soft_wrap=True)
    async with interrupts() as stop, LocalMesh(MeshDir(options.name), options.sim or str(model)) as mesh:
        stores = f", {options.stores} KV stores" if options.stores else ""
        console.print(f"starting the mesh {options.name!r}: etcd, registry, {options.engines} engines{stores}, router")
        try:
            if not await unless(stop, start(mesh, options, model, engine_args, console)):
                console.print("interrupted; stopping")
                return INTERRUPTED
        except StartFailed as error:
            console.print(f"{error}\nstopping the rest", markup=False, soft_wrap=True)
            return 1
        click.echo(_summary(mesh, options))
        alive = not await unless(stop, _watch(mesh, console))
        console.print("stopping" if alive else "no process is left")
        return 0 if alive else 1


async def _watch(mesh: LocalMesh, console: Console) -> None:
    """Tells of every process that ends by itself, until none is left."""
    while any(c.returncode is None for c in mesh.children):
        child = await mesh.deaths.get()
        then = "the mesh goes on without it" if child.spec.role != "router" else "no request can be served any more"
        lines = "".join(f"\n    {line}" for line in child.last_lines(5))
        console.print(
            f"{child.spec.name} {child.state}: {then}; the end of {child.spec.log}:{lines}",
            markup=False,
            soft_wrap=True,
        )


def _summary(mesh: LocalMesh, options: MeshOptions) -> str:
    named = f" --name {options.name}" if options.name != "default" else ""
    listening = "\n".join(f"  {c.spec.name:<10} {c.address:<22} pid {c.id.pid}" for c in mesh.children)
    http = http_address(mesh)
    scheme = "https" if mesh.certs else "http"
    opened = f"\nOpenAI's API at {scheme}://{http}/v1, described at {scheme}://{http}/docs" if http else ""
    if mesh.certs:
        opened += f"\nmutual TLS; certificates and API keys in {mesh.certs}"
    prompt = "--tokens 5,6,7,8 --ignore-eos" if options.sim else '"Once upon a time"'
    return f"""ready; listening at
{listening}{opened}
logs in {mesh.place.logs}
try
  kvmesh status{named}
  kvmesh generate {prompt}{named} --strategy prefill_decode --max-new-tokens 40
  kvmesh strategy set balanced_prefill_decode{named}
Ctrl-C, or `kvmesh down{named}` elsewhere, stops it"""


def detach(options: MeshOptions, engine_args: list[str]) -> int:
    """Starts the supervisor in the background and returns its exit status, or 0 once the mesh is ready."""
    place = MeshDir(options.name)
    place.root.mkdir(parents=True, exist_ok=True)
    take_lock(place).close()
    command = [sys.executable, "-P", "-m", "kvmesh.cli", "up", *options.arguments(), "--", *engine_args]
    path = place.root / "up.log"
    with open(path, "w") as log, open(path) as told:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            return _follow(process, place, told)
        except KeyboardInterrupt:
            process.terminate()
            process.wait(60)
            return INTERRUPTED
        finally:
            click.echo(told.read(), nl=False, err=True)


def _follow(process: subprocess.Popen[bytes], place: MeshDir, told: TextIO) -> int:
    """Shows what the supervisor says until its mesh is ready (0) or it has ended (its status)."""
    while (code := process.poll()) is None:
        click.echo(told.read(), nl=False, err=True)
        state = place.load()
        if state is not None and state.supervisor.pid == process.pid and state.phase == "ready":
            return 0
        time.sleep(0.1)
    return code
