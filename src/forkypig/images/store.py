"""The images of a host: directories `<image id>/` below one root, each complete or not there at all.

A directory appears by a rename when everything in it is written, and goes by a rename before anything in it is
deleted. Names that begin with a dot are builds and removals under way.
"""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forkypig.errors import InternalError, InvalidRequest, NotFound, NotPossibleNow, ResourceExhausted
from forkypig.images.manifest import (
    DISK,
    INITRD,
    KERNEL,
    MANIFEST,
    DamagedManifest,
    Manifest,
    hash_file,
    read_manifest,
)
from forkypig.model import Image, ImageId
from forkypig.model.ids import is_id

SETTINGS = "settings.json"  # what can be changed after the build
BUILDING, REMOVING = ".building-", ".removing-"


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """What a machine boots from. `kernel` is for QEMU's -kernel."""

    disk: Path
    disk_format: str
    kernel: Path
    initrd: Path
    cmdline: str


class ImageStore:
    """The images below one directory, which is made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def list(self) -> Sequence[Image]:
        """All complete images, oldest first."""
        return [self._image(manifest) for manifest in self.manifests()]

    def _image(self, manifest: Manifest) -> Image:
        return replace(manifest.image(), forget_files=self.forget_files(manifest.image_id))

    def forget_files(self, image: ImageId) -> tuple[str, ...]:
        """The files that forks of the image's machines don't have. Raises InvalidRequest when that can't be read: a
        secret must not stay because of it."""
        try:
            return tuple(str(path) for path in json.loads((self.root / image / SETTINGS).read_bytes())["forget_files"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"the settings of image {image} can't be read ({error!r}): set them anew with forky image set"
            ) from error

    def set_forget_files(self, image: ImageId, paths: Sequence[str]) -> Image:
        """Changes them. The settings are no part of what the image's id names."""
        manifest = self.manifest(image)
        new = self.root / image / f"{SETTINGS}.new"
        new.write_text(json.dumps({"forget_files": list(paths)}) + "\n")
        new.replace(self.root / image / SETTINGS)
        return self._image(manifest)

    def manifests(self) -> Sequence[Manifest]:
        """The manifests of all complete images, oldest first."""
        try:
            directories = [path for path in self.root.iterdir() if is_id(path.name)]
        except FileNotFoundError:
            return []
        found = []
        for directory in directories:
            try:
                found.append(read_manifest(directory))
            except DamagedManifest:
                continue  # not an image: `get` by its id says so
        return sorted(found, key=lambda manifest: (manifest.created_us, manifest.image_id))

    def get(self, ref: str) -> Image:
        """The image with this id, or the newest one with this name; NotFound when there is none."""
        if is_id(ref):
            return self._image(self.manifest(ImageId(ref)))
        for manifest in reversed(self.manifests()):
            if manifest.name == ref:
                return self._image(manifest)
        raise NotFound("image", ref[:80], "`forky image ls` lists what there is, `forky image build` makes the default")

    def files(self, image: ImageId) -> ImageFiles:
        """Where an image's files are; NotFound."""
        manifest, directory = self.manifest(image), self.root / image
        return ImageFiles(
            disk=directory / DISK,
            disk_format=manifest.disk_format,
            kernel=directory / KERNEL,
            initrd=directory / INITRD,
            cmdline=manifest.cmdline,
        )

    def manifest(self, image: ImageId) -> Manifest:
        """An image's manifest; NotFound, or InvalidRequest when its manifest is damaged."""
        if not is_id(image) or not (self.root / image).is_dir():
            raise NotFound("image", image[:80], "`forky image ls` lists what there is")
        try:
            return read_manifest(self.root / image)
        except DamagedManifest as error:
            raise InvalidRequest(f"image {image} is damaged ({error}): remove it and build it again") from error

    def check_sizes(self, image: ImageId) -> None:
        """Raises InvalidRequest when a file of the image is missing or has another size than it was built with.
        Costs microseconds, where `verify` reads everything."""
        for name, entry in self.manifest(image).files.items():
            try:
                size = (self.root / image / name).stat().st_size
            except FileNotFoundError as error:
                raise _damaged(image, name, "it is missing") from error
            if size != entry.size_bytes:
                raise _damaged(image, name, f"it has {size} bytes and was built with {entry.size_bytes}")

    async def verify(self, image: ImageId) -> None:
        """Raises InvalidRequest, naming the file, when a file of the image is not what was built."""
        self.check_sizes(image)
        for name, entry in self.manifest(image).files.items():
            if await asyncio.to_thread(hash_file, self.root / image / name) != entry.sha256:
                raise _damaged(image, name, "its content has changed")

    def remove(self, image: ImageId) -> None:
        """Deletes an image, whole or damaged; NotFound. Machines and snapshots that stand on it lose their disk: the
        caller makes sure that there are none."""
        if not is_id(image) or not (self.root / image).is_dir():
            raise NotFound("image", image[:80], "`forky image ls` lists what there is")
        grave = self.root / f"{REMOVING}{secrets.token_hex(6)}"
        (self.root / image).rename(grave)
        with contextlib.suppress(FileNotFoundError):  # a build that clears left-overs may be deleting it too
            remove_tree(grave)

    def new_build(self) -> Path:
        """A fresh private directory for a build, on the file system that the images are on."""
        try:
            self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
            directory = self.root / f"{BUILDING}{secrets.token_hex(6)}"
            directory.mkdir(mode=0o700)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(f"the disk with {self.root} is full: free some space") from error
            raise NotPossibleNow(
                f"{self.root} can't be written ({error.strerror}): choose another FORKY_HOME"
            ) from error
        return directory

    def remove_leftovers(self) -> None:
        """Deletes what builds and removals that were killed left behind. Only with the build lock held."""
        if self.root.is_dir():
            for path in list(self.root.iterdir()):
                if path.name.startswith((BUILDING, REMOVING)):
                    with contextlib.suppress(FileNotFoundError):  # a removal in another process goes on
                        remove_tree(path)

    def publish(self, directory: Path, manifest: Manifest) -> Image:
        """Makes a finished build an image. Its files are on the disk before its name is."""
        (directory / MANIFEST).write_bytes(manifest.canonical())
        for name in (*manifest.files, MANIFEST):
            _sync(directory / name)
        _sync(directory)
        directory.chmod(0o755)
        try:
            directory.rename(self.root / manifest.image_id)
        except OSError as error:
            raise InternalError(f"image {manifest.image_id} could not be put in place: {error.strerror}") from error
        _sync(self.root)
        return manifest.image()


def remove_tree(directory: Path) -> None:
    """Deletes a tree, never through a mount: a build that was killed at the wrong moment could have left the host's
    /dev mounted below it."""
    prefix = f"{directory}/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(prefix):
            raise NotPossibleNow(f"{point} is a mount that a build left behind: unmount it and try again")
    shutil.rmtree(directory, ignore_errors=False)


def _damaged(image: ImageId, name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{name} of image {image} is damaged: {what}; remove the image and build it again")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
