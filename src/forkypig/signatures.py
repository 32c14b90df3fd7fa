"""Ed25519 signatures of exports: key files, signing, checking.

A secret key is a PKCS #8 PEM file that its owner alone may read, a public one a PEM file beside it, `.pub`; other tools
(openssl, ssh-keygen) read both. cryptography is imported when it is needed: it costs `forky --help` too much.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from forkypig.errors import AlreadyExists, Damaged, InvalidRequest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_BYTES, SIGNATURE_BYTES = 32, 64
# What is signed begins so: a signature of an export is one of nothing else.
_DOMAIN = b"forkypig export v1\n"
_MOST = 1 << 14


def create(path: Path) -> bytes:
    """Makes a pair of keys, `path` and `path`.pub, and returns the public one. Raises AlreadyExists, OSError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_name(path.name + ".pub")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for target, content, mode in ((path, secret, 0o600), (public_path, public, 0o644)):
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError as error:
            raise AlreadyExists("file", str(target)) from error
        with os.fdopen(fd, "wb") as file:
            file.write(content)
    return key.public_key().public_bytes_raw()


def sign(path: Path, content: bytes) -> bytes:
    """The public key and the signature, one after the other: 96 bytes. Raises InvalidRequest when the file is no secret
    key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{path} is not a secret key: make one with forky key create FILE") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest(f"{path} is a key of another kind than Ed25519: make one with forky key create FILE")
    return _signed(key, content)


def _signed(key: "Ed25519PrivateKey", content: bytes) -> bytes:
    return key.public_key().public_bytes_raw() + key.sign(_DOMAIN + content)


def load_public(path: Path) -> bytes:
    """The 32 bytes of a public key, from its file. Raises InvalidRequest."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{path} is not a public key: it is the file that ends in .pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest(f"{path} is a public key of another kind than Ed25519")
    return key.public_bytes_raw()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}") from error


def check(signed: bytes, content: bytes, trusted: bytes) -> None:
    """Raises InvalidRequest when `signed` (what `sign` made) is by another key than `trusted`, Damaged when it is by
    that key and of something else."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public, signature = signed[:KEY_BYTES], signed[KEY_BYTES:]
    if len(signature) != SIGNATURE_BYTES:
        raise Damaged("the signature of this export is damaged: it has another length")
    if public != trusted:
        raise InvalidRequest(
            f"this export is signed by another key ({public.hex()}) than the one that you trust ({trusted.hex()}): "
            f"nothing was imported"
        )
    try:
        Ed25519PublicKey.from_public_bytes(trusted).verify(signature, _DOMAIN + content)
    except InvalidSignature as error:
        raise Damaged(
            "this export was altered after it was signed: the signature does not fit; nothing was imported"
        ) from error
