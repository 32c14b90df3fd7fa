"""What the API answers with. The fields are those of the command line's --json documents, which these are made from."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from forkypig import model
from forkypig.cli import documents
from forkypig.sdk.machine import Fork as ForkMade
from forkypig.sdk.status import Check as CheckMade
from forkypig.sdk.status import Status as StatusMade

Count = Annotated[int, Field(ge=0)]


class Resource(BaseModel):
    """Unknown fields are left out: the documents may get further ones first."""

    model_config = ConfigDict(extra="ignore")


class Problem(Resource):
    """What went wrong (RFC 9457)."""

    type: str = Field(description="urn:forkypig:problem: and what kind of error it is", examples=["about:blank"])
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str = Field(description="one sentence: what it is about, what is wrong, what to do next")
    errors: list["FieldError"] = Field(default=[], description="which fields of the request are wrong, and why")


class FieldError(Resource):
    """One thing that is wrong with a request."""

    where: str = Field(description='like "body.memory_mib"')
    what: str


class Port(Resource):
    """A port of the host that leads to one of a machine."""

    host_address: str
    host_port: int
    guest_port: int
    protocol: str


class Network(Resource):
    """How a machine is connected."""

    mode: model.NetworkMode
    egress: str = Field(description='where its connections may go: "allow", "deny" or networks')
    bandwidth_bytes_s: int | None
    tcp: model.TcpMode
    ports: list[Port]


class Limits(Resource):
    """What it may use of its host; null: the default."""

    cpus: float | None
    memory_mib: int | None
    pids: int | None
    io_mib_s: int | None


class Machine(Resource):
    """A machine: a guest with an identity of its own."""

    id: str
    name: str
    state: model.MachineState
    operation: str | None = Field(description="what is being done to it now")
    failure: str | None
    image: str
    image_id: str
    snapshot: str | None = Field(description="the snapshot that it stands on")
    parent: str | None = Field(description="the machine that it was forked from")
    cpus: Count
    memory_mib: Count
    disk_mib: Count
    address: str | None
    qemu_pid: int | None
    accelerator: str
    accelerator_reason: str
    created_us: int
    expires_us: int | None = Field(description="by its lease, when it is removed unless it is used")
    network: Network
    limits: Limits
    no_fork: bool
    restart: model.Restart
    tenant: str

    @classmethod
    def of(cls, info: model.Machine) -> "Machine":
        return cls.model_validate(documents.machine(info))


class MadeMachine(Machine):
    """A machine that was just made."""

    ready_ms: float | None = Field(description="from the request until its agent had confirmed")


class Snapshot(Resource):
    """The immutable state of a machine at one instant."""

    id: str
    tag: str | None
    message: str | None
    kind: model.SnapshotKind
    parent: str | None
    machine: str | None
    image: str
    cpus: Count
    memory_mib: Count
    disk_mib: Count
    machine_type: str
    qemu_build: str
    accelerator: str
    cpu_model: str
    pause_ms: float = Field(description="how long its machine stood still for it")
    own_memory_bytes: Count
    own_disk_bytes: Count
    packed: bool = Field(description="its memory lies in the store, no more in a frozen process")
    where: str
    created_us: int
    tenant: str
    shared_with: list[str]

    @classmethod
    def of(cls, info: model.Snapshot) -> "Snapshot":
        return cls.model_validate(documents.snapshot(info))


class Fork(Resource):
    """What a fork made."""

    snapshot: str
    parent: str | None = Field(description="null when a snapshot was forked")
    pause_ms: float = Field(description="how long the parent stood still")
    children: list[MadeMachine]

    @classmethod
    def of(cls, made: ForkMade) -> "Fork":
        children = [
            MadeMachine.model_validate({**documents.machine(child.info), "ready_ms": child.ready_ms})
            for child in made.children
        ]
        return cls(snapshot=made.snapshot.id, parent=made.parent, pause_ms=made.pause_ms, children=children)


class Image(Resource):
    """A bootable base."""

    id: str
    name: str
    size_bytes: Count
    kernel: str
    sha256: str
    created_us: int
    description: str
    forget_files: list[str]

    @classmethod
    def of(cls, info: model.Image) -> "Image":
        return cls.model_validate(documents.image(info))


class Event(Resource):
    """One thing that happened."""

    sequence: Count
    time_us: int
    kind: str
    subject: str
    detail: str

    @classmethod
    def of(cls, info: model.Event) -> "Event":
        return cls.model_validate(documents.event(info))


class Daemon(Resource):
    """A daemon that runs."""

    pid: int
    version: str
    started_us: int


class Status(Resource):
    """The instance as it is now."""

    home: str
    running: bool
    controller: Daemon | None
    hostd: Daemon | None
    pager: Daemon | None
    rest: Daemon | None = Field(description="this API; told to `forky status` on its own computer alone")
    rest_address: str | None
    rest_error: str | None
    controller_error: str | None
    hostd_error: str | None
    pager_error: str | None
    accelerator: str | None
    accelerator_reason: str
    network: str | None
    network_reason: str
    qemu_version: str | None
    machines: Count
    snapshots: Count
    frozen_bytes: int | None
    cached_bytes: int | None
    stored_bytes: int | None
    chunks: int | None

    @classmethod
    def of(cls, found: StatusMade) -> "Status":
        return cls.model_validate(documents.status(found))


class Check(Resource):
    """One requirement, and how it is met."""

    name: str
    verdict: str
    detail: str
    remedy: str | None


class Examination(Resource):
    """What the doctor found."""

    ok: bool
    checks: list[Check]

    @classmethod
    def of(cls, checks: "list[CheckMade]") -> "Examination":
        made: list[Any] = [documents.check(check) for check in checks]
        return cls.model_validate({"ok": all(each["verdict"] != "failed" for each in made), "checks": made})


class ExecResult(Resource):
    """How a command ended. A command that failed is a result, not a problem."""

    exit_code: int = Field(description="as a shell has it: 128 + n for signal n, 124 when it timed out")
    stdout: str
    stderr: str
    stdout_omitted_bytes: Count = Field(description="left out in the middle, because there was more than asked for")
    stderr_omitted_bytes: Count
    timed_out: bool
    failure: str | None = Field(description="why it could not start")


class Unpacked(Resource):
    """What an archive held."""

    files: Count
    bytes: Count


class FileEntry(Resource):
    """One entry of a directory."""

    name: str
    kind: str = Field(description='"file", "directory", "link" or "special"')
    mode: str = Field(description='permission bits in octal: "0644"')
    uid: int
    gid: int
    size_bytes: Count
    modified_ns: int
    target: str | None = Field(description="of a link")


class Directory(Resource):
    """The entries of a directory, in the order of their names."""

    path: str
    entries: list[FileEntry]
    complete: bool = Field(description="false: there are more than were asked for")


class Health(Resource):
    """That this process answers."""

    status: str
