"""forky auth, forky audit, and other commands against a controller elsewhere: the program against a real edge."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forkypig.daemon.settings import Settings
from tests.component.access_rig import Served, serving
from tests.component.controller_rig import home, running_host


async def forky(*words: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FORKY_")}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forkypig.cli.main", *words),
        env={**clean, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    with home() as plain:
        code, _, trouble = await forky("auth", "init", "--host", "localhost", FORKY_HOME=str(plain.home))
        assert code == 0, trouble
        settings = Settings(home=plain.home, listen="127.0.0.1:0", listen_certificates="127.0.0.1:0")
        async with running_host(settings), serving(settings) as made:
            await made.tenant("acme")
            yield made


async def test_from_auth_init_to_the_audit_log(served: Served) -> None:
    path, directory = str(served.settings.home), served.settings.auth
    # On the controller's own computer: its socket, named, so that nothing is started.
    here = {"FORKY_HOME": path, "FORKY_CONTROLLER": f"unix:{served.settings.socket('controller')}"}
    (code, text, trouble), (_, made, _) = await asyncio.gather(
        forky("auth", "token", "create", "--role", "user", "--tenant", "acme", "--name", "ci", **here),
        forky(
            *(
                "auth",
                "cert",
                "create",
                "eve",
                "--role",
                "viewer",
                "--tenant",
                "acme",
                "--into",
                f"{path}/new/eve",
                "--json",
            ),
            FORKY_HOME=path,
        ),
    )
    assert code == 0, trouble
    certificate: dict[str, Any] = json.loads(made)
    there = {"FORKY_CONTROLLER": f"localhost:{served.ports[0]}", "FORKY_CA": str(directory / "ca.crt")}
    token = {**there, "FORKY_TOKEN": text.strip()}
    shown = {
        **there,
        "FORKY_CONTROLLER": f"https://localhost:{served.ports[1]}",
        "FORKY_CERTIFICATE": certificate["certificate"],
        "FORKY_CERTIFICATE_KEY": certificate["key"],
    }
    run, nobody, may_not, up, listed = await asyncio.gather(
        forky("run", "--name", "web", "--json", **token),
        forky("ps", **there),
        forky("run", "--name", "other", **shown),
        forky("up", **token),
        forky("auth", "token", "ls", "--json", **here),
    )
    assert json.loads(run[1])["name"] == "web", run
    assert (nobody[0], "FORKY_TOKEN" in nobody[2]) == (1, True)
    assert (may_not[0], "viewer" in may_not[2]) == (1, True)
    assert (up[0], "unset FORKY_CONTROLLER" in up[2]) == (2, True)
    (row,) = json.loads(listed[1])
    assert (row["name"], row["tenant"], row["role"], row["revoked_us"]) == ("ci", "acme", "user", None)
    assert "token" not in row
    revoked, unissued = await asyncio.gather(
        forky("auth", "token", "revoke", "ci", **here),
        forky("auth", "cert", "revoke", certificate["serial"], FORKY_HOME=path),
    )
    assert (revoked[0], unissued[0]) == (0, 0)
    after = await asyncio.gather(forky("ps", **token), forky("ps", **shown))
    assert [code for code, _, _ in after] == [1, 1]
    code, told, _ = await forky("audit", "--json", "--since", "1h", **here)
    assert code == 0
    methods = {(line["method"], line["result"]) for line in map(json.loads, told.splitlines())}
    assert ("Controller/RunMachine", "OK") in methods
    assert ("Controller/RunMachine", "PERMISSION_DENIED") in methods
    assert ("Controller/ListMachines", "UNAUTHENTICATED") in methods
    assert text.strip() not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("auth", "token", "create", "--role", "user", "--expires", "soon"), "no span of time"),
        (("audit", "--since", "yesterday"), "neither"),
        (("ps",), "HOST:PORT"),
    ],
)
async def test_what_is_wrong_is_said_in_a_sentence(words: tuple[str, ...], said: str, tmp_path: Any) -> None:
    elsewhere = {"FORKY_CONTROLLER": "nowhere"} if words[0] in ("ps",) else {}
    code, out, trouble = await forky(*words, FORKY_HOME=str(tmp_path / "h"), **elsewhere)
    assert (code, out) == (2, "")
    assert said in trouble
    assert "Traceback" not in trouble
