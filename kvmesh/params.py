"""Typed parameters of strategies: declared as keyword-only arguments, given as text, checked before they apply."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.errors import InvalidArgument

Value = int | float | bool | str
_TYPES: tuple[type, ...] = (int, float, bool, str)
_BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


@dataclass(frozen=True)
class Range:
    """Lowest and highest value allowed, both included: `n: Annotated[int, Range(1, 64)] = 1`."""

    low: float
    high: float = math.inf

    def allows(self, value: Value) -> bool:
        """Whether `value` is a number inside."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


class Choices:
    """The values allowed: `by: Annotated[str, Choices("load", "name")] = "load"`."""

    def __init__(self, *values: Value) -> None:
        self.values = values

    def allows(self, value: Value) -> bool:
        """Whether `value` is one of them."""
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Param:
    """One parameter: `kind` is int, float, bool or str."""

    name: str
    kind: type
    default: Value
    limit: Range | Choices | None = None

    def parse(self, text: str) -> Value:
        """The value of its text form. Raises InvalidArgument naming parameter, value and what is allowed."""
        try:
            value: Value = _BOOLS[text.strip().lower()] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError):
            raise InvalidArgument(f"parameter {self.name} = {text!r} is not of type {self.kind.__name__}") from None
        self.check(value)
        return value

    def check(self, value: Value) -> None:
        """Raises InvalidArgument for a value outside the limit, or a float that is not finite."""
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidArgument(f"parameter {self.name} = {value} is not finite")
        if self.limit is not None and not self.limit.allows(value):
            raise InvalidArgument(f"parameter {self.name} = {self.text(value)} is not {self.limit}")

    @staticmethod
    def text(value: Value) -> str:
        """The text form that `parse` reads."""
        return str(value).lower() if isinstance(value, bool) else str(value)


def declared(function: Callable[..., Any], positional: int) -> dict[str, Param]:
    """The parameters of `function`: its keyword-only arguments, after exactly `positional` positional ones.

    Raises TypeError where one lacks a type or default, or the default is not of the type and in the limit.
    """
    arguments = list(inspect.signature(function).parameters.values())
    hints = typing.get_type_hints(function, include_extras=True)
    where = function.__qualname__
    if [a.kind for a in arguments[:positional]] != [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional:
        raise TypeError(f"{where} takes {positional} positional arguments first: request, mesh")
    params: dict[str, Param] = {}
    for argument in arguments[positional:]:
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY or argument.default is inspect.Parameter.empty:
            raise TypeError(f"{where}: parameter {argument.name} must be keyword-only and have a default")
        params[argument.name] = _declare(where, argument.name, hints.get(argument.name), argument.default)
    return params


def _declare(where: str, name: str, hint: Any, default: Value) -> Param:
    limits: list[Range | Choices] = []
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        limits = [extra for extra in extras if isinstance(extra, Range | Choices)]
    if hint not in _TYPES or len(limits) > 1:
        raise TypeError(f"{where}: parameter {name} is annotated {hint}, not int, float, bool or str with one limit")
    if type(default) is not hint and not (hint is float and type(default) is int):
        raise TypeError(f"{where}: the default of {name}, {default!r}, is not of type {hint.__name__}")
    param = Param(name, hint, hint(default), limits[0] if limits else None)
    try:
        param.check(param.default)
    except InvalidArgument as error:
        raise TypeError(f"{where}: default: {error}") from error
    return param


def bind(owner: str, params: Mapping[str, Param], given: Mapping[str, str]) -> dict[str, Value]:
    """All values: those given (text), defaults for the rest. Raises InvalidArgument."""
    for name in given:
        if name not in params:
            known = ", ".join(params) or "none"
            raise InvalidArgument(f"{owner} has no parameter {name!r} (it has: {known})")
    try:
        return {name: p.parse(given[name]) if name in given else p.default for name, p in params.items()}
    except InvalidArgument as error:
        raise InvalidArgument(f"{owner}: {error}") from None
