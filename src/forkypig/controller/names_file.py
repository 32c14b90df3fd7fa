"""FORKY_HOME/run/names: what shells complete, a kind and a name a line. Shells read it themselves, in milliseconds,
where a client in Python would take a second on a busy computer; they find none where there is no controller."""

import asyncio
import contextlib
import time
from pathlib import Path

import structlog

from forkypig.controller.store import Store, images, machines, pools, snapshots, tenants
from forkypig.errors import ForkyError
from forkypig.model.access import DEFAULT_TENANT

log = structlog.get_logger()

_LOOK_EVERY_S = 5.0  # other controllers' writes are not announced to us
_BREATH_S = 0.5  # many things change at once
_SHARE = 20  # ten thousand names take 30 ms, in which nobody is answered: a twentieth of the time goes to it at most


async def keep(store: Store, path: Path) -> None:
    """Keeps the file as the database is, for ever: the home's own tenant, since the file is its owner's."""
    written = ""
    while True:
        changed = store.next_write()
        began = time.monotonic()
        try:
            content = await _content(store)
            if content != written:
                _write(path, content)
                written = content
        except (ForkyError, OSError) as error:
            log.warning("no names for shells", error=str(error))
        took_s = time.monotonic() - began
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_EVERY_S):
                await changed.wait()
                await asyncio.sleep(max(_BREATH_S, _SHARE * took_s))


async def _content(store: Store) -> str:
    async with store.read() as tx:
        found = {
            "machine": await machines.names_of(tx, DEFAULT_TENANT),
            "snapshot": await snapshots.tags(tx, DEFAULT_TENANT),
            "image": {image.name for image in await images.every(tx)},
            "pool": {pool.name for pool in await pools.every(tx) if pool.tenant == DEFAULT_TENANT},
            "tenant": {tenant.name for tenant in await tenants.every(tx)},
        }
    return "".join(f"{kind} {name}\n" for kind, names in found.items() for name in sorted(names))


def _write(path: Path, content: str) -> None:
    """Readers see the old file or the new one. Names have no blanks: model.check_name."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(content)
    new.replace(path)
