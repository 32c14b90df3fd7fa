"""The command line as a process of its own, against a controller on a real socket: documents, sentences, exit codes."""

import asyncio
import json
import os
import pty
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forkypig import model
from forkypig.v1 import observe_pb2
from forkypig.wire import convert
from tests.component.fake_controller import Instance


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    made = Instance(tmp_path / "h")
    await made.start()
    yield made
    await made.stop()


async def start(home: Path, *words: str, **options: Any) -> asyncio.subprocess.Process:
    options = {"stdin": asyncio.subprocess.DEVNULL, "stdout": asyncio.subprocess.PIPE, **options}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forkypig.cli.main", *words),
        **{"stderr": asyncio.subprocess.PIPE, **options},
        env={**os.environ, "FORKY_HOME": str(home)},
    )


async def forky(where: Instance | Path, *words: str, stdin: bytes | None = None) -> Result:
    home = where.home if isinstance(where, Instance) else where
    options = {} if stdin is None else {"stdin": asyncio.subprocess.PIPE}
    child = await start(home, *words, **options)
    out, err = await asyncio.wait_for(child.communicate(stdin), 60)
    assert child.returncode is not None
    return Result(child.returncode, out.decode(), err.decode())


async def test_run_fork_ps_rm(instance: Instance) -> None:
    web = (await forky(instance, "run", "--name", "web", "--cpus", "2", "--memory", "1.5G", "--json")).document
    assert (web["name"], web["cpus"], web["memory_mib"], web["state"]) == ("web", 2, 1536, "running")
    assert web["ready_ms"] == 41.5
    made = (await forky(instance, "fork", "web", "-n", "2", "--ttl", "2h", "--json")).document
    assert set(made) == {"snapshot", "parent", "pause_ms", "children"}
    assert (made["parent"], made["pause_ms"]) == (web["id"], 12.5)
    assert [set(child) for child in made["children"]] == [{"id", "name", "ready_ms"}] * 2
    machines = (await forky(instance, "ps", "--json")).document
    fields = {"id", "name", "state", "snapshot", "image", "cpus", "memory_mib", "qemu_pid", "address"}
    assert all(fields <= set(machine) for machine in machines)
    assert [machine["name"] for machine in machines] == ["web", "web-1", "web-2"]
    assert machines[1]["snapshot"] == made["snapshot"]
    drawn = await forky(instance, "ps")
    assert [line.split()[0] for line in drawn.out.splitlines()] == ["NAME", "web", "web-1", "web-2"]
    assert [line.rstrip().endswith("2 h") for line in drawn.out.splitlines()] == [False, False, True, True]
    assert machines[0]["expires_us"] is None
    removed = await forky(instance, "rm", "web-1", made["snapshot"], "nobody")
    assert removed.out.splitlines() == ["removed machine web-1", f"removed snapshot {made['snapshot']}"]
    assert (removed.code, removed.err.startswith("forky: there is no machine or snapshot «nobody»")) == (1, True)
    gone = (await forky(instance, "rm", "--all", "--json")).document
    assert [each["name"] for each in gone["removed"]] == ["web", "web-2"]
    assert instance.controller.machines == {}


async def test_nothing_is_there_and_that_helps(instance: Instance) -> None:
    for words in (["ps"], ["snapshots"], ["image", "ls"], ["tree"], ["events"], ["rm", "--all"]):
        result = await forky(instance, *words)
        assert (result.code, result.err) == (0, "")
        assert len(result.out.splitlines()) == 1
    for words in (["ps"], ["snapshots"], ["image", "ls"], ["tree"], ["events"]):
        assert (await forky(instance, *words, "--json")).document == []


async def test_tree(instance: Instance) -> None:
    controller = instance.controller
    web = controller.add_machine("web")
    first = controller.add_snapshot(web, tag="good")
    controller.machines[web.id] = web = model.Machine(
        **{**{name: getattr(web, name) for name in web.__slots__}, "snapshot": first.id}
    )
    child = controller.add_machine("web-1", snapshot=first.id, parent=web.id)
    second = controller.add_snapshot(child)
    controller.add_machine("web-1-1", snapshot=second.id, parent=child.id)
    flat = (await forky(instance, "tree", "--json")).document
    assert [(node["type"], node.get("name") or node["id"], node["depth"]) for node in flat] == [
        ("snapshot", first.id, 0),
        ("machine", "web", 1),
        ("machine", "web-1", 1),
        ("snapshot", second.id, 1),
        ("machine", "web-1-1", 2),
    ]
    drawn = (await forky(instance, "tree")).out.splitlines()
    assert "good" in drawn[0]
    assert drawn[2].startswith("├── ● web-1  running  forked from web")
    assert drawn[4].startswith("    └── ● web-1-1")


async def test_snapshot_and_inspect(instance: Instance) -> None:
    instance.controller.add_machine("web")
    kept = (await forky(instance, "snapshot", "web", "--tag", "good", "--json")).document
    assert (kept["tag"], kept["kind"], kept["pause_ms"]) == ("good", "kept", 12.5)
    assert [each["id"] for each in (await forky(instance, "snapshots", "--json")).document] == [kept["id"]]
    assert (await forky(instance, "inspect", "good", "--json")).document == {"type": "snapshot", **kept}
    assert (await forky(instance, "inspect", "web", "--json")).document["accelerator"] == "tcg"


async def test_status_tells_what_the_controller_says(instance: Instance) -> None:
    found = (await forky(instance, "status", "--json")).document
    assert found["controller"]["pid"] == os.getpid()
    assert (found["hostd"]["pid"], found["hostd_error"]) == (os.getpid(), "hostd sleeps")
    assert (found["accelerator"], found["running"]) == ("tcg", True)


async def test_status_starts_nothing(tmp_path: Path) -> None:
    home = tmp_path / "nothing"
    found = (await forky(home, "status", "--json")).document
    assert (found["controller"], found["hostd"], found["pager"]) == (None, None, None)
    assert "nothing runs" in (await forky(home, "status")).out
    assert "nothing runs" in (await forky(home, "down")).out
    assert not home.exists()


async def test_doctor(instance: Instance) -> None:
    result = await forky(instance, "doctor", "--json")
    document = json.loads(result.out)
    assert (result.code, document["ok"]) == (1, False)
    assert [check["verdict"] for check in document["checks"]] == ["ok", "failed"]
    assert "→ modprobe fuse" in (await forky(instance, "doctor")).out


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["inspect", "nobody"], 1, "forky: there is no machine or snapshot «nobody»"),
        (["exec", "nobody", "--", "ls"], 1, "forky: there is no machine «nobody»"),
        (["pause", "web"], 1, "forky: machine web is busy: forking"),
        (["run", "--name", "web"], 1, "forky: a machine named «web» exists already"),
        (["pause"], 2, "forky: missing argument 'MACHINE': see `forky pause --help`"),
        (["nonsense"], 2, "forky: no such command 'nonsense'"),
        (["ps", "--nonsense"], 2, "forky: no such option: --nonsense"),
        (["fork", "web", "-n", "0"], 2, "forky: invalid value for '-n'"),
        (["fork", "web", "-n", "10000"], 2, "forky: invalid value for '-n'"),
        (["run", "--memory", "lots"], 2, "forky: invalid value for '--memory': «lots» is not a size"),
        (["run", "--memory", "0"], 2, "forky: invalid value for '--memory'"),
        (["run", "--cpus", "0"], 2, "forky: invalid value for '--cpus'"),
        (["run", "--"], 2, "forky: invalid value for COMMAND: nothing follows"),
        (["exec", "web"], 2, "forky: invalid value for ARGV: no command is given"),
        (["exec", "web", "-e", "novalue", "--", "ls"], 2, "forky: invalid value for -e: «novalue» is not NAME=VALUE"),
        (["cp", "a", "b"], 2, "forky: invalid value for DST: one of SRC and DST must be MACHINE:PATH"),
        (["cp", "web:relative", "b"], 2, "forky: «relative» is not an absolute path"),
        (["cp", "/no/such/file", "web:/root"], 1, "forky: there is no file «/no/such/file»"),
        (["rm"], 2, "forky: invalid value for NAME: name machines"),
        (["rm", "web", "--all"], 2, "forky: invalid value for NAME: name machines"),
        (["logs", "-f", "web", "--json"], 2, "forky: invalid value for --follow"),
    ],
)
async def test_errors_are_one_sentence(instance: Instance, words: list[str], code: int, sentence: str) -> None:
    instance.controller.add_machine("web")
    result = await forky(instance, *words)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(sentence)
    assert len(result.err.splitlines()) == 1


async def test_exec_passes_output_and_code_on(instance: Instance) -> None:
    instance.controller.add_machine("web")
    argv = ["sh", "-c", 'cat; echo "$K $PWD"; echo no >&2; exit 7']
    result = await forky(instance, "exec", "web", "-e", "K=v", "-w", "/tmp", "--", *argv, stdin=b"not forwarded")
    assert (result.code, result.out, result.err) == (7, "v /tmp\n", "no\n")
    assert (await forky(instance, "exec", "-i", "web", "cat", stdin=b"forwarded")).out == "forwarded"
    missing = await forky(instance, "exec", "web", "--", "no-such-program-here")
    assert (missing.code, missing.err) == (
        127,
        "forky: «no-such-program-here» could not start in web: no such program\n",
    )
    late = await forky(instance, "exec", "web", "--timeout", "0.2", "--", "sleep", "30")
    assert late.code == 124
    gathered = await forky(instance, "exec", "web", "--json", "--", "sh", "-c", "echo hi; exit 3")
    assert (gathered.code, json.loads(gathered.out)["stdout"]) == (3, "hi\n")


async def test_large_input_and_output_are_streamed(instance: Instance) -> None:
    instance.controller.add_machine("web")
    data = ("0123456789abcde\n" * 500_000).encode()
    result = await forky(instance, "exec", "web", "-i", "--", "cat", stdin=data)
    assert result.out.encode() == data


async def test_run_with_a_command(instance: Instance) -> None:
    result = await forky(instance, "run", "--name", "web", "--", "sh", "-c", "echo hi; exit 5")
    assert (result.code, result.out) == (5, "hi\n")
    assert [machine.name for machine in instance.controller.machines.values()] == ["web"]
    result = await forky(instance, "run", "--name", "other", "--rm", "--json", "--", "echo", "hi")
    assert (result.document["name"], result.document["command"]["stdout"]) == ("other", "hi\n")
    assert [asked.ttl_s for asked in instance.controller.ran] == [0, 60]  # in case it is killed before it removes it
    assert [machine.name for machine in instance.controller.machines.values()] == ["web"]


async def test_ctrl_c_ends_the_command_in_the_guest(instance: Instance) -> None:
    instance.controller.add_machine("web")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = await start(instance.home, "exec", "web", "--", "sh", "-c", "echo $$; exec sleep 60")
        assert child.stdout is not None
        pid = int(await asyncio.wait_for(child.stdout.readline(), 30))
        child.send_signal(number)
        _, err = await asyncio.wait_for(child.communicate(), 30)
        assert (child.returncode, err) == (code, b"")
        async with asyncio.timeout(30):
            while pid not in instance.agent.ended:
                await asyncio.sleep(0.01)


async def test_output_that_nobody_reads(instance: Instance) -> None:
    instance.controller.add_machine("web")
    read, write = os.pipe()
    os.close(read)
    for words in (["ps"], ["ps", "--json"], ["exec", "web", "--", "echo", "hi"], ["logs", "web"]):
        child = await start(instance.home, *words, stdout=write)
        _, err = await asyncio.wait_for(child.communicate(), 30)
        assert (child.returncode, err) == (1, b"")
    os.close(write)


async def test_a_shell_on_a_terminal(instance: Instance) -> None:
    instance.controller.add_machine("web")
    primary, secondary = pty.openpty()
    child = await start(instance.home, "shell", "web", stdin=secondary, stdout=secondary, stderr=secondary)
    os.set_blocking(primary, False)
    seen = b""

    async def until(words: bytes) -> None:
        nonlocal seen
        async with asyncio.timeout(30):
            while words not in seen:
                await asyncio.sleep(0.02)
                try:
                    seen += os.read(primary, 65536)
                except BlockingIOError:
                    continue

    import termios

    before = termios.tcgetattr(secondary)
    os.write(primary, b"echo $((6*7))-x\n")
    await until(b"42-x")
    assert termios.tcgetattr(secondary) != before  # raw
    os.write(primary, b"sleep 60\n")
    await asyncio.sleep(0.3)
    os.write(primary, b"\x03")  # to the guest's terminal, which ends the sleep and not us
    os.write(primary, b"echo $((6*8))-y; exit 9\n")
    await until(b"48-y")
    assert await asyncio.wait_for(child.wait(), 30) == 9
    assert termios.tcgetattr(secondary) == before
    os.close(primary)
    os.close(secondary)


async def test_cp(instance: Instance, tmp_path: Path) -> None:
    instance.controller.add_machine("web")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_bytes(os.urandom(500_000))
    assert (await forky(instance, "cp", str(tree), "web:/root")).code == 0
    copied = (await forky(instance, "cp", "web:/root/tree", str(tmp_path / "back"), "--json")).document
    assert copied == {"files": 1, "bytes": 500_000, "left_out": []}
    assert (tmp_path / "back/sub/file").read_bytes() == (tree / "sub/file").read_bytes()
    assert (await forky(instance, "cp", "-", "web:/root/piped", stdin=b"through a pipe")).code == 0
    assert (await forky(instance, "cp", "web:/root/piped", "-")).out == "through a pipe"
    (tree / "away").symlink_to("/etc")
    await forky(instance, "cp", str(tree), "web:/tmp")
    partly = await forky(instance, "cp", "web:/tmp/tree", str(tmp_path / "partly"))
    assert (partly.code, partly.err) == (
        1,
        "forky: left out tree/away: a link to /etc, which is not part of the copy\n",
    )


async def test_logs_and_events(instance: Instance) -> None:
    instance.controller.add_machine("web")
    instance.controller.events = [
        model.Event(sequence=1, time_us=1_700_000_000_000_000, kind="machine.running", subject="m-0", detail="[x]")
    ]
    console = (await forky(instance, "logs", "web", "--json")).document["console"]
    assert console == "Linux version 6.1\nlogin: \ufffd\n"
    assert [event["kind"] for event in (await forky(instance, "events", "--json")).document] == ["machine.running"]
    assert "[x]" in (await forky(instance, "events")).out


async def test_daemons_that_do_not_start_say_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = await forky(tmp_path / "file", "up")
    assert result.code == 1
    assert result.err.startswith(f"forky: {tmp_path / 'file'} can't be used as a home")
    result = await forky(Path("relative"), "ps")
    assert (result.code, "must be an absolute path" in result.err) == (2, True)


async def test_events_that_come(instance: Instance) -> None:
    now = int(time.time() * 1e6)
    instance.controller.events = [
        model.Event(sequence=1, time_us=now - 3_600_000_000, kind="machine.running", subject="m-0"),
        model.Event(sequence=2, time_us=now, kind="fork.done", subject="m-0"),
    ]
    assert [e["sequence"] for e in (await forky(instance, "events", "--since", "10m", "--json")).document] == [2]
    assert [e["sequence"] for e in (await forky(instance, "events", "--kind", "machine", "--json")).document] == [1]
    assert "not a time" in (await forky(instance, "events", "--since", "yesterday")).err
    child = await start(instance.home, "events", "-f", "--json", "--after", "1")
    assert child.stdout is not None
    assert json.loads(await asyncio.wait_for(child.stdout.readline(), 30))["sequence"] == 2
    instance.controller.events.append(model.Event(sequence=3, time_us=now, kind="machine.stopped", subject="m-0"))
    assert json.loads(await asyncio.wait_for(child.stdout.readline(), 30))["kind"] == "machine.stopped"
    child.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(child.wait(), 30) == 130


async def test_top(instance: Instance) -> None:
    web, idle = instance.controller.add_machine("web"), instance.controller.add_machine("idle")
    row = instance.observation.usage.machines.add(machine=convert.machine_to_wire(web), last_pause_ms=12.5)
    row.usage.CopyFrom(observe_pb2.MachineUsage(machine=web.id, private_bytes=10 << 20, shared_bytes=90 << 20))
    row.usage.memory_time_us, row.usage.proportional_bytes, row.usage.resident_bytes = 1, 20 << 20, 100 << 20
    instance.observation.usage.machines.add(machine=convert.machine_to_wire(idle))
    found = (await forky(instance, "top", "--json")).document["machines"]
    assert [each["name"] for each in found] == ["web", "idle"]
    assert (found[0]["cpu_percent"], found[0]["private_bytes"], found[0]["last_pause_ms"]) == (50.0, 10 << 20, 12.5)
    assert (found[1]["cpu_percent"], found[1]["private_bytes"]) == (None, None)
    drawn = (await forky(instance, "top", "--once", "--sort", "name")).out.splitlines()
    assert [line.split()[0] for line in drawn[:3]] == ["NAME", "idle", "web"]
    assert "50.0" in drawn[2]
    assert "10.0 MiB" in drawn[2]
    assert "no column to order by" in (await forky(instance, "top", "--sort", "size")).err
    assert (await forky(instance, "metrics")).out == "forky_machines 1.0\n"
