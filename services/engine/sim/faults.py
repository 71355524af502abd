"""Faults on demand: for tests, and for trying strategies out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kvmesh.errors import InvalidArgument


@dataclass
class Faults:
    """What goes wrong; may be changed while the engine runs.

    `slow`: every step and transfer takes so many times as long. `hang`: no step begins. `die_after_tokens`,
    `die_after_requests`: the engine ends after so many generated tokens, or finished generations (0: never).
    `drop_transfers`: so many sends are reported as arrived, and have written nothing. `fail_transfers`: so many fail.
    """

    slow: float = 1.0
    hang: bool = False
    die_after_tokens: int = 0
    die_after_requests: int = 0
    drop_transfers: int = 0
    fail_transfers: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slow) and self.slow > 0):
            raise InvalidArgument(f"fault slow = {self.slow} is not above 0")
        for name in ("die_after_tokens", "die_after_requests", "drop_transfers", "fail_transfers"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"fault {name} = {getattr(self, name)} is negative")

    @staticmethod
    def parse(text: str) -> Faults:
        """Of `slow=2,die_after_tokens=100,hang=true`. Raises InvalidArgument."""
        kinds: dict[str, type[Any]] = {f.name: type(getattr(Faults, f.name)) for f in dataclasses.fields(Faults)}
        values: dict[str, float | int | bool] = {}
        for pair in filter(None, text.replace("\n", ",").split(",")):
            key, _, value = (part.strip() for part in pair.partition("="))
            if key not in kinds:
                raise InvalidArgument(f"fault {key!r} is unknown; there is: {', '.join(kinds)}")
            try:
                if kinds[key] is bool:
                    values[key] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
                else:
                    values[key] = kinds[key](value)
            except (ValueError, KeyError):
                raise InvalidArgument(f"fault {key} = {value!r} is not of type {kinds[key].__name__}") from None
        return Faults(**values)  # type: ignore[arg-type]

    def update(self, other: Faults) -> None:
        """Takes over all of `other`."""
        for f in dataclasses.fields(Faults):
            setattr(self, f.name, getattr(other, f.name))

    def take(self, name: str) -> bool:
        """Whether one more of `drop_transfers` or `fail_transfers` is due; counts it."""
        left = int(getattr(self, name))
        if left:
            setattr(self, name, left - 1)
        return left > 0
