"""Engines that hang, and do not die: SIGSTOP. What runs on them goes on elsewhere before its deadline."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kill_campaign import STRATEGY_DIR
from sim_harness import reference
from sim_processes import SimProcesses

from kvmesh.client import AsyncClient

PROMPT = [(i * 37) % 200 + 1 for i in range(1400)]
# gRPC itself notices only after 15 s.
DEADLINE_S = 12.0
# (stage, which of the engines there is stopped; whether it is before the call)
STAGES = {"prep_recv": 0, "remote_send sender": 0, "remote_send receiver": 1, "start_generate": 0, "streaming": 0}


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SimProcesses]:
    for module in ("hearing", "link"):
        monkeypatch.setattr(f"services.router.{module}.BEAT_S", 0.3)
    made = SimProcesses(3, tmp=tmp_path)
    made.router_settings = {"strategy_dir": str(STRATEGY_DIR), "trace_ratio": 0.0}
    async with made:
        yield made


@pytest.mark.parametrize("stage", STAGES)
async def test_an_engine_hangs(mesh: SimProcesses, tmp_path: Path, stage: str) -> None:
    note, held = tmp_path / "note", "start_generate" if stage == "streaming" else stage.split()[0]
    async with AsyncClient(mesh.servers[0].address) as client:
        answer = client.generate(
            PROMPT,
            strategy="staged",
            strategy_params={"note": note, "hold": held},
            max_new_tokens=60,
            temperature=0,
            ignore_eos=True,
            timeout=DEADLINE_S,
        )
        tokens: list[int] = []

        async def read() -> None:
            async for delta in answer:
                tokens.extend(delta.token_ids)

        reading = asyncio.create_task(read())
        async with asyncio.timeout(5):
            while not (said := [line.split() for line in _lines(note) if line.startswith(held)]):
                await asyncio.sleep(0.001)
        victim = said[0][1 + STAGES[stage]]
        if stage == "streaming":
            Path(f"{note}.go").touch()
            async with asyncio.timeout(5):
                while len(tokens) < 5:
                    await asyncio.sleep(0.001)
        mesh.signal(victim, signal.SIGSTOP)
        Path(f"{note}.go").touch()
        await reading
        assert tokens == reference(PROMPT, 60)
        # Who sends can be done without.
        assert answer.result.attempts == (1 if stage == "remote_send sender" else 2)
        # And those that come meanwhile do not go there.
        for _ in range(3):
            other = await client.generate(PROMPT[:9], max_new_tokens=3, temperature=0, timeout=5).wait()
            assert other.attempts == 1
        mesh.signal(victim, signal.SIGCONT)
        await mesh.connected(victim)
    await mesh.at_rest(mesh.names)


def _lines(note: Path) -> list[str]:
    return note.read_text().splitlines() if note.exists() else []
