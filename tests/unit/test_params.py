"""Parameters of strategies: declared in code, given as text."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.params import Choices, Param, Range, bind, declared
from kvmesh.strategy import Chunks, Engine, Load, Mesh, Request, Strategy, strategy

Some = Annotated[int, Range(1, 8)]


@strategy
async def example(
    request: Request,
    mesh: Mesh,
    *,
    engines: Some = 2,
    ratio: Annotated[float, Range(0, 1)] = 0.5,
    speed: float = 1,
    by: Annotated[str, Choices("load", "name")] = "load",
    wait: bool = False,
    note: str = "",
) -> Chunks:
    """Does nothing.

    At all.
    """
    for chunk in ():
        yield chunk


def test_what_is_declared():
    assert (example.name, example.summary) == ("example", "Does nothing.")
    kinds = {name: (p.kind, p.default) for name, p in example.params.items()}
    assert kinds == {
        "engines": (int, 2),
        "ratio": (float, 0.5),
        "speed": (float, 1.0),
        "by": (str, "load"),
        "wait": (bool, False),
        "note": (str, ""),
    }
    assert type(example.params["speed"].default) is float
    assert str(example.params["engines"].limit) == "1 to 8" and str(Range(3)) == "at least 3"
    assert str(example.params["by"].limit) == "one of load, name"


def test_defaults_and_text():
    assert example.bind({}) == {
        "engines": 2,
        "ratio": 0.5,
        "speed": 1.0,
        "by": "load",
        "wait": False,
        "note": "",
    }
    given = {"engines": "8", "ratio": "1", "speed": "-1e3", "by": "name", "wait": "Yes", "note": " a=b "}
    values = example.bind(given)
    assert values == {"engines": 8, "ratio": 1.0, "speed": -1000.0, "by": "name", "wait": True, "note": " a=b "}
    assert {name: Param.text(v) for name, v in values.items()}["wait"] == "true"
    # What is written can be read again.
    assert example.bind({name: Param.text(v) for name, v in values.items()}) == values


@pytest.mark.parametrize(("text", "value"), [("true", True), ("ON", True), (" 1 ", True), ("no", False), ("0", False)])
def test_bools(text, value):
    assert example.bind({"wait": text})["wait"] is value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"engines": "0"}, "strategy example: parameter engines = 0 is not 1 to 8"),
        ({"engines": "9"}, "parameter engines = 9 is not 1 to 8"),
        ({"engines": "2.5"}, "parameter engines = '2.5' is not of type int"),
        ({"engines": ""}, "parameter engines = '' is not of type int"),
        ({"ratio": "nan"}, "parameter ratio = nan is not finite"),
        ({"speed": "inf"}, "parameter speed = inf is not finite"),
        ({"ratio": "x"}, "parameter ratio = 'x' is not of type float"),
        ({"wait": "maybe"}, "parameter wait = 'maybe' is not of type bool"),
        ({"by": "size"}, "parameter by = size is not one of load, name"),
        ({"engine": "1"}, r"has no parameter 'engine' \(it has: engines, ratio, speed, by, wait, note\)"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(InvalidArgument, match=says):
        example.bind(given)


def test_a_strategy_without_parameters_says_so():
    with pytest.raises(InvalidArgument, match=r"strategy s has no parameter 'x' \(it has: none\)"):
        bind("strategy s", {}, {"x": "1"})


def wrong_positional(request: Any, *, n: int = 1) -> None: ...
def wrong_third(request: Any, mesh: Any, n: int = 1) -> None: ...
def no_default(request: Any, mesh: Any, *, n: int) -> None: ...
def no_type(request: Any, mesh: Any, *, n=1) -> None: ...
def wrong_type(request: Any, mesh: Any, *, n: list[int] = ()) -> None: ...  # type: ignore[assignment]
def wrong_default(request: Any, mesh: Any, *, n: int = "1") -> None: ...  # type: ignore[assignment]
def bool_for_int(request: Any, mesh: Any, *, n: int = True) -> None: ...
def outside(request: Any, mesh: Any, *, n: Some = 9) -> None: ...
def two_limits(request: Any, mesh: Any, *, n: Annotated[int, Range(1), Choices(1)] = 1) -> None: ...
def variadic(request: Any, mesh: Any, **n: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (wrong_positional, "takes 2 positional arguments first"),
        (wrong_third, "parameter n must be keyword-only"),
        (no_default, "parameter n must be keyword-only and have a default"),
        (no_type, "annotated None"),
        (wrong_type, "not int, float, bool or str"),
        (wrong_default, "the default of n, '1', is not of type int"),
        (bool_for_int, "the default of n, True, is not of type int"),
        (outside, "default: parameter n = 9 is not 1 to 8"),
        (two_limits, "with one limit"),
        (variadic, "parameter n must be keyword-only"),
    ],
)
def test_a_wrong_declaration_is_a_type_error(function, says):
    with pytest.raises(TypeError, match=says):
        declared(function, positional=2)


def test_a_strategy_is_an_async_generator_with_a_name():
    async def answers(request: Request, mesh: Mesh) -> Chunks:
        """No generator: it has no yield."""

    with pytest.raises(TypeError, match="is not an async generator"):
        strategy(answers)
    with pytest.raises(TypeError, match="strategy name 'Not This'"):
        strategy("Not This")(example._function)
    assert isinstance(strategy("other-name")(example._function), Strategy)


class Known(Engine):
    """An engine that is only looked at."""

    def __init__(self, name: str, load: Load | None = None, **labels: str) -> None:
        self.name, self.labels, self._load = name, labels, load or Load()

    @property
    def load(self) -> Load:
        return self._load

    prep_recv = remote_send = start_generate = release = None  # type: ignore[assignment]


def names(engines: list[Engine]) -> list[str]:
    return [e.name for e in engines]


def test_engines_are_in_natural_order_and_the_first_prefill():
    mesh = Mesh([Known(f"engine-{i}") for i in (10, 2, 1)])
    assert names(mesh.engines) == ["engine-1", "engine-2", "engine-10"]
    assert names(mesh.prefill(2)) == ["engine-1", "engine-2"] and names(mesh.decode(2)) == ["engine-10"]
    # One is left to decode, and a lone engine is both.
    assert names(mesh.prefill(9)) == ["engine-1", "engine-2"]
    alone = Mesh([Known("e")])
    assert names(alone.prefill()) == names(alone.decode()) == ["e"]


def test_labels_come_before_numbers():
    mesh = Mesh([Known("a"), Known("b", role="prefill"), Known("c", role="decode")])
    assert names(mesh.prefill(2)) == ["b"] and names(mesh.decode(2)) == ["a", "c"]
    only = Mesh([Known("a", role="decode"), Known("b", role="decode")])
    assert names(only.prefill()) == names(only.decode()) == ["a", "b"]


def test_least_loaded_counts_requests_tokens_and_credit():
    mesh = Mesh(
        [
            Known("a", Load(running=1)),
            Known("b", Load(waiting_tokens=200)),
            Known("c", Load(credit_tokens=200)),
            Known("d", Load(credit_requests=1)),
        ]
    )
    assert mesh.least_loaded().name == "b"
    assert mesh.least_loaded([e for e in mesh.engines if e.name in "ad"]).name == "a"
    assert Load(1, 2, 3, 4, 5, 6, 7, 8, 9).work == (1 + 2 + 4 + 5 + 8) * 256 + 3 + 9
