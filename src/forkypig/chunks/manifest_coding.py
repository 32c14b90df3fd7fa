"""Manifests as bytes. A head of fixed length, the metadata as JSON, the hashes of the blocks as they are, and the
hash of it all.

With a key that hash is keyed, so that nobody without the key can make a manifest that is believed.
"""

import json
import struct
from typing import Any

from forkypig.chunks import coding
from forkypig.chunks.crypt import KEY_ID_BYTES, NO_KEY_ID, Key
from forkypig.chunks.format import HASH_BYTES, REGION_BYTES, check_size
from forkypig.chunks.manifest import BaseImage, DeviceState, Manifest, Needs
from forkypig.chunks.pack import check_key
from forkypig.chunks.section import Section
from forkypig.errors import Damaged, InvalidRequest
from forkypig.model import Shape, SnapshotId
from forkypig.model.ids import check_id

VERSION = 1
_MAGIC = b"FPIGMANI"
_HEAD = struct.Struct(f"<8sHHI{KEY_ID_BYTES}sQQQII")


def encode(manifest: Manifest, key: Key | None) -> bytes:
    """The whole file."""
    metadata = json.dumps(_metadata(manifest), sort_keys=True, separators=(",", ":")).encode()
    parts = (manifest.devices.pieces, manifest.memory.blocks, manifest.disk.blocks)
    head = _HEAD.pack(
        _MAGIC,
        VERSION,
        0,
        len(metadata),
        key.id if key else NO_KEY_ID,
        manifest.memory.size_bytes,
        manifest.disk.size_bytes,
        manifest.devices.length,
        len(manifest.devices.pieces) // HASH_BYTES,
        0,
    )
    body = b"".join((head, metadata, *parts))
    return body + coding.address(body, key.address_key if key else None)


def decode(content: bytes, key: Key | None) -> Manifest:
    """Raises Damaged, InvalidRequest for another key than the manifest's."""
    if len(content) < _HEAD.size + HASH_BYTES or content[:8] != _MAGIC:
        raise Damaged("this is not a manifest of a snapshot, or it is cut off")
    _, version, flags, length, key_id, memory_bytes, disk_bytes, device_bytes, pieces, reserved = _HEAD.unpack_from(
        content
    )
    if version != VERSION or flags or reserved:
        raise Damaged(
            f"this manifest's format is {version}.{flags}, and this Forky Pig reads {VERSION}.0: use a newer one"
        )
    check_key(key_id, key, "this manifest")
    body, digest = content[:-HASH_BYTES], content[-HASH_BYTES:]
    if coding.address(body, key.address_key if key else None) != digest:
        raise Damaged("this manifest was altered or is cut off: its hash is another")
    check_size(memory_bytes, "a memory")
    check_size(disk_bytes, "a disk")
    lengths = (length, pieces * HASH_BYTES, _blocks_bytes(memory_bytes), _blocks_bytes(disk_bytes))
    if _HEAD.size + sum(lengths) != len(body):
        raise Damaged("this manifest's parts don't add up to its length")
    parts, at = [], _HEAD.size
    for part in lengths:
        parts.append(body[at : at + part])
        at += part
    return _manifest(parts, (device_bytes, memory_bytes, disk_bytes))


def _blocks_bytes(size_bytes: int) -> int:
    return -(-size_bytes // REGION_BYTES) * HASH_BYTES


def _metadata(manifest: Manifest) -> dict[str, Any]:
    needs, base, shape = manifest.needs, manifest.base, manifest.shape
    return {
        "snapshot": manifest.snapshot,
        "parent": manifest.parent,
        "created_us": manifest.created_us,
        "shape": {"cpus": shape.cpus, "memory_mib": shape.memory_mib, "disk_mib": shape.disk_mib},
        "needs": {
            "qemu_build": needs.qemu_build,
            "machine_type": needs.machine_type,
            "cpu_model": needs.cpu_model,
            "accelerator": needs.accelerator,
            "cpu": needs.cpu,
            "cpu_features": list(needs.cpu_features),
        },
        "base": None if base is None else {"id": base.id, "sha256": base.sha256, "format": base.format},
        "labels": dict(manifest.labels),
    }


def _manifest(parts: list[bytes], sizes: tuple[int, int, int]) -> Manifest:
    try:
        read = _Fields(json.loads(parts[0].decode("utf-8")))
        needs, shape, base = read.fields("needs"), read.fields("shape"), read.optional_fields("base")
        parent = read.optional_text("parent")
        return Manifest(
            snapshot=SnapshotId(check_id(read.text("snapshot"))),
            parent=None if parent is None else SnapshotId(check_id(parent)),
            created_us=read.number("created_us"),
            shape=Shape(shape.number("cpus"), shape.number("memory_mib"), shape.number("disk_mib")),
            needs=Needs(
                qemu_build=needs.text("qemu_build"),
                machine_type=needs.text("machine_type"),
                cpu_model=needs.text("cpu_model"),
                accelerator=needs.text("accelerator"),
                cpu=needs.optional_text("cpu") or "",  # manifests from before there was one have none
                cpu_features=tuple(needs.texts("cpu_features")),
            ),
            base=None
            if base is None
            else BaseImage(id=base.text("id"), sha256=base.text("sha256"), format=base.text("format")),
            devices=DeviceState(sizes[0], parts[1]),
            memory=Section(sizes[1], parts[2]),
            disk=Section(sizes[2], parts[3]),
            labels=read.fields("labels").all_texts(),
        )
    except (ValueError, RecursionError, InvalidRequest) as error:
        raise Damaged(f"this manifest's metadata can't be read: {error}") from error


class _Fields:
    """The fields of a JSON object, each checked for its type."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise Damaged("this manifest's metadata is not what it should be")
        self._values = value

    def _get(self, name: str, kind: type) -> Any:
        value = self._values.get(name)
        if type(value) is not kind:
            raise Damaged(f"this manifest's metadata has no valid «{name}»")
        return value

    def text(self, name: str) -> str:
        return str(self._get(name, str))

    def number(self, name: str) -> int:
        value = int(self._get(name, int))
        if not 0 <= value < 1 << 63:
            raise Damaged(f"this manifest's «{name}» is out of range")
        return value

    def fields(self, name: str) -> "_Fields":
        return _Fields(self._get(name, dict))

    def optional_fields(self, name: str) -> "_Fields | None":
        return None if self._values.get(name) is None else self.fields(name)

    def optional_text(self, name: str) -> str | None:
        return None if self._values.get(name) is None else self.text(name)

    def texts(self, name: str) -> list[str]:
        values = self._get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise Damaged(f"this manifest's «{name}» are not all texts")
        return list(values)

    def all_texts(self) -> dict[str, str]:
        return {name: self.text(name) for name in self._values}
