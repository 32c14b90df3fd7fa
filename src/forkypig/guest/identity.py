"""Who a fork's child is to be, and how a greeting says it. The guest's side is the agent's; see docs/identity.md."""

import posixpath
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Literal

from forkypig.errors import InvalidRequest

_ENTROPY_BYTES = 64
# What names of variables and files may take together: a greeting is one unnumbered frame of 4 KiB.
_MAX_FORGET_BYTES = 3000
Tcp = Literal["reset", "silent", "keep"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a guest takes on before anyone may use it. Entropy and time are taken when it is sent."""

    hostname: str
    machine_id: str  # 32 hexadecimal digits
    boot_id: str = ""  # a UUID, as programs see it; empty: a fork gets a random one, a boot keeps the kernel's
    tcp: Tcp = "keep"  # "reset": inherited connections to others end at once; the other two leave them alone
    forget: tuple[str, ...] = ()  # environment variables whose values are wiped from memory
    forget_files: tuple[str, ...] = ()  # absolute paths that are overwritten and removed
    hooks: bool = True  # run the programs in /etc/forky/fork.d
    own: bool = False  # who it was before: it goes back or on, and keeps its machine id, boot id and SSH keys
    forked: bool = True  # False for a boot: SSH keys, leases and connections are its own, and no hooks run

    def check(self) -> None:
        """Raises InvalidRequest when the guest could not take it on."""
        if not self.hostname or any(c in self.hostname for c in "\n\0 "):
            raise InvalidRequest(f"«{self.hostname[:80]}» can't be a host name")
        if len(self.machine_id) != 32 or set(self.machine_id) - set("0123456789abcdef"):
            raise InvalidRequest("a machine id is 32 hexadecimal digits")
        if self.boot_id and not _is_uuid(self.boot_id):
            raise InvalidRequest(f"«{self.boot_id[:80]}» is no boot id: that is a UUID in small letters")
        for name in self.forget:
            if not name or "=" in name or "\0" in name:
                raise InvalidRequest(f"«{name[:80]}» can't be the name of an environment variable to forget")
        for path in self.forget_files:
            if not path.startswith("/") or "\0" in path or not posixpath.normpath(path).strip("/"):
                raise InvalidRequest(
                    f"«{path[:200]}» can't be forgotten: give the absolute path of a file or directory"
                )
        size = sum(len(item.encode()) + 1 for item in (*self.forget, *self.forget_files))
        if size > _MAX_FORGET_BYTES:
            raise InvalidRequest(
                f"the names of what is to be forgotten take {size} bytes and {_MAX_FORGET_BYTES} are possible: "
                f"name a directory instead of its files"
            )

    def fields(self, generation: str) -> list[tuple[str, str | bytes]]:
        """What a greeting says; the agent does only the steps that are named here. `generation`: 32 hex digits."""
        fields: list[tuple[str, str | bytes]] = [
            ("entropy", secrets.token_bytes(_ENTROPY_BYTES)),
            ("hostname", self.hostname),
            ("generation", generation),
            ("clock", str(time.time_ns())),
        ]
        if not self.own:
            fields.append(("machine-id", self.machine_id))
        if self.boot_id or (self.forked and not self.own):
            fields.append(("boot-id", self.boot_id or str(uuid.uuid4())))
        if self.forked:
            fields += [(step, "1") for step in (("neighbours",) if self.own else ("neighbours", "dhcp", "ssh"))]
            fields += [("tcp", "reset")] if self.tcp == "reset" else []
            fields += [("hooks", "1")] if self.hooks else []
        fields += [("forget", "\0".join(self.forget))] if self.forget else []
        fields += [("forget-files", "\0".join(self.forget_files))] if self.forget_files else []
        return fields


def _is_uuid(value: str) -> bool:
    try:
        return str(uuid.UUID(value)) == value
    except ValueError:
        return False
