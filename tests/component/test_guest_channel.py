"""The channel and the real agent, with a port between them that is what QEMU's is: it moves, it tears, it loses."""

import asyncio
import hashlib
import io
import os
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig.agent import agent as wire
from forkypig.errors import GuestUnresponsive, InvalidRequest, MachineFailed, NotFound, NotPossibleNow
from forkypig.guest import channel
from forkypig.guest.calls import ExecSpec, Exited, Output, Started
from forkypig.guest.channel import GuestChannel
from tests.component.guest_rig import ME, Guest, Port, greeted, run, started


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    async with started(tmp_path) as guest:
        await greeted(guest)
        yield guest


# -- commands


async def test_output_and_code(guest: Guest) -> None:
    out, err, end = await run(guest, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (out, err, end) == (b"out\n", b"err\n", Exited(7))


async def test_environment_directory_and_user(guest: Guest) -> None:
    spec = {"environment": {"FOO": "b\nar"}, "directory": "/tmp", "user": "nobody"}
    out, _, _ = await run(guest, "sh", "-c", 'echo "$FOO"; pwd; id -un; echo $LOGNAME; id -Gn', **spec)
    assert out == b"b\nar\n/tmp\nnobody\nnobody\nnogroup\n"


async def test_signal_is_told_as_a_shell_does(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["sleep", "60"]))
    assert isinstance(await anext(call), Started)
    call.signal(15)
    assert await anext(call) == Exited(143)


async def test_timeout_kills_the_group(guest: Guest) -> None:
    began = time.monotonic()
    _, _, end = await run(guest, "sh", "-c", "sleep 60 & sleep 60", timeout_s=0.3)
    assert end == Exited(124, timed_out=True)
    assert time.monotonic() - began < 25


@pytest.mark.parametrize("terminal", [None, (24, 80)])
@pytest.mark.parametrize(
    ("argv", "code", "why"),
    [
        (["/no/such"], 127, "No such file"),
        (["/etc/passwd"], 126, "Permission denied"),
        (["nonesuch"], 127, "No such file"),
    ],
)
async def test_what_can_not_start_says_why(
    guest: Guest, argv: list[str], code: int, why: str, terminal: tuple[int, int] | None
) -> None:
    _, _, end = await run(guest, *argv, terminal=terminal)
    assert end.code == code
    assert why in end.failure


async def test_unknown_user_and_directory(guest: Guest) -> None:
    assert "no user «mallory»" in (await run(guest, "true", user="mallory"))[2].failure
    assert "/nowhere" in (await run(guest, "true", directory="/nowhere"))[2].failure


async def test_nonsense_is_refused_before_it_is_sent(guest: Guest) -> None:
    for spec in (ExecSpec(argv=[]), ExecSpec(argv=["a\0b"]), ExecSpec(argv=["x" * (3 << 20)])):
        with pytest.raises(InvalidRequest):
            await guest.channel.exec(spec)
    with pytest.raises(InvalidRequest):
        await guest.channel.stat("relative")


async def test_background_children_do_not_hold_the_exit(guest: Guest) -> None:
    began = time.monotonic()
    out, _, end = await run(guest, "sh", "-c", "sleep 60 & echo done")
    assert (out, end.code) == (b"done\n", 0)
    assert time.monotonic() - began < 25


async def test_long_arguments(guest: Guest) -> None:
    argument = "é" * 60_000
    out, _, end = await run(guest, "sh", "-c", 'printf %s "$1" | wc -c', "sh", argument)
    assert (int(out), end.code) == (120_000, 0)


async def test_terminal(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["sh"], terminal=(40, 100), stdin=True, environment={"PS1": ""}))
    await call.write(b"stty size; tty >/dev/null && echo 'is a 'tty\n")
    seen = b""
    async for event in call:
        if isinstance(event, Output):
            assert event.fd == 1
            resized = b"is a tty" in seen
            seen += event.data
            if b"is a tty" in seen and not resized:
                call.resize(50, 120)
                await call.write(b"stty size; exit 3\n")
        elif isinstance(event, Exited):
            assert event.code == 3
    assert b"40 100\r\nis a tty\r\n" in seen
    assert seen.endswith(b"50 120\r\n")


async def test_end_of_input_on_a_terminal(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["cat"], terminal=(24, 80), stdin=True))
    await call.write(b"hello\n")
    call.close_stdin()
    events = [event async for event in call]
    assert events[-1] == Exited(0)


async def test_who_lets_go_of_the_terminal_before_the_end_is_not_hung_up(guest: Guest) -> None:
    """As cat does, which closes what it has open before it exits."""
    command = ["sh", "-c", "exec <&- >&- 2>&-; sleep 0.3; exit 7"]
    call = await guest.channel.exec(ExecSpec(argv=command, terminal=(24, 80)))
    assert [event async for event in call][-1] == Exited(7)


async def test_input_echoes_back_whole(guest: Guest) -> None:
    data = os.urandom(3 << 20)
    call = await guest.channel.exec(ExecSpec(argv=["cat"], stdin=True))

    async def feed() -> None:
        await call.write(data)
        call.close_stdin()

    feeding = asyncio.create_task(feed())
    back = b"".join([event.data async for event in call if isinstance(event, Output)])
    await feeding
    assert back == data


async def test_input_nobody_reads_is_not_an_error(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["true"], stdin=True))
    await call.write(b"x" * (2 << 20))
    assert [event async for event in call][-1] == Exited(0)


async def test_many_calls_at_once(guest: Guest) -> None:
    results = await asyncio.gather(*(run(guest, "sh", "-c", f"seq {n} {n + 2000} | md5sum") for n in range(40)))
    for n, (out, _, end) in enumerate(results):
        numbers = "".join(f"{i}\n" for i in range(n, n + 2001)).encode()
        assert (end.code, out.split()[0].decode()) == (0, hashlib.md5(numbers).hexdigest())


async def test_slow_reader_blocks_no_other(guest: Guest) -> None:
    slow = await guest.channel.exec(ExecSpec(argv=["head", "-c", "20000000", "/dev/zero"]))
    for _ in range(5):
        assert (await run(guest, "echo", "hi"))[0] == b"hi\n"
    before = -1
    while before != (before := guest.port.to_host):
        await asyncio.sleep(0.3)
    assert before < wire.WINDOW + 8192  # it waits for credit, and nothing between buffers what it makes
    total = sum([len(event.data) async for event in slow if isinstance(event, Output)])
    assert total == 20_000_000


async def test_closing_a_call_ends_its_command(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["sh", "-c", "trap '' HUP; while :; do echo y; done"]))
    started_ = await anext(call)
    assert isinstance(started_, Started)
    call.close()
    async with asyncio.timeout(30):
        while Path(f"/proc/{started_.pid}").exists():
            await asyncio.sleep(0.05)
    assert (await run(guest, "echo", "on"))[0] == b"on\n"


# -- files


async def test_upload_and_download(guest: Guest, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "data").write_bytes(os.urandom(1_500_000))
    (source / "inner" / "data").chmod(0o640)
    (source / "link").symlink_to("inner/data")
    (source / "inner").chmod(0o555)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.add(source, "tree")
    target = tmp_path / "into"
    target.mkdir()
    upload = await guest.channel.upload(str(target))
    await upload.write(stream.getvalue())
    assert await upload.finish() == (2, 1_500_000)
    assert (target / "tree/inner/data").read_bytes() == (source / "inner/data").read_bytes()
    assert (target / "tree/inner").stat().st_mode & 0o777 == 0o555

    back = b"".join([piece async for piece in guest.channel.download(str(target / "tree"))])
    with tarfile.open(fileobj=io.BytesIO(back)) as tar:
        assert tar.getnames() == ["tree", "tree/inner", "tree/inner/data", "tree/link"]
        member = tar.extractfile("tree/inner/data")
        assert member is not None
        assert member.read() == (source / "inner/data").read_bytes()

    found = await guest.channel.stat(str(target / "tree/link"))
    assert (found.exists, found.directory, found.size_bytes, found.mode & 0o777) == (True, False, 1_500_000, 0o640)


def _file(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o751
        tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


async def test_an_upload_that_breaks_off_leaves_what_was_there(guest: Guest, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    (into / "old").write_bytes(b"old")
    for name in ("old", "new"):
        upload = await guest.channel.upload(str(into))
        await upload.write(_file(name, bytes(500_000))[:300_000])
        with pytest.raises(NotPossibleNow, match="unexpected end"):
            await upload.finish()
    upload = await guest.channel.upload(str(into))
    await upload.write(_file("old", bytes(500_000))[:300_000])
    upload.close()  # by SIGKILL
    await run(guest, "true")
    assert [(path.name, path.read_bytes()) for path in into.iterdir()] == [("old", b"old")]


async def test_an_upload_onto_what_is_there(guest: Guest, taken: tuple[Path, int]) -> None:
    """As cp: through links, into pipes, into a file that has two names; else the file is replaced."""
    into, pipe = taken
    for name in ("file", "link", "two", "pipe", "new"):
        upload = await guest.channel.upload(str(into))
        await upload.write(_file(name, name.encode()))
        assert await upload.finish() == (1, len(name))
    assert os.read(pipe, 9) == b"pipe"
    assert (into / "pipe").stat().st_mode & 0o777 == 0o600
    for name, content in (("file", b"file"), ("linked", b"link"), ("names", b"two"), ("new", b"new")):
        assert (into / name).read_bytes() == content
        assert (into / name).stat().st_mode & 0o777 == 0o751
    assert {path.name for path in into.iterdir()} == {"file", "linked", "two", "link", "names", "pipe", "new"}


async def test_files_that_are_not_there(guest: Guest, tmp_path: Path) -> None:
    assert not (await guest.channel.stat("/no/such")).exists
    with pytest.raises(NotFound, match="/no/such"):
        async for _ in guest.channel.download("/no/such"):
            pass
    upload = await guest.channel.upload("/no/such")
    with pytest.raises(NotFound, match="/no/such"):
        await upload.write(b"x" * 1_000_000)
        await upload.finish()


async def test_download_that_is_left_alone(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(8 << 20))
    stream = guest.channel.download(str(tmp_path / "big"))
    assert await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert (await run(guest, "echo", "on"))[0] == b"on\n"


async def test_settle_and_sync(guest: Guest) -> None:
    async with asyncio.timeout(30):
        await guest.channel.settle()
        await guest.channel.sync()


# -- forks


async def test_calls_go_on_over_moves(guest: Guest) -> None:
    """Commands stream both ways while the machine is split again and again: not a byte lost or doubled."""
    data = os.urandom(6 << 20)
    echo = await guest.channel.exec(ExecSpec(argv=["cat"], stdin=True))
    lines = await guest.channel.exec(ExecSpec(argv=["seq", "600000"]))

    async def feed() -> None:
        await echo.write(data)
        echo.close_stdin()

    async def collect(call: object) -> bytes:
        return b"".join([event.data async for event in call if isinstance(event, Output)])  # type: ignore[attr-defined]

    async def split() -> None:
        for _ in range(8):
            await asyncio.sleep(0.03)
            await guest.move()
            await guest.channel.resumed()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(feed())
        back, numbers = group.create_task(collect(echo)), group.create_task(collect(lines))
        group.create_task(split())
    assert hashlib.sha256(back.result()).digest() == hashlib.sha256(data).digest()
    assert numbers.result() == "".join(f"{i}\n" for i in range(1, 600_001)).encode()


async def test_call_made_while_moving_waits(guest: Guest) -> None:
    path = await guest.port.listen()
    await guest.channel.prepare_move(path)
    await guest.port.freeze()
    await guest.channel.move()
    waiting = asyncio.create_task(run(guest, "echo", "late"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await guest.port.run()
    assert (await asyncio.wait_for(waiting, 30))[0] == b"late\n"


async def test_old_process_gone_before_the_move(guest: Guest) -> None:
    path = await guest.port.listen()
    await guest.channel.prepare_move(path)
    await guest.port.freeze()
    assert guest.port.host is not None
    guest.port.host.close()
    await asyncio.sleep(0.05)
    await guest.port.run()
    await guest.channel.move()
    assert (await run(guest, "echo", "on"))[0] == b"on\n"


async def test_abandoned_move_changes_nothing(guest: Guest) -> None:
    await guest.channel.prepare_move(await guest.port.listen())
    guest.channel.abandon_move()
    assert (await run(guest, "echo", "on"))[0] == b"on\n"


async def test_half_a_frame_of_the_parent_before_a_childs_greeting(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_REPEAT_FIRST_S", 60.0)  # it must not need a repetition of the greeting
    guest.port.guest_writer.write(wire.encode(wire.DATA, 1, 1, 1, b"\0" * 60000)[:20000])
    await guest.reopen("run", ME)
    assert (await run(guest, "echo", "on"))[0] == b"on\n"


async def test_half_a_frame_of_the_guest_before_its_answer(guest: Guest) -> None:
    path = await guest.port.listen()
    await guest.port.freeze()
    await guest.channel.close()
    guest.channel = GuestChannel("m-test")
    await guest.channel.connect(path, identity=None, orphans="run")
    await guest.port.connected.wait()
    guest.port.incoming[1].write(b"\xfbF" + os.urandom(5000) + wire.encode(wire.DATA, 1, 1, 1, b"\0" * 60000)[:30000])
    await guest.port.run()
    await guest.channel.answered(30)
    assert (await run(guest, "echo", "on"))[0] == b"on\n"


async def test_a_child_inherits_commands_that_run(guest: Guest, tmp_path: Path) -> None:
    script = f"cat >/dev/null; sleep 0.2; head -c 1000000 /dev/zero; echo done > {tmp_path}/mark"
    await guest.channel.exec(ExecSpec(argv=["sh", "-c", script], stdin=True))
    await run(guest, "true")
    await guest.reopen("run", ME)
    async with asyncio.timeout(30):
        while not (tmp_path / "mark").exists():
            await asyncio.sleep(0.05)


async def test_a_new_hostd_ends_what_the_old_one_started(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["sh", "-c", "trap '' HUP; sleep 100 & wait; sleep 100"]))
    begun = await anext(call)
    assert isinstance(begun, Started)
    await guest.reopen("kill")
    async with asyncio.timeout(30):
        while Path(f"/proc/{begun.pid}").exists():
            await asyncio.sleep(0.05)
    with pytest.raises(GuestUnresponsive):
        await anext(call)


async def test_identity(guest: Guest) -> None:
    (guest.root / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 parent-with-a-long-name\n")
    info = await guest.reopen("run", ME)
    done = dict.fromkeys(("entropy", "hostname", "machine-id", "boot-id", "dhcp", "ssh", "generation"), "")
    skipped = dict.fromkeys(("clock", "neighbours"), "skipped: the agent was started with --skip")
    assert info.steps == {**done, **skipped}
    assert (guest.root / "etc/hostname").read_text() == "child-1\n"
    assert (guest.root / "etc/hosts").read_text() == "127.0.1.1 child-1\n127.0.0.1 localhost\n"
    assert (guest.root / "etc/machine-id").read_text() == ME.machine_id + "\n"
    first = (guest.root / "run/forky/generation").read_text()
    await guest.reopen("run", ME)
    assert (guest.root / "run/forky/generation").read_text() != first


async def test_repeated_greeting_changes_nothing(guest: Guest) -> None:
    await guest.reopen("run", ME)
    call = await guest.channel.exec(ExecSpec(argv=["sleep", "1"]))
    await anext(call)
    (guest.root / "etc/hostname").write_text("changed\n")
    guest.channel._greet()
    assert await anext(call) == Exited(0)
    assert (guest.root / "etc/hostname").read_text() == "changed\n"


async def test_no_fresh_entropy_no_child(tmp_path: Path) -> None:
    async with started(tmp_path, skip="entropy,clock,kernel-hostname,neighbours") as guest:
        path = await guest.port.listen()
        running = asyncio.create_task(guest.port.run())
        with pytest.raises(GuestUnresponsive, match="entropy"):
            await guest.channel.open(path, identity=ME, orphans="run", deadline_s=30)
        await running
        assert guest.channel.closed.is_set()


# -- trouble


async def test_garbage_between_frames(guest: Guest) -> None:
    for size in (1, 3, 100, 5000):
        guest.port.guest_writer.write(os.urandom(size) + wire.MAGIC)
        assert guest.port.host is not None
        guest.port.host.write(os.urandom(size) + wire.MAGIC)
        assert (await asyncio.wait_for(run(guest, "echo", "on"), 20))[0] == b"on\n"


async def test_lost_bytes_are_sent_again(guest: Guest) -> None:
    """A hole in the stream of either direction, without a move: the numbering finds it."""
    call = await guest.channel.exec(ExecSpec(argv=["cat"], stdin=True))
    assert isinstance(await anext(call), Started)
    link = guest.channel._link
    assert link is not None
    whole = link.write
    link.write = lambda data: whole(data[: len(data) // 2])  # type: ignore[method-assign]
    await call.write(b"first ")
    link.write = whole  # type: ignore[method-assign]
    await call.write(b"second")
    call.close_stdin()
    async with asyncio.timeout(60):
        assert b"".join([event.data async for event in call if isinstance(event, Output)]) == b"first second"


async def test_machine_that_dies_ends_every_call(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["sleep", "60"]))
    await anext(call)
    assert guest.port.host is not None
    guest.port.host.close()
    with pytest.raises(MachineFailed, match="m-test"):
        await anext(call)
    assert guest.channel.closed.is_set()
    with pytest.raises(GuestUnresponsive):
        await guest.channel.stat("/")


async def test_agent_that_does_not_answer(tmp_path: Path) -> None:
    port = Port(tmp_path)
    path = await port.listen()
    mute = GuestChannel("m-test")
    with pytest.raises(GuestUnresponsive, match="did not answer"):
        await mute.open(path, identity=None, orphans="run", deadline_s=0.3)
    assert mute.closed.is_set()
    with pytest.raises(MachineFailed):
        await GuestChannel("m-test").open(tmp_path / "none", identity=None, orphans="run", deadline_s=0.1)


async def test_agent_that_was_started_anew_is_noticed(guest: Guest) -> None:
    call = await guest.channel.exec(ExecSpec(argv=["sleep", "60"]))
    await anext(call)
    path = await guest.port.listen()
    await guest.channel.prepare_move(path)
    await guest.port.freeze()
    guest.port.guest_writer.write(
        wire.encode(wire.HELLO, 7, payload=wire.pack(("session", "other"), ("orphans", "kill")))
    )
    await guest.port.run()
    await guest.channel.move()
    with pytest.raises(GuestUnresponsive, match="anew"):
        await anext(call)


async def test_poweroff_is_answered_first(guest: Guest) -> None:
    # With --socket the agent ends instead of the machine.
    await guest.channel.poweroff()
    await asyncio.to_thread(guest.process.wait, 30)
    assert guest.process.returncode == 0
