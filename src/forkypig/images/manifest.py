"""What an image is, as the manifest.json beside its files says it.

An image's id is a hash of its manifest and the manifest holds the hash of every file, so an id names exact bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forkypig.model import Image, ImageId

MANIFEST = "manifest.json"
DISK, KERNEL, INITRD = "disk.raw", "vmlinux", "initrd"
FILES = (DISK, KERNEL, INITRD)

_FORMAT = 1
_CHUNK = 1 << 20
_MOST_FILE_BYTES = 1 << 44  # a lying size must not make us write without bound


class DamagedManifest(ValueError):
    """A manifest can't be read; `str()` says why. Never leaves this room."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an image: its apparent size and its hash (64 hex digits)."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known of an image."""

    name: str
    description: str
    recipe: str  # SHA-256 of everything that went into the build but the packages' versions
    disk_format: str  # "raw"
    cmdline: str
    kernel_release: str
    stored_bytes: int  # what the files take on a disk: holes don't count
    created_us: int
    files: Mapping[str, FileEntry]
    packages: tuple[str, ...]  # "name=version", sorted

    def canonical(self) -> bytes:
        """The same bytes for the same content, for hashing and for the file."""
        content = {"format": _FORMAT, **asdict(self)}
        return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"

    @property
    def sha256(self) -> str:
        """The hash of the canonical content, 64 hex digits."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def image_id(self) -> ImageId:
        """ "i-" and the first 48 bits of the hash in hex."""
        return ImageId(f"i-{self.sha256[:12]}")

    def image(self) -> Image:
        """The record that the rest of Forky Pig uses."""
        return Image(
            id=self.image_id,
            name=self.name,
            size_bytes=self.stored_bytes,
            kernel=self.kernel_release,
            sha256=self.sha256,
            created_us=self.created_us,
            description=self.description,
        )


def read_manifest(directory: Path) -> Manifest:
    """The manifest in an image's directory; raises DamagedManifest when it is missing, can't be read, or is another
    image's than the directory's name says."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        manifest = _parse(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedManifest(f"{directory / MANIFEST}: {error!r}") from error
    if manifest.image_id != directory.name:
        raise DamagedManifest(f"{directory / MANIFEST} is that of {manifest.image_id}")
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    if content.pop("format") != _FORMAT:
        raise ValueError("unknown format")
    files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
    if set(files) != set(FILES):
        raise ValueError(f"the files are {sorted(files)}")
    return Manifest(files=files, packages=tuple(content.pop("packages")), **content)


def parse_foreign(content: bytes) -> Manifest:
    """A manifest that somebody else wrote; its types are checked besides. Raises DamagedManifest."""
    try:
        manifest = _parse(json.loads(content.decode("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedManifest(f"the image's manifest: {error!r}") from error
    texts = (manifest.name, manifest.description, manifest.recipe, manifest.cmdline, manifest.kernel_release)
    numbers = (manifest.stored_bytes, manifest.created_us, *(entry.size_bytes for entry in manifest.files.values()))
    hashes = [entry.sha256 for entry in manifest.files.values()]
    if not all(type(text) is str and text.isprintable() for text in (*texts, *manifest.packages, *hashes)):
        raise DamagedManifest("the image's manifest has texts that are none")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise DamagedManifest("the image's manifest has numbers that are none")
    if any(entry.size_bytes > _MOST_FILE_BYTES for entry in manifest.files.values()) or manifest.disk_format != "raw":
        raise DamagedManifest("the image's files are of a size or format that can't be")
    if manifest.canonical() != content:
        raise DamagedManifest("the image's manifest is not written as ours are")
    return manifest


def hash_file(path: Path) -> str:
    """The SHA-256 of a file in hex. Blocks: a fifth of a second for the default image's disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def stored_bytes(path: Path) -> int:
    """What a file takes on its disk; holes take nothing."""
    return path.stat().st_blocks * 512
