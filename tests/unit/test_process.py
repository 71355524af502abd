"""Processes told from later ones with the same number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from kvmesh.process import ProcessRef


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def test_this_process_is_alive():
    me = ProcessRef.current()
    assert me.pid == os.getpid() and me.start_ticks > 0
    assert me.alive()
    assert ProcessRef.of(os.getpid()) == me


def test_one_that_ended_is_not_alive(child):
    ref = ProcessRef.of(child.pid)
    assert ref.alive()
    child.kill()
    # Not waited for: a zombie still has its number.
    for _ in range(1000):
        if not ref.alive():
            break
        time.sleep(0.005)
    assert os.path.exists(f"/proc/{child.pid}/stat")
    assert not ref.alive()
    child.wait()
    assert not ref.alive()


def test_a_later_one_with_the_same_number_is_another(child):
    ref = ProcessRef.of(child.pid)
    assert not ProcessRef(ref.pid, ref.start_ticks - 1).alive()
    assert ref.alive()


def test_a_stopped_one_is_alive(child):
    import signal

    ref = ProcessRef.of(child.pid)
    child.send_signal(signal.SIGSTOP)
    assert ref.alive()


@pytest.mark.parametrize("pid", [0, 2**22 + 1, 2**32 - 1])
def test_numbers_of_no_process(pid):
    assert not ProcessRef(pid, 1).alive()
    with pytest.raises(ProcessLookupError, match=str(pid)):
        ProcessRef.of(pid)


def test_a_name_with_blanks_and_parentheses(tmp_path):
    program = tmp_path / "a) Z 1 (b"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([str(program), "60"]) as process:
        try:
            ref = ProcessRef.of(process.pid)
            assert ref.alive()
            assert abs(ref.start_ticks - ProcessRef.current().start_ticks) < 100 * 3600
        finally:
            process.kill()
