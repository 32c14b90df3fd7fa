"""What REST has for many users: pools, tenants, quotas, tokens, sharing, the audit log."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.component.controller_rig import eventually
from tests.component.rest_rig import Rest, rest
from tests.component.test_rest import is_problem


@pytest.fixture
async def api() -> AsyncIterator[Rest]:
    async with rest() as made:
        yield made


async def done(call: Any, status: int = 200) -> Any:
    """The document of an answer with this status."""
    answer: httpx.Response = await call
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


async def test_a_pool_from_its_making_to_its_end(api: Rest) -> None:
    http = api.http
    made = await done(http.post("/v1/pools", json={"name": "py", "from": "debian-12", "target": 1}), 201)
    assert (made["name"], made["from"], made["target"], made["max"]) == ("py", "debian-12", 1, 2)

    async def ready() -> bool:
        return bool((await done(http.get("/v1/pools/py")))["ready"] == 1)

    await eventually(ready)
    got = await done(http.post("/v1/pools/py/acquire", json={"labels": {"job": "7"}, "ttl_s": 60}), 201)
    assert got["state"] == "running" and got["lease"]["labels"] == {"job": "7"}
    (held,) = (await done(http.get("/v1/pools/py")))["leases"]
    assert held["machine"] == got["id"]
    assert (await done(http.post(f"/v1/machines/{got['id']}/renew", json={"ttl_s": 90})))["ttl_s"] == 90
    children = (await done(http.post(f"/v1/machines/{got['id']}/fork", json={"ttl_s": 60}), 201))["children"]
    ran = await done(http.post("/v1/machines", json={"ttl_s": 60}), 201)
    held_us = (await done(http.get(f"/v1/machines/{got['id']}")))["expires_us"]
    assert all(0 < made["expires_us"] < held_us for made in (*children, ran))
    assert await done(http.post(f"/v1/machines/{got['name']}/release"), 204) is None
    assert (await done(http.patch("/v1/pools/py", json={"target": 0})))["target"] == 0
    assert len(await done(http.get("/v1/pools"))) == 1
    await done(http.delete("/v1/pools/py"), 204)
    is_problem(await http.get("/v1/pools/py"), 404, "not-found")
    is_problem(await http.post("/v1/pools/py/acquire", json={}), 404, "not-found")


async def test_who_stops_waiting_for_a_machine_gets_none(api: Rest) -> None:
    """A caller that goes away while it waits in the queue does not leave a lease behind."""
    await done(api.http.post("/v1/pools", json={"name": "py", "from": "debian-12", "target": 0, "max": 1}), 201)
    first = await done(api.http.post("/v1/pools/py/acquire", json={}), 201)

    async def waiting() -> int:
        return int((await done(api.http.get("/v1/pools/py")))["waiting"])

    with pytest.raises(httpx.TimeoutException):
        await api.http.post("/v1/pools/py/acquire", json={}, timeout=0.3)

    async def nobody_waits() -> bool:
        return await waiting() == 0

    await eventually(nobody_waits)
    late = await api.http.post("/v1/pools/py/acquire", json={"wait_s": 0.05})
    is_problem(late, 429, "resource-exhausted")
    assert "retry-after" not in late.headers  # nobody knows when a machine comes back
    assert [each["id"] for each in await done(api.http.get("/v1/machines"))] == [first["id"]]


async def test_tenants_tokens_and_quotas(api: Rest) -> None:
    http = api.http
    red = await done(http.post("/v1/tenants", json={"name": "red", "quota": {"machines": 1, "cpus": 4}}), 201)
    assert (red["quota"]["machines"], red["quota"]["disk_mib"], red["used"]["machines"]) == (1, None, 0)
    made = await done(http.post("/v1/tokens", json={"role": "user", "tenant": "red", "name": "ci"}), 201)
    as_red = {"Authorization": f"Bearer {made['token']}"}
    who = await done(http.get("/v1/whoami", headers=as_red))
    assert (who["tenant"], who["role"], who["operator"]) == ("red", "user", False)
    await done(http.post("/v1/machines", json={"name": "web"}, headers=as_red), 201)
    refused = await http.post("/v1/machines", json={"name": "second"}, headers=as_red)
    assert "machines" in is_problem(refused, 429, "resource-exhausted") and "retry-after" not in refused.headers
    assert (await done(http.get("/v1/quota", headers=as_red)))["used"]["machines"] == 1
    changed = await done(http.patch("/v1/tenants/red", json={"quota": {"machines": None, "snapshots": 3}}))
    assert (changed["quota"]["machines"], changed["quota"]["cpus"], changed["quota"]["snapshots"]) == (None, 4, 3)
    # Another's things are not there, and what is not theirs to do is not done.
    is_problem(await http.get("/v1/machines/web"), 404, "not-found")
    for method, path in (("GET", "/v1/tenants"), ("DELETE", "/v1/tenants/red"), ("GET", "/v1/ksm")):
        is_problem(await http.request(method, path, headers=as_red), 403, "permission-denied")
    is_problem(await http.get("/v1/tokens", headers=as_red), 403, "permission-denied")
    is_problem(await http.delete("/v1/tenants/red"), 409, "not-possible-now")
    listed = await done(http.get("/v1/tokens"))
    assert [each["name"] for each in listed] == ["ci"] and made["token"] not in json.dumps(listed)
    assert (await done(http.delete("/v1/tokens/ci")))["revoked_us"] > 0
    is_problem(await http.get("/v1/whoami", headers=as_red), 401, "unauthenticated")


async def test_sharing_on_purpose(api: Rest) -> None:
    http = api.http
    await done(http.post("/v1/tenants", json={"name": "red"}), 201)
    in_red = {"Forky-Tenant": "red"}
    await api.run("web")
    taken = await done(http.post("/v1/machines/web/snapshots", json={"tag": "base"}), 201)
    is_problem(await http.get(f"/v1/snapshots/{taken['id']}", headers=in_red), 404, "not-found")
    shared = await done(http.post("/v1/snapshots/base/share", json={"tenant": "red"}))
    assert shared["shared_with"] == ["red"]
    assert (await done(http.get(f"/v1/snapshots/{taken['id']}", headers=in_red)))["machine"] is None
    is_problem(await http.delete(f"/v1/snapshots/{taken['id']}", headers=in_red), 403, "permission-denied")
    everybody = await done(http.post("/v1/snapshots/base/share", json={"tenant": None}))
    assert set(everybody["shared_with"]) == {"red", "*"}
    await done(http.post("/v1/snapshots/base/unshare", json={"tenant": None}))
    assert (await done(http.post("/v1/snapshots/base/unshare", json={"tenant": "red"})))["shared_with"] == []


async def test_the_audit_log_and_what_comes(api: Rest) -> None:
    await api.run("web")
    lines = await done(api.http.get("/v1/audit"))
    assert [line["method"] for line in lines if line["result"] == "OK"] == ["Controller/RunMachine"]
    async with api.http.stream("GET", "/v1/audit", headers={"Accept": "text/event-stream"}) as answer:
        pieces = answer.aiter_lines()
        await api.http.post("/v1/machines/web/pause")
        async with asyncio.timeout(30):
            while "PauseMachine" not in await anext(pieces):
                pass


async def test_too_many_are_told_when_to_come_again() -> None:
    async with rest(rate_per_s=0.05, rate_burst=1) as api:
        made = await done(api.http.post("/v1/tokens", json={"role": "viewer"}), 201)
        headers = {"Authorization": f"Bearer {made['token']}"}
        await done(api.http.get("/v1/machines", headers=headers))
        late = await api.http.get("/v1/machines", headers=headers)
        is_problem(late, 429, "too-many-requests")
        assert 0 < int(late.headers["retry-after"]) <= 20
