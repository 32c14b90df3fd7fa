"""The settings of a home, and where each comes from. Reads and writes FORKY_HOME/config.toml; asks no daemon."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from pydantic import TypeAdapter, ValidationError
from tomlkit.exceptions import TOMLKitError

from forkypig.daemon.home import HomePaths
from forkypig.daemon.settings import Settings, variable, why
from forkypig.errors import InvalidRequest, NotFound, ResourceExhausted

_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting, as the daemons of this environment have it from their next start on."""

    name: str
    variable: str  # FORKY_…, which comes before the file
    value: Any
    source: str  # "default", "file" or "environment"
    default: Any

    @property
    def shown(self) -> str:
        """For a person: without the password that a database's URL may have."""
        return _PASSWORD.sub(r"\1:…@", text(self.value))


def text(value: Any) -> str:
    """A value as one writes it on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings(at: HomePaths) -> list[Setting]:
    """All that can be set in the file. Raises InvalidRequest where the file or a variable is wrong."""
    return [_setting(at, name, _document(at)) for name in _names()]


def get(at: HomePaths, name: str) -> Setting:
    """One. Raises NotFound, InvalidRequest."""
    return _setting(at, _known(name), _document(at))


def put(at: HomePaths, name: str, value: str) -> Setting:
    """Writes a setting into the file, whose comments and order stay. Raises NotFound, InvalidRequest; the file is then
    as it was."""
    checked = _checked(_known(name), value, f"{name} can't be «{value}»")
    document = _document(at)
    document[name] = checked
    _write(at.config_file, tomlkit.dumps(document))
    return get(at, name)


def drop(at: HomePaths, name: str) -> Setting:
    """Takes a setting out of the file; one that is not there is fine. Raises NotFound, InvalidRequest."""
    document = _document(at)
    if _known(name, document) in document:
        del document[name]
        _write(at.config_file, tomlkit.dumps(document))
    if name in _names():
        return get(at, name)
    return Setting(name, variable(name), "", "default", "")


def _names() -> list[str]:
    return [name for name in Settings.model_fields if name != "home"]


def _known(name: str, document: tomlkit.TOMLDocument | None = None) -> str:
    """`document`: what stands there may be named too, so that it can be taken out. Raises NotFound, InvalidRequest."""
    if name == "home":
        raise InvalidRequest("the home can't be set in its own file: set the variable FORKY_HOME")
    if name not in _names() and name not in (document or ()):
        raise NotFound("setting", name, "`forky config ls` shows all")
    return name


def _setting(at: HomePaths, name: str, document: tomlkit.TOMLDocument) -> Setting:
    from_environment = variable(name)
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    value, source = default, "default"
    if from_environment in os.environ:
        value, source = _checked(name, os.environ[from_environment], from_environment), "environment"
    elif name in document:
        value, source = _checked(name, document.unwrap()[name], f"{name} in {at.config_file}"), "file"
    return Setting(name, from_environment, value, source, default)


def _checked(name: str, value: Any, where: str) -> Any:
    field = Settings.model_fields[name]
    annotated: Any = field.annotation
    for metadata in field.metadata:
        annotated = Annotated[annotated, metadata]
    try:
        return TypeAdapter(annotated).validate_python(value)
    except ValidationError as error:
        raise InvalidRequest(f"{where}: {why(error)}") from error


def _document(at: HomePaths) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(at.config_file.read_text())
    except FileNotFoundError:
        return tomlkit.document()
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{at.config_file} is not TOML ({error}): mend or remove it") from error


def _write(path: Path, content: str) -> None:
    """All of it or nothing, for nobody else's eyes. Raises ResourceExhausted."""
    try:
        with _beside(path) as new:
            new.write_text(content)
            new.replace(path)
    except OSError as error:
        raise ResourceExhausted(f"{path} can't be written ({error.strerror}): it is as it was") from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".config-")
    os.close(fd)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
