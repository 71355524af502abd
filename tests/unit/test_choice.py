"""Which transport is chosen."""

import pytest

from kvmesh.dataplane.choice import PROVEN, choose, wanted
from kvmesh.endpoint.pairs import IDLE, Pairs
from kvmesh.errors import FailedPrecondition, InvalidArgument
from kvmesh.v1.kv_pb2 import KvPool, Meeting

GPU, CPU = ["cuda_ipc", "nccl"], ["shm", "gloo"]


@pytest.mark.parametrize(
    ("offered", "ours", "same_host", "failed", "chosen"),
    [
        (GPU, GPU, True, (), "cuda_ipc"),
        (GPU, GPU, False, (), "nccl"),
        (GPU, GPU, True, ("cuda_ipc",), "nccl"),
        (CPU, CPU, True, (), "shm"),
        (CPU, CPU, False, (), "gloo"),
        (CPU, CPU, True, ("shm",), "gloo"),
        # The sender's order counts: what it has found wanting comes last.
        (["gloo", "shm"], CPU, True, (), "gloo"),
        (CPU, ["gloo"], True, (), "gloo"),
    ],
)
def test_choices(offered, ours, same_host, failed, chosen):
    assert choose(offered, ours, same_host, failed) == chosen


@pytest.mark.parametrize(
    ("offered", "ours", "same_host", "failed", "why"),
    [
        (["shm"], CPU, False, (), "shm: sender and receiver are on different hosts; the receiver has shm, gloo"),
        (GPU, CPU, True, (), "cuda_ipc: not here; nccl: not here"),
        (CPU, CPU, True, ("shm", "gloo"), "shm: failed; gloo: failed"),
        ([], CPU, True, (), "of the sender's, none"),
        (CPU, [], True, (), "the receiver has none"),
    ],
)
def test_refusals_say_why(offered, ours, same_host, failed, why):
    with pytest.raises(FailedPrecondition, match="no common transport") as caught:
        choose(offered, ours, same_host, failed)
    assert why in str(caught.value)


def test_settings():
    assert wanted("auto") is PROVEN
    assert wanted("cuda_ipc,gloo") == ("cuda_ipc", "gloo")
    assert wanted("gloo") == ("gloo",) and wanted("shm,gloo") == ("shm", "gloo")
    for bad in ("", "tcp", "shm,", "auto,shm", "SHM"):
        with pytest.raises(InvalidArgument, match="transport = "):
            wanted(bad)


def test_pairs_are_used_again_by_the_same_sender_only():
    pairs = Pairs([KvPool(meeting=Meeting(address="h:1", pair="x")), KvPool(meeting=Meeting(address="h:2", pair="y"))])
    first = pairs.take("a", False)
    assert [p.meeting for p in pairs.grant(first)] == [
        Meeting(address="h:1", pair="x/1", fresh=True),
        Meeting(address="h:2", pair="y/1", fresh=True),
    ]
    # In use: another write gets another one.
    assert pairs.take("a", False).number == 2
    pairs.put(first)
    assert pairs.take("b", False).number == 3
    assert pairs.take("a", True).number == 4
    again = pairs.take("a", False)
    assert (again.number, again.fresh) == (1, False)
    assert pairs.grant(again)[0].meeting == Meeting(address="h:1", pair="x/1")
    assert pairs.take("a", False).fresh


def test_pairs_are_bounded():
    pairs = Pairs([])
    taken = [pairs.take(f"s{i}", False) for i in range(IDLE + 5)]
    for pair in taken:
        pairs.put(pair)
    assert pairs.take("s0", False).fresh and not pairs.take(f"s{IDLE + 4}", False).fresh
