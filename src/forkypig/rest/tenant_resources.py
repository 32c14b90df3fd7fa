"""What the API answers with where it is about tenants, and who may come in."""

from dataclasses import asdict

from pydantic import Field

from forkypig.cli import documents
from forkypig.model.access import AuditEntry, Principal, Role
from forkypig.model.ksm import KsmStatus
from forkypig.rest.resources import Count, Resource
from forkypig.sdk.access import Token as TokenInfo
from forkypig.sdk.tenants import TenantInfo


class Quota(Resource):
    """What a tenant may have; null: as much as the host has."""

    machines: Count | None
    cpus: Count | None
    memory_mib: Count | None
    disk_mib: Count | None
    snapshots: Count | None
    forks_per_minute: Count | None


class Used(Resource):
    """What a tenant has."""

    machines: Count
    cpus: Count
    memory_mib: Count
    disk_mib: Count
    snapshots: Count
    forks_per_minute: Count


class Tenant(Resource):
    """Whose things there are."""

    name: str
    created_us: int
    quota: Quota
    used: Used
    ksm: bool

    @classmethod
    def of(cls, info: TenantInfo) -> "Tenant":
        return cls.model_validate(documents.tenant(info))


class Token(Resource):
    """A token, without its secret."""

    id: str
    name: str
    tenant: str
    role: Role
    created_us: int
    created_by: str
    expires_us: int | None
    last_used_us: int | None = Field(description="to the minute")
    revoked_us: int | None

    @classmethod
    def of(cls, info: TokenInfo) -> "Token":
        return cls.model_validate(documents.token(info))


class MadeToken(Token):
    """A token that was just made, with what is to be sent."""

    token: str = Field(description="told this once")


class Caller(Resource):
    """Who the controller takes the caller for."""

    name: str
    tenant: str
    role: Role
    operator: bool

    @classmethod
    def of(cls, who: Principal) -> "Caller":
        return cls.model_validate(documents.principal(who))


class AuditLine(Resource):
    """A call that was made."""

    time_us: int
    who: str
    tenant: str
    role: str
    method: str
    about: str
    result: str = Field(description="the name of a gRPC status")
    duration_ms: float
    peer: str

    @classmethod
    def of(cls, entry: AuditEntry) -> "AuditLine":
        return cls.model_validate(asdict(entry))


class Ksm(Resource):
    """Kernel samepage merging on the host."""

    running: bool
    tenants: list[str] = Field(description="whose machines it is for")
    merged_bytes: Count
    profit_bytes: int = Field(description="of the whole host, less what KSM takes itself")
    full_scans: Count

    @classmethod
    def of(cls, found: KsmStatus) -> "Ksm":
        return cls.model_validate(asdict(found))
