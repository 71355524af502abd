"""Which transports a pool gets, from a service's settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from kvmesh.dataplane.base import CannotConnect, Transport
from kvmesh.dataplane.choice import PROVEN, wanted
from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import split_address

log = logging.getLogger(__name__)


def open_all(setting: str, makers: Mapping[str, Callable[[], Transport]]) -> dict[str, Transport]:
    """The transports that `setting` allows, of those that a pool can have; the setting's order, best first.

    One that cannot be set up is left out with a warning, unless it was named. Raises CannotConnect, InvalidArgument.
    """
    names = wanted(setting)
    transports: dict[str, Transport] = {}
    for name in names:
        if name not in makers:
            if names is not PROVEN:
                raise InvalidArgument(f"transport = {setting!r}: {name} cannot reach a pool like ours")
            continue
        try:
            transports[name] = makers[name]()
        except CannotConnect as error:
            if names is not PROVEN:
                for made in transports.values():
                    made.close()
                raise
            log.warning("no transport %s: %s", name, error)
    return transports


def data_host(setting: str, advertise: str, listen: str) -> str:
    """The address that peers on other hosts send KV to: `setting`, or the host of the others."""
    host = setting or split_address(advertise or listen)[0]
    # Peers cannot connect to a wildcard.
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host
