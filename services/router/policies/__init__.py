"""The placement policies, one a file: which engine a request, or a part of it, goes to."""

from __future__ import annotations

import random

from kvmesh.strategy import Policy
from services.router.policies.kv_aware import KvAware
from services.router.policies.least_load import LeastLoad
from services.router.policies.power_of_two import PowerOfTwo
from services.router.policies.prefix_affinity import PrefixAffinity
from services.router.policies.round_robin import RoundRobin
from services.router.policies.session_sticky import SessionSticky


def all_policies(draw: random.Random | None = None) -> dict[str, Policy]:
    """One object of each, by name: those of one router. `draw` is for the policies that draw lots."""
    return {
        "least_load": LeastLoad(),
        "round_robin": RoundRobin(),
        "power_of_two": PowerOfTwo(draw or random.Random()),
        "session_sticky": SessionSticky(),
        "prefix_affinity": PrefixAffinity(),
        "kv_aware": KvAware(),
    }
