"""Where everything lives, and the few things that can be set: by FORKY_* variables, or beneath them in the home's file
config.toml (`forky config`, docs/configuration.md).

FORKY_HOME is one directory for state, sockets, logs and images, so that several instances run side by side.
"""

import ipaddress
import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from forkypig.daemon.home import Home, HomePaths, default_home, home_from_environment
from forkypig.errors import InvalidRequest
from forkypig.model.listening import parse_host_port

PREFIX = "FORKY_"


def _address(text: str) -> str:
    if text:
        try:
            parse_host_port("it", text)
        except InvalidRequest as error:
            raise ValueError(str(error)) from error
    return text


def _networks(text: str) -> str:
    for word in filter(None, text.split(",")):
        try:
            ipaddress.ip_network(word.strip())
        except ValueError as error:
            raise ValueError(f"«{word.strip()}» is no address or network: write 127.0.0.1, or 10.0.0.0/8") from error
    return text


class Settings(HomePaths, BaseSettings):
    """One instance of Forky Pig. Every field is read from the variable FORKY_<FIELD>, then from the home's file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, populate_by_name=True)

    home: Path = Field(default_factory=default_home)
    # postgresql://…; "": SQLite, in the home
    database_url: str = Field(default="", validation_alias="FORKY_DATABASE", repr=False)
    hostd: str = ""  # the socket of hostd, where it is not in this home
    controller_name: str = ""  # among those that share a database; "": the host's name and the home
    qemu: str = "qemu-system-x86_64"  # program; a name is looked up in PATH
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    # nat: a namespace per machine; user: QEMU's user-mode network; none: no packet; auto
    network: Literal["auto", "nat", "user", "none"] = "auto"
    bridge: str = ""  # of the nat network, on the host; "": a name of this home's own
    subnet: str = "auto"  # where machines have their addresses; auto: the first /20 of 10.112.0.0/12 that is free
    mtu: int = Field(default=1500, ge=576, le=65535)
    nameservers: str = ""  # of outside names, a,b,…; "": those of /etc/resolv.conf
    shells: int = Field(default=1, ge=0, le=1000)  # kept ready per template and shape
    # a fork's snapshot is packed this long after it; one that is kept, at once
    pack_after_s: float = Field(default=20.0, ge=0)
    pack_in_background: bool = True  # False: a snapshot is packed only where something waits for it
    # a new machine is reckoned at this fraction of its memory, and at what it takes at least
    overcommit: float = Field(default=16.0, ge=1, le=1000)
    # under memory pressure, machines idle for as long are hibernated; 0: none is
    hibernate_idle_s: float = Field(default=0.0, ge=0)
    listen: str = ""  # HOST:PORT for callers with tokens; off loopback only with the certificates of `forky auth init`
    listen_certificates: str = ""  # HOST:PORT for callers with certificates of that authority, and no others
    local_users: str = ""  # who else of this computer may come in: USER=TENANT:ROLE,… or @GROUP=TENANT:ROLE,…
    # calls that one caller, the operator excepted, may make in the long run; 0: any number
    rate_per_s: float = Field(default=100.0, ge=0)
    rate_burst: int = Field(default=2000, ge=1)  # and at once
    # from one address; then it is sent away before its credentials are looked up; 0: any number
    failed_logins_per_minute: int = Field(default=30, ge=0)
    audit_reads: bool = False  # write down also calls that only look, and succeed
    audit_commands: bool = False  # and the command lines of exec, which may hold secrets
    audit_file_mib: int = Field(default=16, ge=1)  # then a new one is begun
    audit_files: int = Field(default=10, ge=0)  # kept besides, compressed
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)] = "info"
    # the REST API's address: HOST:PORT, or a Unix socket's path; unix: HOME/run/rest.sock; "": none
    rest: str = ""
    # PEM files, where the REST API is to show others than those of `forky auth init`
    rest_certificate: str = ""
    rest_key: str = ""
    # addresses and networks, a,b,…, of proxies before the REST API, whose X-Forwarded-For is believed
    rest_proxies: Annotated[str, AfterValidator(_networks)] = ""
    # HOST:PORT where the controller serves /metrics, for tokens of the role metrics; off loopback only with the
    # certificates of `forky auth init`; "": nowhere
    metrics: Annotated[str, AfterValidator(_address)] = ""

    @property
    def hostd_socket(self) -> Path:
        """Where the controller finds hostd."""
        return Path(self.hostd) if self.hostd else self.socket("hostd")

    @property
    def name_of_controller(self) -> str:
        """What the controller is called by those that share its database: there is one of a home."""
        return self.controller_name or f"{socket.gethostname()}:{self.home}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before the file."""
        given = init_settings().get("home")
        home = Path(given) if given is not None else home_from_environment().home
        file = TomlConfigSettingsSource(settings_cls, Home(home).config_file)
        if "home" in file.toml_data:
            raise InvalidRequest(f"home in {Home(home).config_file}: a home's file can't move it; set FORKY_HOME")
        return init_settings, env_settings, file


def load(**given: Any) -> Settings:
    """The settings of this process's environment. Raises InvalidRequest with where the first bad value stands, and what
    is wrong with it."""
    try:
        return Settings(**given)
    except ValidationError as error:
        raise InvalidRequest(_first(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(
            f"{home_from_environment().config_file} is not TOML ({error}): mend or remove it"
        ) from error
    except OSError as error:
        raise InvalidRequest(f"{error.filename} can't be read: {error.strerror}") from error


def handed_over(home: Path, log_level: str) -> Settings:
    """The settings of a process that goes on for another, which hands over what it has of them; all else has its
    default. The home's file is not read: it may have been spoilt since, and machines must not die of that."""
    return Settings.model_construct(home=home, log_level=log_level)


def variable(name: str) -> str:
    """The variable that a setting is read from."""
    alias = Settings.model_fields[name].validation_alias if name in Settings.model_fields else None
    return alias if isinstance(alias, str) else f"{PREFIX}{name}".upper()


def _first(error: ValidationError) -> str:
    """A sentence on the first thing that is wrong."""
    wrong = error.errors()[0]
    name = str(wrong["loc"][0])  # of the field, or its variable
    from_environment = name if name in os.environ else variable(name)
    where = from_environment if from_environment in os.environ else f"{name} in {home_from_environment().config_file}"
    if wrong["type"] == "extra_forbidden":
        return f"{where}: there is no such setting; `forky config ls` shows all"
    return f"{where}: {why(error)}"


def why(error: ValidationError) -> str:
    """What is wrong with the first value, in the middle of a sentence."""
    wrong = error.errors()[0]
    message = wrong["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:] + ("" if wrong["type"] == "value_error" else f", not «{wrong['input']}»")
