"""What the API answers with where it is about pools and leases."""

from pydantic import ConfigDict, Field

from forkypig import model
from forkypig.cli import documents
from forkypig.rest.resources import Count, Machine, Resource
from forkypig.sdk.pools import AcquiredMachine


class Lease(Resource):
    """For how long somebody has a machine of a pool."""

    machine: str
    machine_name: str
    pool: str
    holder: str = Field(description="who acquired it")
    labels: dict[str, str]
    ttl_s: float
    acquired_us: int
    expires_us: int = Field(description="moves when the machine is used")

    @classmethod
    def of(cls, info: model.Lease) -> "Lease":
        return cls.model_validate(documents.lease(info))


class Pool(Resource):
    """Machines that are ready to be acquired."""

    model_config = ConfigDict(extra="ignore", validate_by_name=True, validate_by_alias=True)

    id: str
    name: str
    source: str = Field(alias="from", description="what it was made from, as it was called then")
    image_id: str
    snapshot: str | None
    cpus: Count
    memory_mib: Count
    disk_mib: Count
    target: Count = Field(description="machines that stand ready when nobody asks for any")
    max: Count = Field(description="machines altogether: ready, on their way, and acquired")
    ready: Count
    filling: Count
    acquired: Count
    waiting: Count = Field(description="callers that wait for a machine")
    wanted: Count = Field(description="machines that are to stand ready, by the demand of late")
    failure: str | None = Field(description="why the last refill failed")
    created_us: int
    machines: list[Machine] = Field(description="those that wait in it; in a list of pools none are told")
    leases: list[Lease]

    @classmethod
    def of(cls, status: model.PoolStatus) -> "Pool":
        return cls.model_validate(documents.pool(status))


class Acquired(Machine):
    """A machine of a pool that is the caller's now."""

    lease: Lease
    waited_ms: float = Field(description="in the queue")

    @classmethod
    def by(cls, machine: AcquiredMachine) -> "Acquired":
        return cls.model_validate(documents.acquired(machine.info, machine.lease, machine.waited_ms))
