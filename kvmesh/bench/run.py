"""Runs a load: open loop by given times, or closed loop by concurrency."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.bench.records import Record
from kvmesh.bench.targets import FAILURES, Target
from kvmesh.bench.workloads import Ask


@dataclass
class Progress:
    """How far a run is."""

    total: int
    sent: int = 0
    ended: int = 0
    failed: int = 0

    @property
    def running(self) -> int:
        """Sent and not ended."""
        return self.sent - self.ended


@dataclass
class Load:
    """`asks`, to be sent at `times` (seconds); without times, `concurrency` at once.

    The first `warmup` records are left out of the report. `timeout`: what one request may take, in seconds.
    """

    asks: Sequence[Ask]
    times: Sequence[float] | None = None
    concurrency: int = 1
    warmup: int = 0
    timeout: float = 600.0
    on_progress: Callable[[Progress], None] = field(default=lambda progress: None)


async def run(target: Target, load: Load) -> list[Record]:
    """One record for each request, in order of sending. Cancelling cancels what runs."""
    now = asyncio.get_running_loop().time
    progress = Progress(len(load.asks))
    records: list[Record] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(ask: Ask, record: Record) -> None:
        progress.sent += 1
        record.sent = now()
        try:
            await target.ask(ask, record, load.timeout)
        except FAILURES as error:
            record.error = str(error) or type(error).__name__
            progress.failed += 1
        finally:
            record.ended = now()
            progress.ended += 1
            load.on_progress(progress)

    def start(number: int, ask: Ask, due: float) -> asyncio.Task[None]:
        record = Record(number, ask.prompt_tokens, due)
        records.append(record)
        task = asyncio.get_running_loop().create_task(one(ask, record))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    try:
        if load.times is None:
            waiting = iter(enumerate(load.asks))

            async def worker() -> None:
                for number, ask in waiting:
                    await start(number, ask, now())

            await asyncio.gather(*(worker() for _ in range(min(load.concurrency, len(load.asks)))))
        else:
            begin = now()
            for number, (ask, at) in enumerate(zip(load.asks, load.times, strict=True)):
                if (left := begin + at - now()) > 0:
                    await asyncio.sleep(left)
                start(number, ask, begin + at)
            await asyncio.gather(*tasks)
    finally:
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return records
