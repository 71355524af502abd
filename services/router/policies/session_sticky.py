"""Session sticky: a session stays on its engine, on every router alike, by rendezvous hashing."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from kvmesh.strategy import Engine, Policy, Request


def weight(session: str, engine: str) -> int:
    """How much a session wants an engine: the highest has it, so that one that joins takes only its own share."""
    return int.from_bytes(blake2b(f"{session}\0{engine}".encode(), digest_size=8).digest(), "big")


class SessionSticky(Policy):
    """A request without session goes where the load is least."""

    def pick(self, request: Request, engines: Sequence[Engine]) -> Engine:
        """The session's engine among these."""
        if not request.session:
            return min(engines, key=lambda e: e.load.work)
        return max(engines, key=lambda e: weight(request.session, e.name))
