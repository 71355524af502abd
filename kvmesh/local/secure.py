"""What `kvmesh up --secure` puts into the mesh's work folder, and what its commands take from there.

The CA's key is thrown away: nothing more can be issued under it. All of it goes when the mesh stops.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

FOLDER = "certs"


def prepare(work: Path, hosts: Sequence[str]) -> Path:
    """Makes certificates for services and clients, good for `hosts`, and two API keys; their folder."""
    from kvmesh import apikeys
    from kvmesh.certs import Authority

    folder = work / FOLDER
    folder.mkdir(mode=0o700)
    authority = Authority.make()
    authority.show(folder)
    authority.issue(folder, "service", "service", [socket.gethostname(), *hosts])
    authority.issue(folder, "client", "client")
    for scope in apikeys.SCOPES:
        key = apikeys.add(folder / "keys.toml", scope, [scope])
        handle = os.open(folder / f"{scope}.apikey", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"{key}\n")
    return folder


def service_flags(folder: Path, role: str) -> list[str]:
    """Of a service of that mesh."""
    files = {"--tls-ca": "ca.pem", "--tls-cert": "service.pem", "--tls-key": "service.key"}
    if role == "router":
        files["--api-keys"] = "keys.toml"
    if role == "registry":
        files |= {"--etcd-ca": "ca.pem", "--etcd-cert": "service.pem", "--etcd-key": "service.key"}
    return [part for flag, name in files.items() for part in (flag, str(folder / name))]


def etcd_flags(folder: Path) -> list[str]:
    """Of its etcd: it speaks TLS with those that show a certificate of the CA."""
    pair = [f"--cert-file={folder / 'service.pem'}", f"--key-file={folder / 'service.key'}"]
    return [*pair, f"--trusted-ca-file={folder / 'ca.pem'}", "--client-cert-auth"]
