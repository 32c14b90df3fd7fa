"""Children are machines of their own: what docs/identity.md promises, in real guests."""

import re
import subprocess
import time

import pytest

from tests.live.conftest import CHECKOUT, Instance, new_instance

DOCUMENT = (CHECKOUT / "docs/identity.md").read_text()


def example(language: str) -> str:
    """The example of docs/identity.md in this language; there is one of each."""
    found = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def put(forky: Instance, machine: str, path: str, text: str) -> None:
    forky.ok("exec", machine, "-i", "--", "sh", "-c", f"cat > {path}", stdin=text.encode())


def begin(forky: Instance, machine: str, path: str, *arguments: str) -> None:
    """Starts a Python program in the background; it says something on its output when it is ready."""
    out = f"{path}.out"
    forky.sh(
        machine,
        f"rm -f {out}; nohup python3 -u {path} {' '.join(arguments)} >{out} 2>&1 & "
        f"for i in $(seq 300); do [ -s {out} ] && break; sleep 0.1; done; [ -s {out} ]",
    )


def children(forky: Instance, machine: str, *arguments: str) -> list[str]:
    return [str(child["name"]) for child in forky.json("fork", machine, *arguments)["children"]]


# -- names and network


def test_each_has_names_of_its_own(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "n")
    everyone = ["n", *children(forky, "n", "-n", "2")]
    everyone += children(forky, everyone[-1], "--name", "grandchild")
    for command in (
        "hostname",
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /run/forky/generation",
    ):
        answers = [forky.sh(machine, command) for machine in everyone]
        assert len(set(answers)) == len(everyone), (command, answers)
    boot_id = forky.sh(everyone[1], "cat /proc/sys/kernel/random/boot_id")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", boot_id)
    assert (
        forky.sh(everyone[1], "cat /proc/sys/kernel/random/boot_id") == boot_id
    )  # not the kernel's /uuid, which changes


READ = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
connection.sendall(b"hi\\n")
lines = connection.makefile()
print("connected", lines.readline().split()[-1])
try:
    print("read", repr(lines.readline()))
except OSError as error:
    print("error", type(error).__name__)
"""
SERVE = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line); self.wfile.flush()
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
print("serving")
Server(("0.0.0.0", 7000), Echo).serve_forever()
"""


def test_inherited_connections_end_at_once_or_stay_silent(clean: Instance) -> None:
    """A program that only waits hears of it; connections inside of the guest stay, and so do the parent's."""
    forky = clean
    forky.ok("run", "--name", "other")
    forky.ok("run", "--name", "t")
    put(forky, "other", "/root/serve.py", SERVE)
    begin(forky, "other", "/root/serve.py")
    for name, text in (("serve", SERVE), ("outer", READ), ("inner", READ), ("own", READ)):
        put(forky, "t", f"/root/{name}.py", text)
    begin(forky, "t", "/root/serve.py")
    begin(forky, "t", "/root/outer.py", forky.json("inspect", "other")["address"])
    begin(forky, "t", "/root/inner.py", "127.0.0.1")
    begin(forky, "t", "/root/own.py", "10.0.2.15")
    waiting = "connected hi"
    [reset] = children(forky, "t", "--name", "reset", "--tcp", "reset")
    [silent] = children(forky, "t", "--name", "silent", "--tcp", "silent")
    deadline = time.monotonic() + 60
    while (said := forky.sh(reset, "cat /root/outer.py.out").splitlines())[-1] == waiting:
        assert time.monotonic() < deadline
    assert said == [waiting, "error ConnectionAbortedError"]
    for machine, names in (
        (reset, ("inner", "own")),
        (silent, ("outer", "inner", "own")),
        ("t", ("outer", "inner", "own")),
    ):
        for name in names:
            assert forky.sh(machine, f"cat /root/{name}.py.out") == waiting, (machine, name)


# -- entropy


DRAW = """
import os, time
print("drawing")
with open("/root/draws", "w", buffering=1) as out:
    while True:
        before = open("/run/forky/generation").read().strip()
        draw = os.urandom(8).hex()
        after = open("/run/forky/generation").read().strip()
        if before == after:  # else it stood still between the two, and the draw belongs to neither
            out.write(f"{before} {draw} {time.monotonic()}\\n")
        time.sleep(0.002)
"""


def draws(forky: Instance, machine: str) -> list[list[str]]:
    """Generation, random bytes and monotonic clock of each time round."""
    forky.sh(machine, "pkill -STOP -f '[d]raw.py'; sleep 0.1")
    return [line.split() for line in forky.sh(machine, "cat /root/draws").splitlines()[:-1]]


def test_no_process_runs_on_shared_entropy_when_it_is_quiesced(clean: Instance) -> None:
    """Every child's last look at the old generation is the parent's last before the split: the same one in all."""
    forky = clean
    forky.ok("run", "--name", "e")
    put(forky, "e", "/root/draw.py", DRAW)
    begin(forky, "e", "/root/draw.py")
    names = children(forky, "e", "-n", "4", "--quiesce")
    time.sleep(0.5)
    parent = draws(forky, "e")
    generation = parent[0][0]
    common = set()
    firsts = set()
    for name in names:
        lines = draws(forky, name)
        before = next(n for n, line in enumerate(lines) if line[0] != generation)
        assert [line[:2] for line in lines[:before]] == [line[:2] for line in parent[:before]]
        assert lines[before:], "it goes on"
        assert not {line[1] for line in lines[before:]} & {line[1] for line in parent[before:]}
        common.add(before)
        firsts.add(lines[before][1])
        ticks = [float(line[2]) for line in lines]
        assert ticks == sorted(ticks), "the monotonic clock jumped back"
    assert len(common) == 1, "one of them ran before it was another"
    assert len(firsts) == len(names)
    assert len(parent) > max(common), "the parent goes on too"


def ask(forky: Instance, machine: str) -> tuple[str, str]:
    """What the server of the example says: from Python's random, and from OpenSSL."""
    said = forky.sh(
        machine, "python3 -c 'import socket; print(socket.create_connection((\"127.0.0.1\", 7070)).makefile().read())'"
    )
    mersenne, openssl = said.split()
    return mersenne, openssl


@pytest.mark.parametrize("quiesce", [pytest.param((), marks=pytest.mark.long), ("--quiesce",)])
def test_the_contract_for_programs(clean: Instance, quiesce: tuple[str, ...]) -> None:
    """The document's server and hook as they stand there; and the server without its request for a signal."""
    forky = clean
    server = example("python")
    careless = server.replace("if request.parent.is_dir():\n", "if False:\n")
    assert careless != server
    for name, text in (("careful", server), ("careless", careless)):
        forky.ok("run", "--name", name)
        put(forky, name, "/root/server.py", 'print("starting", flush=True)\n' + text)
        begin(forky, name, "/root/server.py")
        deadline = time.monotonic() + 30
        while (
            forky.sh(name, "python3 -c 'import socket; print(socket.socket().connect_ex((\"127.0.0.1\", 7070)))'")
            != "0"
        ):
            assert time.monotonic() < deadline
        forky.sh(name, "mkdir -p /etc/forky/fork.d /var/lib/application")
        put(forky, name, "/etc/forky/fork.d/10-application", example("sh"))
        put(forky, name, "/etc/forky/fork.d/20-fails", "#!/bin/sh\nexit 3\n")
        forky.sh(name, "chmod 755 /etc/forky/fork.d/*")
        ask(forky, name)  # both generators have a state now
    told = children(forky, "careful", "-n", "2", *quiesce)
    said = [ask(forky, name) for name in told]
    assert said[0][0] != said[1][0]
    assert said[0][1] != said[1][1]
    for name in told:
        assert forky.sh(name, "cat /var/lib/application/instance-id") == forky.sh(name, "cat /run/forky/generation")
        assert forky.sh(name, "cat /var/log/forks") == f"{name} was forked from careful"
    said = [ask(forky, name) for name in children(forky, "careless", "-n", "2", *quiesce)]
    assert said[0][0] == said[1][0], "Python's random would need no contract"
    assert said[0][1] == said[1][1], "OpenSSL would need no contract"


# -- clocks


def test_the_wall_clock_is_the_hosts(clean: Instance) -> None:
    """Also for a child of a snapshot that is older: each asked when it has just been handed out."""
    forky = clean
    forky.ok("run", "--name", "c")
    snapshot = forky.json("snapshot", "c")["id"]
    time.sleep(2)
    for source in ("c", snapshot):
        for name in children(forky, source, "-n", "3", "--name", f"from-{source}"):
            for _ in range(5):  # an answer that took long proves nothing
                began = time.time()
                guest = float(forky.sh(name, "date +%s.%N"))
                ended = time.time()
                if ended - began < 0.3:
                    break
            assert began - 0.05 <= guest <= ended + 0.05, (source, name)


# -- secrets


HOLD = """
import os, time
copy = bytearray(os.environb[b"TOKEN"])
pair = b"TOKEN=" + bytes(copy)
print("holding")
while True:
    time.sleep(0.2)
    open("/root/seen", "w").write(repr((bytes(copy), pair)))
"""


def test_secrets_are_forgotten_in_children(clean: Instance) -> None:
    forky = clean
    secret = "tok-5e1f0ddc7a9b"
    forky.ok("run", "--name", "s")
    put(forky, "s", "/root/hold.py", HOLD)
    forky.sh(
        "s",
        f"TOKEN={secret} nohup python3 -u /root/hold.py >/root/out 2>&1 & until [ -s /root/seen ]; do sleep 0.1; done",
    )
    [kept] = children(forky, "s", "--name", "kept")
    [forgot] = children(forky, "s", "--name", "forgot", "--forget", "TOKEN,OTHER", "--quiesce")
    environments = "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c TOKEN= || true"
    for name, held in (("s", True), (kept, True), (forgot, False)):
        time.sleep(0.5)
        seen = forky.sh(name, "cat /root/seen")
        assert (secret in seen) == held, (name, seen)
        assert (forky.sh(name, environments) != "0") == held, name
    assert "x" * len(secret) in forky.sh(forgot, "cat /root/seen")


def test_files_that_the_images_settings_name_are_gone_in_forks() -> None:
    """In forks of machines; a machine that starts from the template has what its image has."""
    forky = new_instance()
    try:
        cache = (forky.home / "images").readlink()
        (forky.home / "images").unlink()  # settings of our own: the others' images stay as they are
        subprocess.run(["cp", "-a", "--reflink=auto", str(cache), str(forky.home / "images")], check=True)
        assert "absolute" in forky.fails("image", "set", "debian-12", "--forget", "etc/secret", code=2)
        forky.ok("image", "set", "debian-12", "--forget", "/etc/secret,/root/keys")
        assert forky.json("image", "inspect", "debian-12")["forget_files"] == ["/etc/secret", "/root/keys"]
        forky.ok("run", "--name", "s")
        forky.sh("s", "echo x > /etc/secret; mkdir /root/keys; echo y > /root/keys/one; echo z > /root/other; sync")
        [child] = children(forky, "s")
        assert forky.sh(child, "ls -d /etc/secret /root/keys /root/other 2>/dev/null || true") == "/root/other"
        assert forky.sh("s", "cat /etc/secret /root/keys/one") == "x\ny"
        forky.ok("rm", "--all")
    finally:
        forky.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(forky.home)], check=False)


def test_a_machine_that_is_not_to_be_forked_refuses(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "vault", "--no-fork")
    assert "vault" in forky.fails("fork", "vault")
    assert forky.sh("vault", "hostname") == "vault"
    assert [machine["name"] for machine in forky.json("ps")] == ["vault"]


def test_a_snapshot_of_a_quiesced_machine(clean: Instance) -> None:
    """Its children are made later, and their processes go on when each is itself."""
    forky = clean
    forky.ok("run", "--name", "q")
    put(forky, "q", "/root/draw.py", DRAW)
    begin(forky, "q", "/root/draw.py")
    forky.ok("snapshot", "q", "--quiesce", "--tag", "still")
    names = children(forky, "still", "-n", "2", "--name", "later")
    time.sleep(0.5)
    found = [draws(forky, name) for name in names]
    old = found[0][0][0]
    at = [next(n for n, line in enumerate(lines) if line[0] != old) for lines in found]
    assert at[0] == at[1]
    assert found[0][at[0]][1] != found[1][at[1]][1]
    assert len(draws(forky, "q")) > at[0]
