"""A small world for the tests of `net`: a namespace that plays the host, one that plays the outside, and guests.

    outside  198.18.0.1 ── eth0 198.18.0.2  host ── our bridge ── slots ── guests 10.0.2.15

The test's own thread, and the threads that it starts, are in the host's namespace.
"""

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

import pytest

from forkypig.net import namespace
from forkypig.net.config import GUEST_MAC, NetworkConfig
from forkypig.net.slot import Slot

T = TypeVar("T")

OUTSIDE, HOST, METADATA = "198.18.0.1", "198.18.0.2", "169.254.169.254"
MAC = ":".join(f"{byte:02x}" for byte in GUEST_MAC)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")


def ip(*arguments: str, inside: str | None = None) -> str:
    """Runs `ip`, in a namespace by name or in this thread's."""
    where = ["-n", inside] if inside else []
    result = subprocess.run(["ip", *where, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr}"
    return result.stdout


def nft(*arguments: str) -> str:
    """Runs `nft` in this thread's namespace."""
    return subprocess.run(["nft", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def within(name: str, work: Callable[[], T]) -> T:
    """Does something in a thread that is in a namespace; what it raises is raised here."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def go() -> None:
        try:
            with namespace.inside(namespace.DIRECTORY / name):
                outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join(60)
    if failure:
        raise failure[0]
    return outcome[0]


def new_socket(name: str, kind: int = socket.SOCK_STREAM, timeout_s: float = 20.0) -> socket.socket:
    """A socket in a namespace; it stays in there, whoever uses it."""
    made = within(name, lambda: socket.socket(socket.AF_INET, kind))
    made.settimeout(timeout_s)
    return made


def connect(name: str, address: str, port: int, timeout_s: float = 20.0) -> socket.socket:
    """A TCP connection from a namespace."""
    made = new_socket(name, timeout_s=timeout_s)
    try:
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def refused(name: str, address: str, port: int) -> bool:
    """Whether a connection is refused at once; a time-out or a success is not."""
    try:
        connect(name, address, port).close()
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    return False


def talk(connection: socket.socket, text: bytes = b"hello") -> str:
    """Sends a line over an open connection to `Echo` and gives whom the other side sees."""
    connection.sendall(text + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        part = connection.recv(4096)
        if not part:
            raise ConnectionResetError("closed by the other side")
        answer += part
    said, peer = answer.decode().rstrip().rsplit(" ", 1)
    assert said == text.decode()
    return peer


def ask(name: str, address: str, port: int) -> str:
    """Connects, and gives whom the other side sees."""
    with connect(name, address, port) as connection:
        return talk(connection)


def ping(name: str, address: str, timeout_s: float = 20.0) -> bool:
    """Whether an ICMP echo request is answered."""
    raw = within(name, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    number = os.getpid() % 0x8000
    request = struct.pack("!BBHHH", 8, 0, 0xFFFF - (0x0800 + number), number, 0)  # type, code, checksum, id, sequence
    end = time.monotonic() + timeout_s
    with raw, contextlib.suppress(OSError):
        raw.sendto(request, (address, 0))
        while (left := end - time.monotonic()) > 0:
            raw.settimeout(left)
            packet, peer = raw.recvfrom(2048)
            if peer[0] == address and packet[20] == 0 and packet[24:26] == request[4:6]:
                return True
    return False


def unheard(name: str, address: str) -> bool:
    """Whether an ICMP echo request is not answered within a quarter of a second."""
    return not ping(name, address, 0.25)


class Echo:
    """A TCP server, and a UDP one, that say back each line and who sent it. Ends with the test."""

    def __init__(self, name: str, address: str, port: int) -> None:
        self.tcp = new_socket(name, timeout_s=0.2)
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.tcp.bind((address, port))
        self.tcp.listen(64)
        self.udp = new_socket(name, socket.SOCK_DGRAM, timeout_s=0.2)
        self.udp.bind((address, port))
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept), threading.Thread(target=self._answer)]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                connection, peer = self.tcp.accept()
                thread = threading.Thread(target=self._talk, args=(connection, peer[0]))
                self._threads.append(thread)
                thread.start()

    def _talk(self, connection: socket.socket, peer: str) -> None:
        connection.settimeout(0.2)
        with connection, contextlib.suppress(OSError):
            line = b""
            while not self._ended.is_set():
                try:
                    part = connection.recv(65536)
                except TimeoutError:
                    continue
                if not part:
                    return
                line += part
                while b"\n" in line:
                    first, line = line.split(b"\n", 1)
                    connection.sendall(first + b" " + peer.encode() + b"\n")

    def _answer(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, peer = self.udp.recvfrom(65536)
                self.udp.sendto(data + b" " + peer[0].encode(), peer)

    def close(self) -> None:
        self._ended.set()
        for thread in list(self._threads):
            thread.join(5)
        self.tcp.close()
        self.udp.close()


class World:
    """Names of the namespaces, and what is made in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tag = f"fkt{os.getpid()}"
        self.host, self.outside = f"{self.tag}-host", f"{self.tag}-out"
        self._guests: list[str] = []
        self._servers: list[Echo] = []

    def config(self, **changes: object) -> NetworkConfig:
        """Settings of an instance in this world."""
        values: dict[str, object] = {
            "instance": self.tag,
            "bridge": "fk-test",
            "subnet": IPv4Network("10.112.0.0/24"),
            "mtu": 1500,
            "nameservers": (),
            "state": self.directory / "network.json",
        }
        return NetworkConfig(**(values | changes))  # type: ignore[arg-type]

    def echo(self, name: str, port: int, address: str = "0.0.0.0") -> Echo:
        server = Echo(name, address, port)
        self._servers.append(server)
        return server

    def also(self, name: str) -> None:
        """A namespace that the test made; it is removed with the others."""
        self._guests.append(name)

    def guest(self, slot: Slot, port: str = "g0") -> str:
        """A namespace that plays the machine in a slot, by a veth in place of a tap; the slot is switched to it."""
        name = f"{self.tag}-g{len(self._guests)}"
        ip("netns", "add", name)
        self._guests.append(name)
        ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name, inside=slot.name)
        ip("link", "set", port, "master", "br0", "up", inside=slot.name)
        flags = ["learning", "off", "flood", "off", "mcast_flood", "off", "bcast_flood", "off"]
        ip("link", "set", port, "type", "bridge_slave", *flags, inside=slot.name)
        ip("link", "set", "lo", "up", inside=name)
        configure_guest(name)
        slot.switch(port)
        return name

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for name in [*self._guests, self.outside, self.host]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)

    def leftovers(self) -> list[str]:
        """What a fabric that was closed with `remove` has left behind."""
        found = [name for name in namespace.names() if name.startswith(f"forky-{self.tag}")]
        found += [
            line.split(":")[1] for line in ip("-o", "link").splitlines() if ": lo:" not in line and "eth0" not in line
        ]
        found += nft("list", "tables").splitlines()
        return found


def configure_guest(name: str) -> None:
    """What the machine has set for itself, once, before any fork."""
    ip("link", "set", "eth0", "address", MAC, "up", inside=name)
    ip("addr", "add", "10.0.2.15/24", "dev", "eth0", inside=name)
    ip("route", "add", "default", "via", "10.0.2.2", inside=name)


@contextlib.contextmanager
def make_world(directory: Path) -> Iterator[World]:
    """A new world; this thread is in its host until the end, when everything of it is removed."""
    world = World(directory)
    try:
        for name in (world.host, world.outside):
            ip("netns", "add", name)
            ip("link", "set", "lo", "up", inside=name)
        ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", world.outside, inside=world.host)
        ip("addr", "add", f"{HOST}/24", "dev", "eth0", inside=world.host)
        ip("addr", "add", f"{OUTSIDE}/24", "dev", "eth0", inside=world.outside)
        ip("addr", "add", f"{METADATA}/32", "dev", "lo", inside=world.outside)
        for name in (world.host, world.outside):
            ip("link", "set", "eth0", "up", inside=name)
        ip("route", "add", "default", "via", OUTSIDE, inside=world.host)
        with namespace.inside(namespace.DIRECTORY / world.host):
            yield world
    finally:
        world.close()


def eventually(check: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Waits until something holds."""
    end = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
