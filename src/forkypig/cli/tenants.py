"""forky tenant create, ls, inspect, set, rm; forky quota; forky share, unshare."""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import SnapshotName, size
from forkypig.cli.runtime import connected
from forkypig.model.tenants import Quota

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky
    from forkypig.sdk.tenants import TenantInfo

app = typer.Typer()
tenants = typer.Typer(help="Make, limit and remove tenants.", no_args_is_help=True, rich_markup_mode=None)

_UNLIMITED = -1


def _count(text: str) -> int:
    if text == "none":
        return _UNLIMITED
    if not text.isdecimal() or len(text) > 9:
        raise typer.BadParameter(f"«{text[:40]}» is not a limit: write a number, or none for no limit")
    return int(text)


def _size(text: str) -> int:
    return _UNLIMITED if text == "none" else size(text)


TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's name.", show_default=False)]
Machines = Annotated[int | None, typer.Option(metavar="N", parser=_count, help="Machines, in any state.")]
Cpus = Annotated[int | None, typer.Option("--vcpus", metavar="N", parser=_count, help="vCPUs of running machines.")]
Memory = Annotated[int | None, typer.Option(metavar="SIZE", parser=_size, help="Memory of running machines.")]
Disk = Annotated[int | None, typer.Option(metavar="SIZE", parser=_size, help="Disks and what snapshots hold.")]
Snapshots = Annotated[int | None, typer.Option(metavar="N", parser=_count, help="Snapshots that were asked for.")]
Forks = Annotated[int | None, typer.Option("--forks-per-minute", metavar="N", parser=_count, help="Forks a minute.")]


def _quota(*limits: int | None) -> tuple[Quota, list[str]]:
    """The limits that were given, and the names of those that are to go."""
    given = dict(zip((each.name for each in fields(Quota)), limits, strict=True))
    set_ = {name: limit for name, limit in given.items() if limit is not None and limit != _UNLIMITED}
    return Quota(**set_), [name for name, limit in given.items() if limit == _UNLIMITED]


@tenants.command()
def create(
    name: TenantName,
    machines: Machines = None,
    cpus: Cpus = None,
    memory: Memory = None,
    disk: Disk = None,
    snapshots: Snapshots = None,
    forks: Forks = None,
    as_json: printing.Json = False,
) -> None:
    """Make a tenant. What is not limited here is limited by the host alone."""
    quota, _ = _quota(machines, cpus, memory, disk, snapshots, forks)

    async def work(forky: "Forky") -> None:
        made = await forky.create_tenant(name, quota=quota)
        if as_json:
            printing.document(documents.tenant(made))
        else:
            printing.say(f"tenant {name} is there; act in it with forky --tenant {name}, or FORKY_TENANT")

    connected(work)


@tenants.command()
def ls(as_json: printing.Json = False) -> None:
    """List the tenants with what they use of their quotas."""

    async def work(forky: "Forky") -> None:
        found = await forky.tenants()
        if as_json:
            printing.document([documents.tenant(each) for each in found])
            return
        rows = [(each.tenant.name, *(text for _, text in _lines(each))) for each in found]
        printing.table(("TENANT", "MACHINES", "VCPUS", "MEMORY", "DISK", "SNAPSHOTS", "FORKS/MIN"), rows)

    connected(work)


@tenants.command()
def inspect(name: TenantName, as_json: printing.Json = False) -> None:
    """Show a tenant's quota and what it uses."""
    connected(lambda forky: _show(forky, name, as_json))


@tenants.command(name="set")
def change(
    name: TenantName,
    machines: Machines = None,
    cpus: Cpus = None,
    memory: Memory = None,
    disk: Disk = None,
    snapshots: Snapshots = None,
    forks: Forks = None,
    as_json: printing.Json = False,
) -> None:
    """Change a tenant's quota; none takes a limit away. What it has beyond a new limit stays."""
    quota, unlimited = _quota(machines, cpus, memory, disk, snapshots, forks)

    async def work(forky: "Forky") -> None:
        changed = await forky.set_quota(name, quota, unlimited=unlimited)
        if as_json:
            printing.document(documents.tenant(changed))
        else:
            printing.fields([("tenant", name), *_lines(changed)])

    connected(work)


@tenants.command()
def rm(name: TenantName) -> None:
    """Remove a tenant that has nothing any more."""

    async def work(forky: "Forky") -> None:
        await forky.remove_tenant(name)
        printing.say(f"tenant {name} is gone")

    connected(work)


@app.command()
def quota(as_json: printing.Json = False) -> None:
    """Show what your tenant uses, and may use."""
    connected(lambda forky: _show(forky, "", as_json))


Whom = Annotated[str, typer.Option("--with", metavar="TENANT", help="The tenant.")]
All = Annotated[bool, typer.Option("--all", help="Every tenant, also those to come.")]


@app.command()
def share(snapshot: SnapshotName, tenant: Whom = "", everyone: All = False, as_json: printing.Json = False) -> None:
    """Let other tenants start machines from a snapshot, and compare it.

    They get all that is in it: memory, disk, and the secrets of whatever ran. They can't remove or tag it.
    """
    whom = _whom(tenant, everyone)

    async def work(forky: "Forky") -> None:
        shared = await forky.share(snapshot, whom)
        if as_json:
            printing.document(documents.snapshot(shared))
        else:
            printing.say(f"{shared.id} is shared with {', '.join(shared.shared_with).replace('*', 'all tenants')}")

    connected(work)


@app.command()
def unshare(snapshot: SnapshotName, tenant: Whom = "", everyone: All = False, as_json: printing.Json = False) -> None:
    """Take a share back. Machines that were started from it stay."""
    whom = _whom(tenant, everyone)

    async def work(forky: "Forky") -> None:
        left = await forky.unshare(snapshot, whom)
        if as_json:
            printing.document(documents.snapshot(left))
        else:
            others = ", ".join(left.shared_with).replace("*", "all tenants")
            printing.say(f"{left.id} is shared with {others or 'nobody'}")

    connected(work)


def _whom(tenant: str, everyone: bool) -> str:
    if bool(tenant) == everyone:
        raise typer.BadParameter("say with whom: --with TENANT, or --all", param_hint="--with")
    return tenant or "*"


async def _show(forky: "Forky", name: str, as_json: bool) -> None:
    info = await forky.get_tenant(name)
    if as_json:
        printing.document(documents.tenant(info))
    else:
        printing.fields([("tenant", info.tenant.name), *_lines(info)])


def _lines(info: "TenantInfo") -> list[tuple[str, str]]:
    """What is used, of what: "3 of 10"."""
    lines = []
    for each in fields(Quota):
        show = sizes.human_mib if each.name.endswith("_mib") else str
        used, limit = getattr(info.used, each.name), getattr(info.tenant.quota, each.name)
        lines.append((each.name.replace("_mib", "").replace("_", " "), show(used)))
        if limit is not None:
            lines[-1] = (lines[-1][0], f"{show(used)} of {show(limit)}")
    return lines
