"""Which strategies there are, and the ones in force: a setting of the mesh, the same on every router."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from importlib.metadata import entry_points

from kvmesh.aio import Tasks
from kvmesh.errors import Aborted, DeadlineExceeded, InvalidArgument, MeshError, NotFound, Unavailable
from kvmesh.membership import SharedSettings
from kvmesh.params import Param
from kvmesh.strategy import Strategy
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.registry_pb2 import Setting
from services.router.ledger import Ledger
from services.router.lineup import NEW, Choice, Guard, Lineup
from services.router.watchdog import Watchdog

log = logging.getLogger(__name__)

GROUP = "kvmesh.strategies"
KEY = "strategy"
# Changes of the setting that others make at the same time are worked in so many times.
TRIES = 5
# A caller's own clock may end a call so much before ours.
LATE_S = 0.05
_UNREADABLE = (MeshError, ValueError, KeyError, TypeError, AttributeError)


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


class _NoLongerMeant(Exception):
    """Somebody else has ended the choice that was to be taken back."""


class StrategyBoard:
    """The strategies and the choices in force. `start` follows the registry; while it is away the last ones stay.

    Raises NotFound for an unknown `default`.
    """

    def __init__(self, strategies: Mapping[str, Strategy], default: str, settings: SharedSettings) -> None:
        self.strategies = dict(strategies)
        self._settings = settings
        self._tasks = Tasks()
        self._watchdog = Watchdog()
        # Revisions that are being taken back.
        self._falling: set[int] = set()
        # The newest setting, if it could not be read here: perhaps it can when there are other strategies.
        self._missed: Setting | None = None
        self.lineup = Lineup(self._choice(default, {}))

    @property
    def current(self) -> Choice:
        """The choice in force."""
        return self.lineup.main

    def start(self) -> None:
        """Begins to follow the setting."""
        self._tasks.start(self._follow(), "follow the strategy setting")

    async def close(self) -> None:
        """Stops following."""
        await self._tasks.close()

    def choose(self, name: str, given: Mapping[str, str], key: str = "") -> Choice:
        """The choice for one request: the one in force for `key` with `given` over it, or the named one, at revision 0.

        `key` is the session, or else the request id. Raises NotFound, InvalidArgument.
        """
        if name:
            return self._choice(name, given)
        now = self.lineup.side(key)
        if not given:
            return now
        return self._choice(now.strategy.name, {**now.given, **given}, now.revision)

    async def set(self, name: str, given: Mapping[str, str], share: float = 0.0, guard: Guard | None = None) -> Choice:
        """Puts a strategy in force on every router; with a share above 0 and below 100 percent, on trial.

        Raises NotFound, InvalidArgument, Aborted, Unavailable.
        """
        if not 0 <= share <= 100:
            raise InvalidArgument(f"share_percent = {share:g} is not between 0 and 100")
        share = share if share < 100 else 0.0
        choice = dataclasses.replace(self._choice(name, given, NEW), share=share, guard=guard)
        lineup = await self._change(lambda now: now.put(choice))
        return lineup.main if lineup.trial is None or not share else lineup.trial

    async def rollback(self, reason: str, only: Choice | None = None) -> Choice:
        """Ends the trial, or puts the choice before in force again; the one in force afterwards.

        With `only`, if that is what would be ended. Raises FailedPrecondition, NotFound, Aborted, Unavailable.
        """

        def back(now: Lineup) -> Lineup:
            if only is not None and now.trial is not None and now.main.revision == only.revision:
                # The trial has nothing to do with it, and goes on.
                alone = dataclasses.replace(now, trial=None)
                return dataclasses.replace(alone.back(reason, self._choice), trial=now.trial)
            ending = now.trial or now.main
            if only is not None and ending.revision != only.revision:
                raise _NoLongerMeant
            return now.back(reason, self._choice)

        return (await self._change(back)).main

    @contextmanager
    def judging(self, choice: Choice, ledger: Ledger, deadline: float) -> Iterator[None]:
        """Around the run of a request: what it comes to counts for or against the choice that served it."""
        try:
            yield
        except asyncio.CancelledError:
            # The caller's leaving says nothing; the passing of its deadline does.
            if time.monotonic() >= deadline - LATE_S:
                self._judge(choice, True, ledger.ttft)
            raise
        except Exception:
            self._judge(choice, True, ledger.ttft)
            raise
        self._judge(choice, False, ledger.ttft)

    def _judge(self, choice: Choice, failed: bool, ttft: float) -> None:
        verdict = self._watchdog.see(choice, failed, ttft)
        if verdict and choice.revision in self._revisions() and choice.revision not in self._falling:
            self._falling.add(choice.revision)
            self._tasks.start(self._take_back(choice, verdict), "take a strategy back")

    async def _take_back(self, choice: Choice, verdict: str) -> None:
        log.warning("strategy %s, revision %d: %s", choice.strategy.name, choice.revision, verdict)
        try:
            await self.rollback(verdict, only=choice)
        except _NoLongerMeant:
            log.info("strategy %s, revision %d, has been ended elsewhere", choice.strategy.name, choice.revision)
        finally:
            # When it could not be done, the next request that shows the need tries again.
            self._falling.discard(choice.revision)

    def adopt(self, strategies: Mapping[str, Strategy]) -> None:
        """Makes these all the strategies there are: those in force are replaced by their namesakes, or stay.

        Raises InvalidArgument, and changes nothing, when one in force does not take the parameters that it has.
        """
        fresh = dict(strategies)

        def renewed(choice: Choice) -> Choice:
            strategy = fresh.get(choice.strategy.name, choice.strategy)
            return dataclasses.replace(choice, strategy=strategy, values=strategy.bind(choice.given))

        now = self.lineup
        main, trial = renewed(now.main), None if now.trial is None else renewed(now.trial)
        self.lineup = dataclasses.replace(now, main=main, trial=trial)
        self.strategies = {c.strategy.name: c.strategy for c in (main, trial) if c is not None} | fresh
        if self._missed is not None:
            self._take(self._missed)

    def _revisions(self) -> frozenset[int]:
        return frozenset(c.revision for c in (self.lineup.main, self.lineup.trial) if c is not None)

    async def _change(self, change: Callable[[Lineup], Lineup]) -> Lineup:
        """Changes the setting, by what it is now, and takes it."""
        try:
            for _ in range(TRIES):
                known = await self._settings.get(KEY)
                wanted = change(self._known(known))
                try:
                    setting = await self._settings.put(KEY, wanted.text(), 0 if known is None else known.revision)
                except Aborted:
                    continue
                lineup = self._read(setting)
                self._apply(lineup)
                return lineup
        except DeadlineExceeded as error:
            raise Unavailable(str(error)) from error
        raise Aborted(f"setting {KEY} was changed by others {TRIES} times meanwhile")

    def _known(self, setting: Setting | None) -> Lineup:
        if setting is not None:
            try:
                return self._read(setting)
            except _UNREADABLE as error:
                log.warning("setting %s = %s is written over: %s", KEY, setting.value, error)
        return self.lineup

    def _choice(self, name: str, given: Mapping[str, str], revision: int = 0) -> Choice:
        if name not in self.strategies:
            raise NotFound(f"strategy = {name!r} is unknown; there is: {', '.join(sorted(self.strategies))}")
        strategy = self.strategies[name]
        return Choice(strategy, dict(given), strategy.bind(given), revision)

    def _apply(self, lineup: Lineup) -> None:
        # Our own put and the watch may overtake each other; a store that lost its past starts again at revision 1, and
        # may come to the revision known here with another choice.
        if lineup == self.lineup:
            return
        self.lineup = lineup
        self._watchdog.keep(self._revisions())
        log.info("strategy %s is in force, revision %d", lineup.main.strategy.name, lineup.main.revision)
        if (trial := lineup.trial) is not None:
            log.info("strategy %s is on trial, revision %d: %g %%", trial.strategy.name, trial.revision, trial.share)

    async def _follow(self) -> None:
        async with aclosing(self._settings.watch(KEY)) as settings:
            async for setting in settings:
                self._take(setting)

    def _take(self, setting: Setting) -> None:
        self._missed = None
        try:
            self._apply(self._read(setting))
        except _UNREADABLE as error:
            self._missed = setting
            log.warning("setting %s = %s is not taken: %s", KEY, setting.value, error)

    def _read(self, setting: Setting) -> Lineup:
        return Lineup.read(setting, self._choice)


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
