"""What a network of its own costs a machine and its forks: the parent's pause, a child's time to ready, and what a
client of the parent notices. Against QEMU's user-mode network in the same run, in turns."""

import asyncio
import json
import os
import sys

from bench.instance import instance
from bench.session import Session
from forkypig.errors import NotPossibleNow
from forkypig.sdk.machine import Machine

SECTION = "network"
KINDS = ("user", "nat")

# Answers a line with the same line.
_SERVER = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
server = Server(("0.0.0.0", 7000), Echo)
open("/run/serving", "w")
server.serve_forever()
"""

# One request after the other over one connection, every 10 ms; says how long each answer took, in ms.
_CLIENT = """
import json, socket, sys, time
took = []
with socket.create_connection((sys.argv[1], 7000), timeout=30) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = s.makefile()
    print("open", flush=True)
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        began = time.monotonic()
        s.sendall(b"%d\\n" % len(took))
        assert int(lines.readline()) == len(took)
        took.append((time.monotonic() - began) * 1000)
        time.sleep(0.01)
    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
print(json.dumps({"took_ms": took, "retransmits": int.from_bytes(info[100:104], sys.byteorder)}))
"""


async def run(session: Session) -> None:
    """An instance for each kind, twice in turns, as the host's load drifts; then the request loop."""
    pauses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    ready: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(session.times(3, 1)):
        for kind in KINDS:
            await _forks(session, kind, pauses[kind], ready[kind])
    for kind in KINDS:
        session.tell(session.results.add(SECTION, "pause", "ms", pauses[kind], kind=kind))
        session.tell(session.results.add(SECTION, "one child ready", "ms", ready[kind], kind=kind))
    await _request_loop(session)


async def _forks(session: Session, kind: str, pauses: list[float], ready: list[float]) -> None:
    os.environ["FORKY_NETWORK"] = kind  # read by the daemons that we start
    try:
        async with instance() as here:
            machine = await here.forky.run()
            for _ in range(session.times(10, 4)):
                await asyncio.sleep(0.5)
                made = await machine.fork(1)
                pauses.append(made.pause_ms)
                ready += [child.ready_ms or 0.0 for child in made.children]
                for child in made.children:
                    await child.remove()
    finally:
        del os.environ["FORKY_NETWORK"]


async def _request_loop(session: Session) -> None:
    """A client on the host keeps one connection to a machine that forks again and again."""
    machine = await session.forky.run()
    address = machine.info.address
    if address is None:
        session.results.notes.append("No request loop: machines have no addresses here (see forky status).")
        return
    await _serve(machine)
    forks = session.times(8, 3)
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _CLIENT, address, str(forks * 2.5 + 1)), stdout=asyncio.subprocess.PIPE
    )
    assert client.stdout is not None
    await client.stdout.readline()
    for _ in range(forks):
        await asyncio.sleep(1.5)
        for child in (await machine.fork(1)).children:
            await child.remove()
    out = await client.stdout.read()
    if await client.wait() != 0:
        raise NotPossibleNow("the connection to the parent broke in a fork: its client says why, above")
    found = json.loads(out)
    session.tell(session.results.add(SECTION, "answer over an open connection", "ms", found["took_ms"], forks=forks))
    session.tell(session.results.add(SECTION, "retransmits", "segments", [found["retransmits"]], forks=forks))
    await session.instance.clear()


async def _serve(machine: Machine) -> None:
    await machine.write_file("/root/server.py", _SERVER.encode())
    start = "setsid python3 /root/server.py </dev/null >/dev/null 2>&1 & until [ -e /run/serving ]; do sleep 0.1; done"
    await machine.exec(["sh", "-c", start], timeout_s=60)
