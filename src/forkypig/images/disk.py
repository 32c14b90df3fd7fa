"""The disk of an image: a whole-disk ext4 in a sparse raw file, made from a directory without mounting anything.

Raw and not qcow2: the host's page cache then holds one copy for all machines, and a read is a read.
"""

from pathlib import Path

from forkypig.errors import InternalError
from forkypig.images import recipe
from forkypig.images.commands import run
from forkypig.images.manifest import DISK

_LIMIT_S = 300.0  # 2 s; more on a disk that is busy

# Blocks of 4 KiB and resize_inode, since small file systems get neither a layout nor room to grow to many GiB.
# assume_storage_prezeroed: the file is new, so its holes are zeros; nothing is written for them, here or in the
# background by a guest's kernel, into the overlay of a template.
_MKE2FS = (
    *("mke2fs", "-q", "-F", "-t", "ext4", "-T", "default", "-b", "4096", "-i", "16384", "-m", "0", "-L", "forky"),
    *("-J", "size=16", "-E", "assume_storage_prezeroed=1"),
)


async def make_disk(root: Path, directory: Path) -> Path:
    """Packs a root directory; the disk is in `directory` then. Runs as root, for the files' owners' sake."""
    used = await run("the image's files could not be counted", ["du", "-sxm", str(root)], deadline_s=_LIMIT_S)
    try:
        used_mib = int(used.split()[0])
    except (ValueError, IndexError) as error:
        raise InternalError(f"du said {used!r}") from error
    wanted = int(used_mib * recipe.DISK_RESERVE) + 2 * recipe.DISK_STEP_MIB
    size_mib = -(-wanted // recipe.DISK_STEP_MIB) * recipe.DISK_STEP_MIB
    disk = directory / DISK
    await run(
        "the disk could not be made",
        [*_MKE2FS, "-d", str(root), str(disk), f"{size_mib}M"],
        deadline_s=_LIMIT_S,
    )
    return disk
