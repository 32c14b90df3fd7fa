"""What the controller does with certificates: it shows its own, and says who a caller's stands for.

The files may change while it runs: they are looked at anew for each connection, and what was revoked for each call.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from forkypig.certificates.authority import Authority
from forkypig.model.access import Principal, Role


@dataclass(frozen=True, slots=True)
class Shown:
    """The controller's own: PEM."""

    key: bytes
    certificate: bytes
    authority: bytes


class Watched:
    """A home's certificates as they are now."""

    def __init__(self, directory: Path) -> None:
        self._authority = Authority(directory)
        self._seen: dict[Path, tuple[int, int]] = {}
        self._revoked: frozenset[str] = frozenset()

    @property
    def exist(self) -> bool:
        return self._authority.exists

    def shown(self) -> Shown:
        """Key and certificate are one file, so they are always of one another."""
        both = self._authority.server_key.read_bytes()
        return Shown(both, both[both.index(b"-----BEGIN CERTIFICATE") :], self._authority.certificate.read_bytes())

    def shown_if_changed(self) -> Shown | None:
        """None when they are those that were returned last."""
        return self.shown() if self._changed(self._authority.server_key) else None

    def principal_of(self, pem: bytes) -> Principal | None:
        """Whom a caller's certificate stands for, which TLS has found to be of our authority; None when it is revoked,
        has expired since, or is none of a caller's."""
        subject = _subject(pem)
        if subject is None or not subject.not_before_s <= time.time() < subject.not_after_s:
            return None
        if self._changed(self._authority.issued_file):
            try:
                self._revoked = frozenset(i.serial for i in self._authority.issued() if i.revoked_us)
            except Exception:
                del self._seen[self._authority.issued_file]  # nobody gets in by what was read before
                raise
        return None if subject.serial in self._revoked else subject.principal

    def _changed(self, path: Path) -> bool:
        """Whether the file is another than at the last time. It is always replaced, never written over."""
        found = path.stat()
        now = (found.st_ino, found.st_mtime_ns)
        changed = self._seen.get(path) != now
        self._seen[path] = now
        return changed


@dataclass(frozen=True, slots=True)
class _Subject:
    principal: Principal
    serial: str
    not_before_s: float
    not_after_s: float


@functools.lru_cache(maxsize=1024)
def _subject(pem: bytes) -> _Subject | None:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        fields = {
            oid: certificate.subject.get_attributes_for_oid(oid)
            for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)
        }
        name, tenant, role = (str(values[0].value) for values in fields.values())
        principal = Principal(f"certificate:{name}:{certificate.serial_number:x}", tenant, Role(role))
    except (ValueError, IndexError):  # the controller's own, say
        return None
    return _Subject(
        principal,
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )
