"""forky up, down, status, doctor, bench."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig import errors
from forkypig.cli import documents, printing, sizes
from forkypig.cli.progress import Display
from forkypig.cli.runtime import perform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forkypig.sdk.status import Check, Daemon, Status, Tiers

app = typer.Typer()


@app.command()
def up(as_json: printing.Json = False) -> None:
    """Start the daemons in the background.

    Harmless when they run already."""

    async def work() -> None:
        from forkypig.sdk import local

        place = local.own_place()
        display = Display()
        with display:
            await local.up(place, display.on_progress)
        found = await local.status(place)
        if as_json:
            printing.document(documents.status(found))
        else:
            _show_status(found)

    perform(work)


@app.command()
def down(
    force: Annotated[
        bool, typer.Option("--force", help="End the daemons even if machines can't be shut down in order.")
    ] = False,
    as_json: printing.Json = False,
) -> None:
    """Shut down all machines and end the daemons.

    Snapshots, disks and images are kept."""

    async def work() -> None:
        from forkypig.sdk import local, shutdown

        place = local.own_place()
        display = Display()
        with display:
            ran = await shutdown.down(place, display.on_progress, force=force)
        if as_json:
            printing.document({**documents.status(await local.status(place)), "was_running": ran})
        else:
            ended = f"the daemons of {place.home} have ended" if force else f"everything in {place.home} has ended"
            printing.say(ended if ran else f"nothing runs in {place.home}")

    perform(work)


@app.command()
def status(as_json: printing.Json = False) -> None:
    """Show what runs, without starting anything."""

    async def work() -> None:
        from forkypig.sdk import local

        found = await _remote_status() or await local.status(local.place())
        if as_json:
            printing.document(documents.status(found))
        else:
            _show_status(found)

    perform(work)


async def _remote_status() -> "Status | None":
    """Of the controller that FORKY_CONTROLLER names; None: it names none."""
    from forkypig.sdk.client import Forky

    if not (forky := Forky(start=False)).is_remote:
        return None
    async with forky:
        return await forky.status()


def _show_status(found: "Status") -> None:
    daemons = {"controller": found.controller, "hostd": found.hostd, "pager": found.pager}
    if not any(daemons.values()):
        printing.say(f"nothing runs in {found.home}: forky up, or any command, starts it")
        return
    troubles = {"controller": found.controller_error, "hostd": found.hostd_error, "pager": found.pager_error}
    pairs = [("home", str(found.home))]
    pairs += [(name, _daemon_line(daemon, troubles[name])) for name, daemon in daemons.items()]
    if found.rest is not None:
        pairs.append(("REST", f"runs, pid {found.rest.pid}, at {found.rest_address or '-'}"))
    elif found.rest_error:
        pairs.append(("REST", found.rest_error))
    if found.accelerator:
        pairs.append(("accelerator", _with_reason(found.accelerator, found.accelerator_reason)))
    if found.network:
        pairs.append(("network", _with_reason(found.network, found.network_reason)))
    if found.qemu_version:
        pairs.append(("QEMU", found.qemu_version))
    pairs.append(("machines", str(found.machines)))
    pairs.append(("snapshots", str(found.snapshots)))
    if (tiers := found.tiers) is not None:
        pairs.append(("their memory", _where(tiers)))
    printing.fields(pairs)


def _where(tiers: "Tiers") -> str:
    return (
        f"{sizes.human(tiers.frozen_bytes)} in frozen processes, {sizes.human(tiers.cached_bytes)} in the page cache, "
        f"{sizes.human(tiers.stored_bytes)} on disk in {tiers.chunks} chunks"
    )


def _daemon_line(daemon: "Daemon | None", trouble: str) -> str:
    if daemon is None:
        return "does not run" + (f": {trouble}" if trouble else "")
    since = f", up for {printing.ago(daemon.started_us)}" if daemon.started_us else ""
    return f"runs, pid {daemon.pid}{since}" + (f", but: {trouble}" if trouble else "")


def _with_reason(what: str, reason: str) -> str:
    return f"{what} ({reason})" if reason else what


@app.command()
def doctor(as_json: printing.Json = False) -> None:
    """Check every requirement and say how to mend it.

    The exit code is 1 if something is missing."""

    async def work() -> int | None:
        display = Display()
        with display:
            checks = await _examine()
        failed = any(check.verdict.value == "failed" for check in checks)
        if as_json:
            printing.document({"ok": not failed, "checks": [documents.check(check) for check in checks]})
        else:
            _show_checks(checks)
        return 1 if failed else None

    perform(work)


async def _examine() -> "Sequence[Check]":
    """What the daemons find; when they don't even start, that, and what can be seen without them."""
    from forkypig.sdk import requirements
    from forkypig.sdk.client import Forky
    from forkypig.sdk.status import Check, Verdict

    try:
        async with Forky() as forky:
            return await forky.doctor()
    except (errors.Unauthenticated, errors.PermissionDenied):
        raise
    except errors.ForkyError as error:
        remedy = "mend what else is marked here, then `forky up`"
        return [Check("daemons", Verdict.FAILED, str(error), remedy), *requirements.examine()]


def _show_checks(checks: "Sequence[Check]") -> None:
    marks = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        printing.say(f"{marks[check.verdict.value]}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            printing.say(f"{'':>7}  {'':<{width}}  → {check.remedy}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout; all arguments go to them."""
    root = next((each for each in _checkouts() if (each / "bench/__main__.py").is_file()), None)
    if root is None:
        raise errors.NotPossibleNow("the benchmarks are part of a checkout and not installed: run `forky bench` in one")

    async def work() -> int:
        import asyncio

        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench", *context.args, cwd=root, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        try:
            # Without a deadline: it is the user's own foreground program, and Ctrl-C reaches it as it does us.
            return await child.wait()
        finally:
            if child.returncode is None:
                child.terminate()
                await child.wait()

    perform(work)


def _checkouts() -> "Sequence[Path]":
    """Where a checkout may be: here, and around our own source when it is installed in place."""
    return (Path.cwd(), Path(__file__).resolve().parents[3])
