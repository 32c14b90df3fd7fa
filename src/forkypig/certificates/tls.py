"""TLS for the servers that take an ssl.SSLContext (REST, metrics): always with the newest certificate."""

import ssl
from pathlib import Path

import structlog

from forkypig.certificates.authority import Authority
from forkypig.errors import InvalidRequest

log = structlog.get_logger()


class Tls:
    """Certificate and key, as they are in their files at each handshake: what `forky auth renew` makes is shown from
    the next connection on."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises InvalidRequest when they can't be used."""
        self._certificate, self._key = certificate, key
        self._seen = self._state()
        self._context = self._loaded()
        # What a server is given stays; each handshake is answered with the newest.
        self.context = self._loaded()
        self.context.sni_callback = self._chosen

    def _state(self) -> object:
        try:
            return [(found.st_ino, found.st_mtime_ns) for found in (self._certificate.stat(), self._key.stat())]
        except OSError:
            return None

    def _loaded(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._certificate, self._key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequest(
                f"the certificate {self._certificate} and the key {self._key} can't be used ({error}): both must be "
                "PEM files that belong together"
            ) from error
        return context

    def _chosen(self, connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
        if (now := self._state()) != self._seen:
            self._seen = now
            try:
                self._context = self._loaded()
            except InvalidRequest as error:
                log.error("the last certificate is shown", error=str(error))
        connection.context = self._context


def of_authority(directory: Path) -> Tls | None:
    """With the certificate of `forky auth init`; None while there is none."""
    authority = Authority(directory)
    # Both are in the key's file, so they are always of one another.
    return Tls(authority.server_key, authority.server_key) if authority.exists else None
