"""TLS between the processes of a mesh: what a party holds, and whom a certificate belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.errors import InvalidArgument

if TYPE_CHECKING:
    import grpc

# A certificate says by one of these names, among its others, what its holder may call: everything, or the router.
SERVICE, CLIENT = "urn:kvmesh:service", "urn:kvmesh:client"


@dataclass(frozen=True)
class Tls:
    """PEM texts of one party. Without `certificate` and `key` it looks at the other side's, and shows none."""

    ca: bytes = field(repr=False)
    certificate: bytes = field(default=b"", repr=False)
    key: bytes = field(default=b"", repr=False)

    @staticmethod
    def read(ca: str, certificate: str = "", key: str = "") -> Tls | None:
        """Of files; None when none is named. Raises InvalidArgument."""
        if not (ca or certificate or key):
            return None
        if not ca:
            raise InvalidArgument("tls_ca is missing: tls_cert and tls_key go with the CA that others are checked by")
        if bool(certificate) != bool(key):
            raise InvalidArgument("tls_cert and tls_key go together")
        texts = [_pem(name, path) for name, path in (("tls_ca", ca), ("tls_cert", certificate), ("tls_key", key))]
        return Tls(*texts)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For calling others."""
        import grpc

        return grpc.ssl_channel_credentials(self.ca, self.key or None, self.certificate or None)

    def server_credentials(self, mutual: bool) -> grpc.ServerCredentials:
        """For being called; `mutual`: only by those who show a certificate of the CA."""
        import grpc

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
