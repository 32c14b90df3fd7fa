"""Making the image's root directory out of a fresh Debian one: slimmer, with the modules, the agent and an init."""

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from forkypig.errors import InternalError
from forkypig.images import recipe
from forkypig.images.commands import run
from forkypig.images.kernel import Kernel

_CHROOT_LIMIT_S = 120.0

_INIT_WRAPPER = f"#!/bin/sh\nexec {' '.join(recipe.INIT)}\n"
# Python says where it is by its magic number alone when it runs a .pyc, so no time stamps matter.
_COMPILE = (
    "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], sys.argv[1], doraise=True, "
    "invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
)
_RELEASE_FILES = {
    "etc/hostname": "forky\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
    "etc/fstab": "# The initramfs mounts what there is.\n",
    "etc/machine-id": "",  # the agent writes one into every machine
}


def slim(root: Path) -> None:
    """Deletes what a build left and what machines that live for minutes have no use for. Blocks for a second."""
    for name in recipe.UNWANTED:
        _empty(root / name)
    for directory, _, names in os.walk(root / "usr/share/doc"):
        for name in names:
            if name != "copyright":
                (Path(directory) / name).unlink()
    for name in ("var/cache/apt", "var/lib/apt/lists", "var/log", "tmp"):
        _empty(root / name)
    for name in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial", "var/log/apt"):
        (root / name).mkdir(parents=True)
    (root / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)  # the host's options, its proxy among them
    (root / "etc/resolv.conf").unlink(missing_ok=True)


def _empty(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()


async def furnish(root: Path, kernel: Kernel, agent: bytes) -> None:
    """Adds the modules, the agent (compiled by the image's own Python) and the init. Runs as root."""
    await asyncio.to_thread(_write, root, kernel, agent)
    await run(
        "the modules could not be listed",
        ["chroot", str(root), "depmod", kernel.release],
        deadline_s=_CHROOT_LIMIT_S,
    )
    await run(
        "the agent could not be compiled",
        ["chroot", str(root), recipe.INIT[0], "-I", "-S", "-B", "-c", _COMPILE, recipe.AGENT_SOURCE, recipe.AGENT],
        deadline_s=_CHROOT_LIMIT_S,
    )


def _write(root: Path, kernel: Kernel, agent: bytes) -> None:
    modules = root / "lib/modules" / kernel.release
    for path, content in {**kernel.metadata, **kernel.modules}.items():
        _put(modules / path, content)
    _put(root / recipe.AGENT_SOURCE.lstrip("/"), agent)
    init = root / "sbin/init"
    if init.is_symlink() or init.exists():
        raise InternalError("a package of the image brought an init of its own: change the recipe")
    _put(init, _INIT_WRAPPER.encode())
    init.chmod(0o755)
    for name, text in _RELEASE_FILES.items():
        _put(root / name, text.encode())


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def installed_packages(root: Path) -> tuple[str, ...]:
    """ "name=version" of every package in a root, sorted."""
    found, name = [], ""
    for line in (root / "var/lib/dpkg/status").read_text().splitlines():
        if line.startswith("Package: "):
            name = line.removeprefix("Package: ")
        elif line.startswith("Version: "):
            found.append(f"{name}={line.removeprefix('Version: ')}")
    return tuple(sorted(found))
