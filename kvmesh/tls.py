"""TLS between the processes of a mesh: what a party holds, and whom a certificate belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.errors import InvalidArgument

if TYPE_CHECKING:
    import grpc

    from kvmesh.renewal import Files

# A certificate says by one of these names, among its others, what its holder may call: everything, or the router.
SERVICE, CLIENT = "urn:kvmesh:service", "urn:kvmesh:client"


@dataclass(frozen=True)
class Tls:
    """PEM texts of one party. Without `certificate` and `key` it looks at the other side's, and shows none.

    `files`: where they were read; servers and asyncio channels take what these hold later.
    """

    ca: bytes = field(repr=False)
    certificate: bytes = field(default=b"", repr=False)
    key: bytes = field(default=b"", repr=False)
    files: Files | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(ca: str, certificate: str = "", key: str = "") -> Tls | None:
        """Of files; None when none is named. Raises InvalidArgument."""
        if not (ca or certificate or key):
            return None
        if not ca:
            raise InvalidArgument("tls_ca is missing: tls_cert and tls_key go with the CA that others are checked by")
        if bool(certificate) != bool(key):
            raise InvalidArgument("tls_cert and tls_key go together")
        from kvmesh.renewal import Files

        files = Files((ca, certificate, key))
        return replace(files.now(), files=files)

    @staticmethod
    def of(paths: tuple[str, str, str]) -> Tls:
        """What files of CA, certificate and key hold; of "" nothing. Raises InvalidArgument."""
        ca, certificate, key = (_pem(f"tls_{n}", path) for n, path in zip(("ca", "cert", "key"), paths, strict=True))
        return Tls(ca, certificate, key)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For calling others."""
        import grpc

        return grpc.ssl_channel_credentials(self.ca, self.key or None, self.certificate or None)

    def server_credentials(self, mutual: bool) -> grpc.ServerCredentials:
        """For being called; `mutual`: only by those who show a certificate of the CA."""
        import grpc

        if self.files is not None:
            return self.files.server_credentials(mutual)
        pair = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pair, self.ca, mutual) if mutual else grpc.ssl_server_credentials(pair)


def _pem(name: str, path: str) -> bytes:
    if not path:
        return b""
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{name} = {path!r}: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise InvalidArgument(f"{name} = {path!r} is no PEM file")
    return content


def holds(context: Any, name: str) -> bool:
    """Whether the caller showed a certificate with that name, SERVICE or CLIENT."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return name.encode() in names
