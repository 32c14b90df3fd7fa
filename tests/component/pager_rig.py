"""What the pager's component tests stand on: a real pager on a real mount, and processes that stand in for QEMU.

A «machine» here is a Python process with guest memory: a memfd when it boots cold, or a private mapping of a snapshot's
file. It writes what it is told, and is frozen by SIGSTOP like QEMU.
"""

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from forkypig.errors import HostUnreachable
from forkypig.model import Shape
from forkypig.model.ids import SnapshotId, new_snapshot_id
from forkypig.pager import mount
from forkypig.pager.client import PagerClient
from forkypig.pager.order import Disk, PackOrder

PAGE = 4096
_MACHINE = """
import ctypes, mmap, os, sys
path, size = sys.argv[1], int(sys.argv[2])
if path == "cold":
    # As QEMU's memory-backend-memfd,share=on: the memfd stays open, and the mapping is shared.
    fd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
else:
    # As memory-backend-file,share=off: opened O_RDWR, mapped private and writable.
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    words = line.split()
    if words[0] == "write":
        offset, data = int(words[1]), bytes.fromhex(words[2])
        memory[offset:offset + len(data)] = data
        print("done", flush=True)
    elif words[0] == "dirty":  # every page of a range, with a byte
        for offset in range(int(words[1]), int(words[2]), 4096):
            memory[offset:offset + 4096] = os.urandom(4096)
        print("done", flush=True)
    else:
        offset, length = int(words[1]), int(words[2])
        print(memory[offset:offset + length].hex(), flush=True)
"""

_READER = """
import os, sys
try:
    fd, at, left = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2]), int(sys.argv[3])
    while left and (data := os.pread(fd, min(left, 1 << 20) if left > 0 else 1 << 20, at)):
        sys.stdout.buffer.write(data)
        at, left = at + len(data), left - len(data) if left > 0 else left
except OSError as error:
    sys.exit(error.errno)
"""


class GuestProcess:
    """A process with guest memory."""

    def __init__(self, path: Path | None, size_bytes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _MACHINE, str(path or "cold"), str(size_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid
        self.address = int(self._answer())

    def _answer(self, timeout_s: float = 20.0) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert ready, "the guest process did not answer: its page fault waits"
        return self.process.stdout.readline()

    def _ask(self, text: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self._answer()

    def write(self, offset: int, data: bytes) -> None:
        assert self._ask(f"write {offset} {data.hex()}") == "done\n"

    def dirty(self, start: int, end: int) -> None:
        assert self._ask(f"dirty {start} {end}") == "done\n"

    def read(self, offset: int, length: int) -> bytes:
        return bytes.fromhex(self._ask(f"read {offset} {length}"))

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(60)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class Rig:
    """A pager with a home of its own, and all that is started for a test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.mountpoint = home / "memory"
        self.pager: subprocess.Popen[bytes] | None = None
        self.client: PagerClient
        self.guests: list[GuestProcess] = []

    async def start(self, *, by_systemd: bool = False) -> None:
        words = [sys.executable, "-m", "forkypig.pager"]
        if by_systemd:
            words = ["sh", "-c", f"SYSTEMD_EXEC_PID=$$ exec {' '.join(words)}"]
        environment = {**os.environ, "FORKY_HOME": str(self.home), "FORKY_LOG_LEVEL": "debug"}
        with (self.home / "pager.log").open("ab") as log:
            self.pager = subprocess.Popen(words, env=environment, stderr=log)
        self.client = PagerClient(self.home / "run" / "pager.sock")
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(Exception):
                await self.client.status()
                return
            assert self.pager.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            await asyncio.sleep(0.05)

    def log(self) -> str:
        return (self.home / "pager.log").read_text()

    def told(self, words: str, times: int = 1) -> None:
        """Waits until the pager's log has the words so often."""
        deadline = time.monotonic() + 30
        while self.log().count(words) < times:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def waits_for(self, snapshot: SnapshotId) -> None:
        """Waits until a reader of the snapshot's file, as `content` starts it, stands still in its read."""
        deadline = time.monotonic() + 30
        while True:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    if str(self.file(snapshot)) in stat.with_name("cmdline").read_text().split("\0"):
                        opened = [str(each.readlink()) for each in stat.with_name("fd").iterdir()]
                        state = stat.read_text().rsplit(")", 1)[1].split()[0]
                        if str(self.file(snapshot)) in opened and state == "D":
                            return
            assert time.monotonic() < deadline
            time.sleep(0.02)

    async def stop(self) -> None:
        assert self.pager is not None
        await self.client.__aexit__(None, None, None)
        if self.pager.poll() is None:
            self.pager.terminate()
            await asyncio.to_thread(self.pager.wait, 60)
        else:  # a later keeper
            await asyncio.to_thread(end, self.keeper_pid, signal.SIGTERM)

    async def kill(self) -> None:
        """Keeper and holder at once: either alone would bring the other back."""
        assert self.pager is not None
        await self.client.__aexit__(None, None, None)
        pids = (self.keeper_pid, self.holder_pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self.pager.wait, 60)

    def guest(self, snapshot: SnapshotId | None, size_bytes: int) -> GuestProcess:
        guest = GuestProcess(self.file(snapshot) if snapshot else None, size_bytes)
        self.guests.append(guest)
        return guest

    def file(self, snapshot: SnapshotId, name: str = "memory") -> Path:
        return self.mountpoint / snapshot / name

    async def split(self, guest: GuestProcess, parent: SnapshotId | None, size_bytes: int) -> SnapshotId:
        """Freezes a guest as a new snapshot that stands on `parent`."""
        snapshot = new_snapshot_id()
        path = await self.client.reserve(snapshot, size_bytes, parent, guest.pid, guest.address)
        assert path == self.file(snapshot)
        guest.freeze()
        await self.client.bind(snapshot)
        return snapshot

    async def pack(self, snapshot: SnapshotId, disk: Disk | None = None, devices: Path | None = None) -> int:
        """Packs; returns the bytes that there were to pack."""
        last = 0
        async for progress in self.client.pack(snapshot, order(disk, devices)):
            last = progress.done
        return last

    async def reader_pid(self) -> int:
        """The reader process of the moment."""
        assert self.pager is not None
        return child_of(self.holder_pid, "forkypig.pager.reader")

    @property
    def holder_pid(self) -> int:
        """The process that answers; 0 while there is none."""
        young = child_of(self.keeper_pid, "forkypig.pager.holder")  # it has not said so itself yet
        return young or pid_in(self.home / "run" / "holder.json")

    @property
    def keeper_pid(self) -> int:
        """The process that keeps the holder; 0 while there is none."""
        return pid_in(self.home / "run" / "pager.pid")

    async def kill_keeper(self) -> None:
        await asyncio.to_thread(end, self.keeper_pid, signal.SIGKILL)

    async def next_keeper(self) -> None:
        """Waits until there is one."""
        deadline = time.monotonic() + 60
        while not self.keeper_pid:
            assert time.monotonic() < deadline, self.log()
            await asyncio.sleep(0.05)

    async def state(self, snapshot: SnapshotId) -> int | None:
        try:
            status = await self.client.status()
        except HostUnreachable:  # between two holders
            return None
        return next((s.state for s in status.snapshots if s.snapshot == snapshot), None)

    async def content(
        self, snapshot: SnapshotId, offset: int = 0, length: int = -1, timeout_s: float = 20, name: str = "memory"
    ) -> bytes:
        """Reads the snapshot's file from a process of its own: a wait can't hang the tests then."""
        return await asyncio.to_thread(read_file, self.file(snapshot, name), offset, length, timeout_s)

    def clean(self) -> None:
        for guest in self.guests:
            guest.end()
        for pid in (self.keeper_pid, self.holder_pid):
            if pid:
                end(pid, signal.SIGKILL)
        mount.detach(self.mountpoint)


def order(disk: Disk | None = None, devices: Path | None = None) -> PackOrder:
    """What a packing needs to know besides memory."""
    return PackOrder(
        devices=devices,
        disk=disk,
        qemu_build="test",
        machine_type="pc-q35-7.2",
        cpu_model="max",
        accelerator="tcg",
        shape=Shape(),
        created_us=1,
    )


def pid_in(path: Path) -> int:
    """The pid that a file names; 0 when that process has ended."""
    try:
        pid = int(json.loads(path.read_bytes())["pid"])
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else pid


def end(pid: int, number: int) -> None:
    """Signals a process and waits until it has ended."""
    os.kill(pid, number)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def child_of(pid: int, module: str) -> int:
    """The child process of `pid` that runs a module; 0 when there is none."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                command = stat.with_name("cmdline").read_text()
                if module in command:
                    return int(stat.parent.name)
    return 0


def drop_cache(path: Path) -> None:
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_file(path: Path, offset: int = 0, length: int = -1, timeout_s: float = 20) -> bytes:
    """The content of a file, uncached pages by the pager. Raises OSError, or TimeoutExpired."""
    arguments = [sys.executable, "-S", "-c", _READER, str(path), str(offset), str(length)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, timeout=timeout_s)
    if done.returncode:
        raise OSError(done.returncode, os.strerror(done.returncode))
    return done.stdout


class Model:
    """What a memory should hold: the same writes on plain bytes."""

    def __init__(self, size_bytes: int, seed: int) -> None:
        self.data = bytearray(size_bytes)
        self.random = random.Random(seed)

    def scribble(self, guest: GuestProcess, times: int) -> None:
        """Random writes, some across pages, here and in the guest."""
        for _ in range(times):
            length = self.random.choice((1, 100, PAGE, PAGE + 10, 3 * PAGE))
            offset = self.random.randrange(0, len(self.data) - length)
            data = self.random.randbytes(length)
            guest.write(offset, data)
            self.data[offset : offset + length] = data


@contextlib.asynccontextmanager
async def running_pager(*, by_systemd: bool = False) -> AsyncIterator[Rig]:
    """A pager that is gone, with its mount and all guests, when the block ends, however it ends."""
    with tempfile.TemporaryDirectory(prefix="pager-") as name:
        rig = Rig(Path(name))
        try:
            await rig.start(by_systemd=by_systemd)
            yield rig
            await rig.stop()
            assert mount.device_of(rig.mountpoint) is None, "the pager left its mount"
        finally:
            rig.clean()
