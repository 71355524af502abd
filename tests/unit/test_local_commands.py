"""The commands that talk to a router, as a user types them, against a real router over fake engines."""

import asyncio
import json
import os
import sys

import grpc
import pytest
from click.testing import CliRunner
from fake_engine import answer
from router_harness import Harness

from kvmesh.cli import cli
from kvmesh.local.state import MeshDir, MeshState, ProcessId, ProcessRecord
from kvmesh.local.tiny_model import tiny_model

PROMPT = [(i * 37) % 90 + 32 for i in range(100)]
IDS = ",".join(map(str, PROMPT))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    for name in ("KVMESH_ROUTER", "KVMESH_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


def mesh_json(router: str, **fields) -> MeshDir:
    """A mesh whose supervisor is this process."""
    place = MeshDir(fields.pop("name", "default"))
    place.root.mkdir(parents=True)
    me = ProcessId.of(os.getpid())
    dead = ProcessRecord("engine-7", "engine", ProcessId(2**22 + 1, 1.0), "127.0.0.1:1", "killed by SIGKILL")
    state = MeshState(place.name, me, "", "", "ready", [ProcessRecord("router", "router", me, router, "ready"), dead])
    for name, value in fields.items():
        setattr(state, name, value)
    place.save(state)
    return place


@pytest.fixture
async def h(tmp_path):
    async with Harness(2, tmp=tmp_path) as harness:
        mesh_json(await address(harness))
        yield harness


async def address(harness: Harness) -> str:
    """Where the harness's router listens."""
    from kvmesh.v1 import router_pb2

    return (await harness.router.GetMesh(router_pb2.GetMeshRequest())).router.address


async def kvmesh(*arguments: str, code: int = 0, stdin: str | None = None):
    done = await asyncio.to_thread(CliRunner().invoke, cli, list(arguments), stdin, catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return done


async def test_status_shows_engines_and_what_has_ended(h):
    out = (await kvmesh("status")).stdout
    there = await address(h)
    assert f"at {there}" in out and "e0" in out and h.engines[1].server.address in out
    assert "fake" in out and "data_parallel" in out and "engine-7 killed by SIGKILL" in out
    assert "engine-7" not in (await kvmesh("status", "--router", there)).stdout


async def test_status_as_json(h):
    page = json.loads((await kvmesh("status", "--json")).stdout)
    assert [e["member"]["endpoint"]["name"] for e in page["engines"]] == ["e0", "e1"]
    assert page["running_requests"] == 0 and page["registry_connected"] is True


async def test_generate_shows_token_ids_where_there_is_no_text_and_a_summary_on_standard_error(h):
    done = await kvmesh("generate", "--tokens", IDS, "--strategy", "prefill_decode", "--max-new-tokens", "5")
    assert done.stdout == ",".join(map(str, answer(PROMPT, 5))) + "\n"
    assert "prefill_decode: 100 prompt tokens, 5 new, ended by length" in done.stderr
    assert "e0: 99 prefilled, sent 6.2 KiB over fake" in done.stderr and "e1: 99 received" in done.stderr


async def test_generate_as_json(h):
    done = await kvmesh(
        *("generate", "--tokens", IDS, "--json", "--logprobs", "--max-new-tokens", "4"),
        *("--strategy", "balanced_prefill_decode", "--param", "ratio=0.5", "--request-id", "r-1"),
    )
    fields = json.loads(done.stdout)
    assert fields["token_ids"] == answer(PROMPT, 4) and fields["logprobs"] == [-0.5] * 4
    assert fields["request_id"] == "r-1" and fields["strategy"] == "balanced_prefill_decode"
    assert h.engines[0].requests("RemoteSend")[0].ticket.end == 50


async def test_all_sampling_options_arrive(h):
    await kvmesh(
        *("generate", "--tokens", "65,66", "--max-new-tokens", "3", "--temperature", "0.5", "--top-p", "0.9"),
        *("--top-k", "5", "--min-p", "0.1", "--frequency-penalty", "0.2", "--presence-penalty", "-0.2"),
        *("--repetition-penalty", "1.5", "--seed", "7", "--stop-token", "9", "--stop-token", "8", "--ignore-eos"),
    )
    (call,) = h.engines[0].requests("StartGenerate")
    s = call.sampling
    assert (s.max_new_tokens, s.top_k, s.seed, s.ignore_eos, s.logprobs) == (3, 5, 7, True, False)
    assert list(s.stop_token_ids) == [9, 8]
    rounded = [round(v, 3) for v in (s.temperature, s.top_p, s.min_p, s.frequency_penalty, s.presence_penalty)]
    assert rounded == [0.5, 0.9, 0.1, 0.2, -0.2] and round(s.repetition_penalty, 3) == 1.5


async def test_text_in_and_out_and_from_standard_input(tmp_path):
    path = await asyncio.to_thread(tiny_model)
    async with Harness(1, tmp=tmp_path, path=str(path)) as h:
        there = await address(h)
        text = "Once upon a time"
        expected = bytes(answer(list(text.encode()), 6)).decode() + "\n"
        options = ("--router", there, "--max-new-tokens", "6")
        assert (await kvmesh("generate", text, *options)).stdout == expected
        assert (await kvmesh("generate", "-", *options, stdin=text)).stdout == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a prompt: either TEXT or --tokens"),
        (("x", "--tokens", "1"), "give a prompt: either TEXT or --tokens"),
        (("--tokens", "1,x"), "'1,x' is not a list of token ids"),
        (("x", "--param", "ratio"), "'ratio' is not KEY=VALUE"),
        (("x", "--timeout", "0"), "--timeout"),
        (("x", "--max-new-tokens", "many"), "--max-new-tokens"),
    ],
)
async def test_a_wrong_command_line_is_told_before_anything_is_sent(arguments, message):
    assert message in (await kvmesh("generate", *arguments, code=2)).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", ""), "token_ids"),
        (("--tokens", "999"), "999"),
        (("--tokens", "1", "--strategy", "no_such"), "no_such"),
        (("--tokens", "1", "--strategy", "prefill_decode", "--param", "prefill=0"), "prefill"),
        (("--tokens", "1", "--temperature", "-1"), "temperature"),
        (("--tokens", "1", "--seed", "-1"), "sampling.seed = -1 cannot be sent"),
    ],
)
async def test_what_the_router_refuses_is_one_line_and_status_1(h, arguments, message):
    err = (await kvmesh("generate", *arguments, code=1)).stderr
    assert err.startswith("Error: ") and message in err and len(err.strip().splitlines()) == 1


async def test_strategies_are_listed_shown_and_set(h):
    listed = (await kvmesh("strategy", "list")).stdout
    assert "data_parallel (in force)" in listed and "ratio=0.2 (float, 0 to 1)" in listed
    assert (await kvmesh("strategy", "get")).stdout == "data_parallel policy=least_load (revision 0)\n"
    done = await kvmesh("strategy", "set", "prefill_decode", "min_remote=5")
    assert done.stdout.startswith("prefill_decode min_remote=5 policy=least_load prefill=1 (revision ")
    shown = done.stdout + "before: data_parallel (revision 0, replaced)\n"
    assert (await kvmesh("strategy", "get")).stdout == shown
    await kvmesh("generate", "--tokens", IDS, "--max-new-tokens", "1")
    assert h.engines[0].methods() == ["RemoteSend"]
    for wrong in (("no_such",), ("prefill_decode", "min_remote=x"), ("prefill_decode", "no_such=1")):
        assert "Error: " in (await kvmesh("strategy", "set", *wrong, code=1)).stderr
    assert "is not KEY=VALUE" in (await kvmesh("strategy", "set", "prefill_decode", "x", code=2)).stderr
    assert (await kvmesh("strategy", "get")).stdout == shown


async def test_a_strategy_is_put_on_trial_and_taken_back(h):
    trial = ("balanced_prefill_decode", "--share", "25", "--max-error-rate", "0.05", "--max-ttft", "2")
    done = (await kvmesh("strategy", "set", *trial)).stdout
    assert done.startswith("balanced_prefill_decode prefill=1 ratio=0.2 (revision 1, on trial for 25 % of the sessions")
    assert "until over 5.0% fail, until the mean TTFT is over 2 s" in done
    assert done in (await kvmesh("strategy", "get")).stdout
    back = (await kvmesh("strategy", "rollback")).stdout
    assert back == "data_parallel policy=least_load (revision 0)\n"
    assert "rolled back: asked for" in (await kvmesh("strategy", "get")).stdout
    assert "no choice before" in (await kvmesh("strategy", "rollback", code=1)).stderr


async def test_trace_draws_the_request(h):
    options = ("--strategy", "prefill_decode", "--request-id", "r-1", "--max-new-tokens", "2")
    await kvmesh("generate", "--tokens", IDS, *options)
    out = (await kvmesh("trace", "r-1", "--trace-dir", str(h.traces))).stdout
    names = [line.rsplit(" router-", 1)[0].rstrip() for line in out.splitlines() if " router-" in line]
    calls = ["    prep_recv", "    remote_send", "    start_generate"]
    assert names == ["router.generate", "  strategy prefill_decode", *calls]
    assert "bytes=6.2 KiB" in out and "at ms" in out and "took ms" in out


async def test_a_trace_that_is_not_there_says_where_it_looked(tmp_path):
    err = (await kvmesh("trace", "r-9", "--trace-dir", str(tmp_path), code=1)).stderr
    assert "no trace of request 'r-9'" in err and str(tmp_path) in err


async def test_without_a_mesh_every_command_says_what_to_do():
    for command in (["status"], ["generate", "x"], ["strategy", "list"]):
        err = (await kvmesh(*command, code=1)).stderr
        assert "no mesh named 'default' runs here: start one with `kvmesh up`" in err
    err = (await kvmesh("status", "--name", "m", code=1)).stderr
    assert "start one with `kvmesh up --name m`" in err
    assert "name = '../x'" in (await kvmesh("status", "--name", "../x", code=1)).stderr


async def test_a_mesh_that_is_not_ready_or_whose_supervisor_is_dead_says_so():
    place = mesh_json("127.0.0.1:1", phase="starting")
    assert "the mesh 'default' is starting" in (await kvmesh("status", code=1)).stderr
    state = place.load()
    state.supervisor = ProcessId(state.supervisor.pid, 1.0)
    place.save(state)
    err = (await kvmesh("status", code=1)).stderr
    assert "`kvmesh down --name default` cleans up after it" in err


async def test_a_router_that_is_not_there_or_is_something_else_says_so(tmp_path):
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    err = (await kvmesh("status", "--router", f"127.0.0.1:{port}", code=1)).stderr
    assert f"what listens at 127.0.0.1:{port} is no kvmesh router" in err
    await server.stop(0)
    err = (await kvmesh("status", "--router", f"127.0.0.1:{port}", code=1)).stderr
    assert f"no kvmesh router answers at 127.0.0.1:{port}" in err
    assert "'nowhere'" in (await kvmesh("status", "--router", "nowhere", code=1)).stderr


async def test_down_of_nothing():
    assert (await kvmesh("down")).stdout == "no mesh named 'default' is running\n"
    assert (await kvmesh("down", "--all")).stdout == "no mesh is running\n"


async def test_down_all_stops_what_it_can_and_tells_what_it_cannot():
    for name, work in (("a", "/etc"), ("b", "")):
        place = mesh_json("", name=name, work=work)
        state = place.load()
        state.supervisor, state.processes = ProcessId(2**22 + 1, 1.0), []
        if name == "b":
            state.work = str(place.root / "work")
        place.save(state)
    done = await kvmesh("down", "--all", code=1)
    assert "will not remove '/etc'" in done.stderr
    assert done.stdout == "cleaned up after the mesh 'b', whose supervisor was dead\n"
    assert MeshDir("a").file.exists() and not MeshDir("b").file.exists()


async def test_health_tells_by_its_exit_status():
    from kvmesh.grpcx import Server

    server = Server("127.0.0.1:0", lambda s: None, [])
    await server.start()
    try:
        arguments = ["health", server.address, "--timeout", "0.5"]
        not_yet = await asyncio.create_subprocess_exec(sys.executable, "-m", "kvmesh.cli", *arguments, stderr=-1)
        _, said = await asyncio.wait_for(not_yet.communicate(), 20)
        assert not_yet.returncode == 1 and b"does not serve" in said
        await server.ready()
        serving = await asyncio.create_subprocess_exec(sys.executable, "-m", "kvmesh.cli", *arguments[:2], stdout=-1)
        out, _ = await asyncio.wait_for(serving.communicate(), 20)
        assert serving.returncode == 0 and out == b"serving\n"
    finally:
        await server.stop(0)
