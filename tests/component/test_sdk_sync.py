"""The blocking SDK, called from a thread while the controller serves on the test's loop."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from forkypig import errors, sync
from forkypig.sdk import client, machine, process
from tests.component.fake_controller import Instance


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    made = Instance(tmp_path / "home")
    await made.start()
    yield made
    await made.stop()


async def in_thread(work: Callable[[], None]) -> None:
    await asyncio.wait_for(asyncio.to_thread(work), 60)


async def test_a_session(instance: Instance, tmp_path: Path) -> None:
    def session() -> None:
        with sync.Forky(instance.home) as forky:
            web = forky.run(name="web", ttl_s=60)
            children = web.fork(2, ttl_s=60).children
            assert all(machine.info.expires_us for machine in (web, *children))
            assert [child.name for child in children] == ["web-1", "web-2"]
            assert forky.get("web-1") == children[0]
            assert web.exec(["echo", "hi"]).stdout == b"hi\n"
            web.write_file("/root/a", b"data")
            web.download("/root/a", tmp_path / "a")
            assert (tmp_path / "a").read_bytes() == web.read_file("/root/a") == b"data"
            assert b"".join(web.console()).startswith(b"Linux")
            with pytest.raises(errors.Busy):
                web.pause()
            web.remove()
            assert [each.name for each in forky.list()] == ["web-1", "web-2"]
        with pytest.raises(errors.NotPossibleNow, match="not connected"):
            forky.list()

    await in_thread(session)


async def test_streaming(instance: Instance) -> None:
    def session() -> None:
        with sync.Forky(instance.home) as forky, forky.run().process(["cat"], stdin=True) as cat:
            outputs = iter(cat)
            cat.write(b"one")
            assert next(outputs).data == b"one"
            cat.close_stdin()
            assert list(outputs) == []
            assert cat.exit_code == 0

    await in_thread(session)


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [(sync.Forky, client.Forky), (sync.Machine, machine.Machine), (sync.Process, process.Process)],
)
def test_every_verb_is_there_with_the_same_arguments(blocking: type, asynchronous: type) -> None:
    public = {
        name: member
        for name, member in inspect.getmembers(asynchronous, inspect.isfunction)
        if not name.startswith("_")
    }
    assert public
    for name, member in public.items():
        ours = inspect.signature(getattr(blocking, name)).parameters.values()
        theirs = inspect.signature(member).parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], name
