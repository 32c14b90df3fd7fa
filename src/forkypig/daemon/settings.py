"""Where everything lives, and the few things that can be set by FORKY_* variables.

FORKY_HOME is one directory for state, sockets, logs and images, so that several instances run side by side.
"""

import socket
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from forkypig.daemon.home import HomePaths, default_home


class Settings(HomePaths, BaseSettings):
    """One instance of Forky Pig. Every field is read from the variable FORKY_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="FORKY_", frozen=True, populate_by_name=True)

    home: Path = Field(default_factory=default_home)
    # postgresql://…; "": SQLite, in the home
    database_url: str = Field(default="", validation_alias="FORKY_DATABASE", repr=False)
    hostd: str = ""  # the socket of hostd, where it is not in this home
    controller_name: str = ""  # among those that share a database; "": the host's name and the home
    qemu: str = "qemu-system-x86_64"  # program; a name is looked up in PATH
    accelerator: str = "auto"  # auto | kvm | tcg
    network: str = "auto"  # nat: a namespace per machine; user: QEMU's user-mode network; none: no packet; auto
    bridge: str = ""  # of the nat network, on the host; "": a name of this home's own
    subnet: str = "auto"  # where machines have their addresses; auto: the first /20 of 10.112.0.0/12 that is free
    mtu: int = 1500
    nameservers: str = ""  # of outside names, a,b,…; "": those of /etc/resolv.conf
    shells: int = 1  # kept ready per template and shape
    pack_after_s: float = 20.0  # a fork's snapshot is packed this long after it; one that is kept, at once
    pack_in_background: bool = True  # False: a snapshot is packed only where something waits for it
    overcommit: float = 16.0  # a new machine is reckoned at this fraction of its memory, and at what it takes at least
    hibernate_idle_s: float = 0.0  # under memory pressure, machines idle for as long are hibernated; 0: none is
    log_level: str = "info"
    listen: str = ""  # HOST:PORT for callers with tokens; off loopback only with the certificates of `forky auth init`
    listen_certificates: str = ""  # HOST:PORT for callers with certificates of that authority, and no others
    local_users: str = ""  # who else of this computer may come in: USER=TENANT:ROLE,… or @GROUP=TENANT:ROLE,…
    rate_per_s: float = 100.0  # calls that one caller, the operator excepted, may make in the long run; 0: any number
    rate_burst: int = 2000  # and at once
    audit_reads: bool = False  # write down also calls that only look, and succeed
    audit_commands: bool = False  # and the command lines of exec, which may hold secrets
    audit_file_mib: int = 16  # then a new one is begun
    audit_files: int = 10  # kept besides, compressed

    @property
    def hostd_socket(self) -> Path:
        """Where the controller finds hostd."""
        return Path(self.hostd) if self.hostd else self.socket("hostd")

    @property
    def name_of_controller(self) -> str:
        """What the controller is called by those that share its database: there is one of a home."""
        return self.controller_name or f"{socket.gethostname()}:{self.home}"
