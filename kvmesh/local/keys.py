"""The commands that make certificates and API keys."""

from __future__ import annotations

from pathlib import Path

import click

from kvmesh.apikeys import GENERATE, SCOPES

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--issue", "names", multiple=True, metavar="NAME", help="Issue one certificate more, from the CA there.")
@click.option("--renew", "old", multiple=True, metavar="NAME", help="Replace one, for the same role and hosts.")
@click.option("--client", is_flag=True, help="With --issue: it is for a client, who may call routers only.")
@click.option("--host", "hosts", multiple=True, help="Name or address that services are called by; may be repeated.")
def certs(folder: Path, names: tuple[str, ...], old: tuple[str, ...], client: bool, hosts: tuple[str, ...]) -> None:
    """Makes a development CA and certificates in FOLDER.

    Without --issue and --renew: a new CA (ca.pem, ca.key), a certificate for services (service.pem, service.key)
    and one for clients (client.pem, client.key). Loopback names are always among the hosts. Keep ca.key away from
    the mesh.
    """
    from kvmesh.certs import Authority
    from kvmesh.errors import AlreadyExists, InvalidArgument

    if names or old:
        if unfit := [name for name in (*names, *old) if Path(name).name != name or name == "ca"]:
            raise InvalidArgument(f"name = {unfit[0]!r} cannot name a certificate")
        authority = Authority.read(folder)
        for name in old:
            click.echo(f"{folder / name}.pem, {folder / name}.key: a {authority.renew(folder, name)}, renewed")
        wanted = [(name, "client" if client else "service") for name in names]
    else:
        if (folder / "ca.pem").exists():
            raise AlreadyExists(f"{folder} holds a CA already; --issue NAME makes more certificates under it")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = Authority.make()
        authority.keep(folder)
        wanted = [("service", "service"), ("client", "client")]
    for name, role in wanted:
        authority.issue(folder, name, role, hosts)
        click.echo(f"{folder / name}.pem, {folder / name}.key: a {role}")


@click.command()
@click.argument("file", type=_FILE)
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=[GENERATE], show_default=True)
@click.option("--max-running", type=click.IntRange(0), default=0, help="Requests at once. [default: no limit]")
def key(file: Path, name: str, scopes: tuple[str, ...], max_running: int) -> None:
    """Adds an API key to FILE, and prints it: it is kept nowhere.

    FILE is what a router takes as --api-keys; it holds a digest of the key.
    """
    from kvmesh.apikeys import add

    click.echo(add(file, name, scopes, max_running))
