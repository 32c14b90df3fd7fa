"""The guest's agent: what hostd asks for inside a machine, over the virtio-serial port `forky.agent.0`.

One file, longer than our others, because it is copied into images and runs as `python3 -I -S -B agent.py --init` (as
process 1) or `--service` (under another init). Standard library only, and little of it: under TCG every module that is
imported before the first answer costs milliseconds, so `json`, `signal`, `socket`, `subprocess` and `tarfile` are
loaded after it, and templates hand them to their children loaded. The host imports the frames and `Session` from here.

The channel is a stream of bytes that can lose its middle: a machine that is forked has a new peer without noticing, and
half a frame may be left on either side. Frames carry a magic number, a checksum and the tag of their session, so that
whatever is stale or torn is skipped. Within a session frames are numbered, kept until they are acknowledged, and sent
again after a RESUME: nothing is lost or doubled when the machine goes on in another QEMU process. Data of a call is
sent only against credit, so a slow reader stops its own call and no other, and no buffer grows without bound.
"""

# ruff: noqa: PTH101, PTH103, PTH104, PTH106, PTH108, PTH110, PTH112, PTH114, PTH115, PTH116, PTH118, PTH119, PTH120
# ruff: noqa: PTH123, PTH208, PTH211, S103, S104, S108, S606, SIM105
# (pathlib, contextlib and the like cost milliseconds at every start; what runs here is the guest's own root.)

from __future__ import annotations

import errno
import os
import select
import struct
import sys
import time
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable, Iterable, Iterator
    from typing import IO

VERSION = "1"
PORT_NAME = "forky.agent.0"

# ---------------------------------------------------------------------------------------------------------------------
# Frames

MAGIC = b"\xfbFP\xa7"
_HEADER = struct.Struct(">4sBxxxIIQI")  # magic, type, session tag, call, sequence number, length of the payload
_CRC = struct.Struct(">I")  # of header and payload, between the two
_NUMBER = struct.Struct(">Q")
OVERHEAD = _HEADER.size + _CRC.size
MAX_PAYLOAD = 65536
CHUNK = 32768  # of data in one frame; also the most that a virtio port takes at once

# Types of frames. Those below 16 are not numbered and not kept: losing one costs a repetition.
HELLO = 1  # host: a session begins; identity
WELCOME = 2  # guest: what became of it
RESUME = 3  # host: the session goes on over this connection; the last number received. Wants RESUMED
RESUMED = 4  # the last number received; what follows it is sent again. By itself: a gap was seen
ACK = 5  # the last number received
UNKNOWN = 6  # guest: the session of a RESUME is not mine
OPEN = 16  # host: a call begins; the first byte says whether more OPENs of this call follow
DATA = 17  # the first byte is the stream
END_OF_INPUT = 18  # host
CONTROL = 19  # host: resize, signal, cancel
STARTED = 20  # guest: the command runs
RESULT = 21  # guest: the call is over
CREDIT = 22  # this many more bytes of data may be sent in this call
_KNOWN = frozenset(
    (HELLO, WELCOME, RESUME, RESUMED, ACK, UNKNOWN, OPEN, DATA, END_OF_INPUT, CONTROL, STARTED, RESULT, CREDIT)
)
_MAX_CONTROL = 4096  # no unnumbered frame is longer

STDIN, STDOUT, STDERR = 0, 1, 2

WINDOW = 256 << 10  # bytes of data that a call may have under way in one direction
SESSION_WINDOW = 4 << 20  # bytes of numbered frames that may be unacknowledged before commands' output is left unread
MAX_OPEN = 2 << 20  # what a command's arguments and environment may take together, about what the kernel allows

# How long a frame may stay incomplete before what has come of it is searched for a frame of its own: the sender of
# the first half may be a process that is gone.
STALL_S = 0.005


class Frame:
    """One frame as it came."""

    __slots__ = ("call", "payload", "sequence", "tag", "type")

    def __init__(self, type_: int, tag: int, call: int, sequence: int, payload: bytes) -> None:
        self.type, self.tag, self.call, self.sequence, self.payload = type_, tag, call, sequence, payload


def encode(type_: int, tag: int, call: int = 0, sequence: int = 0, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    header = _HEADER.pack(MAGIC, type_, tag, call, sequence, len(payload))
    return header + _CRC.pack(zlib.crc32(payload, zlib.crc32(header))) + payload


def pack(*fields: tuple[str, str | bytes]) -> bytes:
    """Names and values, names may repeat; the whole is what `unpack` takes apart. Not JSON: its import costs 10 ms."""
    parts: list[bytes] = []
    for name, value in fields:
        for item in (name, value):
            data = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
            parts += (_CRC.pack(len(data)), data)
    return b"".join(parts)


def unpack(payload: bytes) -> list[tuple[str, bytes]]:
    """The inverse of `pack`. Raises ValueError when it is not one."""
    items: list[bytes] = []
    at, size = 0, len(payload)
    while at < size:
        if at + 4 > size:
            raise ValueError("a field is cut off")
        end = at + 4 + _CRC.unpack_from(payload, at)[0]
        if end > size:
            raise ValueError("a field is cut off")
        items.append(payload[at + 4 : end])
        at = end
    if len(items) % 2:
        raise ValueError("a name has no value")
    return [(items[i].decode("utf-8", "surrogateescape"), items[i + 1]) for i in range(0, len(items), 2)]


def text(value: bytes) -> str:
    """A field's value as text; bytes that are no UTF-8 survive the way to a system call."""
    return value.decode("utf-8", "surrogateescape")


def number(value: int) -> bytes:
    """The payload of ACK, RESUME, RESUMED and CREDIT."""
    return _NUMBER.pack(value)


def to_number(payload: bytes) -> int:
    """The inverse of `number`. Raises ValueError."""
    if len(payload) != _NUMBER.size:
        raise ValueError("not a number")
    return int(_NUMBER.unpack(payload)[0])


class Decoder:
    """Takes bytes in as they come and gives frames out; skips whatever is not one."""

    __slots__ = ("_buffer", "_searched", "skipped")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0
        self.skipped = 0  # bytes that belonged to no frame

    def feed(self, data: bytes) -> None:
        """Adds bytes from the channel."""
        self._buffer += data

    @property
    def stalled(self) -> bool:
        """Whether a frame is incomplete and `resynchronise` has not looked at it in this state."""
        return len(self._buffer) > 0 and len(self._buffer) != self._searched

    def frames(self) -> Iterator[Frame]:
        """The complete frames so far."""
        buffer = self._buffer
        while len(buffer) >= OVERHEAD:
            if not buffer.startswith(MAGIC):
                found = buffer.find(MAGIC)
                self._drop(found if found >= 0 else len(buffer) - len(MAGIC) + 1)
                continue
            length = int.from_bytes(buffer[_HEADER.size - 4 : _HEADER.size], "big")
            if buffer[4] not in _KNOWN or length > (_MAX_CONTROL if buffer[4] < OPEN else MAX_PAYLOAD):
                self._drop(1)
                continue
            if len(buffer) < OVERHEAD + length:
                return
            frame = self._frame_at(0, length)
            if frame is None:
                self._drop(1)
                continue
            del buffer[: OVERHEAD + length]
            self._searched = 0
            yield frame

    def resynchronise(self) -> Frame | None:
        """To be called when an incomplete frame has not grown for STALL_S: gives the HELLO, RESUME or the like that
        ends what came, if there is one, and forgets what was before it. Numbered frames don't count: they are sent
        again, and their contents may look like anything."""
        buffer = self._buffer
        self._searched = len(buffer)
        at = buffer.rfind(MAGIC, 1)
        while at > 0:
            length = len(buffer) - at - OVERHEAD
            if length >= 0 and buffer[at + 4] < OPEN:
                frame = self._frame_at(at, length)
                if frame is not None:
                    self._drop(len(buffer))
                    return frame
            at = buffer.rfind(MAGIC, 1, at)
        return None

    def _frame_at(self, at: int, length: int) -> Frame | None:
        """The frame that begins at `at` and whose payload has this length, if its checksum holds."""
        head = bytes(self._buffer[at : at + OVERHEAD])
        payload = bytes(self._buffer[at + OVERHEAD : at + OVERHEAD + length])
        crc = zlib.crc32(payload, zlib.crc32(head[: _HEADER.size]))
        _, type_, tag, call, sequence, said = _HEADER.unpack_from(head)
        if said != length or crc != _CRC.unpack_from(head, _HEADER.size)[0]:
            return None
        return Frame(type_, tag, call, sequence, payload)

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self.skipped += count
        self._searched = 0


class Session:
    """The numbers of one session on one side: what was sent and not acknowledged, and what was received. No I/O."""

    __slots__ = ("_asked_again", "_unacknowledged", "received", "sent", "tag", "unacknowledged_bytes")

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.sent = 0
        self.received = 0
        self.unacknowledged_bytes = 0
        self._unacknowledged: dict[int, bytes] = {}
        self._asked_again = -1

    @property
    def full(self) -> bool:
        """Whether so much is unacknowledged that no more should be produced."""
        return self.unacknowledged_bytes >= SESSION_WINDOW

    def seal(self, type_: int, call: int, payload: bytes = b"") -> bytes:
        """A numbered frame, kept until it is acknowledged."""
        self.sent += 1
        frame = encode(type_, self.tag, call, self.sent, payload)
        self._unacknowledged[self.sent] = frame
        self.unacknowledged_bytes += len(frame)
        return frame

    def control(self, type_: int) -> bytes:
        """ACK, RESUME or RESUMED: the last number received."""
        return encode(type_, self.tag, payload=number(self.received))

    def accept(self, sequence: int) -> bool:
        """Whether the numbered frame is the next one; it counts as received then."""
        if sequence != self.received + 1:
            return False
        self.received = sequence
        return True

    def gap(self, sequence: int) -> bool:
        """Whether the peer should be asked to send again: once for each hole, as it sends all that follows it."""
        if sequence <= self.received + 1 or self._asked_again == self.received:
            return False
        self._asked_again = self.received
        return True

    def acknowledge(self, last: int) -> None:
        """The peer has all up to `last`."""
        kept = self._unacknowledged
        while kept and (first := next(iter(kept))) <= last:
            self.unacknowledged_bytes -= len(kept.pop(first))

    def replay(self) -> list[bytes]:
        """All that is unacknowledged, in order."""
        self._asked_again = -1
        return list(self._unacknowledged.values())


# ---------------------------------------------------------------------------------------------------------------------
# The port, or for tests a socket that behaves like it


class Port:
    """The virtio-serial port. A read gives b"" while no host is connected, a write takes nothing then."""

    def __init__(self) -> None:
        self.fd = -1

    def try_open(self) -> bool:
        """Opens the port if the kernel has it by now. There is no udev: devtmpfs has /dev/vportNpM, sysfs its name."""
        try:
            for device in os.listdir("/sys/class/virtio-ports"):
                with open(f"/sys/class/virtio-ports/{device}/name", "rb") as file:
                    if file.read().strip() == PORT_NAME.encode():
                        self.fd = os.open(f"/dev/{device}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                        return True
        except OSError:
            pass
        return False

    def read(self) -> bytes | None:
        """What is there: b"" means that nobody is at the other end, None that nothing has come."""
        try:
            return os.read(self.fd, MAX_PAYLOAD)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def write(self, data: bytes) -> int:
        """How many bytes the port took; 0 for now none."""
        try:
            return os.write(self.fd, data)
        except OSError:
            return 0


class Socket(Port):
    """A listening Unix socket, one connection at a time: for tests and for trying things without a machine."""

    def __init__(self, path: str) -> None:
        super().__init__()
        import socket

        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(1)
        self._connection: socket.socket | None = None

    def try_open(self) -> bool:
        if self._connection is not None:
            self._connection.close()
        self._connection, _ = self._listener.accept()
        self._connection.setblocking(False)
        self.fd = self._connection.fileno()
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Identity: what makes a fork's child a machine of its own. docs/identity.md is the contract for programs

_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
# Each program in /etc/forky/fork.d, and all of them together; the host gives a child 60 s.
HOOK_S = 10.0
HOOKS_S = 30.0
# The search through memory for what is to be forgotten. Under TCG it goes through some 100 MB a second.
FORGET_S = 40.0
# A value that is shorter is found in too many places that have nothing to do with it.
MIN_SECRET = 8
# The longest an answer to a greeting may be: it is one unnumbered frame.
_MAX_REPORT = 3600

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# Where DHCP clients keep leases and the identifiers they show to servers: dhclient, dhcpcd, NetworkManager,
# systemd-networkd. A directory in another, and how the names in it end; and files in /etc.
_LEASES = (
    ("var/lib", "dhcp", ".leases"),
    ("var/lib", "dhclient", ".leases"),
    ("var/lib", "dhcpcd", ""),
    ("var/lib", "NetworkManager", ".lease"),
    ("var/lib", "NetworkManager", "secret_key"),
    ("run", "systemd/netif/leases", ""),
)
_LEASE_FILES = ("dhcpcd.duid", "dhcpcd.secret")
# What most machines have nothing of, and a child should not look for one by one.
_RARE = {
    "etc": ("ssh", "forky", *_LEASE_FILES),
    "var/lib": ("dhcp", "dhclient", "dhcpcd", "NetworkManager"),
    "run": ("systemd",),
}
_GENERATION_BYTES = 33  # 32 digits and a newline
_TOLD_TO_HOOKS = ("generation", "hostname", "machine-id", "boot-id")
# Making the others takes seconds under TCG, so children don't wait for them.
_FAST_KEYS = ("ed25519", "ecdsa")


class Identity:
    """The steps that make a fork's child a machine of its own, in their order. Few system calls and no imports: right
    after a fork everything that runs is translated anew, and the user waits for it."""

    def __init__(self, root: str, skip: frozenset[str]) -> None:
        """`root` goes before every path that is written; the steps in `skip` are not done, which the answer says."""
        import fcntl

        self._ioctl = fcntl.ioctl
        self._root = root
        self._skip = skip
        self._random = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
        self._netlinks: dict[int, Netlink] = {}
        self._lookouts: dict[str, Lookout] = {}
        self._counts: list[int] = []  # open files that say how many TCP sockets there are,
        self._tables: list[int] = []  # and how many neighbours
        self._kept_neighbours = 0
        self.recount = False  # whether `count_neighbours` should be called later: IPv6 adds some soon after a start
        self._spare = -1  # the file that is to be the next generation's
        self.background: list[list[str]] = []  # commands that are to be run after the answer
        self.on_background: Callable[[], None] | None = None  # what to do when they have ended

    def prepare(self) -> None:
        """What every child would have to do otherwise: modules of the kernel and of Python, open sockets, mounts."""
        try:
            os.makedirs(f"{self._root}/run/forky/notify", exist_ok=True)
            os.chmod(f"{self._root}/run/forky/notify", 0o1777)
            for name, wanted in _RARE.items():
                self._lookouts[name] = Lookout(f"{self._root}/{name}", wanted, directories=name == "run")
            if "boot-id" not in self._skip:
                self._shadow_boot_id()
            self.prepare_generation()
            if "tcp" not in self._skip:
                self._netlink(_SOCK_DIAG).dump(*_TCP_DUMP)  # loads inet_diag and tcp_diag
                self._counts = _open_all("/proc/net/sockstat", "/proc/net/sockstat6")
            if "neighbours" not in self._skip:
                self.count_neighbours()
                self._tables = _open_all("/proc/net/stat/arp_cache", "/proc/net/stat/ndisc_cache")
        except OSError as error:
            complain(f"a fork of this machine may lack something: {error}")

    def take_on(self, fields: dict[str, bytes]) -> list[tuple[str, str]]:
        """Does every step that `fields` has something for; gives each one's name and what went wrong ("": nothing).

        Nothing is before the entropy. The programs' part (generation, notify, hooks) is the end: all else is done then.
        Doesn't raise.
        """
        hooks = "hooks" in fields and not self._absent("etc")
        parent = self._names_of_parent() if hooks else {}
        steps: list[tuple[str, Callable[[bytes], None]]] = [
            ("entropy", self._entropy),
            ("hostname", self._hostname),
            ("machine-id", self._machine_id),
            ("boot-id", self._boot_id),
            ("clock", self.clock),
            ("tcp", self._tcp),
            ("neighbours", self._neighbours),
            ("dhcp", self._dhcp),
            ("ssh", self._ssh),
            ("forget", self._forget),
            ("forget-files", self._forget_files),
            ("generation", self.generation),
        ]
        results = []
        for name, step in steps:
            value = fields.get(name)
            if value is None:
                continue
            problem = ""
            if name in self._skip:
                problem = "skipped: the agent was started with --skip"
            else:
                try:
                    step(value)
                except (OSError, ValueError) as error:
                    problem = str(error) or type(error).__name__
            results.append((name, problem))
        if "generation" in fields:
            results += [(f"notify:{name}", problem) for name, problem in self.notify()]
        if hooks:
            names = {f"FORKY_{name.upper().replace('-', '_')}": fields.get(name, b"") for name in _TOLD_TO_HOOKS}
            found = run_hooks(f"{self._root}/etc/forky/fork.d", {**parent, **names})
            results += [(f"hook:{name}", problem) for name, problem in found]
        return results

    def _names_of_parent(self) -> dict[str, bytes]:
        try:
            generation = _contents(f"{self._root}/run/forky/generation").strip()
        except OSError:
            generation = b""
        return {"FORKY_PARENT_HOSTNAME": os.uname().nodename.encode(), "FORKY_PARENT_GENERATION": generation}

    def _entropy(self, value: bytes) -> None:
        if len(value) < 32:
            raise ValueError("less than 32 bytes of entropy")
        self._ioctl(self._random, _RNDADDENTROPY, struct.pack("ii", len(value) * 8, len(value)) + value)
        self.reseed()

    def reseed(self) -> None:
        """Without this the generator would go on for up to a minute from the seed it shares with its siblings. Where
        the processor has a generator (RDSEED), the kernel mixes it in."""
        self._ioctl(self._random, _RNDRESEEDCRNG)

    def _hostname(self, value: bytes) -> None:
        if "kernel-hostname" not in self._skip:
            # The system call is the shorter way for a child, which inherits the module; a boot does without its import.
            if "socket" in sys.modules:
                sys.modules["socket"].sethostname(text(value))
            else:
                _overwrite("/proc/sys/kernel/hostname", value)
        _overwrite(f"{self._root}/etc/hostname", value + b"\n")
        path = f"{self._root}/etc/hosts"
        try:
            lines = _contents(path).split(b"\n")
        except FileNotFoundError:
            lines = [b"127.0.0.1 localhost", b"::1 localhost", b""]
        kept = [line for line in lines if not line.startswith(b"127.0.1.1")]
        _overwrite(path, b"127.0.1.1 " + value + b"\n" + b"\n".join(kept))

    def _machine_id(self, value: bytes) -> None:
        for directory in ("etc", "run"):
            _overwrite(f"{self._root}/{directory}/machine-id", value + b"\n")

    # The kernel's boot id can't be changed, so programs see a file in its place, as systemd-nspawn does it. The mount
    # is made before the first fork: a child only overwrites the file.

    def _shadow_boot_id(self) -> None:
        path = f"{self._root}/run/forky/boot-id"
        if os.path.exists(path):
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _overwrite(path, _contents(_BOOT_ID))
        try:
            if not self._root:
                bind(path, _BOOT_ID)
        except OSError:
            os.unlink(path)  # so that the next fork tries again, and says so
            raise

    def _boot_id(self, value: bytes) -> None:
        self._shadow_boot_id()
        _overwrite(f"{self._root}/run/forky/boot-id", value + b"\n")

    def clock(self, value: bytes) -> None:
        """Sets the wall clock; `value` is decimal nanoseconds since the epoch."""
        time.clock_settime_ns(time.CLOCK_REALTIME, int(value))

    def _absent(self, directory: str) -> bool:
        """Whether nothing of _RARE is in the directory, for sure."""
        return directory in self._lookouts and self._lookouts[directory].nothing_new()

    # -- the network

    def _netlink(self, family: int) -> Netlink:
        if family not in self._netlinks:
            self._netlinks[family] = Netlink(family)
        return self._netlinks[family]

    def _tcp(self, value: bytes) -> None:
        if value != b"reset":
            raise ValueError(f"«{text(value)}» is nothing to do with connections")
        # The list of connections is behind a large table of the kernel, which a child would fetch page by page.
        if not self._counts or any(sockets_in_use(os.pread(fd, 4096, 0)) for fd in self._counts):
            reset_connections(self._netlink(_SOCK_DIAG))

    def _neighbours(self, _value: bytes) -> None:
        # Those that stay belong to the interfaces. Where one of them has gone and another is learned, that one is kept:
        # the kernel asks it before it relies on it.
        known = sum(neighbours_in_table(os.pread(fd, 4096, 0)) for fd in self._tables)
        if self._tables and known <= self._kept_neighbours:
            return
        gone = self.count_neighbours()
        self._netlink(_ROUTE).ask([(_DELNEIGH, entry) for entry in gone])
        self.recount = True

    def count_neighbours(self) -> list[bytes]:
        """Takes down how many stay in a fork; gives the requests that remove the others. Raises OSError."""
        entries = self._netlink(_ROUTE).dump(*_NEIGHBOUR_DUMP)
        gone = [entry for entry in map(to_forget, entries) if entry]
        self._kept_neighbours, self.recount = len(entries) - len(gone), False
        return gone

    def _dhcp(self, _value: bytes) -> None:
        paths = [] if self._absent("etc") else [f"{self._root}/etc/{name}" for name in _LEASE_FILES]
        for top, directory, suffix in _LEASES:
            if not self._absent(top):
                names = _names(f"{self._root}/{top}/{directory}")
                paths += [f"{self._root}/{top}/{directory}/{name}" for name in names if name.endswith(suffix)]
        for path in paths:
            try:
                os.unlink(path)
            except (FileNotFoundError, IsADirectoryError):
                pass

    # -- SSH host keys

    def _ssh(self, _value: bytes) -> None:
        """The old keys are gone before the child is handed out. New ones of types that are quick to make are there then
        too, the others are made after it, unless there would be none at all."""
        if self._absent("etc"):
            return
        directory = f"{self._root}/etc/ssh"
        types = [name[9:-4] for name in _names(directory) if name.startswith("ssh_host_") and name.endswith("_key")]
        if not types:
            return
        now = [type_ for type_ in types if type_ in _FAST_KEYS] or types[:1]
        problems = []
        for type_ in types:
            path = f"{directory}/ssh_host_{type_}_key"
            wipe(path)
            wipe(f"{path}.pub")
            command = ["ssh-keygen", "-q", "-N", "", "-C", "", "-t", type_, "-f", path]
            if type_ not in now:
                self.background.append(command)
            elif _run(*command):
                problems.append(f"no new {type_} key could be made")
        self.reload_sshd()
        if self.background:
            self.on_background = self.reload_sshd
        if problems:
            raise OSError(", ".join(problems))

    def reload_sshd(self) -> None:
        """Lets the listening sshd read its keys again: it starts itself anew. Its sessions go on."""
        try:
            pid = int(_contents(f"{self._root}/run/sshd.pid"))
            if _contents(f"/proc/{pid}/comm") == b"sshd\n":
                os.kill(pid, 1)
        except (OSError, ValueError):
            pass  # there is none, or it is on its way

    # -- secrets

    def _forget(self, value: bytes) -> None:
        names = value.split(b"\0")
        for name in names:
            os.environ.pop(text(name), None)
        in_process(lambda: forget_variables(names), FORGET_S)

    def _forget_files(self, value: bytes) -> None:
        paths = [self._root + text(path) for path in value.split(b"\0")]
        in_process(lambda: wipe_all(paths), FORGET_S)

    # -- programs with random numbers, connections or caches of their own

    def prepare_generation(self) -> None:
        """Making a file takes as long as all else that is to be done with it."""
        if self._spare >= 0:
            return
        directory = f"{self._root}/run/forky"
        os.makedirs(directory, exist_ok=True)
        _overwrite(f"{directory}/generation.new", bytes(_GENERATION_BYTES))
        self._spare = os.open(f"{directory}/generation.new", os.O_WRONLY | os.O_CLOEXEC)

    def generation(self, value: bytes) -> None:
        """A new file takes the old one's place: whoever opens it reads either the one or the other."""
        if len(value) + 1 != _GENERATION_BYTES:
            raise ValueError("a generation has 32 digits")
        if self._spare < 0:
            self.prepare_generation()
        os.pwrite(self._spare, value + b"\n", 0)
        os.close(self._spare)
        self._spare = -1
        path = f"{self._root}/run/forky/generation"
        os.rename(f"{path}.new", path)

    @property
    def spent(self) -> bool:
        """Whether `prepare_generation` should be called when there is time."""
        return self._spare < 0

    def notify(self) -> list[tuple[str, str]]:
        """Signals the programs that asked for it; names each that could not be, and why."""
        directory = f"{self._root}/run/forky/notify"
        problems = []
        for name in _names(directory):
            try:
                if not signal_program(int(name), f"{directory}/{name}"):
                    os.unlink(f"{directory}/{name}")
            except (OSError, ValueError) as error:
                problems.append((name[:40], str(error)))
        return problems


def _names(directory: str) -> list[str]:
    """What is in a directory, sorted; nothing when it is not there."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


_QUIET_NS = 100_000_000  # some ticks of the kernel's clock, which stamps files


class Lookout:
    """Knows that names are not in a directory without looking for them: they were not there once, and the directory has
    not changed since. Right after a fork a look-up costs a child up to a millisecond, this a small part of it."""

    def __init__(self, directory: str, names: Iterable[str], *, directories: bool) -> None:
        """`directories`: that is what the names are, so a change of anything else does not matter, as there are many in
        /run. Otherwise what has changed just now is not relied on: another change in the same tick of the kernel's
        clock could go unseen."""
        self._fd = -1
        self._directories = directories
        self._was: tuple[int, int] | None = None
        try:
            self._fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        was = self._state()
        quiet = directories or time.time_ns() - was[0] > _QUIET_NS
        if quiet and not any(os.path.lexists(f"{directory}/{name}") for name in names):
            self._was = was

    def nothing_new(self) -> bool:
        return self._was is not None and self._state() == self._was

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return 0 if self._directories else found.st_mtime_ns, found.st_nlink


def report(steps: Iterable[tuple[str, str]]) -> bytes:
    """The steps as fields of the answer, in their order and no longer than it may be. What could be too many are hooks
    and signals, which are the last."""
    packed, left_out = b"", 0
    for name, problem in steps:
        field = pack((f"step:{name}", problem[:300]))
        if len(packed) + len(field) > _MAX_REPORT:
            left_out += 1
        else:
            packed += field
    return packed + (pack(("step:hook:more", f"{left_out} more: see the console")) if left_out else b"")


def _open_all(*paths: str) -> list[int]:
    """Those that are there: not all are in every network namespace, nor without IPv6."""
    return [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths if os.path.exists(path)]


def bind(source: str, target: str) -> None:
    """Mounts a file over another, read-only. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (0x1000, 0x1000 | 0x20 | 0x1 | 0x2 | 0x4 | 0x8):  # MS_BIND; MS_REMOUNT, RDONLY, NOSUID, NODEV, NOEXEC
        if libc.mount(source.encode(), target.encode(), None, ctypes.c_ulong(flags), None):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def run_hooks(directory: str, variables: dict[str, bytes]) -> list[tuple[str, str]]:
    """Runs the programs in a directory one after the other; gives each one's name and what went wrong."""
    results = []
    environment = {b"PATH": _PATH, **{name.encode(): value for name, value in variables.items()}}
    until = time.monotonic() + HOOKS_S
    for name in _names(directory):
        path = f"{directory}/{name}"
        try:
            found = os.stat(path)
            if name.startswith(".") or found.st_mode & 0o170000 != 0o100000 or not found.st_mode & 0o100:
                continue
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                problem = "not run: others than root may change it"
            else:
                problem = _run_hook(path, environment, min(HOOK_S, until - time.monotonic()))
        except OSError as error:
            problem = _why(error)
        if problem:
            complain(f"{path}: {problem}")
        results.append((name[:60], problem))
    return results


def _run_hook(path: str, environment: dict[bytes, bytes], limit_s: float) -> str:
    if limit_s <= 0:
        return f"not run: those before it took more than {HOOKS_S:.0f} s"
    pid = os.posix_spawn(
        path,
        [path],
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)],
        setsid=True,
        setsigdef=(13, 17, 25),  # SIGPIPE, SIGCHLD, SIGXFSZ, which Python ignores or takes
    )
    if not _wait(pid, limit_s):
        _signal_group(pid, 9)
        os.waitpid(pid, 0)
        return f"it took more than {limit_s:.0f} s and was ended"
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "" if not code else f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"


def _wait(pid: int, limit_s: float) -> bool:
    """Whether a child of ours ends in time; it is not reaped."""
    ended = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(ended, select.POLLIN)
        return bool(poller.poll(limit_s * 1000))
    finally:
        os.close(ended)


def in_process(work: Callable[[], object], limit_s: float) -> None:
    """Does something in a fork of the agent and waits for it. Raises OSError with what went wrong."""
    result, result_end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:  # whatever it is, the agent hears of it
            os.write(result_end, (str(error) or type(error).__name__).encode()[:1000])
        os._exit(0)
    os.close(result_end)
    in_time = _wait(pid, limit_s)
    if not in_time:
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    problem = os.read(result, 1000)
    os.close(result)
    if problem or not in_time:
        raise OSError(text(problem) or f"it took more than {limit_s:.0f} s and was ended")


def signal_program(pid: int, request: str) -> bool:
    """Sends a program the signal that its request, a file, names. False: it is gone. Raises ValueError for a request
    that is not to be followed: a pid may be another program's by now, and anybody can write the file."""
    import signal

    try:
        status = dict(line.partition(b":")[::2] for line in _contents(f"/proc/{pid}/status").split(b"\n"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    if os.lstat(request).st_uid not in (0, int(status[b"Uid"].split()[1])):
        raise ValueError("the request is not from the program's own user")
    name = text(_contents(request)).strip()
    number_ = int(name) if name.isdigit() else int(getattr(signal, "SIG" + name.removeprefix("SIG"), 0))
    if not 0 < number_ < 65:
        raise ValueError(f"«{name[:40]}» is no signal")
    if not int(status[b"SigCgt"], 16) >> (number_ - 1) & 1:
        raise ValueError(f"it does not handle signal {number_}, which would end it")
    os.kill(pid, number_)
    return True


# -- netlink (include/uapi/linux: netlink.h, inet_diag.h, neighbour.h)

_ROUTE, _SOCK_DIAG = 0, 4
_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DELNEIGH, _GETNEIGH = 29, 30
_DIAG_BY_FAMILY, _DIAG_DESTROY = 20, 21
_NDMSG = struct.Struct("=BxxxiHBB")  # family, interface, state, flags, type
_NUD_KEPT = 0x80 | 0x40  # NUD_PERMANENT, NUD_NOARP
# inet_diag_req_v2: family, protocol, extensions, states, and the 48 bytes of inet_diag_sockid
_DIAG_REQUEST = struct.Struct("=BBBxI48s")
_TCP = 6
_TIME_WAIT = 6
_TCP_STATES = 0xFFE & ~(1 << 7 | 1 << 10)  # all but CLOSE and LISTEN
_TCP_DUMP = (_DIAG_BY_FAMILY, _DIAG_REQUEST.pack(2, _TCP, 0, _TCP_STATES, b""))
_NEIGHBOUR_DUMP = (_GETNEIGH, _NDMSG.pack(0, 0, 0, 0, 0))


class Netlink:
    """A netlink socket."""

    def __init__(self, family: int) -> None:
        import socket

        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._sequence = 0

    def dump(self, type_: int, payload: bytes) -> list[bytes]:
        """The payloads that answer a request for all of something. Raises OSError."""
        self._send([(type_, 0x301, payload)])  # NLM_F_REQUEST, NLM_F_DUMP
        found: list[bytes] = []
        while True:
            for sequence, kind, data in messages(self._socket.recv(65536)):
                if sequence != self._sequence:
                    continue
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    code = -int.from_bytes(data[:4], sys.byteorder, signed=True)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return found
                found.append(data)

    def ask(self, requests: list[tuple[int, bytes]]) -> None:
        """Sends requests and waits for all answers. What is gone already is no error. Raises the last OSError."""
        problem = 0
        for at in range(0, len(requests), 64):
            part = requests[at : at + 64]
            self._send([(type_, 0x5, payload) for type_, payload in part])  # NLM_F_REQUEST, NLM_F_ACK
            waiting = len(part)
            while waiting:
                for sequence, kind, data in messages(self._socket.recv(65536)):
                    if kind == _NLMSG_ERROR and self._sequence - len(part) < sequence <= self._sequence:
                        waiting -= 1
                        code = -int.from_bytes(data[:4], sys.byteorder, signed=True)
                        problem = code if code and code != errno.ENOENT else problem
        if problem:
            raise OSError(problem, os.strerror(problem))

    def _send(self, requests: list[tuple[int, int, bytes]]) -> None:
        data = b""
        for type_, flags, payload in requests:
            self._sequence += 1
            data += _NLMSG.pack(_NLMSG.size + len(payload), type_, flags, self._sequence, 0)
            data += payload + bytes(-len(payload) % 4)
        self._socket.send(data)


def messages(data: bytes) -> list[tuple[int, int, bytes]]:
    """Sequence number, type and payload of each message in a datagram."""
    found, at = [], 0
    while at + _NLMSG.size <= len(data):
        length, kind, _, sequence, _ = _NLMSG.unpack_from(data, at)
        if length < _NLMSG.size:
            break
        found.append((sequence, kind, data[at + _NLMSG.size : at + length]))
        at += (length + 3) & ~3
    return found


def to_forget(neighbour: bytes) -> bytes:
    """The request that removes an entry of the neighbour table; b"" for one that was configured."""
    family, interface, state, flags, type_ = _NDMSG.unpack_from(neighbour)
    if state & _NUD_KEPT:
        return b""
    at = _NDMSG.size
    while at + 4 <= len(neighbour):
        length, kind = struct.unpack_from("=HH", neighbour, at)
        if kind == 1:  # NDA_DST
            return _NDMSG.pack(family, interface, state, flags, type_) + neighbour[at : at + length]
        at += max(4, (length + 3) & ~3)
    return b""


def neighbours_in_table(statistics: bytes) -> int:
    """How many entries /proc/net/stat/arp_cache or ndisc_cache says that there are: the first number, hexadecimal."""
    return int(statistics.split(b"\n")[1].split()[0], 16)


def sockets_in_use(statistics: bytes) -> bool:
    """Whether /proc/net/sockstat or sockstat6 says that there are TCP sockets; those that listen count too."""
    for line in statistics.split(b"\n"):
        if line.startswith((b"TCP: inuse ", b"TCP6: inuse ")):
            return line.split()[2] != b"0"
    return True


def reset_connections(diag: Netlink) -> None:
    """Ends the TCP connections whose peer is not in this guest: their users get ECONNABORTED at once, also those who
    wait. Raises OSError; EOPNOTSUPP without CONFIG_INET_DIAG_DESTROY."""
    found: list[bytes] = []
    for family in (2, 10):  # AF_INET, AF_INET6
        found += diag.dump(_DIAG_BY_FAMILY, _DIAG_REQUEST.pack(family, _TCP, 0, _TCP_STATES, b""))
    diag.ask(
        [
            (_DIAG_DESTROY, _DIAG_REQUEST.pack(entry[0], _TCP, 0, 1 << entry[1], entry[4:52]))
            for entry in outer_connections(found)
        ]
    )


def outer_connections(entries: list[bytes]) -> list[bytes]:
    """Those inet_diag_msg whose other end is not among the entries, nor a loopback address. Listeners are not given in;
    what waits for its time to run out has no user any more."""
    ends = [_ends(entry) for entry in entries]
    known = set(ends)
    return [
        entry
        for entry, (local, remote) in zip(entries, ends, strict=True)
        if entry[1] != _TIME_WAIT and (remote, local) not in known and not _is_loopback(remote[0])
    ]


def _ends(entry: bytes) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """Address and port of both ends; IPv4 as it is mapped into IPv6, since either end may be a socket of that kind."""
    source, destination = entry[8:24], entry[24:40]
    if entry[0] == 2:
        source, destination = _MAPPED + source[:4], _MAPPED + destination[:4]
    return (source, entry[4:6]), (destination, entry[6:8])


_MAPPED = bytes(10) + b"\xff\xff"


def _is_loopback(address: bytes) -> bool:
    return address.startswith(_MAPPED + b"\x7f") or address == bytes(15) + b"\x01"


# -- forgetting


def wipe(path: str) -> None:
    """Overwrites a file and removes it, a directory with all that is in it; what is not there is well. Links in a
    directory are removed and not followed; a path that is a link stands for its target too. Raises OSError."""
    if os.path.islink(path):
        target = os.path.realpath(path)
        os.unlink(path)
        path = target
    _wipe_tree(path)


def wipe_all(paths: list[str]) -> None:
    """`wipe` for each; one that can't be does not spare the others. Raises the first OSError at the end."""
    problem: OSError | None = None
    for path in paths:
        try:
            wipe(path)
        except OSError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def _wipe_tree(path: str) -> None:
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    kind = found.st_mode & 0o170000
    if kind == 0o040000:
        for name in os.listdir(path):
            _wipe_tree(f"{path}/{name}")
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a file system is mounted there: it is empty now
                raise
        return
    if kind == 0o100000:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for at in range(0, found.st_size, 1 << 20):
                os.pwrite(fd, bytes(min(1 << 20, found.st_size - at)), at)
            os.fsync(fd)  # or the zeros would never reach the disk: the blocks are given up next
        finally:
            os.close(fd)
    os.unlink(path)


def forget_variables(names: list[bytes]) -> None:
    """Wipes variables out of the environments of all processes, and their values out of all memory that processes could
    have copied them to. To be called in a process of its own, which it spares. Raises OSError for those it can't reach.

    A process that is forked meanwhile is found by another look. Frozen ones stay as they are.
    """
    done: set[int] = {os.getpid()}
    values: set[bytes] = set()
    problems: list[str] = []
    for _ in range(5):
        fresh = [pid for pid in user_processes() if pid not in done]
        if not fresh:
            break
        found = {value for pid in fresh for value in wipe_environment(pid, names)}
        # A value that is new has to be looked for everywhere; at the first look that is all there is.
        where = [*done - {os.getpid()}, *fresh] if found - values else fresh
        values |= found
        done.update(fresh)
        for pid in where if values else ():
            try:
                wipe_memory(pid, names, values)
            except (FileNotFoundError, ProcessLookupError):
                pass
            except OSError as error:
                problems.append(f"process {pid}: {error}")
    if problems:
        raise OSError("; ".join(problems[:3]))


def user_processes() -> Iterator[int]:
    """All processes but the kernel's and those that have ended: they execute nothing."""
    for name in os.listdir("/proc"):
        if name.isdigit() and is_user_process(int(name)):
            yield int(name)


def is_user_process(pid: int) -> bool:
    try:
        os.readlink(f"/proc/{pid}/exe")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        pass
    return True


def wipe_environment(pid: int, names: list[bytes]) -> list[bytes]:
    """Wipes NAME=VALUE where the kernel put it when the program was started; gives the values."""
    try:
        fields = _contents(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        start, end = int(fields[47]), int(fields[48])  # env_start, env_end: 50 and 51 in proc(5)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return []
    values = []
    try:
        environment = os.pread(memory, min(end - start, 4 << 20), start) if end > start else b""
        at = 0
        for item in environment.split(b"\0"):
            name, equals, value = item.partition(b"=")
            if equals and name in names:
                os.pwrite(memory, bytes(len(item)), start + at)
                values.append(value)
            at += len(item) + 1
    except OSError:
        pass  # it ended
    finally:
        os.close(memory)
    return values


def wipe_memory(pid: int, names: list[bytes], values: Iterable[bytes]) -> None:
    """Overwrites values in a process's private memory: NAME=VALUE by zeros, so that no list of variables has it any
    more, and what is left of the value by as many "x", so that strings keep their length. Raises OSError."""
    secrets = [value for value in values if len(value) >= MIN_SECRET]
    pairs = [(name + b"=" + value, bytes(len(name) + 1 + len(value))) for value in secrets for name in names]
    wanted = pairs + [(value, b"x" * len(value)) for value in secrets]
    if not wanted:
        return
    overlap = max(len(secret) for secret, _ in wanted) - 1
    with open(f"/proc/{pid}/maps", "rb") as maps:
        areas = [line.split(None, 5) for line in maps]
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for area in areas:
            if area[1][1:2] == b"w" and area[1][3:4] == b"p":
                start, _, end = area[0].partition(b"-")
                for first, last in present_runs(pagemap, int(start, 16), int(end, 16)):
                    _wipe_run(memory, first, last, wanted, overlap)
    finally:
        os.close(memory)
        os.close(pagemap)


_CHUNK_OF_MEMORY = 1 << 20


def _wipe_run(memory: int, start: int, end: int, wanted: list[tuple[bytes, bytes]], overlap: int) -> None:
    at = start
    while at < end:
        size = min(_CHUNK_OF_MEMORY + overlap, end - at)
        try:
            data = os.pread(memory, size, at)
        except OSError:  # unmapped meanwhile, or a page that can't be read
            data = b""
        # What was read stops before a page that can't be: it goes on behind that.
        step = _CHUNK_OF_MEMORY if len(data) == size else (len(data) | 4095) + 1
        for secret, substitute in wanted:
            found = data.find(secret)
            while found >= 0:
                os.pwrite(memory, substitute, at + found)
                data = data[:found] + substitute + data[found + len(secret) :]
                found = data.find(secret, found)
        at += step


def present_runs(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of an area that a process has touched: reading all of what a program reserves could take minutes."""
    page = 4096
    run = -1  # where the run that goes on began
    for at in range(start, end, page << 13):
        count = min(1 << 13, (end - at) // page)
        # Bits 63 (present) and 62 (swapped) of each page's 64: the highest of 8 bytes.
        flags = os.pread(pagemap, count * 8, at // page * 8)[7::8]
        if not any(flags):
            if run >= 0:
                yield run, at
                run = -1
            continue
        for index, flag in enumerate(flags):
            if flag & 0xC0:
                run = run if run >= 0 else at + index * page
            elif run >= 0:
                yield run, at + index * page
                run = -1
    if run >= 0:
        yield run, end


# ---------------------------------------------------------------------------------------------------------------------
# Standing still: no user process runs between the moment before a split and a child's fresh entropy

# After so long without a word from the host the guest goes on by itself. It can't know whether it is a copy, so it
# takes itself for one: its random numbers are seeded anew and its generation changes before anything runs.
FROZEN_S = 30.0
_FREEZE_POLL_S = 0.002


class Freezer:
    """Freezes all processes but the agent and the kernel's, by the freezer of cgroup v2.

    Nothing is prepared for it and commands start as ever: processes that are in the agent's own group, or above it, are
    moved to a group of theirs when it comes to it, and all other groups are frozen as they are.
    """

    def __init__(self, root: str = "") -> None:
        """`root`: a directory of cgroup2 in which the agent is; nothing outside of it is frozen. Empty: all is."""
        self._root = root
        self._frozen: list[str] = []

    @property
    def frozen(self) -> bool:
        return bool(self._frozen)

    def freeze(self, deadline_s: float) -> None:
        """Returns when none runs. Raises OSError and lets all go on when one does not stop in time, and says which."""
        if self._frozen:
            return
        until = time.monotonic() + deadline_s
        try:
            chain = self._chain()
            shelter = f"{chain[0]}/forky-user"
            os.makedirs(shelter, exist_ok=True)
            while True:
                changed = self._stop_all(chain, shelter)
                moving = [group for group in self._frozen if not _is_frozen(group)]
                if not changed and not moving:
                    return
                if time.monotonic() > until:
                    raise OSError(errno.ETIMEDOUT, _who_runs(moving))
                time.sleep(_FREEZE_POLL_S)
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> None:
        """Lets those go on that `freeze` stopped."""
        groups, self._frozen = self._frozen, []
        for group in reversed(groups):
            try:
                _overwrite(f"{group}/cgroup.freeze", b"0")
            except FileNotFoundError:
                pass

    def _chain(self) -> list[str]:
        """The groups from the root down to the agent's own. Raises OSError."""
        if self._root:
            return [self._root]
        mounted = [line.split() for line in _contents("/proc/mounts").split(b"\n") if b" cgroup2 " in line]
        own = [line for line in _contents("/proc/self/cgroup").split(b"\n") if line.startswith(b"0::/")]
        if not mounted or not own:
            raise OSError(errno.ENOSYS, "the guest has no cgroup v2, which is what freezes its processes")
        chain = [text(mounted[0][1])]
        for name in text(own[0][4:]).split("/"):
            if name:
                chain.append(f"{chain[-1]}/{name}")
        return chain

    def _stop_all(self, chain: list[str], shelter: str) -> bool:
        """Whether there was something left to stop."""
        changed = False
        for group in chain:
            for pid in map(int, _contents(f"{group}/cgroup.procs").split()):
                if pid and pid != os.getpid() and is_user_process(pid):
                    changed = _move(pid, shelter) or changed
            with os.scandir(group) as entries:
                others = [entry.path for entry in entries if entry.is_dir() and entry.path not in chain]
            for path in others:
                if path not in self._frozen and _contents(f"{path}/cgroup.freeze").strip() != b"1":
                    self._frozen.append(path)
                    _overwrite(f"{path}/cgroup.freeze", b"1")
                    changed = True
        return changed


def _move(pid: int, group: str) -> bool:
    """Whether the process could be moved; not when it has just ended."""
    try:
        _overwrite(f"{group}/cgroup.procs", str(pid).encode())
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


def _is_frozen(group: str) -> bool:
    try:
        return b"frozen 1" in _contents(f"{group}/cgroup.events")
    except FileNotFoundError:
        return True


def _who_runs(groups: list[str]) -> str:
    """Names a process that does not stop: one in the middle of a system call that can't be interrupted, or else any."""
    candidates: list[tuple[bool, str]] = []
    for group in groups:
        for directory, _, _ in os.walk(group):
            for pid in _contents(f"{directory}/cgroup.procs").split():
                for thread in _names(f"/proc/{text(pid)}/task"):
                    try:
                        name, _, rest = _contents(f"/proc/{text(pid)}/task/{thread}/stat").rpartition(b")")
                    except (FileNotFoundError, ProcessLookupError):
                        continue
                    state = text(rest.split()[0])
                    if state in "DR":
                        what = "is in a system call that can't be interrupted" if state == "D" else "runs on"
                        candidates.append(
                            (state != "D", f"process {text(pid)} ({text(name).partition('(')[2]}) {what}")
                        )
    return min(candidates)[1] if candidates else "processes do not stop in time"


def _contents(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def _overwrite(path: str, data: bytes) -> None:
    """Writes in place: after O_TRUNC, ext4 would write the blocks out at close, which a child would wait for."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        os.write(fd, data)
        if size > len(data):
            os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------------------
# Calls: each is a process, a command or a fork of the agent that does one of `_WORK`

# A command is over when it has exited and its output is drained; background children may keep the pipes open for ever,
# so this long after the exit what is in the pipes then is sent and the rest is not waited for.
DRAIN_S = 0.2
# IPv6 has told its neighbourhood of itself by then.
RECOUNT_S = 3.0
# Between asking a command to end (SIGHUP) and ending it.
KILL_S = 2.0
_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Refused(Exception):
    """A call that can't be: the kind of error, and why."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Call:
    """One call that is under way, and its process."""

    def __init__(self, id_: int, op: str) -> None:
        self.id, self.op = id_, op
        self.pid = 0
        self.stdin = -1
        self.terminal = -1
        self.input = bytearray()
        self.input_ended = False
        self.input_done = 0  # bytes consumed and not yet given back as credit
        self.outputs: dict[int, int] = {}  # descriptor: stream
        self.final: dict[int, int] = {}  # after DRAIN_S: how many bytes each descriptor still gives
        self.result = b""  # what a worker says of its work
        self.credit = WINDOW
        self.code: int | None = None
        self.exited_at = 0.0
        self.deadline = 0.0  # of the command's own time limit; 0: none
        self.kill_at = 0.0
        self.timed_out = False
        self.orphan = False  # its session is over: it goes on, but nobody is told


class Agent:
    """The loop: one thread, one epoll, everything else is a process of its own."""

    def __init__(self, port: Port, identity: Identity, init: bool, freezer: Freezer) -> None:
        self.port, self.identity, self.init, self.freezer = port, identity, init, freezer
        self.session: Session | None = None
        self.session_id = b""
        self.welcome = b""
        self.calls: dict[int, Call] = {}
        self.opening: dict[int, bytearray] = {}
        self.orphans: list[Call] = []
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.poller = select.epoll()
        self.decoder = Decoder()
        self.queue: list[bytes] = []
        self.writing = b""  # a part of the stream that has begun: it is finished whatever happens
        self.acknowledge = False
        self.settlers: list[int] = []  # calls that wait until nothing is left to prepare
        # Calls that came while user processes stand still, and what came for them: they begin when these go on.
        self.held: dict[int, tuple[str, list[tuple[str, bytes]], list[Frame]]] = {}
        self.recount_at = 0.0
        self.thaw_at = 0.0  # when to go on without a word from the host
        self.chores: list[Callable[[], object]] = [self._prepare_for_calls, identity.prepare]
        if init:
            self.chores.append(self._grow_root)
        self.chores.append(self._warm_up)
        self.prepared = False
        self.helpers: set[int] = set()  # processes of chores
        self.began = time.monotonic()
        self.poweroff_at = 0.0  # when to power off at the latest, whether the answer has gone out or not; 0: not asked

    # -- the loop

    def run(self) -> None:
        """Serves until the machine is powered off."""
        while not self.port.try_open():
            time.sleep(0.02)
        self._attach()
        while not self.poweroff_at or ((self.writing or self.queue) and time.monotonic() < self.poweroff_at):
            for fd, events in self.poller.poll(self._timeout_s()):
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler(events)
            self._on_time()
            self._flush()

    def _attach(self) -> None:
        """Edge-triggered: with nobody at the other end a port is readable and hung up all the time. The kernel wakes
        the poll when a host connects, so nothing is lost."""
        self.handlers[self.port.fd] = self._on_port
        self.poller.register(self.port.fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _timeout_s(self) -> float:
        """Until something has to be done by itself; -1 for ever: an idle machine should cost nothing."""
        if self.decoder.stalled:
            return STALL_S
        if (
            self.welcome
            and not self.freezer.frozen
            and not self.writing
            and not self.queue
            and (self.chores or (self.settlers and not self.helpers))
        ):
            return 0
        now = time.monotonic()
        due = [] if self.welcome or not self.chores else [now + 1.0]
        if self.freezer.frozen:
            due.append(self.thaw_at)
        elif self.identity.recount:
            due.append(self.recount_at)
        if self.writing or self.queue:
            due.append(now + 1.0)  # in case the wake-up for room in the port is missed
        for call in (*self.calls.values(), *self.orphans):
            if call.deadline:
                due.append(call.deadline)
            if call.kill_at:
                due.append(call.kill_at)
            if call.code is not None and not call.final:
                due.append(call.exited_at + DRAIN_S)
        return max(0.0, min(due) - now) if due else -1

    def _on_time(self) -> None:
        if self.decoder.stalled and self.port.fd >= 0:
            # Nothing may have come in the meantime: `_on_port` would have eaten it.
            frame = self.decoder.resynchronise()
            if frame is not None:
                self._on_frame(frame)
        now = time.monotonic()
        for call in (*self.calls.values(), *self.orphans):
            if call.deadline and now >= call.deadline:
                call.deadline, call.timed_out = 0.0, True
                _signal_group(call.pid, 9)
            if call.kill_at and now >= call.kill_at:
                call.kill_at = 0.0
                _signal_group(call.pid, 9)
            if call.code is not None and not call.final and now >= call.exited_at + DRAIN_S:
                self._last_drain(call)
        if self.freezer.frozen and now >= self.thaw_at:
            self._go_on_alone()
        elif self.identity.recount and now >= self.recount_at:
            self.identity.recount = False
            self.chores.append(self.identity.count_neighbours)
        idle = not self.writing and not self.queue and not self.decoder.stalled and not self.freezer.frozen
        if idle and self.chores and (self.welcome or now - self.began > 1.0):
            try:
                self.chores.pop(0)()
            except OSError as error:  # a full /run must not be the machine's end
                complain(f"a chore was not done: {error}")
        if self.settlers and not self.chores and not self.helpers:
            for id_ in self.settlers:
                self._finish(id_, ("code", "0"))
            self.settlers.clear()

    # -- the channel

    def _on_port(self, _events: int) -> None:
        while True:
            data = self.port.read()
            if not data:
                break
            self.decoder.feed(data)
            for frame in self.decoder.frames():
                self._on_frame(frame)
        if data == b"" and isinstance(self.port, Socket):
            self.poller.unregister(self.port.fd)
            del self.handlers[self.port.fd]
            self.port.try_open()
            self._attach()

    def _on_frame(self, frame: Frame) -> None:
        session = self.session
        try:
            if frame.type == HELLO:
                self._on_hello(frame)
            elif frame.type == RESUME and (session is None or frame.tag != session.tag):
                self.queue.append(encode(UNKNOWN, frame.tag))
            elif session is None or frame.tag != session.tag:
                return
            elif frame.type >= OPEN:
                if session.accept(frame.sequence):
                    self.acknowledge = True
                    self._on_call_frame(frame)
                elif session.gap(frame.sequence):
                    self.queue.append(session.control(RESUMED))
                else:
                    self.acknowledge = True
            elif frame.type == ACK:
                was_full = session.full
                session.acknowledge(to_number(frame.payload))
                if was_full and not session.full:
                    self._watch_outputs()
            elif frame.type in (RESUME, RESUMED):
                session.acknowledge(to_number(frame.payload))
                self.queue = [session.control(RESUMED)] if frame.type == RESUME else []
                self.queue += session.replay()
                self._watch_outputs()
        except (ValueError, KeyError) as error:
            complain(f"a frame of type {frame.type} was not understood: {error!r}")

    def _flush(self) -> None:
        session = self.session
        if self.acknowledge and session is not None:
            self.acknowledge = False
            self.queue.append(session.control(ACK))
        while self.writing or self.queue:
            if not self.writing:
                self.writing = b"".join(self.queue)
                self.queue.clear()
            written = self.port.write(self.writing[:CHUNK])
            if not written:
                return
            self.writing = self.writing[written:]

    def _send(self, type_: int, call: int, payload: bytes = b"") -> None:
        if self.session is not None:
            self.queue.append(self.session.seal(type_, call, payload))

    def _finish(self, id_: int, *fields: tuple[str, str]) -> None:
        """The call's last word."""
        self._send(RESULT, id_, pack(*fields))

    def _on_hello(self, frame: Frame) -> None:
        """A new session, or the same greeting again: that gets the same answer and changes nothing."""
        fields = dict(unpack(frame.payload))
        if fields["session"] != self.session_id:
            self._forget_session(fields.get("orphans", b"run"))
            self.session_id, self.session = fields["session"], Session(frame.tag)
            steps = self.identity.take_on(fields)
            # A child whose random numbers may be its siblings' stays as it is: the host ends it.
            if self.freezer.frozen and not dict(steps).get("entropy"):
                self._thaw()
            if self.prepared and self.identity.spent:
                self.chores.append(self.identity.prepare_generation)
            if self.identity.recount:
                self.recount_at = time.monotonic() + RECOUNT_S
            if self.identity.background:
                self.chores.append(self._work_in_background)
            self.welcome = pack(
                ("session", self.session_id),
                ("version", VERSION),
                ("pid", str(os.getpid())),
                ("uptime-ns", str(time.clock_gettime_ns(time.CLOCK_BOOTTIME))),
            ) + report(steps)
        self.queue.append(encode(WELCOME, frame.tag, payload=self.welcome + pack(("time-ns", str(time.time_ns())))))
        self._flush()

    def _forget_session(self, orphans: bytes) -> None:
        self.queue.clear()
        self.opening.clear()
        self.held.clear()
        self.settlers.clear()
        self.acknowledge = False
        calls, self.calls = self.calls, {}
        for call in calls.values():
            self._orphan(call, kill=orphans == b"kill")

    def _orphan(self, call: Call, kill: bool) -> None:
        """Nobody listens to the call any more: its input ends, and its output is thrown away."""
        call.orphan = True
        call.input_ended = True
        self.orphans.append(call)
        self._feed_input(call)
        if call.code is not None and not call.outputs:
            self.orphans.remove(call)
        elif kill or call.op != "exec":
            self._end(call)

    # -- calls

    def _on_call_frame(self, frame: Frame) -> None:
        if frame.type == OPEN:
            self._on_open(frame)
            return
        if frame.call in self.held:
            self.held[frame.call][2].append(frame)
            if frame.type == CONTROL and b"cancel" in frame.payload:
                del self.held[frame.call]
            return
        call = self.calls.get(frame.call)
        if call is None:
            return
        if frame.type == DATA:
            call.input += frame.payload[1:]
            self._feed_input(call)
        elif frame.type == END_OF_INPUT:
            call.input_ended = True
            self._feed_input(call)
        elif frame.type == CREDIT:
            call.credit += to_number(frame.payload)
            self._watch(call)
        elif frame.type == CONTROL:
            fields = dict(unpack(frame.payload))
            if "rows" in fields and call.terminal >= 0:
                set_size(call.terminal, int(fields["rows"]), int(fields["columns"]))
            if "signal" in fields and call.code is None:
                _signal_group(call.pid, int(fields["signal"]))
            if "cancel" in fields:
                self._orphan(self.calls.pop(call.id), kill=True)

    def _on_open(self, frame: Frame) -> None:
        request = self.opening.setdefault(frame.call, bytearray())
        request += frame.payload[1:]
        if frame.payload[0] and len(request) <= MAX_OPEN:
            return
        del self.opening[frame.call]
        fields = unpack(bytes(request))
        self._begin(frame.call, text(dict(fields)["op"]), fields)

    def _begin(self, id_: int, op: str, fields: list[tuple[str, bytes]]) -> None:
        if self.freezer.frozen and (op == "exec" or op in _WORK):
            self.held[id_] = (op, fields, [])
            return
        try:
            if op == "settle":
                self.settlers.append(id_)
            elif op == "stat":
                self._finish(id_, *stat(dict(fields)["path"]))
            elif op == "clock":
                self.identity.clock(dict(fields)["time-ns"])
                self._finish(id_, ("code", "0"))
            elif op == "quiesce":
                self.freezer.freeze(float(dict(fields)["deadline"]))
                self.thaw_at = time.monotonic() + FROZEN_S
                self._finish(id_, ("code", "0"))
            elif op == "thaw":
                self._thaw()
                self._finish(id_, ("code", "0"))
            elif op == "poweroff":
                self._thaw()
                self.poweroff_at = time.monotonic() + 1.0
                self._finish(id_, ("code", "0"))
            else:
                self._start(id_, op, fields)
        except Refused as error:
            self._finish(id_, ("code", "-1"), ("kind", error.kind), ("failure", str(error)))
        except OSError as error:
            self._finish(id_, ("code", "-1"), ("kind", "failed"), ("failure", _why(error)))

    # -- standing still

    def _thaw(self) -> None:
        """User processes go on, and calls that waited for that begin."""
        self.freezer.thaw()
        held, self.held = self.held, {}
        for id_, (op, fields, frames) in held.items():
            self._begin(id_, op, fields)
            for frame in frames:
                self._on_call_frame(frame)

    def _go_on_alone(self) -> None:
        complain(f"the host said nothing for {FROZEN_S:.0f} s after it had all processes stand still: they go on")
        try:
            self.identity.reseed()
            self.identity.generation(os.urandom(16).hex().encode())
            self.identity.notify()
        except OSError as error:
            complain(f"the generation could not be changed: {error}")
        self._thaw()

    def _start(self, id_: int, op: str, fields: list[tuple[str, bytes]]) -> None:
        self._prepare_for_calls()
        call = Call(id_, op)
        if op == "exec":
            try:
                start_command(call, fields)
            except (OSError, Refused, ValueError) as error:
                code = 127 if isinstance(error, (FileNotFoundError, NotADirectoryError)) else 126
                self._finish(id_, ("code", str(code)), ("failure", _why(error)))
                return
            timeout_s = float(dict(fields).get("timeout", b"0"))
            if timeout_s > 0:
                call.deadline = time.monotonic() + timeout_s
        elif op in _WORK:
            start_worker(call, _WORK[op], dict(fields))
        else:
            raise Refused("unknown", f"this agent (version {VERSION}) knows no «{op}»")
        self.calls[id_] = call
        self._send(STARTED, id_, pack(("pid", str(call.pid))))
        self._watch(call)

    def _feed_input(self, call: Call) -> None:
        """Gives the command what has come for it, as far as it takes it now."""
        if call.stdin < 0:
            call.input_done += len(call.input)
            call.input.clear()
        while call.input:
            try:
                written = os.write(call.stdin, call.input[:MAX_PAYLOAD])
            except BlockingIOError:
                break
            except OSError:  # it reads no more: the rest goes nowhere, as with a pipe
                call.input_done += len(call.input)
                call.input.clear()
                self._close_input(call)
                break
            del call.input[:written]
            call.input_done += written
        if call.input_ended and not call.input:
            self._close_input(call)
        if not call.orphan and call.input_done >= (WINDOW // 4 if call.input else 1):
            self._send(CREDIT, call.id, number(call.input_done))
            call.input_done = 0
        self._watch(call)

    def _close_input(self, call: Call) -> None:
        if call.stdin < 0:
            return
        if call.terminal >= 0:
            # A terminal has no end of input of its own: its line discipline makes one of ^D on an empty line.
            try:
                os.write(call.terminal, b"\x04")
            except OSError:
                pass
        else:
            self._unwatch(call.stdin)
            os.close(call.stdin)
        call.stdin = -1

    def _watch_outputs(self) -> None:
        for call in self.calls.values():
            self._watch(call)

    def _watch(self, call: Call) -> None:
        """Polls what the call can use now: output if there is credit for it, input if some waits."""
        readable = call.orphan or (call.credit > 0 and self.session is not None and not self.session.full)
        for fd, stream in call.outputs.items():
            wanted = select.EPOLLIN if readable or stream < 0 else 0
            if fd == call.terminal and call.input:
                wanted |= select.EPOLLOUT
            self._set_watch(fd, wanted, call)
        if call.stdin >= 0 and call.stdin not in call.outputs:
            self._set_watch(call.stdin, select.EPOLLOUT if call.input else 0, call)

    def _set_watch(self, fd: int, wanted: int, call: Call) -> None:
        # A descriptor that is hung up is reported whatever is asked for, so one with nothing wanted is not registered.
        if not wanted:
            self._unwatch(fd)
        elif fd in self.handlers:
            self.poller.modify(fd, wanted)
        else:
            self.handlers[fd] = lambda events: self._on_process(call, fd, events)
            self.poller.register(fd, wanted)

    def _unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def _on_process(self, call: Call, fd: int, events: int) -> None:
        if fd == call.stdin and events & (select.EPOLLOUT | select.EPOLLERR):
            self._feed_input(call)
        if fd in call.outputs and events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self._read_output(call, fd)
            self._watch(call)

    def _read_output(self, call: Call, fd: int) -> None:
        """Sends one piece of output on. A terminal whose last user is gone gives an error, a pipe gives nothing."""
        stream = call.outputs[fd]
        limit = CHUNK if call.orphan or stream < 0 else min(CHUNK, call.credit)
        if fd in call.final:
            limit = min(limit, call.final[fd])
        try:
            data = os.read(fd, limit) if limit else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close_output(call, fd)
            return
        if fd in call.final:
            call.final[fd] -= len(data)
        if stream < 0:
            call.result += data[: _MAX_CONTROL - len(call.result)]
        elif not call.orphan:
            call.credit -= len(data)
            self._send(DATA, call.id, bytes((stream,)) + data)
        if call.final.get(fd) == 0:
            self._close_output(call, fd)

    def _close_output(self, call: Call, fd: int) -> None:
        self._unwatch(fd)
        del call.outputs[fd]
        if fd == call.terminal:  # closed, it would send SIGHUP to a command that has let go of it and not yet ended
            call.stdin = -1
        else:
            os.close(fd)
        if call.code is not None and not call.outputs:
            self._over(call)

    def _last_drain(self, call: Call) -> None:
        """DRAIN_S after the exit: what lies in the pipes now is all that will be sent."""
        import fcntl

        for fd in list(call.outputs):
            size = struct.unpack("i", fcntl.ioctl(fd, 0x541B, b"\0\0\0\0"))[0]  # FIONREAD
            call.final[fd] = size
            if not size:
                self._close_output(call, fd)

    def _on_child(self, _events: int = 0) -> None:
        """Reaps whoever ended: our commands, and as process 1 every orphan of the machine."""
        try:
            os.read(self.wakeup, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self.helpers:
                self.helpers.remove(pid)
                if not self.helpers and self.identity.on_background is not None:
                    then, self.identity.on_background = self.identity.on_background, None
                    then()
            for call in (*self.calls.values(), *self.orphans):
                if call.pid == pid and call.code is None:
                    code = os.waitstatus_to_exitcode(status)
                    call.code = 124 if call.timed_out else 128 - code if code < 0 else code
                    call.exited_at = time.monotonic()
                    call.deadline = 0.0
                    if not call.outputs:
                        self._over(call)
                    break

    def _over(self, call: Call) -> None:
        """The process has exited and all of its output is sent."""
        if call.stdin >= 0 and call.stdin != call.terminal:
            self._unwatch(call.stdin)
            os.close(call.stdin)
        if call.terminal >= 0:
            os.close(call.terminal)
        call.stdin = call.terminal = -1
        if call.orphan:
            self.orphans.remove(call)
            return
        del self.calls[call.id]
        fields = [("code", str(call.code)), ("timed-out", "1" if call.timed_out else "")]
        if call.op != "exec":
            try:
                fields += [(name, text(value)) for name, value in unpack(call.result)]
            except ValueError:
                fields += [("failure", "the agent's answer was cut off"), ("kind", "failed")]
        self._finish(call.id, *fields)

    def _end(self, call: Call) -> None:
        """Asks the call's processes to end, and makes them in KILL_S."""
        if call.code is None:
            _signal_group(call.pid, 1)
            call.kill_at = time.monotonic() + KILL_S

    # -- chores: what can wait until the first answer is given

    def _prepare_for_calls(self) -> None:
        """Mounts and configures the rest, and loads what calls need; a template's children have it all."""
        if self.prepared:
            return
        self.prepared = True
        if self.init:
            mount_missing(_LATER)
            name_kernel()
            configure_network()
        import gc
        import pwd  # noqa: F401
        import signal
        import subprocess  # noqa: F401
        import tarfile  # noqa: F401

        self.wakeup, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self.handlers[self.wakeup] = self._on_child
        self.poller.register(self.wakeup, select.EPOLLIN)
        # A collection would touch every object, and in a fork's child every page touched is copied.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)

    def _grow_root(self) -> None:
        """Lets the root file system fill its disk. resize2fs does nothing when it does already."""
        try:
            device = next(
                line.split()[0] for line in _contents("/proc/mounts").decode().split("\n") if line.split()[1:2] == ["/"]
            )
            if device.startswith("/dev/"):
                self._help(["resize2fs", device])
        except (OSError, StopIteration) as error:
            complain(f"the root file system was not grown: {error}")

    def _warm_up(self) -> None:
        """Runs a command once, so that templates have what a command needs in memory."""
        try:
            self._help(["true"])
        except OSError as error:
            complain(f"no command could be run: {error}")

    def _work_in_background(self) -> None:
        """What a child still has to do after it was handed out: SSH keys that take long to make."""
        commands, self.identity.background = self.identity.background, []
        for command in commands:
            try:
                self._help(command)
            except OSError as error:
                complain(f"{command[0]}: {error}")

    def _help(self, argv: list[str]) -> None:
        import subprocess

        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": text(_PATH)},
        )
        self.helpers.add(process.pid)
        process.returncode = 0  # reaped by `_on_child`, not by this object


def complain(message: str) -> None:
    """A line on the console."""
    print(f"forky-agent: {message}", file=sys.stderr, flush=True)


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        name = text(name) if isinstance(name, bytes) else name
        return f"{error.strerror}: {name}" if name else error.strerror
    return str(error)


def _signal_group(pid: int, number_: int) -> None:
    """To the process group of a command; one that is gone is fine."""
    try:
        os.killpg(pid, number_)
    except (ProcessLookupError, PermissionError):
        pass


def stat(path: bytes) -> list[tuple[str, str]]:
    """What `path` is; links are followed."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return [("code", "0"), ("exists", "")]
    return [
        ("code", "0"),
        ("exists", "1"),
        ("directory", "1" if found.st_mode & 0o170000 == 0o040000 else ""),
        ("size", str(found.st_size)),
        ("mode", str(found.st_mode)),
    ]


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Tells a terminal its size, and those who use it by SIGWINCH."""
    import fcntl

    fcntl.ioctl(terminal, 0x5414, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))  # TIOCSWINSZ


class Account:
    """A user of the guest: ids, groups and the environment that a login would give."""

    def __init__(self, name: str) -> None:
        """`name` is a name or a number; raises Refused when there is no such user. A number needs no entry."""
        import pwd

        try:
            entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
            self.uid, self.gid, user, home, shell = entry[2], entry[3], entry[0], entry[5], entry[6]
        except KeyError:
            if not name.isdigit():
                raise Refused("not-found", f"there is no user «{name}» in the machine") from None
            self.uid = self.gid = int(name)
            user, home, shell = name, "/", "/bin/sh"
        self.groups = os.getgrouplist(user, self.gid)
        self.home = home if os.path.isdir(home) else "/"
        self.environment = {
            b"PATH": _PATH,
            b"HOME": self.home.encode(),
            b"USER": user.encode(),
            b"LOGNAME": user.encode(),
            b"SHELL": (shell or "/bin/sh").encode(),
        }


def start_command(call: Call, fields: list[tuple[str, bytes]]) -> None:
    """Starts a command in a session and process group of its own. Raises OSError, Refused or ValueError."""
    single = dict(fields)
    argv = [value for name, value in fields if name == "argv"]
    account = Account(text(single.get("user", b"")) or "0")
    environment = account.environment
    if "rows" in single:
        environment[b"TERM"] = b"xterm-256color"
    for name, value in fields:
        if name == "env":
            key, _, content = value.partition(b"=")
            environment[key] = content
    directory = single.get("directory") or account.home.encode()
    if "rows" in single:
        _start_on_terminal(call, argv, environment, directory, account, (int(single["rows"]), int(single["columns"])))
    else:
        _start_on_pipes(call, argv, environment, directory, account, "stdin" in single)


def _start_on_pipes(
    call: Call, argv: list[bytes], environment: dict[bytes, bytes], directory: bytes, account: Account, stdin: bool
) -> None:
    import subprocess

    own = account.uid == os.geteuid()
    ours: list[int] = []
    theirs: list[int] = []
    try:
        for is_input in (True, False, False) if stdin else (False, False):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            ours.append(write_end if is_input else read_end)
            theirs.append(read_end if is_input else write_end)
        process = subprocess.Popen(
            argv,
            stdin=theirs[0] if stdin else subprocess.DEVNULL,
            stdout=theirs[-2],
            stderr=theirs[-1],
            env=environment,
            cwd=directory,
            start_new_session=True,
            # Without a change of user Python starts it by vfork, which does not copy the agent's page tables.
            user=None if own else account.uid,
            group=None if own else account.gid,
            extra_groups=None if own else account.groups,
        )
    except BaseException:
        for fd in (*ours, *theirs):
            os.close(fd)
        raise
    for fd in theirs:
        os.close(fd)
    call.pid = process.pid
    process.returncode = 0  # reaped by `_on_child`; the object must not wait for a pid that may be another's by then
    _adopt(call, ours)


def _adopt(call: Call, ours: list[int]) -> None:
    """Our ends of a process's pipes: perhaps its input, then its output, then its errors."""
    for fd in ours:
        os.set_blocking(fd, False)
    if len(ours) == 3:
        call.stdin = ours[0]
    call.outputs = {ours[-2]: STDOUT, ours[-1]: STDERR}


def _start_on_terminal(
    call: Call,
    argv: list[bytes],
    environment: dict[bytes, bytes],
    directory: bytes,
    account: Account,
    size: tuple[int, int],
) -> None:
    """A fork, not subprocess: the terminal becomes the controlling one by being opened in the new session."""
    terminal, user_end = os.openpty()
    report, report_end = os.pipe2(os.O_CLOEXEC)
    set_size(terminal, *size)
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            user_end = os.open(os.ttyname(user_end), os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(user_end, fd)
            _default_signals()
            if account.uid != os.geteuid():
                os.fchown(user_end, account.uid, -1)
                os.setgroups(account.groups)
                os.setgid(account.gid)
                os.setuid(account.uid)
            os.chdir(directory)
            os.execvpe(argv[0], argv, environment)
        except BaseException as error:  # the child must not go on as a second agent
            errno_ = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
            os.write(report_end, str(errno_).encode())
        os._exit(127)
    os.close(user_end)
    os.close(report_end)
    problem = os.read(report, 16)  # until it has become the command
    os.close(report)
    if problem:
        os.close(terminal)
        raise OSError(int(problem), os.strerror(int(problem)), text(argv[0]))
    call.pid = pid
    os.set_blocking(terminal, False)
    call.terminal = call.stdin = terminal
    call.outputs = {terminal: STDOUT}


def _default_signals() -> None:
    """Python ignores SIGPIPE and the like, which a command must not inherit."""
    import signal

    for number_ in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
        signal.signal(number_, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------------
# Work that may block, done in forks of the agent: its input is a stream, its output is another, its result a third


def start_worker(
    call: Call, work: Callable[[dict[str, bytes]], list[tuple[str, str]]], fields: dict[str, bytes]
) -> None:
    """Forks a process that does `work`, reading from 0, writing to 1, its result going to 2."""
    pairs = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
    ours = [pairs[0][1], pairs[1][0], pairs[2][0]]
    theirs = [pairs[0][0], pairs[1][1], pairs[2][1]]
    pid = os.fork()
    if not pid:
        result: list[tuple[str, str]] = []
        try:
            os.setsid()
            for fd, end in enumerate(theirs):
                os.dup2(end, fd)
            os.closerange(3, 65536)  # or the ends of other calls' pipes would stay open as long as this works
            _default_signals()
            result = work(fields)
        except BaseException as error:  # whatever it is, the caller hears of it
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            result = [("kind", "not-found" if missing else "failed"), ("failure", _why(error)[:1000])]
        finally:
            os.write(2, pack(*result))
            os._exit(0)
    for fd in theirs:
        os.close(fd)
    call.pid = pid
    _adopt(call, ours)
    call.outputs[ours[2]] = -1


def _download(fields: dict[str, bytes]) -> list[tuple[str, str]]:
    """A tar stream of a file or a tree, its top named as the path's last component."""
    import tarfile

    path = os.path.normpath(text(fields["path"]))
    os.lstat(path)
    with open(1, "wb", buffering=0, closefd=False) as out, tarfile.open(fileobj=out, mode="w|", bufsize=CHUNK) as tar:
        tar.add(path, arcname=os.path.basename(path) or ".")
    return []


def _upload(fields: dict[str, bytes]) -> list[tuple[str, str]]:
    """Unpacks a tar stream into a directory that is there. The host is trusted, so members go where they say."""
    import tarfile

    directory = text(fields["directory"])
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", directory)
    files = size = 0
    os.umask(0)
    with (
        open(0, "rb", buffering=0, closefd=False) as source,
        tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK) as tar,
    ):
        if hasattr(tarfile, "fully_trusted_filter"):
            tar.extraction_filter = tarfile.fully_trusted_filter
        later = []
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                _put(member, os.path.join(directory, member.name), content)
            else:
                tar.extract(member, directory, numeric_owner=True, set_attrs=not member.isdir())
            if member.isdir():
                later.append(member)
            else:
                files += 1
                size += member.size
        # Directories get their mode and time when nothing is put into them any more.
        for member in reversed(later):
            path = os.path.join(directory, member.name)
            tar.chown(member, path, numeric_owner=True)
            tar.utime(member, path)
            tar.chmod(member, path)
    return [("files", str(files)), ("bytes", str(size))]


def _put(member: tarfile.TarInfo, path: str, content: IO[bytes]) -> None:
    """Writes a file that has no name, and calls it `path` when it is whole: whoever copies may be killed. Written into
    is what is no file (a device, a pipe), what has other names too, and all where a file can't be without a name."""
    fd = -1
    try:
        found = os.lstat(path)
        if found.st_mode & 0o170000 == 0o120000:  # a link is written through, as cp does
            path = os.path.realpath(path)
            found = os.stat(path)
        may_replace = found.st_mode & 0o170000 == 0o100000 and found.st_nlink == 1
    except FileNotFoundError:
        may_replace = True
    directory, name = os.path.split(path)
    if not os.path.isdir(directory):
        os.makedirs(directory, 0o755)
    if may_replace:
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # FAT and FUSE, for one
            pass
    if in_place := fd < 0:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    with open(fd, "r+b" if not in_place else "wb", buffering=0) as file:
        _pour(content, file)
        if os.fstat(fd).st_mode & 0o170000 == 0o100000:
            if not os.geteuid():
                os.fchown(fd, member.uid, member.gid)
            os.fchmod(fd, member.mode & 0o7777)
            os.utime(fd, (member.mtime, member.mtime))
        if not in_place:
            _appear(file, directory, name)


def _pour(source: IO[bytes], file: IO[bytes]) -> None:
    while block := memoryview(source.read(CHUNK)):
        while block:
            block = block[file.write(block) :]


def _appear(file: IO[bytes], directory: str, name: str) -> None:
    """Gives a file without a name this one, in place of what has it."""
    beside = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # with a descriptor Python calls linkat
    part = f".{os.getpid()}.part"
    try:
        try:
            os.link(f"/proc/self/fd/{file.fileno()}", name, dst_dir_fd=beside)
        except FileExistsError:
            os.link(f"/proc/self/fd/{file.fileno()}", part, dst_dir_fd=beside)
            try:
                os.replace(part, name, src_dir_fd=beside, dst_dir_fd=beside)
            except OSError as error:
                os.unlink(part, dir_fd=beside)
                if error.errno != errno.EBUSY:
                    raise
                file.seek(0)  # something is mounted on it
                with open(os.path.join(directory, name), "wb", buffering=0) as mounted:
                    _pour(file, mounted)
    finally:
        os.close(beside)


def _sync(_fields: dict[str, bytes]) -> list[tuple[str, str]]:
    os.sync()
    return []


_WORK: dict[str, Callable[[dict[str, bytes]], list[tuple[str, str]]]] = {
    "download": _download,
    "upload": _upload,
    "sync": _sync,
}


# ---------------------------------------------------------------------------------------------------------------------
# Process 1


def _run(*argv: str) -> int:
    """Runs a program and waits for it; before `subprocess` is loaded, and for what can't hang."""
    try:
        pid = os.posix_spawnp(argv[0], argv, {"PATH": text(_PATH)})
    except OSError as error:
        complain(f"{argv[0]}: {error}")
        return 127
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_AT_ONCE = (
    ("proc", "/proc", "nosuid,nodev,noexec"),
    ("sysfs", "/sys", "nosuid,nodev,noexec"),
    ("devtmpfs", "/dev", "nosuid,mode=0755"),
    ("tmpfs", "/run", "nosuid,nodev,mode=0755"),
)
_LATER = (
    ("devpts", "/dev/pts", "nosuid,noexec,mode=0620,gid=5,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "nosuid,nodev"),
    ("tmpfs", "/tmp", "nosuid,nodev,mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "nosuid,nodev,noexec"),
)


def mount_missing(wanted: Iterable[tuple[str, str, str]]) -> None:
    """Mounts file systems that the initramfs has not: each mount(8) takes 0.1 s under TCG."""
    for kind, target, options in wanted:
        os.makedirs(target, exist_ok=True)
        if os.stat(target).st_dev == os.stat(os.path.dirname(target)).st_dev:
            _run("mount", "-t", kind, "-o", options, kind, target)


def link_devices() -> None:
    """What udev would add to /dev, as far as shells expect it."""
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        try:
            os.symlink(target, f"/dev/{link}")
        except FileExistsError:
            pass


def name_kernel() -> None:
    """The host name of /etc/hostname, unless the host has given one already."""
    try:
        if _contents("/proc/sys/kernel/hostname").strip() == b"(none)":
            _overwrite("/proc/sys/kernel/hostname", _contents("/etc/hostname").strip() or b"localhost")
    except OSError as error:
        complain(f"the host name was not set: {error}")


def configure_network() -> None:
    """lo, and eth0 with the fixed addresses of QEMU's user-mode network; by ioctl, which takes no processes."""
    import fcntl
    import socket

    def request(name: str, rest: bytes) -> bytes:
        return struct.pack("16s24s", name.encode(), rest)

    def address(ip: str) -> bytes:
        return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(ip))

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for name, ip, mask in (("lo", "127.0.0.1", "255.0.0.0"), ("eth0", "10.0.2.15", "255.255.255.0")):
                if not os.path.exists(f"/sys/class/net/{name}"):
                    return
                fcntl.ioctl(sock, 0x8916, request(name, address(ip)))  # SIOCSIFADDR
                fcntl.ioctl(sock, 0x891C, request(name, address(mask)))  # SIOCSIFNETMASK
                fcntl.ioctl(
                    sock, 0x8914, request(name, struct.pack("H", 0x1043))
                )  # SIOCSIFFLAGS: up, running, multicast
            # struct rtentry on 64 bits: destination, gateway, netmask, flags (RTF_UP | RTF_GATEWAY)
            route = struct.pack("8x16s16s16sH6x48x", address("0.0.0.0"), address("10.0.2.2"), address("0.0.0.0"), 3)
            fcntl.ioctl(sock, 0x890B, route)  # SIOCADDRT
        _overwrite("/etc/resolv.conf", b"nameserver 10.0.2.3\n")
    except OSError as error:
        complain(f"the network was not set up: {error}")


def power_off() -> None:
    """Ends every process, writes the disks back and cuts the power. Does not return."""
    deadline = time.monotonic() + 3.0
    for number_ in (15, 9):
        try:
            os.kill(-1, number_)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline:
            try:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    time.sleep(0.02)
            except ChildProcessError:
                break
        deadline = time.monotonic() + 1.0
    os.sync()
    _run("mount", "-o", "remount,ro", "/")
    try:
        import ctypes

        ctypes.CDLL(None).reboot(0x4321FEDC)  # RB_POWER_OFF
    except (ImportError, OSError):
        with open("/proc/sysrq-trigger", "wb") as file:
            file.write(b"o")
    while True:
        time.sleep(1)


def main(arguments: Iterable[str]) -> None:
    """`--init | --service | --socket PATH`, and for tests `--root DIR`, `--cgroups DIR` and `--skip STEP,STEP`."""
    mode, path, root, skip, cgroups = "--service", "", "", "", ""
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--init", "--service"):
            mode = argument
        elif argument == "--socket":
            mode, path = argument, next(rest)
        elif argument == "--root":
            root = next(rest)
        elif argument == "--skip":
            skip = next(rest)
        elif argument == "--cgroups":
            cgroups = next(rest)
        else:
            raise SystemExit(f"forky-agent: «{argument}» is not an option")
    if mode == "--init":
        os.environ["PATH"] = text(_PATH)
        mount_missing(_AT_ONCE)
        link_devices()
    port = Socket(path) if path else Port()
    Agent(port, Identity(root, frozenset(skip.split(","))), mode == "--init", Freezer(cgroups)).run()
    if mode == "--init":
        power_off()
    elif mode == "--service":
        os.execvp("poweroff", ["poweroff"])


if __name__ == "__main__":
    main(sys.argv[1:])
