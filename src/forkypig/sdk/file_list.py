"""The files of a machine as it is at one instant: listed from inside, so that what is not on the disk yet counts too,
and no file system of a guest is ever mounted by the host."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forkypig import errors
from forkypig.sdk.transfer import guest_path

if TYPE_CHECKING:
    from forkypig.sdk.machine import Machine

_LIST_TIMEOUT_S = 300.0
_FIELDS = 9

# Prints nine fields per file of the root file system, each ended by NUL. Standard library, any Python 3.
_LIST = r"""
import os, stat, sys
write, root = sys.stdout.buffer.write, os.lstat("/").st_dev
def tell(path, found):
    kind = stat.S_IFMT(found.st_mode)
    target = os.readlink(path) if kind == stat.S_IFLNK else b""
    values = (kind, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns,
              found.st_ctime_ns)
    write(b"\0".join([path, *(b"%d" % value for value in values), target, b""]))
def walk(directory):
    try:
        entries = list(os.scandir(directory))
    except OSError:
        return
    for entry in entries:
        try:
            found = entry.stat(follow_symlinks=False)
            if found.st_dev == root:
                tell(entry.path, found)
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_dev == root:
            walk(entry.path)
walk(b"/")
"""

# The same nine fields per entry of one directory, in the order of their names, at most as many as asked for.
_DIRECTORY = r"""
import os, stat, sys
directory, most = os.fsencode(sys.argv[1]), int(sys.argv[2])
try:
    names = sorted(os.listdir(directory))
except OSError as error:
    sys.exit(error.strerror)
for name in names[:most]:
    path = os.path.join(directory, name)
    try:
        found = os.lstat(path)
        target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else b""
    except OSError:
        continue
    values = (stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_size,
              found.st_mtime_ns, found.st_ctime_ns)
    sys.stdout.buffer.write(b"\0".join([path, *(b"%d" % value for value in values), target, b""]))
"""

# Reads paths, each ended by NUL; prints the SHA-256 of each, or "-" where it can't be read.
_HASH = r"""
import hashlib, sys
for path in sys.stdin.buffer.read().split(b"\0")[:-1]:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        print(digest.hexdigest())
    except OSError:
        print("-")
"""

_KINDS = {0o100000: "file", 0o040000: "directory", 0o120000: "link"}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as a machine has it."""

    kind: str  # "file", "directory", "link" or "special"
    mode: int  # permission bits
    uid: int
    gid: int
    size_bytes: int
    modified_ns: int  # since the Unix epoch, by the guest's clock
    changed_ns: int  # of content or of what is said here
    target: str = ""  # of a link

    def looks_like(self, other: "FileEntry") -> bool:
        """Whether all but the times agree; the content of files of one size may differ all the same."""
        return (self.kind, self.mode, self.uid, self.gid, self.target) == (
            *(other.kind, other.mode, other.uid, other.gid, other.target),
        ) and (self.kind == "directory" or self.size_bytes == other.size_bytes)


async def listed(machine: "Machine") -> dict[str, FileEntry]:
    """All files of the machine's root file system by path (bytes that are no UTF-8 as surrogates). Raises
    MachineFailed."""
    return dict(_entries(await _python(machine, _LIST)))


async def directory(machine: "Machine", path: str, most: int) -> dict[str, FileEntry]:
    """The entries of one directory of the machine by path, sorted; at most `most`. Raises InvalidRequest (no
    absolute path, no directory)."""
    path = guest_path(path)
    if not path.isprintable():
        raise errors.InvalidRequest(
            "the directory's name has characters that can't be printed: list its parent instead"
        )
    done = await machine.exec(["python3", "-c", _DIRECTORY, path, str(most)], timeout_s=_LIST_TIMEOUT_S)
    if done.exit_code != 0:
        words = done.failure or done.stderr.decode(errors="replace").strip()[-300:]
        raise errors.InvalidRequest(f"{machine.name}:{path} can't be listed: {words}")
    return dict(_entries(done.stdout))


async def hashes(machine: "Machine", paths: Sequence[str]) -> list[str]:
    """The SHA-256 of each file, in hex; "-" for one that can't be read."""
    if not paths:
        return []
    names = b"".join(path.encode(errors="surrogateescape") + b"\0" for path in paths)
    return (await _python(machine, _HASH, names)).decode().split()


def _entries(output: bytes) -> Iterator[tuple[str, FileEntry]]:
    fields = output.split(b"\0")[:-1]
    for at in range(0, len(fields) - _FIELDS + 1, _FIELDS):
        path, kind, mode, uid, gid, size, modified, changed, target = fields[at : at + _FIELDS]
        entry = FileEntry(
            kind=_KINDS.get(int(kind), "special"),
            mode=int(mode),
            uid=int(uid),
            gid=int(gid),
            size_bytes=int(size),
            modified_ns=int(modified),
            changed_ns=int(changed),
            target=target.decode(errors="surrogateescape"),
        )
        yield path.decode(errors="surrogateescape"), entry


async def _python(machine: "Machine", program: str, stdin: bytes = b"") -> bytes:
    done = await machine.exec(["python3", "-c", program], stdin=stdin, timeout_s=_LIST_TIMEOUT_S)
    if done.exit_code != 0:
        words = done.failure or done.stderr.decode(errors="replace").strip()[-300:]
        raise errors.MachineFailed(
            f"the files of machine «{machine.name}» could not be listed: {words} (it takes python3 in the machine)"
        )
    return done.stdout
