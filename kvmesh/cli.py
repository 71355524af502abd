"""`kvmesh`: one command line for everything. Commands are entry points of the group kvmesh.commands."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from kvmesh import __version__
from kvmesh.errors import MeshError

GROUP = "kvmesh.commands"
INTERRUPTED = 130


class Commands(click.Group):
    """A group whose commands are imported when they are called for. A MeshError ends it with one line and status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted({*super().list_commands(ctx), *_found()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; one that cannot be imported says so, and fails when it is run."""
        entry = _found().get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            return _broken(entry, str(error))
        return loaded if isinstance(loaded, click.Command) else _broken(entry, "it is no command")

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except MeshError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def _found() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _broken(entry: EntryPoint, reason: str) -> click.Command:
    def fail() -> None:
        raise click.ClickException(f"command {entry.name!r} ({entry.value}) cannot be loaded: {reason}")

    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    return click.Command(entry.name, callback=fail, short_help="(cannot be loaded)", context_settings=anything)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmesh", message="%(prog)s %(version)s")
def cli() -> None:
    """LLM serving as a mesh of services whose coordination is a few lines of Python."""


def main() -> None:
    """The console script."""
    # gRPC's C core logs what it also reports; the second is for people.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    cli(prog_name="kvmesh")


if __name__ == "__main__":
    main()
