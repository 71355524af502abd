"""Which transport a write takes: the sender offers what it has, the receiver picks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvmesh.errors import FailedPrecondition, InvalidArgument

# Best first.
ALL = ("cuda_ipc", "shm", "nccl", "gloo")
# What simulated pools have, and no others.
SIMULATED = "sim"
# These reach memory of the same host only.
HOST_ONLY = frozenset({"cuda_ipc", "shm", SIMULATED})
AUTO = "auto"
# What "auto" stands for: those that have run. The others are taken only when they are named.
PROVEN = ("shm", "gloo")


def choose(offered: Sequence[str], ours: Collection[str], same_host: bool, failed: Collection[str] = ()) -> str:
    """The first of `offered` that will do. Raises FailedPrecondition, which says why each will not."""
    why: list[str] = []
    for name in offered:
        if name not in ours:
            why.append(f"{name}: not here")
        elif name in failed:
            why.append(f"{name}: failed")
        elif name in HOST_ONLY and not same_host:
            why.append(f"{name}: sender and receiver are on different hosts")
        else:
            return name
    have = ", ".join(ours) or "none"
    raise FailedPrecondition(
        f"no common transport: of the sender's, {'; '.join(why) or 'none'}; the receiver has {have}"
    )


def wanted(setting: str) -> tuple[str, ...]:
    """The transports that a setting allows: "auto", or names with commas between. Raises InvalidArgument."""
    if setting == AUTO:
        return PROVEN
    names = tuple(setting.split(","))
    for name in names:
        if name not in ALL:
            raise InvalidArgument(f"transport = {setting!r}: {name!r} is not {AUTO} or one of {', '.join(ALL)}")
    return names
