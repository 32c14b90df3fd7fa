"""The store's key in memory, handed from process to process of the pager: machines must not die of a file that is gone.

The first keeper reads the file that FORKY_STORE_KEY names, once. From then on the variable names a descriptor of a
sealed memfd, which each process inherits with its number; so the key itself is in no environment and no command line.
"""

import fcntl
import os
from pathlib import Path

from forkypig.chunks.store import KEY_VARIABLE

_DESCRIPTORS = "/proc/self/fd/"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def keep() -> None:
    """Puts the key of this process's environment into memory. What can't be read stays as it is: who opens the store
    says what is wrong."""
    path = os.environ.get(KEY_VARIABLE, "")
    if not path or descriptors():
        return
    try:
        secret = Path(path).read_bytes()
    except OSError:
        return
    fd = os.memfd_create("store-key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o400)
    os.write(fd, secret)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    take(fd)


def take(fd: int) -> None:
    """This descriptor is the key from now on, for this process and those that it starts."""
    os.environ[KEY_VARIABLE] = f"{_DESCRIPTORS}{fd}"


def descriptors() -> tuple[int, ...]:
    """What a process inherits that opens the store: the key's descriptor, if there is one."""
    path = os.environ.get(KEY_VARIABLE, "")
    return (int(path.removeprefix(_DESCRIPTORS)),) if path.startswith(_DESCRIPTORS) else ()
