"""The dry run of a strategy: in a process of its own, over pretend engines, before it may see a request.

`python -m services.router.rehearsal PATH` with the source on standard input writes a JSON object to standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from kvmesh.strategy import Chunk, Mesh, Request, Strategy
from kvmesh.v1.common_pb2 import SamplingParams
from services.router.policies import all_policies
from services.router.pretend import Books, PretendEngine
from services.router.strategy_file import Loader, complaint

ENGINES = (1, 3)
PROMPTS = (1, 7, 300, 3000)
NEW_TOKENS = 8
# One run; all runs of a file, the start of Python included.
RUN_S, FILE_S = 3.0, 30.0


async def rehearse(strategy: Strategy, path: Path) -> str:
    """Runs it with its defaults over meshes and prompts of several sizes. What is wrong with it; empty: nothing."""
    for engines in ENGINES:
        for prompt in PROMPTS:
            for session in ("", "a conversation"):
                if wrong := await _run(strategy, engines, prompt, session, path):
                    return f"{strategy.name}, with {engines} engine(s) and a prompt of {prompt} token(s): {wrong}"
    return ""


async def _run(strategy: Strategy, engines: int, prompt: int, session: str, path: Path) -> str:
    books, tasks = Books(), asyncio.all_tasks()
    mesh = Mesh([PretendEngine(f"engine-{i}", books, {}) for i in range(engines)], all_policies(random.Random(0)))
    tokens = tuple(i % 250 + 1 for i in range(prompt))
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0)
    request = Request("rehearsal", tokens, sampling, "pretend", time.monotonic() + RUN_S, session=session)
    try:
        async with asyncio.timeout(RUN_S):
            wrong = await _answer(strategy, request, mesh)
    except TimeoutError:
        return f"it did not end within {RUN_S:g} s"
    except Exception as error:
        return complaint(error, path)
    for _ in range(3):
        await asyncio.sleep(0)
    if wrong:
        return wrong
    if books.tickets:
        return f"it neither used nor released {len(books.tickets)} ticket(s)"
    if books.generations:
        return f"it left {len(books.generations)} generation(s) running: cancel() them"
    if left := asyncio.all_tasks() - tasks:
        return f"it left {len(left)} task(s) running"
    return ""


async def _answer(strategy: Strategy, request: Request, mesh: Mesh) -> str:
    chunks = strategy(request, mesh, **strategy.bind({}))
    count, finished = 0, False
    chunk: Any
    try:
        async for chunk in chunks:
            if not isinstance(chunk, Chunk):
                return f"it yielded {type(chunk).__name__}, not Chunk"
            if finished:
                return "it went on after the last chunk"
            count += len(chunk.token_ids)
            finished = chunk.finished is not None
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]
    if not finished:
        return "it ended before the answer did"
    return "" if count == NEW_TOKENS else f"its answer had {count} tokens, not {NEW_TOKENS}"


async def rehearse_source(path: Path, source: bytes) -> str:
    """Runs `main` on `source` in another process, which is killed after FILE_S seconds; what is wrong with it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "services.router.rehearsal", str(path)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(FILE_S):
            out, _ = await process.communicate(source)
    except TimeoutError:
        return f"its dry run did not end within {FILE_S:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return str(json.loads(out)["error"])
    except (ValueError, KeyError, TypeError):
        return f"its dry run ended with status {process.returncode}"


def main() -> None:
    """The process."""
    # What the file prints is no answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    path = Path(sys.argv[1])
    try:
        loaded = Loader().load(path, sys.stdin.buffer.read())
        error = next(filter(None, (asyncio.run(rehearse(s, path)) for s in loaded.strategies.values())), "")
    except Exception as failure:
        error = complaint(failure, path)
    os.write(answers, json.dumps({"error": error}).encode())


if __name__ == "__main__":
    main()
