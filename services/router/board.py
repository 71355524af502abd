"""Which strategies there are, and the one in force: a setting of the mesh, the same on every router."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from kvmesh.aio import Tasks
from kvmesh.errors import DeadlineExceeded, MeshError, NotFound, Unavailable
from kvmesh.membership import SharedSettings
from kvmesh.params import Param
from kvmesh.strategy import Strategy
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.registry_pb2 import Setting

log = logging.getLogger(__name__)

GROUP = "kvmesh.strategies"
KEY = "strategy"


def catalog() -> dict[str, Strategy]:
    """Every strategy of the entry point group; one that cannot be loaded is logged and left out."""
    strategies: dict[str, Strategy] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            loaded = entry.load()
            if not isinstance(loaded, Strategy):
                raise TypeError(f"{entry.value} is not a strategy")
            strategies[loaded.name] = loaded
        except Exception:
            log.exception("strategy %s (%s) is left out", entry.name, entry.value)
    return strategies


@dataclass(frozen=True)
class Choice:
    """A strategy with values for its parameters. `given` is what was set, in text form; the rest are defaults."""

    strategy: Strategy
    given: Mapping[str, str]
    values: dict[str, Any]
    revision: int = 0

    def message(self) -> pb.StrategyChoice:
        """As it travels: all values, in text form."""
        params = {name: Param.text(value) for name, value in self.values.items()}
        return pb.StrategyChoice(name=self.strategy.name, params=params, revision=self.revision)


class StrategyBoard:
    """The strategies and the choice in force. `start` follows the registry; while it is away the last choice stays.

    Raises NotFound for an unknown `default`.
    """

    def __init__(self, strategies: Mapping[str, Strategy], default: str, settings: SharedSettings) -> None:
        self.strategies = dict(strategies)
        self._settings = settings
        self._tasks = Tasks()
        self.current = self._choice(default, {})

    def start(self) -> None:
        """Begins to follow the setting."""
        self._tasks.start(self._follow(), "follow the strategy setting")

    async def close(self) -> None:
        """Stops following."""
        await self._tasks.close()

    def choose(self, name: str, given: Mapping[str, str]) -> Choice:
        """The choice for one request: the one in force with `given` over it, or the named one, at revision 0.

        Raises NotFound, InvalidArgument.
        """
        if name:
            return self._choice(name, given)
        if not given:
            return self.current
        now = self.current
        return self._choice(now.strategy.name, {**now.given, **given}, now.revision)

    async def set(self, name: str, given: Mapping[str, str]) -> Choice:
        """Puts a strategy in force on every router. Raises NotFound, InvalidArgument, Unavailable."""
        self._choice(name, given)
        value = json.dumps({"name": name, "params": dict(given)}, sort_keys=True)
        try:
            setting = await self._settings.put(KEY, value)
        except DeadlineExceeded as error:
            raise Unavailable(str(error)) from error
        choice = self._choice(name, given, setting.revision)
        self._apply(choice)
        return choice

    def _choice(self, name: str, given: Mapping[str, str], revision: int = 0) -> Choice:
        if name not in self.strategies:
            raise NotFound(f"strategy = {name!r} is unknown; there is: {', '.join(sorted(self.strategies))}")
        strategy = self.strategies[name]
        return Choice(strategy, dict(given), strategy.bind(given), revision)

    def _apply(self, choice: Choice) -> None:
        # Our own put and the watch may overtake each other; a store that lost its past starts again at revision 1, and
        # may come to the revision known here with another choice.
        if choice != self.current:
            self.current = choice
            log.info("strategy %s is in force, revision %d", choice.strategy.name, choice.revision)

    async def _follow(self) -> None:
        async with aclosing(self._settings.watch(KEY)) as settings:
            async for setting in settings:
                try:
                    self._apply(self._read(setting))
                except (MeshError, ValueError, KeyError, TypeError, AttributeError) as error:
                    log.warning("setting %s = %s is not taken: %s", KEY, setting.value, error)

    def _read(self, setting: Setting) -> Choice:
        value = json.loads(setting.value)
        params = {str(k): str(v) for k, v in value.get("params", {}).items()}
        return self._choice(value["name"], params, setting.revision)


def describe(strategy: Strategy) -> pb.StrategyInfo:
    """What ListStrategies says of it."""
    params = [
        pb.StrategyParam(
            name=p.name,
            type=p.kind.__name__,
            default_value=Param.text(p.default),
            constraint="" if p.limit is None else str(p.limit),
        )
        for p in strategy.params.values()
    ]
    return pb.StrategyInfo(name=strategy.name, summary=strategy.summary, params=params)
