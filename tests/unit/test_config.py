"""Settings from flags, environment, file and defaults."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kvmesh.config import ServiceConfig, TraceConfig, home, options, setting
from kvmesh.errors import InvalidArgument


@dataclass(frozen=True)
class Config(ServiceConfig):
    name: str = setting("shop", "Its name. [default: a name]")
    shelves: int = setting(3, "Shelves.")
    speed: float = setting(1.5, "Speed.")
    is_open: bool = setting(False, "Open.")
    labels: tuple[str, ...] = setting((), "Labels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shelves < 1:
            raise InvalidArgument(f"shelves = {self.shelves} is below 1")


@click.command()
@options(Config, "SHOP")
@click.option("--other", default="")
@click.argument("rest", nargs=-1)
def command(config: Config, other: str, rest: tuple[str, ...]) -> None:
    """Shops."""
    click.echo(repr((dataclasses.asdict(config), other, rest)))


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(command, list(arguments), env=environment)


def got(*arguments: str, **environment: str) -> dict[str, object]:
    result = invoke(*arguments, **environment)
    assert result.exit_code == 0, result.output
    return ast.literal_eval(result.output)[0]


def refused(*arguments: str, **environment: str) -> str:
    result = invoke(*arguments, **environment)
    assert result.exit_code == 2, result.output
    return result.output


def test_defaults_are_those_of_the_class():
    assert got() == dataclasses.asdict(Config())


def test_flags():
    given = "--name x --shelves 5 --speed 2 --is-open --labels a=b --labels c --listen [::1]:80 --trace-ratio 0.5"
    values = got(*given.split())
    assert [values[k] for k in ("name", "shelves", "speed", "is_open", "labels")] == ["x", 5, 2.0, True, ("a=b", "c")]
    assert (values["listen"], values["trace_ratio"]) == ("[::1]:80", 0.5)
    assert got("--is-open", "--no-is-open")["is_open"] is False


def test_the_command_keeps_options_and_arguments_of_its_own():
    result = invoke("--shelves", "4", "--other", "o", "a", "b")
    assert result.output.endswith("'o', ('a', 'b'))\n")


def test_environment():
    values = got(KVMESH_SHOP_SHELVES="7", KVMESH_SHOP_IS_OPEN="true", KVMESH_SHOP_LABELS="a b", KVMESH_SHOP_NAME="n")
    assert (values["shelves"], values["is_open"], values["labels"], values["name"]) == (7, True, ("a", "b"), "n")


FILE = """
trace_ratio = 0.25
name = "everybody"
[shop]
shelves = 11
speed = 4
is_open = true
labels = ["x", "y z"]
name = "file"
[router]
nothing_of = "ours"
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "kvmesh.toml"
    path.write_text(FILE)
    return path


def test_a_file_for_all_services_with_a_table_for_each(file):
    values = got("--config", str(file))
    assert (values["shelves"], values["speed"], values["is_open"]) == (11, 4.0, True)
    assert (values["labels"], values["name"], values["trace_ratio"]) == (("x", "y z"), "file", 0.25)
    assert got(KVMESH_SHOP_CONFIG=str(file)) == values


def test_flags_before_environment_before_file_before_defaults(file):
    environment = {"KVMESH_SHOP_SHELVES": "12", "KVMESH_SHOP_SPEED": "5"}
    values = got("--speed", "6", "--config", str(file), **environment)
    assert (values["speed"], values["shelves"], values["name"], values["log_level"]) == (6.0, 12, "file", "info")
    assert got("--no-is-open", "--config", str(file))["is_open"] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shelves", "0"], "shelves = 0 is below 1"),
        (["--shelves", "x"], "'x' is not a valid integer"),
        (["--speed", "nan"], "speed = nan is not finite"),
        (["--trace-ratio", "1.5"], "trace_ratio = 1.5 is not between 0 and 1"),
        (["--listen", "here"], "'here' is not HOST:PORT"),
        (["--log-level", "loud"], "log_level = 'loud' is not debug, info, warning or error"),
        (["--otlp-endpoint", "collector:4317"], "otlp_endpoint = 'collector:4317' is not http://HOST:PORT"),
        (["--otlp-endpoint", "http://collector"], "is not http://HOST:PORT"),
        (["--nothing", "x"], "No such option"),
    ],
)
def test_usage_errors(arguments, says):
    assert says in refused(*arguments)


def test_a_wrong_variable_is_a_usage_error():
    assert "shelves = 0" in refused(KVMESH_SHOP_SHELVES="0")
    assert "not a valid integer" in refused(KVMESH_SHOP_SHELVES="many")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("shelfs = 3", "there is no setting 'shelfs'"),
        ("[shop]\nshelves = 'three'", "shelves = 'three' is not of type int"),
        ("[shop]\nshelves = true", "shelves = True is not of type int"),
        ("[shop]\nshelves = 1.5", "shelves = 1.5 is not of type int"),
        ("[shop]\nname = 1", "name = 1 is not of type str"),
        ("[shop]\nlabels = [1]", "labels = [1] is not of type list of strings"),
        ("shop = 3", "shop is no table"),
        ("not toml", "Expected"),
        ("shelves = 0", "shelves = 0 is below 1"),
        ("name = '\udc80'", "can't decode"),
        (None, "No such file"),
    ],
)
def test_wrong_files(tmp_path, content, says):
    path = tmp_path / "wrong.toml"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    # The text is wrapped to the terminal.
    assert says in " ".join(refused("--config", str(path)).split())


def test_help_tells_defaults_and_variables():
    text = " ".join(invoke("--help").output.split())
    assert "KVMESH_SHOP_SHELVES; default: 3" in text
    assert "Its name. [default: a name] [env var: KVMESH_SHOP_NAME]" in text
    assert "--config FILE" in text and "--is-open / --no-is-open" in text


def test_a_field_of_another_type_is_a_bug():
    wrong = dataclasses.make_dataclass("Wrong", [("when", list[int], dataclasses.field(default_factory=list))])
    with pytest.raises(TypeError, match=r"Wrong\.when is list\[int\]"):
        options(wrong, "W")


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_trace_ratio(ratio):
    with pytest.raises(InvalidArgument, match="trace_ratio"):
        TraceConfig(trace_ratio=ratio)


def test_good_endpoints():
    for endpoint in ("http://127.0.0.1:4317", "https://collector.example.com:443", "http://[::1]:4317"):
        assert TraceConfig(otlp_endpoint=endpoint).otlp_endpoint == endpoint


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVMESH_HOME", raising=False)
    assert home() == tmp_path / ".kvmesh"
    # An empty path would be the current folder.
    monkeypatch.setenv("KVMESH_HOME", "")
    assert home() == tmp_path / ".kvmesh"
    monkeypatch.setenv("KVMESH_HOME", "~/mesh")
    assert home() == tmp_path / "mesh"
    monkeypatch.setenv("KVMESH_HOME", "/somewhere")
    assert home() == Path("/somewhere")
