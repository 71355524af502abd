"""The strategies of examples/, each loaded as a user would, over fake engines."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_engine import answer
from router_harness import Harness

EXAMPLES = Path(__file__).parents[2] / "examples" / "strategies"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
PROMPT = [(i * 37) % 200 + 1 for i in range(100)]


@asynccontextmanager
async def serving(name, tmp_path, labels):
    """A mesh whose strategy in force is the example."""
    (tmp_path / "own").mkdir()
    shutil.copy(EXAMPLES / f"{name}.py", tmp_path / "own")
    async with Harness(len(labels), tmp=tmp_path, labels=labels) as h:
        h.router = await h.start_router(strategy_dir=str(tmp_path / "own"), default_strategy=name)
        yield h


def test_each_has_under_40_lines():
    assert len(NAMES) >= 4
    assert {name: n for name in NAMES if (n := len((EXAMPLES / f"{name}.py").read_text().splitlines())) >= 40} == {}


@pytest.mark.parametrize("name", NAMES)
async def test_each_survives_an_engine_that_dies(name, tmp_path):
    async with serving(name, tmp_path, [{}, {}, {}]) as h:
        r = await h.generate(PROMPT)
        assert (r.tokens, r.started.strategy) == (answer(PROMPT, 8), name)
        h.engines[0].die_after = 3
        assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)
        await h.idle()


async def test_first_of_two_goes_on_with_the_first(tmp_path):
    async with serving("first_of_two", tmp_path, [{}, {}, {}]) as h:
        h.engines[0].gates["StartGenerate"] = asyncio.Event()
        r = await asyncio.wait_for(h.generate(PROMPT), 5)
        assert r.tokens == answer(PROMPT, 8) and r.share("e1").decoded_tokens == 8
        assert [e.methods() for e in h.engines] == [["StartGenerate"], ["StartGenerate"], []]
        h.engines[0].gates["StartGenerate"].set()
        await h.idle()
        # One of the two that fails does not matter, nor who leaves in the middle.
        h.engines[0].die_after = 0
        assert (await h.generate(PROMPT)).done.attempts == 1
        h.engines[1].gates["StartGenerate"] = asyncio.Event()
        h.engines[0].die_after, h.engines[0].gates["StartGenerate"] = None, asyncio.Event()
        call = h.call(PROMPT)
        await h.engines[1].until(lambda: h.engines[1].generating == 1)
        call.cancel()
        await h.idle()


async def test_by_length_has_two_pools(tmp_path):
    async with serving("by_length", tmp_path, [{"pool": "long"}, {}, {}]) as h:
        long = PROMPT * 11
        assert (await h.generate(long)).tokens == answer(long, 8)
        assert (await h.generate(PROMPT)).tokens == answer(PROMPT, 8)
        assert [len(e.calls) for e in h.engines] == [1, 1, 0]
        await h.generate(PROMPT, strategy_params={"long": "100"})
        assert len(h.engines[0].calls) == 2


@pytest.mark.parametrize(("sure", "engines"), [("-1", ["e0"]), ("-0.1", ["e0", "e1"])])
@pytest.mark.parametrize("max_new", [2, 8])
async def test_cheap_first_asks_again_when_it_is_not_sure(tmp_path, sure, engines, max_new):
    async with serving("cheap_first", tmp_path, [{"tier": "cheap"}, {}]) as h:
        r = await h.generate(PROMPT, max_new, strategy_params={"sure": sure})
        assert r.tokens == answer(PROMPT, max_new) and r.logprobs == []
        assert [e.name for e in h.engines if e.calls] == engines
        assert r.share(engines[-1]).decoded_tokens == max_new
        await h.idle()


async def test_warm_standby_has_the_prompt_when_the_engine_dies(tmp_path):
    async with serving("warm_standby", tmp_path, [{}, {}]) as h:
        first, second = h.engines
        first.pause_after, first.die_after = (3, asyncio.Event()), 4
        task = asyncio.create_task(h.generate(PROMPT))
        await second.until(lambda: "Release" in second.methods())
        assert second.methods() == ["PrepRecv", "Release"] and first.methods()[1] == "RemoteSend"
        (send,) = first.requests("RemoteSend")
        assert (send.begin, send.end) == (0, 99)
        first.pause_after[1].set()
        assert (await task).tokens == answer(PROMPT, 8)
        assert second.methods()[-1] == "StartGenerate"
        await h.idle()
