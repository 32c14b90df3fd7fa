"""The certificate authority of one home: a private one, whose certificates nobody else believes.

ECDSA on P-256, X.509 v3 as RFC 5280 has it. A caller's certificate says who it is in its subject: CN is the name, O the
tenant, OU the role. What was issued is in `issued.json`, and so is what was revoked, which the controller reads anew
when it changes. Everything lies in FORKY_HOME/auth, which only the owner can enter.
"""

import datetime
import fcntl
import ipaddress
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from forkypig.errors import NotFound, NotPossibleNow
from forkypig.model import check_name
from forkypig.model.access import Role

CA_DAYS = 3650
SERVER_DAYS = 397  # what browsers and Apple's libraries believe at most
CLOCKS = datetime.timedelta(minutes=5)  # that may differ between two computers


@dataclass(frozen=True, slots=True)
class Issued:
    """A caller's certificate as it is remembered."""

    serial: str  # hex
    name: str
    tenant: str
    role: str
    expires_us: int  # since the Unix epoch
    revoked_us: int = 0  # 0: it is not


class Authority:
    """The one in `directory`, whether or not it is made yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.certificate, self._key = directory / "ca.crt", directory / "ca.key"
        self.server_certificate, self.server_key = directory / "server.crt", directory / "server.key"
        self.issued_file = directory / "issued.json"

    @property
    def exists(self) -> bool:
        return self.server_certificate.exists() and self.server_key.exists() and self.certificate.exists()

    def make(self, hosts: Sequence[str]) -> None:
        """A new authority, and the controller's certificate for `hosts` (names, addresses) and this computer itself.

        Raises NotPossibleNow: a second authority would lock out everybody who knows the first."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            if self._key.exists():
                raise NotPossibleNow(
                    f"there is a certificate authority in {self.directory} already, and a second one would lock out "
                    "everybody who knows the first: renew the controller's certificate with `forky auth renew`, or "
                    "remove that directory first"
                )
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Forky Pig")])
            usage = x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            )
            made = (
                _begun(name, name, key.public_key(), CA_DAYS)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(usage, critical=True)
                .sign(key, hashes.SHA256())
            )
            _write(self.certificate, _pem(made))
            _write(self.issued_file, b"[]")
            _write(self._key, _key_pem(key))
            self._issue_server(hosts)

    def renew(self, hosts: Sequence[str] = ()) -> datetime.datetime:
        """A new certificate for the controller, for the same hosts unless others are given; until when it holds. A
        controller that runs shows it to the next who connects. Raises NotPossibleNow."""
        with self._locked():
            self._check_is_there()
            return self._issue_server(hosts or self._hosts())

    def issue(self, name: str, tenant: str, role: Role, days: int) -> tuple[Issued, bytes, bytes]:
        """A caller's certificate: what is remembered of it, and the certificate and its key as PEM, which is not kept.

        Raises InvalidRequest (a name), NotPossibleNow (no authority)."""
        check_name("certificate", name)
        check_name("tenant", tenant)
        with self._locked():
            self._check_is_there()
            subject = x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, tenant),
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
                    x509.NameAttribute(NameOID.COMMON_NAME, name),
                ]
            )
            key = ec.generate_private_key(ec.SECP256R1())
            made = self._signed(subject, key, days, ExtendedKeyUsageOID.CLIENT_AUTH, ())
            expires_us = int(made.not_valid_after_utc.timestamp() * 1e6)
            issued = Issued(f"{made.serial_number:x}", name, tenant, role.value, expires_us)
            self._save([*self.issued(), issued])
        return issued, _pem(made), _key_pem(key)

    def issued(self) -> list[Issued]:
        """The callers' certificates, oldest first."""
        if not self.issued_file.exists():
            return []
        return [Issued(**fields) for fields in json.loads(self.issued_file.read_bytes())]

    def revoke(self, text: str, now_us: int) -> list[Issued]:
        """By serial number, or all of a name; holds from the next call on. Raises NotFound."""
        with self._locked():
            every = self.issued()
            meant = [i for i in every if text in (i.serial, i.name)]
            if not meant:
                raise NotFound("certificate", text[:80], "see forky auth cert ls")
            revoked = [replace(i, revoked_us=i.revoked_us or now_us) for i in meant]
            by_serial = {i.serial: i for i in revoked}
            self._save([by_serial.get(i.serial, i) for i in every])
        return revoked

    def _check_is_there(self) -> None:
        if not self._key.exists():
            raise NotPossibleNow(
                f"there is no certificate authority in {self.directory}: make one with forky auth init"
            )

    def _hosts(self) -> Sequence[str]:
        """Those of the controller's present certificate."""
        present = x509.load_pem_x509_certificate(self.server_certificate.read_bytes())
        names = present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]

    def _issue_server(self, hosts: Sequence[str]) -> datetime.datetime:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Forky Pig controller")])
        every = list(dict.fromkeys((*hosts, "localhost", "127.0.0.1", "::1")))
        made = self._signed(subject, key, SERVER_DAYS, ExtendedKeyUsageOID.SERVER_AUTH, every)
        # The key is in the file of its certificate: both change at one instant, also for a controller that looks now.
        _write(self.server_certificate, _pem(made))
        _write(self.server_key, _key_pem(key) + _pem(made))
        return made.not_valid_after_utc

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        days: int,
        usage: x509.ObjectIdentifier,
        hosts: Sequence[str],
    ) -> x509.Certificate:
        authority = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        signer = serialization.load_pem_private_key(self._key.read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        builder = (
            _begun(subject, authority.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(map(_general_name, hosts)), critical=False)
        return builder.sign(signer, hashes.SHA256())

    def _save(self, every: Sequence[Issued]) -> None:
        _write(self.issued_file, json.dumps([asdict(i) for i in every], indent=1).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time."""
        if not self.directory.exists():
            self._check_is_there()
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """In place of what is there, whole or not at all, for the owner alone."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
