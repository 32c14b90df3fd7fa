"""The asynchronous SDK against a controller on a real socket."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig import Forky, errors, model
from tests.component.fake_controller import Instance


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    made = Instance(tmp_path / "h")
    await made.start()
    yield made
    await made.stop()


async def test_three_lines(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web", memory_mib=1024)
        made = await web.fork(3)
        assert web.info.shape.memory_mib == 1024
        assert web.ready_ms == 41.5
        assert made.pause_ms == 12.5
        assert [child.name for child in made.children] == ["web-1", "web-2", "web-3"]
        assert all(child.ready_ms == 33.25 and child.info.parent == web.id for child in made.children)
        assert [machine.name for machine in await forky.list()] == ["web", "web-1", "web-2", "web-3"]


async def test_progress_comes_before_the_machine(instance: Instance) -> None:
    told: list[model.Progress] = []
    async with Forky(instance.home) as forky:
        await forky.run(on_progress=told.append)
    assert told == [model.Progress("booting", 1, 2)]


async def test_errors_are_those_that_the_daemon_raised(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        with pytest.raises(errors.AlreadyExists, match="named «web» exists already"):
            await forky.run(name="web")
        with pytest.raises(errors.Busy, match="busy: forking"):
            await web.pause()
        with pytest.raises(errors.NotFound, match="no machine «nobody»"):
            await forky.get("nobody")
        with pytest.raises(errors.InvalidRequest, match="1 to 1000"):
            await web.fork(0)


async def test_a_dead_controller_is_named_with_the_way_out(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        await instance.server.stop(None)  # type: ignore[union-attr]
        with pytest.raises(
            errors.HostUnreachable, match=r"controller at .* can't be reached: start it with `forky up`"
        ):
            await forky.list()
    await instance.server.wait_for_termination()  # type: ignore[union-attr]


async def test_nothing_runs_and_nothing_may_be_started(tmp_path: Path) -> None:
    with pytest.raises(errors.HostUnreachable, match="nothing runs in"):
        await Forky(tmp_path, start=False).connect()


async def test_handles_need_a_connection(tmp_path: Path) -> None:
    with pytest.raises(errors.NotPossibleNow, match="not connected"):
        await Forky(tmp_path).list()


async def test_events_go_on_over_pages(instance: Instance) -> None:
    instance.controller.events = [model.Event(sequence=n, time_us=n, kind="k", subject="s") for n in range(1, 2502)]
    async with Forky(instance.home) as forky:
        assert [event.sequence async for event in forky.events()] == list(range(1, 2502))
        assert [event.sequence async for event in forky.events(after_sequence=2490, limit=4)] == [
            2491,
            2492,
            2493,
            2494,
        ]


async def test_exec_gathers_both_outputs_and_the_code(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        result = await web.exec(["sh", "-c", "cat; echo $K; echo no >&2; exit 7"], environment={"K": "v"}, stdin=b"in ")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"in v\n", b"no\n")


async def test_exec_of_more_than_pipes_hold_both_ways(instance: Instance) -> None:
    data = bytes(range(256)) * 20_000
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        assert (await web.exec(["cat"], stdin=data)).stdout == data


async def test_exec_that_leaves_its_input(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        assert (await web.exec(["true"], stdin=bytes(5_000_000))).exit_code == 0
        for _ in range(10):  # gRPC calls the whole call broken when a write comes after the end
            done = await web.exec(["sh", "-c", "exec <&-; printf %0500000d 7"], stdin=bytes(5_000_000))
            assert (done.exit_code, len(done.stdout)) == (0, 500_000)


async def test_exec_that_can_not_start_or_takes_too_long(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        missing = await web.exec(["no-such-program-here"])
        assert (missing.exit_code, missing.failure) == (127, "no such program")
        late = await web.exec(["sleep", "30"], timeout_s=0.2)
        assert (late.exit_code, late.timed_out) == (124, True)


async def test_exec_refuses_what_no_machine_could_run(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        for argv in ("ls -l", [], [""], ["a\0b"]):
            with pytest.raises(errors.InvalidRequest):
                await web.exec(argv)
        with pytest.raises(errors.GuestUnresponsive, match="does not answer"):
            await web.exec(["hang-agent"])


async def test_streaming_answers_while_the_command_runs(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        async with web.process(["cat"], stdin=True) as process:
            await process.write(b"one")
            outputs = aiter(process)
            assert (await anext(outputs)).data == b"one"
            with pytest.raises(errors.NotPossibleNow, match="not ended"):
                _ = process.exit_code
            await process.write(b"two")
            assert (await anext(outputs)).data == b"two"
            await process.close_stdin()
            assert await process.wait() == 0


async def test_signals_reach_the_command(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        async with web.process(["sleep", "30"]) as process:
            await process.terminate()
            assert await process.wait() == 128 + 15


async def test_leaving_the_block_ends_the_command(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        async with web.process(["sh", "-c", "echo up; exec sleep 30"]) as process:
            await anext(aiter(process))
    async with asyncio.timeout(30):
        while instance.agent.ended != [process.pid]:
            await asyncio.sleep(0.01)


async def test_a_terminal_has_a_size_that_changes(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        argv = ["sh", "-c", "stty size; read line; stty size"]
        async with web.process(argv, terminal=(30, 100), stdin=True) as process:
            seen = b""
            async for output in process:
                seen += output.data
                if seen == b"30 100\r\n":
                    await process.resize(50, 132)
                    await process.write(b"\n")
        assert seen.endswith(b"50 132\r\n")


async def test_console(instance: Instance) -> None:
    async with Forky(instance.home) as forky:
        web = await forky.run(name="web")
        assert b"".join([data async for data in web.console()]) == b"Linux version 6.1\nlogin: \xff\n"
