"""An image in an export: its manifest, and its files in compressed parts of 4 MiB. Holes stay holes.

The image's id is a hash of its manifest, which has the hash of every file: what is imported is exactly what was built,
or nothing.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from forkypig.archive import tape
from forkypig.chunks import durable, faults
from forkypig.errors import Damaged
from forkypig.images.manifest import FILES, MANIFEST, DamagedManifest, Manifest, parse_foreign
from forkypig.images.store import ImageStore, remove_tree
from forkypig.model import ImageId, check_name

PART_BYTES = 4 << 20
_MOST_STORED = PART_BYTES + (PART_BYTES >> 8) + 64  # zstd's own bound for what does not compress
_MOST_MANIFEST = 1 << 22
_HOLE = bytes(1 << 16)
_LEVEL = 3  # 320 MiB of disk take 5 s; images are exported seldom

_PREFIX = "image/"


def write(images: ImageStore, image: ImageId, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The image's part of the tar file. `advance` is told of bytes of its files. Raises NotFound, InvalidRequest."""
    images.check_sizes(image)
    manifest = images.manifest(image)
    yield tape.whole(_PREFIX + MANIFEST, manifest.canonical())
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    for name in FILES:
        with (images.root / image / name).open("rb") as file:
            number = 0
            while part := file.read(PART_BYTES):
                yield tape.whole(_part(name, number), compressor.compress(part))
                advance(len(part))
                number += 1


def _part(name: str, number: int) -> str:
    return f"{_PREFIX}{name}/{number:06}"


def skip(reader: tape.Reader) -> None:
    """Passes over the image: it is here already."""
    while reader.peek().startswith(_PREFIX):
        reader.open(reader.peek(), max(_MOST_MANIFEST, _MOST_STORED))
        reader.skip()


def read(
    reader: tape.Reader,
    images: ImageStore,
    image: ImageId,
    sha256: str,
    disk_sha256: str,
    forget_files: tuple[str, ...],
    advance: Callable[[int], None],
) -> None:
    """Takes the image in, whole or not at all. Raises Damaged, ResourceExhausted."""
    content = reader.content(_PREFIX + MANIFEST, _MOST_MANIFEST)
    try:
        manifest = parse_foreign(content)
        check_name("image", manifest.name)
    except (DamagedManifest, ValueError) as error:
        raise Damaged(f"the image in this export is damaged: {error}") from error
    if (manifest.image_id, manifest.sha256) != (image, sha256):
        raise Damaged("the image in this export is another than its head says")
    check_disk(manifest, disk_sha256)
    directory = images.new_build()
    try:
        with durable.room(directory):
            for name in FILES:
                _file(reader, directory / name, manifest, advance)
            faults.reach("image-written")
            if not (images.root / image).exists():  # else another import was quicker
                images.publish(directory, manifest)
                if forget_files:
                    images.set_forget_files(image, forget_files)
    finally:
        if directory.exists():
            with contextlib.suppress(OSError):
                remove_tree(directory)


def check_disk(manifest: Manifest, disk_sha256: str) -> None:
    """Raises Damaged when the snapshot stands on another disk than the image's."""
    if manifest.files[FILES[0]].sha256 != disk_sha256:
        raise Damaged(f"the snapshot's disk stands on another disk than that of image {manifest.image_id}")


def _file(reader: tape.Reader, path: Path, manifest: Manifest, advance: Callable[[int], None]) -> None:
    entry = manifest.files[path.name]
    digest = hashlib.sha256()
    decompressor = zstandard.ZstdDecompressor()
    with path.open("xb") as file:
        for number, at in enumerate(range(0, entry.size_bytes, PART_BYTES)):
            length = min(PART_BYTES, entry.size_bytes - at)
            stored = reader.content(_part(path.name, number), _MOST_STORED)
            try:
                if zstandard.frame_content_size(stored) != length:  # zstandard allocates what the frame says
                    raise Damaged(f"{path.name} of the image in this export is damaged: a part has a wrong length")
                part = decompressor.decompress(stored, max_output_size=length)
            except zstandard.ZstdError as error:
                raise Damaged(f"{path.name} of the image in this export is damaged: {error}") from error
            digest.update(part)
            _write(file.fileno(), part)
            advance(length)
        os.ftruncate(file.fileno(), entry.size_bytes)
    path.chmod(0o444)
    if digest.hexdigest() != entry.sha256:
        raise Damaged(f"{path.name} of the image in this export is damaged: its content has another hash")


def _write(fd: int, part: bytes) -> None:
    for at in range(0, len(part), len(_HOLE)):
        piece = part[at : at + len(_HOLE)]
        if piece == _HOLE:
            os.lseek(fd, len(piece), os.SEEK_CUR)
        else:
            durable.write_all(fd, [piece])
