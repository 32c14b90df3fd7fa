"""Who asks: the principal of a call, what they may do, and whose things they see."""

from dataclasses import dataclass
from enum import Enum

DEFAULT_TENANT = "default"
EVERY_TENANT = "*"  # whom a snapshot may be shared with; no tenant is called so


class Role(Enum):
    """What somebody may do. Each includes those before it, but for METRICS, which is nobody else's."""

    METRICS = "metrics"  # the metrics of the whole installation, and nothing else: for Prometheus
    VIEWER = "viewer"  # look
    USER = "user"  # make, change and remove what is the tenant's
    ADMIN = "admin"  # also the tenant's tokens and pools

    def includes(self, other: "Role") -> bool:
        if Role.METRICS in (self, other):
            return self is other
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who asks, already authenticated."""

    name: str  # of the user on this host, or of the token: for the audit log
    tenant: str  # whose things they see and make
    role: Role
    operator: bool = False  # who runs this installation: every tenant, quotas, the host itself


# Work that nobody asked for: reconciling, collecting, refilling.
SYSTEM = Principal("system", DEFAULT_TENANT, Role.ADMIN, operator=True)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A call that was made: who, when it ended, what about, with which result (the name of a gRPC status)."""

    time_us: int
    who: str
    tenant: str
    role: str
    method: str
    about: str
    result: str
    duration_ms: float
    peer: str
