"""What a fork's child takes on, step by step, by the real agent: in namespaces of its own where a step is not confined
to a directory.

More than 500 lines: a test for each step, on the fixtures of this file."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forkypig.errors import GuestUnresponsive, InvalidRequest
from forkypig.guest.calls import ExecCall, ExecSpec, Output, Started
from forkypig.guest.channel import GuestChannel
from tests.component.guest_rig import ME, Guest, greeted, run, started

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and other processes' memory take root")
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--")


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """As a template: the agent has done its chores, before anything is forked."""
    async with started(tmp_path) as guest:
        await greeted(guest)
        await guest.channel.settle()
        yield guest


@contextlib.asynccontextmanager
async def alone(tmp_path: Path, *more: str) -> AsyncIterator[Guest]:
    """In namespaces for processes and the host name, so that nothing else is meant by «all processes»."""
    async with started(tmp_path, "clock,neighbours,tcp", wrapper=[*more, *ALONE]) as guest:
        yield await greeted(guest)


async def wait_until(path: Path, text: str) -> None:
    async with asyncio.timeout(60):
        while not path.exists() or text not in path.read_text():
            await asyncio.sleep(0.02)


# -- names


async def test_boot_id(guest: Guest) -> None:
    path = guest.root / "run/forky/boot-id"
    assert path.read_text() == Path("/proc/sys/kernel/random/boot_id").read_text()
    inode = path.stat().st_ino
    await guest.reopen("run", ME)
    first = path.read_text()
    await guest.reopen("run", replace(ME, boot_id="01234567-89ab-cdef-0123-456789abcdef"))
    assert path.read_text() == "01234567-89ab-cdef-0123-456789abcdef\n" != first
    assert len(first) == len(path.read_text())
    assert path.stat().st_ino == inode  # overwritten in place: it is mounted over the kernel's


async def test_leases_and_identifiers_go(guest: Guest) -> None:
    gone = ["var/lib/dhcp/dhclient.eth0.leases", "var/lib/dhcpcd/eth0.lease", "etc/dhcpcd.duid", "var/lib/dhcpcd/duid"]
    gone += ["var/lib/NetworkManager/internal-1.lease", "run/systemd/netif/leases/2"]
    stay = ["var/lib/dhcp/dhclient.conf", "var/lib/NetworkManager/timestamps", "etc/resolv.conf"]
    for name in gone + stay:
        (guest.root / name).parent.mkdir(parents=True, exist_ok=True)
        (guest.root / name).write_text("x")
    info = await guest.reopen("run", replace(ME, forked=False))
    assert "dhcp" not in info.steps
    assert all((guest.root / name).exists() for name in gone)
    info = await guest.reopen("run", ME)
    assert info.steps["dhcp"] == ""
    assert not any((guest.root / name).exists() for name in gone)
    assert all((guest.root / name).exists() for name in stay)


async def test_a_boot_takes_on_names_alone(guest: Guest) -> None:
    info = await guest.reopen("run", replace(ME, forked=False, tcp="reset"))
    assert set(info.steps) == {"entropy", "hostname", "machine-id", "generation", "clock"}


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "no uuid"},
        {"forget": ("A=B",)},
        {"forget": ("",)},
        {"forget_files": ("relative",)},
        {"forget_files": ("/../",)},
        {"forget": ("N" * 200,) * 20},
    ],
)
async def test_nonsense_is_refused_before_it_is_sent(change: dict[str, object], tmp_path: Path) -> None:
    channel = GuestChannel("m")
    with pytest.raises(InvalidRequest):
        await channel.connect(tmp_path / "none", identity=replace(ME, **change), orphans="run")  # type: ignore[arg-type]


# -- SSH host keys


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
async def test_ssh_keys(guest: Guest, tmp_path: Path) -> None:
    """New keys of the quick types are there when the child is; the old ones of all types are not."""
    directory = guest.root / "etc/ssh"
    directory.mkdir()
    for type_ in ("ed25519", "ecdsa", "rsa"):
        command = ["ssh-keygen", "-q", "-N", "", "-t", type_, "-f", str(directory / f"ssh_host_{type_}_key")]
        subprocess.run(command, check=True)
    (directory / "sshd_config").write_text("stays")
    before = {path.name: path.read_text() for path in directory.iterdir()}
    hangups = tmp_path / "hangups"
    shutil.copy(sys.executable, tmp_path / "sshd")  # the agent believes a pid only if it has this name
    listener = subprocess.Popen([str(tmp_path / "sshd"), "-c", HANGUPS, str(hangups)], env={})
    try:
        await wait_until(hangups, "listening")
        (guest.root / "run/sshd.pid").write_text(f"{listener.pid}\n")
        info = await guest.reopen("run", ME)
        assert info.steps["ssh"] == ""
        for name in ("ssh_host_ed25519_key", "ssh_host_ecdsa_key", "ssh_host_ed25519_key.pub"):
            assert (directory / name).read_text() != before[name]
        assert (directory / "ssh_host_ed25519_key").stat().st_mode & 0o777 == 0o600
        slow = directory / "ssh_host_rsa_key"
        assert not slow.exists() or slow.read_text() != before[slow.name]
        await wait_until(hangups, "hangup")
        await guest.channel.settle()  # the agent has nothing left to do
        assert slow.read_text() != before[slow.name]
        await wait_until(hangups, "hangup hangup")
        assert (directory / "sshd_config").read_text() == "stays"
    finally:
        listener.kill()
        listener.wait()


HANGUPS = """
import signal, sys, time
def note(text):
    with open(sys.argv[1], 'a') as file: file.write(text + ' ')
signal.signal(signal.SIGHUP, lambda *_: note('hangup'))
note('listening')
while True: time.sleep(1)
"""


async def test_no_ssh_nothing_to_do(guest: Guest) -> None:
    assert (await guest.reopen("run", ME)).steps["ssh"] == ""
    assert not (guest.root / "etc/ssh").exists()


# -- connections and neighbours


class Network:
    """Two network namespaces with a cable between them: the guest's and somebody else's."""

    def __init__(self) -> None:
        self.guest, self.other = (f"forky-{name}-{os.getpid()}" for name in ("guest", "other"))

    def make(self) -> None:
        for name in (self.guest, self.other):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.ip("-n", self.guest, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.other)
        for name, address in ((self.guest, "198.18.7.1/24"), (self.other, "198.18.7.2/24")):
            self.ip("-n", name, "address", "add", address, "dev", "eth0")
            self.ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in (self.guest, self.other):
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in inside.stdout.split():  # the guest's, which outlive its agent
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)

    def ip(self, *arguments: str) -> str:
        return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout

    def within(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", name]


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.make()
        yield network
    finally:
        network.remove()


SERVE = """
import socket, sys
server = socket.create_server(('0.0.0.0', 7000))
print('ready', flush=True)
kept = []
while True:
    connection, _ = server.accept()
    kept.append(connection)
    connection.sendall(b'hello')
"""
READ = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
print(connection.recv(5).decode(), flush=True)
try:
    print(connection.recv(5) or 'end', flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


async def begin(guest: Guest, code: str, *arguments: str) -> ExecCall:
    """Starts Python code in the guest and waits for its first line."""
    call = await guest.channel.exec(ExecSpec(argv=[sys.executable, "-c", code, *arguments]))
    assert isinstance(await anext(call), Started)
    assert isinstance(await anext(call), Output)
    return call


@needs_root
async def test_connections_to_others_end_at_once(tmp_path: Path, network: Network) -> None:
    """Also of those that only wait. Connections inside the guest stay, and so do listeners."""
    server = subprocess.Popen(
        [*network.within(network.other), sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert server.stdout is not None
    skip = "clock,kernel-hostname"
    try:
        assert server.stdout.readline() == b"ready\n"
        async with started(tmp_path, skip, wrapper=network.within(network.guest)) as guest:
            await greeted(guest)
            own = await begin(guest, SERVE)
            outer = [await begin(guest, READ, "198.18.7.2") for _ in range(3)]
            inner = [await begin(guest, READ, address) for address in ("127.0.0.1", "198.18.7.1")]
            assert "198.18.7.2" in network.ip("-n", network.guest, "neighbour")
            # The calls are the parent's: what becomes of them is seen by their processes' output, in the same session.
            pids = readers(network)
            assert len(pids) == 5
            info = await guest.reopen("run", replace(ME, tcp="silent"))
            assert "tcp" not in info.steps
            assert readers(network) == pids
            info = await guest.reopen("run", replace(ME, tcp="reset"))
            assert (info.steps["tcp"], info.steps["neighbours"]) == ("", "")
            async with asyncio.timeout(30):
                while len(readers(network)) != 2:  # the three that were connected to others got an error and ended
                    await asyncio.sleep(0.02)
            assert "198.18.7.2" not in network.ip("-n", network.guest, "neighbour")
            out, _, _ = await run(guest, sys.executable, "-c", READ.split("try")[0], "198.18.7.1")
            assert out == b"hello\n"  # the listener takes new ones
            assert len(readers(network)) == 2
            del own, outer, inner
    finally:
        server.kill()
        server.wait()
        for stream in (server.stdout, server.stderr):
            if stream is not None:
                stream.close()


def readers(network: Network) -> set[int]:
    """The processes of the guest that wait in READ."""
    found = set()
    for pid in network.ip("netns", "pids", network.guest).split():
        with contextlib.suppress(OSError):
            if READ.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


# -- secrets

SECRET = "tok-9f1c55d2a7e84b6f"
HOLD = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
copy = bytearray(os.environb[b'TOKEN'])          # on the heap
large = bytearray(3 << 20)                       # in a mapping of its own, across two chunks of the search
large[(1 << 20) - 7 : (1 << 20) - 7 + len(copy)] = copy
stack = ctypes.create_string_buffer(bytes(copy))
libc.putenv(stack_pair := ctypes.create_string_buffer(b'PAIR=' + bytes(copy)))
print('holding', flush=True)
sys.stdin.readline()
print(libc.getenv(b'TOKEN'), libc.getenv(b'OTHER'), bytes(copy), bytes(large).strip(b'\\0'), flush=True)
"""


def guests_processes(guest: Guest) -> list[int]:
    """As this process sees them: those in the pid namespace of the agent, which unshare has started."""
    children = Path(f"/proc/{guest.process.pid}/task/{guest.process.pid}/children").read_text().split()
    namespace = Path(f"/proc/{children[0]}/ns/pid").readlink()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "ns/pid").readlink() == namespace:
                found.append(int(entry.name))
    return found


def in_memory(pids: list[int], needle: bytes) -> int:
    """How often the bytes are in what these processes can write to."""
    count = 0
    for pid in pids:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                area, flags = line.split()[:2]
                if flags.startswith("rw"):
                    start, end = (int(part, 16) for part in area.split("-"))
                    count += os.pread(memory.fileno(), end - start, start).count(needle)
    return count


@needs_root
async def test_variables_are_forgotten(tmp_path: Path) -> None:
    """In the environment, and wherever programs copied the value, the agent too: nothing in the guest has it."""
    async with alone(tmp_path) as guest:
        fifo = tmp_path / "answer"
        os.mkfifo(fifo)
        answer = os.open(fifo, os.O_RDWR)
        try:
            script = f'"$1" -c "$2" <{fifo} >{tmp_path}/out 2>&1'
            argv = ["sh", "-c", f"{script}; :", "sh", sys.executable, HOLD]
            call = await guest.channel.exec(ExecSpec(argv=argv, environment={"TOKEN": SECRET, "OTHER": "stays"}))
            assert isinstance(await anext(call), Started)
            await wait_until(tmp_path / "out", "holding")
            pids = guests_processes(guest)
            assert len(pids) == 3  # the agent, a shell, and the program
            assert all(in_memory([pid], SECRET.encode()) for pid in pids)
            info = await guest.reopen("run", replace(ME, forget=("TOKEN", "ABSENT")))
            assert info.steps["forget"] == ""
            assert in_memory(pids, SECRET.encode()) == 0
            environ, _, _ = await run(guest, "sh", "-c", "cat /proc/[0-9]*/environ")
            assert b"OTHER=stays" in environ
            assert b"TOKEN" not in environ
            os.write(answer, b"\n")
            await wait_until(tmp_path / "out", "stays")
            x = "x" * len(SECRET)
            assert (tmp_path / "out").read_text().splitlines()[1] == f"None b'stays' b'{x}' b'{x}'"
        finally:
            os.close(answer)


@needs_root
async def test_short_values_go_from_the_environment_alone(tmp_path: Path) -> None:
    """They are in too many places that have nothing to do with them."""
    async with alone(tmp_path) as guest:
        code = "import os, time; copy = os.environ['TOKEN'] * 2; print(os.getpid(), flush=True); time.sleep(60)"
        argv = [sys.executable, "-c", code]
        call = await guest.channel.exec(ExecSpec(argv=argv, environment={"TOKEN": "1234567"}))
        begun = await anext(call)
        assert isinstance(begun, Started)
        assert isinstance(await anext(call), Output)
        info = await guest.reopen("run", replace(ME, forget=("TOKEN",)))
        assert info.steps["forget"] == ""
        assert (await run(guest, "cat", f"/proc/{begun.pid}/environ"))[0].count(b"TOKEN") == 0
        assert in_memory(guests_processes(guest), b"1234567" * 2) > 0


@needs_root
async def test_files_are_forgotten(tmp_path: Path) -> None:
    async with alone(tmp_path) as guest:
        root = guest.root
        (root / "secret/deep").mkdir(parents=True)
        (root / "secret/deep/key").write_bytes(SECRET.encode() * 100_000)
        (root / "outside").write_text("stays")
        (root / "secret/link").symlink_to(root / "outside")
        (root / "target").write_text(SECRET)
        (root / "linked").symlink_to(root / "target")
        os.link(root / "target", root / "hard")
        files = ("/secret", "/linked", "/not/there")
        info = await guest.reopen("run", replace(ME, forget_files=files))
        assert info.steps["forget-files"] == ""
        assert not (root / "secret").exists()
        assert not (root / "linked").is_symlink()
        assert not (root / "target").exists()
        assert (root / "hard").read_bytes() == bytes(len(SECRET))  # overwritten before it was removed
        assert (root / "outside").read_text() == "stays"


# -- programs of the guest


def hook(guest: Guest, name: str, script: str, mode: int = 0o755) -> None:
    directory = guest.root / "etc/forky/fork.d"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(mode)


async def test_hooks(guest: Guest) -> None:
    log = guest.root / "log"
    hook(guest, "20-second", f"echo second >> {log}")
    hook(guest, "10-first", f"env | grep ^FORKY_ | sort >> {log}; cat {guest.root}/run/forky/generation >> {log}")
    hook(guest, "30-fails", "exit 3")
    hook(guest, "40-killed", "kill -9 $$")
    hook(guest, "50-not-executable", f"echo never >> {log}", 0o644)
    hook(guest, "60-anybodys", f"echo never >> {log}", 0o777)
    hook(guest, ".hidden", f"echo never >> {log}")
    (guest.root / "etc/forky/fork.d/70-dangling").symlink_to("nowhere")
    first = await guest.reopen("run", replace(ME, hooks=False))
    assert not any(name.startswith("hook:") for name in first.steps)
    before = (guest.root / "run/forky/generation").read_text().strip()
    info = await guest.reopen("run", replace(ME, boot_id="01234567-89ab-cdef-0123-456789abcdef"))
    hooks = {name: problem for name, problem in info.steps.items() if name.startswith("hook:")}
    assert hooks == {
        "hook:10-first": "",
        "hook:20-second": "",
        "hook:30-fails": "it ended with code 3",
        "hook:40-killed": "it was ended by signal 9",
        "hook:60-anybodys": "not run: others than root may change it",
        "hook:70-dangling": f"No such file or directory: {guest.root}/etc/forky/fork.d/70-dangling",
    }
    now = (guest.root / "run/forky/generation").read_text().strip()
    assert log.read_text().splitlines() == [
        "FORKY_BOOT_ID=01234567-89ab-cdef-0123-456789abcdef",
        f"FORKY_GENERATION={now}",
        "FORKY_HOSTNAME=child-1",
        f"FORKY_MACHINE_ID={ME.machine_id}",
        f"FORKY_PARENT_GENERATION={before}",
        f"FORKY_PARENT_HOSTNAME={os.uname().nodename}",
        now,
        "second",
    ]
    assert now != before


@pytest.mark.parametrize(("one_s", "all_s", "next_one"), [(1, 60, ""), (60, 1, "not run")])
async def test_a_hook_that_hangs_is_ended(tmp_path: Path, one_s: int, all_s: int, next_one: str) -> None:
    async with started(tmp_path, settings=f"agent.HOOK_S, agent.HOOKS_S = {one_s}, {all_s}") as guest:
        await greeted(guest)
        hook(guest, "1", f"sleep 60 & echo $! > {guest.root}/pid; wait")
        hook(guest, "2", "true")
        info = await guest.reopen("run", ME)
        assert "ended" in info.steps["hook:1"]
        assert info.steps["hook:2"][: len("not run")] == next_one
        pid = int((guest.root / "pid").read_text())
        async with asyncio.timeout(30):
            while Path(f"/proc/{pid}/exe").exists():  # what it had started is ended with it
                await asyncio.sleep(0.01)
        assert (await run(guest, "echo", "on"))[0] == b"on\n"


async def test_more_hooks_than_an_answer_holds(guest: Guest) -> None:
    for n in range(40):
        hook(guest, f"{n:02}-" + "long-name" * 20, "exit 1")
    info = await guest.reopen("run", ME)
    assert info.steps["entropy"] == ""
    assert info.steps["hook:more"].endswith("more: see the console")


async def test_signals(guest: Guest, tmp_path: Path) -> None:
    """Who asks for one gets it after the generation has changed; nobody is ended by one, nor by another user's."""
    note = (
        "import signal, sys, time\n"
        "def note(*_): open(sys.argv[1], 'a').write(open(sys.argv[2]).read())\n"
        "signal.signal(signal.SIGUSR2, note)\nopen(sys.argv[1], 'w').write('ready\\n')\nwhile True: time.sleep(1)"
    )
    generation = guest.root / "run/forky/generation"
    await guest.reopen("run", ME)
    notify = guest.root / "run/forky/notify"
    assert notify.stat().st_mode & 0o7777 == 0o1777
    argv = [sys.executable, "-c", note, str(tmp_path / "noted"), str(generation)]
    listener = subprocess.Popen(argv)
    unaware = subprocess.Popen(["sleep", "60"])
    try:
        await wait_until(tmp_path / "noted", "ready")
        (notify / str(listener.pid)).write_text("SIGUSR2\n")
        (notify / str(unaware.pid)).write_text("12")
        (notify / "4194999").write_text("USR2")  # beyond any pid: it has gone
        (notify / "nonsense").write_text("USR2")
        info = await guest.reopen("run", ME)
        await wait_until(tmp_path / "noted", generation.read_text())
        problems = {name: problem for name, problem in info.steps.items() if name.startswith("notify:")}
        assert set(problems) == {f"notify:{unaware.pid}", "notify:nonsense"}
        assert "does not handle signal 12" in problems[f"notify:{unaware.pid}"]
        assert unaware.poll() is None
        assert not (notify / "4194999").exists()
        if os.geteuid() == 0:
            os.chown(notify / str(listener.pid), 65534, 65534)
            info = await guest.reopen("run", ME)
            assert "own user" in info.steps[f"notify:{listener.pid}"]
            assert generation.read_text() not in (tmp_path / "noted").read_text()
    finally:
        for process in (listener, unaware):
            process.kill()
            process.wait()


async def test_the_generation_is_always_whole(guest: Guest) -> None:
    path = guest.root / "run/forky/generation"
    await guest.reopen("run", ME)
    with path.open() as old:
        await guest.reopen("run", ME)
        was = old.read()
    assert len(was) == 33
    assert path.read_text() != was
    await guest.channel.settle()  # the next one's file is made; it is not this one
    assert (path.parent / "generation.new").stat().st_ino != path.stat().st_ino
    now = path.read_text()
    await guest.reopen("run", ME)
    await guest.reopen("run", ME)  # at once, or with time in between
    assert len({was, now, path.read_text()}) == 3


async def test_what_appears_later_is_found_all_the_same(tmp_path: Path) -> None:
    """The agent knows that there is nothing without looking, as long as that is so."""
    for name in ("etc", "var/lib", "run"):
        (tmp_path / "root" / name).mkdir(parents=True)
        os.utime(tmp_path / "root" / name, (1e9, 1e9))
    async with started(tmp_path) as guest:
        (guest.root / "etc/hostname").write_text("parent\n")
        for name in ("etc", "var/lib"):
            os.utime(guest.root / name, (1e9, 1e9))
        await greeted(guest)
        await guest.channel.settle()
        assert not [step for step in (await guest.reopen("run", ME)).steps if step.startswith("hook:")]
        for name in ("etc/dhcpcd.duid", "var/lib/dhcp/dhclient.leases", "run/systemd/netif/leases/2"):
            (guest.root / name).parent.mkdir(parents=True, exist_ok=True)
            (guest.root / name).write_text("x")
        hook(guest, "1", "exit 0")
        info = await guest.reopen("run", ME)
        assert info.steps["hook:1"] == ""
        assert not list(guest.root.glob("**/*leases*/*")) + list(guest.root.glob("**/*.leases"))
        assert not (guest.root / "etc/dhcpcd.duid").exists()


# -- the agent's end


async def test_agent_killed_in_the_middle_of_the_handshake(guest: Guest) -> None:
    pid_file = guest.root / "in-the-middle"
    hook(guest, "1", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 60")

    async def kill() -> None:
        while not pid_file.exists():
            await asyncio.sleep(0.01)
        guest.process.kill()

    killing = asyncio.create_task(kill())
    try:
        with pytest.raises(GuestUnresponsive, match="did not answer in 1 s"):
            await guest.reopen("run", ME, deadline_s=1.0)
        await killing
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


async def test_a_clock_that_is_late_is_right_before_the_guest_is_handed_out(tmp_path: Path) -> None:
    """As after a greeting that lay in the channel. The agent's clock is a number here, which its answer changes."""
    noted = tmp_path / "clock"
    settings = (
        "t = agent.time; real = t.time_ns; late = [5 * 10**9]; t.time_ns = lambda: real() - late[0]; "
        "t.clock_settime_ns = lambda _, value: "
        f"(late.__setitem__(0, real() - value), open({str(noted)!r}, 'a').write('set '))"
    )
    async with started(tmp_path, settings=settings) as guest:
        await greeted(guest)
        info = await guest.reopen("run", ME)
        assert info.steps["clock"].startswith("skipped")
        assert noted.read_text() == "set "
        await guest.reopen("run", ME)
        assert noted.read_text() == "set "  # it is right now
