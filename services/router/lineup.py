"""Which strategies serve: one in force, perhaps one on trial, and those before. As JSON it is a setting of the mesh."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from kvmesh.errors import FailedPrecondition, InvalidArgument
from kvmesh.params import Param
from kvmesh.strategy import Strategy
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.registry_pb2 import Setting

HISTORY = 10
# Requests that a guard looks back on, and those it waits for by default.
WINDOW, MIN_REQUESTS = 200, 20
REPLACED = "replaced"
# Of a choice that is to get the revision of the setting that it is put into.
NEW = -1


@dataclass(frozen=True)
class Guard:
    """Bounds on what a change may do; 0: not looked at."""

    max_error_rate: float = 0.0
    max_ttft_seconds: float = 0.0
    min_requests: int = MIN_REQUESTS

    @staticmethod
    def of(message: pb.StrategyGuard) -> Guard:
        """Checked. Raises InvalidArgument."""
        rate, ttft, wait = message.max_error_rate, message.max_ttft_seconds, message.min_requests
        if not 0 <= rate <= 1:
            raise InvalidArgument(f"guard.max_error_rate = {rate:g} is not between 0 and 1")
        if not 0 <= ttft <= 86400:
            raise InvalidArgument(f"guard.max_ttft_seconds = {ttft:g} is not between 0 and 86400")
        if wait > WINDOW:
            raise InvalidArgument(f"guard.min_requests = {wait} is more than {WINDOW}")
        if not rate and not ttft:
            raise InvalidArgument("guard has neither max_error_rate nor max_ttft_seconds")
        return Guard(rate, ttft, wait or MIN_REQUESTS)

    def message(self) -> pb.StrategyGuard:
        """As it travels."""
        return pb.StrategyGuard(**dataclasses.asdict(self))


@dataclass(frozen=True)
class Choice:
    """A strategy with values for its parameters. `given` is what was set, in text form; the rest are defaults."""

    strategy: Strategy
    given: Mapping[str, str]
    values: dict[str, Any]
    revision: int = 0
    # Percent of the sessions, of a trial.
    share: float = 0.0
    guard: Guard | None = None

    def message(self) -> pb.StrategyChoice:
        """As it travels: all values, in text form."""
        params = {name: Param.text(value) for name, value in self.values.items()}
        return pb.StrategyChoice(
            name=self.strategy.name,
            params=params,
            revision=self.revision,
            share_percent=self.share,
            guard=None if self.guard is None else self.guard.message(),
        )

    def serves(self, key: str) -> bool:
        """Whether a session is on the side of this trial: for the same ones again when the share grows."""
        salt = json.dumps([self.strategy.name, sorted(self.given.items())])
        drawn = int.from_bytes(blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest(), "big")
        return drawn * 100 < self.share * 2**64


@dataclass(frozen=True)
class Past:
    """A choice that was in force or on trial; `ended` says why it is no more."""

    name: str
    given: Mapping[str, str]
    revision: int
    ended: str

    @staticmethod
    def of(choice: Choice, ended: str) -> Past:
        """`choice`, ended."""
        return Past(choice.strategy.name, choice.given, choice.revision, ended)

    def message(self) -> pb.StrategyChoice:
        """As it travels: the values that had been set."""
        return pb.StrategyChoice(name=self.name, params=self.given, revision=self.revision, ended=self.ended)


Make = Callable[[str, Mapping[str, str]], Choice]


@dataclass(frozen=True)
class Lineup:
    """Immutable: each change makes another."""

    main: Choice
    trial: Choice | None = None
    # Newest first.
    history: tuple[Past, ...] = ()

    def side(self, key: str) -> Choice:
        """Who serves a session."""
        return self.trial if self.trial is not None and self.trial.serves(key) else self.main

    def put(self, choice: Choice) -> Lineup:
        """With `choice` in force, or on trial if it has a share."""
        if choice.share:
            past = () if self.trial is None else (Past.of(self.trial, "trial replaced"),)
            return self._with(self.main, choice, past)
        return self._with(choice, None, (Past.of(self.main, REPLACED), *self._trial_ended(choice)))

    def _trial_ended(self, by: Choice) -> tuple[Past, ...]:
        trial = self.trial
        if trial is None or (trial.strategy.name, trial.given) == (by.strategy.name, by.given):
            return ()
        return (Past.of(trial, "trial replaced"),)

    def back(self, reason: str, make: Make) -> Lineup:
        """Without the trial; if there is none, with the choice before. Raises FailedPrecondition, NotFound."""
        ended = f"rolled back: {reason}"
        if self.trial is not None:
            return self._with(self.main, None, (Past.of(self.trial, ended),))
        before = next((past for past in self.history if past.ended == REPLACED), None)
        if before is None:
            raise FailedPrecondition(f"there is no choice before {self.main.strategy.name} to go back to")
        main = dataclasses.replace(make(before.name, before.given), revision=NEW)
        left = dataclasses.replace(self, history=tuple(past for past in self.history if past is not before))
        return left._with(main, None, (Past.of(self.main, ended),))

    def _with(self, main: Choice, trial: Choice | None, past: tuple[Past, ...]) -> Lineup:
        return Lineup(main, trial, (*past, *self.history)[:HISTORY])

    def text(self) -> str:
        """As a setting."""
        value = _json(self.main)
        if self.trial is not None:
            value["trial"] = {**_json(self.trial), "share": self.trial.share}
        if self.history:
            value["history"] = [
                {"name": p.name, "params": dict(p.given), "revision": p.revision, "ended": p.ended}
                for p in self.history
            ]
        return json.dumps(value, sort_keys=True)

    @staticmethod
    def read(setting: Setting, make: Make) -> Lineup:
        """Out of a setting. Raises MeshError, ValueError, KeyError, TypeError, AttributeError for one that is wrong."""
        value = json.loads(setting.value)
        main = _read(value, setting.revision, make)
        trial = None
        if "trial" in value:
            trial = dataclasses.replace(
                _read(value["trial"], setting.revision, make), share=float(value["trial"]["share"])
            )
        past = [
            Past(str(p["name"]), _texts(p["params"]), int(p["revision"]), str(p["ended"]))
            for p in value.get("history", [])
        ]
        return Lineup(main, trial, tuple(past[:HISTORY]))


def _json(choice: Choice) -> dict[str, Any]:
    value: dict[str, Any] = {"name": choice.strategy.name, "params": dict(choice.given)}
    if choice.revision != NEW:
        value["revision"] = choice.revision
    if choice.guard is not None:
        value["guard"] = dataclasses.asdict(choice.guard)
    return value


def _read(value: Mapping[str, Any], revision: int, make: Make) -> Choice:
    return dataclasses.replace(
        make(value["name"], _texts(value.get("params", {}))),
        revision=int(value.get("revision", revision)),
        guard=Guard(**value["guard"]) if "guard" in value else None,
    )


def _texts(params: Mapping[Any, Any]) -> dict[str, str]:
    return {str(k): str(v) for k, v in params.items()}
