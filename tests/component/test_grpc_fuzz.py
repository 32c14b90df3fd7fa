"""Every method of the daemons' services fuzzed: bytes that are no message, messages of odd values, and too much.
Nothing fails on our side, and the daemon is well afterwards. The same examples in every run."""

import asyncio
import contextlib
import math
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from forkypig.controller.app import SERVICES
from forkypig.v1 import common_pb2, controller_pb2, host_pb2_grpc, tenants_pb2
from tests.component.controller_rig import Client, home, serving
from tests.component.pager_rig import running_pager
from tests.component.rest_rig import running_guests

EXAMPLES = int(os.environ.get("FORKY_FUZZ_EXAMPLES", "4"))  # of each method
_OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DATA_LOSS)
_NOT_OURS = (
    *("Method not found!", "Method not implemented!"),  # the fake host has no store
    "this export is cut off: it ends before its end",
    "Internal error from Core",  # gRPC's client, of a stream that ended while it was writing
)
_THERE = ("web", "clean", "debian-12", "py", "default")  # half of the names are of what is there
_TEXTS = (
    *("", "a/b", "../../etc/passwd", "a\0b", ".", "-", "x" * 10_000, "Ärger\u202e🐷", "m-000000000000", "s-0", "*"),
    *("/etc/motd", "file:///dev/null", "s3://x", "user", "2/m-0"),
)
_NUMBERS = (0, 1, 2, 3, 7, 1 << 15, (1 << 31) - 1)
_LARGE = (1 << 32, (1 << 53) + 1, (1 << 63) - 1)
_FLOATS = (0.0, -0.0, 0.01, -1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf)


def _methods(services: Sequence[str] = SERVICES) -> Iterator[MethodDescriptor]:
    pool = descriptor_pool.Default()
    for service in services:
        yield from pool.FindServiceByName(service).methods


def _value(field: FieldDescriptor, dice: random.Random, depth: int) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = dice.choice(_THERE) if dice.random() < 0.5 else dice.choice(_TEXTS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return dice.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return dice.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return dice.choice((0, 1, 2, 99))
    wide = kind in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
    signed = kind in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_INT32)
    # Thousands of children, or a follower of all history, say no more than three.
    few = field.name in ("count", "page_size")
    return dice.choice((0, 1, 3) if few else (*_NUMBERS, *(_LARGE if wide else ()), *((-1,) if signed else ())))


def _fill(message: Message, dice: random.Random, depth: int = 0) -> Message:
    for field in message.DESCRIPTOR.fields:
        if dice.random() < 0.3 and depth:
            continue
        if field.message_type is None:
            values = [_value(field, dice, depth) for _ in range(dice.randrange(3))]
            if field.is_repeated:
                getattr(message, field.name).extend(values)
            elif values:
                setattr(message, field.name, values[0])
        elif field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[dice.choice(_TEXTS)] = dice.choice(_TEXTS)
        elif depth < 4:
            inner = getattr(message, field.name)
            _fill(inner.add() if field.is_repeated else inner, dice, depth + 1)
    return message


def _requests(method: MethodDescriptor, dice: random.Random, examples: int = EXAMPLES) -> list[bytes]:
    made = message_factory.GetMessageClass(method.input_type)
    examples = examples if method.input_type.fields else 1
    return [
        dice.randbytes(dice.choice((1, 7, 300))),
        *(_fill(made(), dice).SerializeToString() for _ in range(examples)),
    ]


async def _answer(
    channel: grpc.aio.Channel, method: MethodDescriptor, sent: list[bytes], timeout_s: float = 2
) -> grpc.StatusCode:
    """How the call ends; one that does not end by itself is left after a moment."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(channel, kind)(path)(iter(sent) if method.client_streaming else sent[0], timeout=timeout_s)
    try:
        if not method.server_streaming:
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        if error.code() in _OURS and error.details() not in _NOT_OURS:
            pytest.fail(f"{path} {sent!r:.2000}: {error.code()} {error.details()}")
        return error.code()
    return grpc.StatusCode.OK


async def test_whatever_is_sent() -> None:
    dice = random.Random(2026)
    with home() as settings:
        async with running_guests(settings), serving(settings) as client:
            await client.run("web")
            await client.call("TakeSnapshot", controller_pb2.TakeSnapshotRequest(machine="web", tag="clean"))
            seen: Counter[grpc.StatusCode] = Counter()
            options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
            async with grpc.aio.insecure_channel(f"unix:{settings.socket('controller')}", options) as channel:
                for method in _methods():
                    for raw in _requests(method, dice):
                        seen[await _answer(channel, method, [raw] * (2 if method.client_streaming else 1))] += 1
                # More than a message may have, and then one more call on the same connection.
                large = controller_pb2.MachineRequest(machine="x" * (65 << 20)).SerializeToString()
                get = next(each for each in _methods() if each.name == "GetMachine")
                assert await _answer(channel, get, [large], 60) is grpc.StatusCode.RESOURCE_EXHAUSTED
                web = await _answer(channel, get, [b"\n\x03web"], 60)
                assert web in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)
            assert seen[grpc.StatusCode.INVALID_ARGUMENT] > len(seen)
            assert seen[grpc.StatusCode.OK] > 10
            await _is_well(client)


async def _is_well(client: Client) -> None:
    # What was sent may have limited the tenant.
    limits = [field.name for field in tenants_pb2.Quota.DESCRIPTOR.fields]
    await client.tenants.SetQuota(tenants_pb2.SetQuotaRequest(tenant="default", unlimited=limits))
    await client.run("after", cold_boot=True)
    assert "after" in await client.machines()
    assert not any(machine.operation for machine in (await client.machines()).values())


_OF_HOSTD = tuple(f"forkypig.v1.{name}" for name in ("Host", "Agent", "HostStore", "HostObservation"))
_NOT_TRIED = {"Shutdown", "SetKsm", "BuildImage"}  # they end it, or change the computer


async def test_whatever_is_sent_to_the_daemons_of_a_host() -> None:
    """And a machine whose memory they serve has it afterwards."""
    dice = random.Random(2026)
    async with running_pager() as pager:
        guest = pager.guest(None, 1 << 20)
        guest.write(0, b"mine")
        snapshot = await pager.split(guest, None, 1 << 20)
        async with running_hostd(pager.home) as hostd:
            for name, services in {"hostd": _OF_HOSTD, "pager": ("forkypig.v1.Pager",)}.items():
                path = pager.home / "run" / f"{name}.sock"
                with contextlib.ExitStack() as silent:
                    for _ in range(200):
                        connection = silent.enter_context(socket.socket(socket.AF_UNIX))
                        connection.connect(str(path))
                        connection.send(dice.choice((dice.randbytes(40), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")))
                    seen: Counter[grpc.StatusCode] = Counter()
                    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                        for method in _methods(services):
                            # Few of the store's: each starts a process.
                            few = EXAMPLES // 4 if "Store" in method.containing_service.name else EXAMPLES // 2
                            for raw in [] if method.name in _NOT_TRIED else _requests(method, dice, few):
                                seen[await _answer(channel, method, [raw] * (2 if method.client_streaming else 1))] += 1
                assert seen[grpc.StatusCode.INVALID_ARGUMENT] > len(seen)
                assert seen[grpc.StatusCode.OK] > len(seen)
            assert hostd.returncode is None
        assert pager.guest(snapshot, 1 << 20).read(0, 4) == b"mine"


@contextlib.asynccontextmanager
async def running_hostd(home: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """hostd itself, without images and so without machines."""
    given = {"FORKY_HOME": str(home), "FORKY_ACCELERATOR": "tcg", "FORKY_NETWORK": "none"}
    with (home / "hostd.log").open("wb") as log:
        hostd = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forkypig.hostd"), env={**os.environ, **given}, stderr=log
        )
    try:
        async with grpc.aio.insecure_channel(f"unix:{home}/run/hostd.sock") as channel:
            await host_pb2_grpc.HostStub(channel).GetHostStatus(common_pb2.Empty(), timeout=30, wait_for_ready=True)
        yield hostd
    finally:
        hostd.terminate()
        await hostd.wait()
