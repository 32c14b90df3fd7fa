"""forky pool create, ls, inspect, scale, rm; forky acquire, release, renew."""

from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import MachineName, assignments, lifetime, size, span
from forkypig.cli.runtime import connected
from forkypig.model import PoolStatus

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

app = typer.Typer()
pool = typer.Typer(
    help="Keep machines ready, to be acquired in milliseconds.", no_args_is_help=True, rich_markup_mode=None
)

PoolName = Annotated[str, typer.Argument(metavar="POOL", help="A pool's name.", show_default=False)]


@pool.command()
def create(
    name: PoolName,
    source: Annotated[
        str, typer.Option("--from", metavar="SNAPSHOT_OR_IMAGE", help="What its machines begin as.", show_default=False)
    ],
    target: Annotated[int, typer.Option(min=0, metavar="N", help="Machines that stand ready at any time.")] = 1,
    most: Annotated[
        int | None,
        typer.Option("--max", min=1, metavar="M", help="Machines altogether, acquired ones too.", show_default="twice"),
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of an image: CPUs.", show_default="1")] = None,
    memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Of an image.", show_default="512M")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Of an image.", show_default="4G")
    ] = None,
    as_json: printing.Json = False,
) -> None:
    """Make a pool of machines that begin as a snapshot, or as an image's first ready moment.

    It fills in the background: TARGET machines stand ready, more when many are asked for, never more than MAX.
    """

    async def work(forky: "Forky") -> None:
        made = await forky.create_pool(
            name,
            source,
            target=target,
            max=max(1, 2 * target) if most is None else most,
            cpus=cpus or 0,
            memory_mib=memory or 0,
            disk_mib=disk or 0,
        )
        if as_json:
            printing.document(documents.pool(made))
        else:
            printing.say(f"pool {name} fills in the background: forky pool inspect {name}; then forky acquire {name}")

    connected(work)


@pool.command()
def ls(as_json: printing.Json = False) -> None:
    """List the pools."""

    async def work(forky: "Forky") -> None:
        found = await forky.pools()
        if as_json:
            printing.document([documents.pool(each) for each in found])
            return
        if not found:
            printing.say("There is no pool yet. Make one: forky pool create py --from debian-12 --target 3")
            return
        rows = [
            (
                each.pool.name,
                each.pool.source,
                sizes.human_mib(each.pool.shape.memory_mib),
                str(each.ready),
                str(each.filling),
                str(each.acquired),
                str(each.waiting),
                f"{each.pool.target} to {each.pool.max}",
                printing.ago(each.pool.created_us),
                each.failure,
            )
            for each in found
        ]
        headings = ("NAME", "FROM", "MEMORY", "READY", "FILLING", "ACQUIRED", "WAITING", "SIZE", "AGE", "TROUBLE")
        printing.table(headings, rows)

    connected(work)


@pool.command()
def inspect(name: PoolName, as_json: printing.Json = False) -> None:
    """Show everything about a pool: its machines, and who has acquired which."""

    async def work(forky: "Forky") -> None:
        _show(await forky.pool(name).status(), as_json)

    connected(work)


def _show(status: PoolStatus, as_json: bool) -> None:
    document = documents.pool(status)
    if as_json:
        printing.document(document)
        return
    ready, held = document.pop("machines"), document.pop("leases")
    printing.fields([(key, "-" if value in (None, "") else str(value)) for key, value in document.items()])
    if ready:
        printing.table(
            ("WAITING", "ID", "STATE", "ADDRESS"),
            [(each["name"], each["id"], each["state"], each["address"] or "") for each in ready],
        )
    if held:
        printing.table(
            ("ACQUIRED", "ID", "BY", "SINCE", "ENDS IN", "LABELS"),
            [
                (
                    lease.machine_name,
                    lease.machine,
                    lease.holder,
                    printing.ago(lease.acquired_us),
                    printing.left(lease.expires_us),
                    ", ".join(f"{key}={value}" for key, value in lease.labels.items()),
                )
                for lease in status.leases
            ],
        )


@pool.command()
def scale(
    name: PoolName,
    target: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Machines that stand ready at any time.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, metavar="M", help="Machines altogether.")] = None,
    as_json: printing.Json = False,
) -> None:
    """Change how many machines a pool has."""
    if target is None and most is None:
        raise typer.BadParameter("say --target, --max or both", param_hint="--target")

    async def work(forky: "Forky") -> None:
        status = await forky.pool(name).scale(target=target, max=most)
        if as_json:
            printing.document(documents.pool(status))
        else:
            printing.say(f"pool {name} has {status.pool.target} machines ready and {status.pool.max} at most")

    connected(work)


@pool.command()
def rm(name: PoolName, as_json: printing.Json = False) -> None:
    """Remove a pool and the machines that wait in it; acquired ones stay until they are released."""

    async def work(forky: "Forky") -> None:
        await forky.pool(name).remove()
        if as_json:
            printing.document({"removed": [{"type": "pool", "name": name}]})
        else:
            printing.say(f"removed pool {name}")

    connected(work)


@app.command()
def acquire(
    name: PoolName,
    ttl: Annotated[
        float | None,
        typer.Option(parser=lifetime, metavar="TIME", help="How long it stays unused: 30s, 10m.", show_default="10m"),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="K=V", help="What is to be known about the lease.")
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(parser=span, metavar="TIME", help="For a machine, if none is ready.", show_default="30s"),
    ] = None,
    as_json: printing.Json = False,
) -> None:
    """Take a machine out of a pool: it runs, and is yours until you release it.

    A machine that is not used (exec, cp, shell, renew) for the time of --ttl is removed. Where none is ready callers
    wait in turn.
    """
    labels = assignments(label or [], "--label")

    async def work(forky: "Forky") -> None:
        machine = await forky.pool(name).acquire(ttl_s=ttl or 0.0, labels=labels, wait_s=30.0 if wait is None else wait)
        if as_json:
            printing.document(documents.acquired(machine.info, machine.lease, machine.waited_ms))
        else:
            printing.say(
                f"{machine.name} ({machine.id}) is yours, {printing.left(machine.lease.expires_us)} from its last use"
            )

    connected(work)


@app.command()
def release(
    machine: MachineName,
    recycle: Annotated[
        bool, typer.Option("--recycle", help="The pool gets another at once, not when there is time.")
    ] = False,
    as_json: printing.Json = False,
) -> None:
    """Give an acquired machine back: it is removed, and nothing of it is left for others."""

    async def work(forky: "Forky") -> None:
        await forky.release(machine, recycle=recycle)
        if as_json:
            printing.document({"released": machine, "recycled": recycle})
        else:
            printing.say(f"released {machine}")

    connected(work)


@app.command()
def renew(
    machine: MachineName,
    ttl: Annotated[
        float | None,
        typer.Option(
            parser=lifetime, metavar="TIME", help="How long it stays unused from now on.", show_default="as it is"
        ),
    ] = None,
    as_json: printing.Json = False,
) -> None:
    """Let a machine's lease begin anew, as every use of it does."""

    async def work(forky: "Forky") -> None:
        lease = await forky.renew(machine, ttl or 0.0)
        if as_json:
            printing.document(documents.lease(lease))
        else:
            printing.say(f"{lease.machine_name} is yours for another {printing.left(lease.expires_us)}")

    connected(work)
