"""Callers from elsewhere: real TLS on loopback, tokens and client certificates, their end, and a new certificate."""

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig import errors
from forkypig.certificates.authority import Authority, Issued
from forkypig.daemon.settings import Settings
from forkypig.model.access import Role
from forkypig.sdk.client import Forky
from tests.component.access_rig import Served, serving
from tests.component.controller_rig import home, running_host


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    with home() as plain:
        Authority(plain.auth).make(["forky.test"])
        settings = Settings(home=plain.home, listen="127.0.0.1:0", listen_certificates="127.0.0.1:0")
        async with running_host(settings), serving(settings) as made:
            await made.tenant("acme")
            yield made


def remote(served: Served, token: str = "", *, port: int = 0, certificate: str = "", ca: Path | None = None) -> Forky:
    directory = served.settings.auth
    return Forky(
        served.settings.home,
        controller=f"localhost:{served.ports[port]}",
        token=token,
        ca=ca or directory / "ca.crt",
        certificate=str(directory / f"{certificate}.crt") if certificate else "",
        key=str(directory / f"{certificate}.key") if certificate else "",
        tenant="",
    )


def issue(served: Served, name: str, role: Role = Role.USER) -> Issued:
    directory = served.settings.auth
    issued, certificate, key = Authority(directory).issue(name, "acme", role, 1)
    (directory / f"{name}.crt").write_bytes(certificate)
    (directory / f"{name}.key").write_bytes(key)
    return issued


async def test_a_token_over_tls(served: Served) -> None:
    text = await served.token("user", "acme")
    async with remote(served, text) as forky:
        who = await forky.whoami()
        assert (who.tenant, who.role, who.operator) == ("acme", Role.USER, False)
        machine = await forky.run(name="web")
        assert [each.name for each in await forky.list()] == ["web"]
        await machine.remove()
        assert (await forky.status()).home == served.settings.home
    async with remote(served) as nobody:
        with pytest.raises(errors.Unauthenticated):
            await nobody.list()


async def test_a_controller_that_is_not_believed_is_told_nothing(served: Served, tmp_path: Path) -> None:
    Authority(tmp_path / "other").make([])
    async with remote(served, "fp_secret", ca=tmp_path / "other" / "ca.crt") as forky:
        with pytest.raises(errors.HostUnreachable, match="FORKY_CA"):
            await forky.list()


async def test_a_client_certificate_says_who_it_is_until_it_is_revoked(served: Served) -> None:
    issued = issue(served, "ci")
    issue(served, "eve", Role.VIEWER)
    async with remote(served, port=1, certificate="ci") as forky, remote(served, port=1, certificate="eve") as eve:
        who = await forky.whoami()
        assert (who.tenant, who.role, who.name) == ("acme", Role.USER, f"certificate:ci:{issued.serial}")
        with pytest.raises(errors.PermissionDenied, match="viewer"):
            await eve.run()
        Authority(served.settings.auth).revoke("ci", 1)
        with pytest.raises(errors.Unauthenticated):  # over the connection that is open
            await forky.whoami()
        assert (await eve.whoami()).role is Role.VIEWER


async def test_certificates_of_others_and_none_do_not_get_in(served: Served, tmp_path: Path) -> None:
    directory = served.settings.auth
    async with remote(served, port=1) as forky:
        with pytest.raises(errors.HostUnreachable):
            await forky.whoami()
    other = Authority(tmp_path / "other")
    other.make([])
    _, certificate, key = other.issue("ci", "acme", Role.ADMIN, 1)
    (directory / "forged.crt").write_bytes(certificate)
    (directory / "forged.key").write_bytes(key)
    async with remote(served, port=1, certificate="forged") as forky:
        with pytest.raises(errors.HostUnreachable):
            await forky.whoami()


async def test_a_new_certificate_is_shown_without_a_restart(served: Served) -> None:
    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", served.ports[0]))

    before = await asyncio.to_thread(shown)
    assert before.strip() == (served.settings.auth / "server.crt").read_text().strip()
    Authority(served.settings.auth).renew()
    after = await asyncio.to_thread(shown)
    assert after != before
    assert after.strip() == (served.settings.auth / "server.crt").read_text().strip()
    async with remote(served, await served.token()) as forky:
        await forky.list()


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ({"listen": "0.0.0.0:0"}, "forky auth init"),
        ({"listen": "[::]:0"}, "forky auth init"),
        ({"listen": "forky.test:7070"}, "forky auth init"),
        ({"listen_certificates": "127.0.0.1:0"}, "forky auth init"),
        ({"listen": "7070"}, "HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"local_users": "nobody-called-so=acme:user"}, "doesn't know"),
        ({"local_users": "0=acme:god"}, "USER=TENANT:ROLE"),
    ],
)
async def test_it_does_not_start_where_that_is_not_safe(listen: dict[str, str], message: str) -> None:
    with home() as plain, pytest.raises(errors.InvalidRequest, match=message):
        async with serving(Settings(home=plain.home, **listen)):  # type: ignore[arg-type]
            pass


def test_a_second_authority_is_not_made(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "auth")
    with pytest.raises(errors.NotPossibleNow, match="auth init"):
        authority.renew()
    authority.make([])
    before = authority.certificate.read_bytes()
    with pytest.raises(errors.AlreadyExists):
        authority.make([])
    assert authority.certificate.read_bytes() == before
    for path in authority.directory.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(errors.NotFound):
        authority.revoke("nobody", 1)


@pytest.mark.parametrize("address", ["http://192.0.2.1:7070", "ftp://localhost:1", "localhost", "a b:1", "[::1:70"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Forky("/tmp", controller=address, token="", tenant="")


_AS_USER = """
import asyncio, os, sys
import grpc.aio
from forkypig.sdk.client import Forky

# Not before the imports: the checkout may lie where only root can read.
os.setgroups([])
os.setresgid(*3 * [int(sys.argv[2])])
os.setresuid(*3 * [int(sys.argv[2])])

async def main():
    async with Forky("/nonexistent", controller="unix:" + sys.argv[1], token="", tenant="") as forky:
        who = await forky.whoami()
        print(who.name, who.tenant, who.role.value, who.operator)
        await forky.run(name="theirs")

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_another_user_of_this_computer_is_known_by_the_kernel() -> None:
    with home() as plain:
        plain.home.chmod(0o711)
        settings = Settings(home=plain.home, local_users="nobody=acme:viewer")
        async with running_host(settings), serving(settings) as made:
            await made.tenant("acme")

            async def as_user(uid: int, path: Path) -> tuple[str, str]:
                child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", _AS_USER, str(path), str(uid)),
                    cwd="/",
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                out, err = await child.communicate()
                return out.decode(), err.decode()

            nobody, stranger, at_the_door, root = await asyncio.gather(
                as_user(65534, settings.users_socket),
                as_user(12345, settings.users_socket),
                as_user(65534, settings.socket("controller")),
                as_user(0, settings.users_socket),
            )
            assert nobody[0] == "user:nobody acme viewer False\n"
            assert "PermissionDenied" in nobody[1]
            assert stranger[0] == ""
            assert "HostUnreachable" in stranger[1]
            assert at_the_door[0] == ""
            assert root[0] == "user:root default admin True\n"
