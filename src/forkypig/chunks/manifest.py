"""What one snapshot consists of and what it needs: immutable, and complete without its ancestors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from forkypig.chunks import coding
from forkypig.chunks.format import HASH_BYTES, MAX_CONTENT_BYTES, Hashes, as_hashes
from forkypig.chunks.section import Section, read_hashes
from forkypig.chunks.store import Store
from forkypig.chunks.writer import Writer
from forkypig.errors import Damaged
from forkypig.model import Shape, SnapshotId

MAX_DEVICE_BYTES = 1 << 26  # QEMU's device state is 4 to 35 KiB; accelerators' may be longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a host must have to load the snapshot."""

    qemu_build: str
    machine_type: str  # versioned: "pc-q35-7.2"
    cpu_model: str
    accelerator: str
    cpu: str = ""  # the processor's name, where the guest sees the host's; "": what QEMU makes of the model
    cpu_features: tuple[str, ...] = ()  # of that processor, as Linux names them


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImage:
    """The image that pages of the disk are taken from."""

    id: str
    sha256: str  # of its disk, hex
    format: str = "raw"


@dataclass(frozen=True, slots=True)
class DeviceState:
    """QEMU's device state, in pieces of 64 KiB."""

    length: int
    pieces: bytes  # their hashes, 32 bytes each

    def __post_init__(self) -> None:
        """Raises Damaged when the two don't fit each other."""
        count = -(-self.length // MAX_CONTENT_BYTES)
        if not 0 <= self.length <= MAX_DEVICE_BYTES or len(self.pieces) != count * HASH_BYTES:
            raise Damaged(f"a device state of {self.length} bytes can't be in {len(self.pieces) / HASH_BYTES:g} pieces")

    def hashes(self) -> Hashes:
        """The hashes of its pieces."""
        return as_hashes([self.pieces])

    def read(self, store: Store) -> bytes:
        """All of it. Raises Damaged."""
        content = b"".join(read_hashes(store, self.hashes()))
        if len(content) != self.length:
            raise Damaged(f"a device state has {len(content)} bytes, not {self.length}")
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One snapshot."""

    snapshot: SnapshotId
    parent: SnapshotId | None = None  # whether it is still there or not; nothing depends on it
    created_us: int
    shape: Shape
    needs: Needs
    base: BaseImage | None = None  # None: no page of the disk is the base's
    devices: DeviceState
    memory: Section
    disk: Section
    labels: Mapping[str, str] = field(
        default_factory=dict
    )  # what people and other rooms want to keep with it: message, name, …


def make_device_state(writer: Writer, content: bytes) -> DeviceState:
    """Adds a device state to the store."""
    references = writer.add_contents(coding.pieces_of(content))
    return DeviceState(len(content), writer.hashes(references).tobytes())
