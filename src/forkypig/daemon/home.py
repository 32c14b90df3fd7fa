"""Where everything of one instance lies, below one directory. Standard library only: every `forky` command needs it."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

# A Unix socket's path has at most 107 bytes (unix(7)); the longest that we append is below this.
_LONGEST_SOCKET_SUFFIX = 40


def default_home() -> Path:
    """/var/lib/forky for root, the user's own data directory for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/forky")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "forky"


class HomePaths:
    """The paths below `home`, for whatever has one."""

    home: Path

    @property
    def run(self) -> Path:
        """Sockets and pid files; 0700."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def images(self) -> Path:
        return self.home / "images"

    @property
    def machines(self) -> Path:
        """hostd's directory per machine."""
        return self.home / "machines"

    @property
    def snapshots(self) -> Path:
        """hostd's directory per snapshot."""
        return self.home / "snapshots"

    @property
    def memory(self) -> Path:
        """The pager's mount."""
        return self.home / "memory"

    @property
    def store(self) -> Path:
        """The chunk store with all packed snapshots."""
        return self.home / "store"

    @property
    def network_state(self) -> Path:
        """The file that says what hostd has changed in the host's network; there as long as any of it is."""
        return self.home / "network.json"

    @property
    def database(self) -> Path:
        return self.home / "controller.db"

    @property
    def names_file(self) -> Path:
        """What shells complete, written by the controller."""
        return self.run / "names"

    @property
    def config_file(self) -> Path:
        """Settings, beneath FORKY_* variables."""
        return self.home / "config.toml"

    @property
    def auth(self) -> Path:
        """The certificate authority and what it has issued; 0700."""
        return self.home / "auth"

    @property
    def audit(self) -> Path:
        """The audit log; 0700."""
        return self.logs / "audit"

    @property
    def users_socket(self) -> Path:
        """Where other users of this computer come in, if any may: they can't enter `run`."""
        return self.home / "users.sock"

    def socket(self, daemon: str) -> Path:
        """The Unix socket of "controller", "hostd" or "pager"."""
        return self.run / f"{daemon}.sock"

    def pid_file(self, daemon: str) -> Path:
        return self.run / f"{daemon}.pid"

    def check(self) -> None:
        """Raises ValueError, with what to do, when the home can't be used."""
        if not self.home.is_absolute():
            raise ValueError(f"FORKY_HOME must be an absolute path, not «{self.home}»")
        if len(os.fsencode(self.home)) + _LONGEST_SOCKET_SUFFIX > 107:
            raise ValueError(
                f"FORKY_HOME «{self.home}» is too long: Unix sockets below it may have 107 bytes; choose a shorter one"
            )

    def check_private(self) -> None:
        """Raises ValueError, with what to do, where others could put files of theirs in the home, or come to the
        sockets in `run`: whoever can open these is obeyed. Others may pass through the home itself."""
        for directory, allowed in ((self.home, 0o755), (self.run, 0o700)):
            if not directory.exists():
                continue
            found = directory.stat()
            if excess := stat.S_IMODE(found.st_mode) & 0o777 & ~allowed:
                can = "write" if excess & 0o022 else "pass through"
                raise ValueError(
                    f"others can {can} «{directory}»: chmod {allowed:o} {directory}, or set FORKY_HOME to a directory "
                    "of your own in it"
                )
        if self.run.exists() and self.run.stat().st_uid != os.geteuid():
            raise ValueError(f"«{self.run}» is another user's: run this as the one whose it is, or remove it")


@dataclass(frozen=True)
class Home(HomePaths):
    """A home and nothing else: what a client has to know."""

    home: Path


def home_from_environment() -> Home:
    """FORKY_HOME's, or the default one."""
    named = os.environ.get("FORKY_HOME")
    return Home(Path(named) if named else default_home())
