"""Encryption at rest: AES-256-GCM per chunk, addresses by keyed BLAKE3, so that the store tells nobody what it holds.

One secret of 32 bytes, in a file; all keys are derived from it by BLAKE3's key derivation. Each pack has a key of its
own, from a random salt in its header, and within a pack the nonce is the chunk's position: no nonce is ever used
twice. The chunk's address is authenticated with it, so that chunks can't be exchanged for one another.
"""

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from forkypig.errors import Damaged, InvalidRequest

SECRET_BYTES = 32
KEY_ID_BYTES = 8
SALT_BYTES = 32
TAG_BYTES = 16
NO_KEY_ID = bytes(KEY_ID_BYTES)

_ID = "forkypig chunks v1: key id"
_ADDRESS = "forkypig chunks v1: addresses"
_PACK = "forkypig chunks v1: key of a pack"


@dataclass(frozen=True, slots=True)
class Key:
    """The secret of an encrypted store."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Raises InvalidRequest for a secret of another length."""
        if len(self.secret) != SECRET_BYTES:
            raise InvalidRequest(f"a key of a store has {SECRET_BYTES} bytes, and this one has {len(self.secret)}")

    @property
    def id(self) -> bytes:
        """8 bytes that name the key and tell nothing about it."""
        return blake3(self.secret, derive_key_context=_ID).digest(KEY_ID_BYTES)

    @property
    def address_key(self) -> bytes:
        """What the hashes are keyed with."""
        return blake3(self.secret, derive_key_context=_ADDRESS).digest()

    def pack_cipher(self, salt: bytes) -> "PackCipher":
        """For the chunks of the pack with this salt in its header."""
        return PackCipher(blake3(self.secret + salt, derive_key_context=_PACK).digest())

    @classmethod
    def load(cls, path: Path) -> "Key":
        """From a file with 64 hex digits. Raises InvalidRequest when it is not one or can't be read."""
        try:
            words = path.read_bytes()[:1024].decode("ascii").strip()
            return cls(bytes.fromhex(words))
        except OSError as error:
            raise InvalidRequest(f"the store's key in {path} can't be read: {error.strerror}") from error
        except ValueError as error:
            raise InvalidRequest(f"{path} is not a key of a store: 64 hex digits are expected") from error

    @classmethod
    def create(cls, path: Path) -> "Key":
        """A fresh one, in a new file that only its owner may read. Raises FileExistsError, never overwrites."""
        key = cls(secrets.token_bytes(SECRET_BYTES))
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(key.secret.hex() + "\n")
        return key


class PackCipher:
    """Seals and opens the chunks of one pack."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, position: int, address: bytes, stored: bytes) -> bytes:
        """The chunk at a position, encrypted; 16 bytes longer."""
        return self._cipher.encrypt(position.to_bytes(12, "little"), stored, address)

    def open(self, position: int, address: bytes, sealed: bytes) -> bytes:
        """What was sealed. Raises Damaged when it was altered."""
        try:
            return self._cipher.decrypt(position.to_bytes(12, "little"), sealed, address)
        except InvalidTag as error:
            raise Damaged(f"chunk {address.hex()} was altered: it does not open with the store's key") from error
