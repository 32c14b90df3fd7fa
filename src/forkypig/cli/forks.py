"""forky fork, snapshot, snapshots, tree."""

from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes, surroundings
from forkypig.cli.arguments import MachineName, SourceName, TimeToLive
from forkypig.cli.history import where
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected
from forkypig.model import ConfigChange, Progress

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

app = typer.Typer()

Quiesce = Annotated[
    bool,
    typer.Option("--quiesce", help="Freeze its user processes before; they go on when each has its own entropy."),
]


@app.command()
def fork(
    source: SourceName,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="How many children.")] = 1,
    name: Annotated[
        str, typer.Option("--name", metavar="PREFIX", help="Children are PREFIX-1, PREFIX-2, …; else as the source.")
    ] = "",
    paused: Annotated[bool, typer.Option("--paused", help="Hand the children out paused.")] = False,
    quiesce: Quiesce = False,
    tcp: surroundings.Tcp = None,
    forget: Annotated[
        str, typer.Option("--forget", metavar="NAME,…", help="Environment variables that are wiped in the children.")
    ] = "",
    network: surroundings.Network = None,
    egress: surroundings.EgressOption = None,
    bandwidth: surroundings.Bandwidth = None,
    publish: surroundings.Publish = None,
    cpu_limit: surroundings.CpuLimit = None,
    memory_limit: surroundings.MemoryLimit = None,
    pids_limit: surroundings.PidsLimit = None,
    io_limit: surroundings.IoLimit = None,
    restart: surroundings.RestartOption = None,
    ttl: TimeToLive = None,
    as_json: printing.Json = False,
) -> None:
    """Split a machine into itself and children.

    They share its memory and disk. A running machine goes on, a paused one stays paused.
    Of a snapshot only children are made. Children have the parent's network and limits, unless told otherwise here,
    and none of its published ports, restart policy and lease.
    """
    config = ConfigChange(
        mode=network,
        egress=egress,
        bandwidth_bytes_s=bandwidth,
        tcp=tcp,
        publish=tuple(publish or ()),
        limits=surroundings.limits(cpu_limit, memory_limit, pids_limit, io_limit),
        restart=restart,
    )
    forgotten = [name.strip() for name in forget.split(",") if name.strip()]

    async def work(forky: "Forky") -> None:
        with Display() as display:
            display.on_progress(Progress(f"forking into {count} children" if count > 1 else "forking"))
            made = await forky.fork(
                source,
                count,
                name=name,
                paused=paused,
                quiesce=quiesce,
                forget=forgotten,
                config=config,
                ttl_s=ttl or 0.0,
            )
        children = [
            {"id": child.id, "name": child.name, "ready_ms": round(child.ready_ms or 0.0, 3)} for child in made.children
        ]
        if as_json:
            printing.document(
                {
                    "snapshot": made.snapshot.id,
                    "parent": made.parent,
                    "pause_ms": round(made.pause_ms, 3),
                    "children": children,
                }
            )
            return
        paused_for = f"; the parent stood still for {printing.milliseconds(made.pause_ms)}" if made.pause_ms else ""
        printing.say(f"forked {source} at {made.snapshot.id}{paused_for}")
        rows = [(child.name, child.id, printing.milliseconds(child.ready_ms or 0.0)) for child in made.children]
        printing.table(("CHILD", "ID", "READY AFTER"), rows)

    connected(work)


@app.command()
def snapshot(
    machine: MachineName,
    tag: Annotated[str, typer.Option("--tag", metavar="TAG", help="A name for it.")] = "",
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="What is to be remembered about it.")
    ] = "",
    quiesce: Quiesce = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is on disk for good.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Keep a machine's state of this instant.

    It is written to disk behind the machine's back, which `forky snapshots` shows as packed.
    """

    async def work(forky: "Forky") -> None:
        made = await (await forky.get(machine)).snapshot(tag, message=message, quiesce=quiesce)
        if wait:
            with Display() as display:
                display.on_bytes_of(Progress("packing"))
                made = await forky.pack(made.id, on_progress=display.on_bytes_of)
        if as_json:
            printing.document(documents.snapshot(made))
        else:
            called = f" as {made.tag}" if made.tag else ""
            printing.say(f"kept {made.id}{called}; the machine stood still for {printing.milliseconds(made.pause_ms)}")

    connected(work)


@app.command()
def snapshots(as_json: printing.Json = False) -> None:
    """List the snapshots."""

    async def work(forky: "Forky") -> None:
        found = await forky.snapshots()
        if as_json:
            printing.document([documents.snapshot(each) for each in found])
            return
        if not found:
            printing.say("There is no snapshot yet. Keep one: forky snapshot MACHINE --tag good")
            return
        rows = [
            (
                each.id,
                each.tag,
                each.kind.value,
                each.parent or "",
                each.machine or "",
                sizes.human_mib(each.shape.memory_mib),
                sizes.human(each.own_memory_bytes),
                where(each),
                printing.ago(each.created_us),
                each.message.partition("\n")[0],
                ",".join(each.shared_with).replace("*", "all") or "",
                each.tenant,
            )
            for each in found
        ]
        headings = ["ID", "TAG", "KIND", "PARENT", "MACHINE", "MEMORY", "OWN", "WHERE", "AGE", "MESSAGE"]
        if any(each.shared_with or each.tenant != found[0].tenant for each in found):
            headings += ["SHARED WITH", "TENANT"]
        printing.table(headings, [row[: len(headings)] for row in rows])

    connected(work)


@app.command()
def tree(as_json: printing.Json = False) -> None:
    """Draw which machine and which snapshot came from which."""

    async def work(forky: "Forky") -> None:
        from forkypig.cli.genealogy import draw, flat, grow

        machines = [machine.info for machine in await forky.list()]
        kept = await forky.snapshots()
        roots = grow(machines, kept)
        if as_json:
            printing.document(flat(roots))
        elif not roots:
            printing.say("Nothing has grown yet. Plant a machine: forky run --name web; fork it: forky fork web -n 3")
        else:
            draw(roots)

    connected(work)
