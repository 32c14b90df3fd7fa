"""What the tools answer with: little, and named so that a model needs no explanation."""

from pydantic import BaseModel, Field

from forkypig import model
from forkypig.sdk.machine import Machine as MachineHandle


class Machine(BaseModel):
    """A machine."""

    name: str
    id: str
    state: str = Field(description="running, paused, stopped, hibernated, failed, creating or removing")
    address: str | None = Field(description="where the host and other machines reach it")
    image: str
    cpus: int
    memory_mib: int
    snapshot: str | None = Field(description="id of the snapshot that it stands on")
    parent: str | None = Field(description="id of the machine that it was forked from")
    expires_us: int | None = Field(
        default=None, description="when it is removed unless it is used, in microseconds since the Unix epoch"
    )
    busy: str | None = Field(default=None, description="what is being done to it now")
    failure: str | None = None

    @classmethod
    def of(cls, machine: MachineHandle) -> "Machine":
        info = machine.info
        return cls(
            name=info.name,
            id=info.id,
            state=info.state.value,
            address=info.address,
            image=info.image_name or info.image,
            cpus=info.shape.cpus,
            memory_mib=info.shape.memory_mib,
            snapshot=info.snapshot,
            parent=info.parent,
            expires_us=info.expires_us or None,
            busy=info.operation or None,
            failure=info.failure or None,
        )


class Machines(BaseModel):
    """All machines, oldest first."""

    machines: list[Machine]


class Snapshot(BaseModel):
    """A snapshot: memory and disk of one instant."""

    id: str
    tag: str | None
    message: str | None
    kind: str = Field(description="kept: until it is removed; fork, hibernation: while something stands on it")
    parent: str | None = Field(description="id of the snapshot before it")
    machine: str | None = Field(description="id of the machine that it was taken from")
    created_us: int = Field(description="microseconds since the Unix epoch")
    own_memory_bytes: int = Field(description="memory that its parent does not hold")

    @classmethod
    def of(cls, info: model.Snapshot) -> "Snapshot":
        return cls(
            id=info.id,
            tag=info.tag or None,
            message=info.message or None,
            kind=info.kind.value,
            parent=info.parent,
            machine=info.machine,
            created_us=info.created_us,
            own_memory_bytes=info.own_memory_bytes,
        )


class Snapshots(BaseModel):
    """Snapshots in the order that the tool says."""

    snapshots: list[Snapshot]


class Fork(BaseModel):
    """What a fork made."""

    snapshot: str = Field(description="id of the instant at which it was forked")
    children: list[Machine]


class Ended(BaseModel):
    """How a command ended."""

    exit_code: int = Field(description="0 is success; 124: it ran out of time; 126, 127: it could not start")
    stdout: str
    stderr: str
    timed_out: bool = False
    note: str | None = Field(default=None, description="what to know about the output or the end")


class FileContent(BaseModel):
    """A part of a file, or all of it."""

    path: str
    content: str
    encoding: str = Field(description="utf-8, or base64 for what is no text")
    offset: int
    complete: bool = Field(description="false: there is more; read on from next_offset")
    next_offset: int


class Written(BaseModel):
    """What was written."""

    path: str
    bytes: int


class FileEntry(BaseModel):
    """One entry of a directory."""

    name: str
    kind: str = Field(description="file, directory, link or special")
    size_bytes: int
    mode: str
    target: str | None = None


class Directory(BaseModel):
    """A directory's entries, by name."""

    path: str
    entries: list[FileEntry]
    complete: bool = Field(description="false: there are more than are shown")


class Removed(BaseModel):
    """What is gone."""

    removed: str
