"""The initramfs: a static busybox, the modules that reach the disk, and a script that switches to the real root.

It is left uncompressed. A guest under TCG inflates some ten megabytes a second, and QEMU hands the archive over by
DMA, so a compressed one would be smaller and later.
The archive format is "newc" of cpio(5), the one the kernel takes (Documentation/driver-api/early-userspace).
"""

import io
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_APPLETS = ("sh", "insmod", "mkdir", "mount", "switch_root")

# The file systems are mounted here and not by init: busybox's mount costs a fraction of util-linux's.
_INIT = """\
#!/bin/sh
mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
for module in {modules}; do insmod /modules/$module.ko; done
mount -t ext4 -o rw,noatime /dev/vda /root || {{ echo "forky: the root disk could not be mounted"; exit 1; }}
mount -t proc -o nosuid,nodev,noexec proc /root/proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /root/sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /root/sys/fs/cgroup
mount -o move /dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o nosuid,noexec,mode=0620,gid=5,ptmxmode=0666 devpts /root/dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /root/dev/shm
mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs /root/run
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /root/tmp
exec switch_root /root {init} </root/dev/console >/root/dev/console 2>&1
"""


@dataclass
class CpioArchive:
    """A newc archive in memory. Everything belongs to root and has the time 0, so equal content gives equal bytes."""

    _out: io.BytesIO = field(default_factory=io.BytesIO)
    _inode: int = 0

    def directory(self, path: str) -> None:
        """Adds a directory, mode 0755."""
        self._entry(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Adds a file."""
        self._entry(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Adds a character device."""
        self._entry(path, stat.S_IFCHR | mode, b"", (major, minor))

    def finish(self) -> bytes:
        """The whole archive, padded to 512 bytes as cpio does."""
        self._entry("TRAILER!!!", 0, b"")
        self._pad(512)
        return self._out.getvalue()

    def _entry(self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
        self._out.write(b"070701" + b"".join(b"%08x" % value for value in fields) + name)
        self._pad(4)
        self._out.write(content)
        self._pad(4)

    def _pad(self, alignment: int) -> None:
        self._out.write(b"\0" * (-self._out.tell() % alignment))


def build_initramfs(busybox: bytes, modules: Mapping[str, bytes], init: Sequence[str]) -> bytes:
    """The archive: `modules` are loaded in their order, then `init` (an argument list of plain words) is run on the
    root disk, as process 1."""
    archive = CpioArchive()
    for directory in ("bin", "dev", "modules", "root"):
        archive.directory(directory)
    # Without it the script has no output until devtmpfs is there.
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in _APPLETS:
        archive.symlink(f"bin/{applet}", "busybox")
    for name, content in modules.items():
        archive.file(f"modules/{name}.ko", content)
    script = _INIT.format(modules=" ".join(modules), init=" ".join(init))
    archive.file("init", script.encode(), 0o755)
    return archive.finish()
