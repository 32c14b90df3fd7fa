"""Events that are followed, usage and metrics: the controller's service against a fake host."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from forkypig import errors
from forkypig.certificates.authority import Authority
from forkypig.controller.app import controller
from forkypig.controller.auth.gate import OPERATOR
from forkypig.controller.following import follow
from forkypig.controller.observing import metrics, scraping
from forkypig.controller.observing.servicer import seen_by
from forkypig.controller.store import Store, events
from forkypig.daemon.settings import Settings
from forkypig.model.access import DEFAULT_TENANT, Principal, Role
from forkypig.sdk import Forky
from forkypig.v1 import agent_pb2, controller_pb2, observe_pb2_grpc
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import observe_pb2 as pb
from tests.component.controller_rig import Client, daemon
from tests.component.fake_host import FakeHost


@pytest_asyncio.fixture
async def forky(settings: Settings, client: Client) -> AsyncIterator[Forky]:
    """Connected to the controller of `client`."""
    connection = Forky(settings.home, start=False)
    await connection.connect()
    yield connection
    await connection.close()


async def write(store: Store, *kinds: str) -> None:
    async with store.write() as tx:
        for kind in kinds:
            await events.add(tx, kind, "m-000000000001")


async def collect(stream: Any, count: int) -> list[Any]:
    async with asyncio.timeout(60), aclosing(stream):
        found: list[Any] = []
        async for event in stream:
            found.append(event)
            if len(found) == count:
                return found
    return found


async def test_followers_see_every_event_once_in_order(settings: Settings) -> None:
    store = await Store.open(settings.database)
    try:
        await write(store, "old")
        followers = [asyncio.create_task(collect(follow(store, DEFAULT_TENANT, 0), 301)) for _ in range(5)]
        for _ in range(10):
            await asyncio.gather(*(write(store, "a", "b", "c") for _ in range(10)))
        late = [asyncio.create_task(collect(follow(store, DEFAULT_TENANT, 100), 201))]
        for found in await asyncio.gather(*followers):
            assert [event.sequence for event in found] == list(range(1, 302))
        for found in await asyncio.gather(*late):
            assert [event.sequence for event in found] == list(range(101, 302))
        only = await collect(follow(store, DEFAULT_TENANT, 0, kinds=["b"], follow=False), 1000)
        assert {event.kind for event in only} == {"b"}
        assert len(only) == 100
        async with store.write() as tx:
            await events.add(tx, "theirs", "m-000000000002", tenant="red")
        await write(store, "ours")
        assert (await collect(follow(store, DEFAULT_TENANT, 301, follow=False), 9))[0].kind == "ours"
        theirs = await collect(follow(store, "red", 0, follow=False), 9)
        assert [(event.kind, event.sequence) for event in theirs] == [("theirs", 302)]
        since = found[150].time_us
        assert [
            e.time_us >= since
            for e in await collect(follow(store, DEFAULT_TENANT, 0, since_us=since, follow=False), 1000)
        ]
    finally:
        await store.close()


async def test_a_reader_that_stands_still_holds_up_nobody(client: Client, forky: Forky) -> None:
    slow = forky.follow_events()
    first = asyncio.create_task(anext(slow))
    await client.run("web")
    assert (await first).sequence == 1
    for _ in range(20):
        await client.fork("web", 1)
    quick = [event async for event in forky.follow_events(follow=False)]
    there = len(quick)
    assert [event.sequence for event in quick] == list(range(1, there + 1))
    rest = await collect(slow, there - 1)
    assert [event.sequence for event in rest] == list(range(2, there + 1))


async def test_bad_requests_to_follow(client: Client, forky: Forky) -> None:
    stub: Any = observe_pb2_grpc.ObservationStub(forky.channel)
    for request in (
        pb.FollowEventsRequest(after_sequence=(1 << 64) - 1),
        pb.FollowEventsRequest(since_us=-1),
        pb.FollowEventsRequest(kinds=["k"] * 101),
    ):
        with pytest.raises(Exception, match="can't be followed from there"):
            await anext(aiter(stub.FollowEvents(request)))


async def test_following_goes_on_after_the_controller_was_killed(settings: Settings, host: FakeHost) -> None:
    async with daemon(settings) as (process, client):
        await client.run("web")
        async with Forky(settings.home, start=False) as forky:
            seen: list[int] = []
            stream = forky.follow_events()
            while len(seen) < 2:
                seen.append((await anext(stream)).sequence)
            await process.kill()
            following = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.5)
            assert not following.done()
            await process.start()
            seen.append((await asyncio.wait_for(following, 120)).sequence)
            await client.stub.Fork(controller_pb2.ForkRequest(source="web", count=1), wait_for_ready=True, timeout=50)
            there = [event.sequence async for event in forky.follow_events(follow=False)]
            while len(seen) < len(there):
                seen.append((await asyncio.wait_for(anext(stream), 20)).sequence)
            assert seen == there
            await stream.aclose()  # type: ignore[attr-defined]


def test_usage_of_others_is_not_seen() -> None:
    usage = pb.GetUsageResponse(pause_p50_ms=1, pauses=1)
    usage.host.memory_total_bytes = 1
    for name, tenant in (("web", "red"), ("db", "blue")):
        usage.machines.add().machine.MergeFrom(common.Machine(name=name, tenant=tenant))
    red = seen_by(Principal("ann", "red", Role.VIEWER), usage)
    assert [row.machine.name for row in red.machines] == ["web"]
    assert (red.HasField("host"), red.pauses, red.pause_p50_ms) == (False, 0, 0)
    operator = seen_by(Principal("root", "blue", Role.ADMIN, operator=True), usage)
    assert ([row.machine.name for row in operator.machines], operator.pauses) == (["db"], 1)


async def test_usage(client: Client, host: FakeHost, forky: Forky) -> None:
    await client.run("web")
    await client.fork("web", 2)
    usage = await forky.usage()
    assert [use.machine.name for use in usage.machines] == ["web", "web-1", "web-2"]
    web = usage.machines[0]
    assert (web.private_bytes, web.shared_bytes, web.last_pause_ms, web.cpu_s) == (100, 200, 12.5, 1.5)
    assert (usage.pauses, usage.pause_p50_ms, usage.memory_available_bytes) == (1, 12.5, 8 << 30)
    host.fail("GetUsage", errors.HostUnreachable("hostd is away"))
    await asyncio.sleep(0.6)
    away = await forky.usage()
    assert away.host_error == "hostd is away"
    assert [use.cpu_s for use in away.machines] == [None] * 3


def values(text: str) -> dict[str, float]:
    """Every sample by its name and labels."""
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics(client: Client, forky: Forky) -> None:
    web = await client.run("web")
    await client.fork("web", 2)
    await _exec(client, "web")
    text = await forky.metrics()
    found = values(text)
    assert found["forky_fork_pause_seconds_count"] == 1
    assert found["forky_fork_pause_seconds_bucket|0.015"] == 1
    assert found["forky_fork_pause_seconds_sum"] == pytest.approx(0.0125)
    assert found["forky_machine_ready_seconds_count|fork"] == 2
    assert found["forky_machine_ready_seconds_count|run"] == 1
    assert found["forky_exec_start_seconds_count"] == found["forky_exec_duration_seconds_count"] == 1
    assert found["forky_pager_fault_seconds_count"] == found["forky_pager_fault_seconds_bucket|+Inf"] == 10
    assert found["forky_pager_fault_seconds_bucket|0.01"] == 8
    assert found[f"forky_machine_cpu_seconds_total|{web.id}|web|default"] == 1.5
    assert found[f"forky_machine_memory_private_bytes|{web.id}|web|default"] == 100
    assert found["forky_machines|running"] == 3
    assert found["forky_host_up"] == 1
    await client.machine("RemoveMachine", "web")
    await asyncio.sleep(0.6)
    assert not [name for name in values(await forky.metrics()) if name.endswith(f"|{web.id}|web|default")]


async def _exec(client: Client, machine: str) -> None:
    call = client.agent.Exec(iter([agent_pb2.ExecRequest(start=agent_pb2.ExecStart(machine=machine, argv=["true"]))]))
    assert [response async for response in call]


async def test_metric_names_follow_the_conventions(client: Client, forky: Forky) -> None:
    """What promtool's lint asks for: help, base units, _total on counters and on nothing else."""
    await client.run("web")
    for family in text_string_to_metric_families(await forky.metrics()):
        assert family.name.startswith("forky_"), family.name
        assert family.documentation.endswith("."), family.name
        assert not any(unit in family.name for unit in ("_ms", "millisecond", "_kib", "_mib", "_us")), family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        elif family.type in ("gauge", "histogram"):
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket")), family.name
        for sample in family.samples:
            assert set(sample.labels) <= {"machine", "name", "tenant", "state", "tier", "by", "le", "version"}, sample


async def test_metrics_of_many_machines_are_bounded(
    client: Client, forky: Forky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MOST_MACHINES", 4)
    web = await client.run("web")
    await client.fork("web", 6)
    found = values(await forky.metrics())
    assert sum(name.startswith("forky_machine_cpu_seconds_total|") for name in found) == 4
    assert found["forky_machines_without_series"] == 3
    assert f"forky_machine_cpu_seconds_total|{web.id}|web|default" not in found  # it has the least memory


async def test_metrics_by_http_take_a_token(settings: Settings, host: FakeHost, unused_tcp_port: int) -> None:
    where = f"127.0.0.1:{unused_tcp_port}"
    url = f"http://{where}/metrics"
    async with controller(settings.model_copy(update={"metrics": where, "failed_logins_per_minute": 3})) as app:
        _, token = await app.access.tokens.create(OPERATOR, "", "", Role.METRICS, 0)
        answers = await asyncio.gather(*(asyncio.to_thread(_get, url, token) for _ in range(4)))
        assert all("forky_fork_pause_seconds_bucket" in answer for answer in answers)
        _, admin = await app.access.tokens.create(OPERATOR, "", "", Role.ADMIN, 0)
        refused = [("", 401), (f"fp_0123456789ab_{'x' * 43}", 401), (admin, 403), ("", 401), ("", 429), (admin, 403)]
        for given, status in refused:  # whoever has come in is not kept out by who fails from the same address
            with pytest.raises(urllib.error.HTTPError) as caught:
                await asyncio.to_thread(_get, url, given)
            assert caught.value.code == status
        assert "forky_build_info" in await asyncio.to_thread(_get, url, token)
        lines = [json.loads(line) for line in (settings.audit / "audit.jsonl").read_text().splitlines()]
        assert [line["result"] for line in lines] == [
            *("UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNAUTHENTICATED"),
            *("RESOURCE_EXHAUSTED", "PERMISSION_DENIED"),
        ]
        (settings.home / "b").mkdir()
        with pytest.raises(errors.NotPossibleNow, match="can't be served at FORKY_METRICS"):
            async with controller(settings.model_copy(update={"metrics": where, "home": settings.home / "b"})):
                pass
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(_get, url, "")


async def test_who_sends_a_byte_now_and_then_keeps_no_metrics_from_others(
    settings: Settings, host: FakeHost, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scraping, "_MOST_AT_ONCE", 1)
    monkeypatch.setattr(scraping, "_MOST_S", 1.0)
    where = f"127.0.0.1:{unused_tcp_port}"
    async with controller(settings.model_copy(update={"metrics": where})):
        reader, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)

        async def drip() -> None:
            while True:
                writer.write(b"G")
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        assert await asyncio.wait_for(reader.read(1), 10) == b""
        dripping.cancel()
        writer.close()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            await asyncio.to_thread(_get, f"http://{where}/metrics", "")


def _get(url: str, token: str, tls: ssl.SSLContext | None = None) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=20, context=tls) as answer:
        text: str = answer.read().decode()
        return text


async def test_metrics_are_not_shown_to_the_network(settings: Settings) -> None:
    child = await asyncio.create_subprocess_exec(
        *("env", f"FORKY_HOME={settings.home}", "FORKY_METRICS=0.0.0.0:9464"),
        *(sys.executable, "-m", "forkypig.controller"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode == 1
    assert said.decode().count("\n") == 1, said
    assert "`forky auth init`, or use 127.0.0.1:9464" in said.decode()


async def test_metrics_by_tls(settings: Settings, host: FakeHost, unused_tcp_port: int) -> None:
    """Also beside those who connect and say nothing; and who speaks no TLS gets nothing."""
    authority = Authority(settings.auth)
    authority.make(["::1"])
    where = f"[::1]:{unused_tcp_port}"
    async with controller(settings.model_copy(update={"metrics": where})) as app:
        _, token = await app.access.tokens.create(OPERATOR, "", "", Role.METRICS, 0)
        with contextlib.ExitStack() as silent:
            for _ in range(20):
                silent.enter_context(socket.create_connection(("::1", unused_tcp_port)))
            tls = ssl.create_default_context(cafile=str(authority.certificate))
            url = f"https://{where}/metrics"
            assert "forky_build_info" in await asyncio.to_thread(_get, url, token, tls)
            with pytest.raises(OSError, match=r"reset|closed"):
                await asyncio.to_thread(_get, f"http://{where}/metrics", token)


async def test_the_dashboard_asks_for_what_there_is(client: Client, forky: Forky) -> None:
    await client.run("web")
    await _exec(client, "web")
    there = {
        sample.name for family in text_string_to_metric_families(await forky.metrics()) for sample in family.samples
    }
    board = json.loads((Path(__file__).parents[2] / "packaging/grafana/forky-pig.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [each["definition"] for each in board["templating"]["list"] if "definition" in each]
    named = {name for text in asked for name in re.findall(r"forky_\w+", text)}
    assert len(named) >= 15
    assert named - there == set()
    # And what is there is shown: all but the parts of histograms that a quantile does not need.
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in named}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in there} - shown == {
        "forky_machine_memory_resident_bytes"
    }
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
