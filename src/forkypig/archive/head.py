"""What an export or a remote snapshot says of itself, besides the manifest: JSON, checked field by field.

It holds the hash of all else that decides what the snapshot is, so signing it signs everything. Whoever wrote it may be
anybody: every text is checked before it goes near a record, a command line or a terminal.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from blake3 import blake3

from forkypig.chunks.crypt import Key
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.manifest_coding import decode
from forkypig.errors import Damaged, InvalidRequest
from forkypig.model import ImageId, SnapshotId, check_name
from forkypig.model.ids import check_id, check_message

FORMAT = 1
MOST_BYTES = 1 << 18
MOST_MANIFEST_BYTES = 1 << 28  # 32 bytes for every 2 MiB of memory and disk
_MOST_TEXT = 200
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")  # what becomes part of QEMU's command line
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NETWORKS = ("tap", "user", "none")
_MOST_CPUS = 1 << 12
_MOST_FEATURES = 1 << 10  # Linux knows some 400


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a host knows of a snapshot that its manifest does not say."""

    network: str  # what the network card hangs on, as in qemu.command.Hardware
    mtu: int
    tag: str = ""
    message: str = ""
    pause_ms: float = 0.0
    created_us: int = 0
    own_memory_bytes: int = 0
    own_disk_bytes: int = 0
    forget_files: tuple[str, ...] = ()  # of the image: what forks don't have


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """All of it."""

    snapshot: SnapshotId
    manifest: str  # BLAKE3 of its bytes, hex
    index: str = ""  # of the parcel's index; "": there is none beside it (in object stores)
    image: ImageId | None = None  # that its disk stands on
    image_sha256: str = ""  # of the image's manifest
    has_image: bool = False  # whether the image is in the file
    about: About = field()

    def encode(self) -> bytes:
        """As it is written, and signed."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, indent=1).encode() + b"\n"

    def read_manifest(self, content: bytes, key: Key | None) -> Manifest:
        """The manifest, when it is the one that is meant and fit to be a record. Raises Damaged, InvalidRequest (the
        key)."""
        if digest(content) != self.manifest:
            raise Damaged("the manifest is another than its head says: it was altered or is damaged")
        manifest = decode(content, key)
        if manifest.snapshot != self.snapshot or self.image != (manifest.base.id if manifest.base else None):
            raise Damaged("the manifest is that of another snapshot than its head says")
        _check_manifest(manifest)
        return manifest


def digest(content: bytes) -> str:
    """BLAKE3 in hex."""
    return blake3(content).hexdigest()


def decode_head(content: bytes) -> Head:
    """Raises Damaged, InvalidRequest for a newer format."""
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"the head of this export can't be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("about"), dict):
        raise Damaged("the head of this export is not what it should be")
    if values.get("format") != FORMAT:
        raise InvalidRequest(
            f"this export's format is {str(values.get('format'))[:20]}, and this Forky Pig reads {FORMAT}: "
            f"use a newer one"
        )
    try:
        return _head(_Values(values), _Values(values["about"]))
    except InvalidRequest as error:
        raise Damaged(f"the head of this export is damaged: {error}") from error


def _head(values: "_Values", about: "_Values") -> Head:
    image = values.values.get("image")
    head = Head(
        snapshot=SnapshotId(check_id(values.text("snapshot"))),
        manifest=values.text("manifest"),
        index=values.text("index"),
        image=None if image is None else ImageId(check_id(values.text("image"))),
        image_sha256=values.text("image_sha256"),
        has_image=values.of(bool, "has_image"),
        about=About(
            network=about.text("network"),
            mtu=about.number("mtu"),
            tag=about.text("tag"),
            message=check_message(about.of(str, "message")),
            pause_ms=float(about.values.get("pause_ms", 0.0)) if _is_number(about.values.get("pause_ms")) else 0.0,
            created_us=about.number("created_us"),
            own_memory_bytes=about.number("own_memory_bytes"),
            own_disk_bytes=about.number("own_disk_bytes"),
            forget_files=about.texts("forget_files"),
        ),
    )
    if head.about.tag:
        check_name("snapshot", head.about.tag)
    if (
        not head.about.message.isprintable()
        and not head.about.message.replace("\n", "").replace("\t", "").isprintable()
    ):
        raise Damaged("the snapshot's message has characters that are no text")
    if head.about.network not in _NETWORKS or not 68 <= head.about.mtu <= 65535:
        raise Damaged(f"a network card on «{head.about.network}» with an MTU of {head.about.mtu} can't be")
    for one in (head.manifest, *([head.index] if head.index else []), *([head.image_sha256] if image else [])):
        if not _DIGEST.fullmatch(one):
            raise Damaged(f"«{one[:80]}» is not a hash")
    return head


class _Values:
    """The fields of a JSON object, each checked for its type."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def of(self, kind: type, name: str) -> Any:
        value = self.values.get(name)
        if type(value) is not kind:
            raise Damaged(f"the head of this export has no valid «{name}»")
        return value

    def text(self, name: str) -> str:
        return check_text(self.of(str, name))

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.of(list, name)
        if not all(isinstance(value, str) for value in values):
            raise Damaged(f"the head of this export has no valid «{name}»")
        return tuple(check_text(value) for value in values)

    def number(self, name: str) -> int:
        value = int(self.of(int, name))
        if not 0 <= value < 1 << 63:
            raise Damaged(f"«{name}» of this export is out of range")
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


def check_text(text: str) -> str:
    """Returns `text` when it may be shown and stored; raises Damaged."""
    if len(text) > _MOST_TEXT or not text.isprintable():
        raise Damaged("a text in it is too long, or has characters that are no text")
    return text


def _check_manifest(manifest: Manifest) -> None:
    """Raises Damaged for what no host of ours can have written."""
    needs, shape = manifest.needs, manifest.shape
    for word in (needs.machine_type, needs.cpu_model, needs.accelerator):
        if not _WORD.fullmatch(word):
            raise Damaged(f"«{word[:80]}» is neither a machine type nor a CPU model nor an accelerator")
    if len(needs.cpu_features) > _MOST_FEATURES:
        raise Damaged(f"a CPU with {len(needs.cpu_features)} features can't be")
    for text in (needs.qemu_build, needs.cpu, *needs.cpu_features):
        check_text(text)
    if not 0 < shape.cpus <= _MOST_CPUS:
        raise Damaged(f"a machine with {shape.cpus} CPUs can't be")
    if (shape.memory_mib << 20, shape.disk_mib << 20) != (manifest.memory.size_bytes, manifest.disk.size_bytes):
        raise Damaged("the snapshot's memory or disk is of another size than its shape says")
    if manifest.base is not None:
        check_id(manifest.base.id)
        if manifest.base.format != "raw" or not _DIGEST.fullmatch(manifest.base.sha256):
            raise Damaged("the snapshot's base image is of a kind that is not known here")
