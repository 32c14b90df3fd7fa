"""forky auth init, renew, whoami; auth token create, ls, revoke; auth cert create, ls, revoke."""

import socket
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig import errors
from forkypig.cli import documents, durations, printing
from forkypig.cli.runtime import connected, perform

if TYPE_CHECKING:
    from forkypig.certificates.authority import Authority
    from forkypig.sdk.client import Forky

auth = typer.Typer(help="Say who may come in.", no_args_is_help=True, rich_markup_mode=None)
token = typer.Typer(help="Tokens: for callers from elsewhere.", no_args_is_help=True, rich_markup_mode=None)
cert = typer.Typer(help="Client certificates, instead of tokens.", no_args_is_help=True, rich_markup_mode=None)
auth.add_typer(token, name="token")
auth.add_typer(cert, name="cert")


class _Role(Enum):
    """Each includes those before it, but for METRICS."""

    METRICS = "metrics"
    VIEWER = "viewer"
    USER = "user"
    ADMIN = "admin"


RoleOption = Annotated[
    _Role,
    typer.Option(
        "--role", help="What they may do; metrics is for Prometheus, and does nothing else.", case_sensitive=False
    ),
]
TenantOption = Annotated[str, typer.Option("--tenant", metavar="TENANT", help="Whose things they see. Default: yours.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME", help="A name or an address that callers know the controller by."),
]


def _span_s(text: str) -> int:
    try:
        return int(durations.seconds(text))
    except ValueError as error:
        raise errors.InvalidRequest(f"--expires: {error}") from error


def _authority() -> "Authority":
    from forkypig.certificates.authority import Authority
    from forkypig.sdk import local

    place = local.own_place()
    local.make_home(place)
    return Authority(place.auth)


# -- the controller's own certificate ----------------------------------------------------------------------------------


@auth.command()
def init(host: Hosts = None, as_json: printing.Json = False) -> None:
    """Make a certificate authority and the controller's certificate.

    A controller that listens (FORKY_LISTEN) needs it off loopback; callers need its ca.crt."""

    async def work() -> None:
        authority = _authority()
        authority.make(host or _own_names())
        if as_json:
            printing.document({"ca": str(authority.certificate), "certificate": str(authority.server_certificate)})
        else:
            printing.say(
                f"callers are to believe {authority.certificate}: give it to them, and set FORKY_CA to it there"
            )
            printing.say("then FORKY_LISTEN=0.0.0.0:7070 forky up, and forky auth token create")

    perform(work)


@auth.command()
def renew(host: Hosts = None, as_json: printing.Json = False) -> None:
    """Make the controller a new certificate. It shows it from the next connection on, without a restart."""

    async def work() -> None:
        until = _authority().renew(host or ())
        if as_json:
            printing.document({"expires": until.isoformat()})
        else:
            printing.say(f"the controller's certificate holds until {until:%Y-%m-%d}")

    perform(work)


@auth.command()
def whoami(as_json: printing.Json = False) -> None:
    """Show who the controller takes you for."""

    async def work(forky: "Forky") -> None:
        who = await forky.whoami()
        fields = documents.principal(who)
        if as_json:
            printing.document(fields)
        else:
            printing.fields([(name, str(value)) for name, value in fields.items() if value is not False])

    connected(work)


def _own_names() -> Sequence[str]:
    """What others may call this computer."""
    return list(dict.fromkeys((socket.gethostname(), socket.getfqdn())))


# -- tokens ------------------------------------------------------------------------------------------------------------


@token.command(name="create")
def create_token(
    role: RoleOption,
    tenant: TenantOption = "",
    expires: Annotated[str, typer.Option("--expires", metavar="SPAN", help="30d, 12h, …; never: for ever.")] = "30d",
    name: Annotated[str, typer.Option("--name", help="To know it by.")] = "",
    as_json: printing.Json = False,
) -> None:
    """Make a token and print it; it is not shown again."""
    lifetime_s = 0 if expires == "never" else _span_s(expires)
    if lifetime_s == 0 and expires != "never":
        raise errors.InvalidRequest("--expires: a token holds for a second at least; write never for one without end")

    async def work(forky: "Forky") -> None:
        from forkypig.model.access import Role

        made, text = await forky.create_token(Role(role.value), tenant=tenant, lifetime_s=lifetime_s, name=name)
        if as_json:
            printing.document({**documents.token(made), "token": text})
        else:
            printing.say(text)

    connected(work)


@token.command(name="ls")
def list_tokens(as_json: printing.Json = False) -> None:
    """List the tokens, without their secrets."""

    async def work(forky: "Forky") -> None:
        found = await forky.tokens()
        if as_json:
            printing.document([documents.token(each) for each in found])
            return
        rows = [
            (t.id, t.name, t.tenant, t.role.value, _state(t.expires_us, t.revoked_us), printing.moment(t.last_used_us))
            for t in found
        ]
        printing.table(("ID", "NAME", "TENANT", "ROLE", "HOLDS", "LAST USED"), rows)

    connected(work)


@token.command(name="revoke")
def revoke_token(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id or name.")], as_json: printing.Json = False
) -> None:
    """Revoke a token, from its next call on."""

    async def work(forky: "Forky") -> None:
        revoked = await forky.revoke_token(token)
        if as_json:
            printing.document(documents.token(revoked))
        else:
            printing.say(f"revoked token {revoked.id}")

    connected(work)


def _state(expires_us: int, revoked_us: int) -> str:
    if revoked_us:
        return "revoked"
    if not expires_us:
        return "for ever"
    return f"until {printing.moment(expires_us)}" if expires_us > time.time() * 1e6 else "expired"


# -- client certificates -----------------------------------------------------------------------------------------------


@cert.command(name="create")
def create_certificate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of whoever shows it.")],
    role: RoleOption,
    tenant: Annotated[str, typer.Option("--tenant", metavar="TENANT", help="Whose things they see.")] = "default",
    expires: Annotated[str, typer.Option("--expires", metavar="SPAN", help="In days: 90d, 52w, …")] = "90d",
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Where NAME.crt and NAME.key go.")] = Path(),
    as_json: printing.Json = False,
) -> None:
    """Make a client certificate, for a controller with FORKY_LISTEN_CERTIFICATES. Its key is kept nowhere else."""
    days = _span_s(expires) // 86400
    if not 1 <= days <= 3650:
        raise errors.InvalidRequest("--expires: a certificate holds for 1 to 3650 days")

    async def work() -> None:
        import os

        from forkypig.model.access import Role

        certificate_file, key_file = into / f"{name}.crt", into / f"{name}.key"
        if taken := [path for path in (certificate_file, key_file) if path.exists()]:
            raise errors.AlreadyExists("file", str(taken[0]))
        issued, certificate, key = _authority().issue(name, tenant, Role(role.value), days)
        fd = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(key)
        certificate_file.write_bytes(certificate)
        if as_json:
            printing.document({"serial": issued.serial, "certificate": str(certificate_file), "key": str(key_file)})
        else:
            printing.say(f"{certificate_file} and {key_file}: set FORKY_CERTIFICATE and FORKY_CERTIFICATE_KEY to them")

    perform(work)


@cert.command(name="ls")
def list_certificates(as_json: printing.Json = False) -> None:
    """List the client certificates that were made here."""

    async def work() -> None:
        from dataclasses import asdict

        found = _authority().issued()
        if as_json:
            printing.document([asdict(each) for each in found])
            return
        rows = [(i.serial, i.name, i.tenant, i.role, _state(i.expires_us, i.revoked_us)) for i in found]
        printing.table(("SERIAL", "NAME", "TENANT", "ROLE", "HOLDS"), rows)

    perform(work)


@cert.command(name="revoke")
def revoke_certificate(
    certificate: Annotated[str, typer.Argument(metavar="CERT", help="Its serial number, or all of a name.")],
    as_json: printing.Json = False,
) -> None:
    """Revoke client certificates, from their next call on."""

    async def work() -> None:
        revoked = _authority().revoke(certificate, time.time_ns() // 1000)
        if as_json:
            printing.document({"revoked": [each.serial for each in revoked]})
        else:
            printing.say("\n".join(f"revoked certificate {each.serial} of {each.name}" for each in revoked))

    perform(work)
