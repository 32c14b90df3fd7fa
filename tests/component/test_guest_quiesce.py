"""Standing still: no user process runs between `quiesce` and a word that it may. With the kernel's own freezer."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forkypig.errors import GuestUnresponsive, NotPossibleNow
from forkypig.guest.calls import ExecSpec, Exited, Started
from tests.component.guest_rig import ME, Guest, greeted, run, started

COUNT = "import sys, time\nn = 0\nwhile True:\n n += 1; open(sys.argv[1], 'w').write(f'{n:9}'); time.sleep(0.002)"


def hierarchy() -> Path | None:
    """Where cgroup v2 is mounted, if this process may make groups in it."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if " cgroup2 " in line and os.access(line.split()[1], os.W_OK) and os.geteuid() == 0:
            return Path(line.split()[1])
    return None


@pytest.fixture
def group() -> Iterator[Path]:
    root = hierarchy()
    if root is None:
        pytest.skip("freezing processes takes root and a cgroup v2 hierarchy")
    group = root / f"forky-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for freeze in group.glob("*/cgroup.freeze"):
            freeze.write_text("0")
        deadline = time.monotonic() + 30
        while group.exists():
            for directory in (*group.glob("*/*/"), *group.glob("*/"), group):
                for pid in (directory / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                with contextlib.suppress(OSError):
                    directory.rmdir()
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.asynccontextmanager
async def freezable(tmp_path: Path, group: Path, settings: str = "") -> AsyncIterator[Guest]:
    wrapper = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    async with started(tmp_path, wrapper=wrapper, options=["--cgroups", str(group)], settings=settings) as guest:
        yield await greeted(guest)


@pytest.fixture
async def guest(tmp_path: Path, group: Path) -> AsyncIterator[Guest]:
    async with freezable(tmp_path, group) as guest:
        yield guest


async def start(guest: Guest, *argv: str) -> int:
    begun = await anext(await guest.channel.exec(ExecSpec(argv=argv)))
    assert isinstance(begun, Started), begun
    return begun.pid


async def counters(guest: Guest, directory: Path, number: int) -> list[Path]:
    """Processes that count in files."""
    paths = [directory / f"count-{n}" for n in range(number)]
    for path in paths:
        await start(guest, sys.executable, "-c", COUNT, str(path))
    async with asyncio.timeout(30):
        while not all(path.exists() and path.read_text().strip() for path in paths):
            await asyncio.sleep(0.02)
    return paths


def values(paths: list[Path]) -> list[str]:
    return [path.read_text() for path in paths]


async def stand_still(paths: list[Path]) -> bool:
    before = values(paths)
    await asyncio.sleep(0.1)
    return values(paths) == before


async def all_move(paths: list[Path]) -> bool:
    before = values(paths)
    async with asyncio.timeout(30):
        while any(now == was for now, was in zip(values(paths), before, strict=True)):
            await asyncio.sleep(0.01)
    return True


async def test_all_stand_still_and_go_on(guest: Guest, tmp_path: Path) -> None:
    await guest.reopen("run", replace(ME, forked=False))
    paths = await counters(guest, tmp_path, 3)
    generation = (guest.root / "run/forky/generation").read_text()
    await guest.channel.quiesce(20)
    assert await stand_still(paths)
    await guest.channel.quiesce(20)  # once more changes nothing
    assert (guest.root / "run/forky/generation").read_text() == generation
    await guest.channel.thaw()
    assert await all_move(paths)
    await guest.channel.thaw()
    await guest.channel.quiesce(20)
    assert await stand_still(paths)
    await guest.channel.thaw()
    assert await all_move(paths)


async def test_groups_of_the_guests_own_stand_still_too(guest: Guest, tmp_path: Path, group: Path) -> None:
    """A container's group in a group; one that its engine has frozen stays so."""
    paths = await counters(guest, tmp_path, 3)
    outside = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    counting = [pid for pid in outside if pid != guest.process.pid]
    (group / "engine/container").mkdir(parents=True)
    (group / "paused").mkdir()
    (group / "engine/container/cgroup.procs").write_text(str(counting[0]))
    (group / "paused/cgroup.procs").write_text(str(counting[1]))
    (group / "paused/cgroup.freeze").write_text("1")
    await guest.channel.quiesce(20)
    assert await stand_still(paths)
    assert (group / "engine/container/cgroup.procs").read_text().split() == [str(counting[0])]
    await guest.channel.thaw()
    moving = [path for path in paths if path != paths[1]]
    assert await all_move(moving)
    assert await stand_still([paths[1]])


async def test_processes_that_fork_all_the_time_are_caught(guest: Guest, tmp_path: Path, group: Path) -> None:
    await start(guest, "sh", "-c", f"while :; do (echo x >> {tmp_path}/log); done")
    await start(guest, "sh", "-c", f"while :; do sh -c 'echo x >> {tmp_path}/log' & wait; done")
    log = tmp_path / "log"
    async with asyncio.timeout(30):
        while not log.exists() or log.read_text().count("x") < 10:
            await asyncio.sleep(0.02)
    await guest.channel.quiesce(20)
    assert await stand_still([log])
    assert (group / "cgroup.procs").read_text().split() == [str(guest.process.pid)]
    await guest.channel.thaw()
    assert await all_move([log])


async def test_commands_that_are_asked_for_meanwhile_begin_later(guest: Guest, tmp_path: Path) -> None:
    await guest.channel.quiesce(20)
    call = await guest.channel.exec(ExecSpec(argv=["sh", "-c", f"cat > {tmp_path}/ran"], stdin=True))
    await call.write(b"data")
    call.close_stdin()
    given_up = await guest.channel.exec(ExecSpec(argv=["touch", str(tmp_path / "never")]))
    given_up.close()
    assert (await guest.channel.stat("/etc")).directory  # what needs no process is answered at once
    assert not (tmp_path / "ran").exists()
    await guest.channel.thaw()
    assert [event async for event in call][-1] == Exited(0)
    assert (tmp_path / "ran").read_bytes() == b"data"
    assert (await run(guest, "echo", "on"))[0] == b"on\n"
    assert not (tmp_path / "never").exists()


async def test_a_child_goes_on_by_itself_after_its_steps(guest: Guest, tmp_path: Path) -> None:
    """The generation has changed, and the hooks have run, before any process sees anything of it."""
    watch = (
        "import sys, time\nfrom pathlib import Path\nroot = Path(sys.argv[1])\n"
        "look = lambda name: (root / name).read_text().strip() if (root / name).exists() else ''\n"
        "first = look('run/forky/generation')\nopen(sys.argv[2], 'w').write('waiting')\n"
        "while look('run/forky/generation') == first and not look('hooked'):\n pass\n"
        "print(look('run/forky/generation') != first, look('hooked'), look('etc/hostname'))"
    )
    hooks = guest.root / "etc/forky/fork.d"
    hooks.mkdir(parents=True)
    (hooks / "10-slow").write_text(f"#!/bin/sh\nsleep 0.3\necho $FORKY_HOSTNAME > {guest.root}/hooked\n")
    (hooks / "10-slow").chmod(0o755)
    call = await guest.channel.exec(
        ExecSpec(argv=["sh", "-c", f'python3 -c "$1" {guest.root} {tmp_path}/w > {tmp_path}/seen', "sh", watch])
    )
    assert isinstance(await anext(call), Started)
    async with asyncio.timeout(30):
        while not (tmp_path / "w").exists():
            await asyncio.sleep(0.02)
    await guest.channel.quiesce(20)
    info = await guest.reopen("run", ME)
    assert info.steps["hook:10-slow"] == ""
    async with asyncio.timeout(30):
        while not (tmp_path / "seen").exists() or not (tmp_path / "seen").read_text():
            await asyncio.sleep(0.02)
    assert (tmp_path / "seen").read_text() == "True child-1 child-1\n"


async def test_no_fresh_entropy_nobody_goes_on(tmp_path: Path, group: Path) -> None:
    wrapper = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    async with started(
        tmp_path,
        "entropy,clock,kernel-hostname,neighbours",
        wrapper=wrapper,
        options=["--cgroups", str(group)],
    ) as guest:
        await greeted(guest)
        paths = await counters(guest, tmp_path, 1)
        await guest.channel.quiesce(20)
        with pytest.raises(GuestUnresponsive, match="fresh entropy"):
            await guest.reopen("run", ME)
        assert await stand_still(paths)


async def test_another_hostd_lets_them_go_on(guest: Guest, tmp_path: Path) -> None:
    paths = await counters(guest, tmp_path, 1)
    await guest.channel.quiesce(20)
    await guest.reopen("run", None)
    assert await all_move(paths)


async def test_the_move_to_a_successor_does_not_let_them_go_on(guest: Guest, tmp_path: Path) -> None:
    """A RESUME may lie in the channel when the machine is split, and a child would read it before its identity."""
    paths = await counters(guest, tmp_path, 1)
    await guest.channel.quiesce(20)
    await guest.move()
    await guest.channel.resumed()
    assert await stand_still(paths)
    await guest.channel.thaw()
    assert await all_move(paths)


async def test_a_guest_that_hears_nothing_goes_on_as_a_copy_would(tmp_path: Path, group: Path) -> None:
    async with freezable(tmp_path, group, settings="agent.FROZEN_S = 0.4") as guest:
        await guest.reopen("run", replace(ME, forked=False))
        generation = guest.root / "run/forky/generation"
        before = generation.read_text()
        paths = await counters(guest, tmp_path, 1)
        await guest.channel.quiesce(20)
        assert await all_move(paths)
        assert generation.read_text() != before


async def test_a_process_that_does_not_stop_is_named_and_all_go_on(
    guest: Guest, tmp_path: Path, deaf_file: Path
) -> None:
    paths = await counters(guest, tmp_path, 1)
    pid = await start(guest, "cat", str(deaf_file))
    seen = 0  # how often in a row it was in an uninterruptible wait: one for a disk is soon over
    async with asyncio.timeout(60):
        while seen < 10:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            seen = seen + 1 if state == "D" else 0
            await asyncio.sleep(0.02)
    with pytest.raises(NotPossibleNow, match=rf"process {pid} \(cat\) is in a system call that can't be interrupted"):
        await guest.channel.quiesce(2)
    assert await all_move(paths)


@pytest.fixture
def deaf_file(tmp_path: Path) -> Iterator[Path]:
    """A file whose reads are never answered, nor can be interrupted: it lies in a FUSE file system."""
    mountpoint = tmp_path / "deaf"
    mountpoint.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, str(mountpoint)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"mounted\n"
        yield mountpoint / "file"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        subprocess.run(["umount", "-l", str(mountpoint)], check=False)


DEAF = """
import asyncio, os, stat, sys, pyfuse3, pyfuse3.asyncio

class Deaf(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o444
        entry.st_size = 4096
        return entry
    async def lookup(self, parent, name, ctx=None):
        return await self.getattr(2)
    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode)
    async def read(self, fh, offset, size):
        await asyncio.sleep(3600)

pyfuse3.asyncio.enable()
pyfuse3.init(Deaf(), sys.argv[1], set(pyfuse3.default_options))
print('mounted', flush=True)
asyncio.run(pyfuse3.main())
"""
