"""Where everything lives, and the few things that can be set by FORKY_* variables.

FORKY_HOME is one directory for state, sockets, logs and images, so that several instances run side by side.
"""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from forkypig.daemon.home import HomePaths, default_home


class Settings(HomePaths, BaseSettings):
    """One instance of Forky Pig. Every field is read from the variable FORKY_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="FORKY_", frozen=True)

    home: Path = Field(default_factory=default_home)
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
    log_level: str = "info"
    metrics: str = ""  # HOST:PORT where the controller serves /metrics, on loopback; "": nowhere
