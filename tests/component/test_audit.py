"""The audit log: what it tells, what it never tells, its turns, and a disk that is full."""

import asyncio
import errno
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forkypig import errors
from forkypig.controller.audit import AuditLog
from forkypig.daemon.settings import Settings
from forkypig.model.access import AuditEntry
from forkypig.v1 import agent_pb2, common_pb2, store_pb2, store_pb2_grpc
from forkypig.v1 import auth_pb2 as pb
from forkypig.v1 import controller_pb2 as controller
from tests.component.access_rig import Served, serving
from tests.component.controller_rig import eventually, home, running_host


def entry(number: int = 0, method: str = "Controller/Fork") -> AuditEntry:
    return AuditEntry(number, "token:0", "acme", "user", method, f"machine=web-{number}", "OK", 1.5, "ipv4:127.0.0.1:1")


async def lines_with(served: Served, *methods: str) -> list[dict[str, Any]]:
    log = await served.audit_with(*(f'"{method}"' for method in methods))
    return [json.loads(line) for line in log.splitlines()]


async def test_who_did_what_with_which_result_and_no_secrets() -> None:
    with home() as settings:
        async with running_host(settings), serving(settings) as served:
            text = await served.token("user", "acme")
            async with served.client(text) as caller:
                machine = (await caller.run_all("web"))[-1].result.machine
                await caller.call("ListMachines")
                with pytest.raises(errors.NotFound):
                    await caller.call("RemoveMachine", controller.MachineRequest(machine="nothing"))
                with pytest.raises(errors.PermissionDenied):
                    await caller.call("Doctor")
                start = agent_pb2.ExecStart(machine="web", argv=["echo", "pa55word"], environment={"KEY": "5ecret"})
                call = caller.agent.Exec(iter([agent_pb2.ExecRequest(start=start)]), **caller.options)
                assert [answer async for answer in call]
                url = "s3://me:h1dden@bucket/path?token=qu3ry"
                push = store_pb2.PushRequest(snapshot="web", url=url, environment={"AWS_SECRET_ACCESS_KEY": "s3cret"})
                with pytest.raises(Exception, match="no snapshot"):
                    stub: Any = store_pb2_grpc.StoreStub(caller.channel)
                    assert [part async for part in stub.PushSnapshot(push, **caller.options)]
            async with served.client("fp_000000000000_" + "x" * 43) as nobody:
                with pytest.raises(errors.Unauthenticated):
                    await nobody.call("ListMachines")
            found = await lines_with(
                served,
                *("Controller/RunMachine", "Controller/RemoveMachine", "Controller/Doctor", "Controller/ListMachines"),
                *("Agent/Exec", "Store/PushSnapshot", "Auth/CreateToken"),
            )
            by_method = {line["method"]: line for line in found}
            who = f"token:{text[3:15]}"
            run = by_method["Controller/RunMachine"]
            assert (run["who"], run["tenant"], run["role"], run["result"]) == (who, "acme", "user", "OK")
            assert run["about"] == f"name=web -> {machine.id}"
            assert run["duration_ms"] > 0
            assert run["peer"].startswith("unix:")
            assert by_method["Controller/RemoveMachine"]["result"] == "NOT_FOUND"
            assert by_method["Controller/Doctor"]["result"] == "PERMISSION_DENIED"
            assert by_method["Agent/Exec"]["about"] == "machine=web"
            assert by_method["Store/PushSnapshot"]["about"] == "snapshot=web url=s3://bucket/path"
            assert by_method["Auth/CreateToken"]["who"] == "operator"
            # Who only looks is not written down, unless they may not.
            listed = [line for line in found if line["method"] == "Controller/ListMachines"]
            assert [(line["who"], line["result"]) for line in listed] == [("", "UNAUTHENTICATED")]
            for secret in (text[16:], "pa55word", "5ecret", "h1dden", "qu3ry", "s3cret"):
                assert secret not in served.audit()
            assert os.stat(served.settings.audit / "audit.jsonl").st_mode & 0o777 == 0o600


async def test_reads_and_commands_where_they_are_asked_for() -> None:
    with home() as plain:
        settings = Settings(home=plain.home, audit_reads=True, audit_commands=True)
        async with running_host(settings), serving(settings) as served, served.client() as caller:
            await caller.run_all("web")
            await caller.call("GetMachine", controller.MachineRequest(machine="web"))
            start = agent_pb2.ExecStart(machine="web", argv=["echo", "word"])
            assert [a async for a in caller.agent.Exec(iter([agent_pb2.ExecRequest(start=start)]), timeout=30)]
            found = await lines_with(served, "Controller/GetMachine", "Agent/Exec")
            about = {line["method"]: line["about"] for line in found}
            assert about["Controller/GetMachine"] == "machine=web"
            assert about["Agent/Exec"] == "machine=web argv=['echo', 'word']"


async def test_admins_read_their_tenants_and_follow() -> None:
    with home() as settings:
        async with running_host(settings), serving(settings) as served:
            admin, other = await served.token("admin", "acme"), await served.token("user", "other")
            async with served.client(admin) as caller, served.client(other) as theirs, served.client() as operator:
                await theirs.run_all("theirs")
                call = caller._auth.ReadAudit(pb.ReadAuditRequest(follow=True), metadata=caller.metadata)
                await asyncio.sleep(0.1)
                await caller.run_all("ours")
                seen = await asyncio.wait_for(call.read(), 30)
                assert (seen.method, seen.tenant) == ("Controller/RunMachine", "acme")
                call.cancel()
                await served.audit_with('"Auth/ReadAudit"')
                everything = [e async for e in operator._auth.ReadAudit(pb.ReadAuditRequest(), timeout=30)]
                assert {"acme", "other", "default"} <= {e.tenant for e in everything}

                async def that_is_told() -> bool:
                    return served.audit().count('"Auth/ReadAudit"') == 2

                await eventually(that_is_told)
                late = pb.ReadAuditRequest(since_us=everything[-1].time_us + 1)
                rest = [e async for e in operator._auth.ReadAudit(late, timeout=30)]
                assert [e.method for e in rest] == ["Auth/ReadAudit"]
                with pytest.raises(errors.PermissionDenied):
                    await theirs.auth("ListTokens", common_pb2.Empty())


async def test_full_files_are_compressed_and_the_oldest_go(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit", file_bytes=4000, files=3)
    for number in range(200):
        audit.write(entry(number))
        if number % 20 == 0:
            await asyncio.sleep(0.02)
    await audit.close()
    audit = AuditLog(tmp_path / "audit", file_bytes=4000, files=3)
    kept = sorted(path.name for path in audit._directory.glob("audit*"))
    assert kept[-1] == "audit.jsonl"
    assert 3 <= len([name for name in kept if name.endswith((".gz", ".jsonl"))]) <= 5
    for path in audit._directory.glob("*.gz"):
        assert path.stat().st_mode & 0o777 == 0o600
        assert gzip.decompress(path.read_bytes()).endswith(b"\n")
    read = [each.time_us async for each in audit.read(0, follow=False)]
    assert read == list(range(read[0], 200))
    assert [each.time_us async for each in audit.read(190, follow=False)] == list(range(190, 200))
    await audit.close()


async def test_following_goes_on_over_a_turn(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit", file_bytes=1000, files=10)
    reading = audit.read(0, follow=True)
    audit.write(entry(0))
    seen = [(await anext(reading)).time_us]
    for number in range(1, 10):
        audit.write(entry(number))
    while len(seen) < 10:
        seen.append((await asyncio.wait_for(anext(reading), 30)).time_us)
    assert seen == list(range(10))
    await reading.aclose()
    await audit.close()


async def test_a_full_disk_refuses_what_would_not_be_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = AuditLog(tmp_path / "audit", file_bytes=1 << 20, files=1)
    real, room = os.write, 50  # bytes that are left: less than a line

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if fd != audit._fd:
            return real(fd, data)
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", write)
    audit.write(entry(0))
    audit.write(entry(1))
    with pytest.raises(errors.ResourceExhausted, match="free space"):
        audit.begin("/forkypig.v1.Controller/Fork", entry(2))
    assert audit.begin("/forkypig.v1.Controller/RemoveMachine", entry(2)) == 0
    room = 1 << 20
    assert audit.begin("/forkypig.v1.Controller/Fork", entry(2)) > 0
    assert [each async for each in audit.read(0, follow=False)] == [entry(0), entry(1)]
    await audit.close()


async def test_what_was_under_way_at_a_kill_is_told_by_the_next(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path, file_bytes=1 << 20, files=1)
    method = "/forkypig.v1.Controller/Fork"
    audit.begin(method, entry(1))
    second, third = audit.begin(method, entry(2)), audit.begin(method, entry(3))
    audit.write(entry(2), second)
    audit.write(entry(0))  # of one that only looked
    with (tmp_path / "begun.json").open("ab") as file:
        file.write(b'{"n": 9, "tim')  # torn
    for _ in range(2):  # it is told once
        audit = AuditLog(tmp_path, file_bytes=1 << 20, files=1)
        told = [each async for each in audit.read(0, follow=False)]
        lost = [replace(entry(number), result="INTERRUPTED") for number in (1, 3)]
        assert told == [entry(2), entry(0), *lost]
    assert third
    assert (tmp_path / "begun.json").stat().st_size == 0
    await audit.close()


async def test_what_is_noted_of_calls_under_way_does_not_grow(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path, file_bytes=64 << 20, files=1)
    for number in range(1000):
        audit.write(entry(number), audit.begin("/forkypig.v1.Controller/Fork", entry(number)))
    assert (tmp_path / "begun.json").stat().st_size < 65 << 10
    await audit.close()
