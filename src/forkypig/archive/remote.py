"""An object store or a directory that snapshots are pushed to: `file:` and `s3:` (and what is compatible), by obstore.

    forkypig.json                    the format
    indexes/<name>.index             what a pack holds; written after its pack
    packs/<name>.pack                chunks, in the store's own format
    images/<image>.tar               an image, as in exports
    manifests/<snapshot>.manifest    written when all that it names is there
    snapshots/<snapshot>.json        the head, last: from then on the snapshot is there
    tags/<tag>                       a snapshot's id

Nothing is ever changed or removed but tags, so that pushers need not know of one another.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from forkypig.chunks import durable
from forkypig.errors import Damaged, HostUnreachable, InvalidRequest, NotFound, ResourceExhausted

if TYPE_CHECKING:
    from obstore.store import ObjectStore

FORMAT = 1
_MARK = "forkypig.json"
_MARK_MOST = 1 << 12
_PART_BYTES = 8 << 20
# A store that does not answer within these is not there; S3's own SDKs wait as long.
_CONNECT = timedelta(seconds=10)
_REQUEST = timedelta(seconds=120)
_RETRY: Any = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}
# Of the environment of whoever pushes: AWS's own names, which all S3 tools read.
VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_SKIP_SIGNATURE",
)


class Remote:
    """One place. Every method raises HostUnreachable when it can't be reached, InvalidRequest when it refuses us,
    ResourceExhausted when it is full."""

    def __init__(self, url: str, store: "ObjectStore", directory: Path | None) -> None:
        """Use `open`."""
        self.url, self._store, self._directory = url, store, directory

    @classmethod
    def open(cls, url: str, environment: Mapping[str, str], *, make: bool = False) -> "Remote":
        """`environment`: where keys and endpoint of an S3 store are from. `make`: a directory that is not there is
        made, and marked as ours. Raises InvalidRequest, NotFound, besides the others."""
        parts = urlsplit(url)
        if parts.query or parts.fragment or parts.username:
            raise InvalidRequest(f"«{url}» has parts that are not used: write file:///DIRECTORY or s3://BUCKET/PREFIX")
        if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            remote = cls._open_directory(url, Path(unquote(parts.path)), make)
        elif parts.scheme == "s3" and parts.netloc:
            remote = cls._open_s3(url, parts.netloc, parts.path.strip("/"), environment)
        else:
            raise InvalidRequest(
                f"«{url}» is no place to keep snapshots: write file:///DIRECTORY or s3://BUCKET/PREFIX"
            )
        remote._check_mark(make)
        return remote

    @classmethod
    def _open_directory(cls, url: str, directory: Path, make: bool) -> "Remote":
        from obstore.store import LocalStore

        if not directory.is_dir() and not make:
            raise NotFound("directory", str(directory), "nothing was pushed there yet")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"{directory} can't be made: {error.strerror}") from error
        return cls(url, LocalStore(directory), directory)

    @classmethod
    def _open_s3(cls, url: str, bucket: str, prefix: str, environment: Mapping[str, str]) -> "Remote":
        from obstore.store import S3Store

        config: Any = {name.lower(): environment[name] for name in VARIABLES if environment.get(name)}
        if "aws_skip_signature" not in config and not {"aws_access_key_id", "aws_secret_access_key"} <= config.keys():
            raise InvalidRequest(
                "no key for the object store is set: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "and AWS_ENDPOINT_URL where it is not Amazon's (AWS_SKIP_SIGNATURE=1 for a public one)"
            )
        endpoint = config.get("aws_endpoint_url_s3") or config.get("aws_endpoint_url") or ""
        plain = endpoint.startswith("http://")
        options: Any = {"connect_timeout": _CONNECT, "timeout": _REQUEST, "allow_http": plain}
        from obstore.exceptions import BaseError

        try:
            store = S3Store(bucket, prefix=prefix or None, config=config, client_options=options, retry_config=_RETRY)
        except BaseError as error:
            raise InvalidRequest(f"{url} can't be used: {_said(error)}") from error
        return cls(url, store, None)

    def _check_mark(self, make: bool) -> None:
        mark = self.get(_MARK, _MARK_MOST)
        if mark is None:
            if not make:
                raise NotFound("store of snapshots", self.url, "nothing was pushed there yet")
            self.put(_MARK, json.dumps({"format": FORMAT}).encode() + b"\n")
            return
        try:
            found = json.loads(mark)["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{self.url} is not a store of snapshots: its {_MARK} can't be read") from error
        if found != FORMAT:
            raise InvalidRequest(
                f"{self.url} is of format {str(found)[:20]}, and this Forky Pig reads {FORMAT}: use a newer one"
            )

    def get(self, path: str, most: int) -> bytes | None:
        """A small object; None when it is not there. Raises Damaged when it is longer."""
        import obstore

        with self._errors(path) as missing:
            answer = obstore.get(self._store, path)
            if answer.meta["size"] > most:
                raise Damaged(f"{path} in {self.url} has {answer.meta['size']} bytes, and can have {most} at most")
            return bytes(answer.bytes())
        assert missing
        return None

    def ranges(self, path: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Parts of an object. Raises Damaged when it is not there or shorter."""
        import obstore

        with self._errors(path):
            if obstore.head(self._store, path)["size"] < max(ends, default=0):
                raise Damaged(f"{path} in {self.url} is shorter than its index says")
            return [bytes(part) for part in obstore.get_ranges(self._store, path, starts=starts, ends=ends, coalesce=0)]
        raise Damaged(f"{path} is missing in {self.url}")

    def stream(self, path: str) -> "IO[bytes] | None":
        """An object to read; None when it is not there."""
        import obstore

        with self._errors(path):
            return _Stream(self, path, obstore.get(self._store, path).stream(min_chunk_size=_PART_BYTES))  # type: ignore[return-value]
        return None

    def put(self, path: str, content: "bytes | Iterator[bytes]") -> None:
        """Writes an object, whole or not at all."""
        import obstore

        with self._errors(path):
            obstore.put(self._store, path, content, chunk_size=_PART_BYTES)
        if self._directory is not None:  # object stores are durable when they say that it is written
            self._sync(self._directory / path)

    def _sync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        while path != self._directory:
            path = path.parent
            durable.sync_directory(path)

    def delete(self, path: str) -> None:
        """Removes an object; one that is not there is fine."""
        import obstore

        with self._errors(path):
            obstore.delete(self._store, path)

    def list(self, directory: str, suffix: str) -> list[str]:
        """The names of the objects in a directory, without the suffix."""
        import obstore

        found = []
        with self._errors(directory):
            for batch in obstore.list(self._store, directory, chunk_size=1000):
                found += [str(each["path"]).rpartition("/")[2] for each in batch]
        return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))

    def _errors(self, path: str) -> "_Errors":
        return _Errors(self.url, path)


class _Errors:
    """Turns obstore's errors into ours; one that says that the object is missing is swallowed, and is told."""

    def __init__(self, url: str, path: str) -> None:
        self._where = f"{path} in {url}"
        self._url = url
        self._missing = False

    def __enter__(self) -> "_Errors":
        return self

    def __bool__(self) -> bool:
        return self._missing

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        from obstore import exceptions

        if error is None:
            return False
        if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
            self._missing = True
            return True
        if isinstance(error, PermissionError | exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            raise InvalidRequest(f"{self._url} refuses us: check the keys that are set ({_said(error)})") from error
        if isinstance(error, exceptions.BaseError | OSError):
            said = _said(error)
            if "NoSuchBucket" in str(error):
                raise InvalidRequest(f"there is no bucket for {self._url}: make it, or name another") from error
            if "No space left" in said or "quota" in said.lower():
                raise ResourceExhausted(f"no room for {self._where}: free some there ({said})") from error
            raise HostUnreachable(f"{self._where} can't be read or written: {said}") from error
        return False


def _said(error: BaseException) -> str:
    """The first line of what a library says, which may go on with its own insides."""
    return str(error).strip().partition("\n")[0][:300]


class _Stream:
    """An object as something with `read`."""

    def __init__(self, remote: Remote, path: str, pieces: Any) -> None:
        self._remote, self._path, self._pieces = remote, path, iter(pieces)
        self._buffer = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most so many bytes; b"" at the end."""
        while not self._buffer:
            with self._remote._errors(self._path):
                piece = next(self._pieces, None)
                if piece is None:
                    return b""
                self._buffer = memoryview(bytes(piece))
        part, self._buffer = self._buffer[:size], self._buffer[size:]
        return bytes(part)
