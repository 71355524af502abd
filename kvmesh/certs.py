"""A certificate authority for trying things out: `kvmesh certs`, and `kvmesh up --secure`.

Keys are ECDSA P-256. A certificate says by a name what its holder is: a service of the mesh, or a client (kvmesh.tls).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmesh.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from kvmesh.tls import CLIENT, SERVICE

CA_DAYS, DAYS = 3650, 365
# Clocks differ.
EARLIER = datetime.timedelta(minutes=5)
LOCAL = ("localhost", "127.0.0.1", "::1")
ROLES = {"service": SERVICE, "client": CLIENT}


class Authority:
    """A CA, made new or read from `folder`/ca.pem and ca.key."""

    def __init__(self, certificate: Any, key: Any) -> None:
        self._certificate = certificate
        self._key = key

    @staticmethod
    def make() -> Authority:
        """A new one. Raises FailedPrecondition where the cryptography package is missing."""
        x509, ec, hashes, _ = _library()
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("kvmesh development CA")
        usage = _usage("key_cert_sign", "crl_sign")
        builder = (
            _builder(name, name, key.public_key(), CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return Authority(builder.sign(key, hashes.SHA256()), key)

    @staticmethod
    def read(folder: Path) -> Authority:
        """The one kept in `folder`. Raises InvalidArgument."""
        x509, _, _, serialization = _library()
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidArgument(f"{folder} holds no CA that can be used: {error}") from None
        return Authority(certificate, key)

    def keep(self, folder: Path) -> None:
        """Writes its certificate and its key."""
        self.show(folder)
        _write(folder / "ca.key", _key_pem(self._key), secret=True)

    def show(self, folder: Path) -> None:
        """Writes its certificate only: nobody can issue more under it then."""
        _write(folder / "ca.pem", _certificate_pem(self._certificate))

    def issue(self, folder: Path, name: str, role: str, hosts: Sequence[str] = ()) -> None:
        """Writes NAME.pem and NAME.key, good for `hosts` and this machine's loopback names. Raises AlreadyExists."""
        x509 = _library()[0]
        if (folder / f"{name}.key").exists():
            raise AlreadyExists(f"{folder / name}.key exists already")
        names: list[Any] = [x509.UniformResourceIdentifier(ROLES[role])]
        if role == "service":
            names += [_host(host) for host in dict.fromkeys((*LOCAL, *hosts))]
        certificate, key = self._sign(name, names)
        _write(folder / f"{name}.pem", certificate)
        _write(folder / f"{name}.key", key, secret=True)

    def renew(self, folder: Path, name: str) -> str:
        """Puts a new certificate and key in the place of NAME.pem and NAME.key, for the same role and hosts; the role.

        Raises InvalidArgument when NAME.pem is no certificate of this CA's.
        """
        x509 = _library()[0]
        try:
            old = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
            old.verify_directly_issued_by(self._certificate)
            names = list(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        except Exception as error:
            raise InvalidArgument(f"{folder / name}.pem is no certificate of this CA's: {error!r}") from None
        certificate, key = self._sign(name, names)
        # Whoever reads them between the two sees that they do not fit, and reads again.
        _replace(folder / f"{name}.key", key)
        _replace(folder / f"{name}.pem", certificate)
        return "service" if SERVICE in [n.value for n in names] else "client"

    def _sign(self, name: str, names: list[Any]) -> tuple[bytes, bytes]:
        """(certificate, key) for those alternative names."""
        x509, ec, hashes, _ = _library()
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
        if SERVICE in [n.value for n in names]:
            uses.append(x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(_name(name), self._certificate.subject, key.public_key(), DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(issuer, critical=False)
        )
        return _certificate_pem(builder.sign(self._key, hashes.SHA256())), _key_pem(key)


def _library() -> tuple[Any, Any, Any, Any]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise FailedPrecondition(
            "making certificates needs the cryptography package: pip install cryptography"
        ) from None
    return x509, ec, hashes, serialization


def _name(text: str) -> Any:
    x509 = _library()[0]
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])


def _host(host: str) -> Any:
    x509 = _library()[0]
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise InvalidArgument(f"host = {host!r}: {error}") from None


def _usage(*wanted: str) -> Any:
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names = ("digital_signature", "key_cert_sign", "crl_sign", *others)
    return _library()[0].KeyUsage(**{n: n in wanted for n in names}, encipher_only=False, decipher_only=False)


def _builder(subject: Any, issuer: Any, key: Any, days: int) -> Any:
    x509, now = _library()[0], datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _certificate_pem(certificate: Any) -> bytes:
    return bytes(certificate.public_bytes(_library()[3].Encoding.PEM))


def _key_pem(key: Any) -> bytes:
    form = _library()[3]
    return bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))


def _write(path: Path, content: bytes, secret: bool = False) -> None:
    """A new file; a secret one is for its owner only, from the first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _replace(path: Path, content: bytes) -> None:
    """In one step, with the rights that the file had."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    _write(scratch, content, secret=True)
    os.chmod(scratch, path.stat().st_mode & 0o777)
    os.replace(scratch, path)
