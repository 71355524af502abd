"""Owned tasks; the end of a process on a signal."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
import time

import pytest

from kvmesh.aio import Tasks, setup_logging
from kvmesh.errors import Unavailable


async def test_a_task_gives_its_result_and_is_forgotten():
    tasks = Tasks()

    async def work() -> int:
        return 7

    task = tasks.start(work(), "seven")
    assert task.get_name() == "seven" and len(tasks) == 1
    assert await task == 7
    await asyncio.sleep(0)
    assert len(tasks) == 0
    await tasks.close()


async def test_close_cancels_and_waits_for_the_clean_up():
    tasks, ended = Tasks(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append(name)

    for name in ("a", "b"):
        tasks.start(work(name), name)
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(ended) == ["a", "b"] and len(tasks) == 0
    await tasks.close()


async def test_what_is_started_after_close_does_not_run():
    tasks, ran = Tasks(), []
    await tasks.close()

    async def work() -> None:
        ran.append(1)

    task = tasks.start(work(), "late")
    await asyncio.wait([task])
    assert task.cancelled() and not ran


async def test_a_task_may_close_its_owner():
    tasks = Tasks()
    other = tasks.start(asyncio.Event().wait(), "other")
    await tasks.start(tasks.close(), "closer")
    assert other.cancelled()


async def test_a_task_that_will_not_end_is_given_up(caplog, monkeypatch):
    monkeypatch.setattr("kvmesh.aio.CLOSE_S", 0.05)
    tasks, gate = Tasks(), asyncio.Event()

    async def stubborn() -> None:
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    task = tasks.start(stubborn(), "stubborn")
    await asyncio.sleep(0)
    await tasks.close()
    assert "still running 0.05 s after they were cancelled: stubborn" in caplog.text
    gate.set()
    await task


async def test_drain_waits_for_tasks_and_for_those_that_they_start():
    tasks, seen = Tasks(), []

    async def work(n: int) -> None:
        await asyncio.sleep(0.01)
        seen.append(n)
        if n:
            tasks.start(work(n - 1), "next")

    tasks.start(work(2), "first")
    assert await tasks.drain(5)
    assert seen == [2, 1, 0]
    endless = tasks.start(asyncio.Event().wait(), "endless")
    began = time.monotonic()
    assert not await tasks.drain(0.05)
    assert time.monotonic() - began < 2 and not endless.done()
    await tasks.close()


async def test_failures_are_logged_a_mesh_error_in_one_line(caplog):
    tasks = Tasks()

    async def fails(error: Exception) -> None:
        raise error

    for error in (Unavailable("etcd is away"), ValueError("a bug")):
        await asyncio.wait([tasks.start(fails(error), f"work {type(error).__name__}")])
    await tasks.drain(1)
    first, second = caplog.records
    assert first.getMessage() == "work Unavailable failed: Unavailable: etcd is away" and first.exc_info is None
    assert second.getMessage() == "work ValueError failed" and second.exc_info is not None


PROGRAM = """
import asyncio, sys
from kvmesh.aio import run, setup_logging
from kvmesh.errors import Unavailable
setup_logging("e%0", "info")
async def main():
    print(type(asyncio.get_running_loop()).__module__, flush=True)
    try:
        match sys.argv[1]:
            case "wait": await asyncio.sleep(60)
            case "fail": raise Unavailable("cannot listen on x")
            case "bug": raise ValueError("a bug")
    finally:
        print("cleaning", flush=True)
        await asyncio.sleep(0.3)
        print("clean", flush=True)
run(main())
print("after", flush=True)
"""


def started(what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_good_end_and_a_second_one_does_not_cut_it_short(number):
    process = started("wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "uvloop\n"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(number)
    code, out, err = ends(process)
    assert (code, out) == (0, "clean\nafter\n")
    assert re.fullmatch(rf"[0-9-]{{10}} [0-9:]{{8}},\d{{3}} INFO    e%0 kvmesh\.aio: {number.name}: stopping\n", err)


def test_returning_is_a_good_end():
    assert ends(started("return")) == (0, "uvloop\ncleaning\nclean\nafter\n", "")


def test_a_mesh_error_is_one_line_and_status_1():
    assert ends(started("fail")) == (1, "uvloop\ncleaning\nclean\n", "Error: cannot listen on x\n")


def test_a_bug_keeps_its_traceback():
    code, _, err = ends(started("bug"))
    assert code == 1 and err.startswith("Traceback") and "ValueError: a bug" in err


def test_debug_is_about_us_and_not_about_grpc():
    root = logging.getLogger()
    before, handlers = root.level, root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in ("grpc", "asyncio", "opentelemetry")}
    try:
        setup_logging("r", "debug")
        assert logging.getLogger("kvmesh.aio").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("grpc._cython").isEnabledFor(logging.DEBUG)
        setup_logging("r", "error")
        assert not logging.getLogger("asyncio").isEnabledFor(logging.WARNING)
        with pytest.raises(ValueError, match="LOUD"):
            setup_logging("r", "loud")
    finally:
        root.setLevel(before)
        root.handlers[:] = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
