"""forky config: settings in FORKY_HOME/config.toml, beneath FORKY_* variables."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forkypig.cli import printing

if TYPE_CHECKING:
    from forkypig.daemon.home import Home
    from forkypig.sdk.config import Setting

app = typer.Typer(help="Show and change settings.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="SETTING", help="Its name: `forky config ls`.", show_default=False)]


@app.command()
def ls(as_json: printing.Json = False) -> None:
    """List all settings: what they are, and where that comes from.

    A FORKY_* variable comes before the file, the file before the default."""
    from forkypig.sdk import config

    found = config.settings(_place())
    if as_json:
        printing.document([_document(each) for each in found])
    else:
        printing.table(("SETTING", "VALUE", "FROM"), [(each.name, each.shown, _from(each)) for each in found])


@app.command()
def get(name: Name, as_json: printing.Json = False) -> None:
    """Print one setting."""
    from forkypig.sdk import config

    found = config.get(_place(), name)
    if as_json:
        printing.document(_document(found))
    else:
        printing.say(config.text(found.value))


@app.command("set")
def set_(
    name: Name, value: Annotated[str, typer.Argument(metavar="VALUE", help="What it is to be.", show_default=False)]
) -> None:
    """Write a setting into the file.

    The daemons take it up when they start again."""
    from forkypig.sdk import config, local

    place = _place()
    local.make_home(place)
    _changed(place, lambda: config.put(place, name, value))


@app.command()
def unset(name: Name) -> None:
    """Take a setting out of the file."""
    from forkypig.sdk import config

    place = _place()
    _changed(place, lambda: config.drop(place, name))


@app.command()
def path() -> None:
    """Print where the file is, or would be."""
    printing.say(str(_place().config_file))


def _place() -> "Home":
    from forkypig.sdk import local

    return local.place()


def _changed(place: "Home", change: "Callable[[], Setting]") -> None:
    """Says what it is now, and what has to be done for it."""
    from forkypig.sdk import local
    from forkypig.sdk.pids import running_pid

    found = change()
    printing.say(f"{found.name} is {found.shown or 'empty'} ({_from(found)})")
    if found.source == "environment":
        printing.trouble(f"{found.variable} is set and comes before the file: unset it for the file to matter")
    if any(running_pid(place.pid_file(daemon)) is not None for daemon in local.DAEMONS):
        printing.trouble("the daemons that run go on as they are: `forky down && forky up` has them read it")


def _from(setting: "Setting") -> str:
    return {"environment": setting.variable, "file": "config.toml"}.get(setting.source, "default")


def _document(setting: "Setting") -> dict[str, Any]:
    return {
        "name": setting.name,
        "value": setting.value,
        "source": setting.source,
        "variable": setting.variable,
        "default": setting.default,
    }
