"""Strategies from a folder: taken in when they change and are good, refused with a reason when they are not."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import answer
from router_harness import Harness

from kvmesh.errors import InvalidArgument
from kvmesh.strategy import Strategy
from kvmesh.v1 import router_pb2
from services.router import strategy_file
from services.router.board import catalog
from services.router.folder import StrategyFolder
from services.router.rehearsal import rehearse, rehearse_source
from services.router.strategy_file import Loader

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
HEAD = """from __future__ import annotations
import asyncio
from typing import Annotated
from kvmesh.strategy import Chunks, Mesh, Range, Request, strategy

@strategy
async def mine(request: Request, mesh: Mesh, *, n: Annotated[int, Range(0, 9)] = 0) -> Chunks:
    '''First version.'''
"""
GOOD = f"""{HEAD}
    async for chunk in mesh.engines[n].start_generate(request.token_ids):
        yield chunk
"""
BAD = {
    "raises": ("raise ValueError('no such luck')\n    yield", "ValueError: no such luck (line 10)"),
    "one engine": (
        "async for chunk in mesh.engines[1].start_generate(request.token_ids):\n        yield chunk",
        "mine, with 1 engine(s) and a prompt of 1 token(s): IndexError",
    ),
    "no answer": ("return\n    yield", "it ended before the answer did"),
    "never ends": ("await asyncio.Event().wait()\n    yield", "it did not end within"),
    "goes on": (
        "for _ in range(2):\n        async for chunk in mesh.engines[0].start_generate(request.token_ids):\n"
        "            yield chunk",
        "it went on after the last chunk",
    ),
    "leaks": (
        "await mesh.engines[0].prep_recv(request.token_ids, end=-1)\n"
        "    async for chunk in mesh.engines[0].start_generate(request.token_ids):\n        yield chunk",
        "it neither used nor released 1 ticket(s)",
    ),
    "leaves a generation": (
        "mesh.engines[0].start_generate(request.token_ids)\n"
        "    async for chunk in mesh.engines[0].start_generate(request.token_ids):\n        yield chunk",
        "it left 1 generation(s) running",
    ),
    "leaves a task": (
        "task = asyncio.create_task(asyncio.sleep(60))\n"
        "    async for chunk in mesh.engines[0].start_generate(request.token_ids):\n        yield chunk",
        "it left 1 task(s) running",
    ),
    "uses a ticket twice": (
        "t = await mesh.engines[0].prep_recv(request.token_ids, end=-1)\n    await mesh.engines[0].release(t)\n"
        "    async for chunk in mesh.engines[0].start_generate(request.token_ids, t):\n        yield chunk",
        "ticket 1 of engine-0 was used or released",
    ),
    "something else": ("yield 7", "it yielded int, not Chunk"),
}


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    monkeypatch.setattr("services.router.folder.PERIOD_S", 0.05)


@pytest.mark.parametrize("name", catalog())
async def test_the_built_in_strategies_pass(name):
    assert await rehearse(catalog()[name], Path("x.py")) == ""


@pytest.mark.parametrize("what", BAD)
async def test_a_dry_run_finds_what_is_wrong(what, monkeypatch):
    monkeypatch.setattr("services.router.rehearsal.RUN_S", 0.3)
    body, says = BAD[what]
    loaded = Loader().load(Path("mine.py"), f"{HEAD}\n    {body}\n".encode())
    try:
        assert says in await rehearse(loaded.strategies["mine"], Path("mine.py"))
    finally:
        loaded.drop()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(:\n    pass", "SyntaxError: invalid syntax (line 1)"),
        ("x = 1\nimport no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here' (line 2)"),
        ("from services.router.strategies.data_parallel import data_parallel", "TypeError: it defines no strategy"),
        ("import os\nos._exit(3)", "its dry run ended with status 3"),
        ("import os\nos.write(1, b'{}')\nprint('hello')", "TypeError: it defines no strategy"),
        (GOOD, ""),
    ],
)
async def test_a_file_is_tried_in_another_process(source, says):
    assert await rehearse_source(Path("mine.py"), source.encode()) == says


async def test_a_file_that_never_comes_to_an_end_is_killed(monkeypatch):
    monkeypatch.setattr("services.router.rehearsal.FILE_S", 0.3)
    assert await rehearse_source(Path("mine.py"), b"while True: pass") == "its dry run did not end within 0.3 s"


def test_every_version_has_a_module_of_its_own_and_a_bad_one_leaves_none():
    loader = Loader()
    one, two = loader.load(Path("a.py"), GOOD.encode()), loader.load(Path("a.py"), GOOD.encode())
    assert one.strategies["mine"] is not two.strategies["mine"] and one.module != two.module
    one.drop()
    two.drop()
    with pytest.raises(TypeError):
        loader.load(Path("a.py"), b"x = 1")
    assert not [name for name in sys.modules if name.startswith(strategy_file.PREFIX)]


def test_no_folder():
    with pytest.raises(InvalidArgument, match=r"strategy_dir = '/no/such' is not a folder"):
        StrategyFolder("/no/such", {})


# In the router


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


@pytest.fixture
async def h(tmp_path, folder):
    (folder / "mine.py").write_text(GOOD)
    (folder / "_other.py").write_text("raise SystemExit")
    async with Harness(2, tmp=tmp_path) as harness:
        harness.router = await harness.start_router(strategy_dir=str(folder), default_strategy="mine")
        yield harness


async def infos(h: Harness) -> dict[str, router_pb2.StrategyInfo]:
    reply = await h.router.ListStrategies(router_pb2.ListStrategiesRequest(), timeout=5)
    return {info.name: info for info in reply.strategies}


async def until(h: Harness, name: str, predicate: Any) -> router_pb2.StrategyInfo | None:
    async with asyncio.timeout(20):
        while not predicate(found := (await infos(h)).get(name)):
            await asyncio.sleep(0.02)
    return found


async def choose(h: Harness, name: str, **params: str) -> None:
    await h.router.SetStrategy(router_pb2.SetStrategyRequest(name=name, params=params), timeout=5)


async def test_a_change_is_taken_in_while_requests_run(h, folder):
    assert (await infos(h))["mine"].file == "mine.py"
    assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)
    h.engines[0].pause_after = (3, gate := asyncio.Event())
    running = asyncio.create_task(h.generate(PROMPT))
    await h.engines[0].until(lambda: h.engines[0].generating == 1)
    (folder / "mine.py").write_text(GOOD.replace("engines[n]", "engines[-1]").replace("First", "Second"))
    await until(h, "mine", lambda info: info.summary == "Second version.")
    (share,) = (await h.generate(PROMPT)).done.shares
    assert share.engine == "e1"
    gate.set()
    assert (await running).tokens == answer(PROMPT, 8)


async def test_a_bad_version_leaves_the_good_one_and_says_why(h, folder):
    (folder / "mine.py").write_text(f"{HEAD.replace('First', 'Second')}\n    {BAD['raises'][0]}\n")
    info = await until(h, "mine", lambda info: info.error)
    assert info.summary == "First version." and "no such luck" in info.error
    assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)
    (folder / "mine.py").write_text(GOOD.replace("First", "Third"))
    assert (await until(h, "mine", lambda info: info.summary == "Third version.")).error == ""


async def test_one_in_force_must_take_the_parameters_it_has(h, folder):
    await choose(h, "mine", n="1")
    (folder / "mine.py").write_text(GOOD.replace("Range(0, 9)", "Range(0, 0)"))
    info = await until(h, "mine", lambda info: info.error)
    assert "parameter n = 1" in info.error
    (share,) = (await h.generate(PROMPT)).done.shares
    assert share.engine == "e1"


async def test_files_come_and_go(h, folder):
    (folder / "worse.py").write_text("nonsense(")
    assert (await until(h, "worse", bool)).error.startswith("SyntaxError")
    (folder / "worse.py").unlink()
    await until(h, "worse", lambda info: info is None)
    (folder / "clash.py").write_text(GOOD)
    assert (await until(h, "clash", bool)).error == "there is another strategy mine"
    (folder / "more.py").write_text(GOOD.replace("mine", "more"))
    await until(h, "more", bool)
    assert (await h.generate(PROMPT, strategy="more")).tokens == answer(PROMPT, 8)
    # One in force outlives its file.
    (folder / "clash.py").unlink()
    (folder / "mine.py").unlink()
    assert "its file is gone" in (await until(h, "mine", lambda info: info.error)).error
    assert (await h.generate(PROMPT)).started.strategy == "mine"
    await choose(h, "data_parallel")
    (folder / "more.py").unlink()
    await until(h, "more", lambda info: info is None)
    assert "mine" not in await infos(h)
    with pytest.raises(grpc.aio.AioRpcError, match="'more' is unknown"):
        await h.generate(PROMPT, strategy="more")


async def test_a_router_that_gets_the_file_later_takes_the_setting_then(h, folder, tmp_path):
    (tmp_path / "late").mkdir()
    late = await h.start_router(strategy_dir=str(tmp_path / "late"))
    await choose(h, "mine", n="1")
    await asyncio.sleep(0.1)
    h.router = late
    assert (await h.generate(PROMPT)).started.strategy == "data_parallel"
    (tmp_path / "late" / "mine.py").write_text(GOOD)
    await until(h, "mine", bool)
    started = (await h.generate(PROMPT)).started
    assert (started.strategy, started.strategy_revision) == ("mine", 1)


def test_what_is_built_in_stays(folder):
    made = StrategyFolder(str(folder), catalog())
    assert all(isinstance(s, Strategy) for s in made.strategies.values()) and made.strategies == catalog()
