"""Who gets in and what is written down, put together; and the addresses besides the socket that the controller has."""

from typing import Any, cast

import grpc
import structlog

from forkypig.certificates.presented import Shown, Watched
from forkypig.controller.audit import AuditLog
from forkypig.controller.auth.attempts import Attempts
from forkypig.controller.auth.gate import Gate
from forkypig.controller.auth.local_users import LocalUsers
from forkypig.controller.auth.tokens import Tokens
from forkypig.controller.edge.edge import Edge
from forkypig.controller.edge.retries import Retries
from forkypig.controller.store import Store
from forkypig.daemon.settings import Settings
from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.model.listening import HostPort, parse_host_port

log = structlog.get_logger()


class Access:
    """Of one controller."""

    def __init__(self, settings: Settings, store: Store, local_users: LocalUsers) -> None:
        """Raises NotPossibleNow when there can be no audit log: nothing is done that nobody would hear of."""
        self._settings = settings
        self.local_users = local_users
        self.tokens = Tokens(store)
        self._certificates = Watched(settings.auth)
        try:
            self.audit = AuditLog(settings.audit, settings.audit_file_mib << 20, settings.audit_files)
        except OSError as error:
            raise NotPossibleNow(f"there can be no audit log in {settings.audit} ({error.strerror})") from error
        attempts = Attempts(settings.failed_logins_per_minute)
        self.gate = Gate(store, self.tokens, self._certificates, local_users, attempts)
        self.edge = Edge(settings, self.gate, self.audit, Retries(store))

    async def close(self) -> None:
        await self.audit.close()

    def bind(self, server: grpc.aio.Server) -> list[int]:
        """Adds what settings.listen and listen_certificates say; the ports.

        Raises InvalidRequest for what is no address, or is not safe; NotPossibleNow for what can't be had."""
        ports = []
        if self._settings.listen:
            at = parse_host_port("FORKY_LISTEN", self._settings.listen)
            if self._certificates.exist:
                ports.append(_secure(server, at, self._credentials(callers_show_theirs=False)))
            elif at.on_loopback:
                ports.append(_plain(server, at))
            else:
                raise InvalidRequest(
                    f"FORKY_LISTEN is {at}, which others can reach, and there is no certificate: "
                    "make one with `forky auth init`, or listen on 127.0.0.1"
                )
        if self._settings.listen_certificates:
            at = parse_host_port("FORKY_LISTEN_CERTIFICATES", self._settings.listen_certificates)
            if not self._certificates.exist:
                raise InvalidRequest(
                    f"FORKY_LISTEN_CERTIFICATES is {at}, and there is no certificate: make one with `forky auth init`"
                )
            ports.append(_secure(server, at, self._credentials(callers_show_theirs=True)))
        return ports

    def _credentials(self, *, callers_show_theirs: bool) -> grpc.ServerCredentials:
        """Looked at anew for each connection, in a thread of gRPC's."""
        # Each address has its own idea of what it has shown last.
        certificates = Watched(self._settings.auth)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            try:
                shown = certificates.shown_if_changed()
            except (OSError, ValueError) as error:
                log.error("certificates can't be read; the last ones are shown", error=str(error))
                return None
            return _configuration(shown) if shown is not None else None

        first = certificates.shown_if_changed()
        assert first is not None
        return grpc.dynamic_ssl_server_credentials(_configuration(first), cast(Any, changed), callers_show_theirs)


def _configuration(shown: Shown) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(shown.key, shown.certificate)], shown.authority)


def _secure(server: grpc.aio.Server, at: HostPort, credentials: grpc.ServerCredentials) -> int:
    try:
        port = server.add_secure_port(str(at), credentials)
    except RuntimeError as error:
        raise _taken(at) from error
    log.info("serving", address=str(at), tls=True)
    return port


def _plain(server: grpc.aio.Server, at: HostPort) -> int:
    try:
        port = server.add_insecure_port(str(at))
    except RuntimeError as error:
        raise _taken(at) from error
    log.info("serving", address=str(at), tls=False)
    return port


def _taken(at: HostPort) -> NotPossibleNow:
    return NotPossibleNow(f"can't listen on {at}: it is taken or none of this computer's; choose another")
