"""A PostgreSQL server of the tests' own: Debian's, under a user that is not root, on a socket in its directory."""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_READY_S = 30.0
# Nothing here has to outlast the test.
_OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "max_wal_size": "32MB",
    "min_wal_size": "32MB",
    "wal_init_zero": "off",
    "log_min_messages": "fatal",
}


_HASTE = ("fsync", "full_page_writes", "autovacuum", "wal_init_zero")


def program(name: str) -> str:
    """Of the newest version that Debian's packages have put here."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    path = str(found[-1]) if found else shutil.which(name)
    assert path, f"PostgreSQL's {name} is not there: run make setup"
    return path


class Postgres:
    """A server, to be stopped and started."""

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        """`durable`: as a server is that has to outlast a power cut."""
        options = {k: v for k, v in _OPTIONS.items() if not durable or k not in _HASTE}
        self._options = [f"-c{key}={value}" for key, value in options.items()]
        self.directory = directory
        self._data = directory / "data"
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        # The server refuses to run as root.
        self._user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(directory, user.pw_uid, user.pw_gid)
            self._user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        # Also when the tests are killed.
        self._user = [*(self._user or ["setpriv"]), "--pdeathsig", "SIGQUIT", "--"]
        asked = ["-D", str(self._data), "-U", "forky", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        made = subprocess.run([*self._user, program("initdb"), *asked], capture_output=True, text=True, cwd="/")
        assert made.returncode == 0, made.stderr

    def start(self) -> None:
        argv = [*self._user, program("postgres"), "-D", str(self._data), "-k", str(self.directory), *self._options]
        log = (self.directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + _READY_S
        while subprocess.run([program("pg_isready"), "-q", "-h", str(self.directory)], cwd="/").returncode != 0:
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """At once, as in a power cut: connections break."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(20)
            self._process = None

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """For as long as the block lasts the server answers nothing, and no connection breaks."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        stopped = [self._process.pid, *map(int, children)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    def sql(self, statement: str, database: str = "postgres") -> str:
        argv = [program("psql"), "-h", str(self.directory), "-U", "forky", "-d", database, "-Atqc", statement]
        done = subprocess.run(argv, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def url(self, database: str) -> str:
        return f"postgresql://forky@/{database}?host={self.directory}"

    def new_database(self, template: str = "template1") -> str:
        """Its name."""
        name = f"forky{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name


@contextlib.contextmanager
def postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A server for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="fpg") as directory:
        made = Postgres(Path(directory), durable=durable)
        made.start()
        try:
            yield made
        finally:
            made.stop()
