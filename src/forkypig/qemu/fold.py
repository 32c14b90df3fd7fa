"""Folding: a running machine's layers below its overlay are replaced by one raw file with the same content.

The new node is added, the layer above it is opened again over it (`blockdev-reopen`, stable since QEMU 6.1), and the
old nodes go. Requests of the guest wait for the milliseconds in between. What the overlay's header says of its backing
file stays as it was and is never read: QMP's `change-backing-file` would write the overlay's own format there, and a
raw file that the guest has filled must never be taken for a qcow2 one (docs/decisions/0014).
"""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkypig.errors import MachineFailed
from forkypig.qemu import disks, nodes
from forkypig.qemu.process import Process

# Opening again drains the disk and flushes the overlay: some milliseconds, unless the disk below is busy.
_REOPEN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to a machine's nodes."""

    above: str  # suffix of the layer that is opened again
    base: str | None  # suffix of the node that it shall stand on; None: to be added
    stray: Sequence[str]  # names of the nodes that go


def plan(found: Sequence[Mapping[str, Any]], chain: Sequence[tuple[Path, str]], *, anew: bool) -> Plan | None:
    """What makes `chain` of the nodes that query-named-block-nodes found; None when there is nothing to do.

    `anew`: the base's node is replaced although it has the right name. Raises MachineFailed when a layer of `chain`
    above the base is not among the nodes: then the machine stands on something else.
    """
    suffixes = {
        str(node["image"]["filename"]): suffix
        for node in found
        if node["drv"] == "file" and (suffix := nodes.suffix_of(node["node-name"])) is not None
    }
    layers = [suffixes.get(str(path)) for path, _ in chain]
    if None in layers[:-1]:
        raise MachineFailed(f"the machine has no layer {chain[layers.index(None)][0]}: it stands on another disk")
    base = None if anew else layers[-1]
    kept = {*layers[:-1], base}
    stray = [n["node-name"] for n in found if (s := nodes.suffix_of(n["node-name"])) is not None and s not in kept]
    above = layers[-2]
    if above is None or (base is not None and not stray):
        return None
    return Plan(above, base, stray)


async def fold(process: Process, chain: Sequence[tuple[Path, str]], *, anew: bool = False) -> bool:
    """Makes `chain` the layers of a machine that runs or is paused: its overlays as they are, top first, and a raw file
    with the same content as what was below them. `anew`: opens that file again, although the machine stands on it.

    Call it with the process's `disks_lock` held. The same again is fine; returns whether there was anything to do.
    Raises MachineFailed; the machine then stands on what it stood on.
    """
    execute = process.session.execute
    found = await execute("query-named-block-nodes", {"flat": True})
    todo = plan(found, chain, anew=anew)
    if todo is None:
        process.disks = chain
        return False
    async with contextlib.AsyncExitStack() as undo:
        base = todo.base
        if base is None:
            base = f"-{secrets.token_hex(4)}"
            path, driver = chain[-1]
            for options in (nodes.file_node(base, path, disks.aio_engine()), nodes.format_node(base, driver, None)):
                await execute("blockdev-add", options)
                undo.push_async_callback(_delete, process, options["node-name"])
        above = nodes.format_node(todo.above, "qcow2", base)
        await execute("blockdev-reopen", {"options": [above]}, timeout_s=_REOPEN_TIMEOUT_S)
        undo.pop_all()
    await _delete_all(process, todo.stray)
    process.disks = chain
    return True


async def _delete_all(process: Process, names: Sequence[str]) -> None:
    """Deletes nodes that only each other use. QEMU lists the newest first, which says nothing of who uses whom after a
    fold, and refuses to delete one that is used: so round after round, while any goes."""
    while names:
        refused: dict[str, MachineFailed] = {}
        for name in names:
            try:
                await process.session.execute("blockdev-del", {"node-name": name})
            except MachineFailed as error:
                refused[name] = error
        if len(refused) == len(names):
            raise next(iter(refused.values()))
        names = list(refused)


async def _delete(process: Process, name: str) -> None:
    with contextlib.suppress(MachineFailed):
        await process.session.execute("blockdev-del", {"node-name": name})
