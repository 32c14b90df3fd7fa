"""Network namespaces with a name, as iproute2 has them: a file below /run/netns on which the namespace is mounted.

A thread that is inside one must come back: whatever runs in that thread next would be in the wrong network. So only
worker threads go in, never the event loop's, and `inside` is the only way.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from forkypig.errors import InternalError

DIRECTORY = Path("/run/netns")

CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000
MNT_DETACH = 2
SIOCGSKNS = 0x894C  # linux/sockios.h: the namespace of a socket

_libc = ctypes.CDLL(None, use_errno=True)  # os.setns and os.unshare came with Python 3.12


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _current() -> int:
    # thread-self, not self: that one is the namespace of the process's first thread.
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise InternalError("an event loop's thread was about to enter another network namespace")
    before = _current()
    try:
        yield
    finally:
        try:
            _call("setns", before, CLONE_NEWNET)
        finally:
            os.close(before)


@contextlib.contextmanager
def inside(path: Path) -> Iterator[None]:
    """This thread, and what it starts, are in the namespace until the block ends. FileNotFoundError if it is gone."""
    target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _returning():
            _call("setns", target, CLONE_NEWNET)
            yield
    finally:
        os.close(target)


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """This thread is in a new namespace without a name, which ends with the block."""
    with _returning():
        _call("unshare", CLONE_NEWNET)
        yield


def create(path: Path) -> None:
    """Makes a namespace and mounts it at `path`. FileExistsError if something is there."""
    _share_directory()
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        with scratch():
            _mount(Path("/proc/thread-self/ns/net"), path)
    except BaseException:
        path.unlink()
        raise


def name_again(path: Path, fd: int) -> None:
    """Mounts a namespace, of which a socket is still open, under its name again."""
    namespace = fcntl.ioctl(fd, SIOCGSKNS)
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        _mount(Path(f"/proc/thread-self/fd/{namespace}"), path)
    finally:
        os.close(namespace)


def identity(path: Path) -> int:
    """A number that only this namespace has, among those that are alive. FileNotFoundError if it is gone."""
    status = path.stat()
    # An unmounted name is a plain file on the tmpfs of /run; a namespace's file has no block device of a disk behind.
    if status.st_dev == path.parent.stat().st_dev:
        raise FileNotFoundError(f"{path} is no namespace")
    return status.st_ino


def identity_of_socket(fd: int) -> int:
    """The same, of the namespace in which a socket was made."""
    namespace = fcntl.ioctl(fd, SIOCGSKNS)
    try:
        return os.fstat(namespace).st_ino
    finally:
        os.close(namespace)


def remove(path: Path) -> None:
    """Takes a namespace's name away; the kernel removes it when its last process and socket have gone."""
    with contextlib.suppress(OSError):  # EINVAL: not mounted; ENOENT: gone
        _call("umount2", os.fsencode(path), MNT_DETACH)
    path.unlink(missing_ok=True)


def names() -> list[str]:
    """The names of all namespaces of the host, whoever made them."""
    try:
        return sorted(entry.name for entry in DIRECTORY.iterdir())
    except FileNotFoundError:
        return []


def _mount(source: Path, target: Path) -> None:
    _call("mount", os.fsencode(source), os.fsencode(target), b"none", MS_BIND, None)


def _share_directory() -> None:
    """Makes /run/netns as `ip netns add` does: shared, so that an unmount reaches other mount namespaces too."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    for _ in range(2):
        try:
            _call("mount", b"", os.fsencode(DIRECTORY), b"none", MS_SHARED | MS_REC, None)
        except OSError:
            _call("mount", os.fsencode(DIRECTORY), os.fsencode(DIRECTORY), b"none", MS_BIND | MS_REC, None)
        else:
            return
