"""forky run, ps, inspect, pause, resume, stop, start, rm, logs."""

import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forkypig import errors
from forkypig.cli import documents, printing, sizes, surroundings
from forkypig.cli.arguments import MachineName, SourceName, TimeToLive, size
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected
from forkypig.model import ConfigChange

if TYPE_CHECKING:
    from forkypig import model
    from forkypig.sdk.client import Forky
    from forkypig.sdk.machine import Machine

app = typer.Typer()
# How long a machine of `run --rm` outlives a caller that was killed. The command that it is for uses it as long as it
# runs; before and after it nothing is to be done but one call.
_ABANDONED_S = 60.0


@app.command()
def run(
    context: typer.Context,
    image: Annotated[
        str, typer.Argument(metavar="[IMAGE]", help="An image's id or name; the default one if none is named.")
    ] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Its name; one is chosen if none is given.")] = "",
    cpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="Virtual CPUs.", show_default="1")] = None,
    memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="512M, 4G, 1.5G or MiB.", show_default="512M")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="512M, 4G, 1.5G or MiB.", show_default="4G")
    ] = None,
    publish: surroundings.Publish = None,
    network: surroundings.Network = None,
    egress: surroundings.EgressOption = None,
    bandwidth: surroundings.Bandwidth = None,
    cpu_limit: surroundings.CpuLimit = None,
    memory_limit: surroundings.MemoryLimit = None,
    pids_limit: surroundings.PidsLimit = None,
    io_limit: surroundings.IoLimit = None,
    no_fork: Annotated[bool, typer.Option("--no-fork", help="It refuses to be forked.")] = False,
    restart: surroundings.RestartOption = None,
    snapshot: Annotated[
        str, typer.Option("--from", metavar="SNAPSHOT", help="Start from a snapshot: its id, or tag.")
    ] = "",
    cold_boot: Annotated[bool, typer.Option("--cold-boot", help="Really boot, don't start from the template.")] = False,
    remove: Annotated[bool, typer.Option("--rm", help="Remove the machine when COMMAND has ended.")] = False,
    ttl: TimeToLive = None,
    as_json: printing.Json = False,
) -> None:
    """Boot a machine, and with `-- COMMAND` run that in it.

    The first run of an image and shape boots; later ones start from its template in milliseconds. With --from it goes
    on from a snapshot, whose shape, network and limits it has unless told otherwise here. The machine stays after
    COMMAND, whose exit code is passed on, unless --rm; with --ttl until nobody has used it (exec, cp, shell, renew) for
    so long.
    """
    command: list[str] | None = context.obj
    if command == []:
        raise typer.BadParameter("nothing follows «--»: name a command", param_hint="COMMAND")
    if remove and command is None:
        raise typer.BadParameter("--rm needs a command to wait for: add «-- COMMAND»", param_hint="--rm")

    config = ConfigChange(
        mode=network,
        egress=egress,
        bandwidth_bytes_s=bandwidth,
        publish=tuple(publish or ()),
        limits=surroundings.limits(cpu_limit, memory_limit, pids_limit, io_limit),
        no_fork=no_fork or None,
        restart=restart,
    )

    async def work(forky: "Forky") -> int | None:
        display = Display()
        with display:
            machine = await forky.run(
                image,
                name=name,
                cpus=cpus or 0,
                memory_mib=memory or 0,
                disk_mib=disk or 0,
                cold_boot=cold_boot,
                snapshot=snapshot,
                config=config,
                ttl_s=ttl or (_ABANDONED_S if remove else 0.0),
                on_progress=display.on_progress,
            )
        if command is None:
            _show_made(machine, as_json, snapshot)
            return None
        try:
            return await _run_command(machine, command, as_json)
        finally:
            if remove:
                await machine.remove()

    connected(work)


def _made(machine: "Machine") -> documents.Document:
    return {
        **documents.machine(machine.info),
        "ready_ms": round(machine.ready_ms or 0.0, 3),
        "pool": machine.pool or None,
    }


def _show_made(machine: "Machine", as_json: bool, snapshot: str) -> None:
    if as_json:
        printing.document(_made(machine))
        return
    how = f"taken from pool {machine.pool}" if machine.pool else _how(machine, snapshot)
    printing.say(f"{machine.name} ({machine.id}) {how} in {printing.milliseconds(machine.ready_ms or 0.0)}")


def _how(machine: "Machine", snapshot: str) -> str:
    return f"started from {snapshot or 'its template'}" if machine.info.snapshot else "booted"


async def _run_command(machine: "Machine", command: list[str], as_json: bool) -> int:
    from forkypig.cli.attachment import attached, collected

    if as_json:
        result, code = await collected(machine, command)
        printing.document({**_made(machine), "command": result})
        return code
    return await attached(machine, command)


@app.command()
def ps(
    every: Annotated[bool, typer.Option("--all", "-a", help="Also those that wait in pools.")] = False,
    as_json: printing.Json = False,
) -> None:
    """List the machines."""

    async def work(forky: "Forky") -> None:
        infos = [machine.info for machine in await forky.list()]
        where: dict[str, str] = {}  # the pool that a machine waits in
        if every:
            for status in await forky.pools(contents=True):
                infos += status.machines
                where |= {machine.id: status.pool.name for machine in status.machines}
        if as_json:
            printing.document([{**documents.machine(info), "pool": where.get(info.id)} for info in infos])
            return
        if not infos:
            printing.say("There is no machine yet. Make one: forky run --name web")
            return
        rows = [
            (
                info.name,
                info.id,
                _state(info, where.get(info.id, "")),
                info.image_name or info.image,
                str(info.shape.cpus),
                sizes.human_mib(info.shape.memory_mib),
                info.snapshot or "",
                info.address or "",
                printing.ago(info.created_us),
                printing.left(info.expires_us),
            )
            for info in infos
        ]
        headings = ["NAME", "ID", "STATE", "IMAGE", "CPUS", "MEMORY", "SNAPSHOT", "ADDRESS", "AGE"]
        if any(info.expires_us for info in infos):
            headings.append("LEASE")
        printing.table(headings, [row[: len(headings)] for row in rows])

    connected(work)


def _state(info: "model.Machine", pool: str) -> str:
    if pool:
        return f"{info.state.value}, in pool {pool}"
    return f"{info.state.value}, {info.operation}" if info.operation else info.state.value


@app.command()
def inspect(source: SourceName, as_json: printing.Json = False) -> None:
    """Show everything about a machine or a snapshot."""

    async def work(forky: "Forky") -> None:
        kind, found = await _find(forky, source)
        if as_json:
            printing.document({"type": kind, **found})
        else:
            printing.fields([("type", kind), *((key, _text(value)) for key, value in found.items())])

    connected(work)


async def _find(forky: "Forky", name: str) -> tuple[str, documents.Document]:
    """A machine, else a snapshot. Raises NotFound."""
    try:
        return "machine", documents.machine((await forky.get(name)).info)
    except errors.NotFound:
        pass
    try:
        return "snapshot", documents.snapshot(await forky.get_snapshot(name))
    except errors.NotFound as error:
        raise errors.NotFound("machine or snapshot", name, "see `forky ps` and `forky snapshots`") from error


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items() if part not in (None, "", [])) or "-"
    if isinstance(value, list):
        return "; ".join(_text(part) for part in value) or "-"
    return "-" if value in (None, "") else str(value)


def _change(name: str, verb: str, done: str, as_json: bool, **options: bool) -> None:
    """Does `verb` to one machine, and says how it is now."""

    async def work(forky: "Forky") -> None:
        machine = await forky.get(name)
        await getattr(machine, verb)(**options)
        if as_json:
            printing.document(documents.machine(machine.info))
        else:
            printing.say(f"{machine.name} {done}")

    connected(work)


@app.command()
def pause(machine: MachineName, as_json: printing.Json = False) -> None:
    """Stop a machine's processors; its memory stays."""
    _change(machine, "pause", "is paused", as_json)


@app.command()
def resume(machine: MachineName, as_json: printing.Json = False) -> None:
    """Let a paused machine go on."""
    _change(machine, "resume", "runs", as_json)


@app.command()
def stop(
    machine: MachineName,
    force: Annotated[bool, typer.Option("--force", "-f", help="Cut the power instead.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Shut a machine down; its disk is kept."""
    _change(machine, "stop", "is stopped", as_json, force=force)


@app.command()
def start(machine: MachineName, as_json: printing.Json = False) -> None:
    """Boot a stopped machine from its disk."""
    _change(machine, "start", "runs", as_json)


@app.command()
def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Machines, or snapshots by id, beginning of an id, or tag."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Remove every machine, without asking.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Remove machines and snapshots for ever."""
    if bool(names) == every:
        raise typer.BadParameter("name machines or snapshots, or say --all", param_hint="NAME")

    async def work(forky: "Forky") -> int | None:
        from asyncio import ensure_future

        wanted = [machine.id for machine in await forky.list()] if every else names or []
        removed, failed = [], 0
        removals: list[Awaitable[dict[str, str]]] = [_remove(forky, name) for name in wanted]
        if every:  # side by side; what is named goes in its order, as a snapshot can go when its machines have gone
            removals = [ensure_future(removal) for removal in removals]
        for removal in removals:
            try:
                gone = await removal
            except errors.ForkyError as error:
                if every and isinstance(error, errors.NotFound):
                    continue  # somebody else was faster
                printing.trouble(str(error))
                failed += 1
                continue
            removed.append(gone)
            if not as_json:
                printing.say(f"removed {gone['type']} {gone['name'] or gone['id']}")
        if as_json:
            printing.document({"removed": removed})
        elif not wanted:
            printing.say("There is no machine to remove.")
        return 1 if failed else None

    connected(work)


async def _remove(forky: "Forky", name: str) -> dict[str, str]:
    """Removes a machine, else a snapshot, and tells what it was."""
    kind, found = await _find(forky, name)
    if kind == "snapshot":
        await forky.remove_snapshot(found["id"])
        return {"type": kind, "id": found["id"], "name": found["tag"] or ""}
    await (await forky.get(found["id"])).remove()
    return {"type": kind, "id": found["id"], "name": found["name"]}


@app.command()
def logs(
    machine: MachineName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the machine is gone.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Print a machine's console."""
    if follow and as_json:
        raise typer.BadParameter("one JSON document can't be followed: leave out --json or -f", param_hint="--follow")

    async def work(forky: "Forky") -> None:
        found = await forky.get(machine)
        if as_json:
            text = b"".join([data async for data in found.console()]).decode(errors="replace")
            printing.document({"id": found.id, "name": found.name, "console": text})
            return
        async for data in found.console(follow=follow):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    connected(work)
