"""What the edge adds to a call: `python -m bench.edge`. Controller, caller and a host that is none, in one process.

Prints the median and the 99th percentile in ms of GetMachine by the operator, with a token, and over TLS with a token,
and without the edge; and of PauseMachine with ResumeMachine, with an idempotency key and without. All in turn, so that
what else the computer does hits all alike.
"""

import asyncio
import contextlib
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from forkypig.certificates.authority import Authority
from forkypig.daemon.settings import Settings
from forkypig.v1 import controller_pb2 as pb
from tests.component.access_rig import Caller, serving
from tests.component.controller_rig import home, running_host

ROUNDS = 1000


async def main() -> None:
    async with contextlib.AsyncExitStack() as stack:
        place = stack.enter_context(home())
        Authority(place.auth).make(["localhost"])
        settings = Settings(home=place.home, listen="127.0.0.1:0", rate_per_s=0)
        await stack.enter_async_context(running_host(settings))
        served = await stack.enter_async_context(serving(settings))
        text = await served.token()
        operator = await stack.enter_async_context(served.client())
        holder = await stack.enter_async_context(served.client(text))
        bare = grpc.aio.server()
        served.app.register(bare)
        bare.add_insecure_port(f"unix:{settings.run / 'bare.sock'}")
        await bare.start()
        stack.push_async_callback(bare.stop, None)
        without = Caller(
            await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{settings.run / 'bare.sock'}"))
        )
        credentials = grpc.ssl_channel_credentials((settings.auth / "ca.crt").read_bytes())
        channel = grpc.aio.secure_channel(f"localhost:{served.ports[0]}", credentials)
        far = Caller(await stack.enter_async_context(channel), text)
        await operator.run_all("web")
        request = pb.MachineRequest(machine="web")
        await compare(
            {
                "without the edge": lambda: without.call("GetMachine", request),
                "operator": lambda: operator.call("GetMachine", request),
                "token": lambda: holder.call("GetMachine", request),
                "token over TLS": lambda: far.call("GetMachine", request),
            },
            ROUNDS,
        )

        async def pause_and_resume(caller: Caller, *, keyed: bool) -> None:
            plain = list(caller.metadata)
            for method in ("PauseMachine", "ResumeMachine"):
                caller.metadata = [*plain, ("idempotency-key", secrets.token_hex(16))] if keyed else plain
                await caller.call(method, request)
            caller.metadata = plain

        await compare(
            {
                "pause and resume, without the edge": lambda: pause_and_resume(without, keyed=False),
                "pause and resume": lambda: pause_and_resume(operator, keyed=False),
                "pause and resume, with keys": lambda: pause_and_resume(operator, keyed=True),
            },
            ROUNDS // 5,
        )


async def compare(ways: dict[str, Callable[[], Awaitable[Any]]], rounds: int) -> None:
    took_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            began = time.perf_counter()
            await call()
            took_ms[name].append((time.perf_counter() - began) * 1000)
    for name, values in took_ms.items():
        print(f"{name:36} p50 {statistics.median(values):6.2f}  p99 {statistics.quantiles(values, n=100)[98]:6.2f} ms")


asyncio.run(main())
