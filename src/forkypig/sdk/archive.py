"""Files and trees as tar streams, both ways, in constant memory.

What comes out of a machine is not trusted: the guest may be anybody's. tarfile's own `data` filter is missing from
the oldest Pythons that we run on and had holes in others, so unpacking is done here, with directories opened one
after another by O_NOFOLLOW: no entry can be written through a link, whatever it is called. Left out, and reported,
are links that lead out of the tree, devices, sockets and pipes; a name that leads out ends the whole copy.
"""

import errno
import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from forkypig.errors import InternalError, InvalidRequest, NotFound
from forkypig.sdk.whole_file import appearing

BLOCK_BYTES = 256 << 10
# A long name or a set of attributes is read into memory whole, and its size is what the guest says.
_LARGEST_HEADER_BYTES = 1 << 20

Advance = Callable[[int], None]  # told of bytes as they pass


@dataclass
class Unpacked:
    """What unpacking made. `left_out` names entries that were not made, each with the reason."""

    files: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)


class _CheckedInfo(tarfile.TarInfo):
    """Refuses extension headers that would fill our memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        kinds = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"X")
        if self.type in kinds and self.size > _LARGEST_HEADER_BYTES:
            raise InvalidRequest(f"the machine sent a file name of {self.size} bytes: nothing more was copied")
        made: Self = super()._proc_member(tar)  # type: ignore[misc]
        return made


def entries(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The entries of a tar stream, without keeping those that have passed. Raises TarError when it breaks off."""
    with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK_BYTES, tarinfo=_CheckedInfo) as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            yield tar, entry


def _parts(name: str) -> list[str]:
    """The components of an entry's name. Raises InvalidRequest when it is absolute or climbs."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or "\0" in name:
        raise InvalidRequest(f"the machine sent a file named «{name[:200]}», which leads out of the copy: refused")
    return parts


def _stays_inside(depth: int, link: str) -> bool:
    """Whether a symbolic link in a directory `depth` levels below the top's parent stays under the top.

    Steps up count only at the start: after a component that may itself be a link they go who knows where."""
    if link.startswith("/"):
        return False
    parts = [part for part in link.split("/") if part not in ("", ".")]
    up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return up < depth and ".." not in parts[up:]


class Unpacker:
    """Unpacks one tar stream whose entries all lie under one top entry, as `target`.

    `target` itself is the caller's own choice and followed if it is a link, like cp does; below it nothing is."""

    def __init__(self, target: Path, advance: Advance) -> None:
        self._target, self._advance = target, advance
        self._top: str | None = None
        self._directories: list[tuple[list[str], int, float]] = []  # modes and times are set last
        self.result = Unpacked()

    def unpack(self, stream: IO[bytes]) -> Unpacked:
        """Reads `stream` to its end. Raises InvalidRequest for a hostile one, TarError for one that breaks off,
        OSError (a full disk, no permission)."""
        for tar, entry in entries(stream):
            self._one(tar, entry)
        for parts, mode, mtime in reversed(self._directories):
            with self._directory(parts) as fd:
                os.utime(fd, (mtime, mtime))
                os.fchmod(fd, mode)
        if self._top is None:
            raise InternalError("the machine sent an empty archive: nothing was copied")
        return self.result

    def _one(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        parts = _parts(entry.name)
        if self._top is None:
            self._top = parts[0]
            if len(parts) == 1 and entry.isreg():
                self._write_top(tar, entry)
                return
        if parts[0] != self._top:
            raise InvalidRequest(f"the machine sent «{entry.name[:200]}» besides «{self._top}»: refused")
        below = parts[1:]
        if entry.isdir():
            self._make_directory(below, entry)
            return
        if not below:
            self.result.left_out.append(f"{entry.name}: neither a file nor a directory")
            return
        with self._directory(below[:-1]) as fd:
            self._make_entry(tar, entry, below, fd)

    def _make_entry(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, below: list[str], fd: int) -> None:
        """One entry that is not a directory, in the open directory `fd`."""
        if entry.isreg():
            self._refuse_directory(below[-1], fd)
            with appearing(below[-1], fd, 0o600) as file:
                self._fill(tar, entry, file)
        elif entry.issym() and _stays_inside(len(below), entry.linkname):
            self._remove(below[-1], fd)
            os.symlink(entry.linkname, below[-1], dir_fd=fd)
        elif entry.issym():
            self.result.left_out.append(f"{entry.name}: a link to {entry.linkname}, which is not part of the copy")
        elif entry.islnk():
            source = _parts(entry.linkname)
            if source[0] != self._top or len(source) < 2:
                raise InvalidRequest(f"the machine sent a link to «{entry.linkname[:200]}»: refused")
            self._remove(below[-1], fd)
            with self._directory(source[1:-1]) as source_fd:
                os.link(source[-1], below[-1], src_dir_fd=source_fd, dst_dir_fd=fd, follow_symlinks=False)
            self.result.files += 1
        else:
            self.result.left_out.append(f"{entry.name}: a device, socket or pipe")

    def _write_top(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        if self._target.is_dir():
            raise InvalidRequest(f"{self._target} is a directory and can't become a file: remove it first")
        target = Path(os.path.realpath(self._target))  # a link is written through, as cp does
        found = target.stat() if target.exists() else None
        if found is not None and not _may_be_replaced(target, found):
            with target.open("wb") as file:
                self._fill(tar, entry, file)
            return
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with _Open(directory), appearing(target.name, directory, 0o600) as file:
            if found is not None:
                with suppress(PermissionError):  # a group that we are not in
                    os.fchown(file.fileno(), found.st_uid, found.st_gid)
            self._fill(tar, entry, file)

    def _make_directory(self, below: list[str], entry: tarfile.TarInfo) -> None:
        if not below:
            if self._target.exists() and not self._target.is_dir():
                raise InvalidRequest(f"{self._target} is a file and can't become a directory: remove it first")
            self._target.mkdir(mode=0o700, exist_ok=True)
        else:
            with self._directory(below[:-1]) as fd, suppress(FileExistsError):
                os.mkdir(below[-1], 0o700, dir_fd=fd)
        self._directories.append((below, (entry.mode & 0o755) | 0o700, entry.mtime))

    def _directory(self, below: list[str]) -> "_Open":
        """The directory of these components under the target; links on the way are refused."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(self._target, flags)
        for part in below:
            try:
                following = os.open(part, flags | os.O_NOFOLLOW, dir_fd=fd)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise InvalidRequest(
                    f"«{'/'.join(below)}» in {self._target} passes through a link or a file: refused"
                ) from error
            finally:
                os.close(fd)
            fd = following
        return _Open(fd)

    def _refuse_directory(self, name: str, fd: int) -> None:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode):
                raise InvalidRequest(f"«{name}» in {self._target} is a directory and can't become a file")

    def _remove(self, name: str, fd: int) -> None:
        self._refuse_directory(name, fd)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=fd)

    def _fill(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, file: IO[bytes]) -> None:
        """Writes the entry's content to `file`."""
        copy_content(tar, entry, file, self._advance)
        file.flush()  # before its time is set
        # Without set-user-id, and never writable by others: the guest's numbers mean nothing here.
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), (entry.mode & 0o755) | 0o600)
            os.utime(file.fileno(), (entry.mtime, entry.mtime))
        self.result.files += 1
        self.result.bytes += entry.size


def _may_be_replaced(target: Path, found: os.stat_result) -> bool:
    """Whether another file may take the place of what is there. Else it is written into: a device or a pipe, somebody
    else's file, one that has other names too, and where nothing can be made beside it."""
    is_ours = os.geteuid() in (0, found.st_uid)
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and is_ours and os.access(target.parent, os.W_OK)


class _Open:
    """A directory's descriptor that closes itself."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def copy_content(tar: tarfile.TarFile, entry: tarfile.TarInfo, file: IO[bytes], advance: Advance) -> None:
    """The bytes of a file's entry into `file`."""
    source = tar.extractfile(entry)
    assert source is not None  # a regular file
    while block := source.read(BLOCK_BYTES):
        view = memoryview(block)
        while view:  # a raw file may write less than it was given
            view = view[file.write(view) :]
        advance(len(block))


def tree_bytes(source: Path) -> int:
    """How many bytes the files under `source` hold; for progress, so what can't be read counts nothing."""
    if not source.is_dir():
        return source.stat().st_size
    return sum(info.st_size for _, info in _walk(source) if stat.S_ISREG(info.st_mode))


def _walk(source: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """What lies below a directory, directories before their contents, links as links."""
    with os.scandir(source) as found:
        listed = sorted(found, key=lambda item: item.name)
    for item in listed:
        info = item.stat(follow_symlinks=False)
        yield Path(item.path), info
        if stat.S_ISDIR(info.st_mode):
            yield from _walk(Path(item.path))


def pack(source: Path, name: str, stream: IO[bytes], advance: Advance) -> None:
    """Writes `source`, a file or a tree, to `stream` as a tar archive whose top entry is `name`.

    Everything belongs to root in the archive; sockets are left out. Raises NotFound, OSError."""
    if not source.exists():
        raise NotFound("file", str(source))
    source = source.resolve()
    with tarfile.open(fileobj=stream, mode="w|", bufsize=BLOCK_BYTES, format=tarfile.PAX_FORMAT) as tar:
        _pack_one(tar, source, name, advance)
        if source.is_dir():
            for path, _ in _walk(source):
                _pack_one(tar, path, f"{name}/{path.relative_to(source)}", advance)
                tar.members.clear()  # type: ignore[attr-defined]


def _pack_one(tar: tarfile.TarFile, path: Path, name: str, advance: Advance) -> None:
    entry: Any = tar.gettarinfo(path, arcname=name)
    if entry is None:
        return  # a socket
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    if not entry.isreg():
        tar.addfile(entry)
        return
    with path.open("rb") as file:
        tar.addfile(entry, _Counted(file, advance))


class _Counted:
    """A file that tells how much was read of it."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file, self._advance = file, advance

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data


def pack_file(source: IO[bytes], name: str, size: int, mode: int, stream: IO[bytes], advance: Advance) -> None:
    """Writes one entry `name` of `size` bytes read from `source`."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, mode, int(time.time())
    with tarfile.open(fileobj=stream, mode="w|", bufsize=BLOCK_BYTES, format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry, _Counted(source, advance))
