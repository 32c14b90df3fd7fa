"""forky ksm status, on, off."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import printing, sizes
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.model.ksm import KsmStatus
    from forkypig.sdk.client import Forky

app = typer.Typer(
    help="Kernel samepage merging: equal pages of a tenant's machines are kept once.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def status(as_json: printing.Json = False) -> None:
    """Show whose machines it is for, and what it saves."""

    async def work(forky: "Forky") -> None:
        _show(await forky.ksm(), as_json)

    connected(work)


@app.command()
def on(
    across_tenants: Annotated[
        bool, typer.Option("--across-tenants", help="Also where it is on for another tenant: pages of both are merged.")
    ] = False,
    as_json: printing.Json = False,
) -> None:
    """Turn it on for your tenant's machines (--tenant).

    It is a side channel: by the time that a write takes, a machine finds out which pages others have too
    (CVE-2015-2877). So it is for the machines of one tenant, unless you say --across-tenants.
    """

    async def work(forky: "Forky") -> None:
        _show(await forky.set_ksm(on=True, across_tenants=across_tenants), as_json)

    connected(work)


@app.command()
def off(as_json: printing.Json = False) -> None:
    """Turn it off for your tenant's machines; what was merged is copied again."""

    async def work(forky: "Forky") -> None:
        _show(await forky.set_ksm(on=False), as_json)

    connected(work)


def _show(now: "KsmStatus", as_json: bool) -> None:
    if as_json:
        printing.document(asdict(now))
        return
    profit = f"{'-' if now.profit_bytes < 0 else ''}{sizes.human(abs(now.profit_bytes))}"
    printing.fields(
        [
            ("KSM", "on" if now.running else "off"),
            ("for tenants", ", ".join(now.tenants) or "none"),
            ("merged", f"{sizes.human(now.merged_bytes)} of machines"),
            ("saves", f"{profit} on the whole host"),
            ("full scans", str(now.full_scans)),
        ]
    )
