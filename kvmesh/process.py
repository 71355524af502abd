"""Processes of this machine, told from later ones with the same number."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass


def _start_ticks(pid: int) -> tuple[int, str]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The second field is the program's name in parentheses, and may hold anything.
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[19]), fields[0].decode()


@dataclass(frozen=True)
class ProcessRef:
    """One process. `start_ticks`: clock ticks since boot at which it started."""

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessRef:
        """The process that has this number now. Raises ProcessLookupError."""
        try:
            return ProcessRef(pid, _start_ticks(pid)[0])
        except (FileNotFoundError, ProcessLookupError, IndexError):
            raise ProcessLookupError(f"there is no process {pid}") from None

    @staticmethod
    def current() -> ProcessRef:
        """This process."""
        return ProcessRef.of(os.getpid())

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            ticks, state = _start_ticks(self.pid)
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return False
        return ticks == self.start_ticks and state not in "ZX"


def be_nice() -> None:
    """The calling thread's work must not hold up what it is there for: the computing that copies overlap with."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
