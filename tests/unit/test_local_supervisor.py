"""The local mesh's supervisor over small real processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from local_processes import (
    FAILING,
    OBEDIENT,
    PARENT,
    SERVING,
    SLOW,
    STUBBORN,
    TRACKED,
    announced,
    content,
    gone,
    nothing_left,
    one,
    script,
    until,
)

from kvmesh.errors import AlreadyExists
from kvmesh.local import cleanup, scratch
from kvmesh.local.mesh import service_ready
from kvmesh.local.state import MeshDir, ProcessId
from kvmesh.local.supervisor import LocalMesh, StartFailed, stop_mesh

TIMEOUT = 20.0


@pytest.fixture
def place(tmp_path, monkeypatch) -> MeshDir:
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return MeshDir("m")


async def test_it_starts_in_stages_says_where_all_listens_and_leaves_nothing(place):
    order = []

    def first(mesh):
        return [script(mesh, "etcd", role="etcd")]

    def second(mesh):
        order.extend((c.spec.name, c.state) for c in mesh.children)
        return [script(mesh, "engine-0", SERVING, ready=service_ready), script(mesh, "router", role="router")]

    async with LocalMesh(place, "/models/x") as mesh:
        assert place.load().phase == "starting"
        await mesh.start([first, second], TIMEOUT)
        assert order == [("etcd", "ready")]
        state = place.load()
        assert (state.phase, state.model, state.supervisor.pid) == ("ready", "/models/x", os.getpid())
        assert [(p.name, p.role, p.state) for p in state.processes] == [
            ("etcd", "etcd", "ready"),
            ("engine-0", "engine", "ready"),
            ("router", "router", "ready"),
        ]
        assert state.address("router") == "127.0.0.1:1" and state.address("engine").startswith("127.0.0.1:")
        assert all(p.id.alive() and os.getsid(p.id.pid) == p.id.pid for p in state.processes)
        assert psutil.Process(state.processes[0].id.pid).environ()["TMPDIR"] == str(mesh.work / "etcd")
        assert (mesh.work / "etcd").is_dir()
        work = mesh.work
    nothing_left(place, *(p.id for p in state.processes))
    assert not work.exists() and (place.logs / "engine-0.log").exists()


async def test_they_are_stopped_in_reverse(place):
    ends = place.root / "logs" / "ends"
    note = f"(open({str(ends)!r}, 'a').write(sys.argv[1].split('/')[-1] + ' '), sys.exit(0))"
    roles = {"etcd": "etcd", "registry": "registry", "engine-0": "engine", "router": "router"}
    async with LocalMesh(place, "") as mesh:
        code = OBEDIENT.replace("sys.exit(0)", note)
        await mesh.start([lambda m: [script(m, name, code, role=role) for name, role in roles.items()]], TIMEOUT)
    assert content(ends).split() == [f"{name}.address" for name in reversed(roles)]


async def test_a_child_that_crashes_is_told_and_cleaned_after(place):
    instance = os.urandom(6).hex()
    shm, other = (Path("/dev/shm") / f"sglang_loads_{name}_00000000.shm" for name in (instance, f"{instance}0"))
    try:
        async with LocalMesh(place, "") as mesh:
            await mesh.start([lambda m: [script(m, "engine-0", PARENT), script(m, "engine-1")]], TIMEOUT)
            crashing, other_child = mesh.children
            grandchild = int((mesh.work / "engine-0.address.child").read_text())
            for path in (shm, other):
                path.write_bytes(b"x")
            (mesh.work / "engine-0" / "instance").write_text(f"{instance}\n")
            os.kill(crashing.id.pid, signal.SIGKILL)
            async with asyncio.timeout(TIMEOUT):
                assert await mesh.deaths.get() is crashing
            assert crashing.state == "killed by SIGKILL" and other_child.state == "ready"
            assert place.load().processes[0].state == "killed by SIGKILL"
            await gone(grandchild)
            assert not shm.exists() and other.exists() and not (mesh.work / "engine-0").exists()
            assert (mesh.work / "engine-1").is_dir()
        nothing_left(place, other_child.id)
    finally:
        for path in (shm, other):
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("crash", [False, True])
async def test_semaphores_of_killed_processes_are_removed_by_their_resource_tracker(place, crash):
    async with LocalMesh(place, "") as mesh:
        await mesh.start(one("engine-0", TRACKED), TIMEOUT)
        path = Path("/dev/shm") / ("sem." + content(mesh.work / "engine-0.address.semaphore").lstrip("/"))
        assert path.exists()
        if crash:
            os.kill(mesh.children[0].id.pid, signal.SIGKILL)
            async with asyncio.timeout(TIMEOUT):
                await mesh.deaths.get()
            assert not path.exists()
    assert not path.exists()
    nothing_left(place, mesh.children[0].id)


async def test_a_second_mesh_of_the_same_name_is_refused_and_harms_nothing(place):
    async with LocalMesh(place, "") as mesh:
        await mesh.start(one("engine-0"), TIMEOUT)
        with pytest.raises(AlreadyExists, match="a mesh named 'm' is running"):
            async with LocalMesh(place, ""):
                pass
        assert mesh.children[0].state == "ready" and place.load().phase == "ready" and mesh.work.is_dir()
        async with LocalMesh(MeshDir("n"), "") as second:
            await second.start(one("engine-0"), TIMEOUT)
        assert mesh.children[0].state == "ready"


async def test_a_child_that_fails_at_the_start_is_shown_with_the_end_of_its_log(place):
    begun = time.monotonic()
    async with LocalMesh(place, "") as mesh:
        with pytest.raises(StartFailed) as caught:
            await mesh.start([lambda m: [script(m, "engine-0", FAILING), script(m, "engine-1", SLOW)]], 60)
    assert time.monotonic() - begun < 30
    text = str(caught.value)
    assert "engine-0 exited with status 1 while the mesh was starting" in text
    assert str(place.logs / "engine-0.log") in text
    assert "about to fail" in text and "no such model" in text
    nothing_left(place, *(c.id for c in mesh.children))


async def test_a_command_that_does_not_exist_is_told(place):
    def stage(mesh):
        spec = script(mesh, "engine-0")
        object.__setattr__(spec, "command", ["/no/such/program"])
        return [spec]

    async with LocalMesh(place, "") as mesh:
        with pytest.raises(StartFailed, match="cannot start /no/such/program: No such file"):
            await mesh.start([stage], TIMEOUT)
    nothing_left(place)


async def test_a_start_that_takes_too_long_names_who_is_late(place):
    async with LocalMesh(place, "") as mesh:
        with pytest.raises(StartFailed, match=r"engine-1 not ready after \d s"):
            await mesh.start([lambda m: [script(m, "engine-0", OBEDIENT), script(m, "engine-1", SLOW)]], 2)
    assert [c.ready_after is None for c in mesh.children] == [False, True]
    nothing_left(place, *(c.id for c in mesh.children))


async def test_a_cancelled_start_stops_what_runs(place):
    async def body():
        async with LocalMesh(place, "") as mesh:
            meshes.append(mesh)
            await mesh.start([lambda m: [script(m, "engine-0"), script(m, "engine-1", SLOW)]], 60)

    meshes: list[LocalMesh] = []
    task = asyncio.create_task(body())
    await until(lambda: meshes and meshes[0].children and meshes[0].children[0].state == "ready")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(meshes[0].children) == 2
    nothing_left(place, *(c.id for c in meshes[0].children))


async def test_a_stubborn_process_and_its_children_are_killed(place):
    async with LocalMesh(place, "") as mesh:
        stage = [lambda m: [script(m, "a", STUBBORN, patience=0.2), script(m, "b", PARENT, patience=0.2)]]
        await mesh.start(stage, TIMEOUT)
        grandchild = int((mesh.work / "b.address.child").read_text())
        begun = time.monotonic()
    assert time.monotonic() - begun < 10
    assert mesh.children[0].state == "killed by SIGKILL"
    await gone(grandchild)
    nothing_left(place, *(c.id for c in mesh.children))


async def test_a_second_interrupt_while_stopping_kills_at_once(place):
    async def body():
        async with LocalMesh(place, "") as mesh:
            await mesh.start(one("a", STUBBORN, patience=60), TIMEOUT)
            children.extend(mesh.children)

    children: list = []
    task = asyncio.create_task(body())
    await until(lambda: children and (state := place.load()) and state.phase == "stopping")
    task.cancel()
    async with asyncio.timeout(TIMEOUT):
        with contextlib.suppress(asyncio.CancelledError):
            await task
    nothing_left(place, children[0].id)


async def test_an_unknown_entry_in_the_work_folder_does_not_survive(place):
    async with LocalMesh(place, "") as mesh:
        work = mesh.work
        (work / "left" / "deep").mkdir(parents=True)
    assert not work.exists()


# A supervisor in a process of its own, so that it can be killed.
SUPERVISOR = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from local_processes import OBEDIENT, PARENT, STUBBORN, script
from kvmesh.local.serve import interrupts
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh

async def main():
    async with interrupts() as stop, LocalMesh(MeshDir("m"), "") as mesh:
        codes = {"a": OBEDIENT, "b": STUBBORN, "c": PARENT}
        await mesh.start([lambda m: [script(m, name, codes[name], patience=1) for name in sys.argv[2]]], 20)
        print("ready", flush=True)
        await stop.wait()

asyncio.run(main())
"""


@contextlib.contextmanager
def supervisor(kinds: str):
    """A mesh in another process; killed, if need be, at the end."""
    command = [sys.executable, "-c", SUPERVISOR, str(Path(__file__).parent), kinds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()
            stop_mesh(MeshDir("m"))


async def test_children_end_when_the_supervisor_is_killed_and_down_cleans_up(place):
    with supervisor("ac") as process:
        state = place.load()
        a, c = (p.id for p in state.processes)
        grandchild = int(content(Path(state.work) / "c.address.child"))
        process.kill()
        process.wait()
        # By the kernel's word alone; what lets no SIGTERM stop it is left for `down`.
        await gone(a.pid)
        await gone(c.pid)
        assert psutil.pid_exists(grandchild)
        told = stop_mesh(place)
        assert told == "cleaned up after the mesh 'm', whose supervisor was dead, which had left c running"
        await gone(grandchild)
        nothing_left(place, a, c)
        assert stop_mesh(place) == "no mesh named 'm' is running"


async def test_a_stubborn_child_of_a_killed_supervisor_is_killed_by_down(place):
    with supervisor("b") as process:
        (b,) = (p.id for p in place.load().processes)
        process.kill()
        process.wait()
        assert b.alive()
        assert cleanup.recover(place, timeout=0.3) == ["b"]
        nothing_left(place, b)


async def test_the_next_start_cleans_up_after_a_killed_supervisor(place):
    with supervisor("a") as process:
        (a,) = (p.id for p in place.load().processes)
        process.kill()
        process.wait()
        async with LocalMesh(place, "") as mesh:
            assert not a.alive()
            await mesh.start(one("engine-0"), TIMEOUT)
        nothing_left(place, a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_of_it(place, number):
    with supervisor("ab") as process:
        ids = [p.id for p in place.load().processes]
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 0
        nothing_left(place, *ids)


def test_down_stops_a_running_mesh(place):
    with supervisor("a") as process:
        (a,) = (p.id for p in place.load().processes)
        assert stop_mesh(place) == "stopped the mesh 'm'"
        assert process.wait(TIMEOUT) == 0
        nothing_left(place, a)


def test_down_without_a_mesh_does_nothing(place):
    assert stop_mesh(place) == "no mesh named 'm' is running"
    assert not place.root.exists()


def test_a_work_folder_that_is_too_deep_for_sockets_is_replaced(place):
    async def body():
        async with LocalMesh(place, "") as mesh:
            return mesh.work

    work = asyncio.run(body())
    assert len(str(work)) <= scratch.LONGEST and not work.exists()


async def test_announced_is_read_only_when_whole(tmp_path):
    path = tmp_path / "address"
    waiting = asyncio.create_task(announced(path))
    path.write_text("")
    path.write_text("127.0.0.1:7\n")
    assert await waiting == "127.0.0.1:7"


def test_a_process_is_not_taken_for_a_later_one_of_its_number():
    me = ProcessId.of(os.getpid())
    assert me.alive() and not ProcessId(me.pid, me.created - 5).alive() and not ProcessId(me.pid, 0.0).alive()
