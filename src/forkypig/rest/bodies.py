"""What requests may say. Unknown fields are refused, so that a misspelt one is no silent default."""

from typing import Annotated, Literal

from fastapi import Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from forkypig import model
from forkypig.model.access import Role

# What the wire has: 32 bits, and 64 for sizes, of which JSON's readers keep 53.
_INT32, _MOST = (1 << 31) - 1, (1 << 53) - 1
_NAME = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$"
_NO_NUL = r"^[^\x00]*$"


# Strict: true is no number, "5" is none, and 0 is no false.
Flag = Annotated[bool, Field(strict=True)]
Int32 = Annotated[int, Field(strict=True, ge=0, le=_INT32)]
Size = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=86_400 * 365)]
TimeToLive = Annotated[Seconds, Field(description="it is removed when it was not used for so long; 0: it stays")]
Name = Annotated[str, Field(pattern=_NAME, max_length=63)]
Reference = Annotated[str, Path(pattern=_NAME, max_length=63)]
GuestPath = Annotated[str, Query(pattern=r"^/[^\x00]*$", max_length=4096, description="in the machine; begins with /")]
Text = Annotated[str, Field(pattern=_NO_NUL, max_length=131_072)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]+$",
        max_length=128,
        description="of your choice, new for each thing you want; a repetition with the same key does nothing twice",
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Publish(_Body):
    """A port of the host that leads to one of the machine."""

    host_port: Annotated[int, Field(strict=True, ge=1, le=65535)]
    guest_port: Annotated[int, Field(strict=True, ge=1, le=65535)]
    protocol: Literal["tcp", "udp"] = "tcp"
    host_address: Annotated[str, Field(max_length=15)] = "0.0.0.0"  # noqa: S104 - as on the command line

    def forward(self) -> model.PortForward:
        return model.PortForward(self.host_port, self.guest_port, self.protocol, self.host_address)


class NewLimits(_Body):
    """What it may use of its host; what is not given stays as it is."""

    cpus: Annotated[float, Field(strict=True, gt=0, le=4096)] | None = None
    memory_mib: Size | None = None
    pids: Int32 | None = None
    io_mib_s: Size | None = None


class Config(_Body):
    """Network, ports and limits; what is not given stays as it is."""

    mode: model.NetworkMode | None = None
    egress: Annotated[str, Field(max_length=10_000, description='"allow", "deny" or "CIDR,…"')] | None = None
    bandwidth_bytes_s: Size | None = Field(default=None, description="in each direction; 0: no limit")
    tcp: model.TcpMode | None = None
    publish: Annotated[list[Publish], Field(max_length=256)] = []
    unpublish: Annotated[list[Publish], Field(max_length=256)] = []
    limits: NewLimits = NewLimits()
    no_fork: Flag | None = None
    restart: model.Restart | None = None

    def change(self) -> model.ConfigChange:
        """Raises InvalidRequest for an egress that is none."""
        return model.ConfigChange(
            mode=self.mode,
            egress=model.Egress.parse(self.egress) if self.egress is not None else None,
            bandwidth_bytes_s=self.bandwidth_bytes_s,
            tcp=self.tcp,
            publish=tuple(each.forward() for each in self.publish),
            unpublish=tuple(each.forward() for each in self.unpublish),
            limits=model.Limits(**self.limits.model_dump()),
            no_fork=self.no_fork,
            restart=self.restart,
        )


class Run(_Body):
    """A machine to be made. All is optional: what is not given is chosen."""

    name: Name | None = None
    image: Name | None = Field(default=None, description="id or name; the default one, built if it is missing")
    snapshot: Name | None = Field(default=None, description="start from this one: no image, shape or cold_boot then")
    cpus: Int32 = 0
    memory_mib: Int32 = 0
    disk_mib: Int32 = 0
    cold_boot: Flag = Field(default=False, description="really boot, don't start from the image's template")
    config: Config = Config()
    ttl_s: TimeToLive = 0.0


class NewFork(_Body):
    """Children to be made."""

    count: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    name: Name | None = Field(default=None, description="children are NAME-1, NAME-2, …; else as the source")
    paused: Flag = False
    quiesce: Flag = Field(default=False, description="freeze its user processes until each child has its own entropy")
    forget: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=1000)] = Field(
        default=[], description="environment variables that are wiped in the children"
    )
    config: Config = Config()
    ttl_s: TimeToLive = 0.0


class TakeSnapshot(_Body):
    """A snapshot to be taken."""

    tag: Name | None = None
    message: Annotated[str, Field(max_length=model.ids.MOST_MESSAGE)] = ""
    quiesce: Flag = False


class Restore(_Body):
    """Where a machine is to go back to."""

    snapshot: Name
    keep_tag: Name | None = Field(default=None, description="first keep what it is now, under this tag")


class Stop(_Body):
    """How a machine is stopped."""

    force: Flag = Field(default=False, description="cut the power instead of shutting down")


class Tag(_Body):
    """What a tag is to stand for."""

    snapshot: Name
    force: Flag = Field(default=False, description="take the tag from another snapshot")


class Exec(_Body):
    """A command to be run to its end."""

    argv: Annotated[list[Text], Field(min_length=1, max_length=10_000, examples=[["uname", "-a"]])]
    environment: Annotated[dict[str, Text], Field(max_length=10_000)] = {}
    directory: Annotated[Text, Field(max_length=4096)] = Field(default="", description="empty: the user's home")
    user: Annotated[Text, Field(max_length=255)] = Field(default="", description="empty: root")
    timeout_s: Seconds = Field(default=0.0, description="0: none. Past it the command is killed")
    stdin: str = ""
    encoding: Literal["utf-8", "base64"] = Field(
        default="utf-8", description="of stdin and the output; as utf-8, bytes that are none become U+FFFD"
    )
    output_limit_bytes: Annotated[int, Field(strict=True, ge=1024, le=16 << 20)] = Field(
        default=1 << 20, description="of each stream; past it the middle is left out"
    )


class BuildImage(_Body):
    """An image to be built."""

    name: Name | None = None
    rebuild: Flag = Field(default=False, description="even if one with the same recipe is there")


class UpdateImage(_Body):
    """What forks of the image's machines forget."""

    forget_files: Annotated[
        list[Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]], Field(max_length=1000)
    ]


class CreatePool(_Body):
    """A pool to be made."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_by_alias=True)

    name: Name
    source: Name = Field(alias="from", description="a snapshot or an image, by id, tag or name")
    target: Int32 = 1
    max: Annotated[int, Field(strict=True, ge=1, le=_INT32)] | None = Field(default=None, description="twice target")
    cpus: Int32 = 0
    memory_mib: Int32 = 0
    disk_mib: Int32 = 0


class ScalePool(_Body):
    """Other sizes of a pool; what is not given stays."""

    target: Int32 | None = None
    max: Annotated[int, Field(strict=True, ge=1, le=_INT32)] | None = None


class Acquire(_Body):
    """A machine of a pool that is wanted."""

    ttl_s: Seconds = Field(default=0.0, description="it is removed when it was not used for so long; 0: ten minutes")
    labels: Annotated[dict[str, Text], Field(max_length=64)] = {}
    wait_s: Annotated[float, Field(strict=True, ge=0, le=3600)] = Field(
        default=30.0, description="for a machine, if none is ready"
    )


class Release(_Body):
    """How a machine is given back."""

    recycle: Flag = Field(default=False, description="the pool gets another at once, not when there is time")


class Renew(_Body):
    """A lease that is to begin anew."""

    ttl_s: Seconds = Field(default=0.0, description="0: as it is")


class NewQuota(_Body):
    """What a tenant may have; null is no limit."""

    machines: Int32 | None = None
    cpus: Int32 | None = None
    memory_mib: Size | None = None
    disk_mib: Size | None = None
    snapshots: Int32 | None = None
    forks_per_minute: Int32 | None = None


class CreateTenant(_Body):
    """A tenant to be made."""

    name: Name
    quota: NewQuota = NewQuota()


class SetQuota(_Body):
    """What is to change about a tenant."""

    quota: NewQuota


class Share(_Body):
    """Whom a snapshot is shared with."""

    tenant: Name | None = Field(description="null: every tenant, also those to come")


class SetKsm(_Body):
    """Whether the kernel is to keep equal pages once."""

    on: Flag
    across_tenants: Flag = Field(default=False, description="although it is on for another tenant's machines too")


class CreateToken(_Body):
    """A token to be made."""

    role: Role
    tenant: Name | None = Field(default=None, description="the caller's own")
    lifetime_s: Annotated[int, Field(strict=True, ge=1, le=100 * 365 * 86_400)] | None = Field(
        default=30 * 86_400, description="null: for ever"
    )
    name: Name | None = Field(default=None, description="to know it by")
