"""The kernel of an image, taken out of its Debian package without installing that: its modules are 400 MB.

The kernel is kept as the plain ELF file that Debian's vmlinuz carries inside, not as vmlinuz: a guest under TCG
spends 4 to 8 s on inflating the xz in it. QEMU starts an ELF kernel by its PVH note (QEMU's docs/pvh; Linux's
CONFIG_PVH). What that costs is KASLR, which the inflating stub does; machines forked from one template share their
kernel's addresses anyway.
"""

import errno
import lzma
import os
import re
import struct
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forkypig.errors import InternalError, ResourceExhausted

# Loaded by the initramfs, in this order: each after what it needs. crc32c is what ext4 asks the kernel's crypto for by
# name, which no dependency shows. The network card's is here because there is no udev to load it later.
BOOT_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_blk", "virtio_console", "failover", "net_failover", "virtio_net"),
    *("crc32c_generic", "crc32c-intel", "crc16", "mbcache", "jbd2", "ext4"),
)

# In /lib/modules, for modprobe and for the kernel's own requests: file systems, containers' networks, sharing, and the
# list of connections, by which a fork's child ends those that it inherited.
_MORE_MODULES = (
    *("virtio-rng", "virtio_balloon", "virtiofs", "fuse", "overlay", "loop", "squashfs", "isofs", "vfat"),
    *("nls_cp437", "nls_ascii", "nls_utf8"),
    *("tun", "veth", "bridge", "br_netfilter", "dummy", "macvlan", "vxlan", "wireguard"),
    *("nf_tables", "nf_conntrack", "nf_nat", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_compat"),
    *("nft_reject", "nft_reject_inet", "xt_MASQUERADE", "xt_conntrack", "xt_addrtype", "ip_tables", "iptable_nat"),
    *("iptable_filter", "ip6_tables", "9p", "9pnet_virtio", "vsock", "vmw_vsock_virtio_transport"),
    *("inet_diag", "tcp_diag", "udp_diag"),
)

_UNPACK_LIMIT_S = 300.0  # 6 s on an idle core
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_XZ_MAGIC = b"\xfd7zXZ\0"
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Kernel:
    """What was taken from a kernel package. `modules` have their path below /lib/modules/RELEASE as key."""

    release: str
    vmlinux: bytes
    modules: Mapping[str, bytes]
    metadata: Mapping[str, bytes]  # modules.builtin and the like, which depmod reads

    def boot_modules(self) -> dict[str, bytes]:
        """The modules of the initramfs in the order to load them."""
        by_name = {_module_name(path): content for path, content in self.modules.items()}
        return {name: by_name[_canonical(name)] for name in BOOT_MODULES}


def read_kernel(package: Path) -> Kernel:
    """Takes kernel and modules from a linux-image package. Blocks for some seconds; memory: about 200 MB for a
    while. Raises InternalError when the package is not what this recipe knows."""
    vmlinuz, release = b"", ""
    modules: dict[str, bytes] = {}
    metadata: dict[str, bytes] = {}
    depends: dict[str, list[str]] = {}
    wanted = _closure_candidates()
    for path, content in _package_files(package):
        if path.parent.as_posix() == "boot" and path.name.startswith("vmlinuz-"):
            vmlinuz, release = content, path.name.removeprefix("vmlinuz-")
        elif path.suffix == ".ko":
            name = _module_name(path.as_posix())
            depends[name] = _depends(content)
            if wanted.match(path.as_posix()):
                modules[PurePosixPath(*path.parts[3:]).as_posix()] = content
        elif path.name.startswith("modules.") and path.parts[:2] == ("lib", "modules"):
            metadata[path.name] = content
    if not vmlinuz or not modules:
        raise InternalError(f"{package.name} holds no kernel where Debian's packages have it")
    chosen = _closure(depends)
    kept = {path: content for path, content in modules.items() if _module_name(path) in chosen}
    missing = chosen - {_module_name(path) for path in kept} - _builtin(metadata)
    if missing:
        raise InternalError(f"{package.name} lacks the modules {', '.join(sorted(missing))}")
    return Kernel(release=release, vmlinux=inflate(vmlinuz), modules=kept, metadata=metadata)


def read_file(package: Path, name: str) -> bytes:
    """The program called `name` in a package's bin directory; InternalError when it has none."""
    for path, content in _package_files(package):
        if path.name == name and path.parent.name == "bin":
            return content
    raise InternalError(f"{package.name} has no {name}")


def _package_files(package: Path) -> Iterable[tuple[PurePosixPath, bytes]]:
    """The regular files of a package that may matter, as they come out of its archive."""
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parts[:1] in (("boot",), ("lib",), ("bin",), ("usr",)):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield path, file.read()
        process.stdout.read()
        if process.wait(_UNPACK_LIMIT_S) != 0:
            raise InternalError(f"{package.name} could not be unpacked")
    except tarfile.TarError as error:
        raise InternalError(f"{package.name} could not be unpacked: {error}") from error
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _canonical(name: str) -> str:
    """The kernel takes - and _ in a module's name for the same."""
    return name.replace("-", "_")


def _module_name(path: str) -> str:
    return _canonical(PurePosixPath(path).name.removesuffix(".ko"))


def _depends(module: bytes) -> list[str]:
    """The modules that a module's .modinfo section names. depmod reads the symbols instead; the build writes the same
    list from them."""
    found = _DEPENDS.search(module)
    return [_canonical(name) for name in found[1].decode().split(",") if name] if found else []


def _closure_candidates() -> re.Pattern[str]:
    """Where wanted modules and what they need lie: keeps four fifths of the package out of memory."""
    return re.compile(
        r"lib/modules/[^/]+/kernel/(?:crypto|lib|fs|net|arch/x86/crypto|drivers/(?:virtio|block|char|net/[^/]+\.ko"
        r"|net/(?:vxlan|wireguard)/|cdrom))"
    )


def _closure(depends: Mapping[str, list[str]]) -> set[str]:
    """The wanted modules and all that they need. A wanted one that the kernel does not have is left out, unless the
    boot needs it."""
    todo = [_canonical(name) for name in BOOT_MODULES]
    todo += [name for name in map(_canonical, _MORE_MODULES) if name in depends]
    chosen: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in chosen:
            chosen.add(name)
            todo += depends.get(name, [])
    return chosen


def _builtin(metadata: Mapping[str, bytes]) -> set[str]:
    return {_module_name(line) for line in metadata.get("modules.builtin", b"").decode().split()}


def inflate(vmlinuz: bytes) -> bytes:
    """The ELF kernel inside a bzImage. The header's fields: Linux's Documentation/arch/x86/boot.rst, payload_offset and
    payload_length, protocol 2.08. Raises InternalError when it is not there."""
    if len(vmlinuz) < 0x260 or vmlinuz[0x202:0x206] != b"HdrS":
        raise InternalError("the kernel is not a bzImage")
    protected_mode = ((vmlinuz[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    payload = vmlinuz[protected_mode + offset :][:length]
    if not payload.startswith(_XZ_MAGIC):
        raise InternalError("the kernel is not compressed with xz, as Debian 12's is")
    try:
        kernel = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)  # what follows the stream is its length
    except lzma.LZMAError as error:
        raise InternalError(f"the kernel can't be inflated: {error}") from error
    if not kernel.startswith(b"\x7fELF"):
        raise InternalError("the kernel inside the bzImage is no ELF file")
    return kernel


def write_sparse(path: Path, content: bytes) -> None:
    """Writes a file with holes for its zeros: a third of an ELF kernel is .bss and padding."""
    try:
        with path.open("wb") as file:
            for start in range(0, len(content), _PAGE):
                page = content[start : start + _PAGE]
                if page.count(0) == len(page):
                    file.seek(len(page), os.SEEK_CUR)
                else:
                    file.write(page)
            file.truncate(len(content))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(f"the disk with {path.parent} is full: free some space") from error
        raise
