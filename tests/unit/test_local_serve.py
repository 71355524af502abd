"""`kvmesh up` and `down` as processes, and what is shown while a mesh starts."""

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_processes import FAILING, OBEDIENT, SLOW, nothing_left, one, script, until
from rich.console import Console

from kvmesh.local import progress
from kvmesh.local.serve import interrupts, unless
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh, StartFailed, stop_mesh


@pytest.fixture
def place(tmp_path, monkeypatch) -> MeshDir:
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    yield MeshDir("m")
    stop_mesh(MeshDir("m"))


def up(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "kvmesh.cli", "up", "--name", "m", "--model", "model", *arguments]


@pytest.mark.parametrize("detached", [(), ("--detach",)])
def test_an_engine_that_does_not_start_ends_it_with_the_reason(place, detached):
    command = up(*detached, "--start-timeout", "60", "--", "--no-such-flag", "7")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"engine-\d exited with status \d while the mesh was starting", done.stderr)
    assert str(place.logs / "engine-") in done.stderr and "etcd ready after" in done.stderr
    nothing_left(place)


def test_a_model_that_is_none_is_told_at_once(place):
    command = up("--model", "/no/such/model")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "has no config.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_during_the_start_stops_all_of_it(place, number):
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*up(), stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        await until(lambda: (state := place.load()) is not None and state.processes)
        ids = [p.id for p in place.load().processes]
        process.send_signal(number)
        async with asyncio.timeout(30):
            _, err = await process.communicate()
        assert process.returncode == 130 and b"interrupted; stopping" in err
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    nothing_left(place, *ids)


def test_the_second_of_one_name_is_refused(place):
    code = (
        "import asyncio\nfrom kvmesh.local.state import MeshDir\nfrom kvmesh.local.supervisor import LocalMesh\n"
        "async def main():\n async with LocalMesh(MeshDir('m'), ''):\n  print(flush=True)\n  await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        for detached in ((), ("--detach",)):
            done = subprocess.run(up(*detached), capture_output=True, text=True, timeout=60)
            assert done.returncode == 1 and "a mesh named 'm' is running; stop it with" in done.stderr
        first.kill()


async def test_the_first_interrupt_is_an_event_and_the_second_cancels():
    async def body():
        async with interrupts() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            await stop.wait()
            seen.append("first")
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(10)

    seen: list[str] = []
    task = asyncio.create_task(body())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["first"]


async def test_unless_runs_to_the_end_or_stops_and_passes_errors_on():
    ended = []

    async def work(seconds: float, error: Exception | None = None):
        try:
            await asyncio.sleep(seconds)
            if error:
                raise error
        finally:
            ended.append(seconds)

    stop = asyncio.Event()
    assert await unless(stop, work(0)) is True
    with pytest.raises(KeyError):
        await unless(stop, work(0, KeyError("x")))
    stop.set()
    assert await unless(stop, work(60)) is False
    assert ended == [0, 0, 60]


async def shown(place, stage, terminal: bool, timeout: float = 20) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal, color_system=None, highlight=False)
    async with LocalMesh(place, "") as mesh, progress.shown(mesh, console):
        await mesh.start(stage, timeout)
    return out.getvalue()


async def test_a_pipe_gets_a_line_for_each_that_is_ready(place):
    text = await shown(place, [lambda m: [script(m, "etcd"), script(m, "engine-0")]], terminal=False)
    lines = [re.sub(r"\d+\.\d s", "T s", line) for line in text.splitlines()]
    assert lines == ["  etcd ready after T s at 127.0.0.1:1", "  engine-0 ready after T s at 127.0.0.1:1"]


async def test_a_pipe_is_told_now_and_then_who_is_waited_for(place, monkeypatch):
    monkeypatch.setattr(progress, "REMINDER", 0.3)
    stage = [lambda m: [script(m, "a"), script(m, "[b]", SLOW)]]
    out = io.StringIO()
    async with LocalMesh(place, "") as mesh:
        with pytest.raises(StartFailed):
            async with progress.shown(mesh, Console(file=out, width=100, color_system=None)):
                await mesh.start(stage, 1.2)
    assert "  waiting for [b] (" in out.getvalue() and "waiting for a" not in out.getvalue().split("ready")[-1]


async def test_a_terminal_gets_a_table_with_the_last_line_of_the_log(place):
    code = OBEDIENT.replace("import", "print('loading [weights]', flush=True)\nimport time; time.sleep(0.6)\nimport", 1)
    text = await shown(place, one("engine-0", code), terminal=True)
    assert "starting" in text and "loading [weights]" in text and "ready" in text and "127.0.0.1:1" in text


async def test_a_terminal_shows_what_failed(place):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    async with LocalMesh(place, "") as mesh:
        with pytest.raises(StartFailed):
            async with progress.shown(mesh, console):
                await mesh.start(one("engine-0", FAILING), 20)
    assert "exited with status 1" in out.getvalue()


def test_help_of_every_command_comes_fast_and_without_the_heavy_libraries(tmp_path):
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kvmesh.cli import cli\n"
        "for name in ['', *cli.list_commands(None)]:\n"
        " done = CliRunner().invoke(cli, [name, '--help'][not name:], catch_exceptions=False)\n"
        " assert done.exit_code == 0, (name, done.output)\n"
        "heavy = {'torch', 'transformers', 'sglang', 'grpc', 'google.protobuf', 'numpy', 'opentelemetry', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr
    assert time.monotonic() - begun < 10


def test_the_source_folder_is_not_taken_from_the_current_one(place):
    """A file of the user's that is called like a module of ours must not be run by the processes of a mesh."""
    Path("kvmesh").mkdir()
    Path("kvmesh", "__init__.py").write_text("raise SystemExit('wrong kvmesh')")
    done = subprocess.run(up("--help"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "wrong kvmesh" not in done.stderr
