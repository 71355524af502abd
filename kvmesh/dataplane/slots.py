"""Slots of a pool as numpy arrays, and as runs of consecutive ones."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvmesh.errors import InvalidArgument
from kvmesh.v1.kv_pb2 import SlotRuns

# int64, shape [tokens]: the row of each token, in token order.
Slots: TypeAlias = npt.NDArray[np.int64]


def to_runs(slots: Slots) -> SlotRuns:
    """The runs of `slots`."""
    if not len(slots):
        return SlotRuns()
    edges = np.concatenate(([0], np.flatnonzero(np.diff(slots) != 1) + 1, [len(slots)]))
    return SlotRuns(starts=slots[edges[:-1]].tolist(), lengths=np.diff(edges).tolist())


def from_runs(runs: SlotRuns, rows: int) -> Slots:
    """The slots of `runs`. Raises InvalidArgument unless all are rows of a pool of `rows` rows, and none is padding."""
    starts = np.asarray(runs.starts, np.int64)
    lengths = np.asarray(runs.lengths, np.int64)
    if len(starts) != len(lengths) or (len(starts) and (starts.min() < 1 or (starts + lengths).max() > rows)):
        raise InvalidArgument(f"slots are not rows 1 to {rows - 1} of the pool")
    if not len(starts):
        return np.empty(0, np.int64)
    before = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    slots: Slots = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return slots


def joint_runs(source: Slots, target: Slots) -> list[tuple[int, int, int]]:
    """(source row, target row, rows) of each stretch in which both run on; both have the same length."""
    if not len(source):
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    edges = np.concatenate(([0], breaks, [len(source)]))
    at = edges[:-1]
    return list(zip(source[at].tolist(), target[at].tolist(), np.diff(edges).tolist(), strict=True))
