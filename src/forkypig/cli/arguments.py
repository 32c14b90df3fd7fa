"""Arguments that several commands share."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer

from forkypig.cli import durations, sizes
from forkypig.errors import InvalidRequest

T = TypeVar("T")

MachineName = Annotated[str, typer.Argument(metavar="MACHINE", help="A machine's id or name.", show_default=False)]
SourceName = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE_OR_SNAPSHOT", help="A machine's id or name, or a snapshot's id or tag.", show_default=False
    ),
]
SnapshotName = Annotated[
    str,
    typer.Argument(metavar="SNAPSHOT", help="A snapshot's id, the beginning of one, or its tag.", show_default=False),
]
ImageName = Annotated[str, typer.Argument(metavar="IMAGE", help="An image's id or name.", show_default=False)]

# Commands whose line ends in another command, and where `--` therefore has a meaning of its own.
TAKING_A_COMMAND = ("run", "exec", "bisect")


def parameter(parse: Callable[[str], T]) -> Callable[[str], T]:
    """For typer: what `parse` refuses is a BadParameter. Defaults are to be None, since numbers would pass through here
    as text too."""

    @functools.wraps(parse)
    def parsed(text: str) -> T:
        try:
            return parse(text)
        except (ValueError, InvalidRequest) as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


size = parameter(sizes.mib)
span = parameter(durations.seconds)


def lifetime(text: str) -> float:
    """As `span`, and not none at all, which the API takes for «as it is by default»."""
    if not (found := span(text)):
        raise typer.BadParameter("a lease of 0 s is not possible: ask for 1 s to 30 days")
    return found


TimeToLive = Annotated[
    float | None,
    typer.Option(
        "--ttl", parser=lifetime, metavar="TIME", help="How long it stays unused: 30s, 10m.", show_default="for ever"
    ),
]


def assignments(pairs: Sequence[str], option: str = "-e") -> dict[str, str]:
    """K=V each. Raises BadParameter."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"«{pair}» is not NAME=VALUE", param_hint=option)
        found[key] = value
    return found


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Our own words and those after `--`, if the command takes some; None without `--`.

    Done ahead of the parser, which would give the first of them to an argument that was left out."""
    argv = list(argv)
    at = 2 if argv[:1] == ["--tenant"] else 1 if argv and argv[0].startswith("--tenant=") else 0
    if argv[at : at + 1] and argv[at] in TAKING_A_COMMAND and "--" in argv:
        at = argv.index("--")
        return argv[:at], argv[at + 1 :]
    return argv, None
