"""Where everything lives, and the few things that can be set by FORKY_* variables.

FORKY_HOME is one directory for state, sockets, logs and images, so that several instances run side by side.
"""

import os
from functools import cached_property
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

# A Unix socket's path has at most 107 bytes (unix(7)); the longest that we append is below this.
_LONGEST_SOCKET_SUFFIX = 40


def default_home() -> Path:
    """/var/lib/forky for root, the user's own data directory for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/forky")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "forky"


class Settings(BaseSettings):
    """One instance of Forky Pig. Every field is read from the variable FORKY_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="FORKY_", frozen=True)

    home: Path = Field(default_factory=default_home)
    qemu: str = "qemu-system-x86_64"  # program; a name is looked up in PATH
    accelerator: str = "auto"  # auto | kvm | tcg
    network: str = "user"  # user: QEMU's user-mode network; none: no network card
    shells: int = 1  # kept ready per template and shape
    settle_after_s: float = 20.0  # a snapshot's memory goes to its file this long after its fork
    log_level: str = "info"

    @cached_property
    def run(self) -> Path:
        """Sockets and pid files; 0700."""
        return self.home / "run"

    @cached_property
    def logs(self) -> Path:
        return self.home / "logs"

    @cached_property
    def images(self) -> Path:
        return self.home / "images"

    @cached_property
    def machines(self) -> Path:
        """hostd's directory per machine."""
        return self.home / "machines"

    @cached_property
    def snapshots(self) -> Path:
        """hostd's directory per snapshot."""
        return self.home / "snapshots"

    @cached_property
    def memory(self) -> Path:
        """The pager's mount."""
        return self.home / "memory"

    @cached_property
    def layers(self) -> Path:
        """The pager's files with the memory of settled snapshots."""
        return self.home / "layers"

    @cached_property
    def database(self) -> Path:
        return self.home / "controller.db"

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
