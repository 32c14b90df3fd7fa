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
    network: str = "user"  # user: QEMU's user-mode network; none: no network card
    shells: int = 1  # kept ready per template and shape
    settle_after_s: float = 20.0  # a snapshot's memory goes to its file this long after its fork
    log_level: str = "info"
