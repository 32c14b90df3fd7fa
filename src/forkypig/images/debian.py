"""Building the default image, Debian 12: mmdebstrap makes a root directory, the kernel comes out of its package, and
mke2fs packs the disk. 45 s on two cores beside a mirror.

A build happens in a directory of its own and becomes an image by one rename. One builds at a time on a store.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from forkypig.errors import Busy, InvalidRequest, NotPossibleNow, ResourceExhausted
from forkypig.images import apt, kernel, recipe, root
from forkypig.images.disk import make_disk
from forkypig.images.initramfs import build_initramfs
from forkypig.images.manifest import DISK, FILES, INITRD, KERNEL, FileEntry, Manifest, hash_file, stored_bytes
from forkypig.images.steps import Steps
from forkypig.images.store import ImageStore, remove_tree
from forkypig.model import Image, Progress, check_name

_TOOLS = {  # program: Debian's and Ubuntu's package
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "chroot": "coreutils",
}
_SPACE_BYTES = 1200 << 20  # 310 MB of root with apt's files, 70 MB of kernel package, 240 MB of image, and air
_LOCK = ".build.lock"
_LOCK_LIMIT_S = 3600.0
_LOCK_POLL_S = 0.5

_Result = TypeVar("_Result")


async def build_default(
    store: ImageStore, name: str = "debian-12", *, rebuild: bool = False, progress: Callable[[Progress], None]
) -> Image:
    """The default image under this name: the one that is there when it was made by the same recipe and its files are
    as long as they were, else a new one. With `rebuild` always a new one; an old one stays until it is removed.

    `progress` is called in this event loop, with `done` of `total` 100. Raises NotPossibleNow (a tool is missing, not
    root, the mirror can't be reached, a package fails), ResourceExhausted (disk full), Busy (another build takes an
    hour), InvalidRequest (the name).
    """
    check_name("image", name)
    agent = recipe.agent_source()
    if not rebuild and (present := _present(store, name, agent)) is not None:
        return present
    _check_host(store)
    steps = Steps(progress)
    async with _build_lock(store, steps):
        # Another process may have built it while we waited.
        if not rebuild and (present := _present(store, name, agent)) is not None:
            return present
        await _in_thread(store.remove_leftovers)
        if shutil.disk_usage(store.root).free < _SPACE_BYTES:
            raise ResourceExhausted(
                f"building the image «{name}» takes {_SPACE_BYTES >> 20} MiB for a while, and {store.root} has less"
            )
        directory = store.new_build()
        try:
            return await _build(store, directory, name, agent, steps)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(f"the disk with {store.root} is full: free some space") from error
            raise
        finally:
            if directory.exists():
                await _in_thread(lambda: remove_tree(directory))


def _present(store: ImageStore, name: str, agent: bytes) -> Image | None:
    """The newest image of this name and recipe whose files have the right sizes."""
    digest = recipe.digest(agent)
    for manifest in reversed(store.manifests()):
        if manifest.name == name and manifest.recipe == digest:
            with contextlib.suppress(InvalidRequest):
                store.check_sizes(manifest.image_id)
                return manifest.image()
    return None


def _check_host(store: ImageStore) -> None:
    if os.geteuid() != 0:
        raise NotPossibleNow("building an image needs root: run the daemons as root, or with sudo")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    missing = [package for program, package in _TOOLS.items() if shutil.which(program, path=path) is None]
    if not recipe.KEYRING.exists():
        missing.append("debian-archive-keyring")
    if missing:
        raise NotPossibleNow(
            f"building an image needs {', '.join(missing)}: install them with apt-get install {' '.join(missing)}"
        )
    if any(character in str(store.root) for character in " \"'\\\n"):
        raise NotPossibleNow(f"{store.root} has a space or a quote in it, which mmdebstrap can't take: use another")


async def _build(store: ImageStore, directory: Path, name: str, agent: bytes, steps: Steps) -> Image:
    tree = directory / "root"
    await apt.install_root(tree, steps.on_line)
    steps.reach("downloading the kernel")
    kernel_package, busybox_package = await apt.fetch(tree, directory)
    steps.reach("unpacking the kernel")
    linux = await _in_thread(lambda: kernel.read_kernel(kernel_package))
    busybox = await _in_thread(lambda: kernel.read_file(busybox_package, "busybox"))
    await _in_thread(lambda: kernel.write_sparse(directory / KERNEL, linux.vmlinux))
    initrd = build_initramfs(busybox, linux.boot_modules(), recipe.INIT)
    await _in_thread(lambda: (directory / INITRD).write_bytes(initrd))
    steps.reach("finishing the files")
    await _in_thread(lambda: root.slim(tree))
    await root.furnish(tree, linux, agent)
    packages = root.installed_packages(tree)
    steps.reach("making the disk")
    await make_disk(tree, directory)
    steps.reach("checking")
    manifest = Manifest(
        name=name,
        description="Debian 12 with Python 3, by mmdebstrap",
        recipe=recipe.digest(agent),
        disk_format="raw",
        cmdline=recipe.CMDLINE,
        kernel_release=linux.release,
        stored_bytes=sum(stored_bytes(directory / file) for file in FILES),
        created_us=time.time_ns() // 1000,
        files=await _in_thread(lambda: _entries(directory)),
        packages=packages,
    )
    await _in_thread(lambda: _leave_only_files(directory))
    image = await _in_thread(lambda: store.publish(directory, manifest))
    steps.reach("done")
    return image


def _leave_only_files(directory: Path) -> None:
    for path in list(directory.iterdir()):
        if path.is_dir():
            remove_tree(path)
        elif path.name not in FILES:
            path.unlink()


def _entries(directory: Path) -> dict[str, FileEntry]:
    for name in (DISK, KERNEL, INITRD):
        (directory / name).chmod(0o444)  # shared by all machines for ever
    return {
        name: FileEntry(size_bytes=(directory / name).stat().st_size, sha256=hash_file(directory / name))
        for name in FILES
    }


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Runs blocking work, and lets it end before a cancellation goes on: nothing may write into the build's directory
    while that is being deleted. Each piece takes seconds."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


@contextlib.asynccontextmanager
async def _build_lock(store: ImageStore, steps: Steps) -> AsyncIterator[None]:
    """One build at a time, over all processes; the kernel drops the lock of one that dies."""
    store.root.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor = os.open(store.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_LIMIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Busy("the image store", "building") from error
            steps.waiting("waiting for another build")
            await asyncio.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
