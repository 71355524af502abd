"""What a process that is nothing but a router does without."""

from __future__ import annotations

import os

from kvmesh.tokenizer import without_torch

# gRPC 1.85 with its former I/O takes a fifth less CPU time for a token than with its event engine:
# compare `make bench BENCH=router` with `GRPC_EXPERIMENTS= make bench BENCH=router`.
EXPERIMENTS = "-event_engine_client,-event_engine_listener"


def tune() -> None:
    """Call it before gRPC or transformers are used. A GRPC_EXPERIMENTS of the user's stays."""
    os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)
    without_torch()
