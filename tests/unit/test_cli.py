"""The command line: commands loaded when called for, failures in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner, Result

from kvmesh import __version__, cli
from kvmesh.errors import NotFound

COMMANDS = ["demo", "down", "engine", "generate", "registry", "router", "status", "strategy", "trace", "up"]


@click.command()
@click.argument("what")
def act(what: str) -> None:
    """Acts."""
    match what:
        case "fail":
            raise NotFound("strategy = 'x' is unknown")
        case "bug":
            raise ValueError("a bug")
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            sys.exit(7)
    click.echo("done")


@pytest.fixture
def commands(monkeypatch) -> None:
    """One command that acts, one that cannot be imported, one that is something else."""
    entries = {
        "act": f"{__name__}:act",
        "gone": "no_such_module:command",
        "missing": "kvmesh.errors:no_such_name",
        "number": "kvmesh.cli:INTERRUPTED",
    }
    found = {name: EntryPoint(name, value, cli.GROUP) for name, value in entries.items()}
    monkeypatch.setattr(cli, "_found", lambda: found)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments)


@pytest.mark.usefixtures("commands")
def test_help_survives_commands_that_cannot_be_loaded():
    result = invoke("--help")
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.output.splitlines() if line[:2] == "  "}
    assert lines["act"] == "Acts." and lines["gone"] == lines["missing"] == lines["number"] == "(cannot be loaded)"


@pytest.mark.parametrize(
    ("name", "why"), [("gone", "no_such_module"), ("missing", "no_such_name"), ("number", "it is no command")]
)
@pytest.mark.usefixtures("commands")
def test_a_command_that_cannot_be_loaded_says_why(name, why):
    result = invoke(name, "--some", "thing", "else")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: command '{name}' (") and why in result.output


@pytest.mark.parametrize(
    ("what", "code", "output"),
    [
        ("work", 0, "done\n"),
        ("fail", 1, "Error: strategy = 'x' is unknown\n"),
        ("interrupt", 130, ""),
        ("exit", 7, ""),
    ],
)
@pytest.mark.usefixtures("commands")
def test_how_a_command_ends(what, code, output):
    result = invoke("act", what)
    assert (result.exit_code, result.output) == (code, output)


@pytest.mark.usefixtures("commands")
def test_a_bug_is_not_hidden():
    assert isinstance(invoke("act", "bug").exception, ValueError)


def test_an_unknown_command_is_a_usage_error():
    result = invoke("nothing")
    assert result.exit_code == 2 and "No such command" in result.output


def test_version():
    assert invoke("--version").output == f"kvmesh {__version__}\n"


def test_everything_is_there_and_loads():
    result = invoke("--help")
    for name in COMMANDS:
        assert f"\n  {name} " in result.output
    assert "cannot be loaded" not in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0 and "Usage: " in result.output


def test_help_imports_nothing_heavy():
    program = """
import sys
from click.testing import CliRunner
from kvmesh.cli import cli
assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
heavy = {"torch", "sglang", "transformers", "grpc", "numpy", "opentelemetry", "google.protobuf", "rich", "uvloop"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


PROGRAM = os.path.join(os.path.dirname(sys.executable), "kvmesh")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "kvmesh.cli"], [PROGRAM]])
def test_the_program(command, tmp_path):
    environment = {**os.environ, "KVMESH_HOME": str(tmp_path)}
    done = subprocess.run([*command, "status"], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: no mesh named 'default' runs here: start one with `kvmesh up`, or name a router with --router\n"
    )


def test_a_port_that_is_taken_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY")
    serving = [sys.executable, "-m", "kvmesh.cli", "registry", "--embedded", "--trace-ratio", "0", "--listen"]
    announced = tmp_path / "address"
    first = subprocess.Popen([*serving, "127.0.0.1:0", "--announce", str(announced)], stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        while "ready" not in first.stderr.readline():
            assert first.poll() is None
        address = announced.read_text().strip()
        second = subprocess.run([*serving, address], capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert second.stderr.splitlines() == [
            f"Error: cannot listen on {address}: is the address in use, or not one of this host?"
        ]
        first.send_signal(signal.SIGINT)
        assert first.wait(10) == 0
    finally:
        first.kill()
        first.communicate()
