"""Ids and names: how they are made and what they may look like.

Ids become parts of paths and of QEMU command lines, so whatever enters from outside goes through a check here.
"""

import re
import secrets
from typing import NewType

from forkypig.errors import InvalidRequest

MachineId = NewType("MachineId", str)
SnapshotId = NewType("SnapshotId", str)
ImageId = NewType("ImageId", str)
PoolId = NewType("PoolId", str)

MOST_MESSAGE = 4000  # characters: a commit message, not a document

_ID = re.compile(r"[msip]-[0-9a-f]{12}")
_PREFIX = re.compile(r"s-[0-9a-f]{1,12}|[0-9a-f]{4,12}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def new_machine_id() -> MachineId:
    """A fresh id: "m-" and 48 random bits in hex."""
    return MachineId(f"m-{secrets.token_hex(6)}")


def new_snapshot_id() -> SnapshotId:
    """A fresh id: "s-" and 48 random bits in hex."""
    return SnapshotId(f"s-{secrets.token_hex(6)}")


def new_pool_id() -> PoolId:
    """A fresh id: "p-" and 48 random bits in hex."""
    return PoolId(f"p-{secrets.token_hex(6)}")


def check_id(text: str) -> str:
    """Returns `text` when it has the form of an id; raises InvalidRequest when not."""
    if not _ID.fullmatch(text):
        raise InvalidRequest(f"«{text[:80]}» is not an id: ids look like m-0123456789ab")
    return text


def is_id(text: str) -> bool:
    """Whether `text` has the form of an id."""
    return _ID.fullmatch(text) is not None


def snapshot_prefix(text: str) -> str:
    """The beginning of a snapshot's id that `text` may stand for: "s-3f", or "3f2a" without its letter; "" for none."""
    if not _PREFIX.fullmatch(text):
        return ""
    return text if text.startswith("s-") else f"s-{text}"


def check_message(message: str) -> str:
    """Returns `message` when a snapshot can carry it; raises InvalidRequest when it is too long or no text."""
    if len(message) > MOST_MESSAGE or any(ord(c) < 32 and c not in "\n\t" for c in message):
        raise InvalidRequest(f"a message is text of at most {MOST_MESSAGE} characters: shorten it")
    return message


def check_name(kind: str, name: str) -> str:
    """Returns `name` when a machine, a tag or an image may be called so (an RFC 1123 label that is not
    an id); raises InvalidRequest when not. `kind` is for the message."""
    if not _NAME.fullmatch(name) or is_id(name):
        article = "an" if kind[0] in "aeiou" else "a"
        raise InvalidRequest(
            f"«{name[:80]}» can't be {article} {kind} name: use 1 to 63 of a-z, 0-9 and -, "
            "with a letter or digit at both ends"
        )
    return name
