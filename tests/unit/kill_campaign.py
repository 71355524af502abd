"""Kills engines at chosen stages of a request while others run, and holds every answer against what it must be.

The same on simulated engines and on real ones: a `Field` says how engines are killed and started there.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvmesh.client import AsyncClient

STAGES = ("prep_recv", "remote_send", "first_token", "mid_decode")
STRATEGY_DIR = Path(__file__).parent / "staged"
SPLIT = ("prefill_decode", "balanced_prefill_decode")
ALL = ("data_parallel", *SPLIT)
BYSTANDERS = 3
DEADLINE_S = 60.0


class Field(Protocol):
    """A mesh of which engines die.

    `folder` is for notes, `send_s` and `prefill_s` what these take for a long prompt; `most` tokens are asked for.
    """

    client: AsyncClient
    folder: Path
    longest: int
    most: int
    send_s: float
    prefill_s: float

    @property
    def engines(self) -> Sequence[str]:
        """Names of those that run."""

    async def freeze(self, name: str) -> None:
        """SIGSTOP."""

    async def kill(self, name: str, draw: random.Random) -> None:
        """SIGKILL; returns when it is gone."""

    async def restart(self, name: str) -> None:
        """A new life for a dead one; returns when the router has it."""

    def prepare(self, prompt: list[int], count: int) -> None:
        """The answer to it will be checked."""

    def check(self, state: str, prompt: list[int], tokens: list[int], count: int) -> None:
        """Fails unless these are the tokens due."""

    async def at_rest(self, names: Sequence[str]) -> None:
        """Fails unless soon every slot of these engines is free or cached."""


@dataclass(frozen=True)
class Plan:
    """One kill, drawn from stage and seed."""

    stage: str
    seed: int
    inner: str
    prompt: list[int]
    count: int
    # Where the strategy waits for us; whether the engine is stopped before it goes on.
    hold: str
    frozen: bool
    # Of the engines at the stage.
    victim: int
    delay: float
    tokens: int

    @staticmethod
    def of(stage: str, seed: int, f: Field) -> Plan:
        """The plan of this seed."""
        draw = random.Random(f"kill {stage} {seed}")
        inner = draw.choice(SPLIT if stage in ("prep_recv", "remote_send") else ALL)
        long = stage in ("remote_send", "first_token")
        prompt = _prompt(draw, f.longest // 2 if long else 20, f.longest if long else f.longest // 2)
        count = draw.randrange(f.most // 2, f.most)
        first = seed % 2 == 0
        hold = {"prep_recv": "prep_recv" if first else "prepared"}.get(stage, "")
        span = {"prep_recv": 0.05, "remote_send": f.send_s, "first_token": f.prefill_s}.get(stage, 0.0)
        # A first token is died at before it, or just after.
        tokens = {"first_token": 0 if first else 1, "mid_decode": draw.randrange(2, count - 2)}.get(stage, 0)
        frozen = hold == "prep_recv"
        return Plan(stage, seed, inner, prompt, count, hold, frozen, seed % 2, draw.random() * span, tokens)


@dataclass
class Tally:
    """What came of it, by stage."""

    kills: Counter[str] = field(default_factory=Counter)
    # Kills that met the request in the stage meant, not just before or after.
    met: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    # Streams that another engine went on with.
    moved: int = 0

    def line(self) -> str:
        """In words."""
        stages = ", ".join(f"{s} {self.kills[s]} (met {self.met[s]})" for s in STAGES if self.kills[s])
        return f"kills: {stages}; {self.streams} streams complete and right, {self.moved} of them moved"


def _prompt(draw: random.Random, low: int, high: int) -> list[int]:
    return [draw.randrange(256) for _ in range(draw.randrange(low, high + 1))]


async def one_kill(f: Field, plan: Plan, tally: Tally, waiting: Waiting) -> str:
    """Carries the plan out on a field of two engines or more that run; the name of the one that was killed."""
    draw = random.Random(f"more {plan.stage} {plan.seed}")
    others = [(ALL[i % 3], _prompt(draw, 1, f.longest // 2), draw.randrange(8, 40)) for i in range(BYSTANDERS)]
    for prompt, count in ((plan.prompt, plan.count), *((p, c) for _, p, c in others)):
        f.prepare(prompt, count)
    note = f.folder / f"{plan.stage}-{plan.seed}"
    bystanders = [asyncio.create_task(_stream(f, name, prompt, count)) for name, prompt, count in others]
    await asyncio.sleep(draw.random() * 0.05)
    seen: list[int] = []
    watched = asyncio.create_task(_stream(f, "staged", plan.prompt, plan.count, seen, note, plan))
    try:
        async with asyncio.timeout(DEADLINE_S):
            victim, had = await _strike(f, plan, note, seen, watched, draw, waiting)
        met = _met(plan, note, had)
        answers = await asyncio.gather(watched, *bystanders)
    finally:
        for task in (watched, *bystanders):
            task.cancel()
        await asyncio.wait([watched, *bystanders])
    asked = [(plan.prompt, plan.count), *((p, c) for _, p, c in others)]
    for (prompt, count), (tokens, attempts) in zip(asked, answers, strict=True):
        f.check(plan.stage, prompt, tokens, count)
        tally.streams += 1
        tally.moved += attempts > 1
    tally.kills[plan.stage] += 1
    tally.met[plan.stage] += met
    assert victim not in f.engines
    await f.at_rest(f.engines)
    return victim


async def _stream(
    f: Field,
    name: str,
    prompt: list[int],
    count: int,
    seen: list[int] | None = None,
    note: Path | None = None,
    plan: Plan | None = None,
) -> tuple[list[int], int]:
    """(tokens, attempts) of one request; `seen` gets the tokens as they come."""
    params: dict[str, object] = {}
    if plan is not None:
        params = {"inner": plan.inner, "note": note, "hold": plan.hold}
    seen = [] if seen is None else seen
    answer = f.client.generate(
        prompt,
        strategy=name,
        strategy_params=params,
        max_new_tokens=count,
        temperature=0,
        ignore_eos=True,
        timeout=DEADLINE_S,
    )
    async for delta in answer:
        seen += delta.token_ids
    assert answer.result.token_ids == seen
    return seen, answer.result.attempts


async def _strike(
    f: Field,
    plan: Plan,
    note: Path,
    seen: list[int],
    watched: asyncio.Task[object],
    draw: random.Random,
    waiting: Waiting,
) -> tuple[str, int]:
    """Waits for the stage, and kills: the name of the engine, and how many tokens had come by then."""
    stage = {"first_token": "start_generate", "mid_decode": "start_generate"}.get(plan.stage, plan.hold or plan.stage)
    names = await anext(aiter(_reached(note, stage, watched)))
    victim = names[plan.victim % len(names)]
    await waiting.settled(victim)
    if plan.frozen:
        await f.freeze(victim)
        _go(note)
    while len(seen) < plan.tokens and not watched.done():
        await asyncio.sleep(0.001)
    if not plan.tokens:
        await asyncio.sleep(plan.delay)
    had = len(seen)
    await f.kill(victim, draw)
    _go(note)
    return victim, had


async def _reached(note: Path, stage: str, watched: asyncio.Task[object]) -> AsyncIterator[list[str]]:
    while True:
        for line in note.read_text().splitlines() if note.exists() else ():
            word, *names = line.split()
            if word == stage:
                yield names
        # A prompt that is cached, or one too short to send, does not come by there.
        assert not watched.done(), f"the request has ended without {stage}: {watched}"
        await asyncio.sleep(0.001)


def _go(note: Path) -> None:
    Path(f"{note}.go").touch()


def _met(plan: Plan, note: Path, had: int) -> bool:
    """Whether the request was in the stage when the engine died; `had` tokens had come."""
    said = [line.split()[0] for line in note.read_text().splitlines()]
    match plan.stage:
        case "prep_recv":
            return "remote_send" not in said
        case "remote_send":
            return "sent" not in said
        case "first_token":
            return had <= 1
        case _:
            return 0 < had < plan.count


class Waiting:
    """Starts dead engines anew, one at a time, while others serve."""

    def __init__(self, f: Field) -> None:
        self._field = f
        self._task: asyncio.Task[None] | None = None
        self._name = ""

    async def settled(self, name: str) -> None:
        """One that is started anew may serve before the start is over here."""
        if name == self._name:
            await self.over()

    async def enough(self, needed: int) -> None:
        """Returns when so many run."""
        if len(self._field.engines) < needed:
            await self.over()

    async def begin(self, name: str) -> None:
        """Restarts it in the background, after the one before."""
        await self.over()
        self._name = name
        self._task = asyncio.create_task(self._field.restart(name))

    async def over(self) -> None:
        """Returns when all are back."""
        if self._task is not None:
            await self._task
            self._task, self._name = None, ""


async def campaign(
    f: Field, seeds: Sequence[int], tally: Tally, stages: Sequence[str] = STAGES, limit_s: float = 3600.0
) -> None:
    """All stages with all seeds, in turns; ends early when `limit_s` is over. Every kill's streams are checked."""
    waiting = Waiting(f)
    deadline = time.monotonic() + limit_s
    try:
        for seed in seeds:
            for stage in stages:
                if time.monotonic() > deadline:
                    return
                await waiting.enough(2)
                victim = await one_kill(f, Plan.of(stage, seed, f), tally, waiting)
                await waiting.begin(victim)
    finally:
        await waiting.over()
    await f.at_rest(f.engines)
