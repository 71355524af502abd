"""One of several processes that are a router together: `python -m services.router.worker`, its place on standard input.

It says `ready` on standard output, and ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass

from services.router.cli import RouterConfig


@dataclass(frozen=True)
class Place:
    """Which of how many, and the shared file of their tally."""

    config: RouterConfig
    number: int
    workers: int
    tally_fd: int

    def dump(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(line: str) -> Place:
        """The reverse."""
        fields = json.loads(line)
        return Place(RouterConfig(**fields.pop("config")), **fields)


async def serve(place: Place) -> None:
    """Serves until cancelled. Raises MeshError."""
    from services.router.main import settle, start
    from services.router.tally import Tally

    async with AsyncExitStack() as stack:
        tally = Tally(place.tally_fd, place.workers, place.number)
        stack.callback(tally.close)
        await start(place.config, stack, tally)
        settle()
        print("ready", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Runs the worker."""
    from kvmesh.aio import run, setup_logging
    from services.router.tuning import tune

    place = Place.load(sys.stdin.readline())
    setup_logging(f"router.{place.number}", place.config.log_level)
    tune()
    run(serve(place))


if __name__ == "__main__":
    main()
